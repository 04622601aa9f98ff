"""`tokenlearner convert`: whole checkpoints between scenic and this package."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoints.convert import ConvertConfig, convert_checkpoint
from ._arguments import read_config
from ._console import say


def convert_command(arguments: Sequence[str]) -> None:
    """Converts a checkpoint."""
    config = read_config("convert", ConvertConfig, arguments)
    say(f"The checkpoint is {convert_checkpoint(config)}")
