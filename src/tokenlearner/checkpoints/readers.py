"""Weights from a file, as tensors by name; nothing in a file is ever executed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.files import check_downloaded, read_json, read_torch
from ..utils.limits import check_unpacked
from ..utils.validation import require, shortened
from .flax_msgpack import as_tensor, check_file, find_params, read_flax, without_params

_MAX_RATIO = 100  # of a file's tensors to its size; trained weights shrink by a third
# Under these training scripts keep the weights, averages first, as timm reads them; and in front of
# these wrappers put their names.
_NESTS = ("state_dict_ema", "model_ema", "ema", "params_ema", "ema_state_dict")
_NESTS += ("state_dict", "model", "model_state_dict", "module", "teacher", "student")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "base_encoder.", "backbone.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights in a file, without executing anything that the file brings.

    Args:
        path: A `.safetensors`, `.npz`, `.pth`, `.pt`, `.bin` or `.ckpt` file, or the
            `.index.json` of several; any other, such as scenic's `checkpoint_1000`, is read as
            flax's msgpack, and of it only the parameters. Of a training's file it is the moving
            average of the weights, where there is one.

    Returns:
        Tensors on the CPU by name, with the dtypes of the file. What stands in front of all names
        is left out: `params/`, and `module.`, `_orig_mod.`, `model.`, ... of wrappers.
        Names beside those of a `backbone.` are left out.

    Raises:
        ValueError: There is no such file, it is damaged or of another kind, it has no tensors, or
            reading it would execute code.
    """
    path = check_file(path)
    check_downloaded(path)
    read = _READERS.get(path.suffix.lower()) or (_read_torch if _is_torch(path) else None)
    weights = read(path) if read else find_params(read_flax(path))
    _check_held(path, weights)
    if not weights:
        raise ValueError(f"{path} has no tensors by name; pass a file of weights")
    return _without_wrappers(without_params(weights))


def _is_torch(path: Path) -> bool:
    """Returns whether a file is a zip, as torch writes one, whatever its name ends in."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes away what wrappers of a model put in front of its names, one after the other."""
    for prefix in _WRAPPERS:
        inside = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        if inside and (len(inside) == len(weights) or prefix == "backbone."):
            return _without_wrappers(inside)
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            unpacked = sum(entry.file_size for entry in arrays.zip.infolist())
            check_unpacked("its arrays have", unpacked, least=_MAX_RATIO * path.stat().st_size)
            return {name: as_tensor(arrays[name], name) for name in arrays.files}
    except Exception as error:  # pickled objects and damage of any kind
        message = f"{path} cannot be read as arrays alone ({error}); write it with numpy.savez"
        raise ValueError(message) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = read_torch(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors ({_reason(error)}), and reading that would execute "
            "code; use a safetensors file, or save model.state_dict() alone where it was made"
        ) from error
    except Exception as error:  # torch raises almost any kind on damaged files
        message = f"{path} is cut off or no PyTorch file of weights ({_reason(error)})"
        raise ValueError(message) from error
    content = content if isinstance(content, Mapping) else {}
    parts = {key: found for key, part in content.items() if (found := _tensors(part))}
    if key := next((key for key in _NESTS if key in parts), None):
        return parts[key]
    if (weights := _tensors(content)) or not parts:
        return weights
    if len(parts) > 1:
        found = shortened([str(key) for key in parts])
        raise ValueError(f"{path} has tensors in each of {found}; save one of them alone")
    return next(iter(parts.values()))


def _tensors(content: Any) -> dict[str, Tensor]:
    pairs = content.items() if isinstance(content, Mapping) else ()
    return {str(name): value.detach() for name, value in pairs if isinstance(value, Tensor)}


def _check_held(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Checks that a file holds its tensors, whose values may be one value again and again."""
    odd = [n for n, w in weights.items() if w.layout != torch.strided or w.device.type != "cpu"]
    require(not odd, f"{path} has {shortened(odd)} without plain values; save dense tensors")
    size = sum(w.nbytes for w in weights.values())
    check_unpacked(f"{path} has tensors of", size, least=_MAX_RATIO * path.stat().st_size)


def _read_index(path: Path) -> dict[str, Tensor]:
    """Reads the files that an index of several, as Hugging Face writes it, lists."""
    try:
        files = read_json(path)["weight_map"]
        names = sorted({Path(name).name for name in files.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of files of weights ({error!r})") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        require(name.endswith((".safetensors", ".bin")), f"{path} lists {name}, no file of weights")
        file = check_file(path.with_name(name))
        weights |= _READERS[file.suffix](file)
    require(weights.keys() == files.keys(), f"{path} does not list what is in its files")
    return weights


_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".json": _read_index,
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), _read_torch),
}


def _reason(error: Exception) -> str:
    """Returns torch's reason, without its advice to execute the file."""
    if match := re.search(r"(GLOBAL|operand) \S+", str(error)):
        return match[0]
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
