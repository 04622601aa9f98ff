"""The TokenLearners in Keras 3, written from the paper, as a yardstick: functional models.

Layers have the last part of the names that scenic's parameters have, so that
`tokenlearner.convert.to_scenic` fills them. The backend is jax, whose compiler fuses what the
equations name. Axes: `b` batch, `h w` grid, `n` positions, `k` tokens, `c` channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # before keras is loaded

import jax
import keras
import numpy as np
from keras import layers, ops

GELU = partial(keras.activations.gelu, approximate=True)
GROUPS = 8


def keras_learner(name: str, axes: tuple[int, int, int], num_tokens: int) -> keras.Model:
    """Builds a learner for frames of `h w c`: `b h w c -> b k c`.

    Args:
        name: `V1`, `V1.1 grouped` or `V1.1 MLP`.
        axes: Height, width and channels.
        num_tokens: Tokens to learn.
    """
    x = keras.Input(axes)
    normal = layers.LayerNormalization(epsilon=1e-6, name="LayerNorm_0")(x)
    maps, values = MAPS[name](normal, x, num_tokens)
    flat = layers.Reshape((-1, num_tokens))(maps)
    values = layers.Reshape((-1, axes[-1]))(values)
    if name == "V1":
        gates = ops.expand_dims(ops.sigmoid(flat), 3)  # b n k 1
        return keras.Model(x, ops.sum(gates * ops.expand_dims(values, 2), axis=1))
    return keras.Model(x, ops.einsum("bnk,bnc->bkc", ops.softmax(flat, axis=1), values))


def _convolutions(normal: Any, x: Any, num_tokens: int) -> tuple[Any, Any]:
    for i in range(4):
        gelu = GELU if i < 3 else None
        normal = layers.Conv2D(
            num_tokens, 3, padding="same", use_bias=False, activation=gelu, name=f"Conv_{i}"
        )(normal)
    return normal, x


def _grouped(normal: Any, x: Any, num_tokens: int) -> tuple[Any, Any]:
    c = x.shape[-1]
    hidden = layers.Conv2D(c, 1, groups=GROUPS, use_bias=False, name="Conv_0")(normal)
    maps = layers.Conv2D(num_tokens, 1, use_bias=False, name="Conv_1")(hidden)
    return maps, layers.Conv2D(c, 1, groups=GROUPS, use_bias=False, name="Conv_2")(x)


def _mlp(normal: Any, x: Any, num_tokens: int) -> tuple[Any, Any]:
    hidden = layers.Dense(64, activation=GELU, name="Dense_0")(normal)
    return layers.Dense(num_tokens, name="Dense_1")(hidden), x


MAPS: dict[str, Callable[[Any, Any, int], tuple[Any, Any]]] = {
    "V1": _convolutions,
    "V1.1 grouped": _grouped,
    "V1.1 MLP": _mlp,
}


def pure_keras(
    model: keras.Model, params: Mapping[str, np.ndarray]
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """A function of weights and frames, and the weights, from scenic's names."""
    if keras.backend.backend() != "jax":
        raise SystemExit(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax")
    found: dict[str, list[np.ndarray]] = {}
    for name, value in params.items():  # scale and kernel come before bias
        found.setdefault(name.split("/")[-2], []).append(value)
    for name, values in found.items():
        model.get_layer(name).set_weights(values)
    fixed = [variable.value for variable in model.non_trainable_variables]
    weights = [variable.value for variable in model.trainable_variables]
    return lambda weights, x: model.stateless_call(weights, fixed, x)[0], weights
