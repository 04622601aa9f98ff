"""The loop: its steps, its learning rate, what counts in its loss, and how it stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from files import Files
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner import TrainConfig
from tokenlearner.data.factory import ImageDataset
from tokenlearner.layers.onednn import OneDNNLinear
from tokenlearner.training.distillation import Distillation
from tokenlearner.training.losses import label_loss
from tokenlearner.training.trainer import Trainer

TIMM: dict[str, Any] = tiny.TIMM | {"depth": 2, "num_classes": 4, "in_chans": 1}


def data(n: int = 16, c: int = 1) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, c, 16, 16), generator=generator).byte()
    return ImageDataset(
        "noise", "train", images, torch.arange(n) % 4, tuple("abcd"), (0.5,), (0.2,)
    )


def vit() -> nn.Module:
    return VisionTransformer(**TIMM)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"out": "nowhere", "epochs": 3, "batch_size": 4, "lr": 3e-3, "log_interval": 1} | changes
    )


def loop(rows: list[dict[str, Any]] | None = None, **changes: Any) -> Trainer:
    return Trainer(config(**changes), vit(), data(), (rows if rows is not None else []).append)


@pytest.mark.parametrize(
    ("interval", "nan", "steps"), [(3, "stop", [3, 4, 6, 8, 9, 12]), (50, "skip", [4, 8, 12])]
)
def test_losses_are_reported_at_the_interval_and_counted_in_every_step(
    interval: int, nan: str, steps: list[int]
) -> None:
    rows: tuple[list[Any], list[Any]] = ([], [])
    means = []
    for run_rows, log_interval in zip(rows, (1, interval), strict=True):
        torch.manual_seed(0)
        run = loop(run_rows, log_interval=log_interval, nan=nan)
        means.append([run.train_epoch()["train_loss"] for _ in range(3)])
    assert [row["step"] for row in rows[0]] == list(range(1, 13))
    assert {row["steps"] for row in rows[0]} == {12}
    assert [row["step"] for row in rows[1]] == steps
    losses = {row["step"]: row["loss"] for row in rows[0]}
    assert [row["loss"] for row in rows[1]] == [losses[step] for step in steps]  # the same machine
    every = [*losses.values()]
    expected = [pytest.approx(sum(every[i : i + 4]) / 4) for i in (0, 4, 8)]
    assert means[0] == means[1] == expected


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    loop(clip_grad=0.01).train_epoch()
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    norms.clear()
    loop(clip_grad=0.0, loss="sigmoid", task_loss_weight=100.0).train_epoch()
    assert min(norms) > 10


def test_parameters_that_need_no_gradient_stay() -> None:
    run = loop()
    run.model.patch_embed.requires_grad_(False)
    before = run.model.patch_embed.proj.weight.clone()
    run.train_epoch()
    assert torch.equal(run.model.patch_embed.proj.weight, before)


# --- the loss -----------------------------------------------------------------------------------


def first_loss(distillation: Distillation | None = None, **changes: Any) -> tuple[float, Trainer]:
    """The loss of the first step, with a learning rate at which nothing moves."""
    rows: list[dict[str, Any]] = []
    options = {"batch_size": 16, "warmup_epochs": 0.0, "lr": 1e-12} | changes
    run = Trainer(config(**options), vit(), data(), rows.append, distillation)
    run.train_epoch()
    return rows[0]["loss"], run


def test_without_a_teacher_the_loss_is_that_of_the_labels() -> None:
    loss, run = first_loss(smoothing=0.1)
    images, labels = next(data().batches(16))
    expected = F.cross_entropy(run.model(images), labels, label_smoothing=0.1)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("teacher_weight", "label_weight"), [(3.0, None), (1.0, 0.5)])
def test_losses_of_teacher_and_labels_have_their_weights(
    teacher_weight: float, label_weight: float | None
) -> None:
    teacher = vit().eval()
    nn.init.normal_(teacher.head.weight)
    distillation = Distillation(teacher, "logit")
    weights = {"distill_loss_weight": teacher_weight, "task_loss_weight": label_weight}
    loss, run = first_loss(distillation, teacher="a", **weights)
    images, labels = next(data().batches(16))
    logits, expected = distillation(run.model, images)
    expected = teacher_weight * expected + (label_weight or 0) * F.cross_entropy(logits, labels)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


# --- how it stops -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_interval", "step", "left"),
    [
        (1, 6, "in nowhere is from step 4"),
        (3, 1, "there is no checkpoint"),
        (100, 6, "in nowhere is from step 4"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_epoch_and_names_the_checkpoint(
    log_interval: int, step: int, left: str
) -> None:
    """Whether it has been reported or not: it gets into no state that could be written."""
    run = loop(log_interval=log_interval)
    spoil(run, step - 1)
    if step > 4:
        run.train_epoch()
    run.after_step = lambda: run.step <= step or run.state()
    with pytest.raises(RuntimeError, match=f"loss is nan at step {step} of 12; .*{left}"):
        run.train_epoch()
    assert run.step <= step + 1


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
    row = run.train_epoch()
    assert torch.equal(seen[2], seen[1])
    assert not torch.equal(seen[1], seen[0])
    assert row["skipped_steps"] == 1
    made = [row["loss"] for row in rows if math.isfinite(row.get("loss", math.nan))]
    assert (len(made), row["train_loss"]) == (3, pytest.approx(sum(made) / 3))
    assert vector(run.average.module).isfinite().all()
    [warning] = [row["warning"] for row in rows if "warning" in row]
    assert "step 3" in warning


def test_an_epoch_of_which_every_step_is_left_out_ends_the_run() -> None:
    run = loop(nan="skip")
    next(run.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"no step .*step 4, .*there is no"):
        run.train_epoch()


class Steep(torch.autograd.Function):
    """Gives what it is given, and a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.inf


