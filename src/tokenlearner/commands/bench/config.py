"""What `tokenlearner bench` is told: options, and models such as `NAME+insert(8,6)`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ...layers.token_learner import LEARNERS
from ...utils.validation import check_choice, check_count, require

_EXPECTED = (
    "expected MODEL or MODEL+insert(NUM_TOKENS, AT), AT a block such as 6 or a share "
    f"such as 0.5, then, if you like, fuse and one of {', '.join(LEARNERS)}; and behind either, "
    "if you like, +onednn"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """Measures models in turn: multiply-adds, memory, latency, throughput and training.

    Args:
        models: Names that `create_model` knows, ours or timm's, or checkpoints of `save_model`;
            with tokens inserted as in "vit_base_patch16_224+insert(8,6)": 8 tokens at block 6, or
            at a share of the depth such as 0.5; then fuse, and a learner such as v1. +onednn
            behind either has its linear layers computed by oneDNN.
        batch_size: Images at a time for throughput and training; latency is that of one.
        img_size: Height and width of the images; 0 leaves them as the models have them.
        rounds: Timed runs of each model and measurement.
        dtype: Of weights and images: float32, bfloat16 or float16.
        threads: For torch on a CPU; 0 leaves them as they are.
        compile: Time what torch.compile makes of the models; multiply-adds and memory are counted
            without.
        training: Measure a training step (forward and backward) too.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        json: File for all numbers, for programs.
        plot: PNG file for an image of speed-ups.

    Raises:
        ValueError: A number is out of range, a model is named wrongly or twice, or a file has no
            place.
    """

    models: list[str]
    batch_size: int = 8
    img_size: int = 0
    rounds: int = 15
    dtype: str = "float32"
    threads: int = 0
    compile: bool = False
    training: bool = True
    device: str = "auto"
    json: str = ""
    plot: str = ""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("img_size", 0), ("rounds", 2), ("threads", 0)):
            check_count(name, getattr(self, name), least)
        check_choice("dtype", self.dtype, list(DTYPES))
        _check_file("json", self.json, ".json")
        _check_file("plot", self.plot, ".png")
        require(bool(self.models), "there are 0 models, expected 1 or more; name one")
        twice = {text for text in self.models if self.models.count(text) > 1}
        require(not twice, f"{', '.join(sorted(twice))} is named twice; name each model once")
        for candidate in self.candidates:
            require(
                not candidate.onednn or (self.dtype == "float32" and not self.compile),
                f"{candidate.text!r} asks for oneDNN, which computes float32 that is not compiled; "
                "leave out +onednn, or dtype and compile",
            )

    @property
    def candidates(self) -> list[BenchModel]:
        """The models as they are named."""
        return [parse_bench_model(text) for text in self.models]

    @property
    def command(self) -> str:
        """What measures the same again."""
        given = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        options = [
            word
            for name, value, default in given
            if default is not MISSING and value != default
            for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
        ]
        return shlex.join(["tokenlearner", "bench", *self.models, *options])


@dataclass(frozen=True)
class BenchModel:
    """A model as it is named on the command line.

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
    """Reads `MODEL` or `MODEL+insert(NUM_TOKENS, AT, fuse, LEARNER)`, with `+onednn` or without.

    Behind the number of tokens any part may be left out, and their order is free.

    Raises:
        ValueError: It has another form.

    >>> parse_candidate("vit_base_patch16_224+insert(8,6)").tokens
    {'num_tokens': 8, 'at': 6}
    """
    rest = text.removesuffix("+onednn")
    onednn = rest != text
    base, plus, inserted = rest.partition("+insert")
    form = re.fullmatch(r"\(([^()]*)\)", inserted)
    if not base or base.endswith("+onednn") or (plus and form is None):
        raise ValueError(f"there is no model in {text!r}, {_EXPECTED}")
    if form is None:
        return BenchModel(text, base, onednn=onednn)
    first, *others = (word.strip() for word in form[1].split(","))
    if not first.isdecimal() or int(first) == 0:
        raise ValueError(f"{text!r} has {first!r} for the number of tokens, {_EXPECTED}")
    tokens: dict[str, Any] = {"num_tokens": int(first)}
    for key, value in (_argument(word, text) for word in others):
        if key in tokens:
            raise ValueError(f"{text!r} says {key} twice, {tokens[key]} and {value}; keep one")
        tokens[key] = value
    return BenchModel(text, base, tokens, onednn)


def _argument(word: str, text: str) -> tuple[str, Any]:
    """A word behind the number of tokens as an argument of `insert`."""
    if word == "fuse":
        return "fuse", True
    if word in LEARNERS:
        return "learner", word
    if word.isdecimal():
        return "at", int(word)
    if re.fullmatch(r"0?\.\d+|0\.", word):
        return "at", float(word)
    raise ValueError(f"{text!r} has {word!r}, {_EXPECTED}")


def _check_file(option: str, path: str, suffix: str) -> None:
    """Refuses a file that could not be written in the end."""
    if not path:
        return
    file, folder = Path(path), Path(path).parent
    require(file.suffix == suffix, f"{option} is {path!r}, expected a file that ends in {suffix}")
    require(not file.is_dir(), f"{option} is {path!r}, which is a folder; name a file")
    require(folder.is_dir(), f"{option} is {path!r}, but there is no folder {folder}; make it")
    writable = os.access(folder, os.W_OK)
    require(writable, f"{option} is {path!r}, but {folder} cannot be written to; take another")
