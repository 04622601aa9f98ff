"""The documentation: its code runs, its commands and numbers are right, its drawings are kept."""

from __future__ import annotations

import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from files import make_image, make_video
from markdown_blocks import (
    ROOT,
    assert_options_exist,
    assert_targets_exist,
    blocks,
    commands_named,
    run_python_blocks,
)
from simulators import require_gym_pusht

import draw_docs
import tokenlearner
from docs_hooks import PAGES
from tokenlearner.commands.main import COMMANDS, main
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.models.hosts import HOSTS
from tokenlearner.training import setup

DOCS = ROOT / "docs"
README = ROOT / "README.md"
WRITTEN = sorted(DOCS.rglob("*.md"))
ROOT_PAGES = [ROOT / name for name in PAGES]
CODE = [page for page in [README, *WRITTEN] if any(b.language == "python" for b in blocks(page))]
SLOW = {"export.md", "tools.md", "bench.md", "choosing.md", "reducing.md"}  # seconds each
SHELLS = [README, *WRITTEN, *ROOT_PAGES]
MAX_NOT_RUN = 6


def id_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- code and commands -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ()) for page in CODE],
    ids=id_of,
)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name == "robots.md":
        require_gym_pusht()
    monkeypatch.chdir(tmp_path)
    with patch.dict(HOSTS):
        run_python_blocks(page)


def test_few_blocks_are_not_run() -> None:
    assert len([b for page in SHELLS for b in blocks(page) if b.not_run]) <= MAX_NOT_RUN


@pytest.mark.parametrize("page", SHELLS, ids=id_of)
def test_commands_options_and_targets_of_a_page_exist(page: Path) -> None:
    for words in commands_named("tokenlearner", [page]):
        assert_options_exist(words)
    for words in commands_named("make", [page]):
        assert_targets_exist(words)


def source_of(script: str) -> str:
    """A script's text, with that of the files beside it that it imports."""
    path = ROOT / script
    text = path.read_text(encoding="utf-8")
    beside = (
        path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.M)
    )
    return text + "".join(file.read_text(encoding="utf-8") for file in beside if file.is_file())


@pytest.mark.parametrize("page", SHELLS, ids=id_of)
def test_scripts_that_a_page_calls_exist_with_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for script, options in re.findall(r"python ((?:benchmarks|scripts)/\w+\.py)([^`\n]*)", text):
        source = source_of(script)
        for option in re.findall(r"--[a-z][\w-]*", options.partition("#")[0]):
            assert f'"{option}"' in source or f'"{option.replace("--no-", "--")}"' in source


