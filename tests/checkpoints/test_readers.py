"""Files of weights: flax's own bytes first, then the other kinds, then what is refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tokenlearner.checkpoints.readers import (
    as_tensor,
    find_params,
    flat_tree,
    read_flax,
    read_weights,
    write_flax,
)

Golden = Callable[[str], dict[str, np.ndarray]]

CHECKPOINT = (
    Path(__file__).parents[1] / "golden" / "scenic_checkpoint.msgpack"
)  # flax 0.12.8 wrote it
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]
BIAS = "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"


def write(path: Path, tree: object) -> Path:
    path.write_bytes(msgpack.packb(tree))
    return path


def extension(shape: object, name: object, data: object, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, name, data)))


def same(left: Any, right: Any) -> bool:
    """Equal in type, dtype, shape and every bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and left.equal(right)
    return type(left) is type(right) and left == right


# --- flax's format -----------------------------------------------------------------------------


def test_every_array_is_the_one_that_flax_wrote(golden: Golden) -> None:
    arrays, weights = golden("scenic_checkpoint"), read_weights(CHECKPOINT)
    assert weights.keys() == arrays.keys()
    for name, array in arrays.items():
        assert weights[name].shape == array.shape
        np.testing.assert_array_equal(weights[name].to(torch.float64).numpy(), array)


def test_dtypes_are_those_that_flax_wrote() -> None:
    weights = read_weights(CHECKPOINT)
    assert weights[BIAS].dtype == torch.bfloat16
    assert weights["embedding/bias"].dtype == torch.float16
    assert weights["embedding/kernel"].dtype == torch.float32
    assert weights["output_projection/bias"].dtype == torch.float64


def test_an_array_in_pieces_is_put_together() -> None:
    tree = msgpack.unpackb(CHECKPOINT.read_bytes())
    assert len(tree["params"]["embedding"]["kernel"]["chunks"]) == 5
    assert read_flax(CHECKPOINT)["params"]["embedding"]["kernel"].shape == (8, 8, 3, 6)


def test_the_rest_of_the_state_is_read_too() -> None:
    state = read_flax(CHECKPOINT)
    assert state["global_step"] == 3
    assert state["model_state"] == {}
    assert state["opt_state"]["0"]["nu"] is None
    assert same(state["opt_state"]["0"]["count"], torch.tensor(3, dtype=torch.int32))
    assert same(state["rng"], torch.tensor([0, 7], dtype=torch.uint32))
    assert same(state["metadata"]["flags"], torch.tensor([True, False]))
    assert same(state["metadata"]["empty"], torch.zeros(0, 3))
    assert state["metadata"]["z"] == 1 + 2j
    assert same(state["params"]["temperature"], torch.tensor(0.5))


def test_arrays_that_were_read_can_be_written_to() -> None:
    read_weights(CHECKPOINT)[BIAS].zero_()


def test_arrays_are_packed_as_flax_packs_them(tmp_path: Path) -> None:
    params = read_flax(CHECKPOINT)["params"]
    del params["embedding"]  # flax had cut it into pieces
    params["temperature"] = np.float32(0.5)
    write_flax(tmp_path / "back", params)
    expected = msgpack.unpackb(CHECKPOINT.read_bytes())["params"]
    del expected["embedding"]
    assert msgpack.unpackb((tmp_path / "back").read_bytes()) == expected


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read_again(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    array = (10 * torch.randn(shape)).abs().to(dtype)
    tree = {"a": {"b": array, "c": {}}, "step": 3, "rate": 0.5, "on": True, "name": "é", "no": None}
    write_flax(tmp_path / "file", tree)
    assert same(read_flax(tmp_path / "file"), tree)


def test_tensors_in_any_layout_and_numpys_arrays_are_written(tmp_path: Path) -> None:
    turned = torch.randn(3, 4, requires_grad=True).T
    array = np.arange(6.0).reshape(2, 3).T
    every_second = torch.randn(8)[::2]
    tree = {"a": turned, "b": array, "c": array.astype(">f4"), "d": every_second}
    write_flax(tmp_path / "file", tree)
    tree = read_flax(tmp_path / "file")
    assert same(tree["a"], turned.detach())
    assert same(tree["b"], torch.from_numpy(array.copy()))
    assert same(tree["c"], torch.from_numpy(array.astype("f4")))
    assert same(tree["d"], every_second)


def test_a_write_that_is_interrupted_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_flax(file, {"a": torch.ones(2)})
    before, write_bytes = file.read_bytes(), Path.write_bytes

    def write_half(path: Path, data: bytes) -> None:
        write_bytes(path, data[: len(data) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="the disk is full"):
        write_flax(file, {"a": torch.zeros(2)})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_tree_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_flax(file, {"a": torch.ones(2)})
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"the tree/b is a list, expected an array"):
        write_flax(file, {"a": torch.ones(2), "b": [1]})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {1: torch.ones(2)}}, r"the key 1 under the tree/a is no string"),
        ({"a/b": torch.ones(2)}, r"the key 'a/b' .* nested dicts, .*convert\.nest"),
        ({"a": {"b": object()}}, r"the tree/a/b is a object, expected an array"),
        ({"a": np.array(["x"])}, r"the tree/a is of dtype <U1, expected one of float16"),
        ({"a": torch.ones(2).to(torch.float8_e5m2)}, r"the tree/a is float8_e5m2 .* expected one"),
        (
            {"a": torch.empty(2**28 + 1, device="meta")},
            r"the tree/a is .* at most 1073741824 bytes",
        ),
    ],
    ids=["key", "slash", "leaf", "strings", "float8", "large"],
)
def test_what_flax_has_no_form_for_is_not_written(
    tree: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_flax(tmp_path / "file", tree)
    assert not (tmp_path / "file").exists()


DAMAGED = {
    "another extension": {"a": msgpack.ExtType(7, b"x")},
    "another dtype": {"a": extension([2], "float8_e4m3fn", b"12")},
    "an object": {"a": extension([1], "object", b"12345678")},
    "too few bytes": {"a": extension([3], "float32", b"12345678")},
    "too many bytes": {"a": extension([1], "float32", b"12345678")},
    "an unknown size": {"a": extension([-1], "float32", b"1234")},
    "a huge shape": {"a": extension([2**62, 4], "float32", b"1234")},
    "no shape": {"a": extension(None, "float32", b"1234")},
    "no array": {"a": msgpack.ExtType(1, b"\xc0")},
    "half an array": {"a": msgpack.ExtType(1, msgpack.packb((3, 4)))},
    "half a number": {"a": msgpack.ExtType(2, msgpack.packb((1, 2, 3)))},
    "no pieces": {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}}},
    "a missing piece": {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2},
        "chunks": {"0": extension([1], "float32", b"1234")},
    },
    "no dict": [1, 2],
    "a number": 3,
}


