"""The wrapped blocks: equal to scenic's encoders first, then what passes and what does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from tiny import drawn
from torch import Tensor, nn

from tokenlearner import TokenFuser, TokenLearner, TokenLearnerV11
from tokenlearner.checkpoints.scenic import load_scenic, to_scenic
from tokenlearner.layers.blocks import (
    FusedBlock,
    PositionArgs,
    PositionFreeBlock,
    ReducedBlock,
)
from tokenlearner.models.vit import TokenLearnerViT
from tokenlearner.models.vivit import ViViT

Golden = Callable[[str], dict[str, np.ndarray]]

C, K, N = 24, 4, 16
v1 = partial(TokenLearner, use_sum_pooling=True, norm_eps=1e-6, approximate="tanh")
LEARNERS: dict[str, Callable[[int, int], nn.Module]] = {"v1": v1, "v11": TokenLearnerV11}
each_learner = pytest.mark.parametrize("learner", LEARNERS)
each_wrapper = pytest.mark.parametrize("fuse", [False, True], ids=["reduced", "fused"])


def timm_block() -> Block:
    gelu = partial(nn.GELU, approximate="tanh")
    norm = partial(LayerNorm, eps=1e-6)
    return Block(C, num_heads=3, mlp_ratio=2, qkv_bias=True, norm_layer=norm, act_layer=gelu)


def wrap(block: nn.Module, learner: str = "v11", fuse: bool = False, **place: Any) -> ReducedBlock:
    new = LEARNERS[learner](C, K)
    if fuse:
        return FusedBlock(block, new, TokenFuser(C, K), **place)
    return ReducedBlock(block, new, **place)


randomized = partial(drawn, std=0.3)


class Recorder(nn.Module):
    """A block that changes nothing and tells what it was called with."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = (x, args, kwargs)
        return x


