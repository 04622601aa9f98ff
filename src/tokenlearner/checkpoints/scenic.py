"""Converts scenic's parameters to our modules and back, by table, with none left over.

A line of the tables is a layer: its flax name, our name, and its parameters with the einops pattern
that turns their axes, read from left to right into our modules, from right to left out of them.

Axes: `i` in, `o` out, `h w` kernel, `t` its frames, `heads`, `d` channels of a head, `three` query,
key and value. Source: google-research/scenic `projects/token_learner/model.py`, all its versions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..layers.blocks import PositionFreeBlock
from ..layers.token_fuser import TokenFuser
from ..layers.token_learner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from ..utils.validation import shortened
from .flax_msgpack import as_tensor, flat_tree, without_params

Module = TypeVar("Module", bound=nn.Module)
LayerType = Mapping[str, tuple[str, str]]  # flax's parameter: ours, and the pattern
Layers = tuple[tuple[str, str, LayerType], ...]  # flax's layer, ours, and their type

_BIAS: LayerType = {"bias": ("bias", "o -> o")}
_NORM: LayerType = {"scale": ("weight", "o -> o"), **_BIAS}
_DENSE: LayerType = {"kernel": ("weight", "i o -> o i"), **_BIAS}
_CONV: LayerType = {"kernel": ("weight", "h w i o -> o i h w")}
_POINTWISE: LayerType = {"kernel": ("weight", "1 1 i o -> o i")}
_PATCHES: LayerType = {**_CONV, **_BIAS}
_TUBELETS: LayerType = {"kernel": ("weight", "t h w i o -> o i t h w"), **_BIAS}
_HEADS_IN: LayerType = {
    "kernel": ("weight", "three i heads d -> (three heads d) i"),
    "bias": ("bias", "three heads d -> (three heads d)"),
}
_HEADS_OUT: LayerType = {"kernel": ("weight", "heads d o -> o (heads d)"), **_BIAS}

_LEARNER_NORM = ("LayerNorm_0", "norm", _NORM)
_BLOCK: Layers = (
    ("LayerNorm_0", "norm1", _NORM),
    ("MultiHeadDotProductAttention_0/query|key|value", "attn.qkv", _HEADS_IN),  # three are one here
    ("MultiHeadDotProductAttention_0/out", "attn.proj", _HEADS_OUT),
    ("LayerNorm_1", "norm2", _NORM),
    ("MlpBlock_0/Dense_0", "mlp.fc1", _DENSE),
    ("MlpBlock_0/Dense_1", "mlp.fc2", _DENSE),
)
_V1_CONVS = tuple((f"Conv_{i}", f"attention_maps.{2 * i}", _CONV) for i in range(4))
_V1: Layers = (_LEARNER_NORM, *_V1_CONVS)
_V11: Layers = (
    _LEARNER_NORM,
    ("token_masking/Dense_0", "attention_maps.0", _DENSE),
    ("token_masking/Dense_1", "attention_maps.3", _DENSE),
)
_GROUPED: Layers = (
    _LEARNER_NORM,
    ("Conv_0", "attention_maps.0", _CONV),
    ("Conv_1", "attention_maps.1", _CONV),
    ("Conv_2", "feat_conv", _CONV),
)
_FUSER: Layers = (_LEARNER_NORM, ("Dense_0", "mix", _DENSE))
_FUSER_NORMS: Layers = tuple((f"fuser_{key}", key, _NORM) for key in ("mix_norm1", "mix_norm2"))
_MLP_GATES: Layers = tuple((f"token_masking/Dense_{i}", f"gates.{3 * i}", _DENSE) for i in range(2))
_LINEAR_GATES: Layers = (("Conv_0", "gates", _POINTWISE),)
LEARNER_LAYERS = {"v1": _V1, "v11": _V11, "grouped": _GROUPED}
_MODULES = {TokenLearner: _V1, TokenLearnerModuleV11: _GROUPED, TokenLearnerV11: _V11}
_ENCODER = "Transformer/"
_HOST = "timm.models.vision_transformer.Block"


@dataclass(frozen=True)
class _Row:
    """A parameter of ours, and those of flax that it is made of."""

    names: tuple[str, ...]
    key: str
    pattern: str
    sizes: Mapping[str, int]

    def to_torch(self, values: list[Tensor]) -> Tensor:
        value = torch.stack(values) if len(values) > 1 else values[0]
        return rearrange(value, self.pattern, **self.sizes)

    def to_flax(self, value: Tensor) -> dict[str, Tensor]:
        left, _, right = self.pattern.partition(" -> ")
        rearranged = rearrange(value, f"{right} -> {left}", **self.sizes)
        parts = rearranged.unbind() if len(self.names) > 1 else (rearranged,)
        return dict(zip(self.names, parts, strict=True))


def load_scenic(module: Module, params: Mapping[str, Any]) -> Module:
    """Fills a module with scenic's parameters, in place; it keeps its dtype and device.

    Its numbers are scenic's if the module was built with `norm_eps=1e-6`, `approximate="tanh"` and
    the pooling that was trained with; no parameter shows these.

    Args:
        module: A learner, a `TokenFuser`, or an image or video model without class token.
        params: Arrays or tensors, nested as flax has them or flat with names such as
            `Transformer/encoder_norm/scale`; a `params/` in front of all of them is left out.

    Returns:
        The module itself.

    Raises:
        ValueError: scenic has no such module, or a parameter is missing, left over or of another
            shape. The module is then as it was.
    """
    state, rows, values = module.state_dict(), _rows(module), flat_params(params)
    if any(value.is_meta for value in state.values()):
        raise ValueError("the module is on the meta device; call module.to_empty(device='cpu')")
    expected = {name: part for row in rows for name, part in row.to_flax(state[row.key]).items()}
    _check_fit(module, values, expected)
    for row in rows:
        state[row.key].copy_(row.to_torch([values[name] for name in row.names]))
    return module


def state_from_scenic(
    module: nn.Module, params: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Converts the parameters of scenic that fit to a state dict, whatever the shapes.

    This is for starting a model from another's weights, see `init_from.py`. An image model's kernel
    of patches stays 4-D for a video model.

    Returns:
        The state dict, and the names of parameters that have no place in the module.

    Raises:
        ValueError: scenic has no such module.
    """
    values, state = flat_params(params), {}
    for row in _rows(module):
        if not set(row.names) <= values.keys():
            continue
        parts = [values.pop(name) for name in row.names]
        is_image = row.key == "patch_embed.proj.weight" and parts[0].ndim == 4
        row = replace(row, pattern=_CONV["kernel"][1]) if is_image else row
        state[row.key] = row.to_torch(parts)
    return state, sorted(values)


