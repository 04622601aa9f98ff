"""Small runs for the tests that start processes; as a script it is what each of them does.

`torchrun --nproc-per-node 2 tests/running.py JOB FOLDER`
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tokenlearner import TrainConfig, create_model, save_model, train
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.accuracy import mean_metrics, sum_metrics
from tokenlearner.training.checkpointing import TrainingInterrupted
from tokenlearner.training.distributed import Distributed

CLASSES = ("dark", "left", "right", "bright")
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 7}


def quarter_images(config: Any, split: str = "train") -> ImageDataset:
    """Images whose bright half is their class: 64 to train on, an odd number held out."""
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    labels = torch.arange(64 if split == "train" else 33) % 4
    images = torch.randint(0, 60, (len(labels), 1, 28, 28), generator=generator)
    images[labels % 2 == 1, :, :, :14] += 150
    images[labels >= 2, :, :, 14:] += 150
    name = getattr(config, "data", config)
    return ImageDataset(name, split, images.byte(), labels, CLASSES, (0.3,), (0.3,))


def recipe(out: Path, **changes: Any) -> TrainConfig:
    """Two epochs of four steps, of a ViT that learns 2 tokens."""
    options = {"model_kwargs": TINY, "num_tokens": 2, "epochs": 2, "batch_size": 16}
    options |= {"warmup_epochs": 0.0, "device": "cpu", "log_interval": 1}
    return TrainConfig(**{"out": str(out), **options, **changes})


SGD: dict[str, Any] = {"opt": "sgd", "lr": 0.05}
ADAMW: dict[str, Any] = {"opt": "adamw", "lr": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "ddp-sgd": {**SGD, "grad_accum_steps": 2},
    "ddp-adamw": {**ADAMW},
    "fsdp-sgd": {**SGD, "fsdp": True},
    "fsdp-adamw": {**ADAMW, "fsdp": True},
}
INSERTED: dict[str, Any] = {
    **SGD,
    "model_kwargs": None,
    "num_tokens": 0,
    "insert": 2,
    "at": 1,
    "calibrate": 0,
}
DISTILLED: dict[str, Any] = {**INSERTED, "teacher": "host", "kd_distill_type": "feature"}
BEIT = "beit_base_patch16_224"
STOPS: dict[str, Any] = {**SGD, "epochs": 3, "resume": "auto"}


def each_start_method() -> Iterator[str]:
    """Sets how processes are started, in turn."""
    before = multiprocessing.get_start_method()
    try:
        for method in ("fork", "spawn"):
            multiprocessing.set_start_method(method, force=True)
            yield method
    finally:
        multiprocessing.set_start_method(before, force=True)


def save_host(folder: Path, name: str = "vit_mini_patch4_28") -> str:
    """A model to insert tokens in."""
    torch.manual_seed(0)
    save_model(create_model(name, num_classes=4, in_chans=1, img_size=28, **TINY), folder)
    return str(folder)


def until(config: TrainConfig, step: int) -> str:
    """Trains up to a step, at which the process gets a signal; returns the error's message."""

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == step and "epoch" not in row:
            os.kill(os.getpid(), import_module("signal").SIGTERM)

    try:
        train(config, interrupt)
    except TrainingInterrupted as error:
        return str(error)
    return "finished"


def run_all(folder: Path) -> None:
    """All runs of `RUNS`, a distilled one, BEiT's and a stopped one; a report of each process."""
    opened: list[str] = []

    def record(event: str, arguments: Any) -> None:
        if event == "open" and "w" in str(arguments[1]) and str(folder) in str(arguments[0]):
            opened.append(str(arguments[0]))

    sys.addaudithook(record)
    for name, options in RUNS.items():
        train(recipe(folder / name, **options))
    train(recipe(folder / "distilled", model=str(folder / "host"), **DISTILLED))
    train(recipe(folder / "beit", model=str(folder / "beit_host"), **INSERTED))
    message = until(recipe(folder / "stopped", **STOPS), 6)
    accelerator = Distributed(recipe(folder / "evaluated")).accelerator
    process, num_processes = accelerator.process_index, accelerator.num_processes
    data = quarter_images("x", "test")
    sums: Any = sum_metrics(fixed_model(), data, 5, process, num_processes)
    evaluation = mean_metrics(accelerator.reduce(sums, "sum"), data)
    row = {"opened": opened, "message": message, "evaluation": vars(evaluation)}
    report = folder.parent / f"process-{process}.json"
    report.write_text(json.dumps(row | {"processes": num_processes}))


def fixed_model() -> torch.nn.Module:
    """The same model in every process, with weights that tell images apart."""
    torch.manual_seed(3)
    return create_model("vit_mini_patch4_28", num_classes=4, in_chans=1, **TINY)


def go_on(folder: Path) -> None:
    """The rest of the run that was stopped."""
    train(recipe(folder / "stopped", **STOPS))


def main() -> None:
    torch.set_num_threads(1)
    import_module("tokenlearner.training.run").load_data = quarter_images
    {"all": run_all, "go_on": go_on}[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
