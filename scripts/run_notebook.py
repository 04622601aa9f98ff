"""Execute the notebook from top to bottom and write it back with what it printed and drew.

`python scripts/run_notebook.py` rewrites notebooks/tokenlearner.ipynb; with `--out FILE` it leaves
it alone and writes FILE. Nothing is written when a cell fails. Times, versions and everything else
that differs from one machine to the next only by its name is left out of the metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from traitlets.config import Config

from tokenlearner.utils.io import atomic_write

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "tokenlearner.ipynb"
CELL_SECONDS = 1800  # a cell that takes longer hangs
IGNORED = "ignore:IProgress not found"  # tqdm, where ipywidgets is missing; no cell needs either


def code_hash(notebook: Any) -> str:
    """sha256 of the code cells, which tells whether outputs are of the code beside them."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def execute(notebook: Any) -> None:
    """Run all cells in a new kernel, in an empty folder, and keep their outputs in the notebook."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as private:
        sockets = {"transport": "ipc", "ip": f"{private}/kernel"}  # no port is opened
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            resources={"metadata": {"path": folder}},
            config=Config({"KernelManager": sockets if os.name == "posix" else {}}),
        )
        env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # images go inline
        client.execute(env=env | {"IPYTHONDIR": private, "PYTHONWARNINGS": IGNORED})


def clean(notebook: Any) -> None:
    """Leave no metadata but what every reader needs, and which code was executed."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "tokenlearner": {"executed_code_sha256": code_hash(notebook)},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})


def run(source: Path, out: Path) -> None:
    """Execute the notebook at `source` and write it to `out`, whole or not at all."""
    notebook = nbformat.read(source, as_version=4)
    execute(notebook)
    clean(notebook)
    nbformat.validate(notebook)
    with atomic_write(out) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Execute the notebook and keep what it shows.")
    parser.add_argument("source", nargs="?", type=Path, default=NOTEBOOK, help="the notebook")
    parser.add_argument("--out", type=Path, help="where to write it; the notebook itself if left")
    options = parser.parse_args(arguments)
    out, start = options.out or options.source, time.perf_counter()
    try:
        run(options.source, out)
    except (CellControlSignal, DeadKernelError) as error:  # a cell failed, took too long, or died
        sys.exit(f"error: {error}")
    print(f"{out}: executed in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
