"""Actions in bins: there and back, the loss and what it leaves out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import FRAMES
from torch import nn

from tokenlearner.models.actions import ActionBins
from tokenlearner.models.framevit import FrameViT


def test_actions_come_back_within_half_a_bin_and_bins_as_they_were() -> None:
    bins = ActionBins([-1, 0, 5], [1, 10, 6])
    actions = bins.low + torch.rand(4, 7, 3) * (bins.high - bins.low)
    there = bins.to_bins(actions)
    assert (there.dtype, int(there.min()) >= 0, int(there.max()) < 256) == (torch.int64, True, True)
    half = (bins.high - bins.low) / 512
    assert ((bins.to_actions(there) - actions).abs() <= half * 1.001).all()
    assert torch.equal(bins.to_bins(bins.to_actions(there)), there)
    assert bins.to_bins(torch.tensor([-9.0, 99, 6])).tolist() == [0, 255, 255]
    logits = F.one_hot(there, 256).float()
    assert torch.equal(bins.to_actions(logits), bins.to_actions(there))


def test_the_loss_is_the_cross_entropy_of_those_that_are_present() -> None:
    bins = ActionBins([-1, 0], [1, 10], num_bins=5)
    logits, actions = torch.randn(2, 3, 2, 5), torch.rand(2, 3, 2)
    expected = F.cross_entropy(logits.movedim(-1, 1), bins.to_bins(actions))
    torch.testing.assert_close(bins.loss(logits, actions), expected)
    present = torch.tensor([[True, False, True], [False, False, True]])
    some = bins.loss(logits[present], actions[present])
    actions[~present] = float("nan")
    torch.testing.assert_close(bins.loss(logits, actions, present), some)
    nothing = bins.loss(logits.requires_grad_(), actions, torch.zeros(2, 3, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0


def test_smoothed_targets_are_the_normal_distribution_around_an_action() -> None:
    bins = ActionBins([0], [8], num_bins=8, smoothing=0.75)
    actions = torch.tensor([[3.5], [0.0], [8.0], [99.0]])
    targets = bins._targets(actions)
    torch.testing.assert_close(targets.sum(-1), torch.ones(4))
    assert targets.argmax(-1).tolist() == [3, 0, 7, 7]
    torch.testing.assert_close(targets[0, 2:5], targets[0, 2:5].flip(0))
    normal = torch.distributions.Normal(3.5, 0.75).cdf(torch.arange(9.0)).diff()
    torch.testing.assert_close(targets[0], normal / normal.sum())
    logits = torch.randn(4, 1, 8)
    expected = -(targets * logits[:, 0].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(bins.loss(logits, actions), expected)
    present = torch.tensor([True, True, False, False])
    some = bins.loss(logits[:2], actions[:2])
    torch.testing.assert_close(bins.loss(logits, actions, present), some)
    near, far = (9 * torch.eye(8)[i].expand(1, 1, 8) for i in (4, 7))
    assert bins.loss(near, actions[:1]) < bins.loss(far, actions[:1])


def test_a_policy_learns_what_its_frames_say() -> None:
    torch.manual_seed(0)
    model: Any = FrameViT(**FRAMES | {"num_classes": 1, "num_bins": 4, "causal": True})
    bins, clips = ActionBins([0], [1], num_bins=4), torch.rand(32, 4)
    frames = clips[:, None, :, None, None].expand(-1, 3, -1, 16, 16)  # how bright it is
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = bins.loss(model.forward_frames(frames), clips[..., None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(bins.state_dict()) == 2
    assert isinstance(bins, nn.Module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ActionBins([0], [1, 2]), r"low and high are \[1\] and \[2\]"),
        (lambda: ActionBins([0, 1], [1, 1]), r"expected finite, low below high"),
        (lambda: ActionBins([0], [float("inf")]), r"expected finite"),
        (lambda: ActionBins([0], [1], num_bins=1), "num_bins is 1"),
        (lambda: ActionBins([0], [1], smoothing=-1), "smoothing is -1, expected a number of bins"),
        (lambda: ActionBins([0], [1]).to_bins(torch.zeros(2, 3)), r"actions are \[2, 3\]"),
        (lambda: ActionBins([0], [1]).to_bins(torch.tensor([float("nan")])), "not finite"),
        (
            lambda: ActionBins([0], [1]).loss(torch.zeros(2, 7), torch.zeros(2, 1)),
            r"logits are \[2, 7\], expected \[\.\.\., 1, 256\]; build the model with num_classes=1",
        ),
        (
            lambda: ActionBins([0], [1]).loss(torch.zeros(2, 1, 256), torch.zeros(3, 1)),
            r"actions are \[3, 1\], expected \[2, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
