"""Plans of a place and a number of tokens that meet a budget, measured before any training.

The host is never touched: structural copies of it are counted and timed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.hosts import find_host
from ..models.insertion import insert
from ..utils.modules import clone_structure
from ..utils.validation import check_choice, check_count
from .flops import count_macs
from .latency import Seconds, Timing, time_interleaved

DEFAULT_TOKENS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Option:
    """The cost of `insert(model, option.num_tokens, option.at)`, interleaved with the host."""

    at: int | None
    """The first block that runs on tokens only; None is the host as it is."""
    num_tokens: int | None
    gmacs: float
    """Multiply-adds of one image, counted as 1, in 1e9; GFLOPs are twice that."""
    macs_share: float
    """Multiply-adds as a share of the host's, which is 1."""
    latency_ms: Timing
    """Time of the whole batch."""
    images_per_second: Timing
    speedup: Timing
    """Times as fast as the host, round by round."""

    @property
    def latency_share(self) -> float:
        """Latency as a share of the host's, which is 1."""
        return 1 / self.speedup.median

    @property
    def realized_speedup(self) -> float:
        """The speed-up as a share of the theoretical one, which is the ratio of multiply-adds."""
        return self.speedup.median * self.macs_share


def plan(
    model: nn.Module,
    images: Tensor,
    budget: float = 0.5,
    *,
    measure: str = "macs",
    num_tokens: Sequence[int] = DEFAULT_TOKENS,
    learner: str = "v11",
    fuse: bool = False,
    overlap: int = 0,
    rounds: int = 15,
) -> list[Option]:
    """Finds for each number of tokens the deepest block that meets a budget, and what it costs.

    Deeper is more accurate as a rule (the paper's figure 4); which pair is best, training tells.
    The model is left as it is, and so is torch's random state.

    Args:
        model: One that `insert` takes, without learned tokens.
        images: One batch as the model takes it, on its device.
        budget: Share of what the host costs, above 0 and up to 1.
        measure: What the budget is a share of: `"macs"` (multiply-adds, alike on all machines) or
            `"latency"` (of this batch on this machine; noisy where other programs run).
        num_tokens: Numbers of tokens to try; of the default those that an image has.
        learner: As in `insert`.
        fuse: As in `insert`.
        overlap: As in `insert`.
        rounds: Timed runs of each model, after two that are not counted.

    Returns:
        The host, then an option for each number of tokens that meets the budget, fewest first.

    Raises:
        ValueError: Nothing meets the budget, the model is unknown or has learned tokens already,
            or an argument is out of range.

    >>> import torch, tokenlearner
    >>> vit = tokenlearner.create_model("vit_mini_patch4_28")
    >>> host, *options = tokenlearner.plan(vit, torch.ones(1, 1, 28, 28), 0.6, rounds=2)
    >>> [(option.num_tokens, option.at) for option in options]
    [(4, 3), (8, 3), (16, 2)]
    """
    sizes = check_plan(budget, measure, num_tokens, rounds)
    check_count("the count of images", len(images))
    if tuple(sizes) == DEFAULT_TOKENS:
        n = math.prod(find_host(model).grid.grid_size)
        sizes = [k for k in sizes if k <= n]
    check_count("overlap", overlap, least=0)
    trials = _Trials(model, images, rounds, learner=learner, fuse=fuse, overlap=overlap)
    return (_within_macs if measure == "macs" else _within_latency)(trials, budget, sizes)


Pair = tuple[int | None, int | None]
_HOST: Pair = (None, None)


