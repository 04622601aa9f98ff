"""The loop: its steps, its learning rate, what counts in its loss, and how it stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner import TrainConfig
from tokenlearner.data.dataset import MapDataset, UnreadableFile
from tokenlearner.data.factory import ImageDataset
from tokenlearner.layers.onednn import OneDNNLinear
from tokenlearner.training.distillation import Distillation
from tokenlearner.training.objective import label_loss
from tokenlearner.training.trainer import Trainer

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


def loop(rows: list[dict[str, Any]] | None = None, **changes: Any) -> Trainer:
    return Trainer(config(**changes), vit(), data(), (rows if rows is not None else []).append)


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
    norms.clear()
    loop(clip_grad=0.0, loss="sigmoid", task_loss_weight=100.0).epoch()
    assert min(norms) > 10


def test_parameters_that_need_no_gradient_stay() -> None:
    run = loop()
    run.model.patch_embed.requires_grad_(False)
    before = run.model.patch_embed.proj.weight.clone()
    run.epoch()
    assert torch.equal(run.model.patch_embed.proj.weight, before)


def test_images_are_changed_before_they_are_looked_at() -> None:
    seen: list[Tensor] = []
    model = vit()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Trainer(config(reprob=1.0, epochs=1, warmup_epochs=0.0, workers=0), model, data()).epoch()
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


def first_loss(taught_by: nn.Module | None = None, **changes: Any) -> tuple[float, Trainer]:
    """The loss of the first step, with a learning rate at which nothing moves."""
    rows: list[dict[str, Any]] = []
    teaching = Distillation(taught_by, "logit") if taught_by else None
    options = {"batch_size": 16, "warmup_epochs": 0.0, "lr": 1e-12} | changes
    run = Trainer(config(**options), vit(), data(), rows.append, teaching)
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


def poison(run: Trainer) -> None:
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


def spoil(run: Trainer, step: int) -> None:
    """Makes the images of one step such that no loss is finite."""
    read = run.data.get_batch

    def take(index: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = read(index)
        return images * (math.nan if run.step == step else 1), labels

    object.__setattr__(run.data, "get_batch", take)


def test_a_step_whose_loss_is_not_finite_can_be_left_out() -> None:
    rows: list[dict[str, Any]] = []
    run = loop(rows, nan="skip", ema_decay=0.5)
    seen = []
    run.after_step = lambda: seen.append(vector(run.model))
    spoil(run, 2)
    row = run.epoch()
    assert torch.equal(seen[2], seen[1])
    assert not torch.equal(seen[1], seen[0])
    assert row["skipped_steps"] == 1
    assert vector(run.average.module).isfinite().all()
    warnings = [told["warning"] for told in rows if "warning" in told]
    assert warnings == ["step 3 is left out: its loss is nan"]


def test_the_mean_loss_is_that_of_the_steps_that_were_made() -> None:
    rows: list[dict[str, Any]] = []
    run = loop(rows, nan="skip")
    spoil(run, 2)
    mean = run.epoch()["train_loss"]
    made = [row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))]
    assert len(made) == 3
    assert mean == pytest.approx(sum(made) / 3)


def test_an_epoch_of_which_every_step_is_left_out_ends_the_run() -> None:
    run = loop(nan="skip")
    poison(run)
    with pytest.raises(RuntimeError, match="every step of the epoch that ends with step 4 was"):
        run.epoch()


class Steep(torch.autograd.Function):
    """Gives what it is given, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.inf


@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_changes_no_weights(nan: str) -> None:
    run = loop(nan=nan)
    run.model.head.register_forward_hook(
        lambda *x: Steep.apply(x[-1]) if run.step == 2 and run.model.training else None
    )
    if nan == "stop":
        expected = "the gradient's norm is (nan|inf) at step 3 of 12; there is no checkpoint"
        with pytest.raises(RuntimeError, match=expected):
            run.epoch()
    else:
        assert run.epoch()["skipped_steps"] == 1
    assert vector(run.model).isfinite().all()


class Files(MapDataset):
    """The images as if in files, some of which are broken."""

    def __init__(self, bad: set[int]):
        self.data, self.bad = data(), bad
        for name in ("name", "labels", "classes", "shape"):
            setattr(self, name, getattr(self.data, name))

    def eval_transform(self, raw: Any) -> Tensor:
        return self.data.eval_transform(raw)

    def select(self, indices: Tensor) -> Any:
        raise NotImplementedError

    def load(self, index: int) -> Any:
        if index in self.bad:
            raise UnreadableFile(f"{index}.jpg is empty")
        return self.data.load(index)


def of_files(bad: set[int], **changes: Any) -> Trainer:
    files: Any = Files(bad)
    return Trainer(config(workers=0, **changes), vit(), files)


