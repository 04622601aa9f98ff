"""Ways to make a host cheaper that meet a budget: learned tokens, a smaller image, or both."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.flops import count_macs
from ..models.hosts import find_host
from ..models.insertion import insert
from ..utils.modules import clone_structure
from ..utils.validation import require

DEFAULT_TOKENS = (8, 16, 32, 64)
_SIZES_WITH_TOKENS = 2  # smaller images that tokens are learned on besides
_TOKENS_ON_SMALLER = (16, 32)


@dataclass(frozen=True)
class Candidate:
    """A way to make a host cheaper.

    Args:
        num_tokens: Tokens to learn; 0 is none.
        at: The block in front of which the positions leave, if tokens are learned.
        overlap: Blocks in which tokens run beside the positions before.
        img_size: Height and width of a smaller image; None is the host's.
    """

    num_tokens: int = 0
    at: int = 0
    overlap: int = 0
    img_size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        parts = []
        if self.img_size:
            h, w = self.img_size
            parts.append(f"{h} pixels" if h == w else f"{h} x {w} pixels")
        if self.num_tokens:
            born = f"{self.at - self.overlap}-" if self.overlap else ""
            parts.append(f"{self.num_tokens} tokens at {born}{self.at}")
        return ", ".join(parts)

    @property
    def first(self) -> int | None:
        """The first block that differs from the host's; None if all of them see other images."""
        return None if self.img_size else self.at - self.overlap

    def apply(self, host: nn.Module) -> nn.Module:
        """Changes a host in place, and returns it."""
        model: Any = host
        if self.img_size:
            model.set_input_size(img_size=self.img_size)
        if self.num_tokens:
            insert(model, self.num_tokens, self.at, overlap=self.overlap)
        return model


class ResizedInput(nn.Module):
    """A model of smaller images that takes those of its host.

    Args:
        model: The model.
        size: Height and width of its images.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model, self.size = model, size
        self.num_classes = getattr(model, "num_classes", None)

    def forward(self, images: Tensor) -> Any:
        """Resizes `b c h w` and runs the model."""
        return self.model(resize(images, self.size))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes `b c h w`, bicubic and smoothed."""
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return resized.to(images.dtype)


def find_candidates(
    host: nn.Module,
    image: Tensor,
    budget: float,
    num_tokens: Sequence[int] = DEFAULT_TOKENS,
) -> list[tuple[Candidate, int]]:
    """Lists ways to make a host cheaper that meet a budget, each as dear as it allows.

    These are numbers of tokens, each at the deepest place, the largest smaller image, and tokens on
    images of sizes between. A host whose `set_input_size` is missing has no smaller images.

    Args:
        host: A model that `insert` takes, without learned tokens.
        image: One image as it takes it, `1 c h w`.
        budget: Share of its multiply-adds.
        num_tokens: Numbers of tokens to try; those of at most half of the positions are.

    Returns:
        The host as the candidate that changes nothing, then the others, each with the multiply-adds
        of one image.

    Raises:
        ValueError: Nothing meets the budget; the message has the cheapest.
    """
    costs = _Costs(host, image)
    sizes = costs.smaller_sizes()
    fitting = bisect_right(sizes, budget, key=lambda size: costs.share(Candidate(img_size=size)))
    within, between = sizes[:fitting], sizes[fitting:]
    plans: list[tuple[Sequence[int], tuple[int, int] | None]] = [(num_tokens, None)]
    step = max(1, len(between) // (_SIZES_WITH_TOKENS + 1))
    for size in between[step - 1 :: step][:_SIZES_WITH_TOKENS] if between else ():
        plans.append((_TOKENS_ON_SMALLER, size))
    found = [c for counts, size in plans for c in costs.deepest(counts, size, budget)]
    found += [Candidate(img_size=size) for size in within[-1:]]
    if not found:
        cheapest = min(costs.cheapest(num_tokens), key=costs.share)
        raise ValueError(
            f"nothing meets a budget of {budget} of the host's multiply-adds; the smallest share "
            f"is {math.ceil(1000 * costs.share(cheapest)) / 1000}, with {cheapest.name}: pass that "
            "or more"
        )
    return [(candidate, costs.macs(candidate)) for candidate in (Candidate(), *found)]


class _Costs:
    """Counts multiply-adds of a host with candidates; on the meta device nothing is computed."""

    def __init__(self, host: nn.Module, image: Tensor):
        self.place, self._image = find_host(host), image
        self._host = clone_structure(host, "meta")
        self.depth, self._size = len(self.place.blocks), (image.shape[-2], image.shape[-1])
        self.macs = cache(self._macs)

    def _macs(self, candidate: Candidate) -> int:
        model = candidate.apply(clone_structure(self._host, "meta").eval())
        size = candidate.img_size or self._size
        return count_macs(
            model, self._image.new_empty((*self._image.shape[:-2], *size), device="meta")
        )

    def share(self, candidate: Candidate) -> float:
        return self.macs(candidate) / self.macs(Candidate())

    def smaller_sizes(self) -> list[tuple[int, int]]:
        """Returns smaller images of the host's shape, in whole patches, the smallest first."""
        rows, columns = self.place.grid.grid_size
        if not hasattr(self._host, "set_input_size") or self.place.frames > 1:
            return []
        h, w = (side // count for side, count in zip(self._size, (rows, columns), strict=True))
        grids = {(r, max(1, round(r * columns / rows))) for r in range(max(2, rows // 4), rows)}
        return [(r * h, c * w) for r, c in sorted(grids)]

    def deepest(
        self, counts: Sequence[int], size: tuple[int, int] | None, budget: float
    ) -> Iterator[Candidate]:
        """Yields the deepest place of each number of tokens within a budget.

        Tokens that are learned a block early come first, and others only where they can be deeper.
        """
        positions = math.prod(self.place.grid.grid_size)
        if size:
            positions = positions * math.prod(size) // math.prod(self._size)
        args = self.place.position_args
        overlaps = (0,) if args and (args.arguments or args.parameters) else (1, 0)
        guess = int(budget * self.depth)
        for k in counts:
            if k > positions // 2:
                continue
            deepest = -1
            for overlap in overlaps:
                plan = partial(Candidate, k, overlap=overlap, img_size=size)
                guess = at = self._search(plan, overlap, budget, guess)
                if at >= overlap and at > deepest:
                    deepest = at
                    yield Candidate(k, deepest, overlap, size)

    def _search(
        self, plan: Callable[[int], Candidate], least: int, budget: float, guess: int
    ) -> int:
        """Returns the deepest place within a budget, looked for around a guess, or `least - 1`."""
        at = min(max(guess, least), self.depth - 1)
        while at >= least and self.share(plan(at)) > budget:
            at -= 1
        while at + 1 < self.depth and self.share(plan(at + 1)) <= budget:
            at += 1
        return at

    def cheapest(self, counts: Sequence[int]) -> list[Candidate]:
        smallest = [Candidate(img_size=size) for size in self.smaller_sizes()[:1]]
        return [Candidate(min(counts), 0), *smallest]


def check_budget(budget: float) -> None:
    """Checks a share of the host's cost; raises ValueError."""
    is_share = isinstance(budget, int | float) and not isinstance(budget, bool) and 0 < budget < 1
    require(is_share, f"budget is {budget!r}, expected a share between 0 and 1, such as 0.5")
