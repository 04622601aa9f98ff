"""The notebook as it is committed, and as it comes out when it is executed here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import run_notebook
from run_notebook import NOTEBOOK, code_hash

MAX_MB = 1.2
CHANCE_PERCENT = 10


def read(path: Path = NOTEBOOK) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "\n".join(out.text for out in outputs(notebook) if out.output_type == "stream")


def table(notebook: Any, cell_id: str) -> dict[str, list[float]]:
    """The numbers of the table that a cell displays, row by row."""
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    [text] = [out.data["text/markdown"] for out in cell.outputs if "data" in out]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {name: [float(n.replace(",", "")) for n in numbers if n] for name, *numbers in rows}


def execute(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, run_notebook.__file__, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(
    scope="module", params=["committed", pytest.param("executed", marks=pytest.mark.slow)]
)
def notebook(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook as it is read, and, slowly, as it comes out here after half as many steps."""
    if request.param == "committed":
        return read()
    folder = tmp_path_factory.mktemp("notebook")
    text = NOTEBOOK.read_text(encoding="utf-8")
    for longer, shorter in (("epochs=4", "epochs=2"), ("steps=200", "steps=100")):
        assert longer in text
        text = text.replace(longer, shorter)
    (folder / "shorter.ipynb").write_text(text, encoding="utf-8")
    done = execute(folder / "shorter.ipynb", "--out", folder / "executed.ipynb", folder=folder)
    assert done.returncode == 0, done.stderr
    return read(folder / "executed.ipynb")


def test_it_was_executed_from_top_to_bottom_without_an_error_or_a_warning(notebook: Any) -> None:
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = {(out.output_type, out.get("name")) for out in outputs(notebook)}
    assert kinds == {("stream", "stdout"), ("display_data", None)}


def test_its_outputs_belong_to_its_code() -> None:
    executed = read().metadata.tokenlearner.executed_code_sha256
    assert executed == code_hash(read()), "the code changed; run make notebook"


def test_it_names_no_path_of_the_machine(notebook: Any) -> None:
    text = "\n".join([*(cell.source for cell in notebook.cells), printed(notebook)])
    assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users|var)\b|[A-Z]:\\", text) == []
    assert NOTEBOOK.stat().st_size / 1e6 < MAX_MB


def test_its_links_lead_to_files_of_the_repository() -> None:
    text = "".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    files = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "https://" not in link]
    assert files
    assert [link for link in files if not (NOTEBOOK.parent / link).is_file()] == []


def test_the_claims_of_its_text_hold(notebook: Any) -> None:
    assert len([out for out in outputs(notebook) if "image/png" in out.get("data", {})]) == 4
    assert "differs by less than 1e-5: True" in printed(notebook)
    assert "[49, 49, 49, 49, 49, 49]" in printed(notebook)
    assert "[49, 49, 49, 8, 8, 8]" in printed(notebook)
    costs = table(notebook, "costs-table")
    assert min(costs["top-1 on held-out images, %"]) > 5 * CHANCE_PERCENT
    assert costs["GMACs an image"] == [0.0163, 0.0097, 0.59]
    rows = table(notebook, "own-run").values()
    host, inserted, calibrated, distilled = (numbers[0] for numbers in rows)
    assert inserted < host - 5
    assert calibrated > inserted
    assert distilled > host - 10


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "bad.ipynb"
    cell = nbformat.v4.new_code_cell("1 / 0")
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
    before = path.read_bytes()
    done = execute(path, folder=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert path.read_bytes() == before
