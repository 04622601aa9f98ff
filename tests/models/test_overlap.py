"""Tokens that run beside all positions for some blocks, and models that run on their first tokens.

What runs in an overlap is computed by hand from the host's own blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from tiny import HF, TIMM, check_compiled, drawn, same
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from tokenlearner import (
    attention_maps,
    create_model,
    export,
    insert,
    load_model,
    remove,
    save_model,
    set_num_tokens,
)
from tokenlearner.checkpoints.scenic import to_scenic
from tokenlearner.deploy import load_exported
from tokenlearner.evaluation import count_macs
from tokenlearner.layers.blocks import OverlapEnd, PositionFreeBlock
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.hosts import Place, find_host
from tokenlearner.models.hub import model_card
from tokenlearner.models.insertion import get_insertion, wrapped_blocks
from tokenlearner.models.outputs import first_tensor, output_tensor
from tokenlearner.models.vivit import ViViT
from tokenlearner.training import Distillation, forward_with_features
from tokenlearner.training.distillation import feature_loss, mixed_blocks

DEEP, DEEP_HF = TIMM | {"depth": 5}, HF | {"num_hidden_layers": 5}
vit = partial(VisionTransformer, **DEEP)
average = partial(vit, class_token=False, global_pool="avg")
VIT, CLIP, VIDEO = (
    transformers.ViTConfig,
    transformers.CLIPVisionConfig,
    transformers.VideoMAEConfig,
)
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "timm": vit,
    "timm_average": average,
    "timm_any_size": partial(vit, dynamic_img_size=True, reg_tokens=4, init_values=0.1),
    "torchvision": lambda: TorchvisionViT(16, 4, 5, 2, 16, 32, num_classes=5),
    "hf_vit": lambda: transformers.ViTForImageClassification(VIT(**DEEP_HF, num_labels=5)),
    "hf_clip": lambda: transformers.CLIPVisionModel(CLIP(**DEEP_HF)),
    "hf_clips": lambda: transformers.VideoMAEForVideoClassification(VIDEO(**DEEP_HF, num_frames=4)),
    "our_clips": lambda: ViViT(**DEEP, num_frames=4, tubelet_size=2),
}
INSERTIONS: dict[str, dict[str, Any]] = {
    "1": {"num_tokens": 4, "at": 1, "overlap": 1},
    "2": {"num_tokens": 4, "at": 4, "overlap": 2},
    "two places, 1": {"num_tokens": (5, 3), "at": (1, 2), "overlap": 1},
    "two places, 2": {"num_tokens": (5, 3), "at": (2, 4), "overlap": 2},
    "v1, 3": {"num_tokens": 4, "at": 3, "overlap": 3, "learner": "v1"},
    "elastic": {"num_tokens": (5, 2), "at": (2, 4), "overlap": 2} | {"elastic": True},
}
each_host = pytest.mark.parametrize("host", HOSTS)
ALL_OF_ONE = [("timm", how) for how in INSERTIONS]
SOME_OF_ALL = [(host, how) for host in HOSTS if host != "timm" for how in ("elastic", "v1, 3")]


def build(host: str) -> nn.Module:
    return drawn(HOSTS[host]().eval(), 0.2)


def inserted(host: str, how: str) -> nn.Module:
    needs_grid = "v1" in how and (host.startswith("hf") or host == "timm_any_size")
    grid = {"grid": (4, 4)} if needs_grid and host != "hf_clips" else {}
    model = drawn(insert(build(host), **INSERTIONS[how], **grid), 0.2)
    return set_num_tokens(model, 3) if how == "elastic" else model


def inputs(host: str, h: int = 16, w: int = 16) -> Tensor:
    frames = {"hf_clips": (4, 3), "our_clips": (3, 4)}.get(host, (3,))
    return torch.randn(2, *frames, h, w)


def run(model: nn.Module, x: Tensor) -> Tensor:
    return output_tensor(model(x))


def by_hand(place: Place, x: Tensor, starts: dict[int, int], active: int | None) -> list[Tensor]:
    """The tokens behind each block, from those in front of the first that learns some."""
    prefix, outputs = place.num_prefix_tokens, list[Tensor]()
    mask = (None,) if "CLIP" in type(place.host).__name__ else ()
    leaving: dict[int, int] = {}  # index of a block to the count of tokens that stay behind it
    for i, block in list(enumerate(place.blocks))[min(starts) :]:
        inner = block.block if isinstance(block, PositionFreeBlock) else block
        if i in starts:
            positions = x[:, prefix:].unflatten(1, (place.frames, -1))
            frames = [block.learner(frame, block.learner_grid) for frame in positions.unbind(1)]
            tokens = torch.cat([frame[:, :active] for frame in frames], dim=1)
            x = torch.cat([x[:, :prefix], tokens, x[:, prefix:]], dim=1)
            leaving[i + starts[i] - 1] = prefix + tokens.shape[1]
        x = first_tensor(inner(x, *mask))[:, : leaving.get(i)]
        outputs.append(x)
    return outputs


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "how"), ALL_OF_ONE + SOME_OF_ALL)
@torch.no_grad()
def test_blocks_of_an_overlap_run_on_tokens_and_positions(host: str, how: str) -> None:
    model, x = inserted(host, how), inputs(host)
    place, overlap = find_host(model), INSERTIONS[how]["overlap"]
    first, *later = wrapped_blocks(model)
    entering: list[Tensor] = []
    hook = place.blocks[first].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    found = forward_with_features(model, x, first, place).features
    hook.remove()
    starts, active = dict.fromkeys((first, *later), overlap), 3 if how == "elastic" else None
    expected = by_hand(place, entering[0], starts, active)
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-4)
    assert run(model, x).shape == run(build(host), x).shape


@each_host
@torch.no_grad()
def test_remove_and_copies_and_models_built_alike_are_right(host: str) -> None:
    model, x, plain = build(host), inputs(host), build(host)
    plain.load_state_dict(model.state_dict())
    drawn(insert(model, **INSERTIONS["elastic"]), 0.2)
    set_num_tokens(model, 4)
    plain.load_state_dict(remove(copy.deepcopy(model)).state_dict())
    built = insert(build(host), **(get_insertion(model) or {}))
    built.load_state_dict(model.state_dict())
    for other in (built, copy.deepcopy(model)):
        assert get_insertion(other) == get_insertion(model)
        assert same(run(other, x), run(model, x))
    assert same(run(remove(model), x), run(plain, x))
    assert get_insertion(model) is None
    assert [type(b) for b in find_host(model).blocks] == [type(b) for b in find_host(plain).blocks]


@each_host
def test_gradients_reach_the_learners_and_checkpointing_changes_no_number(host: str) -> None:
    model = inserted(host, "two places, 2").train()
    again, x = copy.deepcopy(model), inputs(host)
    run(model, x).square().sum().backward()
    for block in wrapped_blocks(model).values():
        grads = [p.grad for p in block.learner.parameters() if p.grad is not None]
        assert max(grad.abs().max() for grad in grads) > 1e-8
    if isinstance(again, transformers.PreTrainedModel):
        plain = again.gradient_checkpointing_enable
        getattr(again, "activation_checkpointing_enable", plain)({"use_reentrant": False})
    elif host == "torchvision":
        return
    else:
        again.set_grad_checkpointing()  # type: ignore[operator]
    run(again, x).square().sum().backward()
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@torch.no_grad()
def test_images_of_other_sizes_have_maps_of_their_grid() -> None:
    maps = attention_maps(inserted("timm_any_size", "elastic"), inputs("timm", 8, 24))
    assert {i: m.shape for i, m in maps.items()} == {0: (2, 3, 2, 6), 2: (2, 2, 2, 6)}
    torch.testing.assert_close(maps[2].sum((2, 3)), torch.ones(2, 2))


@pytest.mark.parametrize("host", ["timm", "hf_clips", "our_clips"])
@torch.no_grad()
def test_an_overlap_costs_a_little_more_than_none(host: str) -> None:
    x, how = inputs(host), INSERTIONS["2"]
    with_overlap, without = (
        count_macs(insert(build(host), **how | {"overlap": overlap}), x) for overlap in (2, 0)
    )
    assert without < with_overlap < 1.2 * without


def test_only_means_of_tokens_and_positions_are_not_compared() -> None:
    assert mixed_blocks(find_host(inserted("timm_average", "two places, 2"))) == {0, 2}
    assert mixed_blocks(find_host(inserted("timm_average", "1"))) == set()
    assert mixed_blocks(find_host(inserted("timm", "two places, 2"))) == set()
    student, x = insert(build("timm_average"), 4, at=2, overlap=2), inputs("timm_average")
    teacher = remove(copy.deepcopy(student))
    ours, theirs = (forward_with_features(m, x, 1).features for m in (student, teacher))
    expected = feature_loss(ours, theirs, 0, True)
    torch.testing.assert_close(Distillation(teacher, "feature")(student, x)[1], expected)


# --- the first of its tokens ---------------------------------------------------------------------


@torch.no_grad()
def test_a_model_on_its_first_tokens_is_that_of_a_learner_of_so_many() -> None:
    model, x = inserted("timm", "elastic"), inputs("timm")
    fewer = insert(build("timm"), (3, 2), at=(2, 4), overlap=2)
    state, own = model.state_dict(), fewer.state_dict()
    fewer.load_state_dict({key: state[key][: len(value)] for key, value in own.items()})
    torch.testing.assert_close(model(x), fewer(x))
    assert [learner.active_tokens for learner in learners(model)] == [3, None]
    set_num_tokens(model, 1)
    assert [learner.active_tokens for learner in learners(model)] == [1, 1]
    assert set_num_tokens(model, 5) is model
    assert get_insertion(model) == get_insertion(insert(build("timm"), **INSERTIONS["elastic"]))


def learners(model: nn.Module) -> list[Any]:
    return [learner for block in wrapped_blocks(model).values() for learner in block.learners]


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_mini_patch4_28"])
@torch.no_grad()
def test_files_keep_the_overlap_and_the_number_of_tokens(name: str, tmp_path: Path) -> None:
    model = create_model(name, **DEEP, in_chans=3)
    drawn(insert(model, 4, at=3, overlap=2, elastic=True), 0.2).eval()
    x = inputs("timm")
    everything = model(x)
    set_num_tokens(model, 2)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert same(loaded(x), model(x))
    assert get_insertion(loaded) == get_insertion(model)
    torch.testing.assert_close(set_num_tokens(loaded, 4)(x), everything)
    assert "earlier by 2 of the blocks" in model_card(model)
    assert "is set to 2." in model_card(model)
    if name.startswith("vit_mini"):  # timm can build ours
        assert same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


@torch.no_grad()
def test_a_model_built_with_an_overlap_may_go_on_without(tmp_path: Path) -> None:
    how = {"num_tokens": 4, "at": 3, "overlap": 1, "elastic": True, "active_tokens": 2}
    model = create_model("vit_mini_patch4_28", **DEEP, **how).eval()
    assert get_insertion(model) == how | {"learner": "v11", "fuse": False}
    insert(remove(model), 4, at=3)
    save_model(drawn(model, 0.2), tmp_path)
    x = torch.randn(2, 1, 16, 16)
    assert same(load_model(tmp_path)(x), model(x))
    assert same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_has_the_tokens_that_are_set() -> None:
    model, x = inserted("timm", "elastic"), inputs("timm")
    check_compiled(model, {"x": x})
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    for m in (1, 4, 5, 2):
        set_num_tokens(compiled, m)
        torch.testing.assert_close(compiled(x), model(x))
        assert compiled(x).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "suffix"), [("timm", ".pt2"), ("timm", ".onnx"), ("hf_vit", ".pt2")]
)
def test_an_exported_model_has_the_tokens_that_were_set(
    host: str, suffix: str, tmp_path: Path
) -> None:
    model, x = inserted(host, "elastic"), inputs(host)
    with torch.no_grad():
        expected = run(model, x)
        assert not torch.allclose(run(set_num_tokens(copy.deepcopy(model), 5), x), expected)
    made = export(model, tmp_path / f"model{suffix}", x, rounds=2)
    found = load_exported(made.path)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- what is refused -----------------------------------------------------------------------------

ROTARY = partial(Eva, **DEEP, use_rot_pos_emb=True)
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (vit, {"overlap": -1}, "overlap is -1"),
    (vit, {"overlap": 1.0}, r"overlap is 1\.0"),
    (vit, {"overlap": 3, "at": 2}, "there are 2 blocks in front of block 2 .*overlap=2 or less"),
    (vit, {"num_tokens": (4, 2), "at": (2, 3), "overlap": 2}, "are 1 blocks in front of block 3"),
    (vit, {"overlap": 1, "fuse": True}, "overlap is 1, but with fuse=True"),
    (ROTARY, {"overlap": 1}, "blocks of Eva take the positions' rotary embeddings"),
    (partial(Beit, **DEEP, use_rel_pos_bias=True), {"overlap": 1}, "blocks of Beit"),
    (vit, {"elastic": "no"}, "elastic is 'no'"),
    (vit, {"elastic": True, "fuse": True}, "elastic is True, but with fuse=True"),
    (vit, {"active_tokens": 2}, "active_tokens is 2, which goes with elastic=True"),
    (vit, {"elastic": True, "active_tokens": 5}, "active_tokens is 5, but num_tokens is 4"),
    (vit, {"elastic": True, "active_tokens": 0}, "active_tokens is 0"),
]


@pytest.mark.parametrize(("make", "how", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], how: dict[str, Any], message: str
) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        insert(model, **{"num_tokens": 4} | how)
    assert list(model.state_dict()) == keys
    assert get_insertion(model) is None


FIXED = "inserted without elastic=True"


@pytest.mark.parametrize(
    ("make", "m", "message"),
    [
        (vit, 2, "no learned tokens"),
        (lambda: insert(vit(), 4), 2, FIXED),
        (lambda: insert(vit(), 4, fuse=True), 2, FIXED),
        (lambda: insert(vit(), 4, elastic=True), 5, "num_tokens is 5, but 4 were inserted"),
        (lambda: insert(vit(), 4, elastic=True), 0, "num_tokens is 0"),
        (lambda: insert(vit(), 4, elastic=True), True, "num_tokens is True"),
    ],
)
def test_numbers_of_tokens_that_cannot_be_set_are_refused(
    make: Callable[[], nn.Module], m: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        set_num_tokens(make(), m)


def test_what_other_code_cannot_do_is_refused() -> None:
    model: Any = insert(average(), 4, at=3, overlap=2)
    with pytest.raises(ValueError, match="from block 1 on"):
        model.forward_intermediates(inputs("timm"), indices=[1])
    with pytest.raises(ValueError, match="no overlap, this one has 2"):
        to_scenic(model)
    with pytest.raises(ValueError, match=r"set to 2 of 4; .*set_num_tokens\(model, 4\)"):
        to_scenic(insert(average(), 4, elastic=True, active_tokens=2))
    with pytest.raises(ValueError, match="overlap=1 and a TokenLearnerV11"):
        OverlapEnd(nn.Identity(), wrapped_blocks(insert(vit(), 4, at=3, overlap=1))[2])
    with pytest.raises(ValueError, match="takes no overlap"):
        FrameViT(**DEEP, overlap=1)
