"""What 8 learned tokens do to a small model that trains from scratch: accuracy, cost and time.

Three real data sets, each with and without learned tokens, over several seeds: the bundled images
of clothes; photographs that move, where a third model sees a single frame of each clip; and color
drawings in a folder (`openclipart.py`), which are read from their files and cut out and mirrored
at random. Of images there is the simplest rival too, all positions of a smaller image. Every run
leaves a folder in `--out`; a command that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measured import add_device
from openclipart import CLASSES, load_openclipart
from printed import accuracy_table
from torchvision.transforms.functional import to_pil_image

from tokenlearner import TrainConfig, load_data, load_model, train
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.utils.io import write_json

VIT, VIVIT = "vit_mini_patch4_28", "vivit_mini_patch8x2_32"
TOKENS: dict[str, dict[str, Any]] = {"all": {}, "8 learned, halfway": {"num_tokens": 8, "at": 0.5}}
SMALLER = {  # multiply-adds just below and above those of learned tokens, or like them
    "fashion-mnist-small": (20, 24),
    "openclipart": (48,),
}
MOTION_TOKENS: dict[str, dict[str, Any]] = {
    "all": {},
    "8 learned, halfway": {"num_tokens": 4, "at": 0.5},  # of each of the two slices of time
    "all of one frame": {"frames": 1, "model_kwargs": {"tubelet_size": 1, "num_frames": 1}},
}
RECIPES: dict[str, dict[str, Any]] = {
    "fashion-mnist-small": {"model": VIT},
    "moving-photographs": {
        "model": VIVIT,
        "model_kwargs": {"tubelet_size": 4},
        "img_size": 32,
        "frames": 8,
        "epochs": 8,
    },
    "openclipart": {
        "model": VIT,
        "model_kwargs": {"patch_size": 8},
        "img_size": 64,
        "scale": [0.3, 1.0],
        "hflip": 0.5,
        "epochs": 40,
        "warmup_epochs": 2.0,
        "workers": 0,
    },
}


def recipes(options: Namespace) -> dict[str, dict[str, Any]]:
    """What differs from `TrainConfig` for each data set."""
    found = {name: {"data": name, **RECIPES[name]} for name in options.data}
    if "openclipart" in found:
        root = Path(options.out) / "drawings"
        if not (root / "val").exists():
            write_drawings(Path(options.drawings), root)
        found["openclipart"] |= {"data": "folder", "root": str(root)}
    return found


def tokens_of(name: str) -> dict[str, dict[str, Any]]:
    """What differs between the models of a data set."""
    smaller = {f"all of {size} pixels": {"img_size": size} for size in SMALLER.get(name, ())}
    return MOTION_TOKENS if name == "moving-photographs" else TOKENS | smaller


def write_drawings(source: Path, root: Path, size: int = 96) -> None:
    """Writes the drawings into a folder as `load_data("folder")` wants it."""
    for part, data in zip(("train", "val"), load_openclipart(source, size), strict=True):
        for index, label in enumerate(data.labels.tolist()):
            folder = root / part / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(data.images[index]).save(folder / f"{index:04}.png")


def run(job: tuple[dict[str, Any], int, str]) -> None:
    """Trains one model, unless it is there; what was cut off goes on."""
    recipe, seed, out = job
    train(TrainConfig(**recipe, seed=seed, out=out, resume="auto"))


def row(out: Path, name: str, tokens: str, seeds: list[int]) -> dict[str, Any]:
    """The numbers of all seeds of one model."""
    histories = [
        [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        for metrics in (place(out, name, tokens, seed) / "metrics.jsonl" for seed in seeds)
    ]
    first = place(out, name, tokens, seeds[0])
    config = TrainConfig(**json.loads((first / "train.json").read_text(encoding="utf-8")))
    shape = load_data(config, "test").shape
    return {
        "data": name,
        "tokens": tokens,
        "gmacs": count_macs(load_model(first), torch.zeros(1, *shape)) / 1e9,
        "top1_percent": [history[-1]["test_top1_percent"] for history in histories],
        "seconds_an_epoch": [e["train_seconds"] for history in histories for e in history],
    }


def place(out: Path, name: str, tokens: str, seed: int) -> Path:
    short = {"all": "full", "8 learned, halfway": "tl8", "all of one frame": "frame"}
    return out / f"{name}-{short.get(tokens, tokens.replace(' ', '-'))}-{seed}"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/accuracy", help="folder for the runs")
    parser.add_argument("--data", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--drawings", help="usr/share/openclipart/png, unpacked, for openclipart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the recipes'")
    parser.add_argument("--images", type=int, default=0, help="training images; 0 is all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with a thread each")
    add_device(parser)
    options = parser.parse_args()
    if "openclipart" in options.data and not options.drawings:
        parser.error("openclipart needs --drawings; or leave it out: --data fashion-mnist-small")
    out, found = Path(options.out), recipes(options)
    if options.epochs:
        found = {k: v | {"epochs": options.epochs, "warmup_epochs": 0.5} for k, v in found.items()}
    shared = {"images": options.images, "device": str(options.device)}
    jobs = [
        ({**recipe, **overrides, **shared}, seed, str(place(out, name, tokens, seed)))
        for seed in options.seeds
        for name, recipe in found.items()
        for tokens, overrides in tokens_of(name).items()
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        list(pool.map(run, jobs))
    rows = [row(out, name, tokens, options.seeds) for name in found for tokens in tokens_of(name)]
    command = shlex.join(["python", "benchmarks/accuracy.py", *sys.argv[1:]])
    write_json(out / "results.json", {"command": command, "rows": rows})
    print(command, "", accuracy_table(rows), sep="\n")


if __name__ == "__main__":
    main()
