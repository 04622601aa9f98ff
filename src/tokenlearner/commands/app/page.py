"""The page itself: its controls, and what happens when one of them is changed."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .._inputs import MapInput
from .inference import ALL_TOKENS, Prediction, measure_cost, predict
from .models import RANDOM, OfferedModel
from .uploads import UploadLimits, read_upload
from .view import (
    cost_view,
    map_view,
    no_maps_view,
    numbers_view,
    prediction_view,
    sheet_view,
    status_view,
)

_HOUR = 3600  # after which uploads are deleted, in seconds
TITLE = "Where the learned tokens look"
# Gradio has no attributes for these. The file field's button is otherwise named by its text only.
ON_LOAD = """() => {
  document.documentElement.lang = "en";
  const status = document.getElementById("tl-status");
  status.setAttribute("role", "status");
  status.setAttribute("aria-live", "polite");
}"""

Taken = tuple[Prediction, Tensor, bool]  # what is shown, what the model took, is it random


class AppPage:
    """The page's parts and what they do; one visitor's file is looked at at a time.

    Args:
        models: What is offered, by name.
        limits: What an upload may have.
    """

    def __init__(self, models: Mapping[str, OfferedModel], limits: UploadLimits):
        self.models, self.limits = models, limits

    def build(self) -> Any:
        """Makes the page, for `launch`."""
        import gradio as gr

        told: dict[str, Any] = {"title": TITLE, "analytics_enabled": False, "fill_width": True}
        with gr.Blocks(delete_cache=(_HOUR, _HOUR), **told) as page:
            gr.Markdown(f"# {TITLE}")
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    self._add_controls(gr)
                with gr.Column(scale=5, min_width=320):
                    self._add_views(gr)
            self._connect(gr, page)
        return page

    def _add_controls(self, gr: Any) -> None:
        first = next(iter(self.models.values()))
        most = self.limits
        self.model = gr.Dropdown([*self.models], value=first.name, label="Model", filterable=False)
        self.file = gr.File(label="Image or clip of yours", height=150, elem_id="tl-file")
        gr.Markdown(
            f"PNG, JPEG, WebP, GIF, BMP, TIFF, or MP4, MOV, WebM, MKV, AVI; up to {most.mib} MiB, "
            f"{most.pixels / 1e6:g} million pixels, {most.frames} frames, {most.seconds} seconds. "
            "It stays on the computer that runs this page, and is deleted at the end."
        )
        self.example = gr.Dropdown(
            first.examples,
            value=next(iter(first.examples), None),
            label="Or an example",
            visible=bool(first.examples),
            filterable=False,
        )
        self.token = gr.Radio([ALL_TOKENS], value=ALL_TOKENS, label="Token shown", visible=False)
        self.block = gr.Dropdown([], label="Learned at block", visible=False, filterable=False)
        self.frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False)
        self.again = gr.Button("Measure the cost again")

    def _add_views(self, gr: Any) -> None:
        self.status = gr.HTML(elem_id="tl-status")
        self.map, self.prediction, self.cost = gr.HTML(), gr.HTML(), gr.HTML()
        self.sheet, self.numbers = gr.HTML(), gr.HTML()
        self.state = gr.State(None)

    def _connect(self, gr: Any, page: Any) -> None:
        """One thing at a time runs on the models, of all visitors."""
        told: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "show_progress": "minimal",
            "api_visibility": "private",
        }
        chosen = [self.model, self.file, self.example]
        views = [self.map, self.sheet, self.numbers]
        looked = [
            *(self.state, self.status, self.prediction, *views),
            *(self.token, self.block, self.frame, self.example),
        ]
        ways = ((page.load, False), (self.model.input, False), (self.file.upload, False))
        for event, is_example in (*ways, (self.example.input, True), (self.file.clear, False)):
            inputs, outputs = chosen, [*looked, self.file]
            event(partial(self.look, is_example), inputs, outputs, **told).then(
                self.measure, [self.model, self.state], [self.cost], **told
            )
        for control in (self.token, self.block, self.frame):
            inputs = [self.state, self.block, self.token, self.frame]
            outputs = [*views, self.token, self.status]
            redraw = partial(self.redraw, control is self.block)
            control.input(redraw, inputs, outputs, trigger_mode="always_last", **told)
        self.again.click(self.measure, [self.model, self.state], [self.cost], **told)

    def look(
        self, is_example: bool, model: str, file: str | None, example: str | None
    ) -> tuple[Any, ...]:
        """Looks at the file, or at the example: what the whole page shows then, but for the cost.

        Args:
            is_example: Whether the example was chosen just now; the file is then let go.
            model: The model's name.
            file: Where the upload is.
            example: Its name.
        """
        import gradio as gr

        offered = self.models.get(model) or next(iter(self.models.values()))
        path = None if is_example or not file else Path(file)
        names = offered.examples
        example = None if path else example if example in names else next(iter(names), None)
        shown = gr.update(choices=names, value=example, visible=bool(names))
        kept = gr.update(value=None) if is_example else gr.update()
        try:
            seen, said = self._read(offered, path, example)
            looked = predict(offered, seen)
            label = example if path is None and offered.knows_examples else None
            drawn = self._drawn(offered, looked, label)
        except Exception as error:
            hidden = gr.update(visible=False)
            return None, _complaint(error), *[""] * 4, hidden, hidden, hidden, shown, kept
        status = _status([_outcome(offered, looked), *said], offered.is_random)
        return (
            (looked, seen.taken, offered.is_random),
            status,
            *drawn,
            *self._choices(gr, looked),
            shown,
            kept,
        )

    def redraw(
        self, is_block: bool, state: Taken | None, block: str | None, token: str, frame: float
    ) -> tuple[Any, ...]:
        """Shows another token, frame or, with `is_block`, block of what was looked at."""
        import gradio as gr

        if state is None or not state[0].maps:
            return (*[gr.update()] * 4, gr.update())
        looked, _, is_random = state
        block = block if block in looked.blocks else looked.blocks[0]
        tokens = looked.tokens(block)
        token = token if token in tokens else ALL_TOKENS
        at = min(max(1, round(frame or 1)), looked.frames)
        try:
            views = _views(looked, block, token, at)
        except Exception as error:
            return (*[gr.update()] * 4, _complaint(error))
        named = "all tokens" if token == ALL_TOKENS else f"token {token}"
        when = f", frame {at} of {looked.frames}" if looked.is_video else ""
        # The tokens are told only where they change, since the keyboard's focus would be lost.
        told = gr.update(choices=tokens, value=token) if is_block else gr.update()
        return *views, told, _status([f"{looked.name}{when}: {named}."], is_random)

    def measure(self, model: str, state: Taken | None) -> str:
        """Measures the cost of what is shown."""
        offered = self.models.get(model)
        if state is None or offered is None:
            return ""
        try:
            return cost_view(measure_cost(offered, state[1]))
        except Exception as error:
            return _complaint(error)

    def _read(
        self, offered: OfferedModel, path: Path | None, example: str | None
    ) -> tuple[MapInput, Sequence[str]]:
        if path is not None:
            return read_upload(path, offered.intake, self.limits)
        if example is not None:
            return offered.example(example), []
        what = "clip" if offered.intake.takes_clips else "image or clip"
        raise ValueError(f"choose a {what} to look at")

    def _drawn(
        self, offered: OfferedModel, looked: Prediction, label: str | None
    ) -> tuple[str, str, str, str]:
        prediction = prediction_view(offered, looked, label)
        if not looked.maps:
            return prediction, no_maps_view(), "", ""
        return prediction, *_views(looked, looked.blocks[0], ALL_TOKENS, 1)

    def _choices(self, gr: Any, looked: Prediction) -> tuple[Any, Any, Any]:
        """The token, the block and the frame that can be chosen."""
        blocks, has_maps = looked.blocks, bool(looked.maps)
        tokens = looked.tokens(blocks[0]) if has_maps else [ALL_TOKENS]
        return (
            gr.update(choices=tokens, value=ALL_TOKENS, visible=has_maps),
            gr.update(choices=blocks, value=next(iter(blocks), None), visible=len(blocks) > 1),
            gr.update(maximum=max(2, looked.frames), value=1, visible=looked.frames > 1),
        )


def _views(looked: Prediction, block: str, token: str, frame: int) -> tuple[str, str, str]:
    shown = map_view(looked, block, token, frame)
    return shown, sheet_view(looked, frame), numbers_view(looked, frame)


def _outcome(offered: OfferedModel, looked: Prediction) -> str:
    top = offered.class_name(int(looked.shares.argmax()))
    return f"{looked.name}: {offered.name} says {top}, {100 * float(looked.shares.max()):.0f} %."


def _status(said: Sequence[str], is_random: bool) -> str:
    """What to announce; whatever is shown of random weights, they are named."""
    return status_view("warning", [*said, RANDOM]) if is_random else status_view("said", said)


def _complaint(error: Exception) -> str:
    """A message for the visitor; what nobody expected is told in full to the terminal."""
    if isinstance(error, ValueError):
        return status_view("error", [str(error)])
    print("".join(traceback.format_exception(error)), file=sys.stderr)
    message = f"This went wrong on the server ({type(error).__name__}); try another file."
    return status_view("error", [message])
