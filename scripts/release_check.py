"""Build what a release uploads, and use it as a stranger does, without the repository.

`python scripts/release_check.py` builds the sdist and from it the wheel, checks their metadata and
sizes, and installs the wheel into bare environments, the oldest Python at hand with the oldest
torch that is allowed, and the newest with the newest. There it runs the doctests, the code of the
README and the demo. Of every extra it asks whether what needs it works with the extra alone, and
whether it is named where it is missing. Prints times and sizes; exits with 1 if anything fails.
Needs `build` and `twine`, the package index, and 8 GB of disk for each environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
MAX_WHEEL_MB = 5.0
PYTHONS = [f"python3.{minor}" for minor in range(10, 20)]
FITTING_VISION = {"2.9": "0.24"}  # torchvision of the oldest torch; pip finds that of the newest
IN_WHEEL = ("py.typed", "assets/model_card.md", "assets/recipes/", "assets/report/")
# What shows that an extra is there; the first word tells a command from a program of Python.
EXTRAS = {
    "train": "tokenlearner models vit_mini*",
    "demo": "tokenlearner demo --epochs 2",
    "video": "import av; from tokenlearner.data import video_folder",
    "data": "import datasets; from tokenlearner.data import hub_datasets",
    "export": "tokenlearner export model.safetensors model.onnx",
    "app": "tokenlearner app --help",
    "hf": "import transformers as t, tokenlearner as l; c = t.ViTConfig(hidden_size=32, "
    "num_hidden_layers=2, num_attention_heads=2, intermediate_size=32); l.insert(t.ViTModel(c), 4)",
    "convert": "tokenlearner convert --help",
    "robots": "import gymnasium, gym_pusht",
}
MODEL = (
    "from tokenlearner import create_model, save_model; "
    "save_model(create_model('vit_mini_patch4_28', num_tokens=4), 'model.safetensors')"
)


@dataclass
class Checks:
    """Runs commands, and keeps which failed."""

    failed: list[str] = field(default_factory=list)

    def run(self, name: str, command: list[str], cwd: Path, code: int = 0, said: str = "") -> float:
        """Runs a command that has to end with a code and say something; returns its seconds."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        is_right = done.returncode == code and said in done.stdout + done.stderr
        if not is_right:
            self.failed.append(name)
            print(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}", file=sys.stderr)
        print(f"{'ok' if is_right else 'FAILED':<7} {seconds:7.1f} s  {name}", flush=True)
        return seconds

    def require(self, name: str, is_right: bool) -> None:
        """Notes a check that needs no command."""
        print(f"{'ok' if is_right else 'FAILED':<19} {name}", flush=True)
        if not is_right:
            self.failed.append(name)


def build(checks: Checks, out: Path) -> Path:
    """Builds both files, checks what they say and hold, and returns the wheel."""
    checks.run("build", [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], out)
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    twine = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    checks.run("twine check", twine, out)
    for file in (wheel, sdist):
        print(f"{file.stat().st_size / 1e6:.2f} MB  {file.name}")
    checks.require(f"wheel under {MAX_WHEEL_MB:g} MB", wheel.stat().st_size < MAX_WHEEL_MB * 1e6)
    names = zipfile.ZipFile(wheel).namelist()
    missing = [part for part in IN_WHEEL if not any(f"tokenlearner/{part}" in n for n in names)]
    checks.require(f"the wheel has {', '.join(IN_WHEEL)}", not missing)
    return wheel


def environment(checks: Checks, folder: Path, python: str, wants: list[str]) -> Path:
    """Makes an environment with packages, and returns its Python."""
    checks.run(
        f"{folder.name}: venv of {python}", [python, "-m", "venv", str(folder)], folder.parent
    )
    inside = folder / "bin" / "python"
    pip = [str(inside), "-m", "pip", "install", "--quiet", *wants]
    checks.run(f"{folder.name}: pip install {' '.join(wants)[-60:]}", pip, folder.parent)
    return inside


