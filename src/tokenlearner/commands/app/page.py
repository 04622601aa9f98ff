"""The page: Gradio's components, and what happens when one of them is used.

Names of files and classes are text of strangers: they are escaped, or go to components that show
plain text, never to Markdown.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...utils.io import FULL, system_error, without_folders
from ...utils.validation import plain_text
from .._inputs import MapInput
from .inference import COST_HEADERS, Prediction, measure_cost, predict
from .models import RANDOM, OfferedModel
from .uploads import UploadLimits, WrongModel, delete_upload, read_upload
from .view import NUMBER_HEADERS, map_images, map_notes, map_numbers, to_pil, when

_HOUR = 3600  # after which uploads are deleted, in seconds
_WAITING = 40  # events, of all visitors; others are refused
TITLE = "Where the learned tokens look"
# Gradio has no arguments for these.
ON_LOAD = """() => {
  document.documentElement.lang = "en";
  const status = document.getElementById("status");
  status.setAttribute("role", "status");
  status.setAttribute("aria-live", "polite");
}"""
NO_MAPS = "This model has no learned tokens, so there are no maps. Choose another one to see some."

State = tuple[str, Prediction]  # the model's name, and what it made of the image that is shown
Updates = dict[Any, Any]  # by component


class AppPage:
    """The page of several models; one image or clip at a time runs on them, of all visitors.

    Args:
        models: The models by name.
        limits: Limits of an upload.
    """

    def __init__(self, models: Mapping[str, OfferedModel], limits: UploadLimits):
        self.models, self.limits = models, limits
        kwargs: dict[str, Any] = {"analytics_enabled": False, "fill_width": True}
        with gr.Blocks(title=TITLE, delete_cache=(_HOUR, _HOUR), **kwargs) as self.blocks:
            gr.Markdown(f"# {TITLE}")
            self.example, self.state = gr.State(None), gr.State(None)
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    self._add_inputs()
                with gr.Column(scale=2, min_width=320):
                    self._add_outputs()
            self._connect()
        self.blocks.queue(max_size=_WAITING)

    def _add_inputs(self) -> None:
        names, limits = [*self.models], self.limits
        self.model: Any = gr.Dropdown(names, value=names[0], label="Model", filterable=False)
        self.file: Any = gr.File(label="Image or clip of yours", height=150, elem_id="file")
        most = (
            f"{limits.max_upload_mib} MiB, {limits.max_pixels / 1e6:g} million pixels, "
            f"{limits.max_frames} frames, {limits.max_seconds} seconds"
        )
        gr.Markdown(
            f"PNG, JPEG, WebP, GIF, BMP, TIFF, or MP4, MOV, WebM, MKV, AVI; up to {most}. "
            "It stays on the computer that runs this page, and is deleted within two hours."
        )
        self.examples = _gallery("Or a held-out example", "examples", allow_preview=False)

    def _add_outputs(self) -> None:
        self.status = gr.HTML(elem_id="status")
        self.prediction = gr.Label(num_top_classes=5, label="Prediction", show_heading=False)
        self.block: Any = gr.Dropdown(label="Learned at block", visible=False, filterable=False)
        self.frame: Any = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False)
        self.maps = _gallery("Maps (choose one to enlarge it)", "maps")
        self.numbers = gr.Dataframe(
            headers=[*NUMBER_HEADERS], label="In numbers", interactive=False
        )
        self.notes = gr.Markdown()
        self.button: Any = gr.Button("Measure cost", visible=False)
        self.cost = gr.Dataframe(headers=[*COST_HEADERS], interactive=False, visible=False)
        self.cost_notes = gr.Markdown()

    def _connect(self) -> None:
        options: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}
        options["concurrency_limit"] = 1
        running: dict[str, Any] = options | {"concurrency_id": "models"}
        views = [self.maps, self.numbers, self.notes]
        shown = [self.state, self.status, self.prediction, self.block, self.frame, *views]
        costs = [self.button, self.cost, self.cost_notes]
        outputs = [*shown, *costs, self.file, self.example, self.examples]
        new = [self.blocks.load, self.model.input, self.file.upload, self.file.clear]
        gr.on(new, self.look, [self.model, self.file, self.example], outputs, **running)
        self.examples.select(self.look_at_example, [self.model], outputs, **running)
        redrawing: dict[str, Any] = running | {"trigger_mode": "always_last"}
        for control in (self.block, self.frame):
            inputs = [self.state, self.block, self.frame]
            control.input(self.redraw, inputs, [*views, self.status], **redrawing)
        self.button.click(self.measure, [self.state], costs, concurrency_id="cost", **options)

    def look_at_example(self, model: str, event: gr.SelectData) -> Updates:
        """Looks at the example that was chosen, and lets the file go."""
        name = [*self._offered(model).examples][event.index]
        return self.look(model, None, name) | {self.file: None}

    def look(self, model: str, file: str | None, example: str | None) -> Updates:
        """Looks at the file, or without one at the example.

        Args:
            model: The model's name.
            file: Path of the upload.
            example: Its name; of a model that has none of this name the first is taken.
        """
        offered = self._offered(model)
        updates = self._cleared() | self._list_examples(offered)
        try:
            if file:
                image, remarks = self._read(Path(file), offered)
            else:
                first = next(iter(offered.examples.values()), None)
                image, remarks = offered.examples.get(example or "", first), []
            if image is None:
                raise ValueError("choose an image or a clip to look at")
            prediction = predict(offered, image)
            updates |= {self.example: None if file else image.name}
            return updates | self._predicted(offered, prediction, remarks, is_example=not file)
        except Exception as error:
            deleted = {self.file: None} if file and not Path(file).exists() else {}
            return updates | deleted | {self.status: _error(error)}

    def _read(self, path: Path, offered: OfferedModel) -> tuple[MapInput, list[str]]:
        """Reads an upload, and deletes what no model takes."""
        try:
            return read_upload(path, offered.pipeline, self.limits)
        except WrongModel:
            raise
        except Exception:
            delete_upload(path)
            raise

    def redraw(self, state: State | None, block: str | None, frame: float | None) -> Updates:
        """Shows another block or frame of what was looked at."""
        if state is None or not state[1].maps:
            return {self.status: gr.skip()}
        name, prediction = state
        blocks = [str(block) for block in prediction.maps]
        block = block if block in blocks else blocks[0]
        number = min(max(1, round(frame or 1)), prediction.frames)
        text = f"{prediction.image.name}{when(prediction, number)}, block {block}."
        status = _status([text], self._offered(name))
        return self._views(prediction, int(block), number) | {self.status: status}

    def measure(self, state: State | None) -> Updates:
        """Measures the cost of what is shown."""
        if state is None:
            return {self.cost_notes: "Choose an image or a clip first."}
        name, prediction = state
        try:
            rows, notes = measure_cost(self._offered(name), prediction.image.model_input)
        except Exception as error:
            _log(error)
            return {self.cost_notes: f"The cost could not be measured ({type(error).__name__})."}
        cost = gr.update(value=rows, label=f"Cost of {name}", visible=True)
        return {self.cost: cost, self.cost_notes: notes}

    def _offered(self, name: str) -> OfferedModel:
        return self.models.get(name) or next(iter(self.models.values()))

    def _list_examples(self, offered: OfferedModel) -> Updates:
        items = [
            (to_pil(example.pixels[len(example.pixels) // 2]), name)
            for name, example in offered.examples.items()
        ]
        update = gr.update(value=items, visible=bool(items))
        return {self.examples: update, self.example: None}

    def _cleared(self) -> Updates:
        """Empties the page."""
        hidden = gr.update(value=None, visible=False)
        empty = dict.fromkeys((self.prediction, self.maps, self.numbers, self.cost), hidden)
        texts = dict.fromkeys((self.notes, self.cost_notes), "")
        controls = dict.fromkeys((self.block, self.frame, self.button), gr.update(visible=False))
        return {self.state: None, **empty, **texts, **controls}

    def _predicted(
        self, offered: OfferedModel, prediction: Prediction, remarks: list[str], *, is_example: bool
    ) -> Updates:
        source = "held-out example, " if is_example else ""
        says, named = "has no classifier", None
        if prediction.shares is not None:
            shares = prediction.shares.tolist()
            named = {offered.class_name(i): share for i, share in enumerate(shares)}
            best = max(named, key=named.__getitem__)
            says = f"says {best}, {100 * named[best]:.0f} %"
        text = f"{source}{prediction.image.name}: {offered.name} {says}."
        updates: Updates = {
            self.state: (offered.name, prediction),
            self.button: gr.update(visible=True),
            self.status: _status([text, *remarks], offered),
            self.prediction: gr.update(value=named, visible=named is not None),
        }
        if not prediction.maps:
            return updates | {self.notes: NO_MAPS}
        blocks = [str(block) for block in prediction.maps]
        choices = gr.update(choices=blocks, value=blocks[0], visible=len(blocks) > 1)
        frames = prediction.frames
        slider = gr.update(maximum=max(2, frames), value=1, visible=frames > 1)
        views = self._views(prediction, int(blocks[0]), 1)
        return updates | views | {self.block: choices, self.frame: slider}

    def _views(self, prediction: Prediction, block: int, frame: int) -> Updates:
        """Shows the maps of a block in a frame, as images and as numbers."""
        images = map_images(prediction, block, frame)
        numbers = map_numbers(prediction, block, frame)
        return {
            self.maps: gr.update(value=images, visible=True),
            self.numbers: gr.update(value=numbers, visible=True),
            self.notes: map_notes(block, prediction.stats[block]),
        }


def _gallery(label: str, elem_id: str, **options: Any) -> Any:
    shared: dict[str, Any] = {"columns": 3, "height": "auto", "format": "png", "interactive": False}
    return gr.Gallery(label=label, elem_id=elem_id, buttons=[], **shared, **options)


def _status(sentences: list[str], offered: OfferedModel) -> str:
    """Writes sentences as HTML; whatever is shown of random weights, they are named."""
    return "<br>".join(
        escape(plain_text(s)) for s in [*sentences, *([RANDOM] if offered.is_random else [])]
    )


def _error(error: Exception) -> str:
    """Makes a message for the visitor; what nobody expected is printed in full in the terminal."""
    message = without_folders(str(error))
    if system_error(error) in FULL:
        message = "The server's disk is full; ask whoever runs the page to make room."
    elif not isinstance(error, ValueError):
        _log(error)
        message = f"This went wrong on the server ({type(error).__name__}); try another file."
    return f'<strong role="alert">{escape(plain_text(message))}</strong>'


def _log(error: Exception) -> None:
    print("".join(traceback.format_exception(error)), file=sys.stderr)
