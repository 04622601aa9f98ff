"""Calibrating: the host stays, its learners come closer to it, and the short cut is exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from tiny import HF, TIMM, torchvision_vit, transformers_vit
from torch import Tensor, nn

from tokenlearner import calibrate, insert, remove, set_num_tokens
from tokenlearner.models.features import new_parameters
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.hosts import find_host
from tokenlearner.models.insertion import get_insertion, wrapped_blocks
from tokenlearner.models.outputs import output_tensor, outputs_logits, summarize_tokens
from tokenlearner.models.vivit import ViViT
from tokenlearner.training.calibration import (
    Calibration,
    split_held_out,
    tail_parameters,
)
from tokenlearner.training.distillation import (
    feature_loss,
    forward_with_features,
    logit_loss,
    mixed_blocks,
    output_loss,
    unexplained_variance,
)
from tokenlearner.training.teacher import ImageViews, TeacherCache

AVERAGE: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
BIASED: dict[str, Any] = {"use_rel_pos_bias": True, "init_values": 0.1, "global_pool": "token"}
N, STEPS, LR = 48, 15, 2e-2


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**TIMM | changes)


class _OldLayer(nn.Module):
    """A block that returns a tuple, as those of transformers before version 5."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, head_mask: Any = None) -> tuple[Tensor]:
        return (hidden + torch.tanh(self.linear(hidden + hidden.mean(1, keepdim=True))),)


class _OldHost(nn.Module):
    """As much of an older ViTModel as insertion looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=16)
        self.embeddings = nn.Module()
        self.embeddings.patch_embeddings = nn.Conv2d(3, 16, 4, 4)
        self.embeddings.patch_embeddings.image_size = 16
        self.embeddings.patch_embeddings.patch_size = 4
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(_OldLayer() for _ in range(3))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x = self.embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        for layer in self.encoder.layer:
            x = layer(x)[0]
        return SimpleNamespace(last_hidden_state=x)


_OldHost.__module__, _OldHost.__qualname__ = "transformers.models.vit.modeling_vit", "ViTModel"


class Case(NamedTuple):
    """A host and how tokens are inserted in it."""

    build: Callable[[], nn.Module]
    insertion: dict[str, Any]
    clips: tuple[int, ...] = (3, 16, 16)


PLAIN: dict[str, Any] = {"num_tokens": 2, "at": 1}
CASES: dict[str, Case] = {
    "class token": Case(vit, PLAIN),
    "average": Case(lambda: vit(**AVERAGE), PLAIN),
    "first block": Case(vit, PLAIN | {"at": 0}),
    "last block": Case(vit, PLAIN | {"at": 2}),
    "two places": Case(vit, {"num_tokens": (4, 2), "at": (1, 2)}),
    "overlap": Case(vit, {"num_tokens": 2, "at": 2, "overlap": 2}),
    "overlap average": Case(
        lambda: vit(**AVERAGE, depth=4), {"num_tokens": 2, "at": 3, "overlap": 2}
    ),
    "fuse": Case(vit, PLAIN | {"fuse": True}),
    "fuse average": Case(lambda: vit(**AVERAGE), PLAIN | {"fuse": True}),
    "v1": Case(vit, PLAIN | {"learner": "v1-mean"}),
    "features": Case(lambda: vit(num_classes=0), PLAIN),
    "tokens": Case(lambda: vit(num_classes=0, global_pool="", class_token=False), PLAIN),
    "beit": Case(lambda: Beit(**TIMM | BIASED), PLAIN),
    "torchvision": Case(torchvision_vit, PLAIN),
    "hf features": Case(lambda: transformers.ViTModel(transformers.ViTConfig(**HF)), PLAIN),
    "hf classes": Case(transformers_vit, PLAIN),
    "hf tuples": Case(_OldHost, PLAIN),
    "overlap tuples": Case(_OldHost, {"num_tokens": 2, "at": 2, "overlap": 2}),
    "hf clips": Case(
        lambda: transformers.VideoMAEModel(transformers.VideoMAEConfig(**HF, num_frames=4)),
        PLAIN,
        (4, 3, 16, 16),
    ),
    "hf clips with a class": Case(
        lambda: transformers.VivitModel(
            transformers.VivitConfig(**HF, num_frames=4, tubelet_size=[2, 4, 4])
        ),
        PLAIN,
        (4, 3, 16, 16),
    ),
    "clips": Case(
        lambda: ViViT(**TIMM | {"num_frames": 4, "tubelet_size": 2}), PLAIN, (3, 4, 16, 16)
    ),
}
each_case = pytest.mark.parametrize("name", CASES)
QUICK = ("class token", "two places", "overlap average", "fuse", "tokens", "beit", "hf tuples")
QUICK += ("clips",)
each_calibrated = pytest.mark.parametrize("name", QUICK)


def make_images(size: tuple[int, ...] = (3, 16, 16), n: int = N) -> Tensor:
    """Images in which a few things vary, so that a few tokens can tell them."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(3, *size, generator=generator)
    return torch.einsum("bi,i...->b...", torch.randn(n, 3, generator=generator), directions)


