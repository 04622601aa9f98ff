"""The scripts in benchmarks/ run at a tiny size and print a table of sane numbers."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tokenlearner import load_data
from tokenlearner.data import ImageDataset

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


def table(text: str) -> tuple[list[str], dict[str, list[float]]]:
    """The header of a printed Markdown table, and the first number of each cell by its row."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return header[1:], {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in body}


def a_tenth(name: str, split: str) -> ImageDataset:
    data = load_data(name, split)
    return dataclasses.replace(data, images=data.images[::10], labels=data.labels[::10])


def test_every_script_is_in_the_readme_with_its_command() -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for path in BENCHMARKS.glob("*.py"):
        is_script = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        assert (f"python benchmarks/{path.name}" if is_script else path.name) in readme


@pytest.mark.parametrize("script", ["fuser_init"], indirect=True)
def test_fuser_init_prints_gradients_and_losses(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    options = "--seeds 1 --steps 1 --threads 1 --starts norm mix"
    monkeypatch.setattr(sys, "argv", ["fuser_init.py", *options.split()])
    monkeypatch.setattr(script, "load_data", a_tenth)
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    starts, rows = table(text)
    assert starts == ["norm", "mix"]
    assert rows["gradient norm: `mix.weight`"][0] == 0 < rows["gradient norm: `mix.weight`"][1]
    assert all(2 < loss < 3 for loss in rows["loss after 1 steps"])  # ln 10 is 2.3
    assert all(0 < accuracy < 100 for accuracy in rows["held-out accuracy, %"])
    assert text.splitlines()[-1] == f"python benchmarks/fuser_init.py {options}"


@pytest.mark.parametrize("script", ["fuser_init"], indirect=True)
@pytest.mark.parametrize("start", ["mix", "norm", "norm-identity", "mix-no-norms"])
def test_every_start_but_one_leaves_the_model_as_if_it_had_no_fuser(
    script: ModuleType, start: str
) -> None:
    images = torch.randn(2, 1, 28, 28)
    model, without = (script.fused_vit(name, seed=0).eval() for name in (start, "norm"))
    assert torch.equal(model(images), without(images))
    assert not torch.equal(script.fused_vit("nothing", seed=0).eval()(images), without(images))


@pytest.mark.parametrize("script", ["modules_memory"], indirect=True)
@pytest.mark.parametrize("name", ["V1", "V1.1 grouped", "V1.1 MLP"])
def test_the_textbook_form_gives_the_same_tokens(script: ModuleType, name: str) -> None:
    learner, x = script.LEARNERS[name](), torch.randn(2, 5, 7, 128)
    torch.testing.assert_close(script.textbook(learner, x), learner(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_measured_peak_contains_what_the_textbook_form_makes() -> None:
    """Of 32 frames `b k n c` is 128 MiB in float32, as large as 8 inputs."""
    words = ["--batch", "32", "--child", "V1.1 MLP", "textbook", "forward"]
    command = [sys.executable, str(BENCHMARKS / "modules_memory.py"), *words]
    assert 128 < float(subprocess.check_output(command)) < 512


@pytest.mark.parametrize("script", ["modules_memory"], indirect=True)
def test_modules_memory_prints_the_median_of_its_runs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = iter(range(1, 100))
    monkeypatch.setattr(subprocess, "check_output", lambda command: f"{next(measured)}\n".encode())
    monkeypatch.setattr(sys, "argv", ["modules_memory.py", "--runs", "3", "--batch", "2"])
    script.main()
    text = capsys.readouterr().out
    columns, rows = table(text)
    assert columns[:2] == ["forward, ours", "forward, textbook"]
    assert rows["V1"] == [2, 5, 8, 11]
    assert text.splitlines()[-1] == "python benchmarks/modules_memory.py --runs 3 --batch 2"


@pytest.mark.parametrize("script", ["models_speed"], indirect=True)
def test_models_speed_prints_ratios_of_time_and_of_multiply_adds(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "vit_mini_patch4_tl8at3_28"
    options = f"--models {name} --batches 2 --rounds 2 --optimizer"
    monkeypatch.setattr(sys, "argv", ["models_speed.py", *options.split()])
    script.main()
    text = capsys.readouterr().out
    _, rows = table(text)
    assert list(rows) == [f"`{name}`, inference, 2", f"`{name}`, training, 2"]
    for of_macs, speedup, share, _ in rows.values():
        assert of_macs == 1.69  # as in the demo's table: 0.0163 / 0.0097
        assert share == pytest.approx(speedup / of_macs, abs=0.02)
    assert text.splitlines()[-1] == f"python benchmarks/models_speed.py {options}"


@pytest.mark.parametrize("script", ["models_speed"], indirect=True)
def test_a_speed_up_is_the_time_of_the_slow_side_over_that_of_the_fast(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def takes(seconds: float) -> Callable[[], None]:
        def run() -> None:
            clock[0] += seconds

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    speedup, seconds = script.ratio(takes(3), takes(2), rounds=4)
    assert (speedup.low, speedup.median, speedup.high, seconds) == (1.5, 1.5, 1.5, 2)


@pytest.mark.parametrize("script", ["streaming"], indirect=True)
def test_streaming_prints_what_a_new_frame_costs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "framevit_mini_patch8_f6_tl4at3_32"
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--models", name, "--rounds", "2"])
    script.main()
    _, rows = table(capsys.readouterr().out)
    of_macs, speedup, _, difference = rows[f"`{name}`"]
    assert of_macs == 3.1  # 20.1 MMACs for the clip, of which 5/6 of the encoding are saved
    assert speedup > 0
    assert difference < 1e-5
