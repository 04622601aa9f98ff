"""Teaching: what is compared with what, and that nothing is left on the models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
import torchvision
import transformers
from timm.models.vision_transformer import VisionTransformer
from tiny import TIMM
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.models.hosts import find_host
from tokenlearner.models.insertion import wrapped_blocks
from tokenlearner.models.outputs import output_tensor, outputs_logits, summarize_tokens
from tokenlearner.training.distillation import (
    DISTILL_TYPES,
    Distillation,
    feature_loss,
    forward_with_features,
    logit_loss,
    output_loss,
    unexplained_variance,
)

HF: dict[str, Any] = tiny.HF | {"num_labels": 5}


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**TIMM | changes).eval()


HOSTS = {
    "timm": vit,
    "torchvision": lambda: torchvision.models.VisionTransformer(
        16, 4, 3, 2, 16, 32, num_classes=5
    ).eval(),
    "transformers": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**HF)
    ).eval(),
}
each_host = pytest.mark.parametrize("name", HOSTS)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what is compared ---------------------------------------------------------------------------


def test_the_summary_is_the_prefix_where_there_is_one() -> None:
    tokens = torch.randn(2, 7, 3)
    assert torch.equal(summarize_tokens(tokens, 2), tokens[:, :2])


def test_the_summary_is_the_mean_of_the_positions_without_prefix() -> None:
    tokens = torch.randn(2, 7, 3)
    torch.testing.assert_close(summarize_tokens(tokens, 0), tokens.sum(1, keepdim=True) / 7)


@pytest.mark.parametrize("prefix", [0, 1])
def test_equal_features_have_no_loss(prefix: int) -> None:
    features = [torch.randn(4, 5, 6) for _ in range(2)]
    assert feature_loss(features, features, prefix) == 0


def test_the_batchs_mean_scores_1() -> None:
    teacher = torch.randn(64, 3, 8)
    loss = feature_loss([teacher.mean(0, keepdim=True).expand_as(teacher)], [teacher])
    assert loss.item() == pytest.approx(1, abs=2e-3)  # less by what guards against a variance of 0


def test_channels_count_alike_whatever_their_size() -> None:
    student, teacher = torch.randn(2, 32, 3, 8)
    sizes = torch.linspace(0.5, 2, 8)
    scaled = feature_loss([student * sizes], [teacher * sizes])
    torch.testing.assert_close(scaled, feature_loss([student], [teacher]), rtol=0.01, atol=0)


def test_blocks_count_alike_whatever_their_size() -> None:
    student, teacher = torch.randn(2, 8, 3, 8)
    both = feature_loss([student, 1000 * student], [teacher, 1000 * teacher])
    torch.testing.assert_close(both, feature_loss([student], [teacher]))


def test_a_channel_that_never_varies_does_not_drown_the_others() -> None:
    student, teacher = torch.randn(2, 32, 1, 8)
    teacher[..., 0] = 0
    student[..., 0] = 0.01
    assert feature_loss([student], [teacher]) < 5


def test_the_loss_over_tokens_is_that_of_numpy() -> None:
    student, teacher = torch.randn(2, 6, 3, 4).double()
    s, t = student.numpy(), teacher.numpy()
    variance = t.var(0, keepdims=True)
    expected = ((s - t) ** 2 / (variance + 1e-3 * variance.mean())).mean()
    assert feature_loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-5)


def test_as_many_tokens_are_compared_one_by_one() -> None:
    student, teacher = torch.randn(2, 4, 5, 6)
    assert feature_loss([student], [teacher], 1) == unexplained_variance(student, teacher)


@pytest.mark.parametrize("prefix", [0, 2])
def test_other_token_counts_are_compared_by_their_summary(prefix: int) -> None:
    student, teacher = torch.randn(4, 4, 6), torch.randn(4, 9, 6)
    expected = unexplained_variance(
        summarize_tokens(student, prefix), summarize_tokens(teacher, prefix)
    )
    assert feature_loss([student], [teacher], prefix) == expected


def test_gradients_go_to_the_student_only() -> None:
    student, teacher = (torch.randn(4, 3, 5, requires_grad=True) for _ in range(2))
    logits, taught = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    (feature_loss([student], [teacher]) + logit_loss(logits, taught)).backward()
    assert student.grad is not None
    assert logits.grad is not None
    assert teacher.grad is None
    assert taught.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([(4, 3, 5)], [(4, 3, 5)] * 2, "features of 1 blocks, the teacher of 2; .*='logit'"),
        ([], [], "features of 0 blocks, the teacher of 0"),
        ([(4, 3, 5)], [(4, 3, 6)], "the student is 5 wide, the teacher 6; take .*='logit'"),
        ([(1, 3, 5)], [(1, 3, 5)], "variance over the batch, and it has 1 image; take batch"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    student: list[tuple[int, ...]], teacher: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
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
    with pytest.raises(ValueError, match=r"logits are \[4, 5\], the teacher's \[4, 6\]; both need"):
        logit_loss(torch.zeros(4, 5), torch.zeros(4, 6))


# --- watching -----------------------------------------------------------------------------------


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
    seen = []
    for block in blocks:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
        seen.append(x)
    return seen


@each_host
@pytest.mark.parametrize("first", [0, 2])
def test_watching_gives_the_blocks_tokens_and_the_output(name: str, first: int) -> None:
    model, x = HOSTS[name](), images()
    seen = forward_with_features(model, x, first)
    torch.testing.assert_close(list(seen.features), tokens_by_hand(model, x)[first:])
    torch.testing.assert_close(seen.output, output_tensor(model(x)), rtol=0, atol=0)


@each_host
def test_watching_leaves_no_hooks(name: str) -> None:
    model = HOSTS[name]()
    before = hooks_of(model)
    forward_with_features(model, images())
    assert hooks_of(model) == before


@each_host
def test_watching_leaves_no_hooks_when_the_model_fails(name: str) -> None:
    model = HOSTS[name]()
    before = hooks_of(model)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        forward_with_features(model, torch.randn(2, 1, 16, 16))
    assert hooks_of(model) == before


def test_a_model_on_learned_tokens_is_watched_behind_its_wrappers() -> None:
    shapes = [x.shape[1] for x in forward_with_features(insert(vit(), 2, 1), images()).features]
    assert shapes == [17, 3, 3]


# --- outputs ------------------------------------------------------------------------------------


def test_a_tensor_is_the_output() -> None:
    assert output_tensor(x := torch.randn(2, 5)) is x


@pytest.mark.parametrize(
    "given",
    [
        {"logits": 0, "last_hidden_state": 1},
        {"image_embeds": 0, "last_hidden_state": 1},
        {"pooler_output": 0, "last_hidden_state": 1},
        {"logits": None, "pooler_output": 0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_of_an_output_of_transformers_the_last_that_was_made_counts(given: dict[str, Any]) -> None:
    tensors = torch.randn(2, 3, 5)
    result = SimpleNamespace(**{k: None if v is None else tensors[v] for k, v in given.items()})
    assert torch.equal(output_tensor(result), tensors[0])


def test_of_tokens_the_class_token_is_the_output() -> None:
    tokens = torch.randn(2, 7, 5)
    assert torch.equal(output_tensor(SimpleNamespace(last_hidden_state=tokens), 2), tokens[:, 0])


def test_of_tokens_without_prefix_their_mean_is_the_output() -> None:
    tokens = torch.randn(2, 7, 5)
    torch.testing.assert_close(
        output_tensor(SimpleNamespace(last_hidden_state=tokens), 0), tokens.mean(1)
    )


def test_a_host_that_returns_its_tokens_is_compared_by_their_mean() -> None:
    model, x = vit(class_token=False, global_pool="", num_classes=0), images()
    torch.testing.assert_close(forward_with_features(model, x).output, model(x).mean(1))


def test_another_output_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"returns list, expected a tensor .* wrap it in a module"):
        output_tensor([torch.zeros(2, 5)])


@pytest.mark.parametrize(
    ("build", "width", "expected"),
    [
        (vit, 5, True),
        (lambda: vit(num_classes=0), 16, False),
        (HOSTS["torchvision"], 5, True),
        (HOSTS["torchvision"], 16, False),  # its heads were replaced by nothing
        (HOSTS["transformers"], 5, True),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**HF)), 16, False),
        (lambda: nn.Linear(3, 5), 5, True),
    ],
    ids=["timm", "timm features", "tv", "tv features", "hf", "hf features", "somebody's"],
)
def test_a_classifier_is_told_from_a_model_of_features(
    build: Any, width: int, expected: bool
) -> None:
    assert outputs_logits(build(), width) is expected


def test_outputs_of_a_classifier_are_compared_as_classes() -> None:
    student, teacher = torch.randn(2, 4, 5)
    assert output_loss(student, teacher, vit()) == logit_loss(student, teacher)


def test_outputs_that_are_features_are_compared_by_their_variance() -> None:
    student, teacher = torch.randn(2, 4, 16)
    model = vit(num_classes=0)
    assert output_loss(student, teacher, model) == unexplained_variance(student, teacher)


# --- a teacher ----------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A host, and one with the same blocks, another head and learned tokens."""
    return vit(), insert(vit(), 2, 1)


