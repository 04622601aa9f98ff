"""The project as a whole: imports, public names, the README, doctests, the project's own rules."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_blocks import (
    assert_options_exist,
    assert_targets_exist,
    blocks,
    commands_named,
    run_python_blocks,
    shell_commands,
)

import check_project
import tokenlearner

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tokenlearner"
READMES = sorted(ROOT.glob("README*.md"))

PACKAGES = (
    "checkpoints",
    "commands",
    "data",
    "deploy",
    "evaluation",
    "layers",
    "models",
    "training",
)
PACKAGES += ("utils",)
HEAVY = {"timm", "torchvision", "transformers", "matplotlib", "rich", "jsonargparse", "gradio"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tokenlearner.__path__, "tokenlearner.")
    if not module.name.endswith("__main__")
)
MAX_BLOCKS_NOT_RUN = 3


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


def test_imports_between_packages_go_one_way(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tokenlearner", ignore=shutil.ignore_patterns("assets"))
    result = lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("layers/token_fuser.py", "from ..models.insertion import insert"),
        ("models/vit.py", "def f():\n    from ..training.run import train"),
        ("data/loader.py", "from tokenlearner.layers import TokenFuser"),
        ("models/hosts.py", "from ..data.factory import load_data"),
        ("utils/io.py", "import tokenlearner.commands.main"),
    ],
)
def test_an_import_up_breaks_the_contract(file: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tokenlearner", ignore=shutil.ignore_patterns("assets"))
    path = tmp_path / "tokenlearner" / file
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout
    assert f"tokenlearner.{file[:-3].replace('/', '.')} -> " in result.stdout


def test_the_packages_are_those_of_the_contract() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in PACKAGES)])
def test_every_name_that_a_package_exports_can_be_imported(package: str) -> None:
    module = importlib.import_module(f"tokenlearner{package}")
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_public_names_are_never_hidden_by_a_module_of_the_same_name() -> None:
    """`tokenlearner.insert` stays the function whatever has been imported."""
    code = (
        "import importlib, types, tokenlearner\n"
        f"for name in {MODULES}:\n"
        "    importlib.import_module(name)\n"
        f"packages = [tokenlearner, *(getattr(tokenlearner, n) for n in {PACKAGES})]\n"
        "print([n for p in packages for n in getattr(p, '__all__', []) "
        "if isinstance(getattr(p, n), types.ModuleType)])"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", tokenlearner.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(tokenlearner, name) is not None
    assert name in dir(tokenlearner)


def test_import_is_light() -> None:
    code = f"import sys, tokenlearner as t; t.insert; print(sorted({HEAVY} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_a_public_name_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, tokenlearner\n"
        "loaded = lambda: [name in sys.modules for name in ('torch', 'tokenlearner.models')]\n"
        "print(loaded(), tokenlearner.TokenLearner and loaded())"
    )
    assert run_python(code) == "[False, False] [True, False]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tokenlearner' has no attribute 'tokens'"):
        tokenlearner.tokens  # noqa: B018


@pytest.mark.parametrize("name", ["tokenlearner", *MODULES])
def test_doctests_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


# --- README ------------------------------------------------------------------------------------


def test_there_is_a_readme() -> None:
    assert ROOT / "README.md" in READMES


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_readme_python_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len([block for block in blocks(path) if block.not_run]) <= MAX_BLOCKS_NOT_RUN
    run_python_blocks(path)


@pytest.mark.parametrize("words", commands_named("make", READMES), ids=shlex.join)
def test_readme_make_targets_exist(words: list[str]) -> None:
    assert_targets_exist(words)


@pytest.mark.parametrize("words", commands_named("tokenlearner", READMES), ids=shlex.join)
def test_readme_subcommands_and_options_exist(words: list[str]) -> None:
    assert_options_exist(words)


@pytest.mark.slow
def test_readme_commands_run_one_after_the_other(tmp_path: Path) -> None:
    commands = commands_named("tokenlearner", READMES, to_run=True)
    assert commands
    for words in commands:
        command = [sys.executable, "-m", "tokenlearner", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stderr}"


def test_shell_commands_are_read_from_a_readme(tmp_path: Path) -> None:
    text = (
        "```console\n$ tokenlearner demo --seed 1 \\\n    --fast  # quick\nmake: output\n```\n"
        "```bash\npip install . && make test\n```\n```text\nmake nothing\n```\n"
    )
    (tmp_path / "README.md").write_text(text)
    commands = [shlex.join(words) for words in shell_commands(tmp_path / "README.md")]
    assert commands == ["tokenlearner demo --seed 1 --fast", "pip install .", "make test"]


def test_a_block_not_run_needs_a_reason(tmp_path: Path) -> None:
    text = "Text.\n\n<!-- not run: needs a GPU -->\n```python\na\n```\n\n```python\nb\n```\n"
    (tmp_path / "README.md").write_text(text)
    first, second = blocks(tmp_path / "README.md")
    assert first == ("python", "a\n", 5, "needs a GPU")
    assert second == ("python", "b\n", 9, "")


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


def test_the_sample_project_passes(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_project.main(sample) == 0
    assert capsys.readouterr().out == "check_project: no problems\n"


@pytest.mark.parametrize("check", check_project.CHECKS, ids=lambda check: check.__name__)
def test_a_check_fails_on_its_bad_example(
    check: Callable[[Path], list[str]], sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, text = BAD[check.__name__]
    (sample / name).write_text(text)
    subprocess.run(["git", "-C", str(sample), "add", "."], check=True)
    [problem] = check(sample)
    assert name in problem
    assert check_project.main(sample) == 1
    assert capsys.readouterr().out == f"{problem}\ncheck_project: 1 problem\n"


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff"])
def test_a_missing_version_is_a_problem(name: str, sample: Path) -> None:
    (sample / name).unlink()
    assert check_project.main(sample) == 1