@pytest.mark.parametrize("page", SHELLS, ids=id_of)
def test_extras_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {n for group in re.findall(r"'\.\[([\w,]+)\]'", text) for n in group.split(",")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[project.")[0]
    assert named <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


SHORT = {
    "reduce": [
        "--time=1s",
        "--views=1",
        "--batch_size=8",
        "--latency_batch=2",
    ],  # what makes a page's command short; the numbers on the page took longer
    "bench": ["--rounds", "2", "--batch_size", "2", "--training", "false"],
    "export": ["--rounds", "2"],
    "encode": ["--workers", "0"],
    "plan": ["--rounds", "2"],
    "train": shlex.split("--epochs 1 --images 128 --warmup_epochs 0.1 --calibrate 16"),
}
FIRST_PAGES = [README, DOCS / "index.md"]
ELSEWHERE = {"training.md", "app.md"}  # in test_recipes and in test_app_page
GUIDES = [
    page
    for page in WRITTEN
    if page not in FIRST_PAGES
    and page.name not in ELSEWHERE
    and commands_named("tokenlearner", [page], to_run=True)
]


def run_short(words: list[str]) -> None:
    """Runs a command in this process, with what makes it short unless it only prints.

    Graphs are traced, but not compiled, which takes minutes for a ViT-B; other tests compile.
    """
    compile_module = torch.nn.Module.compile

    def traced(module: torch.nn.Module, **options: Any) -> None:
        compile_module(module, **{k: v for k, v in options.items() if k != "mode"}, backend="eager")

    quick = patch.object(setup, "calibrate", partial(tokenlearner.calibrate, steps=2))
    try:
        with quick, patch.object(torch.nn.Module, "compile", traced):
            main([*words, *([] if "--print_config" in words else SHORT.get(words[0], []))])
    except SystemExit as end:
        if end.code:
            raise AssertionError(shlex.join(words)) from end


@pytest.mark.slow
@pytest.mark.parametrize("page", FIRST_PAGES, ids=id_of)
def test_the_commands_of_a_first_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = commands_named("tokenlearner", [page], to_run=True)
    assert commands
    if commands[0][0] == "reduce":  # a model, of the Hub or of a folder, and photographs
        run_short(["train", "--out", commands[0][1]])
        make_photos()
    for words in commands:
        run_short(words)


def make_photos() -> None:
    Path("photos").mkdir()
    for i in range(16):
        make_image(Path(f"photos/{i}.png"), (40 + 2 * i, 30))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trainings, images and videos that the guides' commands are about."""
    folder = tmp_path_factory.mktemp("guides")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        run_short(["train", "fashion_mnist_tl8"])
        run_short(["train", "moving_photographs"])
        run_short(["train", "--out", "runs/host"])
        run_short(["train", "--out", "runs/mini", "--num_tokens", "8", "--at", "0.5"])
        insertion = ["--model", "runs/host", "--insert", "8", "--teacher", "host"]
        run_short(["train", "--out", "runs/reduced", *insertion])
        shutil.copytree("runs/reduced", "tokenlearner-demo")
        run_short(["bench", "runs/host", "runs/reduced", "--json", "speed.json"])
        make_photos()
        Path("images").mkdir()
        make_image(Path("images/ramp.png"))
        make_video(Path("clip.mkv"), (48, 40))
        for name, count in (("train/a", 70), ("train/b", 70), ("val/a", 2), ("val/b", 2)):
            Path("videos", name).mkdir(parents=True)
            for i in range(count):
                make_video(Path("videos", name, f"{i}.mp4"))
    return folder


@pytest.mark.slow
def test_the_commands_of_the_guides_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    above = commands_named("tokenlearner", FIRST_PAGES, to_run=True)
    for words in commands_named("tokenlearner", GUIDES, to_run=True):
        if words in above:
            continue
        if words[0] == "train":  # a run is not written over
            out = words[words.index("--out") + 1] if "--out" in words else f"runs/{words[1]}"
            shutil.rmtree(out, ignore_errors=True)
        run_short(words)


# --- what the pages say ------------------------------------------------------------------------


def test_the_page_on_the_structure_has_every_package() -> None:
    text = (DOCS / "project.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (ROOT / "src" / "tokenlearner").glob("*/__init__.py")}
    rows = text.partition("| package |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == packages


def test_the_reference_has_every_public_name() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    listed = {line.rpartition(".")[2] for line in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    assert set(tokenlearner.__all__) <= listed


def test_home_lists_every_command() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`tokenlearner {name}`" not in text] == []


def table_numbers(page: Path) -> set[str]:
    """The numbers with two decimals or more in a page's tables."""
    rows = [row for row in page.read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    return {number for row in rows for number in re.findall(r"\d+\.\d\d+", row)}


@pytest.mark.parametrize("name", ["results.md", "video.md", "robots.md", "dense.md"])
def test_measured_numbers_are_those_of_the_benchmarks(name: str) -> None:
    rounded = {"0.59", "0.65", "0.58"}  # shares of the GMACs that stand there
    assert table_numbers(DOCS / name) - rounded <= table_numbers(ROOT / "benchmarks" / "README.md")


def test_costs_beside_the_papers_are_those_of_the_named_models() -> None:
    rows = re.findall(r"^\|.*\| (\d+\.\d+) \|$", (DOCS / "paper.md").read_text(), re.MULTILINE)
    table = (DOCS / "models.md").read_text(encoding="utf-8")
    ours = [cost for cost in rows if cost not in ("62.9", "17.5")]  # of the paper's figure
    assert len(ours) == 8
    assert [cost for cost in ours if f"| {cost} |" not in table] == []


# --- the drawings ------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_drawing_is_kept_and_shown_on_a_page(tmp_path: Path) -> None:
    draw_docs.main(tmp_path)
    kept = {path.name for path in (DOCS / "drawings").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == kept
    text = "".join(page.read_text(encoding="utf-8") for page in WRITTEN)
    assert [name for name in draw_docs.DRAWINGS if f"(drawings/{name}.svg)" not in text] == []


def test_the_cost_of_blocks_adds_up_to_that_of_the_model() -> None:
    model = tokenlearner.create_model("vit_mini_patch4_tl8at3_28").to("meta")
    image = torch.empty(1, 1, 28, 28, device="meta")
    found = draw_docs.cost_of_blocks(model, image)
    assert [tokens for tokens, _ in found] == [49, 49, 49, 8, 8, 8]
    patches, head = 49 * 4 * 4 * 64, 64 * 10
    blocks_gmacs = sum(cost for _, cost in found)
    assert round(1e9 * blocks_gmacs) + patches + head == count_macs(model, image)
