"""What the page shows, as HTML: every image has an alternative text, every name is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...evaluation.map_figures import overlay
from .inference import ALL_TOKENS, AT_ONCE, CostReport, Prediction
from .models import OfferedModel

SHOWN_CLASSES = 5
_LEAST_SIDE = 448  # to which small images are enlarged, without smoothing

STYLE = """
.tl-figures {display: flex; flex-wrap: wrap; gap: 16px}
.tl-figures figure {flex: 1 1 240px; max-width: 480px; margin: 0}
.tl-figures img {width: 100%; image-rendering: pixelated; border-radius: 4px}
.tl-view figcaption, .tl-view p {margin: 6px 0; color: var(--body-text-color)}
.tl-view h2 {font-size: 1.15em; font-weight: 600; margin: 4px 0 8px; color: var(--body-text-color)}
.tl-bar {max-width: 976px; display: flex; align-items: center; gap: 10px; margin: 10px 0 4px}
.tl-bar span {white-space: nowrap}
.tl-bar img {height: 16px; flex: 1 1 auto; min-width: 80px}
.tl-wide {overflow-x: auto}
.tl-tokens {display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 10px;
  max-width: 976px}
.tl-tokens figure {margin: 0; text-align: center}
.tl-tokens img {width: 100%; image-rendering: pixelated; border-radius: 3px}
.tl-view table {border-collapse: collapse; margin: 4px 0; color: var(--body-text-color)}
.tl-view th, .tl-view td {padding: 5px 20px 5px 0 !important; text-align: right;
  border-width: 0 0 1px !important; border-color: var(--border-color-primary) !important;
  white-space: nowrap}
.tl-view table, .tl-view tr {border-width: 0 !important}
.tl-view th:first-child, .tl-view td:first-child {text-align: left}
.tl-view thead th {font-weight: 600}
.tl-view tbody th {font-weight: 400}
.tl-share {display: inline-block; width: 160px; height: 12px; border-radius: 3px;
  background: var(--border-color-primary); vertical-align: middle; overflow: hidden}
