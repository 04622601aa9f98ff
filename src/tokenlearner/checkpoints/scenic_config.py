"""What the parameters of a scenic model show of how it was built, so that it can be built again.

Source: google-research/scenic `projects/token_learner/model.py`, all its versions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..utils.validation import shortened
from .scenic import LEARNER_TABLES, flat_params, flax_names

_PART = re.compile(r"Transformer/(encoderblock|TokenLearnerModule|TokenFuser)(?:V11)?_(\d+)/(.+)")
_QUERY = "MultiHeadDotProductAttention_0/query/kernel"

Parts = Mapping[str, Mapping[int, Mapping[str, Any]]]


def learner_form(params: Mapping[str, Any], gelu: bool | None = None) -> dict[str, Any]:
    """Tells which learner the parameters of one scenic learner make.

    Args:
        params: Of one learner, with names such as `LayerNorm_0/scale`.
        gelu: Whether the grouped form of V1.1 has a GELU, of which no parameter tells. None goes by
            the groups: 8 without it in December 2021, then one for every 128 channels with it.

    Returns:
        `learner` as in `insert`, and the arguments of its class with scenic's numbers. How V1 pools
        is not among them, as no parameter shows it; scenic's default is the sum.

    Raises:
        ValueError: No learner has these parameters, or `gelu` is None and cannot be told.
    """
    shapes = {name: tuple(value.shape) for name, value in flat_params(params).items()}
    names = {kind: flax_names(layers) for kind, layers in LEARNER_TABLES.items()}
    kind = next((kind for kind, known in names.items() if known == shapes.keys()), None)
    if kind is None:
        raise ValueError(
            f"no learner of scenic has the parameters {shortened(shapes)}; pass all those of one, "
            "and without the learner's own name in front"
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
            f"{groups} groups of {width} channels do not tell whether this learner has a GELU; "
            "pass gelu=False for checkpoints of December 2021, gelu=True for those of January 2022"
        )
    return january


def describe(params: Mapping[str, Any], gelu: bool | None = None) -> dict[str, Any]:
    """Tells what the parameters of a whole scenic model show of how it is built.

    Args:
        params: As in `load_scenic`.
        gelu: As in `learner_form`.

    Returns:
        Always `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `in_chans`, `patch_size`,
        `num_positions`, `num_classes` and `num_tokens`; the last two are 0 without a head and
        without learners. Where they apply `tubelet_size`, `representation_size`, `learner` (as in
        `insert`), `num_learners`, `fuse`, and with fusers `at` and `fuser_bottleneck_dim`. Where a
        learner without a fuser stands, no parameter shows.

    Raises:
        ValueError: These are not the parameters of a whole model, its learners or fusers differ
            from one another, or `gelu` is None and cannot be told.
    """
    values = flat_params(params)
    parts = _parts(values)
    try:
        return _sizes_of(values, parts) | _learners_of(parts, gelu) | _fusers_of(parts)
    except KeyError as error:
        raise ValueError(
            f"the parameters lack {error}; expected those of a whole scenic model, with names such "
            "as Transformer/encoder_norm/scale"
        ) from error


def _parts(values: Mapping[str, Any]) -> Parts:
    """The blocks, learners and fusers, by kind, by number and by name; counted without gaps."""
    parts: dict[str, dict[int, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in values.items():
        if match := _PART.fullmatch(name):
            parts[match[1]][int(match[2])][match[3]] = value
    for kind, found in parts.items():
        if sorted(found) != list(range(len(found))):
            numbers = ", ".join(map(str, sorted(found)))
            raise ValueError(f"{kind} comes with the numbers {numbers}, expected 0, 1, 2, ...")
    return parts


def _sizes_of(values: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    *frames, height, width, in_chans, embed_dim = values["embedding/kernel"].shape
    block = parts["encoderblock"][0]
    sizes = {
        "embed_dim": embed_dim,
        "depth": len(parts["encoderblock"]),
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


def _learners_of(parts: Parts, gelu: bool | None) -> dict[str, Any]:
    forms = [learner_form(learner, gelu) for learner in parts["TokenLearnerModule"].values()]
    if not forms:
        return {"num_tokens": 0}
    first = forms[0]
    if differing := [form for form in forms if form != first]:
        raise ValueError(f"the learners differ: {first} and {differing[0]}; no model here has both")
    kind = {"learner": first["learner"], "num_tokens": first["num_tokens"]}
    return kind | {"num_learners": len(forms), "fuse": bool(parts["TokenFuser"])}


def _fusers_of(parts: Parts) -> dict[str, Any]:
    widths = {_gate_width(fuser) for fuser in parts["TokenFuser"].values()}
    if not widths:
        return {}
    learners, fusers = len(parts["TokenLearnerModule"]), len(parts["TokenFuser"])
    if len(widths) > 1 or learners != fusers:
        raise ValueError(
            f"there are {learners} learners and {fusers} fusers with gates of width {widths}; "
            "expected one fuser for each learner, all of one width"
        )
    return {"at": len(parts["encoderblock"]) - fusers, "fuser_bottleneck_dim": widths.pop()}


def _gate_width(fuser: Mapping[str, Any]) -> int | None:
    if "Conv_0/kernel" in fuser:  # the paper's linear gates
        return None
    return len(fuser["token_masking/Dense_0/bias"])