def test_broken_files_are_counted_once() -> None:
    run = of_files({3, 7}, max_broken=2)
    assert [run.epoch()["broken"] for _ in range(3)] == [2, 2, 2]


def test_more_broken_files_than_are_allowed_stop_the_run_with_their_names() -> None:
    run = of_files({3, 7}, max_broken=1)
    expected = "2 files cannot be read, max_broken is 1: 3.jpg is empty; 7.jpg is empty. Mend them"
    with pytest.raises(RuntimeError, match=expected):
        run.epoch()


def test_broken_files_are_remembered_where_a_run_goes_on() -> None:
    run, other = of_files({3, 7}), of_files({3, 7})
    run.epoch()
    other.restore(run.state())
    assert other.broken == {"3.jpg is empty", "7.jpg is empty"}


# --- how weights change -------------------------------------------------------------------------


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


SGD: dict[str, Any] = {"opt": "sgd", "lr": 0.1, "warmup_epochs": 0.0, "batch_size": 8}


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_step_add_up_to_it(parts: int) -> None:
    torch.manual_seed(0)
    whole = loop(**SGD)
    torch.manual_seed(0)
    in_parts = loop(**SGD, grad_accum_steps=parts)
    for _ in range(2):
        loss = whole.epoch()["train_loss"]
        assert in_parts.epoch()["train_loss"] == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(vector(in_parts.model), vector(whole.model), rtol=0, atol=1e-6)


def test_the_moving_average_is_that_of_the_formula() -> None:
    run = loop(ema_decay=0.8, lr=0.01)
    expected, seen = vector(run.model), []
    run.after_step = lambda: seen.append(vector(run.model))
    run.epoch()
    for weights in [*seen, vector(run.model)]:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(vector(run.average.module), expected, rtol=0, atol=1e-6)
    assert run.judged is run.average.module
    assert not torch.allclose(expected, vector(run.model), atol=1e-4)


def test_earlier_blocks_have_lower_rates() -> None:
    run = loop(layer_decay=0.5, warmup_epochs=0.0)
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
    head, second, first, stem = (
        rates[name]
        for name in (
            "head.weight",
            "blocks.1.attn.qkv.weight",
            "blocks.0.attn.qkv.weight",
            "patch_embed.proj.weight",
        )
    )
    assert head == 3e-3
    assert second / first == pytest.approx(2)
    assert first / stem == pytest.approx(2)
    assert second < head


def test_biases_and_norms_are_not_decayed() -> None:
    run = loop(weight_decay=0.3)
    names = {id(p): name for name, p in run.model.named_parameters()}
    decays = {
        names[id(p)]: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]
    }
    assert decays["blocks.0.mlp.fc1.weight"] == 0.3
    assert {decays[n] for n in ("blocks.0.mlp.fc1.bias", "blocks.0.norm1.weight", "pos_embed")} == {
        0
    }


@pytest.mark.parametrize("sched", ["linear", "cosine"])
def test_the_rate_falls_to_its_least(sched: str) -> None:
    run = loop(sched=sched, min_lr=1e-3)
    rates = []
    for step in range(13):
        run.schedule.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    assert (max(rates), rates[-1]) == (rates[4], pytest.approx(1e-3))
    if sched == "linear":
        torch.testing.assert_close(torch.tensor(rates[4:]), torch.linspace(3e-3, 1e-3, 9))
    else:
        expected = 1e-3 + 2e-3 * (1 + torch.cos(torch.linspace(0, math.pi, 9))) / 2
        torch.testing.assert_close(torch.tensor(rates[4:]), expected)


def test_a_constant_rate_stays_where_the_warm_up_ends() -> None:
    run = loop(sched="constant")
    rates = []
    for step in range(13):
        run.schedule.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(torch.tensor(rates[:5]), torch.linspace(0, 3e-3, 5))
    assert set(rates[4:]) == {3e-3}


def test_warming_up_takes_as_many_steps_as_asked_for() -> None:
    rates = []
    run = loop(warmup_steps=6)
    for step in range(12):
        run.schedule.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(torch.tensor(rates[:7]), torch.linspace(0, 3e-3, 7))
    assert rates[7] < 3e-3


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps is 12, expected fewer than the 12 steps"):
        loop(warmup_steps=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt": "abacus"}, "opt is 'abacus', expected one of: .*adamw"),
        ({"opt": "sgd", "betas": [0.9, 0.99]}, "betas are .* but sgd has none; leave them out"),
        ({"opt": "adahessian"}, "needs gradients of gradients, or keeps .*; take another"),
        ({"opt": "adafactorbv"}, "keeps what a checkpoint cannot hold; take another"),
    ],
    ids=str,
)
def test_an_optimizer_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**options)


