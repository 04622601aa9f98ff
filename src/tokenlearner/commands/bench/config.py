"""Options of `tokenlearner bench`, and models such as `NAME+insert(8,6)`."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ...layers.token_learner import LEARNERS
from ...models.compilation import CompileMode, known_mode
from ...utils.io import check_output_file
from ...utils.validation import check_count, check_literals, parse_seconds, require

_EXPECTED = (
    "expected MODEL or MODEL+insert(NUM_TOKENS, AT), AT a block such as 6 or a share "
    f"such as 0.5, then optionally fuse or overlap=1, and one of {', '.join(LEARNERS)}; +onednn "
    "may follow"
)


@dataclass(frozen=True)
class BenchConfig:
    """Measures models interleaved: multiply-adds, memory, latency, throughput and training.

    Args:
        models: Names that `create_model` knows, ours or timm's, or checkpoints of `save_model`;
            with tokens inserted as in "vit_base_patch16_224+insert(8,6)": 8 tokens at block 6, or
            at a share of the depth such as 0.5; then fuse, and a learner such as v1. +onednn
            behind either has its linear layers computed by oneDNN.
        batch_size: Images at a time for throughput and training; latency is that of one.
        img_size: Height and width of the images; 0 leaves them as the models have them.
        rounds: Timed runs of each model and measurement, at most.
        time: For all measurements together, such as 60s or 5m: slow models get fewer rounds, but 3
            at least. Empty takes the time that rounds take.
        dtype: Of weights and images.
        threads: For torch on a CPU; 0 leaves them as they are.
        compile: Time what torch.compile makes of the models in this mode, each as one graph for one
            batch size; multiply-adds and memory are counted without.
        training: Measure a training step (forward and backward) too, which takes the most time.
        advise: Measure the models in every form that runs here (float32, oneDNN, bfloat16, ONNX
            Runtime and OpenVINO) instead, in a minute or in the time given, and say which to take.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        json: File for all numbers, for programs.
        plot: PNG file for a plot of speed-ups.

    Raises:
        ValueError: A number is out of range, a model is misspelled or given twice, or a file
            cannot be written.
    """

    models: list[str]
    batch_size: int = 8
    img_size: int = 0
    rounds: int = 15
    time: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 0
    compile: CompileMode = "no"
    training: bool = False
    advise: bool = False
    device: str = "auto"
    json: str = ""
    plot: str = ""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("img_size", 0), ("rounds", 2), ("threads", 0)):
            check_count(name, getattr(self, name), least)
        object.__setattr__(self, "compile", known_mode(self.compile))
        if self.time:
            parse_seconds("time", self.time)
        check_literals(self)
        _check_file("json", self.json, ".json")
        _check_file("plot", self.plot, ".png")
        require(bool(self.models), "models is empty, expected one or more")
        repeated = {text for text in self.models if self.models.count(text) > 1}
        require(not repeated, f"models has {', '.join(sorted(repeated))} twice, expected once")
        for model in self.parsed_models:
            require(
                not model.onednn or (self.dtype == "float32" and self.compile == "no"),
                f"{model.text!r} uses oneDNN, which computes float32 and is not compiled; leave "
                "out +onednn, or dtype and compile",
            )
        usual = {"compile": "no", "plot": "", "dtype": "float32"}
        given = [name for name, value in usual.items() if getattr(self, name) != value]
        given += [model.text for model in self.parsed_models if model.onednn]
        require(
            not (self.advise and given),
            f"advise measures all forms itself; leave out {' and '.join(given)}",
        )

    @property
    def parsed_models(self) -> list[BenchModel]:
        """The models, parsed."""
        return [parse_bench_model(text) for text in self.models]

    @property
    def seconds(self) -> float:
        """The time for all measurements."""
        return parse_seconds("time", self.time) if self.time else math.inf

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        options = [
            word
            for option in fields(self)
            if option.default is not MISSING
            and (value := getattr(self, option.name)) != option.default
            for word in (f"--{option.name}", _word(value))
        ]
        return shlex.join(["tokenlearner", "bench", *self.models, *options])


@dataclass(frozen=True)
class BenchModel:
    """A model as it is given on the command line.

    Args:
        text: All of it.
        base: The name or the checkpoint.
        tokens: Arguments of `insert`; none leaves the model as it is.
        onednn: Whether oneDNN computes its linear layers.
    """

    text: str
    base: str
    tokens: Mapping[str, Any] = field(default_factory=dict)
    onednn: bool = False


def parse_bench_model(text: str) -> BenchModel:
    """Parses `MODEL` or `MODEL+insert(NUM_TOKENS, AT, fuse, LEARNER)`, optionally with `+onednn`.

    In place of fuse there may be `overlap=1`. Behind the number of tokens any part may be left
    out, and their order is free.

    Raises:
        ValueError: It has another form.

    >>> parse_bench_model("vit_base_patch16_224+insert(8,6)").tokens
    {'num_tokens': 8, 'at': 6}
    """
    rest = text.removesuffix("+onednn")
    form = re.fullmatch(r"(?P<base>.+?)(\+insert\((?P<words>[^()]*)\))?", rest)
    if form is None or "+insert" in form["base"] or form["base"].endswith("+onednn"):
        raise ValueError(f"there is no model in {text!r}, {_EXPECTED}")
    tokens: dict[str, Any] = {}
    if form["words"] is not None:
        first, *others = (word.strip() for word in form["words"].split(","))
        if not first.isdecimal() or int(first) == 0:
            raise ValueError(f"{text!r} has {first!r} for the number of tokens, {_EXPECTED}")
        tokens["num_tokens"] = int(first)
        for key, value in (_argument(word, text) for word in others):
            if key in tokens:
                raise ValueError(f"{text!r} has {key} twice, {tokens[key]} and {value}; keep one")
            tokens[key] = value
    return BenchModel(text, form["base"], tokens, onednn=rest != text)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _argument(word: str, text: str) -> tuple[str, Any]:
    """Parses a word behind the number of tokens as an argument of `insert`."""
    if word == "fuse":
        return "fuse", True
    if word in LEARNERS:
        return "learner", word
    if word.isdecimal():
        return "at", int(word)
    if match := re.fullmatch(r"overlap=(\d+)", word):
        return "overlap", int(match[1])
    if re.fullmatch(r"0?\.\d+|0\.", word):
        return "at", float(word)
    raise ValueError(f"{text!r} has {word!r}, {_EXPECTED}")


def _check_file(option: str, path: str, suffix: str) -> None:
    """Checks early that a file can be written later."""
    if not path:
        return
    file, folder = Path(path).expanduser(), Path(path).expanduser().parent
    require(file.suffix == suffix, f"{option} is {path!r}, expected a file that ends in {suffix}")
    require(folder.exists(), f"{option} is {path!r}, but there is no folder {folder}; make it")
    check_output_file(path, option)