def to_scenic(module: nn.Module) -> dict[str, np.ndarray]:
    """Returns a module's parameters under scenic's flat names, the inverse of `load_scenic`.

    numpy has no bfloat16, so such parameters come as float32, which holds the same values.

    Raises:
        ValueError: scenic has no such module.
    """
    _check_runs_alike(module)
    state = module.state_dict()
    parts = [row.to_flax(state[row.key]) for row in _rows(module)]
    flat = {name: value.cpu() for part in parts for name, value in part.items()}
    wide = {n: v.float() if v.dtype == torch.bfloat16 else v for n, v in flat.items()}
    return {name: np.array(value.numpy(), order="C") for name, value in wide.items()}


def _check_runs_alike(module: nn.Module) -> None:
    """Raises ValueError for what no parameter shows and scenic's models do not do."""
    for part in module.modules():
        if overlap := getattr(part, "overlap", 0):
            raise ValueError(
                f"scenic's models have no overlap, this one has {overlap}; insert without it"
            )
        if (active := getattr(part, "active_tokens", None)) is not None:
            raise ValueError(
                f"scenic's learners have no part of their tokens, this one is set to {active} of "
                f"{part.num_tokens}; call tokenlearner.set_num_tokens(model, {part.num_tokens})"
            )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns names such as `a/b/kernel` into the nested dicts that flax works with.

    Raises:
        ValueError: A name is both a parameter and a layer.
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *layers, last = name.split("/")
        layer: Any = tree
        for part in layers:
            layer = layer.setdefault(part, {}) if isinstance(layer, dict) else None
        if not isinstance(layer, dict) or last in layer:
            raise ValueError(f"{name} is both a parameter and a layer; keep one of them")
        layer[last] = value
    return tree


