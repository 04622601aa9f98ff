"""Names of files and classes are text: no escape, no markup of theirs reaches an output."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from files import make_image, make_image_folder

from tokenlearner.commands.main import main
from tokenlearner.utils.text import plain_text

NAME = "\x1b]0;x\x07[/x]<b>$x$"  # a folder and what is in it
RUN = [
    *("--model", "vit_mini_patch4_28", "--num_tokens", "2", "--epochs", "1", "--img_size", "28"),
    *("--model_kwargs", '{"embed_dim": 16, "depth": 2, "patch_size": 7, "num_heads": 2}'),
    *("--data", "folder", "--in_chans", "3", "--batch_size", "4", "--workers", "0"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose classes have such names, with a broken image, and a run on them."""
    folder = tmp_path_factory.mktemp("names") / NAME
    first, _, second = NAME.partition("/")
    make_image_folder(folder / "data", [first, second, "\x9b31m"], count=2)
    for split in ("train", "val"):
        (folder / "data" / split / first / f"2{second}.png").write_bytes(b"no image")
    main(["train", *RUN, "--root", str(folder / "data"), "--out", str(folder / "run")])
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ["train", *RUN, "--root", "{}/data", "--out", "{}/new", "--max_broken", "0"],
            marks=pytest.mark.slow,
        ),
        ["train", *RUN, "--root", "{}/nowhere", "--out", "{}/none"],
        ["eval", "{}/run"],
        ["eval", "{}/nowhere"],
        ["predict", "{}/run", "{}/data/val"],
        ["predict", "{}/run", "{}/data/val", "--out", "{}/out.csv"],
        pytest.param(["maps", "{}/run", "{}/data/val", "{}/maps"], marks=pytest.mark.slow),
        pytest.param(["report", "{}/run", "--out", "{}/x.html"], marks=pytest.mark.slow),
        ["export", "{}/run", "--out", "{}/nowhere/a.onnx"],
        ["plan", "{}/run"],
        ["bench", "{}/nowhere"],
        ["convert", "{}/nowhere", "{}/x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_prints_what_steers_a_terminal(
    arguments: list[str], work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with suppress(SystemExit):
        main([part.replace("{}", str(work)) for part in arguments])
    captured = capfd.readouterr()
    for printed in (captured.out, captured.err):
        assert not {*printed} & {"\x1b", "\x07", "\x9b"}
        assert "Traceback" not in printed


def test_a_report_shows_names_as_text(work: Path) -> None:
    page = (work / "run" / "report.html").read_text(encoding="utf-8")
    assert not {*page} & {"\x1b", "\x07", "\x9b"}
    assert r"\x1b]0;x\x07[" in page
    assert "x]<b>" not in page
    [row] = (work / "run" / "metrics.jsonl").read_text().splitlines()
    assert "\x1b" in json.loads(row)["test_broken_files"][0]  # exactly, for programs


def test_what_steers_is_escaped_and_letters_of_all_languages_stay() -> None:
    assert plain_text("a\u202eb\u2066é😀\u00a0\t\udce9") == "a\\u202eb\\u2066é😀\u00a0\\t\\udce9"


def test_an_image_is_drawn_whatever_its_name(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.parent.mkdir(parents=True)
    folder.mkdir()
    make_image(folder / "$x$\x1b.png")
    main(["maps", str(work / "run"), str(folder), f"{folder}-out"])
    assert len([*Path(f"{folder}-out").glob("*.png")]) == 1
