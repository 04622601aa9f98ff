"""The project as a whole: imports, public names, doctests, the project's own rules."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import check_project
import tokenlearner

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tokenlearner"

PACKAGES = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
HEAVY = {"timm", "torchvision", "transformers", "matplotlib", "rich", "jsonargparse", "gradio"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tokenlearner.__path__, "tokenlearner.")
    if not module.name.endswith("__main__")
)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- imports and names -------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contract of pyproject.toml on the package in a folder."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


UPWARD = {
    "layers/token_fuser.py": "from ..models.insertion import insert",
    "models/vit.py": "def f():\n    from ..training.run import train",
    "data/loader.py": "from tokenlearner.layers import TokenFuser",
    "models/hosts.py": "from ..data.factory import load_data",
    "utils/io.py": "import tokenlearner.commands.main",
}


def test_imports_between_packages_go_one_way_and_every_import_up_is_found(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tokenlearner", ignore=shutil.ignore_patterns("assets"))
    result = lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout
    for file, line in UPWARD.items():
        with (tmp_path / "tokenlearner" / file).open("a") as source:
            source.write(f"\n\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    for file in UPWARD:
        assert f"tokenlearner.{file[:-3].replace('/', '.')} -> " in result.stdout


@pytest.mark.parametrize("package", ["", *sorted(PACKAGES)])
def test_exported_names_can_be_imported_and_no_module_hides_them(package: str) -> None:
    module = importlib.import_module(f"tokenlearner.{package}".rstrip("."))
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None
        assert name in dir(module)
        assert not (PACKAGE / package / f"{name}.py").exists()


def test_imports_are_light() -> None:
    code = (
        "import sys, tokenlearner\n"
        "loaded = lambda: [name in sys.modules for name in ('torch', 'tokenlearner.models')]\n"
        "print(loaded(), tokenlearner.TokenLearner and loaded())\n"
        "import tokenlearner.checkpoints.scenic; print('timm' in sys.modules)\n"
        f"tokenlearner.insert; print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert run_python(code).splitlines() == ["[False, False] [True, False]", "False", "[]"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tokenlearner' has no attribute 'tokens'"):
        tokenlearner.tokens  # noqa: B018


SLOWLY = {f"tokenlearner.{name}" for name in ("deploy.exporting", "evaluation.planning")}
SLOWLY |= {"tokenlearner.training.reduction"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOWLY else ())
        for name in ("tokenlearner", *MODULES)
    ],
)
def test_doctests_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


# --- the project's own rules -------------------------------------------------------------------


@pytest.mark.parametrize("check", check_project.CHECKS, ids=lambda check: check.__name__)
def test_the_project_passes(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project, in git, that passes every check."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # set when a git hook runs this
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "src" / "tokenlearner"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('from .one import f\n__version__ = "1.2.3"\n')
    (package / "one.py").write_text("def f(): ...\ndef _g(): ...\n")
    (package / "two.py").write_text("from .one import f\ndef _g(): ...\ndef h(): ...\n")
    changelog = "# Changes\n\n## [Unreleased]\n\n## [1.2.3] - 2026-11-23\n\n## 1.2.2\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


BAD = {
    "check_names_are_unique": ("src/tokenlearner/three.py", "class f: ...\n"),
    "check_changelog": ("CHANGELOG.md", "# Changes\n\n## 1.2.4\n\n## 1.2.3\n"),
    "check_citation": ("CITATION.cff", "cff-version: 1.2.3\nversion: 1.2.2\n"),
    "check_source_length": ("src/tokenlearner/long.py", "x = 1\n" * 501),
    "check_nothing_unfinished": ("src/tokenlearner/half.py", "x = 1  # TODO: y\n"),
    "check_file_sizes": ("weights.bin", "0" * 4_600_000),
}


@pytest.mark.parametrize("check", check_project.CHECKS, ids=lambda check: check.__name__)
def test_a_check_passes_a_sample_and_fails_on_its_bad_example(
    check: Callable[[Path], list[str]], sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_project.main(sample) == 0
    name, text = BAD[check.__name__]
    (sample / name).write_text(text)
    subprocess.run(["git", "-C", str(sample), "add", "."], check=True)
    [problem] = check(sample)
    assert name in problem
    assert check_project.main(sample) == 1
    assert f"{problem}\ncheck_project: 1 problem\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff"])
def test_a_missing_version_is_a_problem(name: str, sample: Path) -> None:
    (sample / name).unlink()
    assert check_project.main(sample) == 1
