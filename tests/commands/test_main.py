"""The command `tokenlearner`: options, help, mistakes and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files import make_image_folder

import tokenlearner
from tokenlearner import create_model, save_model
from tokenlearner.commands import main as cli
from tokenlearner.commands.main import COMMANDS, main
from tokenlearner.commands.train import train_options
from tokenlearner.training.checkpointing import TrainingInterrupted
from tokenlearner.training.recipes import list_recipes

SMALL_RUN = [
    *("--model", "vit_mini_patch4_28", "--epochs", "1", "--warmup_epochs", "0.1"),
    *("--model_kwargs", '{"embed_dim": 16, "depth": 2, "patch_size": 7}', "--out", "run"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs every command in a folder that is empty, and gives it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code


# --- help and options ---------------------------------------------------------------------------


def test_help_lists_every_command_and_version_is_the_package_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out and summary in out for name, summary in COMMANDS.items())
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"tokenlearner {tokenlearner.__version__}\n"


def test_help_and_mistakes_of_a_process_do_not_wait_for_torch() -> None:
    program = (
        "import sys, tokenlearner.commands.main as command\n"
        "for sys.argv[1:] in (['--help'], ['--version'], ['trian']):\n"
        "    try: command.main()\n"
        "    except SystemExit as end: print('ends', end.code, 'torch' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    again = [sys.executable, "-m", "tokenlearner", "--version"]
    assert subprocess.run(again, capture_output=True, text=True).stdout.startswith("tokenlearner ")
    ends = [line for line in out.splitlines() if line.startswith("ends")]
    assert ends == ["ends 0 False", "ends 0 False", "ends 2 False"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_of_a_process_sleep_where_they_wait_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tokenlearner", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    whole = capsys.readouterr().out
    recipes = list_recipes() if command == "train" else {}
    assert all(f"  {name} " in whole and text in whole for name, text in recipes.items())
    out = " ".join(whole.split("options:")[1].split())
    parts = [part for part in out.split(" --")[1:] if part != "help Show this help message"]
    options = [part for part in parts if not part.endswith(",")]  # the other name follows
    assert options
    assert not [option for option in options if len(option.split("(type")[0].split()) < 4]


def begun(out: str) -> list[list[str]]:
    """The words of the commands in a text."""
    lines = out.replace("\\\n", "").splitlines()
    return [line.split() for line in lines if line.startswith("  tokenlearner ")]


def test_without_a_command_it_says_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    out = capsys.readouterr().out
    lines = begun(out)
    assert [words[1] for words in lines] == ["reduce", "train", "maps"]
    parts = [[word for word in words[2:] if word.startswith("--")] for words in lines]
    for (_, name, *_), options in zip(lines, parts, strict=True):
        assert exit_code(name, "--help") == 0
        explained = capsys.readouterr().out
        assert all(option in explained for option in options)


def test_who_has_no_tokenlearner_in_the_shell_is_told_how_to_find_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(here / "env" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(here))
    main([])
    assert "source" not in capsys.readouterr().out  # where there is nothing to source
    (here / "env" / "bin").mkdir(parents=True)
    (here / "env" / "bin" / "activate").touch()
    main([])
    assert "\n  source env/bin/activate\n" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    main([])
    assert "source" not in capsys.readouterr().out


@pytest.mark.slow
def test_training_and_maps_as_it_says_run_on_a_folder_of_images(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    main([])
    _, train, maps = (words[1:] for words in begun(capsys.readouterr().out))
    make_image_folder(here / "photos", "ab", splits=["."], count=12)
    main([*train, "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "8"])
    assert "224 x 224 pixels, which yours are resized to" in capsys.readouterr().out
    main(maps)
    assert [*(here / "looked").iterdir()]


def test_several_models_are_taken_without_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []
    for function in ("app.server.app", "bench.table.bench_tables"):
        fake = lambda config, *_: configs.append(config) or ()  # noqa: E731
        monkeypatch.setattr(f"tokenlearner.commands.{function}", fake)
    for arguments in ("app --port 8000", "app a b", "bench vit+insert(8,6) vit"):
        main(arguments.split())
    default, app, bench = configs
    assert (default.checkpoints, default.port) == ((), 8000)
    assert (app.checkpoints, app.port) == (["a", "b"], None)
    assert bench.models == ["vit+insert(8,6)", "vit"]


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
        (["plan", "vit_mini_patch4_28", "--budget", "2"], ["tokenlearner plan: budget is 2.0"]),
        (["plan", "vit_mini_patch4_28", "--tokens", "4,x"], ["plan: tokens is '4,x'"]),
        (["bench"], ["models"]),
        (["bench", "vit+insert(x)"], ["tokenlearner bench: 'vit+insert(x)' has 'x'"]),
        (["bench", "nothing_like_it"], ["tokenlearner bench:", "'nothing_like_it'"]),
    ],
)
def test_a_mistake_gets_a_message_and_exit_code_2(
    arguments: list[str], words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert err.removeprefix("building\n").count("\n") == 1 or arguments == ["trian"]
    assert not list(here.iterdir())


@pytest.mark.parametrize("package", ["jsonargparse", "matplotlib"])
def test_a_missing_package_is_named_before_any_work(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert exit_code("train", "--model", "host", "--insert", "3") == 2
    assert f"needs {package}; run pip install '.[train]'" in capsys.readouterr().err


def failing(error: BaseException) -> Callable[[str], Callable[..., None]]:
    def run(arguments: Any) -> None:
        raise error

    return lambda name: run


@pytest.mark.parametrize(
    ("error", "code", "of_another"),
    [
        (ValueError("wrong"), 2, ""),
        (RuntimeError("no space"), 1, "tokenlearner train, process 1: no space\n"),
        (TrainingInterrupted(signal.SIGTERM, "runs/x", 7), 143, ""),
        (TrainingInterrupted(signal.SIGINT, "runs/x", 7), 130, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_the_exit_code_is_that_of_the_error_and_other_processes_print_only_their_own(
    error: BaseException,
    code: int,
    of_another: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_load", failing(error))
    assert exit_code("train") == code
    assert str(error) in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert exit_code("train") == code
    assert capsys.readouterr().err == of_another


# --- train --------------------------------------------------------------------------------------


def test_train_then_eval_gives_the_same_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ["--num_tokens", "2", "--at", "1", "--lr", "4e-3", "--images", "1280"]
    main(["train", *SMALL_RUN, *tokens])
    trained = capsys.readouterr().out
    assert "The checkpoint is run/model.safetensors" in trained
    main(["eval", "run"])
    printed = capsys.readouterr().out.splitlines()
    [top1] = [float(line.split()[1]) for line in printed if line.startswith("top1_percent: ")]
    assert f"held-out top-1 {top1:.1f} %" in trained
    assert top1 > 12  # guessing gets 10


@pytest.mark.slow
def test_train_with_insert_leaves_a_table_and_images(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenlearner.commands._comparison.MAX_IMAGES", 1)
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7}
    save_model(create_model("vit_mini_patch4_28", **shape), "host")
    insertion = ["--model", "host", "--insert", "3", "--teacher", "host", "--calibrate", "0"]
    quick = ["--images", "64", "--epochs", "1", "--warmup_epochs", "0.1", "--out", "run"]
    main(["train", *insertion, *quick])
    out = capsys.readouterr().out
    assert all(words in out for words in ("3 learned tokens", "top-1 on held-out images"))
    assert out.endswith("The checkpoint is run/model.safetensors\n")
    made = {path.name for path in (here / "run").iterdir()}
    assert {"table.txt", "metrics.json", "maps.png"} <= made


def test_only_the_first_process_prints_the_results_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*SMALL_RUN, "--images", "64"]
    monkeypatch.setenv("RANK", "1")  # alone as torch sees it: there is no WORLD_SIZE
    main(["train", *quick])
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    main(["train", *quick, "--resume", "auto"])
    out = capsys.readouterr().out
    assert "held-out top-1, last epoch" in out
    assert out.endswith("model.safetensors\n")


# --- recipes ------------------------------------------------------------------------------------


def test_options_of_the_command_line_go_before_a_recipe_s() -> None:
    options = train_options(["fashion_mnist_tl8", "--lr", "0.5", "--trackers", "[tensorboard]"])
    assert (options["lr"], options["trackers"]) == (0.5, ["tensorboard"])
    assert options["model"] == "vit_mini_patch4_tl8at3_28"


def test_what_print_config_prints_and_the_train_json_of_a_run_are_recipes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("train", "imagenet1k_deit", "--lr", "0.25", "--print_config") == 0
    path, run = here / "again.yaml", here / "train.json"
    path.write_text(capsys.readouterr().out)
    options = train_options(["imagenet1k_deit", "--lr", "0.25"])
    run.write_text(json.dumps(options))
    for arguments in ([str(path)], ["--config", str(path)], [str(run)]):
        assert train_options(arguments) == options
    assert options["scale"] == [0.08, 1.0]


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lr: 0.1\nlerning: 3\n", "lerning"),
        ("epochs: many\n", '"epochs"'),
        ("mixed_precision: no\n", '"mixed_precision"'),  # a truth value in YAML
        ("epochs: [3\n", "recipe"),
        ("- epochs\n", "recipe"),
        ("", "recipe"),
        ("lr: 0.1\nlr: 0.2\n", "lr twice"),
        ("model_kwargs: {depth: 2, depth: 3}\n", "depth twice"),
        ("lr: " + "[" * 5000, "recipe"),
        (BOMB, "aliases stand for more"),
        ("model_kwargs: &a {x: *a}\n", "recipe"),
        ("epochs: " + "1:" * 2**19, "recipes at most"),  # a number of base 60
        ("config: mine.yaml\n", "loop"),
        ("model: !!python/name:os.system\n", "constructor"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}").replace("1, 1", "{x: 1}"), "aliases"),
    ],
)
def test_a_recipe_with_a_mistake_is_named(
    text: str, word: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here / "mine.yaml"
    path.write_text(text)
    assert exit_code("train", str(path), "--out", "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tokenlearner train: {path}: ")
    assert word in err
    assert err.count("\n") == 1
    assert [*here.iterdir()] == [path]


# --- streams ------------------------------------------------------------------------------------


def in_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}".replace("tokenlearner", TOKENLEARNER)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


TOKENLEARNER = f"{sys.executable} -m tokenlearner"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("tokenlearner models '*mini*' | true", 141, ""),
        ("tokenlearner models '*mini*' > /dev/full", 1, "output cannot be written"),
        ("tokenlearner models '*mini*' >&-", 0, ""),
        ("tokenlearner models '*mini*'", 0, ""),
        ("tokenlearner eval größe", 2, r"gr\xf6\xdfe"),
        (r"tokenlearner eval $'\xff'", 2, r"\udcff"),
        (r"tokenlearner eval $'\e[31m'", 2, r"\x1b[31m"),
    ],
)
def test_output_that_cannot_be_shown_ends_in_no_traceback(line: str, code: int, words: str) -> None:
    done = in_shell(line, PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert words in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "\x1b" not in done.stderr
