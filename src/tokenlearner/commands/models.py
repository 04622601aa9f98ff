"""`tokenlearner models`: the named models with their size and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._arguments import read_config


@dataclass(frozen=True)
class ModelsConfig:
    """Lists the named models with their size and cost.

    Args:
        pattern: Names to list, such as "*base*".
        markdown: Print the table as Markdown.
    """

    pattern: str = "*"
    markdown: bool = False


def models_command(arguments: Sequence[str]) -> None:
    """Prints the table of the named models."""
    pattern = {"nargs": "?", "default": "*", "help": "names to list, such as '*base*'"}
    config = read_config("models", ModelsConfig, arguments, pattern=pattern)
    from ..evaluation.catalog import catalog, catalog_markdown, catalog_text

    print((catalog_markdown if config.markdown else catalog_text)(catalog(config.pattern)))
