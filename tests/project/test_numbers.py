"""Measured numbers in the pages are in results that were kept, or beside what prints them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINTED = ROOT / "benchmarks/README.md"  # what the scripts printed, under their commands
OWN = {"models.md", "paper.md"}  # multiply-adds, which a test counts, and the paper's own numbers
PAGES = [ROOT / "README.md", *(p for p in (ROOT / "docs").glob("*.md") if p.name not in OWN)]
COMMAND = re.compile(r"(?:\$ |`)tokenlearner \w+")  # which prints them on any machine
CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]+>|https?://\S+|arXiv \S+", re.DOTALL)
UNIT = r"(?= (?:%|(?:ms|s|minutes|seconds|times|KiB|MiB|MB|GB)\b))"
NUMBER = re.compile(rf"(?<![\w.,])\d[\d,]*(?:\.\d+(?!\.?\w)|{UNIT})")


def numbers(text: str) -> list[str]:
    """Numbers with a decimal point or a unit, outside of code."""
    return [n.replace(",", "") for n in NUMBER.findall(CODE.sub(" ", text))]


def floats(results: Any) -> Iterator[float]:
    if isinstance(results, dict | list):
        for value in results.values() if isinstance(results, dict) else results:
            yield from floats(value)
    elif isinstance(results, int | float):
        yield float(results)


class Results:
    """All numbers of the JSON files, and of what the scripts printed."""

    def __init__(self) -> None:
        files = (ROOT / "benchmarks/results").glob("*.json")
        self.measured = [x for file in files for x in floats(json.loads(file.read_text("utf-8")))]
        self.printed = set(
            re.findall(r"\d+(?:\.\d+)?", PRINTED.read_text("utf-8").replace(",", ""))
        )
        self.rounded: dict[int, set[str]] = {}

    def __contains__(self, number: str) -> bool:
        digits = len(number.partition(".")[2])
        if digits not in self.rounded:
            self.rounded[digits] = {f"{x:.{digits}f}" for x in self.measured}
        return number in self.printed | self.rounded[digits]


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_of_a_page_are_those_that_were_measured(page: Path, results: Results) -> None:
    for section in re.split(r"^##+ ", page.read_text("utf-8"), flags=re.MULTILINE):
        if not COMMAND.search(section):
            title, _, _ = section.partition("\n")
            assert [n for n in numbers(section) if n not in results] == [], title


def test_a_number_that_nothing_measured_is_found_out(results: Results) -> None:
    text = "Of 1,024 images 12.3456 % in `0.5` s, [see](1.2.md), torch 2.11.0, 9871 ms."
    found = numbers(text)
    assert found == ["12.3456", "9871"]
    assert [n for n in found if n in results] == []