@pytest.mark.parametrize("tree", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_flax_file_is_refused(tree: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file cannot be read as a flax checkpoint \(.+\)"):
        read_flax(write(tmp_path / "file", tree))


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x04\x95", b"PK\x03\x04"], ids=repr)
def test_a_file_of_another_kind_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match="cut off, damaged or of another kind"):
        read_flax(tmp_path / "file")


@given(st.floats(0, 1, exclude_max=True))
def test_a_flax_file_that_is_cut_off_is_refused(share: float) -> None:
    data = CHECKPOINT.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: data[: int(share * len(data))])
        with pytest.raises(ValueError, match="cut off"):
            read_flax(CHECKPOINT)


@given(st.data())
def test_flax_files_with_changed_bytes_are_refused_or_read_as_trees(data: st.DataObject) -> None:
    content = bytearray(CHECKPOINT.read_bytes())
    for _ in range(3):
        place = data.draw(st.integers(0, 1500))
        content[place] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: bytes(content))
        with contextlib.suppress(ValueError):
            assert isinstance(read_flax(CHECKPOINT), dict)


def test_without_msgpack_the_way_to_install_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenlearner\[convert\]'"):
        read_flax(CHECKPOINT)
    with pytest.raises(ValueError, match=r"pip install 'tokenlearner\[convert\]'"):
        write_flax(tmp_path / "file", {})


# --- parameters in a train state ---------------------------------------------------------------

PARAMS = {"embedding": {"kernel": torch.ones(2, 3)}, "encoder_norm": {"scale": torch.ones(3)}}
STATES = {
    "new": {"params": PARAMS, "opt_state": {"mu": PARAMS}, "global_step": 3, "model_state": {}},
    "nested": {"params": {"params": PARAMS}, "global_step": 3},
    "old": {"optimizer": {"target": PARAMS, "state": {"step": 3}}, "model_state": None},
    "old and nested": {"optimizer": {"target": {"params": PARAMS}}, "rng": torch.ones(2)},
    "bare": PARAMS,
    "empty model state": {"params": PARAMS, "model_state": {"batch_stats": {}}},
    "numpy": {"params": {k: {n: v.numpy() for n, v in d.items()} for k, d in PARAMS.items()}},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_parameters_are_found_wherever_scenic_puts_them(state: dict[str, Any]) -> None:
    found = find_params(state)
    assert same(found, {"embedding/kernel": torch.ones(2, 3), "encoder_norm/scale": torch.ones(3)})


@pytest.mark.parametrize(
    "state",
    [
        {"opt_state": {"mu": PARAMS}, "global_step": torch.tensor(3)},
        {"params": {}, "step": 3},
        {"params": {"a": 3}, "step": 3},
        {"params": torch.ones(2), "step": 3},
        {"params": {"params": torch.ones(2)}, "step": 3},
        {"optimizer": {"state": PARAMS}, "step": 3},
        {"optimizer": None, "step": 3},
        {"step": 3, "weights": PARAMS},
    ],
    ids=str,
)
def test_a_state_without_parameters_is_refused_with_its_keys(state: dict[str, Any]) -> None:
    keys = ", ".join(state)
    with pytest.raises(
        ValueError, match=f"no parameters found under the keys {keys}; expected 'pa"
    ):
        find_params(state)


def test_a_model_with_a_state_of_its_own_is_refused() -> None:
    state = {"params": PARAMS, "model_state": {"batch_stats": {"mean": torch.ones(2)}}}
    with pytest.raises(ValueError, match="besides its parameters, such as batch_stats/mean"):
        find_params(state)


def test_a_flat_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="the name a/b comes twice"):
        flat_tree({"a/b": 1, "a": {"b": 2}})


