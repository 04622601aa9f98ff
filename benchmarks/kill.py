"""Is anything lost when a run is killed? Kills one at random moments until it has ended.

A small ViT trains on the bundled images in a process of its own, which is killed (SIGKILL) at
random moments and started again with `resume="auto"`: every fourth time soon after its start, else
soon after it wrote a checkpoint, which it does after every second step. After every kill
the checkpoint has to be absent or readable; the final weights have to be those of a run that was
left alone, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from measured import add_device, command
from safetensors.torch import load_file

from tokenlearner import TrainConfig, train
from tokenlearner.training.checkpointing import CHECKPOINT, read_checkpoint
from tokenlearner.utils.io import write_json

RECIPE: dict[str, Any] = {
    "model_kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "num_tokens": 4,
    "images": 1024,
    "epochs": 40,
    "batch_size": 32,
    "save_every": 2,
    "drop_path": 0.1,
    "hflip": 0.5,
    "ema_decay": 0.99,
    "workers": 0,
    "resume": "auto",
}
EARLY, LATE = 6.0, 1.0  # seconds that a kill comes after the start, or after a checkpoint


def config(out: Path, options: Namespace) -> TrainConfig:
    overrides = {"out": str(out), "epochs": options.epochs, "device": str(options.device)}
    return TrainConfig(**{**RECIPE, **overrides})


def start(out: Path, options: Namespace) -> subprocess.Popen[bytes]:
    overrides = f"--epochs {options.epochs} --device {options.device}".split()
    command = [sys.executable, __file__, "--train", str(out), *overrides]
    return subprocess.Popen(command, start_new_session=True)


def saved_step(out: Path, options: Namespace) -> int:
    """The step of the checkpoint, 0 if there is none; an unreadable one is an error."""
    state = read_checkpoint(config(out, options))
    return state["step"] if state else 0


def wait(process: subprocess.Popen[bytes], out: Path, draw: random.Random, early: bool) -> None:
    """Waits for a random moment of a run, or for its end."""
    before = written(out)
    while not early and written(out) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, EARLY if early else LATE))


def written(out: Path) -> int:
    """When the checkpoint was written, 0 if there is none."""
    path = out / CHECKPOINT
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_again_and_again(options: Namespace, out: Path) -> list[dict[str, Any]]:
    """Starts the run and kills it, so many times; says what each kill left."""
    draw, rows = random.Random(options.seed), []
    for number in range(1, options.kills + 1):
        process, began = start(out, options), time.perf_counter()
        wait(process, out, draw, early=number % 4 == 0)
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        row = {
            "kill": number,
            "seconds": round(time.perf_counter() - began, 2),
            "ended_before": ended,
            "checkpoint_of_step": saved_step(out, options),
            "remains": sorted(path.name for path in out.glob(".*")) if out.exists() else [],
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/kill", help="new folder for runs and kill.json")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--train", help="train in this folder, and do nothing else")
    add_device(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        train(config(Path(options.train), options))
        return
    out = Path(options.out)
    alone, killed = out / "alone", out / "killed"
    kills = kill_again_and_again(options, killed)
    for folder in (killed, alone):  # to the end
        if start(folder, options).wait():
            raise SystemExit(f"the run in {folder} failed")
    a, b = (load_file(folder / "model.safetensors") for folder in (alone, killed))
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    overrides = {"command": command("kill.py")}
    write_json(out / "kill.json", overrides | {"kills": kills, "bit_identical": same})
    cut = sum(not row["ended_before"] for row in kills)
    print(f"{cut} of {len(kills)} starts were killed; final weights bit-identical: {same}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
