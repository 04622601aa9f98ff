"""Damaged and odd files to every reader, drawn by a seed: what is drawn, and how long by a command.

`python tests/fuzzing.py --minutes 60` reads files for an hour, shared out over the families of
readers, each in a process of its own, and keeps what fails in `corpus/`, where the tests read it
again. Allowed are `ValueError` and `OSError`, within `SECONDS` and `BYTES`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnx
import torch
from files import make_image, make_video, png_bomb
from safetensors.torch import save_file
from torch import nn

from tokenlearner import create_model, load_model, save_model
from tokenlearner.checkpoints import read_flax, read_weights, write_flax
from tokenlearner.commands._inputs import InputPipeline
from tokenlearner.commands._runs import run_options
from tokenlearner.commands.app.uploads import UploadLimits, read_upload
from tokenlearner.commands.report.reader import read_source
from tokenlearner.commands.train import train_options
from tokenlearner.data.config import DataConfig
from tokenlearner.data.file_lists import _read_list
from tokenlearner.data.hub_datasets import TarShards, _read_info
from tokenlearner.data.image_folder import ImagePaths, decoded
from tokenlearner.data.token_shards import FORMAT, MANIFEST, read_index, read_manifest
from tokenlearner.data.video_folder import VideoFolderDataset
from tokenlearner.deploy.formats import load_exported, write_program
from tokenlearner.models.serialization import read_config
from tokenlearner.utils.preprocessing import Preprocessing

CORPUS = Path(__file__).parent / "corpus"
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


def _upload(path: Path) -> None:
    half = (0.5,) * 3
    pipeline = InputPipeline((3, 16, 16), Preprocessing(half, half), 4, 0, False, "")
    read_upload(path, pipeline, UploadLimits())


def _run(path: Path) -> None:
    """The options of a run and its metrics, as `eval` and `report` read them."""
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    path.replace(folder / "train.json")
    for name in ("metrics.jsonl", "config.json"):
        os.link(folder / "train.json", folder / name, follow_symlinks=False)
    read_config(folder / "config.json")
    read_source(folder)
    run_options(str(folder))


def _manifest(path: Path) -> None:
    """What `encode` says of tokens, as `train` reads it."""
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    path.replace(folder / MANIFEST)
    read_manifest(folder)


def _index(path: Path) -> None:
    """What `encode` says of the videos in a shard."""
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    (folder / "x.tar").write_bytes(b"x")
    path.replace(folder / "x.json")
    read_index(folder / "x.tar")


FAMILIES: dict[str, dict[str, Callable[[Path], Any]]] = {
    "images": dict.fromkeys(IMAGES, _image),
    "videos": dict.fromkeys(("mp4", "avi"), _video),
    "uploads": dict.fromkeys(("upload.png", "upload.mp4"), _upload),
    "archives": {"tar": _tar},
    "texts": {"csv": _list, "json": _info, "yaml": _recipe, "run.json": _run},
    "tokens": {"manifest.json": _manifest, "index.json": _index},
    "programs": dict.fromkeys(("onnx", "pt2"), load_exported),
    "weights": {
        **dict.fromkeys(("safetensors", "npz", "pt"), read_weights),
        "msgpack": read_flax,
        "model.safetensors": load_model,
    },
}
READERS = {kind: reader for readers in FAMILIES.values() for kind, reader in readers.items()}


def valid_files(folder: Path) -> dict[str, bytes]:
    """A small valid file of every kind."""
    weights = {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)}
    for kind in (*IMAGES, "upload.png"):
        make_image(folder / f"x.{kind}", (24, 18))
    for kind in ("mp4", "upload.mp4"):
        make_video(folder / f"x.{kind}", (16, 16), 4)
    make_video(folder / "x.avi", (16, 16), 4, "mjpeg")
    with tarfile.open(folder / "x.tar", "w") as tar:
        png = (folder / "x.png").read_bytes()
        for name, content in (("0.png", png), ("0.json", b'{"label": 1}'), ("1.tar", png)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (folder / "x.csv").write_text("path,label\nx.png,a\nx.jpg,b\n")
    (folder / "x.yaml").write_text("model: vit_mini_patch4_28\nepochs: 2\nbetas: [0.9, 0.99]\n")
    write_program(nn.Linear(4, 2), torch.ones(2, 3, 4, 4), folder / "x.pt2")
    size = ["n", 3, 4, 4]
    values = [onnx.helper.make_tensor_value_info(name, 1, size) for name in ("images", "y")]
    node = onnx.helper.make_node("Relu", ["images"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "x.onnx")
    info = {"splits": {"train": {"filenames": ["x.tar"], "num_samples": 1, "alt_label": "label"}}}
    (folder / "x.json").write_text(json.dumps(info))
    run = {"data": "folder", "root": "data", "img_size": 28, "crop_pct": 0.9, "mean": [0.5]}
    (folder / "x.run.json").write_text(json.dumps(run | {"tokenlearner": {}, "epoch": 1}))
    split = {"train": {"videos": 1, "shards": 1, "listing": ""}}
    manifest = {"format": FORMAT, "source": {"stride": 2}, "tokens_per_frame": 4, "channels": 8}
    manifest |= {"dtype": "float32", "shard_size": 5, "classes": ["a"], "splits": split}
    (folder / "x.manifest.json").write_text(json.dumps(manifest))
    row = {"video": "a.mp4", "size": 9, "label": 0, "frames": 3, "offset": 512, "error": ""}
    (folder / "x.index.json").write_text(json.dumps({"bytes": 1, "videos": [row]}))
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


def damaged(rng: random.Random, seeds: dict[str, bytes], kind: str) -> bytes:
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
def bounded() -> Iterator[None]:
    """Ends what takes too long, and refuses memory beyond a limit."""

    def stop(*_: object) -> None:
        raise AssertionError(f"takes more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process, whatever runs beside it
    signal.alarm(20 * SECONDS)  # where it waits
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass
class Fed:
    """What became of the files that readers were given."""

    read: int = 0
    refused: int = 0
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")
    failed: list[str] = field(default_factory=list)

    def feed(self, path: Path, kind: str) -> None:
        """Gives one file to the reader of its kind."""
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            with bounded():
                READERS[kind](path)
            self.read += 1
        except (ValueError, OSError):
            self.refused += 1
        except BaseException as error:
            self.failed.append(f"{path.name}: {type(error).__name__}: {str(error)[:200]}")
        self.slowest = max(self.slowest, (time.process_time() - start, kind))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        self.largest = max(self.largest, (grown // 1024, kind))

    def __str__(self) -> str:
        seconds, mib = (f"{value:.3g} ({kind})" for value, kind in (self.slowest, self.largest))
        return (
            f"{self.read + self.refused + len(self.failed)} files: {self.read} read, "
            f"{self.refused} refused, {len(self.failed)} failed; slowest {seconds} s, "
            f"largest growth {mib} MiB"
        )


def draw(rng: random.Random, seeds: dict[str, bytes], kind: str, path: Path) -> None:
    """Writes a damaged file, or makes something else of its name."""
    if rng.random() < 0.1:
        rng.choice(PLACES)(path)
    else:
        path.write_bytes(damaged(rng, seeds, kind))


def clear(folder: Path) -> None:
    """Empties a folder, whatever is in it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def feed_family(family: str, minutes: float, seed: int, folder: Path, out: Any) -> None:
    """Feeds the readers of a family until the time is over; the file that is read is in `now`."""
    warnings.simplefilter("ignore")
    kinds, rng, fed = [*FAMILIES[family]], random.Random(f"{family} {seed}"), Fed()
    now, made = folder / "now", folder / "made"
    for place in (now, made):
        place.mkdir()
    seeds, end = valid_files(made), time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        kind = rng.choice(kinds)
        path, before = now / f"x.{kind}", len(fed.failed)
        draw(rng, seeds, kind, path)
        content = path.read_bytes() if path.is_file() else None
        fed.feed(path, kind)
        if len(fed.failed) > before and content is not None:
            keep(content, kind)
        clear(now)
    out.put(fed)


def keep(content: bytes, kind: str) -> None:
    """Keeps a file that failed."""
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{hashlib.sha256(content).hexdigest()[:12]}.{kind}").write_bytes(content)


def main() -> None:
    """Feeds all families, and says what became of the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="for all families together")
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=[*FAMILIES])
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    failed = False
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            out: Any = multiprocessing.Queue()
            minutes = options.minutes / len(options.families)
            work = (family, minutes, options.seed, Path(folder), out)
            process = multiprocessing.Process(target=feed_family, args=work)
            process.start()
            process.join()
            if process.exitcode:  # as of a library that ends its process
                print(f"{family}: ended with {process.exitcode}", flush=True)
                for path in filter(Path.is_file, Path(folder, "now").glob("x.*")):
                    keep(path.read_bytes(), path.name.removeprefix("x."))
            else:
                fed = out.get()
                print("\n".join([f"{family}: {fed}", *fed.failed]), flush=True)
            failed |= bool(process.exitcode or fed.failed)
    sys.exit(failed)


if __name__ == "__main__":
    main()
