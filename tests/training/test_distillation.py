"""Distillation: what is compared with what, and that nothing is left on the models."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from tiny import TIMM, torchvision_vit, transformers_vit
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.models.hosts import find_host
from tokenlearner.models.outputs import output_tensor, summarize_tokens
from tokenlearner.training.distillation import (
    DISTILL_TYPES,
    Distillation,
    feature_loss,
    forward_with_features,
    logit_loss,
    output_loss,
    unexplained_variance,
)


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**TIMM | changes).eval()


HOSTS = {
    "timm": vit,
    "torchvision": lambda: torchvision_vit().eval(),
    "transformers": lambda: transformers_vit().eval(),
}
each_host = pytest.mark.parametrize("name", HOSTS)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what is compared ---------------------------------------------------------------------------


def test_the_batchs_mean_scores_1() -> None:
    teacher = torch.randn(64, 3, 8)
    loss = feature_loss([teacher.mean(0, keepdim=True).expand_as(teacher)], [teacher])
    assert loss.item() == pytest.approx(1, abs=2e-3)  # less by what guards against a variance of 0


@pytest.mark.parametrize("sizes", [(1, 1), (0.01, 1000)])
def test_the_loss_over_tokens_is_that_of_numpy(sizes: tuple[float, float]) -> None:
    """Blocks count alike whatever their size, and a channel that never varies is no exception."""
    expected, blocks = 0.0, []
    for size in sizes:
        student, teacher = size * torch.randn(2, 6, 3, 4).double()
        teacher[..., 0], student[..., 0] = 0, 0.01 * size
        s, t = student.numpy(), teacher.numpy()
        variance = t.var(0, keepdims=True)
        expected += ((s - t) ** 2 / (variance + 1e-3 * variance.mean())).mean() / 2
        blocks.append((student, teacher))
    loss = feature_loss(*zip(*blocks, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_other_token_counts_are_compared_by_their_summary(prefix: int) -> None:
    student, teacher = torch.randn(4, 4, 6), torch.randn(4, 9, 6)
    expected = unexplained_variance(
        summarize_tokens(student, prefix), summarize_tokens(teacher, prefix)
    )
    assert feature_loss([student], [teacher], prefix) == expected


def test_gradients_go_to_the_student_only() -> None:
    student, teacher = (torch.randn(4, 3, 5, requires_grad=True) for _ in range(2))
    logits, targets = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    (feature_loss([student], [teacher]) + logit_loss(logits, targets)).backward()
    assert all(x.grad is not None for x in (student, logits))
    assert all(x.grad is None for x in (teacher, targets))


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [
        ([(4, 3, 5)], [(4, 3, 5)] * 2, "1 blocks, the teacher of 2"),
        ([], [], "0 blocks, the teacher of 0"),
        ([(4, 3, 5)], [(4, 3, 6)], "5 wide, the teacher 6"),
        ([(1, 3, 5)], [(1, 3, 5)], "1 image"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    student: list[tuple[int, ...]], teacher: list[tuple[int, ...]], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        feature_loss([torch.zeros(s) for s in student], [torch.zeros(s) for s in teacher])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_logit_loss_is_that_of_numpy(temperature: float) -> None:
    def probabilities(x: Tensor) -> np.ndarray:
        e = np.exp(x.double().numpy() / temperature)
        return e / e.sum(1, keepdims=True)

    student, teacher = torch.randn(2, 6, 5)
    q, p = probabilities(student), probabilities(teacher)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    loss = logit_loss(student, teacher, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits are \[4, 5\], .*\[4, 6\]"):
        logit_loss(torch.zeros(4, 5), torch.zeros(4, 6))


# --- block outputs ------------------------------------------------------------------------------


def tokens_by_hand(model: Any, x: Tensor) -> list[Tensor]:
    """What the blocks of a host give, one after the other, without hooks."""
    if isinstance(model, VisionTransformer):
        x, blocks = model._pos_embed(model.patch_embed(x)), model.blocks
    elif isinstance(model, transformers.ViTForImageClassification):
        x, blocks = model.vit.embeddings(x), getattr(model.vit, "layers", None)
        blocks = model.vit.encoder.layer if blocks is None else blocks
    else:
        x = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
        x, blocks = x + model.encoder.pos_embedding, model.encoder.layers
    features = []
    for block in blocks:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
        features.append(x)
    return features


@each_host
@pytest.mark.parametrize("first", [0, 2])
def test_the_blocks_tokens_and_the_output_are_returned(name: str, first: int) -> None:
    model, x = HOSTS[name](), images()
    outputs = forward_with_features(model, x, first)
    torch.testing.assert_close(list(outputs.features), tokens_by_hand(model, x)[first:])
    torch.testing.assert_close(outputs.output, output_tensor(model(x)))


@each_host
@pytest.mark.parametrize("channels", [3, 1])
def test_no_hooks_are_left_also_when_the_model_fails(name: str, channels: int) -> None:
    model = HOSTS[name]()
    before = hooks_of(model)
    fails = pytest.raises((RuntimeError, AssertionError, ValueError))
    with fails if channels == 1 else nullcontext():
        forward_with_features(model, torch.randn(2, channels, 16, 16))
    assert hooks_of(model) == before


# --- outputs ------------------------------------------------------------------------------------


def test_outputs_are_compared_as_tokens_classes_or_features() -> None:
    """Tokens by their mean, classes by their logits, features by their variance."""
    model, x = vit(class_token=False, global_pool="", num_classes=0), images()
    torch.testing.assert_close(forward_with_features(model, x).output, model(x).mean(1))
    student, teacher = torch.randn(2, 4, 5)
    assert output_loss(student, teacher, vit()) == logit_loss(student, teacher)
    student, teacher = torch.randn(2, 4, 16)
    features = vit(num_classes=0)
    assert output_loss(student, teacher, features) == unexplained_variance(student, teacher)


# --- a teacher ----------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A host, and one with the same blocks, another head and learned tokens."""
    return vit(), insert(vit(), 2, 1)


