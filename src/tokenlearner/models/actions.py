"""Actions of a robot as classes: `ActionBins` puts numbers into bins, and bins back into numbers.

Axes: `a` numbers of an action; `...` any axes in front, such as `b` or `b t`.
Source: Brohan et al., RT-1, arXiv 2212.06817: 256 equal bins a number. Smoothed targets: Imani and
White, arXiv 1806.04613 (HL-Gauss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.validation import check_count, is_number, require


class ActionBins(nn.Module):
    """Equal bins between the least and the largest value of each number of an action.

    A policy is a model with `num_classes=len(low)` and the same `num_bins`.

    Args:
        low: Least value of each number.
        high: Largest value; numbers beyond are put into the outermost bins.
        num_bins: Bins of each number.
        smoothing: Standard deviation, in bins, of the normal distribution around an action that
            `loss` compares with, so that bins nearby count as nearly right. 0 is the one bin alone,
            as in RT-1; with few demonstrations 0.75 to 2 is learned in fewer steps.

    Raises:
        ValueError: A range is empty or not finite, or `smoothing` is below 0.

    >>> bins = ActionBins([-1, 0], [1, 10], num_bins=4)
    >>> bins.to_bins(torch.tensor([[0.6, 2.0], [-7, 10]]))
    tensor([[3, 0],
            [0, 3]])
    >>> bins.to_actions(torch.tensor([[3, 0]]))
    tensor([[0.7500, 1.2500]])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        num_bins: int = 256,
        smoothing: float = 0.0,
    ):
        super().__init__()
        self.num_bins = check_count("num_bins", num_bins, least=2)
        require(
            is_number(smoothing) and 0 <= smoothing < math.inf,
            f"smoothing is {smoothing!r}, expected a number of bins from 0 on, such as 0.75",
        )
        self.smoothing = float(smoothing)
        ends = [torch.as_tensor(end, dtype=torch.float32) for end in (low, high)]
        shapes = [list(end.shape) for end in ends]
        require(
            shapes[0] == shapes[1] and ends[0].ndim == 1 and len(ends[0]) > 0,
            f"low and high are {shapes[0]} and {shapes[1]}, expected a value for each number",
        )
        width = ends[1] - ends[0]
        require(
            bool((width > 0).all() and torch.isfinite(width).all()),
            f"low is {ends[0].tolist()} and high {ends[1].tolist()}, expected finite, low below "
            "high",
        )
        for name, end in zip(("low", "high"), ends, strict=True):
            self.register_buffer(name, end)

    def to_bins(self, actions: Tensor) -> Tensor:
        """Returns the bin of each number: `... a -> ... a`, int64.

        Raises:
            ValueError: There are other numbers than ranges, or one is not finite.
        """
        self._check(actions, "actions")
        require(bool(torch.isfinite(actions).all()), "actions hold a number that is not finite")
        return self._place(actions).long().clamp(max=self.num_bins - 1)

    def to_actions(self, bins: Tensor) -> Tensor:
        """Returns the middle of bins, of the likeliest where logits are given.

        Shape:
            int64 `... a`, or logits `... a bins`, to float32 `... a`
        """
        if bins.is_floating_point():
            self._check_logits(bins)
            bins = bins.argmax(-1)
        self._check(bins, "bins")
        return self.low + (bins + 0.5) / self.num_bins * (self.high - self.low)

    def loss(self, logits: Tensor, actions: Tensor, present: Tensor | None = None) -> Tensor:
        """Returns the mean cross-entropy of actions.

        Args:
            logits: `... a bins`.
            actions: `... a`.
            present: `...` bool, whether there is an action; others count nothing, and may be
                anything. Without any the loss is 0.

        Raises:
            ValueError: Shapes do not fit, or a number is not finite.
        """
        self._check_logits(logits)
        got, expected = list(actions.shape), list(logits.shape[:-1])
        require(got == expected, f"actions are {got}, expected {expected} as the logits")
        if present is None:
            return F.cross_entropy(logits.flatten(0, -2).float(), self._targets(actions))
        got, expected = list(present.shape), list(actions.shape[:-1])
        require(got == expected, f"present is {got}, expected {expected}, one an action")
        chosen = present.to(torch.bool)
        logits, actions = logits[chosen], actions[chosen]
        losses = F.cross_entropy(
            logits.flatten(0, -2).float(), self._targets(actions), reduction="sum"
        )
        return losses / max(1, actions.numel())

    def _place(self, actions: Tensor) -> Tensor:
        """Returns where numbers are, in bins from the lowest end: `... a`."""
        part = (actions.float() - self.low) / (self.high - self.low)
        return (part * self.num_bins).clamp(0, self.num_bins)

    def _targets(self, actions: Tensor) -> Tensor:
        """Returns what logits are compared with: the bins, `n`, or the share of each, `n bins`."""
        bins = self.to_bins(actions).flatten()
        if not self.smoothing:
            return bins
        edges = torch.arange(self.num_bins + 1, device=bins.device)
        away = edges - self._place(actions).flatten()[:, None]
        shares = torch.special.ndtr(away / self.smoothing).diff(dim=-1)
        return shares / shares.sum(-1, keepdim=True)

    def _check(self, values: Tensor, name: str) -> None:
        got, count = list(values.shape), len(self.low)
        require(got[-1:] == [count], f"{name} are {got}, expected [..., {count}], one a range")

    def _check_logits(self, logits: Tensor) -> None:
        got, expected = list(logits.shape), [len(self.low), self.num_bins]
        require(
            got[-2:] == expected,
            f"logits are {got}, expected [..., {expected[0]}, {expected[1]}]; build the model with "
            f"num_classes={expected[0]} and num_bins={expected[1]}",
        )