# --- equal to scenic's encoders ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "fuser_", "video_", "fuser_video_"])
@each_learner
def test_outputs_and_input_gradients_are_those_of_scenics_encoder(
    kind: str, learner: str, golden: Golden
) -> None:
    arrays, fuse = golden(f"encoder_{kind}{learner}"), "fuser" in kind
    kwargs: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": C, "num_heads": 3}
    kwargs |= {"depth": 4, "mlp_ratio": 2, "num_tokens": K, "at": 2, "learner": learner}
    clip = {"num_frames": 3, "sampling": "uniform"}
    model: Any = ViViT(**kwargs, **clip, fuse=fuse) if "video" in kind else None
    model = model or TokenLearnerViT(**kwargs, fuse=fuse)
    ends = {k: v for k, v in to_scenic(model).items() if not k.startswith("Transformer/")}
    params = {k.replace("params/", "Transformer/"): v for k, v in arrays.items() if "params/" in k}
    load_scenic(model, ends | params)  # strict: no parameter is left over on either side
    x = torch.from_numpy(arrays["input0"]).requires_grad_()
    out = model.norm(model.blocks(x + model.pos_embed))
    (out * torch.from_numpy(arrays["cotangent"])).sum().backward()
    np.testing.assert_allclose(out.detach(), arrays["output"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x.grad, arrays["grad_input"], rtol=1e-5, atol=1e-5)


# --- prefix tokens -----------------------------------------------------------------------------


@each_wrapper
@each_learner
@torch.no_grad()
def test_the_block_sees_prefix_tokens_unchanged_in_front_of_learned_ones(
    learner: str, fuse: bool
) -> None:
    wrapped = wrap(Recorder(), learner, fuse, num_prefix_tokens=2, grid=(3, 5))
    x = torch.randn(2, 2 + 15, C)
    wrapped(x)
    seen = wrapped.block.seen[0]
    assert torch.equal(seen[:, :2], x[:, :2])
    assert torch.equal(seen[:, 2:], wrapped.learner(x[:, 2:], (3, 5)))


@each_wrapper
@torch.no_grad()
def test_the_learner_does_not_see_prefix_tokens(fuse: bool) -> None:
    wrapped = randomized(wrap(Recorder(), fuse=fuse, num_prefix_tokens=2))
    x = torch.randn(2, 2 + N, C)
    other = torch.cat([torch.randn(2, 2, C), x[:, 2:]], dim=1)
    assert torch.equal(wrapped(x)[:, 2:], wrapped(other)[:, 2:])


@torch.no_grad()
def test_a_fused_block_takes_prefix_tokens_from_the_block() -> None:
    wrapped = wrap(timm_block().eval(), fuse=True, num_prefix_tokens=2)
    x = torch.randn(2, 2 + N, C)
    seen = torch.cat([x[:, :2], wrapped.learner(x[:, 2:])], dim=1)
    assert torch.equal(wrapped(x)[:, :2], wrapped.block(seen)[:, :2])


# --- the fuser ---------------------------------------------------------------------------------


@each_learner
@torch.no_grad()
def test_a_fused_block_gives_positions_plus_what_the_fuser_makes_of_the_blocks_tokens(
    learner: str,
) -> None:
    wrapped = randomized(wrap(timm_block(), learner, fuse=True, grid=(4, 4)))
    x = torch.randn(2, N, C)
    spread = wrapped.fuser(wrapped.block(wrapped.learner(x, (4, 4))), x)
    assert spread.abs().max() > 0.1
    torch.testing.assert_close(wrapped(x), x + spread)


# --- frames ------------------------------------------------------------------------------------


@each_wrapper
@each_learner
@torch.no_grad()
def test_frames_in_one_sequence_give_what_a_loop_over_frames_gives(
    learner: str, fuse: bool
) -> None:
    place: dict[str, Any] = {"num_prefix_tokens": 1, "grid": (3, 5)}
    folded = randomized(wrap(Recorder(), learner, fuse, frames=3, **place))
    single = copy.deepcopy(folded)
    single.frames = 1
    prefix, clip = torch.randn(2, 1, C), torch.randn(2, 3, 15, C)
    looped = [single(torch.cat([prefix, frame], dim=1))[:, 1:] for frame in clip.unbind(1)]
    out = folded(torch.cat([prefix, clip.flatten(1, 2)], dim=1))
    torch.testing.assert_close(out, torch.cat([prefix, *looped], dim=1), rtol=1e-5, atol=1e-5)


@each_wrapper
def test_frames_that_do_not_divide_the_sequence_are_refused(fuse: bool) -> None:
    wrapped = wrap(Recorder(), fuse=fuse, num_prefix_tokens=1, frames=3)
    with pytest.raises(ValueError, match=r"16 tokens .* 3 frames"):
        wrapped(torch.randn(2, 1 + 16, C))


@each_wrapper
@each_learner
@pytest.mark.parametrize("frames", [1, 3])
def test_an_empty_batch_comes_back_empty(frames: int, learner: str, fuse: bool) -> None:
    place: dict[str, Any] = {"num_prefix_tokens": 1, "frames": frames, "grid": (4, 4)}
    out = wrap(timm_block(), learner, fuse, **place)(torch.randn(0, 1 + frames * N, C))
    assert out.shape == (0, 1 + frames * (N if fuse else K), C)


# --- arguments ---------------------------------------------------------------------------------


@each_wrapper
def test_further_arguments_reach_the_block(fuse: bool) -> None:
    wrapped = wrap(Recorder(), fuse=fuse)
    wrapped(torch.randn(1, N, C), "rope", attn_mask=None, is_causal=False, scale=2)
    assert wrapped.block.seen[1:] == (
        ("rope",),
        {"attn_mask": None, "is_causal": False, "scale": 2},
    )


class Positioned(nn.Module):
    """A block that takes positions and masks, and returns its tokens in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.table = nn.Parameter(torch.ones(3))
        self.attn.missing = None

    def forward(
        self, x: Tensor, rope: Any = None, mask: Any = None, head_mask: Any = None
    ) -> tuple[Tensor, str]:
        self.seen = {"rope": rope, "mask": mask, "head_mask": head_mask, "table": self.attn.table}
        return x, "weights"


POSITION_ARGS = PositionArgs(arguments=("rope",), parameters=("attn.table",))
WRAPPERS: dict[str, Callable[[nn.Module], PositionFreeBlock]] = {
    "unplaced": lambda block: PositionFreeBlock(block, POSITION_ARGS),
    "reduced": lambda block: wrap(block, position_args=POSITION_ARGS),
    "fused": lambda block: wrap(block, fuse=True, position_args=POSITION_ARGS),
}
every_wrapper = pytest.mark.parametrize("kind", WRAPPERS)


@every_wrapper
def test_what_belongs_to_positions_is_left_out_and_the_rest_passes(kind: str) -> None:
    wrapped, rope, heads = WRAPPERS[kind](Positioned()), torch.ones(1), torch.ones(2)
    seen = {"rope": None, "mask": None, "head_mask": heads, "table": None}
    for args, named in (((), {"rope": rope, "head_mask": heads}), ((rope, None, heads), {})):
        wrapped(torch.randn(1, N, C), *args, **named)
        assert wrapped.block.seen == seen


@every_wrapper
def test_a_mask_is_refused_by_its_name_and_in_its_place(kind: str) -> None:
    wrapped, x, mask = WRAPPERS[kind](Positioned()), torch.randn(1, N, C), torch.ones(N, N)
    for args, named in (((), {"mask": mask}), ((None, mask), {})):
        with pytest.raises(ValueError, match=r"attention mask .* without mask"):
            wrapped(x, *args, **named)
    for named in ({"attn_mask": mask}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attention mask"):
            wrap(timm_block(), fuse=kind == "fused")(x, **named)


def test_the_rest_of_what_a_block_returns_is_passed_on() -> None:
    x = torch.randn(1, N, C)
    tokens, weights = wrap(Positioned())(x)
    assert (tokens.shape, weights) == ((1, K, C), "weights")
    fused = randomized(wrap(Positioned(), fuse=True))
    positions, weights = fused(x)
    torch.testing.assert_close(positions, x + fused.fuser(fused.learner(x), x))
    assert weights == "weights"


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else mask @ x


class MaskingHost(nn.Module):
    """Makes a mask where it is exported, as transformers' hosts do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = wrap(Masked(), position_args=PositionArgs(exported=("mask",)))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]) if torch.compiler.is_exporting() else None
        return self.block(x, mask)


@pytest.mark.parametrize("strict", [False, True])
def test_while_it_is_exported_a_mask_that_the_host_made_is_left_out(strict: bool) -> None:
    host, x = MaskingHost(), torch.randn(2, N, C)
    program = torch.export.export(host, (x,), strict=strict).module()
    torch.testing.assert_close(program(x), host(x))
    with pytest.raises(ValueError, match="without mask"):
        host.block(x, torch.ones(N, N))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_prefix_tokens", -1), ("num_prefix_tokens", True), ("frames", 0), ("frames", 1.0)],
)
def test_counts_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        wrap(Recorder(), **{argument: value})