@pytest.mark.parametrize("kind", DISTILL_TYPES)
def test_the_loss_is_that_of_its_kind(
    kind: str, pair: tuple[nn.Module, nn.Module], device: torch.device
) -> None:
    host, student = (model.double().to(device) for model in pair)
    x = images().double().to(device)
    output, loss = Distillation(host, kind, temperature=2.0)(student, x)
    ours, theirs = (forward_with_features(model, x, 1) for model in (student, host))
    expected = torch.zeros((), device=device)
    if "logit" in kind:
        expected = expected + logit_loss(student(x), host(x), 2.0)
    if "feature" in kind:
        expected = expected + feature_loss(ours.features, theirs.features, 1)
    torch.testing.assert_close(output, student(x))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", ["feature", "logit+feature"])
def test_the_loss_does_not_depend_on_how_a_batch_is_cut_into_parts(kind: str, fuse: bool) -> None:
    host, student, x = vit(), insert(vit(), 2, 1, fuse=fuse), images(8)
    distillation = Distillation(host, kind)
    distillation.measure(student, images(32).split(10))
    _, whole = distillation(student, x)
    for size in (1, 2, 4):  # one image has no variance of its own
        parts = [distillation(student, part)[1] for part in x.split(size)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_features_of_one_image_all_the_time_are_no_measure() -> None:
    same = images(1).expand(8, -1, -1, -1)
    with pytest.raises(ValueError, match="features are those of one image"):
        Distillation(vit(), "feature").measure(insert(vit(), 2, 1), [same])


def test_measured_on_a_batch_the_loss_of_that_batch_is_as_by_its_own_variance() -> None:
    host, student, x = vit(), insert(vit(), 2, 1), images(8)
    distillation = Distillation(host, "feature")
    _, expected = distillation(student, x)
    distillation.measure(student, x.split(3))
    torch.testing.assert_close(distillation(student, x)[1], expected)


def test_features_are_compared_from_the_first_block_with_learners_or_all() -> None:
    host, x = vit(), images()
    for first, student in ((0, vit()), (1, insert(vit(), 2, 1))):
        _, loss = Distillation(host, "feature")(student, x)
        ours, theirs = (forward_with_features(m, x, first).features for m in (student, host))
        assert loss == feature_loss(ours, theirs, 1)
        assert loss == Distillation(host, "feature", first=first)(student, x)[1]
        assert loss != Distillation(host, "feature", first=2)(student, x)[1]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_without_blocks_has_logits_to_compare_and_no_features(role: str) -> None:
    other = timm.create_model("resnet10t", num_classes=5).eval()
    student, teacher = (other, vit()) if role == "student" else (vit(), other)
    assert Distillation(teacher, "logit")(student, images())[1] > 0
    with pytest.raises(ValueError, match=f"{role} is a ResNet, .*kd_distill_type"):
        Distillation(teacher)(student, images())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "labels"}, "kind is 'labels'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Distillation(nn.Identity(), **options)


def test_another_student_is_searched_for_its_own_blocks(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model once, however often it is called."""
    (host, student), other, x = pair, insert(vit(), 2, 2), images()
    expected = [Distillation(host)(model, x)[1] for model in (student, other)]
    found: list[nn.Module] = []
    path = "tokenlearner.training.distillation.find_host"
    monkeypatch.setattr(path, lambda model: found.append(model) or find_host(model))
    distillation = Distillation(host)
    losses = [distillation(model, x)[1] for model in (student, student, other)]
    torch.testing.assert_close(losses[1:], expected)
    assert found == [student, host, other]


def test_a_teacher_moves_and_casts_along_with_the_module_around_it_and_nothing_else() -> None:
    host, student = vit().eval(), insert(vit(), 2, 1)
    around = nn.ModuleDict({"student": student, "distil": Distillation(host)})
    around["distil"].measure(student, [images(8)])
    around.to(torch.bfloat16).train()
    assert {p.dtype for p in host.parameters()} == {torch.bfloat16}
    assert {v.dtype for v in around["distil"].variances} == {torch.float32}
    assert not host.training
    assert {name.partition(".")[0] for name in around.state_dict()} == {"student"}
    assert len(list(around.parameters())) == len(list(student.parameters()))
    output, loss = around["distil"](student, images().bfloat16())
    assert output.dtype == torch.bfloat16
    assert loss.isfinite()


def test_a_distillation_is_copied_and_pickled_with_its_teacher() -> None:
    host, student, x = vit(), insert(vit(), 2, 1), images()
    distillation = Distillation(host)
    _, expected = distillation(student, x)
    for again in (copy.deepcopy(distillation), pickle.loads(pickle.dumps(distillation))):
        assert again.teacher is not host
        torch.testing.assert_close(again(student, x)[1], expected)
