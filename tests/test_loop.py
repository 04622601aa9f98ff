"""The loop: its steps, its learning rate, what counts in its loss, and how it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner import TrainConfig
from tokenlearner.data import ImageDataset
from tokenlearner.distill import Distillation
from tokenlearner.loop import Loop

TIMM: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 4,
    "in_chans": 1,
}


def data(n: int = 16, c: int = 1) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, c, 16, 16), generator=generator).byte()
    return ImageDataset(
        "noise", "train", images, torch.arange(n) % 4, tuple("abcd"), (0.5,), (0.2,)
    )


def vit() -> nn.Module:
    return VisionTransformer(**TIMM)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"out": "nowhere", "epochs": 3, "batch_size": 4, "lr": 3e-3} | changes)


def loop(rows: list[dict[str, Any]] | None = None, **changes: Any) -> Loop:
    return Loop(config(**changes), vit(), data(), (rows if rows is not None else []).append)


def test_the_learning_rate_rises_and_falls() -> None:
    rows: list[dict[str, Any]] = []
    run = loop(rows)
    for _ in range(3):
        run.epoch()
    lrs = [row["lr"] for row in rows]
    assert lrs[3] == max(lrs) == 3e-3  # 4 steps an epoch, 1 epoch of warm-up
    assert lrs[:4] == sorted(lrs[:4])
    assert lrs[3:] == sorted(lrs[3:], reverse=True)
    assert lrs[-1] < 3e-5


def test_every_step_is_reported() -> None:
    rows: list[dict[str, Any]] = []
    run = loop(rows)
    for _ in range(3):
        run.epoch()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {row["steps"] for row in rows} == {12}


def test_an_epoch_returns_the_mean_loss_of_its_steps() -> None:
    rows: list[dict[str, Any]] = []
    row = loop(rows).epoch()
    assert row["train_loss"] == pytest.approx(sum(r["loss"] for r in rows) / 4)
    assert row["step"] == 4


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    loop(clip_grad=0.01).epoch()
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_parameters_that_need_no_gradient_stay() -> None:
    run = loop()
    run.model.patch_embed.requires_grad_(False)
    before = run.model.patch_embed.proj.weight.clone()
    run.epoch()
    assert torch.equal(run.model.patch_embed.proj.weight, before)


def test_pictures_are_changed_before_they_are_looked_at() -> None:
    seen: list[Tensor] = []
    model = vit()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Loop(config(reprob=1.0, epochs=1, warmup_epochs=0.0, workers=0), model, data()).epoch()
    plain = torch.cat([images for images, _ in data().batches(4)])
    untouched = (torch.cat(seen)[:, None] == plain[None]).flatten(2).all(-1)
    assert len(torch.cat(seen)) == 16
    assert not untouched.any()


def test_an_epoch_goes_on_where_another_loop_was() -> None:
    first, other = loop(), loop()
    first.epoch()
    state = first.state()
    expected = first.epoch()
    other.restore(state)
    assert other.epoch()["train_loss"] == expected["train_loss"]
    for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- the loss -----------------------------------------------------------------------------------


def first_loss(taught_by: nn.Module | None = None, **changes: Any) -> tuple[float, Loop]:
    """The loss of the first step, with a learning rate at which nothing moves."""
    rows: list[dict[str, Any]] = []
    teaching = Distillation(taught_by, "logit") if taught_by else None
    options = {"batch_size": 16, "warmup_epochs": 0.0, "lr": 1e-12} | changes
    run = Loop(config(**options), vit(), data(), rows.append, teaching)
    run.epoch()
    return rows[0]["loss"], run


def batch() -> tuple[Tensor, Tensor]:
    return next(data().batches(16))


def test_without_a_teacher_the_loss_is_that_of_the_labels() -> None:
    loss, run = first_loss(smoothing=0.1)
    images, labels = batch()
    expected = F.cross_entropy(run.model(images), labels, label_smoothing=0.1)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_with_a_teacher_the_loss_is_the_teachers_as_far_as_it_counts() -> None:
    teacher = vit().eval()
    nn.init.normal_(teacher.head.weight)
    loss, run = first_loss(teacher, teacher="a", distill_loss_weight=3.0)
    _, taught = Distillation(teacher, "logit")(run.model, batch()[0])
    assert loss == pytest.approx(3 * taught.item(), rel=1e-4)


def test_labels_are_added_as_far_as_they_count() -> None:
    teacher = vit().eval()
    nn.init.normal_(teacher.head.weight)
    loss, run = first_loss(teacher, teacher="a", task_loss_weight=0.5)
    images, labels = batch()
    logits, taught = Distillation(teacher, "logit")(run.model, images)
    expected = taught + 0.5 * F.cross_entropy(logits, labels)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


# --- how it stops -------------------------------------------------------------------------------


def poison(run: Loop) -> None:
    next(run.model.parameters()).data.fill_(torch.nan)


def test_a_loss_that_is_not_finite_in_the_first_epoch_says_that_nothing_is_kept() -> None:
    run = loop()
    poison(run)
    expected = "loss is nan at step 1 of 12; there is no checkpoint in nowhere yet. Try a lower lr"
    with pytest.raises(RuntimeError, match=expected):
        run.epoch()


def test_a_loss_that_is_not_finite_later_names_the_checkpoint_that_is_kept() -> None:
    run = loop()
    run.epoch()
    poison(run)
    expected = "loss is nan at step 5 of 12; the last checkpoint in nowhere is from step 4"
    with pytest.raises(RuntimeError, match=expected):
        run.epoch()


def test_a_loss_that_is_not_finite_changes_no_weights() -> None:
    run = loop()
    poison(run)
    before = run.model.head.weight.clone()
    with pytest.raises(RuntimeError):
        run.epoch()
    assert torch.equal(run.model.head.weight, before)
