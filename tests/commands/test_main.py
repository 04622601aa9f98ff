"""The command `tokenlearner`: options, help, mistakes and exit codes."""

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

import tokenlearner
from tokenlearner import create_model, save_model
from tokenlearner.commands import main as cli
from tokenlearner.commands.main import COMMANDS, main
from tokenlearner.commands.train import train_options
from tokenlearner.training.checkpointing import TrainingInterrupted
from tokenlearner.training.recipes import list_recipes

SMALL_RUN = [
    *("--model", "vit_mini_patch4_28", "--epochs", "1", "--warmup_epochs", "0.1"),
    *("--model_kwargs", '{"embed_dim": 16, "depth": 2, "patch_size": 7}'),
]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenlearner", *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=one_thread)


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code


def configs_of(command: str, function: str, patch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that a command's function is called with, from now on."""
    configs: list[Any] = []
    patch.setattr(
        f"tokenlearner.commands.{command}.{function}", lambda c, *_: configs.append(c) or ()
    )
    return configs


# --- help and options ---------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out and summary in out for name, summary in COMMANDS.items())


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--version", 0), ("trian", 2)])
def test_help_and_mistakes_do_not_wait_for_torch(option: str, code: int) -> None:
    program = (
        "import sys, tokenlearner.commands.main as command\n"
        f"sys.argv[1:] = [{option!r}]\n"
        "try: command.main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == f"{code} False"


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"tokenlearner {tokenlearner.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    out = " ".join(capsys.readouterr().out.split("options:")[1].split())
    parts = [part for part in out.split(" --")[1:] if part != "help Show this help message"]
    options = [part for part in parts if not part.endswith(",")]  # the other name follows
    assert options
    assert not [option for option in options if len(option.split("(type")[0].split()) < 4]


@pytest.mark.parametrize("paths", [(), ("a", "b")], ids=["none", "two"])
def test_app_takes_any_number_of_checkpoints(
    paths: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = configs_of("app.server", "app", monkeypatch)
    main(["app", *paths, "--port", "8000"])
    assert [(tuple(config.checkpoints), config.port) for config in configs] == [(paths, 8000)]


def test_bench_takes_models_without_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = configs_of("bench.table", "bench_table", monkeypatch)
    main(["bench", "vit+insert(8,6)", "vit", "--rounds", "3"])
    assert [(config.models, config.rounds) for config in configs] == [
        (["vit+insert(8,6)", "vit"], 3)
    ]


def test_models_takes_a_pattern_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "vit_mini*", "--markdown", "true"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| model")
    assert all("vit_mini" in row for row in rows[2:])


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["invalid choice", "'trian'"]),
        (["train", "--lr", "-1"], ["tokenlearner train: lr is -1.0"]),
        (["train", "--model", "nothing_like_it"], ["tokenlearner train:", "nothing_like_it"]),
        (["train", "--data", "imagenet"], ["tokenlearner train:", "'imagenet'"]),
        (["eval", "nowhere"], ["tokenlearner eval:", "nowhere"]),
        (["demo", "--tokens", "0"], ["tokenlearner demo: tokens is 0"]),
        (["train", "--epochs", "many"], ['"epochs"', "int", "many"]),
        (["train", "--epoch_count", "3"], ["--epoch_count"]),
        (["train", "no_such"], ["'no_such'", "cifar"]),
        (["train", "fashion_mnist", "--epochs", "0"], ["epochs is 0"]),
        (["eval", "x", "--img_size", "0.5"], ['"img_size"']),
        (["bench"], ["models"]),
    ],
)
def test_a_mistake_gets_a_message_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert err.count("\n") == 1 or arguments == ["trian"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["jsonargparse", "matplotlib"])
def test_a_missing_package_is_named_before_any_work(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert exit_code("train", "--model", "host", "--insert", "3") == 2
    assert f"needs {package}; run pip install 'tokenlearner[train]'" in capsys.readouterr().err


def failing(error: BaseException) -> Callable[[str], Callable[..., None]]:
    def run(arguments: Any) -> None:
        raise error

    return lambda name: run


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
def test_the_exit_code_is_that_of_the_error(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_load", failing(error))
    assert exit_code("train") == code
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("x"), 2, ""),
        (TrainingInterrupted(signal.SIGTERM, "runs/x", 7), 143, ""),
        (RuntimeError("no space"), 1, "tokenlearner train, process 1: no space\n"),
    ],
    ids=repr,
)
def test_other_processes_print_only_errors_of_their_own(
    error: Exception,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_load", failing(error))
    assert exit_code("train") == code
    assert capsys.readouterr().err == message


# --- train --------------------------------------------------------------------------------------


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


def test_only_the_first_process_prints_the_results_of_training(
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


# --- recipes ------------------------------------------------------------------------------------


def test_help_of_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--help") == 0
    out = capsys.readouterr().out
    assert "[RECIPE]" in out
    assert all(f"  {name} " in out and text in out for name, text in list_recipes().items())


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
    assert train_options(["--config", str(path)]) == again
    assert again["scale"] == [0.08, 1.0]


def test_the_train_json_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    options = train_options(["imagenet1k_paper", "--root", "x"])
    path = tmp_path / "train.json"
    path.write_text(json.dumps(options))
    assert train_options([str(path)]) == options


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lr: 0.1\nlerning: 3\n", "lerning"),
        ("epochs: many\n", '"epochs"'),
        ("mixed_precision: no\n", '"mixed_precision"'),  # a truth value in YAML
        ("epochs: [3\n", "config"),
        ("- epochs\n", "config"),
        ("", "config"),
    ],
)
def test_a_recipe_with_a_mistake_is_named(
    text: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert exit_code("train", str(path), "--out", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tokenlearner train: {path}: ")
    assert word in err
    assert err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [path]