def test_the_optimizers_means_decay_as_asked_for() -> None:
    assert {g["betas"] for g in loop(betas=[0.5, 0.6]).optimizer.param_groups} == {(0.5, 0.6)}


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_sigmoid_loss_is_summed_over_classes_and_averaged_over_images(
    smoothing: float,
) -> None:
    """By hand, as scenic and optax define it: -t log p - (1 - t) log(1 - p)."""
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for k, x in enumerate(row):
            target = (1 - smoothing) * (k == label) + smoothing / 4
            p = 1 / (1 + math.exp(-x))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    loss = label_loss(config(loss="sigmoid", smoothing=smoothing), logits, labels)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_that_are_pure_are_as_plain_ones(loss: str, smoothing: float) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    smooth = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    asked = config(loss=loss, smoothing=smoothing)
    torch.testing.assert_close(label_loss(asked, logits, smooth), label_loss(asked, logits, labels))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_mixed_labels_is_the_mixed_loss(loss: str) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    one, other = F.one_hot(labels, 4).float(), F.one_hot(labels.flip(0), 4).float()
    asked = config(loss=loss)
    expected = 0.3 * label_loss(asked, logits, labels)
    expected = expected + 0.7 * label_loss(asked, logits, labels.flip(0))
    torch.testing.assert_close(label_loss(asked, logits, 0.3 * one + 0.7 * other), expected)


def test_images_and_labels_of_a_step_are_mixed() -> None:
    plain, _ = first_loss()
    seen: list[Tensor] = []
    run = Trainer(config(batch_size=16, mixup=0.8), vit(), data())
    run.model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    run.epoch()
    originals = next(data().batches(16))[0]
    assert not any((x == originals).flatten(1).all(1).any() for x in seen[0])
    assert plain > 0


# --- precision and compiling --------------------------------------------------------------------


def test_onednn_computes_student_and_teacher() -> None:
    run, teacher = config(onednn=True), vit()
    student = Trainer(run, vit(), data(), teaching=Distillation(teacher, "logit")).model
    for model in (student, teacher):
        assert any(isinstance(module, OneDNNLinear) for module in model.modules())


def test_weights_become_the_same_with_onednn() -> None:
    weights = []
    for onednn in (False, True):
        torch.manual_seed(0)
        run = loop(onednn=onednn)
        run.epoch()
        weights.append(vector(run.model))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


def test_in_bf16_blocks_calculate_in_it_and_weights_stay_in_float32() -> None:
    run, kinds = loop(mixed_precision="bf16", device="cpu"), set()
    run.model.blocks[0].mlp.fc1.register_forward_hook(lambda *x: kinds.add(x[-1].dtype))
    before = vector(run.model)
    row = run.epoch()
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert not torch.equal(vector(run.model), before)
    assert math.isfinite(row["train_loss"])


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights() -> None:
    torch.manual_seed(0)
    plain = loop(**SGD)
    torch.manual_seed(0)
    compiled = loop(**SGD, compile=True)
    plain.epoch()
    compiled.epoch()
    torch.testing.assert_close(vector(compiled.model), vector(plain.model), rtol=0, atol=1e-5)
    assert compiled.state()["model"].keys() == plain.state()["model"].keys()


# --- going on -----------------------------------------------------------------------------------

RANDOM: dict[str, Any] = {
    "mixup": 0.4,
    "cutmix": 1.0,
    "aa": "rand-m5",
    "hflip": 0.5,
    "ema_decay": 0.9,
    "smoothing": 0.1,
}


def dropping() -> nn.Module:
    return VisionTransformer(**TIMM, proj_drop_rate=0.3, drop_path_rate=0.3)


@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_loop_goes_on_bit_by_bit(at: int, workers: int, tmp_path: Path) -> None:
    first, other = (Trainer(config(**RANDOM, workers=workers), dropping(), data()) for _ in "ab")

    def save() -> None:
        if first.step == at:
            torch.save(first.state(), tmp_path / "state.pt")

    first.after_step = save
    for epoch in range(3):
        row = first.epoch()
        if epoch == 0 and at == 4:
            save()
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.manual_seed(5)
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    while other.epochs_done < 3:
        again = other.epoch()
    assert again["train_loss"] == row["train_loss"]
    assert torch.equal(vector(other.model), vector(first.model))
    assert torch.equal(vector(other.average.module), vector(first.average.module))


def test_a_state_does_not_change_with_the_loop_that_gave_it() -> None:
    run = loop(ema_decay=0.5)
    run.epoch()
    state = run.state()
    before = [
        x.clone() for x in (state["model"]["cls_token"], state["average"]["module.cls_token"])
    ]
    run.epoch()
    after = state["model"]["cls_token"], state["average"]["module.cls_token"]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_state_of_a_run_on_more_images_is_refused() -> None:
    state = loop().state()
    fewer = Trainer(config(), vit(), data(12))
    with pytest.raises(ValueError, match="of a run on 16 images, noise has 12 now; bring back"):
        fewer.restore(state)
