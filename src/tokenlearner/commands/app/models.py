"""The models that the page offers, and the images or clips that each can be tried on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from ...data.dataset import UnreadableFile
from ...data.factory import load_data
from ...models.insertion import wrapped_blocks
from ...models.serialization import WEIGHTS
from .._inputs import InputPipeline, MapInput, input_pipeline
from .._models import load_sized
from .._runs import run_options, show_used

WITHOUT_CHECKPOINT = "vit_mini_patch4_tl8at3_28"  # its weights are random
RANDOM = (
    "This model has random weights: its maps and its prediction show nothing learned. Run "
    "`tokenlearner demo`, which trains one in minutes, and start the page again in the same folder."
)
_DEMOS = "tokenlearner-demo*"
_LOCAL = ("fashion-mnist-small", "fashion-mnist", "folder")  # data sets that ask no other computer
_LOCAL_CLIPS = ("moving-photographs", "video-folder")
_EXAMPLES = 10


@dataclass(frozen=True, eq=False)
class OfferedModel:
    """A model of the page.

    Args:
        name: Its name on the page.
        model: In evaluation mode.
        pipeline: How it takes images or clips.
        classes: The names of its classes; None where they are not known.
        is_random: Whether its weights are as they started.
        examples: Held-out images or clips that it can be tried on, by the name of their class.
    """

    name: str
    model: nn.Module
    pipeline: InputPipeline
    classes: tuple[str, ...] | None
    is_random: bool
    examples: dict[str, MapInput]

    @property
    def has_tokens(self) -> bool:
        """True if it has learned tokens to look at."""
        return bool(wrapped_blocks(self.model))

    def class_name(self, number: int) -> str:
        """Names a class, counted from 0; with its number where others have the same name."""
        if not self.classes:
            return f"class {number}"
        name = self.classes[number]
        return f"{name} ({number})" if self._counts[name] > 1 else name

    @cached_property
    def _counts(self) -> Counter[str]:
        """How many classes have a name; there may be 20,000 of them."""
        return Counter(self.classes or ())


def offered_sources(checkpoints: Sequence[str]) -> dict[str, str]:
    """Lists what the page offers: a name for each model, and what to load.

    A folder that `tokenlearner demo` wrote stands for the models in it. Without any checkpoint the
    demos of the working folder are taken, and a model with random weights where there is none.
    """
    sources = [*checkpoints] or sorted(str(path) for path in Path().glob(_DEMOS) if path.is_dir())
    named: dict[str, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        parts = [] if (path / WEIGHTS).exists() else sorted(path.glob(f"*/{WEIGHTS}"))
        inner = {f"{path.name}/{part.parent.name}": str(part.parent) for part in parts}
        for name, place in (inner or {path.name or source: source}).items():
            number = next(n for n in count(1) if _numbered(name, n) not in named)
            named[_numbered(name, number)] = place  # which visitors do not see
    return named or {WITHOUT_CHECKPOINT: WITHOUT_CHECKPOINT}


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def load_offered(checkpoints: Sequence[str], device: str) -> dict[str, OfferedModel]:
    """Loads the models of the page, those with learned tokens first.

    Raises:
        ValueError: There is no such model or device, or it does not take images or clips.
    """
    models = [_load(name, source, device) for name, source in offered_sources(checkpoints).items()]
    models.sort(key=lambda offered: not offered.has_tokens)
    return {offered.name: offered for offered in models}


def _load(name: str, source: str, device: str) -> OfferedModel:
    path = Path(source).expanduser()
    is_random = not ("/" in source or source.endswith(".safetensors") or path.exists())
    try:
        model, size = load_sized(source, 0, device)
        pipeline = input_pipeline(model, size, source)
    except FileNotFoundError as error:
        raise ValueError(f"{source} cannot be read ({error}); pass a checkpoint") from error
    run = run_options(source) if path.exists() else {}
    data = _held_out(run, pipeline, is_random)
    if data is not None:
        show_used(source, {key: run[key] for key in ("data", "root", "stride") if key in run})
    config = getattr(model, "pretrained_cfg", None) or {}
    names = data.classes if run and data is not None else config.get("label_names") or ()
    knows_all = len(names) == getattr(model, "num_classes", None)
    classes = tuple(map(str, names)) if knows_all else None
    name = f"{name} (random weights)" if is_random else name
    return OfferedModel(name, model.eval(), pipeline, classes, is_random, _examples(data, pipeline))


def _held_out(run: dict[str, Any], pipeline: InputPipeline, is_random: bool) -> Any:
    """Loads the held-out part of the data that a model was trained on; None if it is not here.

    A model with random weights is tried on what comes with the package.
    """
    known = _LOCAL_CLIPS if pipeline.takes_clips else _LOCAL
    name = known[0] if is_random else str(run.get("data"))
    if name not in known:
        return None
    kwargs = {key: run[key] for key in ("root", "stride") if key in run}
    c, *frames, _, size = pipeline.size
    if pipeline.takes_clips:
        kwargs |= {"img_size": size, "in_chans": c, "frames": frames[0]}
    try:
        data = load_data(name, "val", **kwargs)
    except ValueError:  # the set is not on this machine
        return None
    return None if is_random and tuple(data.shape) != pipeline.size else data


def _examples(data: Any, pipeline: InputPipeline) -> dict[str, MapInput]:
    """Reads the first held-out image or clip of each class."""
    if data is None:
        return {}
    read = pipeline.from_frames if pipeline.takes_clips else pipeline.from_image
    examples: dict[str, MapInput] = {}
    for label, name in enumerate(data.classes[:_EXAMPLES]):
        for index in (data.labels == label).nonzero()[:1, 0].tolist():
            with suppress(UnreadableFile):
                examples[name] = read(data.load(index), name)
    return examples
