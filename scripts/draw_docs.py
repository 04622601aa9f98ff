"""Draw the images of the documentation: `python scripts/draw_docs.py [FOLDER]`.

Schemes, and one chart of counted multiply-adds; nothing in them is measured. Colors are those of
Okabe and Ito, which differ for everybody, and every image has a white ground of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from tokenlearner import create_model, remove
from tokenlearner.evaluation.flops import count_macs

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "drawings"
INK, GRAY = "#222222", "#8c8c8c"
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
SETTINGS = {"svg.hashsalt": "tokenlearner", "font.size": 11, "text.color": INK}
GRID, TOKENS = 14, 4  # of the image in draw_how


def sheet(width: float, height: float) -> tuple[Figure, Any]:
    """An empty image and its axes, both in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    return figure, ax


def box(
    ax: Any, x: float, y: float, w: float, h: float, text: str, color: str = GRAY, **look: Any
) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    form = f"round,pad=0,rounding_size={min(0.08, w / 3)}"
    pale = matplotlib.colors.to_rgba(color, look.pop("alpha", 0.18))
    patch = FancyBboxPatch((x, y), w, h, boxstyle=form, facecolor=pale, edgecolor=color, lw=1.3)
    ax.add_patch(patch)
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", **look)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """An arrow from one point to another."""
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 2, "shrinkB": 2}
    ax.annotate("", end, start, arrowprops=style | {"mutation_scale": 11})


def row(ax: Any, x: float, y: float, count: int, color: str, size: float = 0.16) -> float:
    """Tokens side by side; returns where they end."""
    for i in range(count):
        box(ax, x + i * size * 1.3, y, size, size * 1.6, "", color, alpha=0.55)
    return x + count * size * 1.3


def drawn_image() -> np.ndarray:
    """A landscape with a sun, a house and a tree, `h w 3`."""
    h = w = 8 * GRID
    y, x = np.mgrid[0:h, 0:w] / h
    image = np.stack([0.62 + 0.2 * y, 0.80 + 0.08 * y, 0.95 + 0 * y], axis=-1)
    hill = y > 0.68 + 0.05 * np.sin(5 * x)
    image[hill] = (0.45, 0.62, 0.33)
    image[(x - 0.78) ** 2 + (y - 0.2) ** 2 < 0.012] = (1.0, 0.82, 0.2)
    image[(abs(x - 0.28) < 0.13) & (abs(y - 0.66) < 0.12)] = (0.80, 0.35, 0.22)
    image[(y > 0.38) & (y < 0.54) & (abs(x - 0.28) < (y - 0.38) * 1.1)] = (0.42, 0.2, 0.16)
    image[(abs(x - 0.68) < 0.02) & (y > 0.5) & (y < 0.76)] = (0.4, 0.26, 0.13)
    image[(x - 0.68) ** 2 + (y - 0.48) ** 2 < 0.012] = (0.16, 0.42, 0.22)
    return image


def drawn_maps() -> np.ndarray:
    """Maps such as a model may learn, `k n`; each sums to 1."""
    y, x = (np.mgrid[0:GRID, 0:GRID] + 0.5) / GRID
    spots = [(0.78, 0.2, 0.1, 0.1), (0.28, 0.6, 0.13, 0.16), (0.68, 0.52, 0.09, 0.15)]
    spots.append((0.5, 0.86, 0.5, 0.07))
    maps = [np.exp(-(((x - a) / s) ** 2) - ((y - b) / t) ** 2).ravel() for a, b, s, t in spots]
    return np.stack([m / m.sum() for m in maps])


def inset(figure: Figure, x: float, y: float, w: float, h: float) -> Any:
    """Axes for an image at a place of a sheet, in inches."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((x / width, y / height, w / width, h / height))
    ax.set_axis_off()
    return ax


