"""What is lost at a share of a ViT's multiply-adds, and what is the best way to lose it?

Trains a host, then everything in `contenders.py` at two budgets and several seeds, measures speed
and memory in turn, and writes a table and a plot. Every run leaves a file in `--out`; a command
that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from compare_report import costs_in_turn, write_report
from contenders import BUDGETS, CALIBRATION_IMAGES, CONTENDERS, HOST, SHAPE, teaching
from measured import add_device
from torch import Tensor, nn

from tokenlearner import TrainConfig, evaluate, load_data, load_model, train
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.training.trainer import Trainer
from tokenlearner.utils.io import write_json


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/compare", help="folder for the runs and the table")
    parser.add_argument("--data", default="fashion-mnist", help="a name that load_data knows")
    parser.add_argument("--root", help="folder in which the data set is looked for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--epochs", type=int, default=3, help="of all that start from scratch")
    parser.add_argument("--share", type=float, default=0.1, help="of the images, for the others")
    parser.add_argument("--short-epochs", type=int, default=6, help="of the others")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with a thread each")
    add_device(parser)
    return parser.parse_args()


def config(
    options: Namespace, seed: int, from_scratch: bool, distilled: bool = False
) -> TrainConfig:
    """The recipe: from a trained host with a third of the rate, and distilled without labels."""
    return TrainConfig(
        out=str(Path(options.out) / "host"),
        model=HOST,
        model_kwargs=SHAPE,
        data=options.data,
        root=options.root,
        epochs=options.epochs if from_scratch else options.short_epochs,
        lr=1e-3 if from_scratch else 3e-4,
        warmup_epochs=0.3,
        seed=seed,
        teacher="the trained host" if distilled else None,
        device=str(options.device),
    )


def trained_host(options: Namespace) -> nn.Module:
    """The host of the folder, or a new one."""
    recipe = config(options, 0, from_scratch=True)
    metrics, host = Path(recipe.out) / "metrics.jsonl", Path(recipe.out) / "model.safetensors"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    if len(rows) < recipe.epochs:
        metrics.unlink(missing_ok=True)  # cut off: once more from the start
        train(recipe, report=lambda row: print(row) if "epoch" in row else None)
    return load_model(host).to(options.device)


def run(options: Namespace, host: nn.Module, name: str, budget: str, seed: int) -> dict[str, Any]:
    """Builds and trains one contender; says how good it is before and after."""
    contender, held_out = CONTENDERS[name], load_data(options.data, "test", root=options.root)
    data = load_data(options.data, root=options.root)
    if not contender.from_scratch:
        data = data.sample(round(options.share * len(data)), seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    images = unlabeled(data, seed).to(options.device)
    model = contender.build(host, BUDGETS[budget], images).to(options.device).train()
    before = evaluate(model, held_out).top1_percent
    distilled = contender.distilled and not contender.from_scratch
    recipe = config(options, seed, contender.from_scratch, distilled)
    distillation = teaching(host, BUDGETS[budget], model) if distilled else None
    loop = Trainer(recipe, model, data, distillation=distillation)
    for _ in range(recipe.epochs):
        loop.train_epoch()
    after = evaluate(model, held_out)
    return {
        "contender": name,
        "budget": budget,
        "seed": seed,
        "top1_percent_before": before,
        "top1_percent": after.top1_percent,
        "loss": after.loss,
        "gmacs": count_macs(model.eval(), images[:1]) / 1e9,
        "images": len(data),
        "images_seen": loop.step * recipe.batch_size,
        "seconds": time.perf_counter() - start,
    }


def unlabeled(data: ImageDataset, seed: int) -> Tensor:
    """Images for calibrating, all of them among those that are trained on."""
    sample = data.sample(min(CALIBRATION_IMAGES, len(data)), seed)
    images, _ = next(sample.batches(len(sample)))
    return images


def costs(options: Namespace, host: nn.Module) -> dict[str, Any]:
    """What everybody costs at batches of 1 and 32, in turn; untrained, which changes no speed."""
    held_out = load_data(options.data, "test", root=options.root)
    few = unlabeled(held_out.sample(2), 0).to(options.device)
    found: dict[str, Any] = {}
    for budget in options.budgets:
        models = {"host": host}
        for name in options.contenders:
            model = CONTENDERS[name].build(host, BUDGETS[budget], few)
            models[name] = model.to(options.device).eval()
        found[budget] = costs_in_turn(models, held_out, options.rounds)
    return found


def run_all(options: Namespace) -> None:
    """Runs what is not there yet; small models train fastest side by side with a thread each."""
    todo = [(s, b, c) for s in options.seeds for b in options.budgets for c in options.contenders]
    todo.sort(key=lambda one: (CONTENDERS[one[2]].from_scratch, one[0]))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(run_one, options, name, budget, seed) for seed, budget, name in todo]
        for job in as_completed(jobs):
            if row := job.result():
                print(json.dumps(row), flush=True)


def run_one(options: Namespace, name: str, budget: str, seed: int) -> dict[str, Any] | None:
    """`run`, unless its file is there."""
    path = Path(options.out) / f"{name}-{budget}-{seed}.json"
    if path.exists():
        return None
    host = load_model(Path(options.out) / "host").to(options.device)
    write_json(path, row := run(options, host, name, budget, seed))
    return row


def main() -> None:
    options = parse()
    out = Path(options.out)
    host = trained_host(options)
    run_all(options)
    if not (out / "costs.json").exists():
        write_json(out / "costs.json", costs(options, host))
    command = shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    print(write_report(out, command))


if __name__ == "__main__":
    main()
