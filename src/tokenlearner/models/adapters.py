"""What was added to a host, alone: `save_model(model, path, only="learned")`, `load_adapter`.

A file has the learners and fusers, what was fitted of the host, if anything, and short digests of
the host's weights, so that it goes into no other. It is of any host that `insert` or `connect`
takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..utils.digest import digest_tensors
from ..utils.files import check_downloaded
from ..utils.io import atomic_write
from ..utils.modules import check_plain, clone_structure, uncompiled
from ..utils.validation import find_not_finite, require, shortened
from .connection import (
    ConnectionConfig,
    connect,
    disconnect,
    get_connection,
    keep_connection,
    learners_of,
)
from .features import wrapped_blocks
from .insertion import get_insertion, insert, remove

ADAPTER = "adapter.safetensors"  # in a folder
_KEY = "tokenlearner_adapter"  # in the header: arguments as below, and the host's digests
_INSERT, _CONNECT = "insert", "connect"  # what made the tokens
_NEW, _CHANGED = "learned.", "host."  # before names of tensors
_SHOWN = 16  # hexadecimal digits of a digest

Host = TypeVar("Host", bound=nn.Module)


def adapter_file(path: str | Path) -> Path:
    """Returns the file: the path itself, or the file in that folder."""
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / ADAPTER


def write_adapter(model: nn.Module, path: str | Path, host: nn.Module | None = None) -> Path:
    """Writes what makes a host a model with learned tokens, as `save_model(only="learned")`.

    Args:
        model: As `insert` made it, trained or not.
        path: A file that ends in `.safetensors`, or a folder.
        host: What the tokens were inserted in, as it was before; what differs in the model is
            written too. None is the model's own host as it is now.

    Returns:
        The file.

    Raises:
        ValueError: The model has no learned tokens, is of PEFT, or is not the host with tokens.
    """
    model = uncompiled(model)
    require(
        not hasattr(model, "peft_config"),
        "the model is one of PEFT, whose save_pretrained writes its adapters alone, and learners "
        'with modules_to_save=["learner"]; call that, or merge_and_unload() first',
    )
    arguments = _arguments(model)
    require(
        bool(arguments),
        "the model has no learned tokens that insert or connect made; pass one that they returned",
    )
    new = _new_state(model)
    own = _without_tokens(clone_structure(model)).state_dict()
    theirs = own if host is None else uncompiled(host).state_dict()
    _check_same(own, theirs, "host is not what the tokens were inserted in")
    changed = {
        name: value
        for name, value in own.items()
        if value is not theirs[name] and not _equal(value, theirs[name])
    }
    state = {_NEW + name: value for name, value in new.items()}
    state |= {_CHANGED + name: value for name, value in changed.items()}
    for name, value in state.items():
        check_plain(name, value, "save")
    header = {**arguments, "host": {n: _digest(t) for n, t in theirs.items()}}
    file = adapter_file(path)
    with atomic_write(file) as temporary:
        plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        safetensors.torch.save_file(plain, str(temporary), {_KEY: json.dumps(header)})
    return file


def read_adapter(host: Host, file: Path) -> Host:
    """Inserts the learned tokens of a file into a host, as `load_adapter`.

    Raises:
        ValueError: There is no such file, it is damaged, or of another host. The host is as it was
            then.
    """
    plain = uncompiled(host)
    header, state = _read(file)
    require(
        not _arguments(plain) and not wrapped_blocks(plain),
        "the host has learned tokens; call remove(host) first, or disconnect(host)",
    )
    own = plain.state_dict()
    _check_same(own, header["host"], f"{file} is of another host")
    if other := [name for name, value in own.items() if _digest(value) != header["host"][name]]:
        raise ValueError(
            f"{file} is of a host with other weights: {len(other)} of {len(own)} tensors differ, "
            f"{shortened(other)}; pass the host that it was written for, in its dtype"
        )
    trial = _with_tokens(clone_structure(plain, "meta"), header, file)
    new = {k.removeprefix(_NEW): v for k, v in state.items() if k.startswith(_NEW)}
    changed = {k.removeprefix(_CHANGED): v for k, v in state.items() if k.startswith(_CHANGED)}
    _check_shapes(new, _new_state(trial), file)
    _check_shapes(changed, {name: own[name] for name in changed if name in own}, file)
    if broken := find_not_finite(state):
        raise ValueError(f"{file} has NaN or infinity in {shortened(broken)}; take an earlier one")
    with torch.no_grad():
        for name, value in changed.items():
            own[name].copy_(value)
        with torch.random.fork_rng(devices=[]):  # what is drawn is replaced
            _with_tokens(plain, header, file)
        for name, value in _new_state(plain).items():
            value.copy_(new[name])
    return host


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Returns what tokens were made with, by `insert`, by `connect`, or by both."""
    insertion, connection = get_insertion(model), get_connection(model)
    made = {} if insertion is None else {_INSERT: insertion}
    return made | ({} if connection is None else {_CONNECT: asdict(connection)})


def _without_tokens(model: nn.Module) -> nn.Module:
    """Takes all learned tokens out of a model."""
    made = _arguments(model)
    if _CONNECT in made:
        disconnect(model)
    return remove(model) if _INSERT in made else model


def _with_tokens(model: nn.Module, header: Mapping[str, Any], file: Path) -> nn.Module:
    """Puts tokens into a host as a file says; the processor is left to `connect_processor`."""
    try:
        if _INSERT in header:
            insert(model, **header[_INSERT])
        if _CONNECT in header:
            connection = ConnectionConfig(**header[_CONNECT])
            connect(model, None, **connection.to_kwargs())
            keep_connection(model, connection)
        return model
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not fit this host ({error})") from error


def _new_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of learners and fusers, by their names in the model."""
    parts = set()
    for block in wrapped_blocks(model).values():
        for part in (block.learner, getattr(block, "fuser", None)):
            parts |= {id(t) for t in part.state_dict(keep_vars=True).values()} if part else set()
    for part in learners_of(model) if get_connection(model) else []:
        parts |= {id(t) for t in part.state_dict(keep_vars=True).values()}
    state = model.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if id(value) in parts}


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    require(file.is_file(), f"there is no {file}; save_model(..., only='learned') makes one")
    check_downloaded(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from error
    require(
        text is not None,
        f"{file} holds no learned tokens alone; a whole model is read by tokenlearner.load_model",
    )
    try:
        header = json.loads(text or "")
        made = [header[name] for name in (_INSERT, _CONNECT) if name in header]
        are_dicts = bool(made) and all(isinstance(x, dict) for x in (*made, header["host"]))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); save it again") from error
    require(are_dicts, f"{file} is damaged (no arguments of insert or connect); save it again")
    return header, state


def _check_same(own: Mapping[str, Any], other: Mapping[str, Any], message: str) -> None:
    """Checks that a host has the tensors of another, by their names."""
    if names := sorted(own.keys() ^ other.keys()):
        raise ValueError(f"{message}: only one of both has {shortened(names)}")


def _check_shapes(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    shapes = [{(k, tuple(v.shape)) for k, v in tensors.items()} for tensors in (got, expected)]
    if names := sorted({name for name, _ in shapes[0] ^ shapes[1]}):
        raise ValueError(f"{file} does not fit its own arguments: {shortened(names)}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())


def _digest(value: Tensor) -> str:
    """Returns a short digest of a tensor."""
    return digest_tensors({"": value})[:_SHOWN]