def flat_params(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns parameters as tensors under flat names, without a `params/` that all of them have."""
    flat = without_params(flat_tree(params))
    return {name: as_tensor(value, name) for name, value in flat.items()}


def _check_fit(module: nn.Module, values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    common = [n for n in values if n in expected]
    shapes = [(n, list(values[n].shape), list(expected[n].shape)) for n in common]
    problems = {
        "left over": sorted(values.keys() - expected.keys()),
        "missing": sorted(expected.keys() - values.keys()),
        "of another shape": [f"{n} is {a}, expected {b}" for n, a, b in shapes if a != b],
        "no floats": [f"{n} is {v.dtype}" for n, v in values.items() if not v.is_floating_point()],
    }
    parts = [f"{problem}: {shortened(names, 10)}" for problem, names in problems.items() if names]
    if parts:
        raise ValueError(
            f"the parameters do not fit the {type(module).__name__}, which is not changed: "
            f"{'; '.join(parts)}; build the module as it was trained"
        )


def _rows(module: nn.Module) -> list[_Row]:
    """Returns the rows of a module; each of its parameters is in exactly one of them."""
    rows = list(_module_rows(module))
    if differing := sorted({row.key for row in rows} ^ module.state_dict().keys()):
        raise ValueError(
            f"scenic has no such {type(module).__name__}: {shortened(differing, 10)} would be "
            "missing or left over; build it with final_norm=True, fc_norm=False, "
            "class_token=False, and without registers, LayerScale, qk_norm and the like"
        )
    return rows


def flax_names(layers: Layers) -> set[str]:
    """Returns the names of flax's parameters in some layers."""
    return {name for row in _layer_rows(layers) for name in row.names}


def _module_rows(module: nn.Module, flax: str = "", ours: str = "") -> Iterator[_Row]:
    if isinstance(module, TokenFuser):
        norms = _FUSER_NORMS if isinstance(module.mix_norm1, nn.LayerNorm) else ()
        gates = _LINEAR_GATES if isinstance(module.gates, nn.Linear) else _MLP_GATES
        return _layer_rows((*_FUSER, *norms, *gates), flax, ours)
    for cls, layers in _MODULES.items():
        if isinstance(module, cls):
            return _layer_rows(layers, flax, ours)
    return _model_rows(module)


def _layer_rows(layers: Layers, flax: str = "", ours: str = "", heads: int = 1) -> Iterator[_Row]:
    """Returns the rows of some layers, with the prefixes of their names in flax and here."""
    for path, key, layer_type in layers:
        scope, slash, lasts = path.rpartition("/")
        starts = [f"{flax}{scope}{slash}{last}" for last in lasts.split("|")]
        for param, (name, pattern) in layer_type.items():
            sizes = {a: n for a, n in (("three", 3), ("heads", heads)) if a in pattern}
            names = tuple(f"{start}/{param}" for start in starts)
            yield _Row(names, f"{ours}{key}.{name}", pattern, sizes)


def _model_rows(model: Any) -> Iterator[_Row]:
    """Returns the rows of an image or video model, which is known by its structure."""
    proj = getattr(getattr(model, "patch_embed", None), "proj", None)
    blocks = list(getattr(model, "blocks", ()))
    if not isinstance(proj, nn.Conv2d | nn.Conv3d) or not all(map(_is_block, blocks)):
        raise ValueError(
            f"scenic has no {type(model).__name__}; known are the learners, TokenFuser, and models "
            "of timm's VisionTransformer blocks, such as TokenLearnerViT and ViViT"
        )
    patches = _TUBELETS if isinstance(proj, nn.Conv3d) else _PATCHES
    yield from _layer_rows((("embedding", "patch_embed.proj", patches),))
    yield _Row((f"{_ENCODER}posembed_input/pos_embedding",), "pos_embed", "one n o -> one n o", {})
    counts: Counter[str] = Counter()
    for i, block in enumerate(blocks):
        yield from _block_rows(block, i, counts)
    yield from _layer_rows((("encoder_norm", "norm", _NORM),), _ENCODER)
    for flax, key in (("pre_logits", "pre_logits"), ("output_projection", "head")):
        if isinstance(getattr(model, key, None), nn.Linear):
            yield from _layer_rows(((flax, key, _DENSE),))


def _block_rows(block: Any, i: int, counts: Counter[str]) -> Iterator[_Row]:
    """Returns the rows of a block, its learner and its fuser, numbered in the order of blocks."""
    wrapped = isinstance(block, PositionFreeBlock)
    for key, module in block.named_children() if wrapped else ():
        if key != "block":
            name = "TokenFuser" if key == "fuser" else "TokenLearnerModule"
            name += "V11" if isinstance(module, TokenLearnerV11 | TokenLearnerModuleV11) else ""
            yield from _module_rows(
                module, f"{_ENCODER}{name}_{counts[name]}/", f"blocks.{i}.{key}."
            )
            counts[name] += 1
    inner: Any = block.block if wrapped else block
    ours = f"blocks.{i}.block." if wrapped else f"blocks.{i}."
    yield from _layer_rows(_BLOCK, f"{_ENCODER}encoderblock_{i}/", ours, inner.attn.num_heads)


def _is_block(block: nn.Module) -> bool:
    inner = block.block if isinstance(block, PositionFreeBlock) else block
    return any(f"{c.__module__}.{c.__qualname__}" == _HOST for c in type(inner).__mro__)
