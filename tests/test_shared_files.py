"""Files that are made to be shared name no folder, user or machine of where they were made."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from files import make_image
from running import TINY
from streams import png

from tokenlearner import TrainConfig, create_model, export, save_model, train
from tokenlearner.commands.maps import MapsConfig, run_maps
from tokenlearner.commands.report.render import write_report

MARKER, MACHINE, USER = "name-of-the-folder", "name-of-the-machine", "name-of-the-user"
FOR_RESUMING = {"train.json", "checkpoint.pt"}  # which have absolute paths, so that runs go on


def images(root: Path) -> Path:
    for split in ("train", "test"):
        for i in range(8):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(30 * i))
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands write, in a folder with a marker in its path."""
    folder = tmp_path_factory.mktemp("x") / MARKER
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: MACHINE)
        patch.setenv("USER", USER)
        write_all(folder)
    return folder


def write_all(folder: Path) -> None:
    torch.manual_seed(0)
    save_model(
        create_model("vit_mini_patch4_28", num_classes=2, img_size=28, in_chans=3, **TINY),
        folder / "host",
    )
    options: dict[str, Any] = {"insert": 2, "at": 1, "calibrate": 4, "teacher": "host"}
    options |= {"data": "folder", "root": str(images(folder / "data")), "img_size": 28}
    options |= {"epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu"}
    run = folder / "run"
    config = TrainConfig(
        out=str(run), model=str(folder / "host"), trackers=["tensorboard"], **options
    )
    model = train(config).model.eval()
    write_report(run)
    for name in ("model.onnx", "model.pt2"):
        export(model, folder / name, torch.randn(2, 3, 28, 28), rounds=2)
    source = make_image(folder / "image.png")
    run_maps(MapsConfig(str(run), str(source), str(folder / "maps"), device="cpu"))


@pytest.mark.slow
def test_nothing_that_is_shared_names_a_folder_or_the_machine(shared: Path) -> None:
    written = [path for path in shared.rglob("*") if path.is_file() and "data" not in path.parts]
    kinds = {path.suffix for path in written}
    assert {".html", ".json", ".md", ".onnx", ".pt2", ".png", ".yml"} <= kinds
    for path in written:
        if path.name not in FOR_RESUMING:
            content = path.read_bytes()
            for name in (MARKER, MACHINE, USER):
                assert name.encode() not in content, (path, name)
