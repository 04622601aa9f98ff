"""Starting one model from another: what is copied, resampled, repeated, left new and refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import randomized

from tokenlearner import create_model, remove
from tokenlearner.checkpoints.init_from import init_from, resample_positions
from tokenlearner.checkpoints.scenic import nest, to_scenic
from tokenlearner.models.factory import save_model
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.vit import TokenLearnerViT
from tokenlearner.models.vivit import ViViT

SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
TEN = SHAPE | {"num_classes": 10}
vit = partial(TokenLearnerViT, img_size=32, **TEN)
vivit = partial(ViViT, img_size=32, num_frames=6, tubelet_size=2, **TEN)


# --- positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7, 12), (12, 7), (5, 5), (1, 4), (4, 1)])
def test_positions_are_resampled_as_scenic_does_with_scipy(sizes: tuple[int, int]) -> None:
    old, new = sizes
    positions = torch.randn(1, old * old, 8)
    planes = positions.numpy().reshape(old, old, 8)
    expected = scipy.ndimage.zoom(planes, (new / old, new / old, 1), order=1)
    ours = resample_positions(positions, (old, old), (new, new))
    np.testing.assert_allclose(ours.numpy(), expected.reshape(1, -1, 8), rtol=1e-5, atol=1e-6)


def test_positions_of_a_plane_stay_a_plane_on_grids_that_are_not_square() -> None:
    def plane(h: int, w: int) -> torch.Tensor:
        rows, columns = torch.meshgrid(
            torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij"
        )
        return (2 * rows - 3 * columns).reshape(1, -1, 1)

    torch.testing.assert_close(resample_positions(plane(3, 5), (3, 5), (6, 4)), plane(6, 4))


def test_another_resolution_changes_nothing_but_the_positions() -> None:
    source, model = randomized(vit()), vit(img_size=(48, 24))
    report = init_from(model, source, keep_head=True)
    expected = resample_positions(source.pos_embed, (4, 4), (6, 3))
    assert torch.equal(model.pos_embed, expected)
    assert report.changed == ("pos_embed",)
    assert (report.new, report.unused) == ((), ())
    state = source.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k != "pos_embed")


def test_the_grid_of_positions_that_are_no_square_is_given() -> None:
    source, model = randomized(vit(img_size=(48, 24))), vit()
    with pytest.raises(ValueError, match=r"18 positions .* pass grid="):
        init_from(model, source)
    with pytest.raises(ValueError, match=r"grid is \(3, 5\), but there are 18 positions"):
        init_from(model, source, grid=(3, 5))
    init_from(model, source, grid=(6, 3))
    assert torch.equal(model.pos_embed, resample_positions(source.pos_embed, (6, 3), (4, 4)))


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("no_embed_class", [False, True])
@torch.no_grad()
def test_class_tokens_and_registers_of_timm_are_left_out_with_their_positions(
    registers: int, no_embed_class: bool
) -> None:
    source = randomized(
        VisionTransformer(img_size=32, **TEN, reg_tokens=registers, no_embed_class=no_embed_class)
    )
    model = vit()
    report = init_from(model, source, keep_head=True)
    assert torch.equal(model.pos_embed, source.pos_embed[:, -16:])
    assert report.unused == (("cls_token", "reg_token") if registers else ("cls_token",))


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("no_embed_class", [False, True])
@torch.no_grad()
def test_class_tokens_and_registers_start_those_of_a_model_that_has_them(
    size: int, registers: int, no_embed_class: bool
) -> None:
    source = randomized(VisionTransformer(img_size=32, **TEN, reg_tokens=registers)).eval()
    kwargs = {"reg_tokens": registers, "no_embed_class": no_embed_class}
    model = VisionTransformer(img_size=size, **TEN, **kwargs).eval()
    report = init_from(model, source, keep_head=True)
    assert not report.new
    assert not report.unused
    tokens = (source.cls_token + source.pos_embed[:, :1], model.cls_token + model.pos_embed[:, :1])
    if no_embed_class:
        tokens = (tokens[0], model.cls_token)
    torch.testing.assert_close(*tokens, rtol=0, atol=1e-6)
    if size == 32:
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-5)


def test_tokens_without_positions_do_not_start_those_with_positions() -> None:
    source = VisionTransformer(img_size=32, **TEN, no_embed_class=True)
    with pytest.raises(ValueError, match=r"positions of 0 prefix tokens, .* the model of 1"):
        init_from(VisionTransformer(img_size=32, **TEN), source)


# --- heads and learners ------------------------------------------------------------------------


def test_the_head_stays_new_without_keep_head_and_is_kept_for_the_same_classes_alone() -> None:
    source, model = randomized(vit()), vit()
    report = init_from(model, source)
    assert report.new == ("head.weight", "head.bias")
    assert report.unused == ("head.bias", "head.weight")
    assert not model.head.weight.any()
    init_from(model, source, keep_head=True)
    assert torch.equal(model.head.weight, source.head.weight)
    assert init_from(vit(num_classes=3), source).new == ("head.weight", "head.bias")
    with pytest.raises(ValueError, match=r"head.weight is \[10, 24\], expected \[3, 24\]"):
        init_from(vit(num_classes=3), source, keep_head=True)


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_a_plain_vit_of_timm_starts_one_with_learned_tokens(fuse: bool) -> None:
    official = {"class_token": False, "global_pool": "avg", "fc_norm": False, "final_norm": True}
    source = randomized(VisionTransformer(32, **TEN, **official, act_layer="gelu_tanh"))
    model = vit(num_tokens=4, at=1, fuse=fuse)
    report = init_from(model, source, keep_head=True)
    assert any(".learner." in name for name in report.new)
    assert all(".learner." in name or ".fuser." in name for name in report.new)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(remove(model)(images), source(images))


def test_learners_of_the_weights_are_copied_where_the_model_has_them_and_refused_elsewhere() -> (
    None
):
    source, model = randomized(vit(num_tokens=4, at=1)), vit(img_size=48, num_tokens=4, at=1)
    report = init_from(model, source, keep_head=True)
    assert report.new == ()
    weight = model.blocks[1].learner.attention_maps[0].weight
    assert torch.equal(weight, source.blocks[1].learner.attention_maps[0].weight)
    with pytest.raises(ValueError, match=r"left over: blocks.1.learner.attention_maps"):
        init_from(vit(), source)


# --- images to video ---------------------------------------------------------------------------


def test_an_image_model_starts_a_video_model_with_its_positions_in_every_frame() -> None:
    source, model = randomized(vit()), vivit(num_tokens=4, at=1)
    report = init_from(model, source)
    assert report.changed == ("pos_embed", "patch_embed.proj.weight")
    assert torch.equal(model.pos_embed, source.pos_embed.repeat(1, 3, 1))
    assert torch.equal(model.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)


@pytest.mark.parametrize("tubelet_init", ["central", "average"])
@torch.no_grad()
def test_a_tubelet_starts_with_its_middle_image_or_its_mean(tubelet_init: Any) -> None:
    with pytest.raises(ValueError, match="tubelet_init is 'mean'"):
        init_from(vivit(), vit(), tubelet_init="mean")
    source, model, clip = randomized(vit()), vivit(), torch.randn(2, 3, 6, 32, 32)
    init_from(model, source, tubelet_init=tubelet_init)
    means = clip.unflatten(2, (3, 2)).mean(3)
    seen = clip[:, :, 1::2] if tubelet_init == "central" else means
    expected = torch.cat([source.patch_embed(image) for image in seen.unbind(2)], dim=1)
    torch.testing.assert_close(model.patch_embed(clip), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_video_of_equal_frames_is_seen_as_the_image() -> None:
    source, image = randomized(vit()), torch.randn(1, 3, 32, 32)
    model = ViViT(img_size=32, num_frames=1, sampling="uniform", **TEN).eval()
    init_from(model, source, keep_head=True)
    torch.testing.assert_close(model(image.unsqueeze(2)), source(image))


def test_an_image_model_starts_a_model_for_live_video() -> None:
    source = randomized(vit())
    model = FrameViT(img_size=32, num_frames=3, num_tokens=4, at=2, **TEN)
    report = init_from(model, source)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)
    assert torch.equal(model.encoder.blocks[1].norm1.weight, source.blocks[1].norm1.weight)
    assert "time_embed" in report.new
    assert all("learner" in n or n.startswith(("head", "time_embed")) for n in report.new)


# --- where weights come from -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["flat", "nested", "state", "file"])
def test_all_forms_of_the_same_weights_start_the_same_model(form: str, tmp_path: Path) -> None:
    source, model, other = randomized(vit()), vivit(img_size=48), vivit(img_size=48)
    flat, file = to_scenic(source), tmp_path / "vit.pth"
    torch.save(source.state_dict(), file)
    forms = {"flat": flat, "nested": nest(flat), "state": source.state_dict(), "file": file}
    init_from(model, source)
    init_from(other, forms[form])
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items() if "head" not in k)


def test_a_saved_model_starts_another(tmp_path: Path) -> None:
    from tokenlearner.models.factory import create_model

    source = randomized(create_model("vit_mini_patch4_28"))
    model = create_model("vit_mini_patch4_tl8at3_28", img_size=32)
    init_from(model, save_model(source, tmp_path / "a.safetensors"), keep_head=True)
    assert torch.equal(model.blocks[3].block.norm1.weight, source.blocks[3].norm1.weight)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"depth": 2}, "missing: blocks.2.attn"),
        ({"depth": 4}, "left over: blocks.3.attn"),
        ({"embed_dim": 48}, r"blocks.0.attn.proj.bias is \[48\], expected \[24\]"),
        ({"patch_size": 4}, r"patch_embed.proj.weight is \[24, 3, 4, 4\], expected"),
        ({"in_chans": 1}, r"patch_embed.proj.weight is \[24, 1, 8, 8\], expected"),
        ({"fc_norm": True}, r"left over: fc_norm.bias"),
    ],
)
def test_weights_of_another_kind_are_refused_and_change_nothing(
    source: dict[str, Any], message: str
) -> None:
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        init_from(model, randomized(vit(**source)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dtype_stays_that_of_the_model() -> None:
    model = vit().to(torch.bfloat16)
    init_from(model, randomized(vit()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_weights_that_are_no_numbers_are_refused_before_any_is_copied() -> None:
    source, target = (create_model("vit_mini_patch4_28") for _ in range(2))
    before = target.state_dict()["blocks.0.norm1.weight"].clone()
    source.get_parameter("blocks.3.norm1.weight").data[0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.3\.norm1\.weight"):
        init_from(target, source)
    assert target.state_dict()["blocks.0.norm1.weight"].equal(before)
