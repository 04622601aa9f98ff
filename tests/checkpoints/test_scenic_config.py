"""Arguments inferred from scenic's parameters: enough to build the model that they fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tokenlearner import TokenFuser, TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from tokenlearner.checkpoints.scenic import load_scenic, nest, to_scenic
from tokenlearner.checkpoints.scenic_config import describe, describe_learner
from tokenlearner.models.vit import TokenLearnerViT

Golden = Callable[[str], dict[str, np.ndarray]]

SHAPE = {"embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2, "patch_size": 8}
COMMON = SHAPE | {"in_chans": 3, "num_classes": 10, "num_tokens": 4}
V11 = {"learner": "v11", "num_learners": 1, "fuse": False}
FUSED = {"num_learners": 2, "fuse": True, "at": 2, "fuser_bottleneck_dim": 64}
EXPECTED: dict[str, dict[str, Any]] = {
    "vit_v11": COMMON | V11 | {"num_positions": 16},
    "vit_v1_fuser_prelogits": COMMON
    | {"learner": "v1", **FUSED, "num_positions": 16, "representation_size": 20},
    "vit_patch_baseline": COMMON | {"num_tokens": 0, "num_positions": 12},
    "video_3dconv_v11": COMMON | V11 | {"num_positions": 27, "tubelet_size": 2},
    "video_3dconv_fuser": COMMON
    | {"learner": "v11", **FUSED, "num_positions": 27, "tubelet_size": 2},
    "video_sampling": COMMON | V11 | {"num_positions": 36},
    "representation_video": COMMON | V11 | {"num_positions": 48, "num_classes": 0},
}
small = partial(TokenLearnerViT, img_size=32, **SHAPE, num_classes=10)
NOT_ARGUMENTS = ("num_learners", "num_positions")


def params_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in arrays.items() if name.startswith("params/")}


def rebuilt(described: dict[str, Any], build: Any = TokenLearnerViT, **more: Any) -> nn.Module:
    return build(**more | {k: v for k, v in described.items() if k not in NOT_ARGUMENTS})


@pytest.mark.parametrize("file", EXPECTED)
def test_scenics_models_are_described_as_they_were_built(file: str, golden: Golden) -> None:
    assert describe(params_of(golden(file))) == EXPECTED[file]


@pytest.mark.parametrize("learner", ["v1", "v11", "grouped", "grouped-linear"])
def test_linear_gates_and_every_learner_are_described(learner: str) -> None:
    model = small(num_tokens=4, at=1, fuse=True, learner=learner, fuser_bottleneck_dim=None)
    described = describe(nest(to_scenic(model)))
    assert described["learner"] == learner
    assert described["fuser_bottleneck_dim"] is None
    assert described["at"] == 1
    load_scenic(rebuilt(described, img_size=32), to_scenic(model))


NEEDED = [
    "embedding/kernel",
    "Transformer/posembed_input/pos_embedding",
    "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel",
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel",
]


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_parameter_is_named(name: str) -> None:
    params = to_scenic(small())
    del params[name]
    with pytest.raises(ValueError, match=f"the parameters lack '.*{name.rpartition('_0/')[2]}'"):
        describe(params)


def replaced(part: str, **other: Any) -> dict[str, Any]:
    """Parameters of a fused model, of which a part is from another or left out."""
    params = to_scenic(small(num_tokens=4, at=2, fuse=True))
    kept = {key: value for key, value in params.items() if part not in key}
    others = to_scenic(small(**({"num_tokens": 4, "at": 2, "fuse": True} | other))) if other else {}
    return kept | {key: value for key, value in others.items() if part in key}


INCONSISTENT: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a learner alone": (lambda: to_scenic(TokenLearnerV11(24, 4)), "embedding/kernel"),
    "a gap": (lambda: replaced("encoderblock_1"), "encoderblock has the numbers 0, 2, 3"),
    "learners": (lambda: replaced("ModuleV11_1", num_tokens=5), "learners differ"),
    "no learner": (lambda: replaced("TokenLearnerModuleV11_1"), "1 learners and 2 fusers"),
    "fusers": (lambda: replaced("TokenFuser_1", fuser_bottleneck_dim=8), "gates of width"),
}


@pytest.mark.parametrize(("make", "message"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_parameters_of_no_model_are_refused(
    make: Callable[[], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe(make())


# --- which learner it is -----------------------------------------------------------------------

_NUMBERS = {"norm_eps": 1e-6, "approximate": "tanh"}
grouped = TokenLearnerModuleV11
FORMS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "v1": (TokenLearner(24, 5), {"learner": "v1", "num_tokens": 5}),
    "v11": (TokenLearnerV11(24, 5, 7), {"learner": "v11", "num_tokens": 5, "bottleneck_dim": 7}),
    "2021": (
        grouped(768, 5, 8),
        {"learner": "grouped-linear", "num_tokens": 5, "num_groups": 8, "approximate": None},
    ),
    "2021, narrow": (
        grouped(24, 5, 8),
        {"learner": "grouped-linear", "num_tokens": 5, "num_groups": 8, "approximate": None},
    ),
    "2022": (grouped(768, 5, 6), {"learner": "grouped", "num_tokens": 5, "num_groups": 6}),
    "2022, narrow": (grouped(24, 5, 1), {"learner": "grouped", "num_tokens": 5, "num_groups": 1}),
}


@pytest.mark.parametrize(("module", "described"), FORMS.values(), ids=FORMS)
def test_a_learner_is_described_so_that_its_class_takes_the_parameters(
    module: nn.Module, described: dict[str, Any]
) -> None:
    form, params = _NUMBERS | {"in_channels": module.in_channels} | described, to_scenic(module)
    assert describe_learner(params) == describe_learner(nest(params)) == form
    del form["learner"]
    state = load_scenic(type(module)(**form), params).state_dict()
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize(("width", "groups"), [(1024, 8), (1144, 8), (24, 4), (768, 12)])
def test_a_learner_with_ambiguous_groups_needs_gelu(width: int, groups: int) -> None:
    params = to_scenic(grouped(width, 4, groups))
    with pytest.raises(ValueError, match=rf"{groups} groups of {width} .* pass gelu=False for"):
        describe_learner(params)
    for gelu, expected in ((True, ("grouped", "tanh")), (False, ("grouped-linear", None))):
        form = describe_learner(params, gelu=gelu)
        assert (form["learner"], form["approximate"]) == expected


@pytest.mark.parametrize(
    "params",
    [
        to_scenic(TokenFuser(24, 4)),
        {},
        {"TokenLearnerModuleV11_0": nest(to_scenic(TokenLearnerV11(9, 4)))},
    ],
    ids=["fuser", "nothing", "a name in front"],
)
def test_parameters_of_no_learner_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no learner"):
        describe_learner(params)
