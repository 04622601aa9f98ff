"""Files of weights of every kind: what is read, that nothing is executed, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import same
from torch import Tensor

from tokenlearner import load_model
from tokenlearner.checkpoints.readers import read_weights

CHECKPOINT = Path(__file__).parents[1] / "golden" / "scenic_checkpoint.msgpack"


# --- the other kinds of files ------------------------------------------------------------------

WEIGHTS = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(3).to(torch.bfloat16)}


PARAMETERS = {name: torch.nn.Parameter(value) for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".safetensors", WEIGHTS),
        *((suffix, WEIGHTS) for suffix in (".pth", ".pt", ".bin", ".ckpt", ".PTH")),
        (".pth", {"state_dict": WEIGHTS, "epoch": 3, "scale": torch.ones(1)}),
        (".pth", {"model": WEIGHTS, "epoch": 3}),
        (".pth", {**PARAMETERS, "epoch": 3, "model": "vit"}),
        (".pth", {"net": {f"net.{name}": value for name, value in WEIGHTS.items()}}),
        (".pth", {"state_dict": {"a": torch.ones(1)}, "state_dict_ema": WEIGHTS}),
        (".pth", {f"module.base_encoder.{name}": value for name, value in WEIGHTS.items()}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_tensors_by_name_are_read_and_the_rest_is_left_out(
    suffix: str, content: Any, tmp_path: Path
) -> None:
    file = tmp_path / f"file{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(content, file)
    weights = read_weights(str(file))
    assert same(weights, WEIGHTS)
    assert not any(value.requires_grad for value in weights.values())


def test_the_index_of_several_files_is_read_whole(tmp_path: Path) -> None:
    names = {name: f"model-{i}.safetensors" for i, name in enumerate(WEIGHTS)}
    for name, file in names.items():
        save_file({name: WEIGHTS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert same(read_weights(index), WEIGHTS)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="model-1"):
        read_weights(index)


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1", "<!DOCTYPE html>"])
@pytest.mark.parametrize("read", [read_weights, load_model])
def test_what_comes_in_place_of_a_file_is_named(read: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match="download"):
        read(tmp_path / "model.safetensors")


def test_parts_that_may_each_be_the_weights_are_named(tmp_path: Path) -> None:
    torch.save({"generator": WEIGHTS, "critic": WEIGHTS}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="generator, critic"):
        read_weights(tmp_path / "file.pth")


def test_npz_files_are_read_and_bfloat16_is_known_by_its_two_bytes(tmp_path: Path) -> None:
    value = torch.randn(2, 3).to(torch.bfloat16)
    arrays = {"a/b": np.ones((2, 3), "f4"), "c": np.arange(3, dtype=">i8")}
    np.savez(tmp_path / "file.npz", **arrays, d=value.view(torch.int16).numpy().view("V2"))
    expected = {"a/b": torch.ones(2, 3), "c": torch.arange(3), "d": value}
    assert same(read_weights(tmp_path / "file.npz"), expected)


def test_a_prefix_of_all_names_is_left_out_and_strings_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", **{"params/a": np.ones(2), "params/params/b": np.ones(2)})
    np.savez(tmp_path / "some.npz", **{"params/a": np.ones(2), "b": np.ones(2)})
    assert read_weights(tmp_path / "all.npz").keys() == {"a", "params/b"}
    assert read_weights(tmp_path / "some.npz").keys() == {"params/a", "b"}
    np.savez(tmp_path / "strings.npz", a=np.array(["x"]))
    with pytest.raises(ValueError, match="a is of dtype <U1"):
        read_weights(tmp_path / "strings.npz")


@pytest.mark.parametrize("name", ["checkpoint_1000", "file.msgpack", "checkpoint_0.5"])
def test_any_other_name_is_read_as_flaxs(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CHECKPOINT.read_bytes())
    assert same(read_weights(tmp_path / name), read_weights(CHECKPOINT))


# --- nothing is executed -----------------------------------------------------------------------


class Bomb:
    """Makes the folder `path` when it is unpickled without care."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (self.path,)


def _bomb_in_torch(bomb: Bomb, file: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2), "b": bomb}}, file)