@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_a_gradient_that_is_not_finite_is_as_such_a_loss(nan: str) -> None:
    run = loop(nan=nan)
    run.model.head.register_forward_hook(
        lambda *x: Steep.apply(x[-1]) if run.step == 2 and run.model.training else None
    )
    if nan == "stop":
        with pytest.raises(RuntimeError, match=r"gradient's norm is (nan|inf) at step 3 of 12"):
            run.train_epoch()
    else:
        assert run.train_epoch()["skipped_steps"] == 1
        assert vector(run.model).isfinite().all()


def of_files(bad: set[int], **changes: Any) -> Trainer:
    files: Any = Files(data(), bad)
    return Trainer(config(workers=0, **changes), vit(), files)


def test_unreadable_files_are_counted_once_and_more_than_are_allowed_stop_the_run() -> None:
    run, other = of_files({3, 7}, max_broken=2), of_files({3, 7})
    assert [run.train_epoch()["broken"] for _ in range(2)] == [2, 2]
    other.load_state(run.state())
    assert other.unreadable == {"3.jpg is empty", "7.jpg is empty"}
    with pytest.raises(RuntimeError, match=r"max_broken is 1: 3\.jpg .*7\.jpg"):
        of_files({3, 7}, max_broken=1).train_epoch()


# --- how weights change -------------------------------------------------------------------------


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


SGD: dict[str, Any] = {"opt": "sgd", "lr": 0.1, "warmup_epochs": 0.0, "batch_size": 8}


def pair_of_loops(**changes: Any) -> list[Trainer]:
    """Two loops on the same weights, of which the second has more options."""
    loops = []
    for options in ({}, changes):
        torch.manual_seed(0)
        loops.append(loop(**SGD, **options))
    return loops


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_step_add_up_to_it(parts: int) -> None:
    whole, in_parts = pair_of_loops(grad_accum_steps=parts)
    for _ in range(2):
        loss = whole.train_epoch()["train_loss"]
        assert in_parts.train_epoch()["train_loss"] == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(vector(in_parts.model), vector(whole.model), rtol=0, atol=1e-6)