.tl-share i {display: block; height: 100%; background: #2563eb}
.tl-said {border-left: 4px solid #2563eb; padding: 6px 12px; margin: 0}
.tl-error {border-left-color: #dc2626; font-weight: 600}
.tl-warning {border-left-color: #d97706}
"""


def status_view(kind: str, sentences: Iterable[str]) -> str:
    """What there is to say, each sentence on its own line; `kind` is said, warning or error."""
    role = ' role="alert"' if kind == "error" else ""
    lines = "<br>".join(escape(one) for one in sentences)
    return f'<div class="tl-view"><p class="tl-said tl-{kind}"{role}>{lines}</p></div>'


def prediction_view(offered: OfferedModel, looked: Prediction, label: str | None = None) -> str:
    """The classes with the largest shares, as a table with bars."""
    shares, classes = looked.shares.topk(min(SHOWN_CLASSES, len(looked.shares)))
    rows = [
        f"<tr><th scope=row>{escape(offered.class_name(number))}</th>"
        f"<td><span class=tl-share aria-hidden=true><i style='width:{100 * share:.1f}%'></i></span>"
        f"</td><td>{100 * share:.1f} %</td></tr>"
        for share, number in zip(shares.tolist(), classes.tolist(), strict=True)
    ]
    of_frames = looked.is_video and not offered.intake.takes_clips
    over = f" Mean over {looked.frames} frames." if of_frames else ""
    known = f" A held-out example; its label is {label}." if label else ""
    unnamed = "" if offered.classes else " The classes' names are not known."
    return _section(
        "Prediction",
        f"<table><thead><tr><th scope=col>class</th><th></th><th scope=col>share</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table><p>{escape(over + known + unnamed)}</p>",
    )


def map_view(looked: Prediction, block: str, token: str, frame: int) -> str:
    """The image, one token's map over it, and what its colors mean."""
    row = looked.rows(frame)[looked.blocks.index(block)]
    shown, when = looked.shown(block, token, frame), _when(looked, frame)
    is_sum = token == ALL_TOKENS
    named = f"the mean of all {len(row.maps)} tokens" if is_sum else f"token {token}"
    plain = row.image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    size = " × ".join(map(str, looked.seen.shape[-2:]))
    before = f"{looked.name}{when}, as the model gets it: {size} pixels."
    where = _where(shown, looked.scale.gates)
    over = overlay(row.image, shown, looked.scale)
    left = _figure(plain, before, before, _LEAST_SIDE)
    right = _figure(over, f"Map of {named} over the image{when}. {where}", where, _LEAST_SIDE)
    title = f"Where {'all tokens look' if is_sum else f'token {token} looks'}{when}"
    return _section(title, f"<div class=tl-figures>{left}{right}</div>{_bar(looked)}")


def sheet_view(looked: Prediction, frame: int) -> str:
    """All maps of a frame side by side, of each block and of their sum."""
    parts = []
    for block, row in zip(looked.blocks, looked.rows(frame), strict=True):
        shown = [*looked.scale.shown(row.maps)]
        named = [*(f"token {i + 1}" for i in range(len(row.maps))), f"sum / {len(row.maps)}"]
        figures = "".join(
            _figure(overlay(row.image, one, looked.scale), f"Map of {name}. {where}", name, 140)
            for name, one in zip(named, shown, strict=True)
            if (where := _where(one, looked.scale.gates))
        )
        parts.append(f"<p>Learned at block {block}:</p><div class=tl-tokens>{figures}</div>")
    return _section(f"All tokens{_when(looked, frame)}", "".join(parts))


def numbers_view(looked: Prediction, frame: int) -> str:
    """What each token looks at, and how far tokens differ."""
    parts = []
    for row, (block, one) in zip(looked.rows(frame), looked.stats.items(), strict=True):
        shown = looked.scale.shown(row.maps)[:-1]
        lines = [
            (str(i + 1), _peak(shown[i]), f"{100 * share:.0f} %", f"{max(others):.2f}")
            for i, share in enumerate(one.effective_share)
            if (others := [x for j, x in enumerate(one.pairs[i]) if j != i] or [0.0])
        ]
        heads = ("token", "strongest at", "spreads over", "most alike")
        mean = "" if one.overlap is None else f"Overlap of two tokens, mean: {one.overlap:.2f}. "
        said = (f"Warning: {text}." for text in one.warnings())
        over = one.over_frames
        stays = f"From frame to frame: {sum(over) / len(over):.2f}. " if over else ""
        parts.append(
            f"<p>Block {block}: {len(row.maps)} tokens of {one.grid[0]} × {one.grid[1]} positions. "
            f"{mean}{stays}{escape(' '.join(said))}</p>{_table(heads, lines)}"
        )
    note = (
        "Overlap (Bhattacharyya) is 1 for the same map and 0 for maps that share no position; "
        "maps that are nearly even overlap by 0.9 and more. Most alike: the largest overlap with "
        "another token. Spreads over: the share of the image that a map covers in effect."
    )
    return _section("In numbers", f"{''.join(parts)}<p>{note}</p>")


def cost_view(report: CostReport) -> str:
    """The cost with and without learned tokens, and how it was measured."""
    heads = ["", "GMACs", "one, ms", "speed-up", f"{AT_ONCE} at once, ms", "speed-up"]
    lines = []
    for one in report.costs:
        cells = (one.latency_ms, one.speedup, one.batch_latency_ms, one.batch_speedup)
        digits = (2, 2, 1, 2)
        pairs = zip(cells, digits, strict=True)
        spreads = (f"{spread:.{n}f}" if spread else "–" for spread, n in pairs)
        lines.append((one.name, f"{one.gmacs:.4f}", *spreads))
    macs = [one.gmacs for one in report.costs]
    fewer = f"{macs[0] / macs[1]:.2f} times fewer multiply-adds. " if len(macs) > 1 else ""
    how = (
        f"{fewer}{report.remark} Measured now on {report.size}, {report.rounds} runs of each in "
        f"turn: medians (and quartiles). {report.machine}. Other programs and small models, in "
        "which the calls cost more than the arithmetic, blur the speed-up. Without: the same "
        "model, its learners taken out; it was not trained so, and only its cost is right."
    )
    return _section("Cost", f"{_table(heads, lines)}<p>{escape(how)}</p>")


def no_maps_view() -> str:
    """In place of maps, for a model without learned tokens."""
    text = "This model has no learned tokens, so there are no maps. Choose another one to see some."
    return _section("Where tokens look", f"<p>{text}</p>")


def _section(title: str, content: str) -> str:
    return f'<section class="tl-view"><h2>{escape(title)}</h2>{content}</section>'


def _table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    rows = []
    for first, *others in lines:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        rows.append(f"<tr><th scope=row>{escape(first)}</th>{cells}</tr>")
    return (
        f'<div class="tl-wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(looked: Prediction) -> str:
    """The colors over middle gray, and what they stand for."""
    ramp = torch.linspace(0, looked.scale.top, 256)[None]
    pixels = overlay(torch.full((1, 1, 256), 0.5), ramp, looked.scale)
    label = " ".join(looked.scale.label.split())
    top = f"{looked.scale.top:.3g}{'' if looked.scale.gates else ' or more'}"
    alt = f"Colors from dark blue for 0 to yellow for {top}"
    note = "One square is one position of the grid; nothing is smoothed."
    return (
        f'<div class="tl-bar"><span>0</span>{_image(pixels, alt, 1)}<span>{top}</span></div>'
        f"<p>Colors: {escape(label)}. {note}</p>"
    )


def _when(looked: Prediction, frame: int) -> str:
    return f", frame {frame} of {looked.frames}" if looked.is_video else ""


def _figure(pixels: Any, alt: str, caption: str, least: int) -> str:
    image = _image(pixels, alt, least)
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _where(shown: Tensor, gates: bool) -> str:
    """A map in words."""
    most = float(shown.max())
    amount = f"a gate of {most:.2f}" if gates else f"{most:.1f} times the even share"
    share = float(shown.max() / shown.sum().clamp(min=1e-9))
    return f"Strongest at {_peak(shown)}: {amount}, {100 * share:.0f} % of its weight."


def _peak(shown: Tensor) -> str:
    h, w = shown.shape
    row, column = divmod(int(shown.argmax()), w)
    return f"row {row + 1} of {h}, column {column + 1} of {w}"


def _image(pixels: Any, alt: str, least: int) -> str:
    """An image in the page itself, enlarged without smoothing."""
    from PIL import Image

    values = (np.asarray(pixels).clip(0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(values)
    if times := least // max(image.size):
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<img src="{source}" alt="{escape(alt)}">'
