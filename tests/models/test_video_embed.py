"""From clips to positions: loops over tubelets and frames written out, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenlearner.models.video_embed import ClipEmbed, sample_frames

C = 5
SHAPE: dict[str, Any] = {"img_size": (7, 9), "patch_size": (2, 3), "in_chans": 3, "embed_dim": C}


def embed(**kwargs: Any) -> ClipEmbed:
    """With every parameter drawn at random."""
    module = ClipEmbed(**(SHAPE | {"num_frames": 4} | kwargs))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def clips(frames: int = 4, height: int = 7, width: int = 9) -> Tensor:
    return torch.randn(2, 3, frames, height, width)


def loop_over_tubelets(module: ClipEmbed, x: Tensor) -> Tensor:
    """Every tubelet, cut out and flattened, through one linear layer."""
    weight, size = module.proj.weight.flatten(1), module.tubelet_size
    positions = [
        x[:, :, t : t + size, i : i + 2, j : j + 3].flatten(1) @ weight.T + module.proj.bias
        for t in range(0, x.shape[2] - size + 1, size)
        for i in range(0, 6, 2)
        for j in range(0, 9, 3)
    ]
    return torch.stack(positions, dim=1)


# --- tubelets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "tubelet"), [(4, 1), (4, 2), (6, 3), (4, 4), (5, 2), (8, 3)])
@torch.no_grad()
def test_tubelets_go_through_one_linear_layer_each(frames: int, tubelet: int) -> None:
    module, x = embed(num_frames=frames, tubelet_size=tubelet), clips(frames)
    out = module(x)
    assert out.shape == (2, frames // tubelet * 9, C) == (2, module.num_patches, C)
    torch.testing.assert_close(out, loop_over_tubelets(module, x))


def embed_like(module: ClipEmbed, **kwargs: Any) -> ClipEmbed:
    other = embed(**kwargs)
    other.load_state_dict(module.state_dict(), strict=True)
    return other


@pytest.mark.parametrize("sampling", ["tubelet", "uniform"])
@torch.no_grad()
def test_bias_device_dtype_and_format_go_with_both_samplings(sampling: str) -> None:
    for bias in (False, True):
        assert (embed(bias=bias, sampling=sampling).proj.bias is not None) == bias
    meta = ClipEmbed(**SHAPE, sampling=sampling, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float64)}
    module, x = embed(sampling=sampling), clips()
    other = embed_like(module, sampling=sampling, input_format="btchw")
    assert torch.equal(other(x.transpose(1, 2)), module(x))
    assert module(x[:0]).shape[::2] == (0, C)


# --- the start of the kernel -------------------------------------------------------------------


@pytest.mark.parametrize("tubelet", [1, 2, 3, 4])
@torch.no_grad()
def test_a_central_start_sees_the_middle_frame_only(tubelet: int) -> None:
    module = ClipEmbed(**SHAPE, num_frames=2 * tubelet, tubelet_size=tubelet)
    middle = tubelet // 2
    x = clips(2 * tubelet)
    plain = nn.functional.conv2d(
        x[:, :, middle], module.proj.weight[:, :, middle], module.proj.bias, stride=(2, 3)
    )
    torch.testing.assert_close(module(x)[:, :9], plain.flatten(2).transpose(1, 2))
    other = x.clone()
    for frame in range(tubelet):
        if frame != middle:
            other[:, :, frame] = 9.0
    torch.testing.assert_close(module(x), module(other))
    assert module.proj.weight[:, :, middle].abs().min() > 0


@torch.no_grad()
def test_an_average_start_sees_all_frames_alike_and_a_random_one_each_in_its_own_way() -> None:
    module, x = ClipEmbed(**SHAPE, num_frames=3, tubelet_size=3, tubelet_init="average"), clips(3)
    torch.testing.assert_close(module(x), module(x[:, :, [2, 0, 1]]))
    weight = module.proj.weight[:, :, 0]
    summed = nn.functional.conv2d(x.sum(2), weight, module.proj.bias, stride=(2, 3))
    torch.testing.assert_close(module(x), summed.flatten(2).transpose(1, 2))
    weight = ClipEmbed(**SHAPE, num_frames=3, tubelet_size=3, tubelet_init="random").proj.weight
    assert weight.abs().amin(dim=(0, 1, 3, 4)).min() > 0
    assert not torch.equal(weight[:, :, 0], weight[:, :, 1])


@pytest.mark.parametrize("tubelet_init", ["central", "average", "random"])
def test_kernels_start_lecun_normal_and_biases_at_0(tubelet_init: str) -> None:
    module = ClipEmbed(img_size=32, patch_size=8, embed_dim=200, tubelet_init=tubelet_init)
    weight = module.proj.weight[:, :, 1]
    fan_in = 3 * 2 * 8 * 8
    assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
    assert weight.abs().max().item() < 2.3 * fan_in**-0.5  # cut off at two deviations
    assert module.proj.bias is not None
    assert module.proj.bias.abs().max() == 0


# --- uniform sampling --------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "num_frames"), [(4, 4), (8, 4), (30, 3), (5, 1)])
@torch.no_grad()
def test_uniform_sampling_is_a_convolution_for_each_chosen_frame(
    available: int, num_frames: int
) -> None:
    module, x = embed(sampling="uniform", num_frames=num_frames), clips(available)
    chosen = sample_frames(available, num_frames)
    loop = [module.proj(x[:, :, i]).flatten(2).transpose(1, 2) for i in chosen]
    assert (module.frames, module.tubelet_size, len(chosen)) == (num_frames, 1, num_frames)
    torch.testing.assert_close(module(x), torch.cat(loop, dim=1))


counts = st.integers(1, 300)


@given(available=counts, num_frames=counts)
def test_frames_are_those_of_the_official_rule_where_floats_decide_no_tie(
    available: int, num_frames: int
) -> None:
    num_frames += num_frames % 2  # no multiple of T / (n + 1) is then halfway between two frames
    start = available / (num_frames + 1)
    official = np.round(np.arange(start, available, start))[:num_frames].astype(int)
    if num_frames >= available:
        official = np.arange(available)
    assert sample_frames(available, num_frames) == np.minimum(official, available - 1).tolist()


@given(available=counts, num_frames=counts)
def test_chosen_frames_are_different_ones_in_order_and_ties_go_to_the_even_one(
    available: int, num_frames: int
) -> None:
    chosen = sample_frames(available, num_frames)
    assert len(chosen) == min(available, num_frames)
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < available
    for i, frame in enumerate(chosen if num_frames < available else (), 1):
        twice = 2 * available * i - 2 * frame * (num_frames + 1)  # the distance, times 2 (n + 1)
        assert abs(twice) <= num_frames + 1
        if abs(twice) == num_frames + 1:
            assert frame % 2 == 0


# --- formats and sizes -------------------------------------------------------------------------


@pytest.mark.parametrize("input_format", ["bcthw", "btchw"])
@torch.no_grad()
def test_a_format_is_never_guessed(input_format: str) -> None:
    module = embed(num_frames=3, tubelet_size=1, input_format=input_format)
    x = torch.randn(2, 3, 3, 7, 9)  # as many channels as frames: both would fit
    frames_second = x if input_format == "bcthw" else x.transpose(1, 2)
    torch.testing.assert_close(module(x), loop_over_tubelets(module, frames_second))


@torch.no_grad()
def test_the_size_of_a_frame_can_be_set_but_not_that_of_a_patch() -> None:
    module = embed()
    assert (module.feat_ratio(), module.feat_ratio(as_scalar=False)) == (3, (2, 3))
    assert module.dynamic_feat_size((11, 11)) == (5, 3)
    module.set_input_size((4, 12))
    assert (module.img_size, module.grid_size, module.num_patches) == ((4, 12), (2, 4), 16)
    module.set_input_size(9, (2, 3))
    assert (module.img_size, module.grid_size) == ((9, 9), (4, 3))
    with pytest.raises(ValueError, match=r"patch_size is 4, expected \(2, 3\)"):
        module.set_input_size((8, 8), 4)
    module.set_input_size()
    assert (module.img_size, module.grid_size) == ((9, 9), (4, 3))
    assert module(clips(4, 9, 9)).shape == (2, 24, C)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampling": "even"}, "sampling is 'even'"),
        ({"input_format": "cthw"}, "input_format is 'cthw'"),
        ({"tubelet_init": "zero"}, "tubelet_init is 'zero'"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 4.0}, r"num_frames is 4\.0"),
        ({"tubelet_size": 0}, "tubelet_size is 0"),
        ({"num_frames": 3, "tubelet_size": 4}, "num_frames is 3"),
        ({"img_size": (1, 9)}, r"img_size is \(1, 9\)"),
        ({"img_size": (7, 0)}, "width of img_size is 0"),
        ({"img_size": 7.0 * torch.ones(2)}, "height of img_size is"),
        ({"patch_size": 0}, "height of patch_size is 0"),
        ({"patch_size": (2, 4, 4)}, r"patch_size is \(2, 4, 4\)"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad"),
        ({"strict_img_size": False}, "frames have one size"),
        ({"frames": 4}, "no frames"),
        ({"norm_layer": nn.LayerNorm}, "no norm_layer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipEmbed(**(SHAPE | {"num_frames": 4} | kwargs))
    ClipEmbed(**SHAPE, dynamic_img_pad=False, strict_img_size=True, output_fmt=None)  # neutral


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((3, 4, 7, 9), {}, r"clips are \[3, 4, 7, 9\], expected \[b, c, t, h, w\]$"),
        ((3, 4, 7, 9), {"input_format": "btchw"}, r"expected \[b, t, c, h, w\]$"),
        ((2, 1, 4, 7, 9), {}, "with 3 channels, 4 frames of"),
        ((2, 3, 5, 7, 9), {}, r"with 3 channels, 4 frames of \(7, 9\); build the model for them"),
        ((2, 3, 3, 7, 9), {}, "4 frames of"),
        ((2, 3, 3, 7, 9), {"sampling": "uniform"}, "4 or more frames of"),
        ((2, 3, 4, 9, 7), {}, r"frames of \(7, 9\)"),
        ((2, 4, 3, 7, 9), {}, r"\(input_format='btchw' takes \[b, t, c, h, w\]\)"),
        (
            (2, 3, 4, 7, 9),
            {"input_format": "btchw"},
            r"expected \[b, t, c, h, w\] with 3 .*\(input_format='bcthw' takes \[b, c, t, h, w\]",
        ),
    ],
)
def test_clips_that_the_model_was_not_built_for_are_refused(
    shape: tuple[int, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embed(**kwargs)(torch.randn(shape))
