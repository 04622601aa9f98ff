"""Draws the figures of the pages from results that were kept: error and speed against cost.

`errors.png` has what reduced models leave open of their host, `curves.png` the same while they are
trained, `speed.png` how much faster 8 tokens are by images at a time, and `scaling-*.png` cost by
resolution, tokens, frames and images. Nothing is measured here.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from typing import Any

from printed import ranked
from scaling_plot import STYLES, plot_scaling

from tokenlearner.utils.io import atomic_write

RESULTS = Path(__file__).parent / "results"
SETS = {
    "clothes": "clothes, a ViT of 6 blocks",
    "detail": "fine detail, DINOv2 ViT-S at 224 pixels",
    "drawings": "drawings, DINOv2 ViT-S at 112 pixels",
}
# Colors of Okabe and Ito, and forms for who sees none.
FAMILIES: dict[str, dict[str, Any]] = {
    "learned tokens": STYLES["learned"],
    "smaller image and learned tokens": {"color": "#009e73", "marker": "^", "ls": "-"},
    "smaller image": {**STYLES["plain"], "ls": "-"},
    "average pooling": {"color": "#cc79a7", "marker": "D", "ls": ":"},
    "merging": {"color": "#000000", "marker": "v", "ls": ":"},
    "top-k": {"color": "#e69f00", "marker": "X", "ls": ":"},
}
SIZES = {"ViT-S/16": "#56b4e9", "ViT-B/16": "#0072b2", "ViT-L/16": "#000000"}


def family(kind: str) -> str | None:
    """Of which line a contender is; None of none."""
    if kind.startswith("smaller image"):
        return "smaller image and learned tokens" if "tokens" in kind else "smaller image"
    for start, name in {
        "pooled": "average pooling",
        "top": "top-k",
        "merged": "merging",
    }.items():
        if kind.startswith(start):
            return name
    is_learned = kind == "two places" or (kind[0].isdigit() and "same place" not in kind)
    return "learned tokens" if is_learned else None


def best_points(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, list[float]]]]:
    """The best contender of each family at each budget: its cost, and the errors of its seeds."""
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for budget in sorted({row["budget"] for row in rows}):
        for name, same in best_runs(rows, budget).items():
            errors = [row["error"] for row in same]
            points.setdefault(name, []).append((same[0]["share"], errors))
    return points


def best_runs(rows: list[dict[str, Any]], budget: float) -> dict[str, list[dict[str, Any]]]:
    """The runs of the best contender of each family at a budget, one for each seed."""
    best: dict[str, list[dict[str, Any]]] = {}
    for same in ranked(rows, budget).values():  # the one that leaves least first
        if name := family(same[0]["kind"]):
            best.setdefault(name, same)
    return best


def draw_errors(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Error against cost, a panel for each set."""
    figure, panels = _figure(len(found))
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        for kind, points in best_points(rows).items():
            x, errors = zip(*sorted(points), strict=True)
            y = [median(values) for values in errors]
            bars = [[a - min(b) for a, b in zip(y, errors, strict=True)]]
            bars += [[max(b) - a for a, b in zip(y, errors, strict=True)]]
            panel.errorbar(x, y, yerr=bars, capsize=3, lw=1.6, ms=7, label=kind, **FAMILIES[kind])
        panel.set_title(SETS[name], fontsize=11)
        panel.set_xlabel("share of the host's multiply-adds", fontsize=10)
        panel.set_xlim(0.25, 0.55)
        panel.set_yscale("log")
        _ticks(panel)
    panels[0].set_ylabel("left open on held-out images (median, range of seeds)", fontsize=9)
    _legend(figure, panels)
    _save(figure, path)


