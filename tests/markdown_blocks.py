"""The fenced blocks of Markdown files, the commands in them, and what those commands know."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from tokenlearner.commands.main import main

ROOT = Path(__file__).resolve().parents[1]


class Block(NamedTuple):
    """A fenced block: its language, its text, the line its text starts at, why it is not run."""

    language: str
    text: str
    line: int
    not_run: str


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a Markdown file."""
    pattern = r"(?:^<!-- not run: (.+?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$"
    text = path.read_text(encoding="utf-8")
    return [
        Block(match[2], match[3], text.count("\n", 0, match.start(3)) + 1, match[1] or "")
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def shell_commands(path: Path, to_run: bool = False) -> Iterator[list[str]]:
    """The commands in a page's shell blocks, as words. With `$ ` prompts, the rest is output.

    With `to_run`, without those of blocks that say why they are not run.
    """
    for block in blocks(path):
        if block.language not in ("console", "bash", "sh", "shell") or (to_run and block.not_run):
            continue
        lines = block.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            for command in re.split(r"&&|;|\|", line):
                if words := shlex.split(command, comments=True):
                    yield words


def commands_named(name: str, paths: Sequence[Path], to_run: bool = False) -> list[list[str]]:
    """The commands that call one program, without the program and variables before it."""
    found = []
    for words in (words for path in paths for words in shell_commands(path, to_run)):
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words and words[0] == name:
            found.append(words[1:])
    return found


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def run_python_blocks(path: Path) -> None:
    """Runs the Python blocks of a page one after the other, as one program."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.language == "python" and not block.not_run:
            padding = "\n" * (block.line - 1)  # so that a traceback shows the page's lines
            exec(compile(padding + block.text, str(path), "exec"), namespace)


@cache
def cli_help(*arguments: str) -> str:
    """The help text of the command or one of its subcommands; fails if there is none."""
    output = io.StringIO()
    with (
        patch.object(sys, "argv", ["tokenlearner", *arguments, "--help"]),
        patch.dict(os.environ, {"COLUMNS": "200", "NO_COLOR": "1"}),
        redirect_stdout(output),
        redirect_stderr(output),
        pytest.raises(SystemExit) as exit_info,
    ):
        main()
    assert not exit_info.value.code, output.getvalue()
    return output.getvalue()


def assert_options_exist(words: list[str]) -> None:
    """Fails if a `tokenlearner` command, or an option of it, does not exist."""
    subcommand = [] if not words or words[0].startswith("-") else words[:1]
    text = cli_help(*subcommand)
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", text))
    assert options <= known, f"not in `tokenlearner {shlex.join([*subcommand, '--help'])}`"


def assert_targets_exist(words: list[str]) -> None:
    """Fails if a target of `make`, or an option passed to the demo, does not exist."""
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    assert set(targets) <= make_targets()
    arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    if "demo" in targets and arguments:
        assert_options_exist(["demo", *shlex.split(arguments[0])])
