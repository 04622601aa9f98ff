"""The Mixers on learned tokens: equal to loops written out, in timm's sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from tiny import OBLONG, randomized

from tokenlearner.layers.blocks import FusedBlock, ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.mixer import MIXERS, TokenLearnerMixer

REDUCED = [name for name in MIXERS if "fuser" not in name]
TINY = OBLONG | {"num_blocks": 4, "num_tokens": 3, "at": 2}
each_learner = pytest.mark.parametrize("learner", LEARNERS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduced", "fused"])


def tiny(**kwargs: Any) -> TokenLearnerMixer:
    return randomized(TokenLearnerMixer(**(TINY | kwargs)))


@cache
def on_meta(name: str) -> TokenLearnerMixer:
    """The whole Mixer without numbers, to look at only."""
    with torch.device("meta"):
        return timm.create_model(name)


# --- numbers -----------------------------------------------------------------------------------


@both_ways
@each_learner
@torch.no_grad()
def test_a_mixer_is_blocks_learners_and_fusers_then_norm_mean_and_head(
    learner: str, fuse: bool
) -> None:
    model, images = tiny(learner=learner, fuse=fuse), torch.randn(2, 3, 8, 12)
    x = model.stem(images)
    for block in model.blocks:
        if not isinstance(block, ReducedBlock):
            x = block(x)
            continue
        tokens = block.block(block.learner(x, (4, 6)))
        assert tokens.shape[:2] == (2, 3)
        x = x + block.fuser(tokens, x) if isinstance(block, FusedBlock) else tokens
    assert x.shape[:2] == (2, 24 if fuse else 3)
    torch.testing.assert_close(model(images), model.head(model.norm(x).mean(dim=1)))


@both_ways
def test_learners_and_fusers_keep_their_own_initialization(fuse: bool) -> None:
    torch.manual_seed(3)
    model = TokenLearnerMixer(**TINY, fuse=fuse)
    torch.manual_seed(3)
    other = TokenLearnerMixer(**TINY, fuse=fuse, learner="v1")
    assert torch.equal(model.blocks[0].mlp_tokens.fc1.weight, other.blocks[0].mlp_tokens.fc1.weight)
    assert model.head.weight.abs().max() == 0  # timm's
    bias = model.blocks[2].learner.attention_maps[0].bias
    assert 0 < bias.abs().max() < 1e-5  # timm's would be 0
    for wrapped in model.blocks[2:] if fuse else ():
        assert wrapped.fuser.mix.weight.abs().max() == 0


# --- names -------------------------------------------------------------------------------------


SIZES = ["s32", "s16", "b32", "b16", "l32", "l16"]


@pytest.mark.parametrize("size", SIZES)
def test_the_blocks_in_front_of_the_learner_are_timms_of_that_size(size: str) -> None:
    [name] = [name for name in REDUCED if name.startswith(f"mixer_{size}_")]
    ours, timms = on_meta(name), on_meta(f"mixer_{size}_224")
    at = MIXERS[name]["at"]
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    expected = {k: v.shape for k, v in timms.state_dict().items()}
    behind = tuple(f"blocks.{i}." for i in range(at, len(timms.blocks)))
    common = {k: v for k, v in expected.items() if not k.startswith(behind)}
    assert {k: shapes[k] for k in common} == common
    assert len(ours.blocks) == len(timms.blocks)