def _bomb_in_pickle(bomb: Bomb, file: Path) -> None:
    file.write_bytes(pickle.dumps({"a": bomb}, protocol=2))


def _bomb_in_numpy(bomb: Bomb, file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, a=np.array([bomb], dtype=object))


BOMBS = [
    (".pth", _bomb_in_torch, "execute"),
    (".ckpt", _bomb_in_torch, "execute"),
    (".bin", _bomb_in_pickle, "execute"),
    (".npz", _bomb_in_numpy, "Object arrays cannot be loaded"),
    (".npz", _bomb_in_pickle, "cannot be read as arrays alone"),
    (".safetensors", _bomb_in_pickle, "no readable safetensors file"),
    ("", _bomb_in_pickle, "cannot be read as a flax checkpoint"),
    (".msgpack", _bomb_in_torch, "more than tensors"),
]


@pytest.mark.parametrize(("suffix", "make", "message"), BOMBS)
def test_code_in_a_file_is_not_executed(
    suffix: str, make: Callable, message: str, tmp_path: Path
) -> None:
    trace, file = tmp_path / "executed", tmp_path / f"file{suffix}"
    make(Bomb(trace), file)
    with pytest.raises(ValueError, match=message):
        read_weights(file)
    assert not trace.exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    _bomb_in_pickle(Bomb(tmp_path / "executed"), tmp_path / "file")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "executed").exists()


def test_a_whole_module_is_refused_with_a_hint(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"GLOBAL torch\.nn\S*Linear.*use a safetensors"):
        read_weights(tmp_path / "file.pth")


# --- what cannot be read -----------------------------------------------------------------------


DAMAGED = (b"", b"hello world", b"PK\x03\x04 and no more", struct.pack("<Q", 2**60) + b"{}")


@pytest.mark.parametrize("data", DAMAGED, ids=repr)
@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ".msgpack", ""])
def test_a_damaged_file_is_refused_by_name(suffix: str, data: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"file{suffix}"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} .*(cut off|damaged|read)"):
        read_weights(file)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert torch.load(tmp_path / "x.pt", weights_only=True)["a"].numel() == 2**20
    with pytest.raises(ValueError, match="compressed"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(2**36),
        torch.zeros(1).as_strided((2**20, 2**20), (0, 0)),
        torch.empty(2**40, device="meta"),
    ],
    ids=["expanded", "strided", "meta"],
)
def test_a_tensor_that_its_file_does_not_hold_is_refused(value: Tensor, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"more than|plain values"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", ["V0", "U0", "S0", "O", "V9999"])
def test_arrays_without_numbers_are_refused_however_many_they_are(
    dtype: str, tmp_path: Path
) -> None:
    text = f"{{'descr': '|{dtype}', 'fortran_order': False, 'shape': ({2**62},)}}\n".encode()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        size = struct.pack("<H", len(text))
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + size + text)
    with pytest.raises(ValueError, match="arrays alone"):
        read_weights(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [{"epoch": 3}, torch.ones(2), [torch.ones(2)], {}], ids=str)
def test_a_file_without_tensors_by_name_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth has no tensors by name"):
        read_weights(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["missing.npz", "folder"])
def test_a_missing_file_or_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"no file .*{name}"):
        read_weights(tmp_path / name)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nest.pth.tar", {"state_dict": WEIGHTS, "epoch": 3}),
        ("ddp.pth", {"state_dict": prefixed("module.")}),
        ("compiled.pth", {"model": prefixed("_orig_mod.")}),
        ("both.pth", {"model": prefixed("module._orig_mod.")}),
        ("lightning.ckpt", {"state_dict": prefixed("model."), "hparams": {}}),
        ("usual.pth", {"model_state_dict": WEIGHTS, "optimizer": {}}),
        ("dino.pth", {"student": {}, "teacher": prefixed("backbone.") | {"head.w": torch.ones(1)}}),
        ("ema", {"state_dict": WEIGHTS, "state_dict_ema": WEIGHTS}),
    ],
)
def test_usual_layouts_of_checkpoints_are_read(name: str, content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert same(weights, WEIGHTS)
