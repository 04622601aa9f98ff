"""The table of named models, and the two places in which it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tokenlearner import create_model, list_models
from tokenlearner.commands.main import main
from tokenlearner.evaluation.catalog import catalog, catalog_markdown
from tokenlearner.evaluation.flops import count_macs

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "tokenlearner models --markdown true"


def table(path: str) -> list[str]:
    """The lines about models in a Markdown file."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.match(r"\| `(vit|vivit|mixer|framevit|temporal)_", line)]


def name_of(line: str) -> str:
    return line.split("`")[1]


def test_a_row_has_what_the_model_has_and_a_pattern_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resnet\*"):
        catalog("resnet*")
    (row,) = catalog("framevit_mini*")
    model = create_model(row.name)
    clip = torch.randn(1, 3, 6, 32, 32)
    assert row.input_size == tuple(clip.shape[1:])
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.gmacs == count_macs(model, clip) / 1e9


def test_docs_list_every_named_model_in_order() -> None:
    assert [name_of(line) for line in table("docs/models.md")] == list_models()
    assert COMMAND in (ROOT / "docs/models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", ["vit_mini*", "vit_base_patch16_tl8at6_224"])
def test_rows_of_the_docs_are_those_that_the_command_prints(pattern: str) -> None:
    lines = catalog_markdown(catalog(pattern)).splitlines()[2:]
    names = list_models(pattern)
    assert lines == [line for line in table("docs/models.md") if name_of(line) in names]


@pytest.mark.slow
def test_all_rows_of_the_docs_are_those_that_the_command_prints() -> None:
    assert catalog_markdown(catalog()).splitlines()[2:] == table("docs/models.md")


def test_the_command_prints_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "vit_mini*"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "input", "parameters,", "M", "GMACs", "GFLOPs"]
    assert [row.split()[0] for row in rows] == list_models("vit_mini*")
    assert len({len(line) for line in [header, *rows]}) == 1
