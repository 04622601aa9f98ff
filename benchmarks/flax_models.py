"""TokenLearners and ViTs that run on their tokens in Flax, written from the paper, as a yardstick.

Parameters have the names of scenic's models, so `tokenlearner.convert.to_scenic` fills them. The
equation of the tokens is written down as it stands; XLA is left to fuse it.
Axes: `b` batch, `h w` grid, `n` positions, `k` tokens, `c` channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from torch import Tensor

NORM = {"epsilon": 1e-6}


class Mlp(nn.Module):
    """Two dense layers with the tanh GELU between them."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(self.hidden, name="Dense_0")(x))
        return nn.Dense(self.out, name="Dense_1")(x)


class LearnerV1(nn.Module):
    """Four 3 x 3 convolutions and a sigmoid, `b n c -> b k c`; the sum over positions."""

    num_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, c = x.shape
        side = round(n**0.5)
        maps = nn.LayerNorm(**NORM, name="LayerNorm_0")(x).reshape(b, side, side, c)
        for i in range(4):
            maps = nn.gelu(maps) if i else maps
            maps = nn.Conv(self.num_tokens, (3, 3), use_bias=False, name=f"Conv_{i}")(maps)
        gates = nn.sigmoid(maps).reshape(b, n, self.num_tokens).transpose(0, 2, 1)
        return (gates[..., None] * x[:, None]).sum(2)


class LearnerV11(nn.Module):
    """An MLP and a softmax over positions, `b n c -> b k c`."""

    num_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.LayerNorm(**NORM, name="LayerNorm_0")(x)
        logits = Mlp(64, self.num_tokens, name="token_masking")(normal)
        maps = nn.softmax(logits.transpose(0, 2, 1), axis=-1)
        return jnp.einsum("bkn,bnc->bkc", maps, x)


class LearnerGrouped(nn.Module):
    """Grouped 1 x 1 convolutions and a softmax over positions, `b n c -> b k c`."""

    num_tokens: int
    num_groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(name: str, features: int, groups: int) -> nn.Conv:
            return nn.Conv(features, (1,), use_bias=False, feature_group_count=groups, name=name)

        c, g = x.shape[-1], self.num_groups
        hidden = conv("Conv_0", c, g)(nn.LayerNorm(**NORM, name="LayerNorm_0")(x))
        logits = conv("Conv_1", self.num_tokens, 1)(hidden)
        maps = nn.softmax(logits.transpose(0, 2, 1), axis=-1)
        return jnp.einsum("bkn,bnc->bkc", maps, conv("Conv_2", c, g)(x))


LEARNERS = {
    "v1": (LearnerV1, "TokenLearnerModule_0"),
    "v11": (LearnerV11, "TokenLearnerModuleV11_0"),
}


class Block(nn.Module):
    """A transformer block with norms in front."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attend = nn.MultiHeadDotProductAttention(
            self.num_heads, name="MultiHeadDotProductAttention_0"
        )
        x = x + attend(nn.LayerNorm(**NORM, name="LayerNorm_0")(x))
        normal = nn.LayerNorm(**NORM, name="LayerNorm_1")(x)
        return x + Mlp(4 * x.shape[-1], x.shape[-1], name="MlpBlock_0")(normal)


class PositionEmbedding(nn.Module):
    """Adds what is learned for each position."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.param("pos_embedding", nn.initializers.zeros, (1, *x.shape[1:]))


class Encoder(nn.Module):
    """Blocks, in front of one of which tokens may be learned."""

    depth: int
    num_heads: int
    at: int | None
    num_tokens: int
    learner: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = PositionEmbedding(name="posembed_input")(x)
        for i in range(self.depth):
            if i == self.at and self.num_tokens:
                make, name = LEARNERS[self.learner]
                x = make(self.num_tokens, name=name)(x)
            x = Block(self.num_heads, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(**NORM, name="encoder_norm")(x)


class FlaxViT(nn.Module):
    """A ViT that pools its tokens by their mean: images `b h w 3` to logits."""

    depth: int
    embed_dim: int
    num_heads: int
    num_classes: int = 1000
    patch_size: int = 16
    at: int | None = None
    num_tokens: int = 0
    learner: str = "v1"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.embed_dim, patch, strides=patch, padding="VALID", name="embedding")(x)
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        arguments = (self.depth, self.num_heads, self.at, self.num_tokens, self.learner)
        x = Encoder(*arguments, name="Transformer")(x)
        return nn.Dense(self.num_classes, name="output_projection")(x.mean(1))


def filled(params: dict[str, np.ndarray]) -> Any:
    """Variables of a Flax model from scenic's names with slashes."""
    leaves = {tuple(name.split("/")): jnp.asarray(value) for name, value in params.items()}
    return {"params": unflatten_dict(leaves)}


def in_jax(x: Tensor) -> jax.Array:
    """The same numbers on the same kind of device; `SystemExit` where jax has none."""
    if x.is_cuda and jax.default_backend() != "gpu":
        raise SystemExit(
            f"jax {jax.__version__} sees no GPU here; install jax[cuda12], or leave what runs in "
            "jax out with --forms"
        )
    return jnp.asarray(x.detach().contiguous().cpu().numpy())


def in_torch(x: jax.Array) -> Tensor:
    """The same numbers on the CPU."""
    return torch.from_numpy(np.array(x))