def test_the_moving_average_is_that_of_the_formula() -> None:
    run = loop(ema_decay=0.8, lr=0.01)
    expected, seen = vector(run.model), []
    run.after_step = lambda: seen.append(vector(run.model))
    run.train_epoch()
    for weights in [*seen, vector(run.model)]:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(vector(run.average.module), expected, rtol=0, atol=1e-6)
    assert run.eval_model is run.average.module
    assert not torch.allclose(expected, vector(run.model), atol=1e-4)


def groups(run: Trainer, option: str) -> dict[str, float]:
    """An option of the optimizer for each parameter's name."""
    names = {id(p): name for name, p in run.model.named_parameters()}
    return {names[id(p)]: g[option] for g in run.optimizer.param_groups for p in g["params"]}


def test_earlier_blocks_have_lower_rates() -> None:
    rates = groups(loop(layer_decay=0.5, warmup_epochs=0.0), "lr")
    second, first = (rates[f"blocks.{i}.attn.qkv.weight"] for i in (1, 0))
    assert rates["head.weight"] == 3e-3 > second
    assert second / first == pytest.approx(2)
    assert first / rates["patch_embed.proj.weight"] == pytest.approx(2)


def test_betas_reach_the_optimizer_and_biases_and_norms_are_not_decayed() -> None:
    run = loop(weight_decay=0.3, betas=[0.5, 0.6])
    decays = groups(run, "weight_decay")
    assert decays["blocks.0.mlp.fc1.weight"] == 0.3
    assert not any(
        decays[n] for n in ("blocks.0.mlp.fc1.bias", "blocks.0.norm1.weight", "pos_embed")
    )
    assert {group["betas"] for group in run.optimizer.param_groups} == {(0.5, 0.6)}


COSINE = 1e-3 + 2e-3 * (1 + torch.cos(torch.linspace(0, math.pi, 9))) / 2


@pytest.mark.parametrize(
    ("options", "falling"),
    [
        ({"sched": "linear", "min_lr": 1e-3}, torch.linspace(3e-3, 1e-3, 9)),
        ({"sched": "cosine", "min_lr": 1e-3}, COSINE),
        ({"sched": "constant"}, torch.full([9], 3e-3)),
        ({"warmup_steps": 6}, None),
    ],
    ids=str,
)
def test_the_rate_rises_and_falls_as_scheduled(
    options: dict[str, Any], falling: Tensor | None
) -> None:
    run, rates, warmup = loop(**options), [], options.get("warmup_steps", 4)
    for step in range(13):
        run.schedule.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    rising = torch.linspace(0, 3e-3, warmup + 1)
    torch.testing.assert_close(torch.tensor(rates[: warmup + 1]), rising)
    if falling is not None:
        torch.testing.assert_close(torch.tensor(rates[warmup:]), falling)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"warmup_steps": 12}, "warmup_steps is 12"),
        ({"epochs": None, "steps": 4, "warmup_epochs": 1.0}, "warmup_epochs is 1.0, 4 steps"),
        ({"opt": "abacus"}, "opt is 'abacus', .*adamw"),
        ({"opt": "sgd", "betas": [0.9, 0.99]}, "betas .* sgd"),
        ({"opt": "adahessian"}, "opt='adahessian'"),
        ({"opt": "adafactorbv"}, "opt='adafactorbv'"),
    ],
    ids=str,
)
def test_a_schedule_or_an_optimizer_that_cannot_be_is_refused(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        loop(**options)


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
def test_the_loss_of_mixed_labels_is_the_mixed_loss(loss: str, smoothing: float) -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    given = config(loss=loss, smoothing=smoothing)
    pair = labels, labels.flip(0)
    one, other = (F.one_hot(x, 4) * (1 - smoothing) + smoothing / 4 for x in pair)
    for share in (1.0, 0.3):
        plain = [label_loss(given, logits, x) for x in pair]
        mixed = label_loss(given, logits, share * one + (1 - share) * other)
        torch.testing.assert_close(mixed, share * plain[0] + (1 - share) * plain[1])


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"reprob": 1.0}], ids=str)
def test_images_are_mixed_or_augmented_before_the_model_gets_them(options: dict[str, Any]) -> None:
    seen: list[Tensor] = []
    run = loop(batch_size=16, workers=0, **options)
    run.model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    run.train_epoch()
    originals = next(data().batches(16))[0]
    [images] = seen
    assert images.shape == originals.shape
    assert not (images[:, None] == originals[None]).flatten(2).all(-1).any()


