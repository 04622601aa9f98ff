"""The command `tokenlearner`: what people type, and what they get back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenlearner
from tokenlearner import create_model, save_model
from tokenlearner.commands import main as cli
from tokenlearner.commands.main import COMMANDS, main, train_options
from tokenlearner.training.checkpointing import TrainingInterrupted
from tokenlearner.training.recipes import list_recipes


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenlearner", *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=one_thread)


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out and what in out for name, what in COMMANDS.items())


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--version", 0), ("trian", 2)])
def test_help_and_mistakes_do_not_wait_for_torch(option: str, code: int) -> None:
    program = (
        "import sys, tokenlearner.commands.main as command\n"
        f"sys.argv[1:] = [{option!r}]\n"
        "try: command.main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == f"{code} False"


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"tokenlearner {tokenlearner.__version__}\n"


@pytest.mark.parametrize("paths", [(), ("a", "b")], ids=["none", "two"])
def test_app_takes_any_number_of_checkpoints(
    paths: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("tokenlearner.commands.app.server.app", served.append)
    main(["app", *paths, "--port", "8000"])
    [config] = served
    assert (tuple(config.checkpoints), config.port) == (paths, 8000)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("trian") == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    out = " ".join(capsys.readouterr().out.split("options:")[1].split())
    parts = [part for part in out.split(" --")[1:] if part != "help Show this help message"]
    options = [part for part in parts if not part.endswith(",")]  # the other name follows
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
        (
            ["train", "--epochs", "many"],
            "key \"epochs\": Expected a <class 'int'>. Got value: many",
        ),
        (["train", "--epoch_count", "3"], "nrecognized arguments: --epoch_count 3"),
        (["train", "no_such"], "there is no recipe 'no_such', expected a YAML file or one of: cif"),
        (["train", "fashion_mnist", "--epochs", "0"], "epochs is 0"),
        (["eval", "x", "--img_size", "0.5"], 'key "img_size"'),
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


def test_train_then_eval_gives_the_same_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "vit_mini_patch4_28", "--num_tokens", "2", "--at", "1", "--epochs", "1"]
    quick = ["--warmup_epochs", "0.1", "--images", "1280", "--lr", "4e-3"]
    quick += ["--model_kwargs", '{"embed_dim": 32, "depth": 2}']
    trained = run("train", "--out", "run", *small, *quick, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "The checkpoint is run/model.safetensors" in trained.stdout
    main(["eval", str(tmp_path / "run")])
    printed = capsys.readouterr().out.splitlines()
    line = next(x for x in printed if x.startswith("top1_percent: "))
    top1 = float(line.split()[1])
    assert f"held-out top-1 {top1:.1f} %" in trained.stdout
    assert top1 > 12  # guessing gets 10


def test_train_with_insert_leaves_a_table_and_images(
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
    assert "top-1 on held-out images" in out
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


# recipes


def test_help_of_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--help") == 0
    out = capsys.readouterr().out
    assert "[RECIPE]" in out
    assert all(f"  {name} " in out and what in out for name, what in list_recipes().items())


def test_options_of_the_command_line_go_before_a_recipe_s() -> None:
    options = train_options(["fashion_mnist_tl8", "--lr", "0.5", "--trackers", "[tensorboard]"])
    assert (options["lr"], options["trackers"]) == (0.5, ["tensorboard"])
    assert options["model"] == "vit_mini_patch4_tl8at3_28"


def test_what_print_config_prints_is_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", "imagenet1k_deit", "--lr", "0.25", "--print_config") == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    again = train_options([str(path)])
    assert again == train_options(["imagenet1k_deit", "--lr", "0.25"])
    assert again["scale"] == [0.08, 1.0]


def test_the_train_json_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    options = train_options(["imagenet1k_paper", "--root", "x"])
    path = tmp_path / "train.json"
    path.write_text(json.dumps(options))
    assert train_options([str(path)]) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1\nlerning: 3\n", "lerning"),
        ("epochs: many\n", "key \"epochs\": Expected a <class 'int'>. Got value: many"),
        ("mixed_precision: no\n", 'key "mixed_precision"'),  # a truth value in YAML
        ("epochs: [3\n", "Problems parsing config"),
        ("- epochs\n", "Unexpected config"),
        ("", "Unexpected config"),
    ],
)
def test_a_recipe_with_a_mistake_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert exit_code("train", str(path), "--out", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tokenlearner train: {path}: ")
    assert message in err
    assert err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [path]


# how it ends


def failing(error: BaseException) -> Callable[..., None]:
    def run(arguments: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("wrong"), 2),
        (RuntimeError("on the way"), 1),
        (TrainingInterrupted(signal.SIGTERM, "runs/x", 7), 143),
        (TrainingInterrupted(signal.SIGINT, "runs/x", 7), 130),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_the_exit_code_says_how_it_ended(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(cli._RUN, "train", failing(error))
    assert exit_code("train") == code
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("x"), TrainingInterrupted(signal.SIGTERM, "runs/x", 7)], ids=repr
)
def test_of_several_processes_one_says_what_all_would_say(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(cli._RUN, "train", failing(error))
    assert exit_code("train") in (2, 143)
    assert capsys.readouterr().err == ""


def test_what_goes_wrong_in_one_process_is_said_with_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(cli._RUN, "train", failing(RuntimeError("no space")))
    assert exit_code("train") == 1
    assert capsys.readouterr().err == "tokenlearner train, process 1: no space\n"


def test_only_the_first_process_prints_what_came_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*SMALL_RUN, "--images", "64", "--out", str(tmp_path / "run")]
    monkeypatch.setenv("RANK", "1")  # alone as torch sees it: there is no WORLD_SIZE
    main(["train", *quick])
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    main(["train", *quick, "--resume", "auto"])
    out = capsys.readouterr().out
    assert "held-out top-1, last epoch" in out
    assert out.endswith("model.safetensors\n")


# eval

SMALL_RUN = [
    *("--model", "vit_mini_patch4_28", "--epochs", "1", "--warmup_epochs", "0.1"),
    *("--model_kwargs", '{"embed_dim": 16, "depth": 2, "patch_size": 7}'),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes, and a run that was trained on it at 14 pixels, in gray."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (80 * (name == "a"), 40 * i, 90)).save(folder / f"{i}.png")
    size = ["--img_size", "14", "--in_chans", "1", "--batch_size", "3", "--workers", "0"]
    data = ["--data", "folder", "--root", str(tmp_path / "data")]
    main(["train", *SMALL_RUN, *size, *data, "--out", str(tmp_path / "run")])
    return tmp_path


def test_eval_judges_as_the_run_did(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = map(json.loads, (images / "run" / "metrics.jsonl").read_text().splitlines())
    capsys.readouterr()
    main(["eval", str(images / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["images: 6", f"loss: {row['test_loss']:.4f}"]
    assert len(lines) == 4


def test_eval_counts_broken_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "data" / "val" / "b" / "1.png").write_bytes(b"no image")
    capsys.readouterr()
    main(["eval", str(images / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("images: 5", "broken: 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--img_size", "21"], "cannot be judged by images of [1, 21, 21] (Input height (21)"),
        (["--in_chans", "3"], "cannot be judged by images of [3, 14, 14]"),
        (["--root", "nowhere"], "nowhere is not there"),
        (["--data", "torch/cifar10"], "needs torchvision's folder of data; pass root"),
    ],
)
def test_eval_s_options_go_before_those_of_the_run(
    options: list[str], message: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("eval", str(images / "run"), *options) == 2
    assert message in capsys.readouterr().err
