"""The notebook: fit to be read as it is, and it runs; `scripts/run_notebook.py` executes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import run_notebook
from run_notebook import NOTEBOOK, code_hash

ROOT = Path(__file__).resolve().parents[2]
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


def said(notebook: Any) -> list[str]:
    """All that outputs say in words."""
    shown = [text for out in outputs(notebook) for text in out.get("data", {}).items()]
    return [printed(notebook), *(text for kind, text in shown if kind.startswith("text/"))]


def make_images(notebook: Any) -> list[str]:
    data = [output.get("data", {}) for output in outputs(notebook)]
    return [each["image/png"] for each in data if "image/png" in each]


def table(notebook: Any, cell_id: str) -> dict[str, list[float]]:
    """The numbers of the table that a cell shows, row by row."""
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    [text] = [out.data["text/markdown"] for out in cell.outputs if "data" in out]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {name: [float(n.replace(",", "")) for n in numbers if n] for name, *numbers in rows}


def links(notebook: Any) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield from re.findall(r"\]\(([^)]+)\)", cell.source)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run here leaves, in a process of its own, far from the repository."""
    folder = tmp_path_factory.mktemp("notebook")
    out = folder / "executed.ipynb"
    command = [sys.executable, run_notebook.__file__, "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # how long it took, with pytest -s
    return read(out)


@pytest.fixture(
    scope="module", params=["committed", pytest.param("executed", marks=pytest.mark.slow)]
)
def notebook(request: pytest.FixtureRequest) -> Any:
    """The notebook as it is read, and, slowly, as it comes out here."""
    return read() if request.param == "committed" else request.getfixturevalue("executed")


# --- as it is read ------------------------------------------------------------------------------


def test_it_is_a_valid_notebook(notebook: Any) -> None:
    nbformat.validate(notebook)


def test_its_code_compiles() -> None:
    for cell in code_cells(read()):
        python = TransformerManager().transform_cell(cell.source)  # magics become calls
        compile(python, cell.id, "exec")


def test_its_badge_leads_to_itself() -> None:
    [badge] = [link for link in links(read()) if "colab.research.google.com/github" in link]
    assert badge.endswith(f"/blob/main/{NOTEBOOK.relative_to(ROOT).as_posix()}")


def test_an_owner_that_is_to_be_filled_in_is_told_so() -> None:
    title, install = read().cells[:2]
    assert ("OWNER/" in title.source) == ("OWNER/" in install.source)
    assert ("To be filled in" in title.source) == ("OWNER/" in title.source)


def test_installing_does_nothing_where_the_package_is() -> None:
    cell = code_cells(read())[0]
    assert "%pip install" in cell.source
    namespace: dict[str, Any] = {}
    python = TransformerManager().transform_cell(cell.source)
    exec(compile(python, "install", "exec"), namespace)  # pip would need a shell
    assert "REPOSITORY" not in namespace
    assert cell.outputs == []


def test_installing_asks_for_the_owner_before_pip_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    python = TransformerManager().transform_cell(code_cells(read())[0].source)
    with pytest.raises(ValueError, match="put its repository's owner in REPOSITORY"):
        exec(compile(python, "install", "exec"), {})


def test_its_links_lead_to_files_of_the_repository() -> None:
    files = [link for link in links(read()) if not link.startswith("https://")]
    assert files
    assert [link for link in files if not (NOTEBOOK.parent / link).is_file()] == []


def test_its_outputs_are_of_the_code_beside_them() -> None:
    found = read().metadata.tokenlearner.executed_code_sha256
    assert found == code_hash(read()), "the code changed; run make notebook"


def test_it_was_executed_once_from_top_to_bottom(notebook: Any) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell.outputs for cell in cells[1:])


def test_nothing_went_wrong_and_nothing_warned(notebook: Any) -> None:
    kinds = {(out.output_type, out.get("name")) for out in outputs(notebook)}
    assert kinds == {("stream", "stdout"), ("display_data", None)}