def build(name: str) -> nn.Module:
    """A host whose parameters are drawn at random, so that nothing is hidden by a 0."""
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inserted(name: str) -> nn.Module:
    return insert(build(name), **CASES[name].insertion)


def out(model: nn.Module, images: Tensor, prefix: int = 1) -> Tensor:
    with torch.no_grad():
        return output_tensor(model(images), prefix)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Run(NamedTuple):
    """A calibrated model, what it was before, and what was returned."""

    model: nn.Module
    before: nn.Module
    images: Tensor
    done: Calibration


@cache
def run(name: str) -> Run:
    images, model = make_images(CASES[name].clips), inserted(name)
    before = copy.deepcopy(model)
    done = calibrate(model, images, steps=STEPS, batch_size=16, lr=LR, patience=0)
    return Run(model, before, images, done)


# --- what it does -------------------------------------------------------------------------------


@each_calibrated
def test_the_error_falls_and_the_output_comes_closer_to_the_hosts(name: str) -> None:
    model, before, images, done = run(name)
    assert done.error_after < 0.95 * done.error_before
    prefix = 0 if name in ("tokens", "hf clips") else 1
    host = out(build(name), images, prefix)
    far, near = (output_loss(out(m, images, prefix), host, m) for m in (before, model))
    assert near < far


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class token", "fuse", "clips"])
def test_learners_are_calibrated_on_the_chosen_device_as_on_the_cpu(
    name: str, device: torch.device
) -> None:
    model, expected = inserted(name).to(device), run(name).done
    images = make_images(CASES[name].clips).to(device)
    done = calibrate(model, images, steps=STEPS, batch_size=16, lr=LR, patience=0)
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert done.error_before == pytest.approx(expected.error_before, rel=0.02)
    assert done.error_after == pytest.approx(expected.error_after, rel=0.1)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@each_calibrated
def test_learners_and_fusers_change_and_nothing_else_on_the_model(name: str) -> None:
    model, before, _, _ = run(name)
    host = remove(copy.deepcopy(model))
    torch.testing.assert_close(parameters(host), parameters(build(name)), rtol=0, atol=0)
    for block, old in zip(*(wrapped_blocks(m).values() for m in (model, before)), strict=True):
        for part in ("learner", "fuser") if hasattr(block, "fuser") else ("learner",):
            pairs = zip(getattr(block, part).parameters(), getattr(old, part).parameters())  # noqa: B905
            assert any(not torch.equal(new, was) for new, was in pairs)
    assert [*model.state_dict()] == [*before.state_dict()]
    trained = [[p.requires_grad for p in m.parameters()] for m in (model, before)]
    assert trained[0] == trained[1]
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == hooks(before)


def variance(x: Tensor) -> Tensor:
    return x.var(0, correction=0, keepdim=True)


@pytest.mark.parametrize("images", [N, 17])
def test_the_error_is_that_of_the_output_on_images_that_were_held_out(images: int) -> None:
    """A tenth of many; of few, each quarter in turn."""
    model, shown = inserted("features"), make_images(n=images)
    theirs, ours = out(build("features"), shown), out(model, shown)
    done = calibrate(model, shown, steps=1, batch_size=16)
    held_out = torch.arange(images) if images < 40 else split_held_out(images, 0.1)[1]
    parts = [held_out[held_out % 4 == i] for i in range(4)] if images < 40 else [held_out]
    errors = [unexplained_variance(ours[p], theirs[p], variance(theirs)).item() for p in parts]
    assert done.error_before == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert (done.images, done.held_out) == ((17, 17) if images == 17 else (43, 5))
    after = out(model, shown)
    sample = split_held_out(images, 0.1)[0] if images > 40 else torch.arange(17)
    error = unexplained_variance(after[sample], theirs[sample], variance(theirs)).item()
    assert done.training_error == pytest.approx(error, rel=1e-4)