def draw_how() -> Figure:
    """An image, its maps and its tokens: the tokens are the positions' means by each map."""
    figure, ax = sheet(8.4, 4.0)
    image, maps = drawn_image(), drawn_maps()
    of_positions = image.reshape(GRID, 8, GRID, 8, 3).mean((1, 3)).reshape(-1, 3)
    channels = np.random.default_rng(1).normal(size=(3, 9))
    tokens = maps @ (of_positions - of_positions.mean(0)) @ channels
    shown = inset(figure, 0.3, 0.95, 2.1, 2.1)
    shown.imshow(image, extent=(0, GRID, GRID, 0), interpolation="nearest")
    for i in range(GRID + 1):
        shown.plot([0, GRID], [i, i], color="white", lw=0.5)
        shown.plot([i, i], [0, GRID], color="white", lw=0.5)
    for i in range(TOKENS):
        y = 2.99 - 0.77 * i
        inset(figure, 4.15, y, 0.68, 0.68).imshow(maps[i].reshape(GRID, GRID), cmap="cividis")
        inset(figure, 6.25, y + 0.2, 1.75, 0.28).imshow(tokens[i : i + 1], cmap="cividis")
        arrow(ax, (2.45, 2.0), (4.1, y + 0.34))
        arrow(ax, (4.9, y + 0.34), (6.2, y + 0.34))
    for x, text in [(1.35, "positions"), (4.49, "maps"), (7.12, "tokens")]:
        ax.text(x, 3.85, text, ha="center", va="center", weight="bold")
    ax.text(1.35, 0.6, "14 x 14 = 196 patches,\na vector for each", ha="center", va="center")
    ax.text(4.49, 0.26, "one a token: how much\nof which position", ha="center", va="center")
    ax.text(7.12, 0.26, "means of the positions,\nweighted by the maps", ha="center", va="center")
    ax.text(5.55, 3.43, "pool", ha="center", color=BLUE)
    ax.text(3.1, 3.05, "learn", ha="center", color=BLUE)
    return figure


def cost_of_blocks(model: Any, image: torch.Tensor) -> list[tuple[int, float]]:
    """The positions or tokens that each block runs on, and its GMACs with its learner's."""
    sizes: list[torch.Size] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
        for block in model.blocks
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    blocks = zip(model.blocks, sizes, strict=True)
    costs = [count_macs(block, torch.empty(size, device="meta")) / 1e9 for block, size in blocks]
    learners = [getattr(block, "learner", None) for block in model.blocks]
    counts = [
        size[1] if learner is None else learner.num_tokens
        for size, learner in zip(sizes, learners, strict=True)
    ]
    return list(zip(counts, costs, strict=True))