def test_a_key_that_is_no_string_is_refused() -> None:
    with pytest.raises(ValueError, match="the key 1 under 'a' is no string"):
        flat_tree({"a": {1: 2}})


# --- the other kinds of files ------------------------------------------------------------------

WEIGHTS = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(3).to(torch.bfloat16)}


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "file.safetensors")
    assert same(read_weights(tmp_path / "file.safetensors"), WEIGHTS)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".PTH"])
def test_pytorchs_files_are_read(suffix: str, tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / f"file{suffix}")
    assert same(read_weights(str(tmp_path / f"file{suffix}")), WEIGHTS)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_one_level_down_are_found(key: str, tmp_path: Path) -> None:
    torch.save({key: WEIGHTS, "epoch": 3, "scale": torch.ones(1)}, tmp_path / "file.pth")
    assert same(read_weights(tmp_path / "file.pth"), WEIGHTS)


def test_what_is_no_tensor_is_left_out_and_parameters_become_tensors(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(value) for name, value in WEIGHTS.items()}
    torch.save({**parameters, "epoch": 3, "model": "vit"}, tmp_path / "file.pth")
    weights = read_weights(tmp_path / "file.pth")
    assert same(weights, WEIGHTS)
    assert not any(value.requires_grad for value in weights.values())


def test_npz_files_are_read(tmp_path: Path) -> None:
    arrays = {"a/b": np.ones((2, 3), "f4"), "c": np.arange(3, dtype=">i8")}
    np.savez(tmp_path / "file.npz", **arrays)
    expected = {"a/b": torch.ones(2, 3), "c": torch.arange(3)}
    assert same(read_weights(tmp_path / "file.npz"), expected)


def test_bfloat16_in_npz_files_is_known_by_its_two_bytes(tmp_path: Path) -> None:
    value = torch.randn(2, 3).to(torch.bfloat16)
    np.savez(tmp_path / "file.npz", a=value.view(torch.int16).numpy().view("V2"))
    assert same(read_weights(tmp_path / "file.npz"), {"a": value})


def test_a_prefix_of_all_names_is_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", **{"params/a": np.ones(2), "params/params/b": np.ones(2)})
    np.savez(tmp_path / "some.npz", **{"params/a": np.ones(2), "b": np.ones(2)})
    assert read_weights(tmp_path / "all.npz").keys() == {"a", "params/b"}
    assert read_weights(tmp_path / "some.npz").keys() == {"params/a", "b"}


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
    (".pth", _bomb_in_torch, "execute code"),
    (".ckpt", _bomb_in_torch, "execute code"),
    (".bin", _bomb_in_pickle, "execute code"),
    (".npz", _bomb_in_numpy, "Object arrays cannot be loaded"),
    (".npz", _bomb_in_pickle, "cannot be read as arrays alone"),
    (".safetensors", _bomb_in_pickle, "no readable safetensors file"),
    ("", _bomb_in_pickle, "cannot be read as a flax checkpoint"),
    (".msgpack", _bomb_in_torch, "cannot be read as a flax checkpoint"),
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


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"Ask for a safetensors .* GLOBAL torch\.nn\S*Linear"):
        read_weights(tmp_path / "file.pth")


# --- what cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello world", b"PK\x03\x04 and no more"], ids=repr)
@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ".msgpack", ""])
def test_a_damaged_file_is_refused_by_name(suffix: str, data: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"file{suffix}"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} .*(cut off|damaged|refused|read)"):
        read_weights(file)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_a_file_that_is_cut_off_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"file{suffix}"
    weights = {name: value.float() for name, value in WEIGHTS.items()}
    if suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in weights.items()})
    else:
        (torch.save if suffix == ".pth" else save_file)(weights, file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"file\.\w+ .*(cut off|read)"):
        read_weights(file)


def test_a_safetensors_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        read_weights(tmp_path / "file.safetensors")


@pytest.mark.parametrize("content", [{"epoch": 3}, torch.ones(2), [torch.ones(2)], {}], ids=str)
def test_a_file_without_tensors_by_name_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth has no tensors by name"):
        read_weights(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["missing.npz", "folder"])
def test_a_missing_file_or_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"there is no file .*{name}; pass a file of weights"):
        read_weights(tmp_path / name)


def test_npz_files_of_strings_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", a=np.array(["x"]))
    with pytest.raises(ValueError, match="a is of dtype <U1, expected one of float16"):
        read_weights(tmp_path / "file.npz")


def test_an_array_becomes_a_tensor_of_its_own() -> None:
    array = np.ones((2, 3), "f4")
    array.flags.writeable = False
    as_tensor(array).zero_()
    assert array.all()