def draw_curves(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out error against updates at half of the cost, a panel for each set."""
    figure, panels = _figure(len(found))
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        for kind, same in best_runs(rows, max(row["budget"] for row in rows)).items():
            steps = [step for step, _ in same[0]["history"]]
            each = [[error for _, error in row["history"]] for row in same]
            middle = [median(errors) for errors in zip(*each, strict=True)]
            style = FAMILIES[kind] | {"markevery": max(1, len(steps) // 6)}
            panel.plot(steps, middle, lw=1.6, ms=6, label=kind, **style)
        panel.set_title(SETS[name], fontsize=11)
        panel.set_xlabel("updates", fontsize=10)
        panel.set_yscale("log")
        _ticks(panel)
    panels[0].set_ylabel("left open on held-out images (median of seeds)", fontsize=9)
    _legend(figure, panels)
    _save(figure, path)


def draw_speed(path: Path, gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    """How much faster 8 tokens halfway are, against images at a time, on a GPU and on a CPU."""
    figure, (left, right) = _figure(2)
    rows = gpu["tables"]["models"]["rows"]
    for size, color in SIZES.items():
        for tokens, style in {"V1.1": STYLES["learned"], "image of 160": STYLES["plain"]}.items():
            own = [r for r in rows if r["model"].startswith(size) and r["tokens"] == tokens]
            own.sort(key=lambda r: r["batch"])
            label = f"{size}, {'8 tokens' if tokens == 'V1.1' else 'image of 160 pixels'}"
            times = [r["times as fast"] for r in own]
            _line(left, [r["batch"] for r in own], times, style | {"color": color}, label)
    points = [p for p in cpu["points"] if p["axis"] == "batch"]
    forms = [(p["forms"]["plain"], p["forms"]["learned"]) for p in points]
    ratio = forms[0][0]["gmacs"] / forms[0][1]["gmacs"]
    y = [a["latency_ms"]["median"] / b["latency_ms"]["median"] for a, b in forms]
    style = STYLES["learned"] | {"color": SIZES["ViT-S/16"]}
    right.plot([p["value"] for p in points], y, lw=1.6, ms=6, label="ViT-S/16, 8 tokens", **style)
    names = gpu["machine"]["accelerator"], f"{cpu['machine']['cpu']}, {cpu['machine']['threads']}"
    for panel, name in zip((left, right), names, strict=True):
        panel.axhline(ratio, color="#555555", lw=0.8, ls=":")
        panel.annotate("ratio of multiply-adds", (1, ratio), (0, 4), textcoords="offset points")
        panel.axhline(1, color="#555555", lw=0.8)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_ylim(0.6, 2.3)
        panel.set_xlabel("images at a time", fontsize=10)
        _ticks(panel)
        panel.set_title(name, fontsize=11)
    left.set_title(f"{names[0]}, eager, bfloat16", fontsize=11)
    right.set_title(f"{names[1]} threads, eager, float32", fontsize=11)
    left.set_ylabel("times as fast as the plain model", fontsize=10)
    _legend(figure, (left, right))
    _save(figure, path)


def _line(panel: Any, x: list[int], times: list[dict[str, float]], style: Any, label: str) -> None:
    y = [t["median"] for t in times]
    bars = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
    panel.errorbar(x, y, yerr=bars, capsize=2, lw=1.6, ms=6, label=label, **style)


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count + 1.2, 4.9), dpi=130, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _ticks(panel: Any) -> None:
    panel.grid(alpha=0.3, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=9, which="both")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")


def _legend(figure: Any, panels: Any) -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    print(path)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=RESULTS.parents[1] / "docs")
    options = parser.parse_args()
    files = {name: options.results / f"insertion_{name}.json" for name in SETS}
    read = {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in (
            *files.values(),
            options.results / "gpu.json",
            options.results / "scaling.json",
        )
        if path.exists()
    }
    rows = {name: read[path.stem]["rows"] for name, path in files.items() if path.stem in read}
    draw_errors(options.out / "errors.png", rows)
    draw_curves(options.out / "curves.png", rows)
    draw_speed(options.out / "speed.png", read["gpu"], read["scaling"])
    plot_scaling(options.out, read["scaling"]["points"], read["scaling"])


if __name__ == "__main__":
    main()
