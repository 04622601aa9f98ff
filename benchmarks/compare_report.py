"""The table and the plot of a comparison, from the files that its runs left.

`python benchmarks/compare_report.py benchmarks/results/compare.json` prints the table of a saved
comparison and draws its plot beside it.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import BUDGETS, CONTENDERS
from printed import head, line, spread
from torch import nn

from tokenlearner import benchmark
from tokenlearner.data.factory import ImageDataset
from tokenlearner.utils.io import atomic_write

HEADER = (
    "top-1 untrained, %",
    "top-1, %",
    "against host",
    "GMACs",
    "of host",
    "images/s, batch 1",
    "images/s, batch 32",
    "speed-up / MACs ratio, 1",
    "32",
    "peak MiB, batch 32",
    "training images",
    "images seen",
)


def write_report(out: Path, command: str) -> str:
    """Writes table.md, results.json and plot.png to the folder and returns the table."""
    results = gather(out)
    text = f"`{command}`\n\n{table(results)}"
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_write(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(out / "plot.png", results)
    return text


def gather(out: Path) -> dict[str, Any]:
    """All that was measured, in one dictionary."""
    names = [(c, b) for b in BUDGETS for c in CONTENDERS]
    runs = [
        json.loads(path.read_text())
        for name, budget in names
        for path in sorted(out.glob(f"{name}-{budget}-*.json"))
    ]
    history = (out / "host" / "metrics.jsonl").read_text().splitlines()
    return {
        "host": json.loads(history[-1]),
        "recipe": json.loads((out / "host" / "train.json").read_text()),
        "runs": runs,
        "costs": json.loads((out / "costs.json").read_text()),
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def table(results: dict[str, Any]) -> str:
    """One row for the host, then for every budget one for each contender."""
    lines = head(HEADER)
    for budget, costs in results["costs"].items():
        lines.append(_host_row(results, costs, budget))
        for name in CONTENDERS:
            runs = [r for r in results["runs"] if (r["contender"], r["budget"]) == (name, budget)]
            if runs:
                lines.append(_row(CONTENDERS[name].label, runs, costs, name, results))
    return "\n".join(lines) + "\n"


def _host_row(results: dict[str, Any], costs: dict[str, Any], budget: str) -> str:
    host, recipe = results["host"], results["recipe"]
    seen = host["step"] * recipe["batch_size"]
    cells = ["", f"{host['test_top1_percent']:.2f}", "", *_cost(costs, "host")]
    images = f"{seen // recipe['epochs']:,}"
    return line(f"**host** (budget {BUDGETS[budget].share})", [*cells, images, f"{seen:,}"])


def _row(
    label: str, runs: list[dict[str, Any]], costs: dict[str, Any], name: str, results: Any
) -> str:
    after = [run["top1_percent"] for run in runs]
    before = [run["top1_percent_before"] for run in runs]
    untrained = "" if CONTENDERS[name].from_scratch else f"{median(before):.2f}"
    gap = median(after) - results["host"]["test_top1_percent"]
    counts = [f"{runs[0][key]:,}" for key in ("images", "images_seen")]
    return line(label, [untrained, spread(after), f"{gap:+.2f}", *_cost(costs, name), *counts])


def cost_cells(
    costs: dict[str, Any], name: str, gmacs: str = ".4f", speed: str = ",.0f"
) -> list[str]:
    """GMACs and speed of one model, and how much of what the MACs promise becomes speed."""
    own, host = costs[name], costs["host"]
    ratio = host["1"]["gmacs"] / own["1"]["gmacs"]
    speeds = [format(own[batch]["images_per_second"]["median"], speed) for batch in ("1", "32")]
    kept = [f"{own[batch]['speedup']['median'] / ratio:.2f}" for batch in ("1", "32")]
    return [format(own["1"]["gmacs"], gmacs), f"{1 / ratio:.2f}", *speeds, *kept]


def _cost(costs: dict[str, Any], name: str) -> list[str]:
    return [*cost_cells(costs, name), f"{costs[name]['32']['peak_memory_mib']:.1f}"]


def costs_in_turn(
    models: dict[str, nn.Module], data: ImageDataset, rounds: int
) -> dict[str, dict[str, Any]]:
    """What models cost at batches of 1 and 32, by name and batch."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for batch in (1, 32):
        images, _ = next(data.batches(batch))
        device = next(models["host"].parameters()).device
        for name, cost in benchmark(models, images.to(device), rounds).items():
            found[name][str(batch)] = asdict(cost)
    return found


def plot(path: Path, results: dict[str, Any]) -> None:
    """Accuracy against measured latency, a panel for each batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, batch in zip(figure.subplots(1, 2, sharey=True), ("1", "32"), strict=True):
        for i, name in enumerate(CONTENDERS):
            _points(axis, results, name, batch, f"C{i}")
        costs = next(iter(results["costs"].values()))["host"][batch]
        top1 = results["host"]["test_top1_percent"]
        axis.scatter([_ms(costs)], [top1], marker="*", s=150, color="black", label="host", zorder=3)
        axis.axhline(top1, color="black", lw=0.6, ls=":")
        axis.set(xlabel=f"ms an image, batch {batch}", title=f"batch {batch}")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1, % (median, range of seeds)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _points(axis: Any, results: dict[str, Any], name: str, batch: str, color: str) -> None:
    """A contender's budgets, joined by a line."""
    found = []
    for budget, costs in results["costs"].items():
        runs = [r for r in results["runs"] if (r["contender"], r["budget"]) == (name, budget)]
        if runs:
            values = [run["top1_percent"] for run in runs]
            found.append((_ms(costs[name][batch]), median(values), min(values), max(values)))
    if not found:
        return
    x, y, low, high = zip(*sorted(found), strict=True)
    bars = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]  # noqa: B905
    ours = name in ("calibrated", "fuser")
    axis.errorbar(
        x, y, yerr=bars, marker="o" if ours else "s", ms=6 if ours else 4, lw=2 if ours else 1,
        capsize=2, color=color, label=CONTENDERS[name].label,
    )  # fmt: skip


def _ms(cost: dict[str, Any]) -> float:
    """Milliseconds an image, from images a second."""
    return 1000 / cost["images_per_second"]["median"]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of benchmarks/compare.py")
    path = parser.parse_args().results
    results = json.loads(path.read_text(encoding="utf-8"))
    print(table(results), end="")
    plot(path.with_suffix(".png"), results)
    print(f"The plot is {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
