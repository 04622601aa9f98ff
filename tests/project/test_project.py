"""The project as a whole: imports, public names, the README, doctests, the project's own rules."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
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

# A file may import from files to its left only.
# fmt: off
IMPORT_ORDER = [
    "files", "checks", "checkpoints", "onednn", "layers", "modules", "fuser", "wrappers", "hosts",
    "insert", "saving", "card", "hub", "registry", "vit", "mixer", "clips", "video", "framevit",
    "stream", "convert", "scenic", "adapt", "zoo", "transfer", "labeled", "loader", "images",
    "fashion", "listing", "folders", "streamed", "shards", "readers", "videos", "moving", "data",
    "evaluate", "counting", "benchmark", "catalog", "distill", "calibrate", "options",
    "data_options", "recipe", "recipes", "augment", "objective", "engine", "loop", "start",
    "resume", "train", "plan", "sized", "tables", "plan_table", "machine", "bench_config",
    "bench_models", "bench_run", "bench_table", "narrow", "formats", "export", "export_table",
    "overlap", "map_table", "sheets", "maps", "map_inputs", "map_run", "progress", "contest",
    "report_parts", "report_charts", "report_read", "report_judge", "report_tables",
    "report_compare", "report_told", "report_sections", "report", "demo", "app_inputs",
    "app_models", "app_look", "app_view", "app_page", "app", "cli",
]
# fmt: on
ENTRANCES = ["__init__", "__main__"]  # these may import everything

# Names that the package has to export once the file exists.
PUBLIC_NAMES = {
    "modules": ["TokenLearner", "TokenLearnerModuleV11", "TokenLearnerV11"],
    "fuser": ["TokenFuser"],
    "insert": ["insert", "remove"],
    "zoo": ["create_model", "list_models", "save_model", "load_model", "push_to_hub"],
    "data": ["load_data"],
    "evaluate": ["evaluate"],
    "calibrate": ["calibrate"],
    "train": ["train"],
    "benchmark": ["benchmark"],
    "plan": ["plan"],
    "export": ["export"],
    "maps": ["attention_maps"],
    "onednn": ["use_onednn"],
}
HEAVY = {"timm", "torchvision", "transformers", "matplotlib", "rich", "jsonargparse", "gradio"}
MODULES = sorted(m.name for m in pkgutil.iter_modules(tokenlearner.__path__))
MAX_BLOCKS_NOT_RUN = 3


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- imports and names -------------------------------------------------------------------------


def own_imports(source: str) -> Iterator[str]:
    """The parts of the package that a module's source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["tokenlearner" if node.level else "", node.module]))
            names = [base] if "." in base else [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "tokenlearner":
                yield rest.split(".")[0] or "__init__"


def test_every_file_has_a_place_in_the_import_order() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    assert files <= {*IMPORT_ORDER, *ENTRANCES}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ENTRANCES])
def test_imports_point_one_way(name: str) -> None:
    above = {*IMPORT_ORDER[: IMPORT_ORDER.index(name)], "__version__"}
    source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    assert set(own_imports(source)) <= above


@pytest.mark.parametrize(
    "line",
    [
        "from .cli import main",
        "from . import cli",
        "from tokenlearner import cli",
        "import tokenlearner.commands.main",
        "def f():\n    from tokenlearner.commands.main import main",
    ],
)
def test_the_import_rule_sees_every_form_of_import(line: str) -> None:
    assert list(own_imports(f"import torch\nfrom einops import pack\n{line}")) == ["cli"]


def test_the_package_exports_the_public_names() -> None:
    wanted = {name for file in PUBLIC_NAMES if file in MODULES for name in PUBLIC_NAMES[file]}
    assert wanted <= set(tokenlearner.__all__)


def test_public_names_are_never_hidden_by_a_module_of_the_same_name() -> None:
    """`tokenlearner.insert` stays the function after the file insert.py has been imported."""
    code = (
        "import importlib, types, tokenlearner\n"
        f"for name in {MODULES}:\n"
        "    name == '__main__' or importlib.import_module(f'tokenlearner.{name}')\n"
        "values = {name: getattr(tokenlearner, name) for name in tokenlearner.__all__}\n"
        "print([n for n, v in values.items() if isinstance(v, types.ModuleType)])"
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
        "loaded = lambda: [name in sys.modules for name in ('torch', 'tokenlearner.zoo')]\n"
        "print(loaded(), tokenlearner.TokenLearner and loaded())"
    )
    assert run_python(code) == "[False, False] [True, False]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tokenlearner' has no attribute 'tokens'"):
        tokenlearner.tokens  # noqa: B018


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in MODULES if name != "__main__")])
def test_doctests_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"tokenlearner{name}")
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
    "check_source_length": ("src/tokenlearner/long.py", "x = 1\n" * 301),
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