def test_an_output_that_never_changes_is_compared_by_the_last_block() -> None:
    host = build("class token")
    nn.init.zeros_(host.head.weight)
    cache = TeacherCache(host, make_images(), 1)
    assert cache.error(insert(copy.deepcopy(host), 2, 1), torch.arange(N)) > 0.1
    assert cache.error(host, torch.arange(N)) < 1e-9


def test_the_weights_of_the_best_evaluation_are_kept() -> None:
    """With a rate that spoils them, those from before."""
    model, rows = inserted("features"), list[Any]()
    before = parameters(model)
    options: dict[str, Any] = {"steps": 40, "batch_size": 16, "report": rows.append}
    done = calibrate(model, make_images(), lr=30.0, patience=4, **options)
    errors = [row["held_out_error"] for row in rows if "held_out_error" in row]
    assert min(errors) > done.error_before == done.error_after
    assert (done.best_step, done.steps, len(rows)) == (0, 8, 8)  # an evaluation every other step
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    rows.clear()
    done = calibrate(model, make_images(), lr=LR, patience=0, **options)
    errors = {row["step"]: row["held_out_error"] for row in rows if "held_out_error" in row}
    assert errors[done.best_step] == min(errors.values()) == done.error_after < done.error_before
    assert [*errors] == [*range(2, 41, 2)]


def test_the_average_of_weights_is_evaluated_and_kept() -> None:
    model, rows = inserted("features"), list[Any]()
    done = calibrate(
        model, make_images(), steps=20, batch_size=16, lr=LR, ema_decay=0.8, report=rows.append
    )
    cache = TeacherCache(build("features"), make_images(), 1)
    assert cache.error(model, split_held_out(N, 0.1)[1]) == pytest.approx(done.error_after)
    assert done.error_after < done.error_before


def test_views_are_crops_of_the_images_and_the_same_for_both() -> None:
    images = make_images(n=6)
    views = ImageViews(images, 3, seed=1)
    assert len(views) == 18
    assert torch.equal(views[torch.arange(6)], images)
    crops = views[torch.arange(6, 18)]
    assert torch.equal(views[torch.tensor([2, 8])], torch.stack([images[2], crops[2]]))
    assert len({tuple(x.flatten()[:2].tolist()) for x in crops}) == 12
    flat = ImageViews(torch.arange(16.0).expand(4, 3, 2, 16, 16), 4)[torch.arange(4, 16)]
    assert torch.equal(flat[:, :, 0], flat[:, :, 1])  # all frames of a clip alike
    assert {bool((x[0, 0, 0, 1:] > x[0, 0, 0, :-1]).float().mean() > 0.5) for x in flat} == {
        True,
        False,
    }
    cache = TeacherCache(build("features"), images, 1, views=3, seed=1)
    torch.testing.assert_close(cache.output[6:], out(build("features"), crops))
    assert cache.rows(torch.tensor([1, 4])).tolist() == [1, 4, 7, 10, 13, 16]


def test_tokens_that_would_fill_the_memory_are_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fitted(inserted("class token"))
    monkeypatch.setattr("tokenlearner.training.teacher._free_memory", lambda _: 0)
    assert torch.equal(fitted(inserted("class token")), expected)


def fitted(model: nn.Module, **options: Any) -> Tensor:
    """Returns the weights of the learners after calibrating."""
    calibrate(model, make_images(), **{"steps": 2, "batch_size": 8} | options)
    return nn.utils.parameters_to_vector(new_parameters(model)).detach()