def use(checks: Checks, python: Path, empty: Path) -> None:
    """Uses an installation as a newcomer does, in an empty folder."""
    name = python.parents[1].name
    tool = str(python.with_name("tokenlearner"))
    checks.run(f"{name}: tokenlearner doctor", [tool, "doctor"], empty, said="nothing is wrong")
    for title, command in {
        "import tokenlearner": [str(python), "-c", "import tokenlearner"],
        "tokenlearner --version": [tool, "--version"],
        "tokenlearner train --help": [tool, "train", "--help"],
    }.items():
        times = [checks.run(f"{name}: {title}", command, empty) for _ in range(3)]
        print(f"{'':7} {median(times):7.2f} s  median of 3, {title}")
    doctests = ["-m", "pytest", "-q", "--doctest-modules", "--doctest-ignore-import-errors"]
    doctests += ["--pyargs", "tokenlearner"]  # of modules whose extra is there
    checks.run(f"{name}: doctests", [str(python), *doctests, "-p", "no:cacheprovider"], empty)
    readme = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import pathlib, markdown_blocks;"
        f"markdown_blocks.run_python_blocks(pathlib.Path({str(ROOT / 'README.md')!r}))"
    )
    checks.run(f"{name}: README", [str(python), "-c", readme], empty)
    checks.run(f"{name}: demo", [tool, "demo", "--epochs", "2"], empty, said="report")


def try_extras(checks: Checks, wheel: Path, base: Path, folder: Path, empty: Path) -> None:
    """Installs each extra alone over the packages of an environment without any, and uses it."""
    site = next((base.parents[1] / "lib").glob("python*/site-packages"))
    tool = base.with_name("tokenlearner")
    checks.run("a model to work on", [str(base), "-c", MODEL], empty)
    for extra, shows in EXTRAS.items():
        needs = f"[{extra if extra in ('app', 'convert', 'demo') else 'train'}]"
        if shows.startswith("tokenlearner"):
            words = [str(tool), *shows.split()[1:]]
            checks.run(f"without {extra}: {shows} names {needs}", words, empty, 2, needs)
        inside = folder / extra
        checks.run(f"{extra}: venv", [str(base), "-m", "venv", str(inside)], folder)
        own = next((inside / "lib").glob("python*/site-packages"))
        (own / "base.pth").write_text(f"{site}\n", encoding="utf-8")
        python, also = inside / "bin" / "python", ["train"] if extra == "export" else []
        wanted = f"{wheel}[{','.join([extra, *also])}]"
        checks.run(f"{extra}: install", [str(python), "-m", "pip", "install", "-q", wanted], folder)
        command = [str(python), "-c", shows]
        if shows.startswith("tokenlearner"):
            command = [str(python), "-m", *shows.split()]
        checks.run(f"{extra}: {shows[:60]}", command, empty)
        shutil.rmtree(inside)


def oldest_torch() -> str:
    """Returns the oldest torch that pyproject.toml allows."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert found is not None
    return found[1]


def at_hand(pythons: list[str]) -> list[str]:
    """Returns the interpreters that start."""
    found = filter(shutil.which, pythons)
    return [p for p in found if not subprocess.run([p, "-c", ""], capture_output=True).returncode]


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="from the oldest on")
    parser.add_argument("--out", type=Path, help="folder to keep both files in")
    parser.add_argument("--no-extras", action="store_true", help="leave the extras out")
    options = parser.parse_args()
    checks, pythons, old = Checks(), at_hand(options.pythons), oldest_torch()
    if not pythons:
        parser.error(f"none of {', '.join(options.pythons)} starts")
    pinned = [f"torch=={old}.*", f"torchvision=={FITTING_VISION[old]}.*"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        (empty := folder / "empty").mkdir()
        wheel = build(checks, folder)
        if not options.no_extras:
            bare = environment(checks, folder / "bare", pythons[-1], [str(wheel)])
            try_extras(checks, wheel, bare, folder, empty)
        for python, pins in ((pythons[0], pinned), (pythons[-1], [])):
            own = folder / ("oldest" if pins else "newest")
            wants = [f"{wheel}[demo,hf]", "pytest", *pins]
            use(checks, environment(checks, own, python, wants), empty)
            shutil.rmtree(own)
        if options.out and not checks.failed:
            options.out.mkdir(parents=True, exist_ok=True)
            for file in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
                shutil.copy(file, options.out)
    print("\n".join([f"FAILED: {name}" for name in checks.failed] or ["all of it is fine"]))
    sys.exit(bool(checks.failed))


if __name__ == "__main__":
    main()
