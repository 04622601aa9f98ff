"""Damaged and odd files to every reader: read, or an error of one kind, in bounded time and memory.

What is drawn is in `fuzzing.py`. Whole files are read under any name.
"""

from __future__ import annotations

import json
import os
import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import make_image_folder
from fuzzing import CORPUS, READERS, SECONDS, Fed, bounded, draw, valid_files
from PIL import Image
from safetensors.torch import save_file
from streams import write_tar

from tokenlearner import load_model
from tokenlearner.checkpoints import read_weights
from tokenlearner.commands.main import main
from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.data.hub_datasets import TarShards
from tokenlearner.data.image_folder import decoded
from tokenlearner.models import serialization
from tokenlearner.utils.limits import VARIABLE


@pytest.mark.parametrize(
    "config",
    [
        {"name": "vit_gigantic_patch14_224", "kwargs": {}},
        {"name": "vit_mini_patch4_28", "kwargs": {"depth": 10**7}},
        {"name": "convnext_tiny", "kwargs": {"depths": [10**9, 1, 1, 1]}},
        {"name": "resnet18", "kwargs": {"layers": [10**9, 1, 1, 1]}},
        {"name": "cait_xxs24_224", "kwargs": {"depth_token_only": 10**7}},
        {"name": "maxvit_tiny_tf_224", "kwargs": {"img_size": 22400}},
    ],
    ids=lambda config: config["name"],
)
def test_a_small_file_that_names_a_huge_model_is_refused_at_once(
    config: dict[str, Any], tmp_path: Path
) -> None:
    header = {"tokenlearner": json.dumps(config | {"insert": None})}
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=header)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"does not fit|depths? is|layers is|modules|size"):
        load_model(tmp_path / "x.safetensors")
    assert time.perf_counter() - start < SECONDS


def test_a_model_that_takes_long_to_build_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialization, "_MOST_SECONDS", 0.05)
    config = {"name": "maxvit_tiny_tf_224", "kwargs": {"img_size": 512}, "insert": None}
    header = {"tokenlearner": json.dumps(config)}
    save_file({f"{i}": torch.ones(1) for i in range(40)}, tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=r"more than 0\.05 s to build"):
        load_model(tmp_path / "x.safetensors")


def read_limited(what: str, folder: Path) -> None:
    """Reads what unpacks to about a MiB."""
    if what == "archive":
        np.savez_compressed(folder / "x.npz", a=np.zeros(2**18, np.float32))
        read_weights(folder / "x.npz")
    elif what == "image":
        image = Image.new("L", (512, 512))
        image.save(folder / "x.png")
        decoded(lambda: Image.open(folder / "x.png"), "x.png", 1)
    else:
        path = write_tar(folder / "x.tar", [("0.png", bytes(2**20)), ("0.cls", b"0")])
        [record] = TarShards((str(path),)).records(0, 1, None)
        if isinstance(record, UnreadableFile):
            raise record


@pytest.mark.parametrize("what", ["archive", "image", "member of a tar file"])
def test_what_unpacks_to_too_much_is_refused_unless_the_limit_is_raised(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv(VARIABLE, "0.0005")
    with pytest.raises(ValueError, match=VARIABLE):
        read_limited(what, tmp_path)
    monkeypatch.setenv(VARIABLE, "0.01")
    read_limited(what, tmp_path)
    monkeypatch.setenv(VARIABLE, "much")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'much'"):
        read_limited(what, tmp_path)


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits as Linux has them")


def feed(folder: Path, count: int, seed: int) -> Fed:
    """Gives readers so many files."""
    rng, seeds, fed = random.Random(seed), valid_files(folder), Fed()
    for number in range(count):
        kind = rng.choice([*READERS])
        path = folder / f"{number}.{kind}"
        draw(rng, seeds, kind, path)
        fed.feed(path, kind)
    print(f"seed {seed}, {fed}")
    assert not fed.failed, f"{fed}:\n" + "\n".join(fed.failed)
    return fed


@linux
@pytest.mark.filterwarnings("ignore")
def test_readers_refuse_damaged_files(tmp_path: Path) -> None:
    fed = feed(tmp_path, 120, seed=0)
    assert fed.read > 0
    assert fed.refused > 0


@linux
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 6))
def test_readers_refuse_many_damaged_files(tmp_path: Path, seed: int) -> None:
    feed(tmp_path, 400, seed)


@linux
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_what_once_failed_does_not_again(name: str, tmp_path: Path) -> None:
    fed, path = Fed(), tmp_path / name
    path.write_bytes((CORPUS / name).read_bytes())
    fed.feed(path, name.partition(".")[2])
    assert not fed.failed
    assert fed.slowest[0] < SECONDS


NAMES = (
    *("a\nb", "\x1b]0;x\x07", "\x1b[31m", "$x$ \\frac{", "\u202egnp", "[red][", "%s%d{0}", "{x"),
    *(
        "-rf",
        "=1+1",
        " a ",
        "a'b\"",
        "a|b,c;d",
        "<b>&amp;",
        "#",
        "\\",
        "\udcff\udcfe",
        "\u0301",
        "😀:x:",
    ),
)


@linux
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_read_whatever_its_name_is(tmp_path: Path) -> None:
    seeds, failed = valid_files(tmp_path), []
    cases = [*product((*NAMES, "long"), READERS)]
    for name, kind in cases:
        path = tmp_path / f"{name if name != 'long' else 'x' * (254 - len(kind))}.{kind}"
        path.write_bytes(seeds[kind])
        try:
            with bounded():
                READERS[kind](path)
        except Exception as error:
            if not (
                "\udcff" in name and isinstance(error, ValueError)
            ):  # some libraries want UTF-8
                failed.append(f"{name!a}.{kind}: {error!a}"[:300])
    print(f"{len(cases)} inputs")
    assert not failed, "\n".join(failed)


@linux
@pytest.mark.slow
def test_commands_take_folders_whose_names_are_odd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*NAMES[::3], "x" * 255]
    make_image_folder(tmp_path / "data", names)
    for folder in (tmp_path / "data" / "val").iterdir():
        name = os.fsencode(folder.name)[:251] + b".png"
        (folder / "0.png").rename(folder / os.fsdecode(name))
    run, data = str(tmp_path / "run"), str(tmp_path / "data")
    train = ["--data=folder", f"--root={data}", f"--out={run}", "--epochs=1", "--img_size=28"]
    main(["train", *train, "--in_chans=1", "--batch_size=4", "--model=vit_mini_patch4_tl8at3_28"])
    main(["eval", run])
    main(["predict", run, f"{data}/val", f"--out={tmp_path}/labels.csv"])
    main(["maps", run, f"{data}/val", f"{tmp_path}/maps", "--limit=40"])
    assert len([*(tmp_path / "maps").glob("*.png")]) == len(names)
    out = capsys.readouterr()
    assert "\x1b" not in out.out + out.err
    assert len((tmp_path / "labels.csv").read_text().splitlines()) > len(names)