def draw_cost() -> Figure:
    """What each block of a ViT-B/16 costs on all positions, and on 8 tokens from block 6 on."""
    with torch.device("meta"):
        model: Any = create_model("vit_base_patch16_tl8at6_224").eval()
    image = torch.empty(1, 3, 224, 224, device="meta")
    learned = cost_of_blocks(model, image)
    plain = cost_of_blocks(remove(model), image)
    figure = Figure(figsize=(8.4, 3.4), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    for i, ((_, whole), (count, cost)) in enumerate(zip(plain, learned, strict=True)):
        ax.bar(i - 0.2, whole, 0.38, color="#bdbdbd")
        ax.bar(i + 0.2, cost, 0.38, color=BLUE)
        ax.text(i + 0.2, cost + 0.03, count, ha="center", color=BLUE)
    ax.axvline(5.5, color=RED, lw=1.2, ls="--")
    ax.text(5.58, 1.88, "tokens are learned here", color=RED, va="top")
    ax.set(
        xlabel="block; above its bar: positions or tokens",
        ylabel="GMACs",
        xticks=range(12),
        ylim=(0, 1.95),
        xlim=(-0.6, 11.6),
    )
    sums = [sum(cost for _, cost in costs) for costs in (plain, learned)]
    label = f"on all 196 positions: {sums[0]:.1f} GMACs together"
    ax.bar(0, 0, color="#bdbdbd", label=label)
    ax.bar(0, 0, color=BLUE, label=f"on 8 tokens from block 6 on: {sums[1]:.1f}")
    figure.legend(loc="outside upper left", frameon=False, ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def stack(ax: Any, x: float, top: float, layers: Sequence[tuple[str, str]], w: float) -> float:
    """Boxes from top to bottom with arrows between them; returns where they end."""
    for i, (text, color) in enumerate(layers):
        y = top - 0.56 * i
        box(ax, x, y - 0.36, w, 0.36, text, color)
        if i:
            arrow(ax, (x + w / 2, y + 0.22), (x + w / 2, y - 0.01))
    return top - 0.56 * (len(layers) - 1) - 0.36


def draw_versions() -> Figure:
    """The layers of V1 and of V1.1, side by side."""
    figure, ax = sheet(8.4, 4.9)
    gelu = ("3 x 3 convolution, GELU", BLUE)
    v1 = [("LayerNorm", GRAY), gelu, gelu, gelu, ("3 x 3 convolution", BLUE), ("sigmoid", ORANGE)]
    v11 = [("LayerNorm", GRAY), ("linear layer to 64, GELU", BLUE), ("linear layer to k", BLUE)]
    v11.append(("softmax over positions", ORANGE))
    for x, title, layers, last in [
        (0.5, "V1: TokenLearner", v1, "sum (or mean) of positions by gates"),
        (4.6, "V1.1: TokenLearnerV11", v11, "mean of positions by maps"),
    ]:
        ax.text(x + 1.65, 4.65, title, ha="center", va="center", weight="bold")
        end = stack(ax, x, 4.35, layers, 3.3)
        note = "k gates in (0, 1)" if len(layers) == 6 else "k maps that sum to 1"
        ax.text(x + 1.72, end - 0.15, note, va="center", color=RED, fontsize=10)
        arrow(ax, (x + 1.65, end), (x + 1.65, end - 0.32))
        box(ax, x, end - 0.68, 3.3, 0.36, last, GREEN)
    ax.text(6.25, 0.72, "no neighbors: works on any\nset of tokens, needs no grid", ha="center")
    return figure


def draw_fuser() -> Figure:
    """How tokens go back onto positions."""
    figure, ax = sheet(8.4, 3.2)
    row(ax, 0.3, 2.45, 8, ORANGE)
    ax.text(1.1, 2.18, "k tokens", ha="center", va="top")
    for i in range(3):
        row(ax, 0.3, 1.0 - 0.3 * i, 8, SKY)
    ax.text(1.1, 0.28, "n positions", ha="center", va="top")
    for x, w, text in [(2.3, 1.1, "LayerNorm"), (3.7, 1.2, "mix, k x k"), (5.2, 1.1, "LayerNorm")]:
        box(ax, x, 2.35, w, 0.45, text, ORANGE)
        arrow(ax, (x - 0.3, 2.58), (x, 2.58))
    for x, w, text in [(2.3, 1.1, "LayerNorm"), (3.7, 1.2, "MLP to k"), (5.2, 1.1, "sigmoid")]:
        box(ax, x, 0.7, w, 0.45, text, SKY)
        arrow(ax, (x - 0.3, 0.93), (x, 0.93))
    box(ax, 5.35, 1.55, 2.05, 0.45, "sum of tokens by gates", GREEN)
    arrow(ax, (5.75, 2.35), (5.75, 2.0))
    arrow(ax, (5.75, 1.15), (5.75, 1.55))
    ax.text(5.85, 1.33, "k gates a position", va="center", fontsize=10, color=RED)
    box(ax, 7.7, 1.55, 0.4, 0.45, "+", GRAY, weight="bold")
    arrow(ax, (7.4, 1.78), (7.7, 1.78))
    ax.plot([2.0, 2.0, 7.9], [0.93, 0.25, 0.25], color=BLUE, lw=1.3)
    arrow(ax, (7.9, 0.2), (7.9, 1.55), BLUE)
    ax.text(4.9, 0.33, "residual: added by the caller", ha="center", color=BLUE)
    return figure


def draw_insertion() -> Figure:
    """Prefix tokens pass by the learner, and no block is changed."""
    figure, ax = sheet(8.4, 2.9)
    for y, color in [(2.1, RED), (1.25, SKY)]:
        arrow(ax, (0.75 if color == RED else 1.6, y), (2.0, y), color)
    row(ax, 0.45, 1.97, 1, RED)
    for i in range(4):
        row(ax, 0.45, 1.72 - 0.3 * i - 0.1, 5, SKY)
    ax.text(0.4, 2.5, "class token,\nregisters", va="center", fontsize=10, color=RED)
    ax.text(0.45, 0.45, "196 positions", va="center", fontsize=10, color=BLUE)
    box(ax, 2.0, 0.8, 1.2, 1.6, "blocks\n0 to 5,\nas they\nwere", GRAY)
    box(ax, 3.85, 0.85, 1.25, 0.8, "TokenLearner", ORANGE, weight="bold", fontsize=10)
    arrow(ax, (3.2, 1.25), (3.85, 1.25), SKY)
    arrow(ax, (3.2, 2.1), (5.85, 2.1), RED)
    arrow(ax, (5.1, 1.25), (5.85, 1.25), ORANGE)
    ax.text(4.5, 2.22, "pass by", ha="center", color=RED, fontsize=10)
    ax.text(4.5, 0.55, "inserted", ha="center", color=INK, fontsize=10)
    box(ax, 5.85, 0.8, 1.2, 1.6, "blocks\n6 to 11,\nas they\nwere", GRAY)
    end = row(ax, 7.4, 1.97, 1, RED)
    row(ax, 7.4, 1.1, 4, ORANGE), row(ax, 7.4, 0.8, 4, ORANGE)
    arrow(ax, (7.05, 2.1), (end - 0.2, 2.1), RED)
    arrow(ax, (7.05, 1.25), (7.4, 1.25), ORANGE)
    ax.text(7.4, 0.55, "8 tokens", fontsize=10, color=INK)
    return figure


def draw_stream() -> Figure:
    """Only the newest frame is encoded; the tokens of the others are kept."""
    figure, ax = sheet(8.4, 3.3)
    for i in range(6):
        x, new = 0.4 + 0.95 * i, i == 5
        color = ORANGE if new else GRAY
        box(ax, x, 2.5, 0.72, 0.5, "now" if new else f"t - {5 - i}", color)
        if new:
            arrow(ax, (x + 0.36, 2.5), (x + 0.36, 2.2))
            box(ax, x - 0.2, 1.75, 1.12, 0.45, "encoder", BLUE)
            arrow(ax, (x + 0.36, 1.75), (x + 0.36, 1.4))
        box(ax, x, 0.95, 0.72, 0.45, "8 tokens", color, fontsize=9)
    ax.text(0.4, 1.95, "seen before: nothing is computed again", va="center", color=INK)
    arrow(ax, (0.4, 1.15), (0.02, 1.15), GRAY)
    ax.text(0.4, 0.6, "the ring: tokens of the last 6 frames, the oldest leaves", color=INK)
    arrow(ax, (5.9, 1.17), (6.55, 1.17))
    box(ax, 6.55, 0.75, 1.5, 0.85, "transformer\non 48 tokens", BLUE)
    arrow(ax, (7.3, 0.75), (7.3, 0.4))
    ax.text(7.3, 0.25, "logits", ha="center", va="center")
    return figure


def draw_kept() -> Figure:
    """Frames are encoded once; a small transformer is trained on the tokens that were kept."""
    figure, ax = sheet(8.4, 3.3)
    for i in range(4):
        x = 0.35 + 0.16 * i
        box(ax, x, 1.75 - 0.1 * i, 0.8, 0.6, "" if i < 3 else "frames", GRAY, alpha=0.4)
    arrow(ax, (1.68, 1.75), (2.05, 1.75))
    box(ax, 2.05, 1.2, 1.35, 1.1, "image ViT\nup to block a,\nlearner", BLUE, fontsize=10)
    arrow(ax, (3.4, 1.75), (3.8, 1.75))
    for i in range(3):
        row(ax, 3.85, 2.05 - 0.42 * i, 8, ORANGE, 0.1)
    arrow(ax, (4.98, 1.75), (5.38, 1.75))
    box(ax, 5.38, 1.2, 1.35, 1.1, "transformer\nover time", GREEN, fontsize=10)
    arrow(ax, (6.73, 1.75), (7.13, 1.75))
    ax.text(7.2, 1.75, "logits", va="center")
    ax.text(4.4, 0.85, "8 tokens a frame,\nin shards", ha="center", va="center", fontsize=10)
    for left, right, color, text in [
        (0.35, 4.85, BLUE, "once, frozen: tokenlearner encode"),
        (5.0, 8.05, GREEN, "every epoch: tokenlearner train"),
    ]:
        ax.plot([left, left, right, right], [2.7, 2.8, 2.8, 2.7], color=color, lw=1.3)
        ax.text((left + right) / 2, 2.98, text, ha="center", color=color)
    ax.text(4.2, 0.25, "a video of 10 s, every 4th frame: 75 x 8 tokens", ha="center", fontsize=9)
    return figure


def draw_connector() -> Figure:
    """Few tokens of an image among those of a text."""
    figure, ax = sheet(8.4, 2.9)
    inset(figure, 0.25, 1.05, 1.3, 1.3).imshow(drawn_image(), interpolation="nearest")
    arrow(ax, (1.55, 1.7), (1.9, 1.7))
    box(ax, 1.9, 1.15, 0.95, 1.1, "vision\ntower", GRAY)
    arrow(ax, (2.85, 1.7), (3.15, 1.7))
    for i in range(4):
        row(ax, 3.2, 2.0 - 0.3 * i, 4, SKY)
    ax.text(3.6, 0.75, "576\npositions", ha="center", va="center", fontsize=10, color=BLUE)
    arrow(ax, (4.05, 1.7), (4.3, 1.7))
    box(ax, 4.3, 1.75, 1.25, 0.5, "projector", GRAY)
    box(ax, 4.3, 1.15, 1.25, 0.5, "TokenLearner", ORANGE, weight="bold", fontsize=10)
    ax.text(4.92, 2.45, "TokenConnector", ha="center", color=RED, fontsize=10)
    arrow(ax, (5.55, 1.7), (5.95, 1.7), ORANGE)
    box(ax, 5.95, 1.95, 2.15, 0.5, "language model", GRAY)
    end = row(ax, 5.98, 1.4, 1, GREEN)
    end = row(ax, end, 1.4, 4, ORANGE)
    row(ax, end, 1.4, 5, GREEN)
    ax.text(5.95, 0.8, "64 tokens of the image\namong those of the text", va="center", fontsize=10)
    arrow(ax, (7.0, 1.68), (7.0, 1.95))
    return figure


def draw_policy() -> Figure:
    """Frames of a robot, one of them lost, become tokens and, from the newest, an action."""
    figure, ax = sheet(8.4, 3.5)
    for i, name in enumerate(["none yet", "t - 2", "lost", "now"]):
        x, is_there = 0.3 + 1.15 * i, i in (1, 3)
        color = ORANGE if i == 3 else BLUE if is_there else GRAY
        box(ax, x, 2.7, 0.95, 0.55, name, color, fontsize=9, alpha=0.18 if is_there else 0.04)
        if is_there:
            arrow(ax, (x + 0.475, 2.7), (x + 0.475, 2.42), color)
            row(ax, x + 0.04, 2.12, 4, color)
        else:
            ax.text(x + 0.475, 2.25, "empty slot", ha="center", va="center", fontsize=9, color=GRAY)
        arrow(ax, (x + 0.475, 2.05), (x + 0.475, 1.75), color)
    box(ax, 0.3, 1.15, 4.4, 0.6, "causal transformer: a frame sees those before it", BLUE)
    arrow(ax, (4.23, 1.15), (4.23, 0.8), ORANGE)
    ax.text(4.05, 0.95, "the newest frame's", ha="right", va="center", fontsize=9, color=INK)
    box(ax, 3.75, 0.3, 0.95, 0.5, "head", ORANGE)
    arrow(ax, (4.7, 0.55), (5.35, 0.55), ORANGE)
    ax.text(0.3, 0.35, "goal, instruction or the robot's\nstate: FiLM in the encoder", fontsize=9)
    for j, (middle, width) in enumerate([(6, 1.6), (11, 2.2)]):
        bins = np.exp(-(((np.arange(16) - middle) / width) ** 2) / 2)
        base = 0.3 + 1.5 * j
        for i, height in enumerate(bins):
            box(ax, 5.4 + 0.17 * i, base, 0.13, 0.06 + 0.8 * height, "", ORANGE, alpha=0.5)
        ax.text(5.4, base + 1.02, f"number {2 - j} of the action: bins", fontsize=9)
        place = 5.465 + 0.17 * int(bins.argmax())
        ax.text(place, base - 0.05, "the likeliest", ha="center", va="top", fontsize=8)
    return figure


def draw_packages() -> Figure:
    """The packages as floors of a house: a package imports from the floors below it."""
    figure, ax = sheet(8.4, 4.75)
    floors: list[list[tuple[str, str, str]]] = [
        [("utils", "arguments, files, seeds", GRAY)],
        [("layers", "the paper's modules", ORANGE), ("data", "images and videos", BLUE)],
        [("models", "named models, hosts, insertion", ORANGE)],
        [("checkpoints", "weights of others", GREEN), ("evaluation", "accuracy, cost, maps", SKY)],
        [
            ("deploy", "exported files, int8", GREEN),
            ("training", "train, distill, calibrate", BLUE),
        ],
        [("commands", "what `tokenlearner ...` runs", RED)],
    ]
    for floor, packages in enumerate(floors):
        width = 6.4 / len(packages)
        for i, (name, what, color) in enumerate(packages):
            x, y = 0.35 + i * width, 0.15 + 0.77 * floor
            box(ax, x, y, width - 0.1, 0.62, "", color)
            ax.text(x + 0.15, y + 0.31, name, va="center", weight="bold")
            ax.text(x + width - 0.25, y + 0.31, what, va="center", ha="right", fontsize=9)
    arrow(ax, (7.15, 4.6), (7.15, 0.2))
    ax.text(7.3, 2.4, "imports\ngo down", va="center", fontsize=10)
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "how": draw_how,
    "cost": draw_cost,
    "versions": draw_versions,
    "fuser": draw_fuser,
    "insertion": draw_insertion,
    "stream": draw_stream,
    "kept": draw_kept,
    "connector": draw_connector,
    "policy": draw_policy,
    "packages": draw_packages,
}


def main(folder: Path = FOLDER) -> None:
    """Write all drawings as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(SETTINGS):
        for name, draw in DRAWINGS.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