# --- the grid ----------------------------------------------------------------------------------


class Patches(nn.Module):
    """Stands for a host's patch embedding: has a parameter, and knows the grid."""

    def __init__(self, grid_size: tuple[int, int]):
        super().__init__()
        self.grid_size = grid_size
        self.weight = nn.Parameter(torch.ones(3))


@torch.no_grad()
def test_the_grid_is_asked_of_its_module_at_every_call() -> None:
    patches, x = Patches((2, 8)), torch.randn(2, N, C)
    wrapped = wrap(Recorder(), "v1", grid=patches)
    for grid in [(2, 8), (4, 4)]:
        patches.grid_size = grid
        assert torch.equal(wrapped(x), wrapped.learner(x, grid))


def test_a_grid_that_does_not_fit_is_refused_by_v1_alone() -> None:
    x = torch.randn(1, N, C)
    assert wrap(Recorder(), "v11", grid=(3, 3))(x).shape == (1, K, C)
    with pytest.raises(ValueError, match="16 positions do not fit a 3 x 3 grid"):
        wrap(Recorder(), "v1", grid=(3, 3))(x)


@each_wrapper
@torch.no_grad()
def test_a_wrapped_block_on_the_chosen_device_gives_what_it_gives_on_the_cpu(
    fuse: bool, device: torch.device
) -> None:
    block, x = randomized(wrap(timm_block(), fuse=fuse)).double(), torch.randn(2, N, C).double()
    expected = block(x)
    torch.testing.assert_close(block.to(device)(x.to(device)).cpu(), expected)
