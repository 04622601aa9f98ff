"""flax's msgpack files and the trees in them, without jax or flax: what scenic trains into.

Source of the format: google/flax `flax/serialization.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.imports import require_package
from ..utils.io import atomic_write

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's msgpack extension types
_CHUNKED = "__msgpack_chunked_array__"  # marks an array that was cut into chunks
_MOST_BYTES = 2**30  # of one array; flax cuts larger ones
_NAMES = (
    "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "bool complex64 complex128"
)
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES.split()}
_TRAINING = ("optimizer", "opt_state", "model_state", "global_step", "step", "rng")


def read_flax(path: str | Path) -> dict[str, Any]:
    """Reads a file of flax's msgpack format, such as a whole train state of scenic.

    Returns:
        Nested dicts. Arrays and numpy's scalars are tensors; other leaves are plain Python.

    Raises:
        ValueError: The file is missing, damaged or of another kind, or msgpack is not installed.
    """
    path, msgpack = check_file(path), _msgpack()
    try:
        tree = _join_chunks(
            msgpack.unpackb(path.read_bytes(), ext_hook=_unpack_extension, raw=False)
        )
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, expected a dict")
    except Exception as error:  # a damaged file can fail at any step
        raise ValueError(
            f"{path} cannot be read as a flax checkpoint ({error}); it is cut off, damaged or of "
            "another kind: copy it again, or give it the suffix of its kind, such as .safetensors"
        ) from error
    return tree


def write_flax(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as a file that `flax.serialization.msgpack_restore` reads.

    Args:
        path: The file; it is written whole or not at all.
        tree: Tensors, numpy arrays, numbers, strings and None in dicts with string keys.

    Raises:
        ValueError: A key or a leaf has no form in the file, an array is above 1 GiB, or msgpack is
            not installed.
    """
    msgpack = _msgpack()
    packed = msgpack.packb(_pack_tree(tree, "the tree"), strict_types=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(packed)


def find_params(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """Finds a model's parameters in what `read_flax` returns, by names such as `a/b/kernel`.

    Args:
        tree: A train state of scenic with `params`, an older one with `optimizer/target`, or the
            parameters alone. The optimizer's state, steps and random keys are passed over.

    Raises:
        ValueError: There are no parameters, they are not all arrays, or the model has a state
            besides them.
    """
    flat = flat_tree(_parameters(tree))
    if not flat or not all(isinstance(value, Tensor | np.ndarray) for value in flat.values()):
        raise ValueError(
            f"no parameters found under the keys {', '.join(map(str, tree))}; expected 'params', "
            "'optimizer/target', or nothing but nested dicts of arrays"
        )
    if state := flat_tree(tree.get("model_state") or {}):
        raise ValueError(
            f"the model has a state besides its parameters, such as {next(iter(state))}; no model "
            "here has one, so it cannot be converted"
        )
    return {name: as_tensor(value, name) for name, value in flat.items()}


def flat_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turns nested dicts into one, with names such as `a/b/kernel`; empty dicts leave no trace.

    Raises:
        ValueError: A key is no string, or a name is there twice.
    """
    flat: dict[str, Any] = {}
    for name, value in _pairs(tree, ""):
        if name in flat:
            raise ValueError(f"the name {name} is there twice, nested and with slashes; keep one")
        flat[name] = value
    return flat


def without_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Removes a `params/` that is in front of all names."""
    prefix = "params/" if all(name.startswith("params/") for name in flat) else ""
    return {name.removeprefix(prefix): value for name, value in flat.items()}


def as_tensor(value: Any, name: str = "the array") -> Tensor:
    """Returns a tensor as it is, and a copy of anything that numpy takes for an array.

    Raises:
        ValueError: torch has no such dtype.
    """
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    is_bfloat16 = array.dtype.name == "bfloat16" or array.dtype == np.dtype("V2")  # in npz files
    if not is_bfloat16 and array.dtype.name not in _DTYPES:
        raise ValueError(f"{name} is of dtype {array.dtype}, expected one of {_NAMES}; convert it")
    array = np.array(array, order="C")  # torch warns of arrays that cannot be written to
    if is_bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def check_file(path: str | Path) -> Path:
    """Returns the path of a file that is there."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path}; pass a file of weights, such as checkpoint_100")
    return path


def _parameters(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what is where scenic keeps parameters; an empty dict for a state without them."""
    optimizer = tree.get("optimizer")
    params = tree.get("params", optimizer.get("target") if isinstance(optimizer, Mapping) else None)
    if params is None:
        params = {} if any(key in tree for key in _TRAINING) else tree
    inner = params.get("params", params) if isinstance(params, Mapping) else {}
    return inner if isinstance(inner, Mapping) else {}


def _pairs(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} under {name or 'the tree'!r} is no string")
        yield from _pairs(value, f"{name}/{key}" if name else key)


def _msgpack() -> Any:
    return require_package("msgpack", "convert", "flax's format")


def _unpack_extension(code: int, packed: bytes) -> Any:
    """Returns the value of an extension type."""
    if code in (_ARRAY, _SCALAR):
        shape, name, data = _msgpack().unpackb(packed, raw=True)
        return _to_tensor(shape, name.decode(errors="replace"), data)
    if code == _COMPLEX:
        return complex(*_msgpack().unpackb(packed))
    raise ValueError(f"it holds the extension type {code}, unknown to flax")


def _to_tensor(shape: list[int], name: str, data: bytes) -> Tensor:
    """Makes an array of its shape, the name of its dtype and its bytes in row-major order."""
    if name not in _DTYPES or len(data) != math.prod(shape) * _DTYPES[name].itemsize:
        raise ValueError(f"it holds {len(data)} bytes for {shape} of {name}; known are {_NAMES}")
    flat = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
    return flat.view(_DTYPES[name]).reshape(shape)


def _join_chunks(tree: Any) -> Any:
    """Returns the tree with arrays that flax cut into chunks as one array each."""
    if not isinstance(tree, dict):
        return tree
    if _CHUNKED not in tree:
        return {key: _join_chunks(value) for key, value in tree.items()}
    shape, chunks = ([tree[k][str(i)] for i in range(len(tree[k]))] for k in ("shape", "chunks"))
    return torch.cat(chunks).reshape(shape)


def _pack_tree(tree: Any, name: str) -> Any:
    """Returns the tree with arrays as extension types."""
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str) or "/" in key:
                raise ValueError(
                    f"the key {key!r} under {name} is no string without a slash; pass nested "
                    "dicts, which tokenlearner.convert.nest makes of flat names"
                )
        return {key: _pack_tree(value, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, Tensor | np.ndarray | np.generic):
        return _pack_array(tree, name)
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise ValueError(f"{name} is a {type(tree).__name__}, expected an array, a number or a string")


def _pack_array(value: Tensor | np.ndarray | np.generic, name: str) -> Any:
    tensor = as_tensor(value, name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or tensor.nbytes > _MOST_BYTES:
        limit = f"one of {_NAMES} and at most {_MOST_BYTES} bytes; convert or split it"
        raise ValueError(f"{name} is {dtype} of {tensor.nbytes} bytes, expected {limit}")
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    packed = _msgpack().packb((tuple(tensor.shape), dtype, data), use_bin_type=True)
    return _msgpack().ExtType(_SCALAR if isinstance(value, np.generic) else _ARRAY, packed)