def test_it_names_no_place_of_the_machine(notebook: Any) -> None:
    text = "\n".join([*(cell.source for cell in notebook.cells), *said(notebook)])
    assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users|var)\b|[A-Z]:\\", text) == []
    assert str(Path.home()) not in text


def test_its_metadata_is_the_same_on_every_machine(notebook: Any) -> None:
    assert {**notebook.metadata, "tokenlearner": None} == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "tokenlearner": None,
    }
    assert all(cell.metadata == {} for cell in notebook.cells)


def test_it_is_small_enough_to_open_at_once() -> None:
    assert NOTEBOOK.stat().st_size / 1e6 < MAX_MB


# --- what it shows ------------------------------------------------------------------------------


def test_it_shows_the_images_the_curves_and_two_sheets_of_maps(notebook: Any) -> None:
    assert len(make_images(notebook)) == 4
    assert min(map(len, make_images(notebook))) > 10_000


def test_a_learned_token_is_the_weighted_mean(notebook: Any) -> None:
    assert "differs by less than 1e-5: True" in printed(notebook)


def test_the_blocks_behind_the_learner_see_8_tokens(notebook: Any) -> None:
    assert "[49, 49, 49, 49, 49, 49]" in printed(notebook)
    assert "[49, 49, 49, 8, 8, 8]" in printed(notebook)


def test_both_models_learn(notebook: Any) -> None:
    top1s = table(notebook, "costs-table")["top-1 on held-out images, %"]
    assert len(top1s) == 2
    assert min(top1s) > 5 * CHANCE_PERCENT


def test_fewer_tokens_cost_fewer_multiply_adds(notebook: Any) -> None:
    assert table(notebook, "costs-table")["GMACs an image"] == [0.0163, 0.0097, 0.59]


def test_a_line_is_printed_for_every_epoch_and_no_more(notebook: Any) -> None:
    [cell] = [cell for cell in notebook.cells if cell.id == "training-run"]
    lines = "".join(out.text for out in cell.outputs).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{name}, epoch {epoch}"
        for name in ("all 49 tokens", "8 learned tokens")
        for epoch in (1, 2, 3, 4)
    ]


def test_calibrating_brings_back_what_inserting_lost(notebook: Any) -> None:
    shown = table(notebook, "own-run")
    was, inserted, calibrated, distilled = (numbers[0] for numbers in shown.values())
    assert inserted < was - 5
    assert calibrated > inserted
    assert distilled > was - 10


# --- the script ---------------------------------------------------------------------------------

TRANSPORT = "import ipykernel\nprint(ipykernel.get_connection_info(unpack=True)['transport'])"
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
LEFT_BEHIND = {"execution": {"iopub.execute_input": "2026-01-01"}, "scrolled": True}


def written(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source, metadata=LEFT_BEHIND) for source in sources]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    return path


def script(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, run_notebook.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small notebook that was executed in place."""
    path = written(tmp_path_factory.mktemp("small") / "small.ipynb", TRANSPORT, FIGURE)
    done = script(path, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr
    assert [*path.parent.iterdir()] == [path]
    return read(path)


def test_the_script_writes_outputs_in_place_and_strips_metadata(small: Any) -> None:
    assert [cell.execution_count for cell in small.cells] == [1, 2]
    assert [cell.metadata for cell in small.cells] == [{}, {}]
    assert small.metadata.tokenlearner.executed_code_sha256 == code_hash(small)


def test_the_script_draws_inline_whatever_the_environment_says(small: Any) -> None:
    assert len(make_images(small)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no sockets in files")
def test_the_script_opens_no_port(small: Any) -> None:
    assert printed(small) == "ipc\n"


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "bad.ipynb", "1 / 0")
    before = path.read_bytes()
    done = script(path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_the_hash_is_of_the_code_alone() -> None:
    notebook, changed = read(), read()
    changed.cells[0].source += "more words"
    assert code_hash(changed) == code_hash(notebook)
    changed.cells[1].source += "\nmore = 1"
    assert code_hash(changed) != code_hash(notebook)
