"""The tables of the pages are those of the results that were kept."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPREAD = re.compile(r"([\d.]+) \(([\d.]+)–([\d.]+)\)")  # a median and its quartiles
PLAIN = re.compile(r"[\d.]*\d")


def table_rows(page: str) -> Iterator[list[str]]:
    for line in page.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def measured_in(results: Any) -> Iterator[tuple[float, ...]]:
    """All numbers of a file of results, and all medians with their quartiles."""
    if isinstance(results, dict):
        if {"median", "low", "high"} <= set(results):
            yield results["median"], results["low"], results["high"]
        if textbook := results.get("textbook's peak MiB"):
            yield (results["peak MiB"] / textbook,)
        for value in results.values():
            yield from measured_in(value)
    elif isinstance(results, list):
        for value in results:
            yield from measured_in(value)
    elif isinstance(results, int | float):
        yield (float(results),)


def rounded(values: tuple[float, ...], texts: tuple[str, ...]) -> tuple[str, ...]:
    digits = [len(text.partition(".")[2]) for text in texts]
    return tuple(f"{value:.{n}f}" for value, n in zip(values, digits, strict=True))


def found(texts: tuple[str, ...], measured: set[tuple[float, ...]]) -> bool:
    same = (values for values in measured if len(values) == len(texts))
    return any(rounded(values, texts) == texts for values in same)


def test_all_cells_of_the_tables_of_a_gpu_are_in_its_results() -> None:
    page = (ROOT / "docs/gpu.md").read_text("utf-8").partition("## Measured")[2]
    results = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())
    measured, checked = {*measured_in(results)}, 0
    for row in table_rows(page):
        for cell in row[1:]:
            if match := SPREAD.fullmatch(cell):
                assert found(match.groups(), measured), (cell, row)
            elif PLAIN.fullmatch(cell) and "." in cell:
                assert found((cell,), measured), (cell, row)
            else:
                continue
            checked += 1
    assert checked > 250


@pytest.mark.parametrize("texts", [("0.87", "0.83", "0.92"), ("0.87",)])
def test_a_cell_that_is_not_in_the_results_is_found_out(texts: tuple[str, ...]) -> None:
    assert found(texts, {(0.867, 0.83, 0.92), (0.871,)})
    assert not found(texts, {(0.861, 0.83, 0.92), (0.877,)})


@pytest.mark.parametrize("name", ["clothes", "detail"])
def test_rows_of_insertion_are_those_of_its_results(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    insertion = importlib.import_module("insertion")
    rows = json.loads((ROOT / f"benchmarks/results/insertion_{name}.json").read_text())["rows"]
    page = (ROOT / "benchmarks/README.md").read_text("utf-8")
    for budget in {row["budget"] for row in rows}:
        lines = insertion.table(rows, budget, {}).splitlines()[2:]
        assert len(lines) >= 6
        assert [line for line in lines if line not in page] == []
