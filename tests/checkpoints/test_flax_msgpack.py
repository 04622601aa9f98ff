"""flax's msgpack files: its own bytes first, then what is refused, then parameters in trees."""

from __future__ import annotations

import contextlib
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
from tiny import same

from tokenlearner.checkpoints.flax_msgpack import (
    as_tensor,
    find_params,
    flat_tree,
    read_flax,
    write_flax,
)
from tokenlearner.checkpoints.readers import read_weights

Golden = Callable[[str], dict[str, np.ndarray]]

# flax 0.12.8 wrote it
CHECKPOINT = Path(__file__).parents[1] / "golden" / "scenic_checkpoint.msgpack"
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


# --- flax's format -----------------------------------------------------------------------------


def test_every_array_is_the_one_that_flax_wrote(golden: Golden) -> None:
    arrays, weights = golden("scenic_checkpoint"), read_weights(CHECKPOINT)
    assert weights.keys() == arrays.keys()
    for name, array in arrays.items():
        assert weights[name].shape == array.shape
        np.testing.assert_array_equal(weights[name].to(torch.float64).numpy(), array)
    assert weights[BIAS].dtype == torch.bfloat16
    assert weights["embedding/bias"].dtype == torch.float16
    assert weights["embedding/kernel"].dtype == torch.float32
    assert weights["output_projection/bias"].dtype == torch.float64
    kernel = msgpack.unpackb(CHECKPOINT.read_bytes())["params"]["embedding"]["kernel"]
    assert len(kernel["chunks"]) == 5  # so an array in pieces is put together


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


UNWRITABLE: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"a": {1: torch.ones(2)}}, "key 1"),
    "slash": ({"a/b": torch.ones(2)}, "a/b"),
    "leaf": ({"a": {"b": object()}}, "a/b"),
    "strings": ({"a": np.array(["x"])}, "a is of dtype <U1"),
    "float8": ({"a": torch.ones(2).to(torch.float8_e5m2)}, "a is float8_e5m2"),
    "large": ({"a": torch.empty(2**28 + 1, device="meta")}, "at most 1073741824 bytes"),
    "interrupted": ({"a": torch.zeros(2)}, "the disk is full"),
}


@pytest.mark.parametrize(("tree", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_write_that_fails_leaves_the_old_file(
    tree: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_flax(file, {"a": torch.ones(2)})
    before, write_bytes = file.read_bytes(), Path.write_bytes

    def write_half(path: Path, data: bytes) -> None:
        write_bytes(path, data[: len(data) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError if "disk" in message else ValueError, match=message):
        write_flax(file, tree)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


DAMAGED = {
    "another extension": {"a": msgpack.ExtType(7, b"x")},
    "another dtype": {"a": extension([2], "float8_e4m3fn", b"12")},
    "an object": {"a": extension([1], "object", b"12345678")},
    "too few bytes": {"a": extension([3], "float32", b"12345678")},
    "an unknown size": {"a": extension([-1], "float32", b"1234")},
    "a huge shape": {"a": extension([2**62, 4], "float32", b"1234")},
    "no shape": {"a": extension(None, "float32", b"1234")},
    "half an array": {"a": msgpack.ExtType(1, msgpack.packb((3, 4)))},
    "half a number": {"a": msgpack.ExtType(2, msgpack.packb((1, 2, 3)))},
    "a missing piece": {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2},
        "chunks": {"0": extension([1], "float32", b"1234")},
    },
    "no dict": [1, 2],
}


BYTES = {name: msgpack.packb(tree) for name, tree in DAMAGED.items()}
BYTES |= {repr(data): data for data in (b"", b"hello", b"\x80\x04\x95", b"PK\x03\x04")}


@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES)
def test_a_damaged_flax_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=r"file cannot be read as a flax checkpoint \(.+\)"):
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
        position = data.draw(st.integers(0, 1500))
        content[position] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: bytes(content))
        with contextlib.suppress(ValueError):
            assert isinstance(read_flax(CHECKPOINT), dict)


def test_without_msgpack_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[convert\]'"):
        read_flax(CHECKPOINT)
    with pytest.raises(ValueError, match=r"pip install '\.\[convert\]'"):
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
    ("state", "message"),
    [
        ({"opt_state": {"mu": PARAMS}, "global_step": torch.tensor(3)}, "opt_state, global_step"),
        ({"params": {}, "step": 3}, "params, step"),
        ({"params": {"a": 3}, "step": 3}, "params, step"),
        ({"params": torch.ones(2), "step": 3}, "params, step"),
        ({"params": {"params": torch.ones(2)}, "step": 3}, "params, step"),
        ({"optimizer": {"state": PARAMS}, "step": 3}, "optimizer, step"),
        ({"optimizer": None, "step": 3}, "optimizer, step"),
        ({"step": 3, "weights": PARAMS}, "step, weights"),
        (
            {"params": PARAMS, "model_state": {"batch_stats": {"mean": torch.ones(2)}}},
            "batch_stats/mean",
        ),
    ],
    ids=str,
)
def test_a_state_without_parameters_or_with_more_is_refused_with_its_keys(
    state: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_params(state)


@pytest.mark.parametrize(
    ("tree", "key"), [({"a/b": 1, "a": {"b": 2}}, "a/b"), ({"a": {1: 2}}, "key 1 under 'a'")]
)
def test_a_name_that_is_there_twice_or_no_string_is_refused(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        flat_tree(tree)


def test_an_array_becomes_a_tensor_of_its_own() -> None:
    array = np.ones((2, 3), "f4")
    array.flags.writeable = False
    as_tensor(array).zero_()
    assert array.all()
