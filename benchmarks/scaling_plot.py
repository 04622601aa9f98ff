"""The images of scaling.py: one for each axis, with latency, multiply-adds and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenlearner.utils.io import atomic_write

LABELS = {
    "resolution": "height and width, pixels",
    "tokens": "learned tokens",
    "frames": "frames",
    "batch": "images at a time",
}
PANELS = {
    "latency_ms": "latency, ms (median, quartiles)",
    "gmacs": "multiply-adds, GMACs",
    "training_peak_memory_mib": "memory of a training step, MiB",
}
STYLES: dict[str, dict[str, Any]] = {  # colors of Okabe and Ito, and forms for who sees none
    "plain": {"color": "#d55e00", "marker": "s", "ls": "--", "mfc": "white"},
    "learned": {"color": "#0072b2", "marker": "o", "ls": "-"},
}


def plot_scaling(
    folder: Path, points: list[dict[str, Any]], measured: dict[str, Any]
) -> list[Path]:
    """Draws `scaling-AXIS.png` for every axis that has two points or more, and model.

    Args:
        folder: Where to.
        points: As `scaling.py` writes them, by value.
        measured: The machine, and how many rounds there were.
    """
    written = []
    for axis in LABELS:
        own = [p for p in points if p["axis"] == axis]
        if len(own) > 1:
            path = folder / f"scaling-{axis}.png"
            _image(path, axis, own, _caption(measured))
            written.append(path)
    return written


def _image(path: Path, axis: str, points: list[dict[str, Any]], caption: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.9), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (key, title) in zip(panels, PANELS.items(), strict=True):
        for form in STYLES:
            _line(panel, axis, form, key, points)
        _scales(panel, axis, [p["value"] for p in points])
        panel.set_title(title, fontsize=11)
        panel.set_xlabel(LABELS[axis], fontsize=10)
    figure.suptitle(f"{points[0]['model']}, {_shape(axis, points)}", fontsize=11)
    figure.supxlabel(caption, fontsize=8, color="#555555")
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _line(panel: Any, axis: str, form: str, key: str, points: list[dict[str, Any]]) -> None:
    """One form over the axis, with quartiles where there are any, and its name beside it."""
    x, found = [p["value"] for p in points], [p["forms"][form][key] for p in points]
    if key == "latency_ms":
        y = [one["median"] for one in found]
        bars = [[one["median"] - one["low"] for one in found]]
        bars += [[one["high"] - one["median"] for one in found]]
        panel.errorbar(x, y, yerr=bars, capsize=3, lw=1.8, ms=5, **STYLES[form])
    else:
        y = found
        panel.plot(x, y, lw=1.8, ms=5, **STYLES[form])
    _name(panel, form, _label(axis, form, points), x, y)


def _name(panel: Any, form: str, label: str, x: list[int], y: list[float]) -> None:
    """Above the line that costs more, below the other, and away from where a line goes up."""
    above = form == "plain"
    at = (len(x) - 1) // 2
    panel.annotate(
        label,
        (x[at], y[at]),
        xytext=(-6, 9) if above else (6, -16),
        textcoords="offset points",
        ha="right" if above else "left",
        va="bottom" if above else "top",
        color=STYLES[form]["color"],
        fontsize=10,
    )


def _label(axis: str, form: str, points: list[dict[str, Any]]) -> str:
    if form == "plain":
        return "all tokens"
    return "learned tokens" if axis == "tokens" else f"{points[0]['num_tokens']} learned tokens"


def _scales(panel: Any, axis: str, values: list[int]) -> None:
    """Powers on both axes, but over tokens, where the cost lies within a factor of two."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(v) for v in values])
    panel.minorticks_off()
    if axis == "tokens":
        panel.set_ylim(0, panel.get_ylim()[1] * 1.15)
    else:
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        panel.set_ylim(low / 1.6, high * 1.6)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=9)


def _shape(axis: str, points: list[dict[str, Any]]) -> str:
    """What stays as it is along the axis."""
    batch, *axes = points[0]["input"]
    size = " x ".join(map(str, axes[-2:]))
    shapes = {"resolution": "one image", "frames": f"one clip at {size}"}
    return shapes.get(axis, f"{f'{batch} ' if axis == 'tokens' else ''}images at {size}")


def _caption(measured: dict[str, Any]) -> str:
    machine, rounds = measured["machine"], measured["rounds"]
    chip = machine["accelerator"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{chip}, torch {machine['torch']}, float32, {rounds} rounds"