def test_dropout_plays_no_part() -> None:
    model = insert(vit(proj_drop_rate=0.5), 2, 1)
    assert torch.equal(fitted(copy.deepcopy(model).train()), fitted(model.eval()))


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    state = torch.get_rng_state()
    model = inserted("class token")
    torch.set_rng_state(state)
    first, again, other = (fitted(copy.deepcopy(model), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # the global one is left alone


def test_an_elastic_model_is_fitted_with_all_of_its_tokens_and_with_fewer() -> None:
    host, images = build("features"), make_images()
    cache, rows = TeacherCache(host, images, 1), torch.arange(N)
    model = insert(copy.deepcopy(host), 4, 1, elastic=True)
    set_num_tokens(model, 2)
    before = {m: cache.error(set_num_tokens(copy.deepcopy(model), m), rows) for m in (1, 2, 4)}
    calibrate(model, images, steps=60, batch_size=16, lr=LR, patience=0)
    assert get_insertion(model)["active_tokens"] == 2  # as it was
    after = {m: cache.error(set_num_tokens(model, m), rows) for m in (1, 2, 4)}
    assert all(after[m] < before[m] for m in after)
    assert after[4] < after[1]


# --- the short cut ------------------------------------------------------------------------------


@each_case
def test_losses_are_those_of_the_whole_models(name: str) -> None:
    model, host, images = inserted(name), build(name), make_images(CASES[name].clips)
    first = min(wrapped_blocks(model))
    skipped = mixed_blocks(find_host(model))
    assert skipped == ({1} if name == "overlap average" else set())
    cache = TeacherCache(host, images, first, batch_size=16, skipped=skipped)
    index = torch.tensor([3, 0, 20])
    features, output = cache.losses(model, index)
    ours = forward_with_features(model, images[index], first + len(skipped))
    whole = forward_with_features(host, images, first + len(skipped))
    if "fuse" not in name:  # there tokens behind all blocks are compared, here their summaries
        place = find_host(model)
        compared = place.num_prefix_tokens, place.pools_positions
        variances = [variance(summarize_tokens(x, *compared)) for x in whole.features]
        theirs = [x[index] for x in whole.features]
        expected = feature_loss(ours.features, theirs, *compared, variances)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        output, output_error(ours.output, whole.output, index, model), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["class token", "hf tuples"])
def test_what_enters_a_block_is_gone_on_with_from_an_earlier_one(name: str) -> None:
    host, images, rows = build(name), make_images(), torch.tensor([3, 0, 20])
    whole = TeacherCache(host, images, 0, views=2, shares_front=False)
    earlier = whole.from_block(1, host)
    seen = list[int]()
    handle = next(iter(find_host(host).blocks)).register_forward_hook(lambda *_: seen.append(1))
    later = whole.from_block(2, host, known=earlier)
    handle.remove()
    assert not seen
    student = insert(copy.deepcopy(host), 2, 2)
    for known in (later, whole.from_block(2, host, known=later)):
        torch.testing.assert_close(
            known.losses(student, rows), whole.from_block(2, host).losses(student, rows)
        )
    again = TeacherCache(host, images, 0, views=2, shares_front=False, targets=whole.targets())
    assert again.error(student, rows) == pytest.approx(whole.error(student, rows))


def output_error(ours: Tensor, theirs: Tensor, index: Tensor, model: nn.Module) -> Tensor:
    """The loss of the output on some of the images, in units of the variance over all of them."""
    if outputs_logits(model, ours.shape[-1]):
        return logit_loss(ours, theirs[index])
    return unexplained_variance(ours, theirs[index].detach(), variance(theirs.detach()))


@pytest.mark.parametrize("name", ["class token", "first block", "hf tuples"])
def test_the_result_is_that_of_training_the_whole_model(name: str) -> None:
    images, model = make_images(), inserted(name)
    whole, host = copy.deepcopy(model), build(name)
    calibrate(model, images, steps=4, batch_size=8, lr=LR, held_out=0)
    first, order = min(wrapped_blocks(whole)), torch.Generator().manual_seed(0)
    theirs = forward_with_features(host, images, first)
    variances = [variance(x[:, :1]).detach() for x in theirs.features]
    adam = torch.optim.Adam(new_parameters(whole), LR)
    for step in range(4):
        rate = min(1, (step + 1) / 1.4) * (1 + math.cos(math.pi * step / 4)) / 2
        adam.param_groups[0]["lr"] = LR * rate
        index = torch.randperm(N, generator=order)[:8]
        ours = forward_with_features(whole, images[index], first)
        targets = [x[index] for x in theirs.features]
        loss = feature_loss(ours.features, targets, 1, variances=variances)
        adam.zero_grad()
        (loss + output_error(ours.output, theirs.output, index, whole)).backward()
        nn.utils.clip_grad_norm_(new_parameters(whole), 3.0)
        adam.step()
    short, full = parameters(model), parameters(whole)
    for name in [name for name in short if name.endswith("attention_maps.3.bias")]:
        del short[name], full[name]  # a softmax ignores it; Adam blows up rounding there
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", [1, 2])
def test_blocks_in_front_run_once(at: int) -> None:
    model, calls = insert(vit().eval(), 2, at), [0, 0]
    for i in range(at):
        model.blocks[i].register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    calibrate(model, make_images(), steps=5, batch_size=8)
    assert calls == [6] * at + [0] * (2 - at)  # six batches, whatever the steps


def test_a_host_that_runs_blocks_again_for_the_gradient_gets_the_same() -> None:
    plain, again = inserted("class token"), inserted("class token")
    again.set_grad_checkpointing()
    torch.testing.assert_close(fitted(again, lr=LR), fitted(plain, lr=LR), rtol=1e-5, atol=1e-6)


# --- what it leaves alone -----------------------------------------------------------------------


def stop(row: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def mixed() -> nn.Module:
    """A model whose parts are in several modes and states."""
    model = inserted("class token").train()
    model.blocks[0].eval()
    model.head.requires_grad_(False)
    model.blocks[1].learner.norm.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3)
    return model


def state(model: nn.Module) -> list[Any]:
    """All that calibrating changes for a while."""
    return [
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is not None and bool(p.grad.eq(3).all()) for p in model.parameters()],
        [id(block) for block in model.blocks],
        hooks(model),
    ]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_models_state_is_given_back(stopped: bool) -> None:
    model = mixed()
    before = state(model)
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
        calibrate(model, make_images(), steps=2, report=stop if stopped else None)
    assert state(model) == before


