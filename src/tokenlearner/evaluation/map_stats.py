"""Statistics of attention maps: `map_stats(maps)` says how far tokens look at different things.

Each map counts as a distribution over positions; V1's gates are divided by their sum for that.
Two maps are compared by their Bhattacharyya overlap, the sum over positions of `sqrt(p q)`: 1 for
the same map, 0 for maps that share no position. Unlike the cosine it does not let the few largest
weights decide, and it bounds what tokens can differ by: at most `sqrt(1 - overlap^2)` of the weight
is at other positions.

Axes: `b` images or clips, `t` frames, `k` tokens, `h w` grid, `n` positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..utils.validation import require

COLLAPSED = 0.99  # overlap from which on tokens share at least 86 % of their weight
EVEN = 0.95  # effective share of the image from which on a map is as good as average pooling


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of the maps of one insertion point; tokens are counted from 1."""

    images: int
    """Images or clips."""
    frames: int
    """Frames of each, as the maps have them; 1 for images."""
    grid: tuple[int, int]
    overlap: float | None
    """Overlap of two tokens in the same image, the mean over pairs, 0 to 1; None for one token."""
    pairs: list[list[float]]
    """The overlap of each token with each other one, mean over images and frames, `k k`."""
    entropy_bits: list[float]
    """Entropy of each token's map, 0 to `log2(n)`."""
    effective_share: list[float]
    """Share of the image over which each token spreads, `2^entropy / n`, up to 1."""
    over_frames: list[float] | None
    """Overlap of each token's map with its own in the next frame; None for single frames."""
    across_images: list[float] | None
    """Overlap of each token's map with its own in another image; None for a single image."""

    @property
    def alike(self) -> tuple[float, tuple[int, int]] | None:
        """The largest overlap of two tokens, and which ones; None for a single token."""
        k = len(self.pairs)
        pairs = [(self.pairs[i][j], (i + 1, j + 1)) for i in range(k) for j in range(i + 1, k)]
        return max(pairs, default=None)

    @property
    def collapsed(self) -> list[list[int]]:
        """Groups of tokens that look at the same thing in all images."""
        groups: list[list[int]] = []
        for i, row in enumerate(self.pairs):
            joined = [g for g in groups if any(row[j] >= COLLAPSED for j in g)]
            rest = [g for g in groups if g not in joined]
            groups = [*rest, [*chain.from_iterable(joined), i]]
        return sorted(sorted(i + 1 for i in group) for group in groups if len(group) > 1)

    def warnings(self) -> list[str]:
        """Returns a sentence for each thing that is wrong with the tokens."""
        sentences = [
            f"tokens {', '.join(map(str, group))} have collapsed onto each other: their "
            f"maps overlap by {COLLAPSED} or more, so at most 14 % of their weight lies elsewhere"
            for group in self.collapsed
        ]
        if even := [str(i + 1) for i, x in enumerate(self.effective_share) if x >= EVEN]:
            sentences.append(
                f"the maps of some tokens are almost even ({', '.join(even)}): they spread over "
                f"{EVEN:.0%} of the image or more, as average pooling does"
            )
        return sentences


def map_stats(maps: Tensor) -> AttentionStats:
    """Measures the maps of one insertion point, as `attention_maps` returns them.

    A map that is 0 everywhere, as gates can be, counts as an even one.

    Args:
        maps: `b k h w`, of clips `b t k h w`; no number below 0.

    Raises:
        ValueError: The maps have other axes, are empty, or hold NaN, infinity or numbers below 0.

    >>> left, right = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])
    >>> stats = map_stats(torch.stack([left, right]).reshape(1, 2, 2, 2))
    >>> stats.overlap, stats.entropy_bits, stats.effective_share
    (0.0, [1.0, 1.0], [0.5, 0.5])
    """
    require(
        maps.ndim in (4, 5) and maps.numel() > 0,
        f"maps are {list(maps.shape)}, expected [b, k, h, w] or of clips [b, t, k, h, w], none 0",
    )
    maps = maps.detach().double().cpu()
    fits = bool(maps.isfinite().all()) and bool((maps >= 0).all())
    require(fits, "maps hold NaN, infinity or numbers below 0, expected weights or gates")
    clips = maps if maps.ndim == 5 else maps[:, None]
    shares = _shares(clips.flatten(-2))
    root = shares.sqrt()
    pairs = torch.einsum("btkn,btjn->btkj", root, root).clamp(max=1).mean((0, 1))
    k = len(pairs)
    bits = torch.special.entr(shares).sum(-1) / math.log(2)
    return AttentionStats(
        images=len(clips),
        frames=clips.shape[1],
        grid=(maps.shape[-2], maps.shape[-1]),
        overlap=float((pairs.sum() - pairs.trace()) / (k * (k - 1))) if k > 1 else None,
        pairs=pairs.tolist(),
        entropy_bits=bits.mean((0, 1)).tolist(),
        effective_share=(bits.exp2() / shares.shape[-1]).mean((0, 1)).tolist(),
        over_frames=_over_frames(root),
        across_images=_across_images(root),
    )


def _shares(maps: Tensor) -> Tensor:
    total = maps.sum(-1, keepdim=True)
    even = torch.full_like(maps, 1 / maps.shape[-1])
    return torch.where(total > 0, maps / total.where(total > 0, 1.0), even)


def _over_frames(root: Tensor) -> list[float] | None:
    if root.shape[1] < 2:
        return None
    return (root[:, 1:] * root[:, :-1]).sum(-1).clamp(max=1).mean((0, 1)).tolist()


def _across_images(root: Tensor) -> list[float] | None:
    """Returns the mean over all pairs of images, from the square of their sum: `b t k n -> k`."""
    b = len(root)
    if b < 2:
        return None
    both = root.sum(0).square().sum(-1) - root.square().sum((0, -1))
    return (both / (b * (b - 1))).clamp(0, 1).mean(0).tolist()
