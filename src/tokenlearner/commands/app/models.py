"""The models that the page offers, and the images that each can be tried on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...data.factory import load_data
from ...models.insertion import wrapped_blocks
from ...models.serialization import WEIGHTS
from ...utils.validation import require
from .._inputs import InputPipeline, MapInput, input_pipeline
from .._models import load_sized
from ..eval import run_options
from .uploads import preprocess

WITHOUT_CHECKPOINT = "vit_mini_patch4_tl8at3_28"  # its weights are random
RANDOM = (
    "This model has random weights: its maps and its prediction show nothing learned. Run "
    "`tokenlearner demo`, which trains one in minutes, and start the page again in the same folder."
)
_DEMOS = "tokenlearner-demo*"
_BUNDLED = "fashion-mnist-small"
_STILL, _MOVING = ("fashion-mnist-small", "fashion-mnist"), "moving-photographs"
_EXAMPLES = 10


@dataclass(frozen=True, eq=False)
class OfferedModel:
    """A model of the page.

    Args:
        name: What it is called there.
        model: In evaluation mode.
        intake: How it takes images or clips.
        classes: The names of its classes; None where they are not known.
        is_random: Whether its weights are as they started.
        data: Held-out images or clips that it can be tried on.
    """

    name: str
    model: nn.Module
    intake: InputPipeline
    classes: tuple[str, ...] | None
    is_random: bool
    data: Any

    @property
    def has_tokens(self) -> bool:
        """Whether it has learned tokens to look at."""
        return bool(wrapped_blocks(self.model))

    def class_name(self, number: int) -> str:
        """Names a class, counted from 0."""
        return self.classes[number] if self.classes else f"class {number}"

    @property
    def examples(self) -> list[str]:
        """The classes that there is an example of, the first held-out image or clip of each."""
        return list(self.data.classes[:_EXAMPLES]) if self.data is not None else []

    @property
    def knows_examples(self) -> bool:
        """Whether the examples' classes are those that it was trained on."""
        return self.data is not None and self.classes == tuple(self.data.classes)

    def example(self, name: str) -> MapInput:
        """Reads the example of a class.

        Raises:
            ValueError: There is none of that name.
        """
        known = ", ".join(self.examples) or "none"
        require(name in self.examples, f"there is no example {name!r}, expected one of: {known}")
        index = int((self.data.labels == self.data.classes.index(name)).nonzero()[0])
        raw = self.data.load(index)
        if not self.intake.takes_clips:
            return preprocess(raw, name, self.intake)
        clip = self.data.eval_transform(raw)  # c t h w
        taken = clip.transpose(0, 1) if self.intake.time_first else clip
        return MapInput(name, raw.float() / 255, taken[None], is_video=True)


def offered_sources(checkpoints: Sequence[str]) -> dict[str, str]:
    """Finds what the page offers: a name for each, and what to load.

    A folder that `tokenlearner demo` wrote stands for the models in it. Without any checkpoint the
    demos of the working folder are taken, and a model with random weights where there is none.
    """
    told = [*checkpoints] or sorted(str(path) for path in Path().glob(_DEMOS) if path.is_dir())
    found: dict[str, str] = {}
    for source in told:
        path = Path(source).expanduser()
        parts = [] if (path / WEIGHTS).exists() else sorted(path.glob(f"*/{WEIGHTS}"))
        inner = {f"{path.name}/{part.parent.name}": str(part.parent) for part in parts}
        for name, where in (inner or {path.name or source: source}).items():
            found[name if name not in found else where] = where
    return found or {WITHOUT_CHECKPOINT: WITHOUT_CHECKPOINT}


def load_offered(checkpoints: Sequence[str], device: str) -> dict[str, OfferedModel]:
    """Loads the models of the page, those with learned tokens first.

    Raises:
        ValueError: There is no such model or device, or it does not take images or clips.
    """
    models = [_load(name, source, device) for name, source in offered_sources(checkpoints).items()]
    models.sort(key=lambda one: not one.has_tokens)
    return {one.name: one for one in models}


def _load(name: str, source: str, device: str) -> OfferedModel:
    saved = "/" in source or source.endswith(".safetensors") or Path(source).exists()
    try:
        model, size = load_sized(source, 0, device)
        intake = input_pipeline(model, size, source)
    except FileNotFoundError as error:
        raise ValueError(f"{source} cannot be read ({error}); pass a checkpoint") from error
    here = Path(source).expanduser().exists()
    run = run_options(source) if here else {}
    data = _examples(run, intake)
    classes = _classes(run, model, data)
    shown = name if saved else f"{name} (random weights)"
    return OfferedModel(shown, model.eval(), intake, classes, not saved, data)


def _examples(run: dict[str, Any], intake: InputPipeline) -> Any:
    """Held-out images of the set that a model was trained on, or of the package; or clips."""
    name, wanted = _BUNDLED, dict[str, Any]()
    if intake.takes_clips:
        c, t, size, _ = intake.size
        name, wanted = _MOVING, {"img_size": size, "frames": t, "in_chans": c}
    elif run.get("data") in _STILL:
        name, wanted = run["data"], {"root": run.get("root")}
    try:
        return load_data(name, "test", **wanted)
    except ValueError:  # the set is not on this machine
        return None


def _classes(run: dict[str, Any], model: Any, data: Any) -> tuple[str, ...] | None:
    """The names of a model's classes, of its data set or of its timm configuration."""
    n = getattr(model, "num_classes", None)
    names: Any = None
    if data is not None and run.get("data") == data.name:
        names = data.classes
    elif run.get("data") in ("folder", "video-folder"):
        names = _classes_of_folder(run)
    names = names or (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return tuple(names) if names and len(names) == n else None


def _classes_of_folder(run: dict[str, Any]) -> tuple[str, ...] | None:
    try:
        return load_data(run["data"], "test", root=run.get("root")).classes
    except ValueError:  # the folder is not on this machine
        return None