def test_blocks_are_back_when_the_model_fails_on_the_way() -> None:
    model = inserted("class token")
    cache = TeacherCache(build("class token"), make_images(), 1)
    blocks = [*model.blocks]
    model.blocks[2].register_forward_hook(lambda *_: stop({}))
    with pytest.raises(KeyboardInterrupt):
        cache.losses(model, torch.arange(4))
    assert [*model.blocks] == blocks


# --- the tail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["class token", "torchvision", "hf classes", "beit"])
def test_the_tail_is_all_that_the_output_depends_on_behind_the_front(name: str) -> None:
    """Whatever gets a gradient when the front is known, and nothing else."""
    model = inserted(name)
    cache = TeacherCache(build(name), make_images(), 1)
    torch.stack(cache.losses(model, torch.arange(8))).sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    tail = {id(p) for p in tail_parameters(model, 1)}
    named = {n for n, p in model.named_parameters() if id(p) in tail}
    idle = {n for n in named - touched if "relative_position_bias_table" in n}  # not for tokens
    assert named - idle == touched


def test_fitting_the_tail_brings_the_model_closer_than_its_learners_alone() -> None:
    model = copy.deepcopy(run("class token").model)
    done = calibrate(model, make_images(), tail=True, steps=2 * STEPS, batch_size=16, lr=3e-3)
    assert done.error_after < 0.95 * run("class token").done.error_after


def test_fitting_the_tail_leaves_the_front_bit_for_bit() -> None:
    model = inserted("class token")
    before = parameters(model)
    calibrate(model, make_images(), tail=True, steps=2)
    changed = {n for n, p in parameters(model).items() if not torch.equal(p, before[n])}
    assert not [n for n in changed if n.startswith(("patch", "pos", "cls", "blocks.0"))]
    assert {"head.weight", "norm.weight", "blocks.2.mlp.fc1.weight"} <= changed


# --- what it refuses ----------------------------------------------------------------------------


def test_models_without_learners_or_of_single_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="no learned tokens"):
        calibrate(vit(), make_images())
    frames = FrameViT(**TIMM | {"num_frames": 2, "num_tokens": 2, "at": 1})
    with pytest.raises(ValueError, match="FrameViT"):
        calibrate(frames, torch.randn(2, 3, 2, 16, 16))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"tail": True, "host_lr": -1.0}, "tail is -1.0"),
        ({"front_lr": 1e-4}, "pass tail=True"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"views": 0}, "views is 0"),
        ({"images": torch.zeros(1, 3, 16, 16)}, r"images is \[1, 3, 16, 16\]"),
        ({"images": [1, 2]}, "images is list"),
        ({"images": torch.zeros(4, 3, 16, 16)}, "images are all the same"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(options: dict[str, Any], named: str) -> None:
    model = inserted("class token")
    before = parameters(model)
    with pytest.raises(ValueError, match=named):
        calibrate(model, **{"images": make_images(), "steps": 1} | options)
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops() -> None:
    with pytest.raises(RuntimeError, match=r"loss is nan at step 1 of 2"):
        calibrate(inserted("class token"), make_images() * float("nan"), steps=2)
