"""The command `tokenlearner`: what people type, and what they get back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenlearner
from tokenlearner import create_model, save_model
from tokenlearner.cli import COMMANDS, main


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenlearner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out and what in out for name, what in COMMANDS.items())


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"tokenlearner {tokenlearner.__version__}\n"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("trian") == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    out = " ".join(capsys.readouterr().out.split("options:")[1].split())
    options = [part for part in out.split(" --")[1:] if part != "help Show this help message"]
    assert options
    assert not [option for option in options if len(option.split("(type")[0].split()) < 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--lr", "-1"], "tokenlearner train: lr is -1.0, expected a number above 0"),
        (["train", "--model", "nothing_like_it"], "tokenlearner train: there is no model"),
        (["train", "--data", "imagenet"], "tokenlearner train: unknown data set 'imagenet'"),
        (["eval", "nowhere"], "tokenlearner eval: there is no nowhere"),
        (["demo", "--tokens", "0"], "tokenlearner demo: tokens is 0"),
        (["train", "--epochs", "many"], 'key "epochs"'),
        (["train", "--epoch_count", "3"], "--epoch_count"),
    ],
)
def test_a_mistake_gets_a_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_then_eval_gives_the_same_accuracy(tmp_path: Path) -> None:
    small = ["--model", "vit_mini_patch4_28", "--num_tokens", "2", "--at", "1", "--epochs", "1"]
    quick = ["--warmup_epochs", "0.1", "--batch_size", "500"]
    trained = run("train", "--out", "run", *small, *quick, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "The checkpoint is run/model.safetensors" in trained.stdout
    tested = run("eval", "run", cwd=tmp_path)
    line = next(x for x in tested.stdout.splitlines() if x.startswith("top1_percent: "))
    top1 = float(line.split()[1])
    assert f"held-out top-1 {top1:.1f} %" in trained.stdout
    assert top1 > 12  # guessing gets 10


def test_train_with_insert_leaves_a_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7}
    save_model(create_model("vit_mini_patch4_28", **shape), "host")
    insertion = ["--model", "host", "--insert", "3", "--teacher", "host", "--calibrate", "0"]
    quick = ["--images", "64", "--epochs", "1", "--warmup_epochs", "0.1", "--out", "run"]
    main(["train", *insertion, *quick])
    out = capsys.readouterr().out
    assert "3 learned tokens" in out
    assert "top-1 on held-out pictures" in out
    assert out.endswith("The checkpoint is run/model.safetensors\n")
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"table.txt", "metrics.json", "maps.png"} <= made


def test_train_with_insert_needs_matplotlib_and_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert exit_code("train", "--model", "host", "--insert", "3") == 2
    assert "maps need matplotlib; run pip install 'tokenlearner[train]'" in capsys.readouterr().err