def check_plan(budget: float, measure: str, num_tokens: Sequence[int], rounds: int) -> list[int]:
    """Checks the arguments of `plan`, and returns the numbers of tokens in order, each once."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}, expected a share above 0 and up to 1, such as 0.5")
    check_choice("measure", measure, ("macs", "latency"))
    check_count("rounds", rounds, least=2)
    check_count("the count of num_tokens", len(num_tokens))
    return sorted({check_count("num_tokens", k) for k in num_tokens})


class _Trials:
    """Counts and times a host with tokens learned at pairs of a block and a number."""

    def __init__(self, model: nn.Module, images: Tensor, rounds: int, **kwargs: Any):
        self.model, self.images, self.rounds, self.kwargs = model, images, rounds, kwargs
        self.first, self.last = kwargs["overlap"], len(find_host(model).blocks) - 1
        if self.first > self.last:
            raise ValueError(
                f"overlap is {self.first}, but the model has {self.last + 1} blocks; pass less"
            )
        self.macs = cache(self._macs)

    def _macs(self, at: int | None, k: int | None) -> int:
        """Counts the multiply-adds of one image; on the meta device nothing is computed."""
        image = torch.empty_like(self.images[:1], device="meta")
        return count_macs(self._with_tokens(at, k, device="meta"), image)

    def share(self, at: int | None, k: int | None) -> float:
        """Returns the multiply-adds as a share of the host's."""
        return self.macs(at, k) / self.macs(*_HOST)

    def seconds(self, pairs: Sequence[Pair]) -> dict[Pair, Seconds]:
        """Times the host and all pairs interleaved."""
        models = {pair: self._with_tokens(*pair) for pair in (_HOST, *pairs)}
        with torch.inference_mode():
            runs = {pair: partial(model, self.images) for pair, model in models.items()}
            return time_interleaved(runs, self.rounds)

    def options(self, seconds: dict[Pair, Seconds]) -> list[Option]:
        """Returns the cost of the host and the pairs that were timed."""
        return [
            Option(
                at=at,
                num_tokens=k,
                gmacs=self.macs(at, k) / 1e9,
                macs_share=self.share(at, k),
                latency_ms=runs.latency_ms,
                images_per_second=runs.per_second(len(self.images)),
                speedup=runs.speedup_over(seconds[_HOST]),
            )
            for (at, k), runs in seconds.items()
        ]

    def _with_tokens(self, at: int | None, k: int | None, device: str | None = None) -> nn.Module:
        model = clone_structure(self.model, device).eval()
        if at is not None and k is not None:
            with torch.random.fork_rng(devices=[]):  # new learners draw their weights
                insert(model, k, at, **self.kwargs)
        return model


def _within_macs(trials: _Trials, budget: float, sizes: Sequence[int]) -> list[Option]:
    """Finds the deepest blocks by counting; only these are timed."""
    first, blocks = trials.first, range(trials.first, trials.last + 1)
    fitting = {k: bisect_right(blocks, budget, key=partial(trials.share, k=k)) for k in sizes}
    if pairs := [(blocks[count - 1], k) for k, count in fitting.items() if count]:
        return trials.options(trials.seconds(pairs))
    shares = {(first, k): trials.share(first, k) for k in sizes}
    raise _nothing_fits(budget, "multiply-adds", shares)


def _within_latency(trials: _Trials, budget: float, sizes: Sequence[int]) -> list[Option]:
    """Starts one block behind the estimate and goes back until all fit in one and the same run."""
    first, last = trials.first, trials.last
    measured = _shares(trials.seconds([(at, k) for at in (first, last) for k in sizes]))
    deepest = {
        k: first + _estimate(budget, last - first, measured[first, k], measured[last, k])
        for k in sizes
    }
    while pairs := [(at, k) for k, at in deepest.items() if at >= first]:
        seconds = trials.seconds(pairs)
        shares = _shares(seconds)
        if all(share <= budget for share in shares.values()):
            return trials.options(seconds)
        measured |= shares
        deepest = {k: at - (shares[at, k] > budget) for at, k in pairs}
    raise _nothing_fits(budget, "latency", measured)


def _shares(seconds: dict[Pair, Seconds]) -> dict[Pair, float]:
    """Returns the share of the host's time that each pair takes."""
    host, *pairs = seconds
    return {pair: 1 / seconds[pair].speedup_over(seconds[host]).median for pair in pairs}


def _estimate(budget: float, last: int, low: float, high: float) -> int:
    """Returns one block behind the deepest in budget, from the shares at first and last block."""
    saved = max(high - low, 1e-9)  # noise may leave nothing
    return min(last, 1 + math.floor(last * (budget - low) / saved))


def _nothing_fits(budget: float, measure: str, shares: dict[Any, float]) -> ValueError:
    share, (at, k) = min((share, pair) for pair, share in shares.items())
    hint = "pass that or more" if share <= 1 else "tokens save nothing here, larger batches may"
    return ValueError(
        f"nothing meets a budget of {budget} of the host's {measure}; the smallest share is "
        f"{math.ceil(1000 * share) / 1000}, with num_tokens={k} at block {at}: {hint}"
    )
