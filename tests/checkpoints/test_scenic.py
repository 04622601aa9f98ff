"""Conversion: scenic's numbers first, then both ways bit for bit, then what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from tiny import drawn
from torch import Tensor, nn

from tokenlearner import TokenFuser, TokenLearner, TokenLearnerModuleV11, TokenLearnerV11, insert
from tokenlearner.checkpoints.scenic import load_scenic, nest, to_scenic
from tokenlearner.models.mixer import TokenLearnerMixer
from tokenlearner.models.vit import TokenLearnerViT
from tokenlearner.models.vivit import ViViT

Golden = Callable[[str], dict[str, np.ndarray]]
Make = Callable[..., nn.Module]

OFFICIAL = {"norm_eps": 1e-6, "approximate": "tanh"}
SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2}
TEN = SHAPE | {"num_classes": 10}
LEARNED = {"num_tokens": 4, "at": 2}

v1 = partial(TokenLearner, use_sum_pooling=True, **OFFICIAL)
FUSERS: dict[str, Make] = {
    "token_fuser": partial(TokenFuser, 24, 8),
    "token_fuser_nonorm": partial(TokenFuser, 24, 4, 32, use_normalization=False),
}
MODULES: dict[str, Make] = {
    "token_learner_v1_sum": partial(v1, 24, 8),
    "token_learner_v1_mean": partial(TokenLearner, 24, 5, **OFFICIAL),
    "token_learner_v1_rect": partial(v1, 16, 4),
    "token_learner_v11": partial(TokenLearnerV11, 24, 8),
    "token_learner_v11_seq": partial(TokenLearnerV11, 24, 3, 16),
    **FUSERS,
}
tubelets = partial(ViViT, img_size=24, num_frames=6, tubelet_size=2, **TEN, **LEARNED)
MODELS: dict[str, Make] = {
    "vit_v11": partial(TokenLearnerViT, img_size=32, **TEN, **LEARNED),
    "vit_v1_fuser_prelogits": partial(
        TokenLearnerViT, img_size=32, **TEN, **LEARNED, learner="v1", fuse=True,
        representation_size=20,
    ),
    "vit_patch_baseline": partial(TokenLearnerViT, img_size=(32, 24), **TEN, global_pool="max"),
    "video_3dconv_v11": tubelets,
    "video_3dconv_fuser": partial(tubelets, fuse=True),
    "video_sampling": partial(
        ViViT, img_size=24, num_frames=4, sampling="uniform", **TEN, **LEARNED
    ),
    "representation_video": partial(
        ViViT, img_size=32, num_frames=3, sampling="uniform", **SHAPE, **LEARNED,
        num_classes=0, global_pool="",
    ),
}  # fmt: skip
GOLDEN = {**MODULES, **MODELS}
OTHERS: dict[str, Make] = {
    "grouped": partial(TokenLearnerModuleV11, 24, 5, 4, approximate="tanh"),
    "grouped_linear": partial(TokenLearnerModuleV11, 24, 5, 8),
    "fuser_linear": partial(TokenFuser, 24, 5, None),
    "fuser_linear_nonorm": partial(TokenFuser, 24, 5, None, use_normalization=False),
    "vit_grouped_fuser_linear": partial(
        TokenLearnerViT, img_size=32, **TEN, **LEARNED, learner="grouped", fuse=True,
        fuser_bottleneck_dim=None,
    ),
    "vit_headless": partial(TokenLearnerViT, img_size=32, **SHAPE, num_classes=0),
    "vit_prelogits_headless": partial(
        TokenLearnerViT, img_size=32, **SHAPE, num_classes=0, representation_size=20
    ),
    "timm": partial(
        VisionTransformer, 32, **TEN, class_token=False, global_pool="avg", fc_norm=False,
        final_norm=True,
    ),
}  # fmt: skip
ALL = GOLDEN | OTHERS
each_module = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def params_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}


randomized = partial(drawn, std=1.0)


def states_equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def inputs_of(file: str, arrays: dict[str, np.ndarray]) -> list[Tensor]:
    """The golden inputs: two of a fuser, channels first of a model."""
    keys = ("input0", "input1") if file in FUSERS else ("input0",)
    inputs = [torch.from_numpy(arrays[key]) for key in keys]
    return [x.movedim(-1, 1) for x in inputs] if file in MODELS else inputs


# --- scenic's numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("file", GOLDEN)
def test_outputs_and_input_gradients_are_those_of_scenic(file: str, golden: Golden) -> None:
    arrays = golden(file)
    module = load_scenic(GOLDEN[file]().eval(), params_of(arrays))
    first, *others = inputs_of(file, arrays)
    out = module(first.requires_grad_(), *others)
    [grad] = torch.autograd.grad(out, first, torch.from_numpy(arrays["cotangent"]))
    if file in MODELS:
        grad = grad.movedim(1, -1)
    with torch.inference_mode():
        for found in (out.detach(), module(first, *others)):
            np.testing.assert_allclose(found, arrays["output"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad, arrays["grad_input"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", GOLDEN)
def test_scenics_parameters_come_back_bit_for_bit(file: str, golden: Golden) -> None:
    params = params_of(golden(file))
    back = to_scenic(load_scenic(GOLDEN[file](), params))
    assert back.keys() == params.keys()
    for name, array in params.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


@torch.no_grad()
def test_grouped_kernels_mean_what_flaxs_grouped_convolutions_mean() -> None:
    module = randomized(TokenLearnerModuleV11(6, 4, 3, norm_eps=1e-6)).double()
    params, x = to_scenic(module), np.random.randn(2, 10, 6)

    def grouped(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """flax keeps `1 1 i o`: the first 2 outputs see the first 2 channels, and so on."""
        pieces = [x[..., 2 * g : 2 * g + 2] @ kernel[0, 0, :, 2 * g : 2 * g + 2] for g in range(3)]
        return np.concatenate(pieces, axis=-1)

    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = y * params["LayerNorm_0/scale"] + params["LayerNorm_0/bias"]
    maps = np.exp(grouped(y, params["Conv_0/kernel"]) @ params["Conv_1/kernel"][0, 0])
    maps /= maps.sum(1, keepdims=True)
    expected = maps.swapaxes(1, 2) @ grouped(x, params["Conv_2/kernel"])
    np.testing.assert_allclose(module(torch.from_numpy(x)), expected, rtol=1e-10)


@torch.no_grad()
def test_a_fusers_linear_gates_are_flaxs_1_x_1_convolution() -> None:
    fuser = randomized(TokenFuser(6, 4, None))
    kernel = to_scenic(fuser)["Conv_0/kernel"]
    assert kernel.shape == (1, 1, 6, 4)
    x = torch.randn(2, 10, 6)
    torch.testing.assert_close(fuser.gates(x), x @ torch.from_numpy(kernel[0, 0]))


# --- both ways, bit for bit --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16, torch.bfloat16], ids=str)
@each_module
def test_a_module_comes_back_bit_for_bit(make: Make, dtype: torch.dtype | None) -> None:
    module, other = randomized(make().to(dtype)), randomized(make().to(dtype))
    before, params = copy.deepcopy(module), to_scenic(module)
    assert sum(v.size for v in params.values()) == sum(p.numel() for p in module.parameters())
    assert not states_equal(module, other)
    assert load_scenic(other, params) is other
    assert all(p.dtype == (dtype or torch.float32) for p in other.parameters())
    assert states_equal(other, before)
    assert states_equal(module, before)


def test_parameters_stay_those_that_an_optimizer_holds_and_arrays_are_copies() -> None:
    module, other = (randomized(TokenLearnerV11(24, 4)) for _ in range(2))
    held, arrays, before = list(module.parameters()), to_scenic(other), copy.deepcopy(other)
    load_scenic(module, arrays)
    assert all(new is old for new, old in zip(module.parameters(), held, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    for array in arrays.values():
        array[:] = 0
    assert states_equal(other, before)
    assert states_equal(module, before)


def read_only(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for value in params.values():
        value.flags.writeable = False
    return params


FORMS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, Any]]] = {
    "nested": nest,
    "tensors": lambda p: {name: torch.from_numpy(value) for name, value in p.items()},
    "prefixed": lambda p: {f"params/{name}": value for name, value in p.items()},
    "nested prefix": lambda p: {"params": nest(p)},
    "read-only": read_only,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_parameters_is_taken(form: str) -> None:
    module = randomized(MODELS["vit_v11"]())
    assert states_equal(load_scenic(MODELS["vit_v11"](), FORMS[form](to_scenic(module))), module)


def test_learned_tokens_inserted_into_timms_model_are_converted() -> None:
    make = OTHERS["timm"]
    module, other = (randomized(insert(make(), 4, at=1, fuse=True)) for _ in range(2))
    params = to_scenic(module)
    assert "Transformer/TokenFuser_2/Dense_0/kernel" in params
    assert states_equal(load_scenic(other, params), module)


def test_flat_names_become_nested_dicts_unless_one_is_also_a_layer() -> None:
    assert nest({"a/b/c": 1, "a/d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    for flat in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a": 1, "a/b/c": 2}):
        with pytest.raises(ValueError, match="both a parameter and a layer"):
            nest(flat)


# --- nothing is left over ----------------------------------------------------------------------

NAME = "Transformer/encoderblock_1/LayerNorm_0/scale"
KERNEL = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/out/kernel"
CHANGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (lambda p: p.pop(NAME), f"missing: {NAME}"),
    "left over": (lambda p: p.update(cls=np.ones((1, 1, 24))), "left over: cls"),
    "renamed": (lambda p: p.update({"x": p.pop(NAME)}), f"left over: x; missing: {NAME}"),
    "turned": (
        lambda p: p.update({KERNEL: p[KERNEL].transpose(2, 0, 1)}),
        rf"of another shape: {KERNEL} is \[24, 3, 8\], expected \[3, 8, 24\]",
    ),
    "heads joined": (
        lambda p: p.update({KERNEL: p[KERNEL].reshape(24, 24)}),
        rf"of another shape: {KERNEL} is \[24, 24\], expected \[3, 8, 24\]",
    ),
    "other heads": (
        lambda p: p.update({KERNEL: p[KERNEL].reshape(4, 6, 24)}),
        rf"of another shape: {KERNEL} is \[4, 6, 24\], expected \[3, 8, 24\]",
    ),
    "integers": (lambda p: p.update({NAME: np.ones(24, int)}), f"no floats: {NAME} is torch.int64"),
    "strings": (lambda p: p.update({NAME: np.array(["x"])}), f"{NAME} is of dtype <U1"),
    "a nested twin": (lambda p: p.update(output_projection={"bias": 1}), "output_projection/bias"),
}


@pytest.mark.parametrize(("edit", "message"), CHANGES.values(), ids=CHANGES)
def test_parameters_that_do_not_fit_are_named_and_nothing_is_changed(
    edit: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    module, params = MODELS["vit_v11"](), to_scenic(randomized(MODELS["vit_v11"]()))
    before = copy.deepcopy(module)
    edit(params)
    with pytest.raises(ValueError, match=message):
        load_scenic(module, params)
    assert states_equal(module, before)


def test_a_module_on_the_meta_device_is_refused() -> None:
    params = to_scenic(TokenLearnerV11(24, 4))
    with pytest.raises(ValueError, match="meta device"):
        load_scenic(TokenLearnerV11(24, 4).to("meta"), params)


plain = partial(VisionTransformer, 32, 8, embed_dim=24, depth=1, num_heads=3, num_classes=3)
fitting = partial(plain, class_token=False, global_pool="avg", fc_norm=False, final_norm=True)
REFUSED: dict[str, tuple[Make, str]] = {
    "linear": (partial(nn.Linear, 2, 2), "scenic has no Linear"),
    "mixer": (
        partial(TokenLearnerMixer, img_size=32, embed_dim=24, num_classes=3, num_blocks=1),
        "scenic has no TokenLearnerMixer",
    ),
    "class token": (plain, "cls_token"),
    "registers": (partial(fitting, reg_tokens=2), "reg_token"),
    "norm behind the pool": (partial(plain, class_token=False, global_pool="avg"), "fc_norm.*norm"),
    "no final norm": (partial(fitting, final_norm=False), r"norm\.bias, norm\.weight"),
    "LayerScale": (partial(fitting, init_values=1.0), r"blocks\.0\.ls1\.gamma"),
    "qk_norm": (partial(fitting, qk_norm=True), r"blocks\.0\.attn\.k_norm"),
    "no bias": (partial(fitting, qkv_bias=False), r"blocks\.0\.attn\.qkv\.bias"),
    "a norm in front": (partial(fitting, pre_norm=True), "norm_pre"),
    "no positions": (partial(fitting, pos_embed="none"), "pos_embed"),
    "norms behind": (partial(fitting, block_fn=ResPostBlock), "scenic has no VisionTransformer"),
    "another learner": (lambda: _with_learner(nn.Linear(24, 24)), "scenic has no Linear"),
}


def _with_learner(learner: nn.Module) -> nn.Module:
    model = insert(fitting(), 4, at=0)
    model.blocks[0].learner = learner
    return model


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_modules_that_scenic_does_not_have_are_refused(make: Make, message: str) -> None:
    module = make()
    with pytest.raises(ValueError, match=message):
        to_scenic(module)
    with pytest.raises(ValueError, match=message):
        load_scenic(module, to_scenic(fitting()))
