"""Damaged and odd files to every reader: read, or an error of one kind, in bounded time and memory.

A seed draws the kind of file and the damage. Allowed are `ValueError` and `OSError`. Whole files
are read under any name.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnx
import pytest
import torch
from files import make_image, make_image_folder, make_video, png_bomb
from PIL import Image
from safetensors.torch import save_file
from streams import write_tar
from torch import nn

from tokenlearner import create_model, load_model, save_model
from tokenlearner.checkpoints import read_flax, read_weights, write_flax
from tokenlearner.commands.main import main
from tokenlearner.commands.train import train_options
from tokenlearner.data.config import DataConfig
from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.data.file_lists import _read_list
from tokenlearner.data.hub_datasets import TarShards, _read_info
from tokenlearner.data.image_folder import ImagePaths, decoded
from tokenlearner.data.video_folder import VideoFolderDataset
from tokenlearner.deploy.formats import load_exported, write_program
from tokenlearner.utils.limits import VARIABLE

SECONDS, BYTES = 10, 4 * 2**30
IMAGES = ("png", "jpg", "tiff", "gif", "webp", "bmp")


def _image(path: Path) -> None:
    source = ImagePaths([str(path)])
    decoded(lambda: source.open(0), source.where(0), 3)


def _video(path: Path) -> None:
    config, labels = DataConfig(img_size=16), torch.zeros(1).long()
    VideoFolderDataset("v", "test", (str(path),), labels, ("",), config).load(0)


def _tar(path: Path) -> None:
    for record in TarShards((str(path),), "label").records(0, 1, None):
        if not isinstance(record, ValueError):
            decoded(record.open, record.where, 3)


def _list(path: Path) -> None:
    _read_list(path.parent, path)


def _recipe(path: Path) -> None:
    train_options([str(path)])


def _info(path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    path.replace(folder / "_info.json")
    _read_info(folder, "train")


READERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(IMAGES, _image),
    **dict.fromkeys(("mp4", "avi"), _video),
    "tar": _tar,
    "csv": _list,
    "json": _info,
    "yaml": _recipe,
    **dict.fromkeys(("onnx", "pt2"), load_exported),
    **dict.fromkeys(("safetensors", "npz", "pt"), read_weights),
    "msgpack": read_flax,
    "model.safetensors": load_model,
}


def _seeds(folder: Path) -> dict[str, bytes]:
    """A small valid file of every kind."""
    weights = {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)}
    for kind in IMAGES:
        make_image(folder / f"x.{kind}", (24, 18))
    make_video(folder / "x.mp4", (16, 16), 4)
    make_video(folder / "x.avi", (16, 16), 4, "mjpeg")
    with tarfile.open(folder / "x.tar", "w") as tar:
        png = (folder / "x.png").read_bytes()
        for name, content in (("0.png", png), ("0.json", b'{"label": 1}'), ("1.tar", png)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (folder / "x.csv").write_text("path,label\nx.png,a\nx.jpg,b\n")
    (folder / "x.yaml").write_text("model: vit_mini_patch4_28\nepochs: 2\nbetas: [0.9, 0.99]\n")
    write_program(nn.Linear(4, 2), torch.ones(2, 4), folder / "x.pt2")
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("images", "y")]
    node = onnx.helper.make_node("Relu", ["images"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "x.onnx")
    info = {"splits": {"train": {"filenames": ["x.tar"], "num_samples": 1, "alt_label": "label"}}}
    (folder / "x.json").write_text(json.dumps(info))
    save_file(weights, folder / "x.safetensors")
    torch.save(weights, folder / "x.pt")
    np.savez(folder / "x.npz", **{name: value.numpy() for name, value in weights.items()})
    write_flax(folder / "x.msgpack", {"params": {"a": {"kernel": torch.ones(3, 4)}}})
    tiny = create_model("vit_mini_patch4_28", embed_dim=8, depth=1, num_heads=2)
    save_model(tiny, folder / "x.model.safetensors")
    return {kind: (folder / f"x.{kind}").read_bytes() for kind in READERS}


def _odd(rng: random.Random) -> bytes:
    """Content that is valid in part, and asks for too much."""
    deep = rng.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a")) * rng.choice((10, 2000, 200_000))
    huge = rng.choice((2**31, 2**40, 2**63 - 1))
    header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (huge, huge)
    entry = tarfile.TarInfo(rng.choice(("0.png", "../0.png", "/0.cls", "a" * 200 + ".png")))
    entry.size = rng.choice((0, 2**33, 2**43, 5))
    packed = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([huge], "float32", b"")))})
    return rng.choice(
        (
            b"",
            bytes(rng.choice((1, 7, 512, 10240))),
            deep,
            len(header).to_bytes(8, "little") + header,
            huge.to_bytes(8, "little") + header,
            png_bomb(rng.choice((1, 30000)), rng.choice((60000, 2**31 - 1))),
            entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
            packed,
            b'{"splits": {"train": {"filenames": 3, "num_samples": 1e999}}}',
            b'path,label\n"' + b"x" * 200_000,
            b"path,label\n\x00,\xff\n",
            _links(rng),
            b"a: &a0 [1, 1]\n"
            + b"".join(b"x%d: &a%d [*a%d, *a%d]\n" % (i + 1, i + 1, i, i) for i in range(40)),
            b"model_kwargs: &a {x: *a}",
            b"epochs: 1\nepochs: 2",
            b"epochs: !!python/object/apply:os.system ['true']",
        )
    )


def _links(rng: random.Random) -> bytes:
    """A tar file whose members are links, out of it or to themselves."""
    entry = tarfile.TarInfo("0.png")
    entry.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
    entry.linkname = rng.choice(("/dev/zero", "../../x.png", "0.png", "/etc/passwd"))
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def _packed(rng: random.Random, content: bytes) -> bytes:
    """An archive in an archive, under a name that readers look for."""
    name, file = rng.choice(("0.png", "0.json", "a.npy", "archive/data.pkl", "x.tar")), io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
    else:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        with tarfile.open(fileobj=file, mode=rng.choice(("w", "w:gz"))) as tar:
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _damaged(rng: random.Random, seeds: dict[str, bytes], kind: str) -> bytes:
    """A valid file, cut off, changed, packed, joined with another one, or in place of it."""
    content = bytearray(seeds[kind])
    how = rng.randrange(7)
    if how == 6:
        return _packed(rng, seeds[rng.choice(list(seeds))])
    if how == 0:
        return bytes(content[: rng.randrange(len(content))])
    if how == 1:
        return _odd(rng)
    if how == 2:
        return seeds[rng.choice(list(seeds))]
    if how == 3:
        return seeds[rng.choice(list(seeds))][:64] + bytes(content[64:])
    where = 200 if how == 4 else len(content)  # headers count most
    for _ in range(rng.choice((1, 3, 30))):
        content[rng.randrange(min(where, len(content)))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(content)


PLACES: tuple[Callable[[Path], Any], ...] = (  # what else may be under the name of a file
    os.mkfifo,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to(path.parent),
    lambda path: path.symlink_to("gone"),
    Path.mkdir,
)


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends what takes too long, and refuses memory beyond a limit."""

    def stop(*_: object) -> None:
        raise AssertionError(f"takes more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _feed(folder: Path, count: int, seed: int) -> None:
    """Gives readers `count` files, and prints the slowest and the most memory."""
    rng, seeds, failed = random.Random(seed), _seeds(folder), []
    slowest, largest, outcomes = (0.0, ""), (0, ""), {"read": 0, "refused": 0}
    for number in range(count):
        kind = rng.choice(list(READERS))
        path = folder / f"{number}.{kind}"
        if number % 10 == 0:
            PLACES[number // 10 % len(PLACES)](path)
        else:
            path.write_bytes(_damaged(rng, seeds, kind))
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            with _bounded():
                READERS[kind](path)
            outcomes["read"] += 1
        except (ValueError, OSError):
            outcomes["refused"] += 1
        except BaseException as error:
            failed.append(f"seed {seed}, {path.name}: {type(error).__name__}: {str(error)[:200]}")
        slowest = max(slowest, (time.perf_counter() - start, path.name))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        largest = max(largest, (grown // 1024, path.name))
    print(f"{count} inputs: {outcomes}, slowest {slowest} s, largest growth {largest} MiB")
    assert not failed, f"{len(failed)} of {count}:\n" + "\n".join(failed)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "vit_gigantic_patch14_224", "kwargs": {}},
        {"name": "vit_mini_patch4_28", "kwargs": {"depth": 10**7}},
    ],
    ids=["large", "deep"],
)
def test_a_small_file_that_names_a_huge_model_is_refused_at_once(
    config: dict[str, Any], tmp_path: Path
) -> None:
    header = {"tokenlearner": json.dumps(config | {"insert": None})}
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=header)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"does not fit|depth is"):
        load_model(tmp_path / "x.safetensors")
    assert time.perf_counter() - start < SECONDS


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


@linux
@pytest.mark.filterwarnings("ignore")
def test_readers_refuse_damaged_files(tmp_path: Path) -> None:
    _feed(tmp_path, 120, seed=0)


@linux
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 6))
def test_readers_refuse_many_damaged_files(tmp_path: Path, seed: int) -> None:
    _feed(tmp_path, 400, seed)


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
    seeds, failed = _seeds(tmp_path), []
    cases = [*product((*NAMES, "long"), READERS)]
    for name, kind in cases:
        path = tmp_path / f"{name if name != 'long' else 'x' * (254 - len(kind))}.{kind}"
        path.write_bytes(seeds[kind])
        try:
            with _bounded():
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
