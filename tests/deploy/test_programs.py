"""Programs of strangers: what torch would execute on reading is refused before torch reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tokenlearner.deploy import load_exported
from tokenlearner.deploy.programs import read_program

Files = dict[str, bytes]
MODEL, WEIGHTS = "archive/models/model.json", "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
MARK = Path("executed")


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


PICKLE = pickle.dumps(Command())
CODE = f"__import__('os').system('touch {MARK}')"


def saved(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        content = json.loads(files[name])
        change(content)
        files[name] = json.dumps(content).encode()

    return apply


def nodes(model: Any) -> list[Any]:
    return model["graph_module"]["graph"]["nodes"]


def add(name: str, content: bytes) -> Callable[[Files], None]:
    return lambda files: files.update({f"archive/{name}": content})


def pickle_a_weight(files: Files) -> None:
    def use(config: Any) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    edit(WEIGHTS, use)(files)
    files["archive/data/weights/weight_0"] = saved(Command())


def constant(prefix: str) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        payload = {"path_name": f"{prefix}_0", "is_param": False, "use_pickle": True}
        config = {"config": {"c": payload | {"tensor_meta": None}}}
        files[CONSTANTS] = json.dumps(config).encode()
        files[f"archive/data/constants/{prefix}_0"] = PICKLE

    return apply


def set_size(model: Any) -> None:
    sizes = next(iter(model["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
    sizes[0] = {"as_expr": {"expr_str": CODE, "hint": None}}


def rename_input(model: Any) -> None:
    text = json.dumps(model).replace('"input"', json.dumps(f"x={CODE}"))
    model.clear()
    model.update(json.loads(text))


ATTACKS: dict[str, Callable[[Files], None]] = {
    "inputs": add("data/sample_inputs/model.pt", saved(Command())),
    "old weights": add("data/weights/model.pt", saved(Command())),
    "weight": pickle_a_weight,
    "tensor constant": constant("tensor"),
    "opaque constant": constant("opaque_obj"),
    "custom object": constant("custom_obj"),
    "library": add("data/aotinductor/model/model.so", b"\x7fELF"),
    "outside": add("../../model.json", b"{}"),
    "size": edit(MODEL, set_size),
    "guards": edit(MODEL, lambda model: model.update(guards_code=[CODE])),
    "function": edit(MODEL, lambda m: nodes(m)[0].update(target="torch.hub.load")),
    "dunder": edit(MODEL, lambda m: nodes(m)[0].update(target="torch.ops.aten.__class__")),
    "file": edit(MODEL, lambda m: nodes(m)[0].update(target="torch.ops.aten.from_file.default")),
    "argument": edit(MODEL, lambda m: nodes(m)[0]["inputs"][0].update(name=f"a={CODE}, b")),
    "name": edit(MODEL, rename_input),
    "depth": lambda files: files.update({MODEL: b"[" * 100_000}),
    "no graph": lambda files: files.update({MODEL: b"[]"}),
    "no model": lambda files: files.pop(MODEL) and None,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    axes = ({0: torch.export.Dim("batch", min=1)},)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    exported = torch.export.export(model, (torch.ones(2, 3),), dynamic_shapes=axes)
    torch.export.save(exported, path)
    return path


def written(files: Files, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def files_of(path: Path) -> Files:
    with zipfile.ZipFile(path) as archive:
        names = {name: f"archive/{name.partition('/')[2]}" for name in archive.namelist()}
        return {new: archive.read(name) for name, new in names.items()}


def test_a_program_is_what_torch_reads(program: Path) -> None:
    x = torch.randn(5, 3)
    expected = torch.export.load(program).module()(x)
    torch.testing.assert_close(read_program(program).module()(x), expected)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_torch_would_execute_is_refused(
    attack: str, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = files_of(program)
    before = dict(files)
    ATTACKS[attack](files)
    assert files != before
    with pytest.raises(ValueError, match=r"x\.pt2"):
        load_exported(written(files, Path("x.pt2")))
    assert not MARK.exists()


def test_a_pickled_weight_would_have_been_executed(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = files_of(program)
    pickle_a_weight(files)
    with suppress(Exception):  # what torch makes of the number that comes back
        torch.export.load(written(files, Path("x.pt2"))).module()(torch.ones(2, 3))
    assert MARK.exists()


def test_compressed_and_doubled_files_are_refused(program: Path, tmp_path: Path) -> None:
    files = files_of(program)
    with pytest.raises(ValueError, match="compressed"):
        read_program(written(files, tmp_path / "a.pt2", zipfile.ZIP_DEFLATED))
    doubled = zipfile.ZipFile(written(files, tmp_path / "b.pt2"), "a")
    with doubled as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MODEL, files[MODEL])
    with pytest.raises(ValueError, match="one name"):
        read_program(tmp_path / "b.pt2")
