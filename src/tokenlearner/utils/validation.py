"""Checks of arguments; each raises ValueError with what was got, what was expected, and a fix."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .text import plain_text as plain_text

Grid = tuple[int, int]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SECONDS = {"s": 1, "m": 60, "h": 3600}
POSITIONS = {3: "[b, n, c]", 4: "[b, h, w, c]", 5: "[b, t, h, w, c]"}


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_count(name: str, value: int, least: int = 1) -> int:
    """Returns `value` if it is an integer of at least `least`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of {least} or more")
    return int(value)


def is_integer(value: object) -> bool:
    """Returns whether a value is an integer, of numpy too; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_eps(value: float) -> float:
    """Returns `value` if it can be a LayerNorm's epsilon."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"norm_eps is {value!r}, expected a number above 0, such as 1e-6")
    return value


def check_rate(value: float, name: str = "dropout_rate") -> float:
    """Returns `value` if it is a share from 0 to below 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}, expected a share from 0 to below 1, such as 0.1")
    return value


def check_above_zero(name: str, value: float) -> float:
    """Returns `value` if it is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a number above 0")
    return value


def parse_seconds(name: str, text: str) -> float:
    """Returns the seconds in an option such as 90s, 30m or 2h.

    Raises:
        ValueError: It is something else, or 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    seconds = float(found[1]) * _SECONDS[found[2] or "s"] if found else 0
    require(seconds > 0, f"{name} is {text!r}, expected such as 90s, 30m or 2h")
    return seconds


def check_from_zero(options: object, *names: str) -> None:
    """Checks that options are finite and not negative; None is allowed."""
    for name in names:
        value = getattr(options, name) or 0
        require(0 <= value < math.inf, f"{name} is {value}, expected a number from 0 on")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False, of numpy too."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def check_literals(options: object) -> None:
    """Checks the fields of a dataclass whose type is bool, or a `Literal`, or one or None."""
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if hint is bool:
            check_flag(name, value)
        types = [hint, *get_args(hint)]  # a union with None too
        choices = [v for t in types if get_origin(t) is Literal for v in get_args(t)]
        if choices and not (value is None and type(None) in get_args(hint)):
            check_choice(name, value, choices)


def check_pair(grid: Grid) -> Grid:
    """Returns `grid` if it is a height and a width."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid is {grid!r}, expected (height, width)")
    h, w = (check_count(f"the grid's {axis}", v) for axis, v in zip("hw", grid, strict=True))
    return h, w


def check_grid(grid: Grid, n: int) -> Grid:
    """Returns `grid` as two integers if its positions are `n`."""
    h, w = check_pair(grid)
    if h * w != n:
        raise ValueError(
            f"{n} positions do not fit a {h} x {w} grid of {h * w}; pass the grid they come from"
        )
    return h, w


def check_input(
    name: str, x: Tensor, axes: Mapping[int, str], channels: int, dtype: torch.dtype
) -> None:
    """Checks that a module with `channels` and parameters of `dtype` can take a tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}, expected a torch.Tensor")
    shape = list(x.shape)
    if x.ndim not in axes:
        fitting = " or ".join(axes.values())
        raise ValueError(f"{name} has {x.ndim} axes, {shape}; expected {fitting}")
    if shape[-1] != channels:
        hint = "; channels come last, permute them there" if channels in shape[1:-1] else ""
        raise ValueError(
            f"{name} is {shape} with {shape[-1]} channels, expected {channels} in the last axis"
            + hint
        )
    if 0 in shape[1:]:
        raise ValueError(f"{name} is {shape}: only the batch may be empty")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}, expected a floating point dtype; call .float()")
    if x.dtype != dtype and not _autocast_mixes(x, dtype):
        raise ValueError(
            f"{name} is {x.dtype}, the module's parameters are {dtype}; call .to() on either one "
            "(torch.autocast allows float16, bfloat16 and float32 input with float32 parameters)"
        )


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number, of numpy too; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(float(value))


def _autocast_mixes(x: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether autocast is on and allows both: float32 parameters and no float64."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return False
    return dtype == torch.float32 and x.dtype != torch.float64


def find_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of floating point tensors that hold NaN or infinity."""
    return [
        name
        for name, value in tensors.items()
        if value.is_floating_point()
        and not value.float().sum().isfinite()  # one pass without a copy; the sum keeps NaN
        and not value.double().isfinite().all()
    ]


def counted(n: int, noun: str) -> str:
    """Returns a number and its noun, such as `2 videos`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def shortened(names: Collection[str], most: int = 5) -> str:
    """Returns the first names for a message, with their number if there are more."""
    first = ", ".join(list(names)[:most])
    return f"{first}, ... ({len(names)} in all)" if len(names) > most else first