@pytest.mark.parametrize("kind", DISTILL_TYPES)
def test_a_lesson_is_what_its_kind_says(kind: str, pair: tuple[nn.Module, nn.Module]) -> None:
    (host, student), x = pair, images()
    own, loss = Distillation(host, kind, temperature=2.0)(student, x)
    seen, shown = forward_with_features(student, x, 1), forward_with_features(host, x, 1)
    expected = torch.zeros(())
    if "logit" in kind:
        expected = expected + logit_loss(student(x), host(x), 2.0)
    if "feature" in kind:
        expected = expected + feature_loss(seen.features, shown.features, 1)
    torch.testing.assert_close(own, student(x))
    torch.testing.assert_close(loss, expected)


def test_features_are_taught_from_the_first_block_with_learners(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    (host, student), x = pair, images()
    assert min(wrapped_blocks(student)) == 1
    _, loss = Distillation(host, "feature")(student, x)
    assert loss == Distillation(host, "feature", first=1)(student, x)[1]
    assert loss != Distillation(host, "feature", first=2)(student, x)[1]


def test_features_are_taught_from_the_first_block_on_without_learners() -> None:
    host, student, x = vit(), vit(), images()
    expected = feature_loss(
        forward_with_features(student, x).features, forward_with_features(host, x).features, 1
    )
    assert Distillation(host, "feature")(student, x)[1] == expected


def test_the_teacher_gets_no_gradient(pair: tuple[nn.Module, nn.Module]) -> None:
    host, student = pair
    Distillation(host)(student, images())[1].backward()
    assert all(p.grad is None for p in host.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_a_teacher_of_another_architecture_teaches_logits() -> None:
    teacher = timm.create_model("resnet10t", num_classes=5).eval()
    _, loss = Distillation(teacher, "logit")(vit(), torch.randn(2, 3, 16, 16))
    assert loss > 0


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_features_of_a_model_without_blocks_are_refused(role: str) -> None:
    other = timm.create_model("resnet10t", num_classes=5).eval()
    student, teacher = (other, vit()) if role == "student" else (vit(), other)
    with pytest.raises(ValueError, match=f"the {role} is a ResNet, which has no blocks .*'logit'"):
        Distillation(teacher)(student, images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "labels"}, "kd_distill_type is 'labels', expected one of 'logit', 'feature'"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(nn.Identity(), **options)


def test_a_summary_for_heads_that_pool_positions_has_prefix_and_mean() -> None:
    tokens = torch.randn(2, 5, 3)
    expected = torch.stack([tokens[:, 0], tokens[:, 1], tokens[:, 2:].mean(1)], dim=1)
    torch.testing.assert_close(summarize_tokens(tokens, 2, pools_positions=True), expected)
    assert torch.equal(summarize_tokens(tokens, 2), tokens[:, :2])


@pytest.mark.parametrize(
    ("pooling", "pools"), [("token", False), ("avg", True), ("", False), ("max", True)]
)
def test_a_host_tells_whether_its_head_pools_positions(pooling: str, pools: bool) -> None:
    assert find_host(vit(global_pool=pooling)).pools_positions is pools
