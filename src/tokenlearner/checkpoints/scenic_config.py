"""Infers the arguments of a scenic model from its parameters, so that it can be built again.

Source: google-research/scenic `projects/token_learner/model.py`, all its versions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..utils.validation import shortened
from .scenic import LEARNER_LAYERS, flat_params, flax_names

_SUBMODULE = re.compile(
    r"Transformer/(encoderblock|TokenLearnerModule|TokenFuser)(?:V11)?_(\d+)/(.+)"
)
_QUERY = "MultiHeadDotProductAttention_0/query/kernel"

Submodules = Mapping[str, Mapping[int, Mapping[str, Any]]]  # type, number, parameter


def describe_learner(params: Mapping[str, Any], gelu: bool | None = None) -> dict[str, Any]:
    """Returns the class and arguments of the learner that has these parameters.

    Args:
        params: Of a learner, with names such as `LayerNorm_0/scale`.
        gelu: Whether the grouped form of V1.1 has a GELU, which no parameter shows. None goes by
            the groups: 8 without it in December 2021, then one for every 128 channels with it.

    Returns:
        `learner` as in `insert`, and the arguments of its class with scenic's numbers. How V1 pools
        is not among them, as no parameter shows it; scenic's default is the sum.

    Raises:
        ValueError: No learner has these parameters, or `gelu` is None and cannot be inferred.
    """
    shapes = {name: tuple(value.shape) for name, value in flat_params(params).items()}
    names = {kind: flax_names(layers) for kind, layers in LEARNER_LAYERS.items()}
    kind = next((kind for kind, known in names.items() if known == shapes.keys()), None)
    if kind is None:
        raise ValueError(
            f"no learner of scenic has the parameters {shortened(shapes)}; pass all those of a "
            "learner, without its name in front"
        )
    (width,) = shapes["LayerNorm_0/scale"]
    form = {"learner": kind, "in_channels": width, "norm_eps": 1e-6, "approximate": "tanh"}
    if kind == "v1":
        return form | {"num_tokens": shapes["Conv_3/kernel"][-1]}
    if kind == "v11":
        hidden, tokens = shapes["token_masking/Dense_1/kernel"]
        return form | {"num_tokens": tokens, "bottleneck_dim": hidden}
    groups = width // shapes["Conv_0/kernel"][-2]
    form |= {"num_tokens": shapes["Conv_1/kernel"][-1], "num_groups": groups}
    has_gelu = _has_gelu(width, groups) if gelu is None else gelu
    return form if has_gelu else form | {"learner": "grouped-linear", "approximate": None}


def _has_gelu(width: int, groups: int) -> bool:
    december, january = groups == 8, groups == max(1, width // 128)
    if december == january:
        raise ValueError(
            f"{groups} groups of {width} channels do not show whether this learner has a GELU; "
            "pass gelu=False for checkpoints of December 2021, gelu=True for those of January 2022"
        )
    return january


def describe(params: Mapping[str, Any], gelu: bool | None = None) -> dict[str, Any]:
    """Returns the arguments of a whole scenic model, as far as its parameters show them.

    Args:
        params: As in `load_scenic`.
        gelu: As in `describe_learner`.

    Returns:
        Always `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `in_chans`, `patch_size`,
        `num_positions`, `num_classes` and `num_tokens`; the last two are 0 without a head and
        without learners. Where they apply `tubelet_size`, `representation_size`, `learner` (as in
        `insert`), `num_learners`, `fuse`, and with fusers `at` and `fuser_bottleneck_dim`. The
        block of a learner without a fuser is not among them, as no parameter shows it.

    Raises:
        ValueError: These are not the parameters of a whole model, its learners or fusers differ
            from one another, or `gelu` is None and cannot be inferred.
    """
    values = flat_params(params)
    modules = _submodules(values)
    try:
        return _sizes(values, modules) | _learners(modules, gelu) | _fusers(modules)
    except KeyError as error:
        raise ValueError(
            f"the parameters lack {error}; expected those of a whole scenic model, with names such "
            "as Transformer/encoder_norm/scale"
        ) from error


def _submodules(values: Mapping[str, Any]) -> Submodules:
    """Groups the parameters of blocks, learners and fusers by type, number and name."""
    modules: dict[str, dict[int, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in values.items():
        if match := _SUBMODULE.fullmatch(name):
            modules[match[1]][int(match[2])][match[3]] = value
    for kind, numbered in modules.items():
        if sorted(numbered) != list(range(len(numbered))):
            numbers = ", ".join(map(str, sorted(numbered)))
            raise ValueError(f"{kind} has the numbers {numbers}, expected 0, 1, 2, ...")
    return modules


def _sizes(values: Mapping[str, Any], modules: Submodules) -> dict[str, Any]:
    *frames, height, width, in_chans, embed_dim = values["embedding/kernel"].shape
    block = modules["encoderblock"][0]
    sizes = {
        "embed_dim": embed_dim,
        "depth": len(modules["encoderblock"]),
        "num_heads": block[_QUERY].shape[1],
        "mlp_ratio": block["MlpBlock_0/Dense_0/kernel"].shape[1] / embed_dim,
        "in_chans": in_chans,
        "patch_size": height if height == width else (height, width),
        "num_positions": values["Transformer/posembed_input/pos_embedding"].shape[1],
        "num_classes": len(values.get("output_projection/bias", ())),
    }
    if frames:
        sizes["tubelet_size"] = frames[0]
    if "pre_logits/bias" in values:
        sizes["representation_size"] = len(values["pre_logits/bias"])
    return sizes


def _learners(modules: Submodules, gelu: bool | None) -> dict[str, Any]:
    forms = [describe_learner(learner, gelu) for learner in modules["TokenLearnerModule"].values()]
    if not forms:
        return {"num_tokens": 0}
    first = forms[0]
    if differing := [form for form in forms if form != first]:
        raise ValueError(f"the learners differ: {first} and {differing[0]}; no model here has both")
    kind = {"learner": first["learner"], "num_tokens": first["num_tokens"]}
    return kind | {"num_learners": len(forms), "fuse": bool(modules["TokenFuser"])}


def _fusers(modules: Submodules) -> dict[str, Any]:
    widths = {_gate_width(fuser) for fuser in modules["TokenFuser"].values()}
    if not widths:
        return {}
    learners, fusers = len(modules["TokenLearnerModule"]), len(modules["TokenFuser"])
    if len(widths) > 1 or learners != fusers:
        raise ValueError(
            f"there are {learners} learners and {fusers} fusers with gates of width {widths}; "
            "expected one fuser for each learner, all of one width"
        )
    return {"at": len(modules["encoderblock"]) - fusers, "fuser_bottleneck_dim": widths.pop()}


def _gate_width(fuser: Mapping[str, Any]) -> int | None:
    if "Conv_0/kernel" in fuser:  # the paper's linear gates
        return None
    return len(fuser["token_masking/Dense_0/bias"])
