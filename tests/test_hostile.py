"""Damaged and odd files to every reader: read, or an error of one kind, in bounded time and memory.

A seed draws the kind of file and the damage. Allowed are `ValueError` and `OSError`.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from files import make_image, make_video, png_bomb
from PIL import Image
from safetensors.torch import save_file
from streams import write_tar

from tokenlearner import create_model, load_model, save_model
from tokenlearner.checkpoints import read_flax, read_weights, write_flax
from tokenlearner.data.config import DataConfig
from tokenlearner.data.dataset import UnreadableFile
from tokenlearner.data.file_lists import _read_list
from tokenlearner.data.hub_datasets import TarShards, _read_info
from tokenlearner.data.image_folder import ImagePaths, decoded
from tokenlearner.data.video_folder import VideoFolderDataset
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


def _info(path: Path) -> None:
    path.replace(path.with_name("_info.json"))
    _read_info(path.parent, "train")


READERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(IMAGES, _image),
    **dict.fromkeys(("mp4", "avi"), _video),
    "tar": _tar,
    "csv": _list,
    "json": _info,
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
        )
    )


def _damaged(rng: random.Random, seeds: dict[str, bytes], kind: str) -> bytes:
    """A valid file, cut off, changed, joined with another one, or in place of it."""
    content = bytearray(seeds[kind])
    how = rng.randrange(6)
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
        path.write_bytes(_damaged(rng, seeds, kind))
        if number % 50 == 0:
            path.unlink()
            os.mkfifo(path)
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
@pytest.mark.parametrize("seed", range(1, 4))
def test_readers_refuse_many_damaged_files(tmp_path: Path, seed: int) -> None:
    _feed(tmp_path, 400, seed)
