"""Who takes part in insertion.py: what `reduce` tries, and the rivals that need no learned token.

`contenders(host, image, budget)` lists them with their places, each as dear as the budget allows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from baselines import MergedBlocks, average_pool, match, merge_pairs, top_k
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.models.hosts import find_host
from tokenlearner.training.candidates import Candidate, find_candidates
from tokenlearner.utils.modules import clone_structure


@dataclass(frozen=True)
class Student:
    """A model to fit, and where it begins to differ from its host.

    Args:
        model: As it will be used.
        first: The first block of its own; None if all of them see other tokens.
        size: Of its images, if it is not the host's.
        same_depth: Its blocks stand for the host's, so that what is behind them can be compared.
    """

    model: nn.Module
    first: int | None
    size: tuple[int, int] | None = None
    same_depth: bool = True


@dataclass(frozen=True)
class Contender:
    """A way to spend a budget.

    Args:
        kind: What it is called at any budget.
        name: The same with its place.
        build: Makes it of a copy of the host.
        is_candidate: `reduce` tries it.
        token_loss: Its tokens are compared with what its maps make of the host's last positions.
    """

    kind: str
    name: str
    build: Callable[[Any], Student]
    is_candidate: bool = False
    token_loss: bool = False


def contenders(host: nn.Module, image: Tensor, budget: float) -> dict[str, Contender]:
    """Lists all contenders of a budget by their kind.

    Args:
        host: timm's VisionTransformer; it is left as it is.
        image: One image as it takes it, `1 c h w`.
        budget: Share of its multiply-adds.
    """
    found = [*_rivals(host, image, budget), *_candidates(host, image, budget)]
    return {contender.kind: contender for contender in found}  # a rival may be a candidate too


def _candidates(host: nn.Module, image: Tensor, budget: float) -> Iterator[Contender]:
    listed = [candidate for candidate, _ in find_candidates(host, image, budget)][1:]
    sizes = sorted({c.img_size for c in listed if c.img_size and c.num_tokens})
    for c in listed:
        kind = f"{c.num_tokens} tokens" + " early" * bool(c.overlap)
        if c.img_size and c.num_tokens:
            kind = f"smaller image {sizes.index(c.img_size) + 1} and {kind}"
        elif c.img_size:
            kind = "smaller image"
        yield Contender(kind, c.name, partial(_candidate, c), is_candidate=True)


def _candidate(candidate: Candidate, host: nn.Module) -> Student:
    return Student(candidate.apply(host), candidate.first, candidate.img_size)


def _rivals(host: Any, image: Tensor, budget: float) -> Iterator[Contender]:
    costs = _Places(host, image, budget)
    few, many = counts_of(math.prod(find_host(host).grid.grid_size))
    for k in (few, many):
        if (at := costs.deepest(k)) is not None:
            yield Contender(f"{k} tokens", f"{k} tokens at {at}", partial(_learned, k, at))
            for kind, build in POOLS.items():
                if kind == "top" and not at:
                    continue  # no block before says what to keep
                yield Contender(f"{kind} {k}", f"{kind} {k} at {at}", partial(build, k, at))
    at = costs.deepest(few)
    if at is not None:
        for k in (few // 4, few // 2):
            yield Contender(
                f"{k} tokens, same place", f"{k} tokens at {at}", partial(_learned, k, at)
            )
        elastic = partial(_learned, few, at, elastic=True)
        yield Contender("elastic", f"elastic, 1 to {few} tokens at {at}", elastic)
        name = f"{few} tokens at {at}, token-level loss"
        yield Contender("token-level loss", name, partial(_learned, few, at), token_loss=True)
    if places := costs.two_places(few):
        name = " and ".join(f"{k} at {at}" for k, at in zip(*places, strict=True))
        yield Contender("two places", f"tokens at two places, {name}", partial(_learned, *places))
    r = costs.merged_each()
    yield Contender("merged in every block", f"{r} merged in every block", partial(_merged_each, r))
    if (at := costs.deepest(0)) is not None:
        yield Contender("no tokens", f"class token alone at {at}", partial(_prefix_alone, at))
    depth = costs.first_blocks()
    yield Contender("first blocks", f"first {depth} blocks", partial(_first_blocks, depth))


def counts_of(positions: int) -> tuple[int, int]:
    """Few and many tokens for so many positions: 16 and 64 of 256, 8 and 24 of 49."""
    few = 16 if positions >= 144 else 8
    return few, min(4 * few, positions // 2)


class _Places:
    """Counts what students cost on the meta device, where nothing is computed."""

    def __init__(self, host: nn.Module, image: Tensor, budget: float):
        self.host, self.image, self.budget = host, image, budget
        self.structure = clone_structure(host, "meta")
        self.depth, self.whole = len(find_host(host).blocks), self._macs(self.structure)

    def _macs(self, model: nn.Module) -> int:
        return count_macs(model.eval(), self.image[:1].to("meta"))

    def fits(self, build: Callable[[Any], Student]) -> bool:
        student = build(clone_structure(self.structure, "meta"))
        return self._macs(student.model) <= self.budget * self.whole

    def deepest(self, k: int) -> int | None:
        """The deepest place of so many tokens within the budget; 0 leaves the prefix alone."""
        places = range(self.depth - 1, -1, -1)
        return next((at for at in places if self.fits(partial(_at, k, at))), None)

    def two_places(self, few: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Half of the positions early, few tokens later: the deepest second place that fits."""
        half = math.prod(find_host(self.host).grid.grid_size) // 2
        for first in range(self.depth - 2, 0, -1):
            for second in range(self.depth - 1, first + self.depth // 4 - 1, -1):
                counts, places = (half, few), (first, second)
                if self.fits(partial(_learned, counts, places)):
                    return counts, places
        return None

    def merged_each(self) -> int:
        most = math.prod(find_host(self.host).grid.grid_size) // 2
        return bisect_left(range(most), True, key=lambda r: self.fits(partial(_merged_each, r)))

    def first_blocks(self) -> int:
        return max(n for n in range(1, self.depth) if self.fits(partial(_first_blocks, n)))


def _at(k: int, at: int, host: nn.Module) -> Student:
    return _learned(k, at, host) if k else _prefix_alone(at, host)


def _learned(k: Any, at: Any, host: nn.Module, elastic: bool = False) -> Student:
    return Student(insert(host, k, at, elastic=elastic), at if isinstance(at, int) else at[0])


def _region_means(k: int, at: int, host: Any) -> Student:
    return Student(average_pool(host, k, at), at)


def _most_attended(k: int, at: int, host: Any) -> Student:
    return Student(top_k(host, k, at, mean_of_rest=True), at - 1)  # it asks the block before


def _merged_once(k: int, at: int, host: Any) -> Student:
    return _with_learner(MergedOnce(k), at, host)


def _prefix_alone(at: int, host: Any) -> Student:
    return _with_learner(NoTokens(), at, host)


def _with_learner(learner: nn.Module, at: int, host: Any) -> Student:
    """Another module in the place of learned tokens."""
    host.blocks[at] = ReducedBlock(host.blocks[at], learner, host.num_prefix_tokens).eval()
    return Student(host, at)


def _merged_each(r: int, host: Any) -> Student:
    merged, passed = MergedBlocks(host.blocks, [r] * len(host.blocks), host.num_prefix_tokens), []
    host.blocks = nn.Sequential(*(MergingBlock(merged, i, passed) for i in range(len(host.blocks))))
    return Student(host.eval(), None)


def _first_blocks(depth: int, host: Any) -> Student:
    host.blocks = host.blocks[:depth]
    return Student(host, None, same_depth=False)


POOLS = {"pooled to": _region_means, "top": _most_attended, "merged to": _merged_once}


class NoTokens(nn.Module):
    """A learner that leaves nothing of the positions: blocks see the prefix tokens alone."""

    num_tokens = 0

    def forward(self, x: Tensor, grid: Any = None) -> Tensor:
        return x[:, :0]


class MergedOnce(nn.Module):
    """A learner without parameters that merges similar positions until `k` are left.

    In each round every other position looks for the most similar of the rest, and as many as are
    too many are merged into theirs; means are weighted by how many positions a token stands for.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, x: Tensor, grid: Any = None) -> Tensor:
        sizes = torch.ones_like(x[..., 0], dtype=torch.float32)
        while (n := x.shape[1]) > self.num_tokens:
            pairs = match(x, min(n - self.num_tokens, n // 2))
            x, sizes = merge_pairs(x, sizes, *pairs)
        return x


class MergingBlock(nn.Module):
    """A block of `MergedBlocks` that stays one of a list; sizes pass beside the tokens."""

    def __init__(self, merged: MergedBlocks, index: int, passed: list[Tensor]):
        super().__init__()
        self.block, self.r = merged.get_submodule(str(index)), merged.schedule[index]
        self._merged, self._is_first, self._passed = (merged,), index == 0, passed

    def forward(self, x: Tensor) -> Tensor:
        (merged,) = self._merged
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if self._is_first else self._passed[0]
        x, sizes = merged.run_block(self.block, x, sizes, self.r)
        self._passed[:] = [sizes]
        return x
