"""Reads a command's config, a dataclass, from the command line.

`jsonargparse.auto_cli` does the same, but has neither positional arguments with a default nor lists
without brackets, such as the models of `tokenlearner bench`.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter

Config = TypeVar("Config")


def read_config(
    command: str, config_class: type[Config], arguments: Sequence[str], **positional: Any
) -> Config:
    """Returns a config with the fields that are given on the command line.

    Args:
        command: Name of the command.
        config_class: A dataclass; its docstring is the help.
        arguments: Those behind the command.
        **positional: As in `make_parser`.

    Raises:
        ValueError: An argument is unknown, or no value of its type.
    """
    return config_class(**parse(make_parser(command, config_class, **positional), arguments))


def make_parser(
    command: str,
    config_class: type[Any],
    skip: Collection[str] = (),
    formatter: type[DefaultHelpFormatter] = DefaultHelpFormatter,
    **positional: Any,
) -> ArgumentParser:
    """Returns a parser with an option for each field; required fields go without an option's name.

    Args:
        command: Name of the command.
        config_class: A dataclass; its docstring is the help.
        skip: Fields that cannot be given.
        formatter: Of the help.
        **positional: Other fields that go without a name: arguments of `add_argument` for each.
    """
    description, *_ = inspect.cleandoc(config_class.__doc__ or "").split("\n\n")
    parser = ArgumentParser(
        prog=f"tokenlearner {command}",
        description=" ".join(description.split()),
        formatter_class=formatter,
        exit_on_error=False,
    )
    for name, kwargs in positional.items():
        parser.add_argument(name, **kwargs)
    skipped: set[str | int] = {*positional, *skip}
    parser.add_class_arguments(config_class, as_group=False, as_positional=True, skip=skipped)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the options: given ones, and defaults.

    Raises:
        ValueError: As in `read_config`.
    """
    return vars(complain(parser, lambda: parser.parse_args(arguments)))


def complain(parser: ArgumentParser, read: Callable[[], Any], source: str = "") -> Any:
    """Returns what `read` does; jsonargparse's complaints are one line that names `source`."""
    try:
        return read()
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}{reason}; see `{parser.prog} --help`") from error


def read_counts(name: str, text: str) -> list[int]:
    """Returns the numbers in an option with commas between them.

    Raises:
        ValueError: It has others.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        message = f"{name} is {text!r}, expected numbers and commas, such as 4,8,16"
        raise ValueError(message) from error
