"""Programs of torch.export: `read_program(path)` checks what a file holds before torch reads it.

torch unpickles the inputs, weights and constants of a `.pt2` file, evaluates its texts of sizes and
guards as Python, puts its names into code that it compiles, and calls whatever function of torch a
node names. So the file is opened as a zip, all that is not plain data of known form is refused, and
torch gets a copy of what was checked.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..utils.files import read_torch
from ..utils.validation import require, shortened

_MODEL, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_CONFIG = re.compile(r"data/(weights|constants)/model_\1_config\.json")
_DATA = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_ABOUT = re.compile(r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/[\w.]+")

_NAME = re.compile(r"[\w.+:\-]*")  # of a node, an argument, a weight: nothing that ends it in code
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|torchao|quantized_decomposed|export)\.(?!from_file)\w+(\.\w+)?"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge)"
    r"|math\.(floor|ceil|trunc)|torch\.sym_(max|min|not|int|float|ite)"
)
_EXPRESSION = re.compile(
    r"(\b(Symbol|Integer|Add|Mul|Mod|FloorDiv|CleanDiv|Max|Min|Eq|Ne|Lt|Le|Gt|Ge"
    r"|positive|nonnegative|integer|True|False|[suz]{1,2}\d{1,6}|\d{1,12})\b"
    r"|[ (),'=<>+-]|\*(?!\*))*"
)
_SPEC = re.compile(r'"type": (null|"builtins\.(tuple|list|dict)"|"collections\.OrderedDict")')


def read_program(path: Path, extra_files: dict[str, Any] | None = None) -> Any:
    """Reads a program of `torch.export.save`, and runs nothing of it.

    Run, it still is a program: it computes with torch's operators whatever it says, for as long and
    in as much memory as it says.

    Args:
        path: The file.
        extra_files: As in `torch.export.load`.

    Raises:
        ValueError: The file holds something else than plain data of a program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            checked = _checked(archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"it is cut off or no program of torch.export ({error})") from error
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in checked.items():
            archive.writestr(f"archive/{name}", content)
    del checked
    copy.seek(0)
    return torch.export.load(copy, extra_files=extra_files)


def _checked(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Returns the files of an archive by their names in it, once all of them are plain data."""
    entries = archive.infolist()
    plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    require(plain, "its files are compressed, as torch's are not")
    names = [entry.filename.partition("/")[2] for entry in entries]
    require(len({*names}) == len(names), "two of its files have one name")
    known = (_MODEL, _INPUTS)
    kinds = (_CONFIG, _DATA, _ABOUT)
    others = [n for n in names if n not in known and not any(k.fullmatch(n) for k in kinds)]
    require(not others, f"it holds {shortened(others)}, which is no plain data of a program")
    require(_MODEL in names, f"it holds no {_MODEL}")
    files = {name: archive.read(entry) for name, entry in zip(names, entries, strict=True)}
    if files.get(_INPUTS):
        _check_pickle(_INPUTS, files[_INPUTS])
    for name in filter(_CONFIG.fullmatch, names):
        _check_payloads(name, files)
    files[_MODEL] = json.dumps(_checked_graph(_read_json(_MODEL, files[_MODEL]))).encode()
    return files


def _check_payloads(config: str, files: dict[str, bytes]) -> None:
    """Checks that a list of weights or constants names tensors of the archive alone."""
    folder = config.rpartition("/")[0]
    for name, payload in _read_json(config, files[config])["config"].items():
        file = f"{folder}/{payload['path_name']}"
        require(bool(_DATA.fullmatch(file)) and file in files, f"{name} is {file}, no tensor of it")
        if payload["use_pickle"]:  # a quantized weight
            _check_pickle(name, files[file])


def _check_pickle(name: str, content: bytes) -> None:
    """Checks that torch unpickles tensors of known classes and nothing else."""
    with suppress(ImportError):
        import torchao  # noqa: F401  # names the classes of its weights to torch
    try:
        read_torch(io.BytesIO(content))
    except Exception as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise ValueError(
            f"{name} is no tensor, and reading it would execute code ({reason or error!r})"
        ) from error


def _read_json(name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} in it is no JSON ({error!r})") from error


def _checked_graph(graph: Any) -> Any:
    """Returns a graph without notes on its nodes, once all of its texts are of known form."""
    for holder, key, value in _items(graph):
        if key == "metadata":
            holder[key] = {}  # where a node came from
        elif key in ("guards_code", "as_custom_obj", "as_script_object"):
            require(not value, f"it has {key}, which torch would execute")
        elif isinstance(value, str):
            _check_text(key, value)
    return graph


def _items(tree: Any, name: str = "") -> Iterator[tuple[Any, str, Any]]:
    """Yields what is in a tree: the holder, the name that a value has there, and the value."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        inner = key if isinstance(key, str) else name
        if isinstance(key, str):
            require(bool(_NAME.fullmatch(key)), f"{key[:80]!r} in it is no name")
        yield tree, inner, value
        if isinstance(value, dict | list) and inner != "metadata":
            yield from _items(value, inner)


def _check_text(key: str, text: str) -> None:
    if key == "as_string":  # an argument, which stays a text
        return
    if key in ("in_spec", "out_spec"):
        known = text.count('"type"') == len(_SPEC.findall(text))
    elif key in ("target", "as_operator"):
        known = bool(_TARGET.fullmatch(text)) and "__" not in text
    else:
        known = bool((_EXPRESSION if key == "expr_str" else _NAME).fullmatch(text))
    require(known, f"its {key} {text[:80]!r} is not one of a model's")