# --- precision and compiling --------------------------------------------------------------------


def test_onednn_computes_student_and_teacher_and_weights_become_the_same() -> None:
    plain, onednn = pair_of_loops(onednn=True)
    plain.train_epoch()
    onednn.train_epoch()
    torch.testing.assert_close(vector(onednn.model), vector(plain.model), rtol=1e-3, atol=1e-3)
    teacher = vit()
    Trainer(config(onednn=True), vit(), data(), distillation=Distillation(teacher, "logit"))
    for model in (onednn.model, teacher):
        assert any(isinstance(module, OneDNNLinear) for module in model.modules())


def test_in_bf16_blocks_calculate_in_it_and_weights_stay_in_float32() -> None:
    run, dtypes = loop(mixed_precision="bf16", device="cpu"), set()
    run.model.blocks[0].mlp.fc1.register_forward_hook(lambda *x: dtypes.add(x[-1].dtype))
    before = vector(run.model)
    row = run.train_epoch()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert not torch.equal(vector(run.model), before)
    assert math.isfinite(row["train_loss"])


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights() -> None:
    plain, compiled = pair_of_loops(compile=True)
    plain.train_epoch()
    compiled.train_epoch()
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


STEPS: dict[str, Any] = {"epochs": None, "steps": 21}  # 2 at a time; an epoch has 4


@pytest.mark.parametrize(
    ("at", "changes"),
    [(4, {}), (6, {}), (6, {"workers": 1}), (6, STEPS | {"workers": 1}), (7, STEPS)],
    ids=str,
)
def test_a_restored_loop_goes_on_bit_by_bit(
    at: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    options = config(**RANDOM | {"workers": 0} | changes)
    first, other = (Trainer(options, dropping(), data()) for _ in "ab")

    def save() -> None:
        if first.step == at:
            torch.save(first.state(), tmp_path / "state.pt")

    first.after_step = save
    while first.step < first.total_steps:
        row = first.train_epoch()
        save()
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.manual_seed(5)
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    while other.step < other.total_steps:
        again = other.train_epoch()
    assert again["train_loss"] == row["train_loss"]
    assert torch.equal(vector(other.model), vector(first.model))
    assert torch.equal(vector(other.average.module), vector(first.average.module))


def test_steps_are_those_of_epochs_evaluated_20_times_whatever_the_number_of_images() -> None:
    rows, reported = list[dict[str, Any]](), list[dict[str, Any]]()
    options = {"sched": "constant", "warmup_steps": 0, "log_interval": 100}
    torch.manual_seed(0)
    by_epochs = loop(**options)
    by_epochs.train_epoch()
    torch.manual_seed(0)
    run = loop(reported, **options, **STEPS)
    while run.step < run.total_steps:
        if run.step == 4:
            assert torch.equal(vector(run.model), vector(by_epochs.model))
        rows.append(run.train_epoch())
    assert (
        [row["step"] for row in rows] == [row["step"] for row in reported] == [*range(2, 21, 2), 21]
    )
    assert [row["epoch"] for row in rows] == [row["step"] / 4 for row in rows]
    assert {row["steps"] for row in reported} == {21}


def test_without_an_option_a_tenth_of_the_steps_warm_up() -> None:
    run, rates = loop(**STEPS), []
    for step in range(4):
        run.schedule.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0, 1.5e-3, 3e-3])
    assert rates[3] < rates[2]


def test_a_state_does_not_change_with_the_loop_that_gave_it() -> None:
    run = loop(ema_decay=0.5)
    run.train_epoch()
    state = run.state()
    pair = state["model"]["cls_token"], state["average"]["module.cls_token"]
    before = [x.clone() for x in pair]
    run.train_epoch()
    assert all(torch.equal(a, b) for a, b in zip(pair, before, strict=True))
    with pytest.raises(ValueError, match="16 images, noise has 12"):
        Trainer(config(), vit(), data(12)).load_state(state)
