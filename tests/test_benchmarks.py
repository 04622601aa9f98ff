"""The scripts in benchmarks/ run at a tiny size and print a table of sane numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tokenlearner import load_data
from tokenlearner.data import ImageDataset

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODEL = "model.safetensors"


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


@pytest.mark.parametrize("script", ["modules_speed"], indirect=True)
def test_modules_speed_prints_every_learner_both_ways(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "8 x 14 x 14 x 768"
    options = ["--batch", "1", "--rounds", "2", "--dtypes", "float32", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["modules_speed.py", *options, "--shapes", shape])
    script.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:14]]
    assert [row[0].split(", ")[0] for row in rows] == [f"| {name}" for name in script.LEARNERS] * 4
    assert [row[0].endswith("backward") for row in rows] == ([False] * 3 + [True] * 3) * 2
    assert {row[1] for row in rows} == {shape}
    assert all(float(cell.split(" (")[0].rstrip(" |")) > 0 for row in rows for cell in row[2:])


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


@pytest.mark.parametrize("script", ["kill"], indirect=True)
def test_kill_finds_weights_that_differ(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, epochs: int) -> Any:
        out.mkdir(parents=True)
        save_file({"w": torch.zeros(2) + different * (out.name == "killed")}, out / MODEL)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(script, "kill_again_and_again", lambda *_: [])
    monkeypatch.setattr(script, "start", run)
    for different in (0, 1):
        out = tmp_path / str(different)
        monkeypatch.setattr(sys, "argv", ["kill.py", "--out", str(out)])
        with pytest.raises(SystemExit) as left:
            script.main()
        assert left.value.code == different
        assert json.loads((out / "kill.json").read_text())["bit_identical"] is not bool(different)


@pytest.mark.slow
def test_kill_ends_with_the_same_weights(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "kill.py"), "--out", str(tmp_path)]
    said = subprocess.check_output([*command, "--kills", "3", "--epochs", "2"], text=True)
    assert said.splitlines()[-1].endswith("final weights bit-identical: True")
    assert said.count("'checkpoint_of_step'") == 3


@pytest.mark.slow
@pytest.mark.parametrize("script", ["waiting"], indirect=True)
def test_waiting_prints_shares_of_both_data_sets(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--files 72 --images 64 --epochs 1 --model vit_tiny_patch16_224"
    monkeypatch.setattr(sys, "argv", ["waiting.py", *options.split()])
    script.main()
    _, rows = table(capsys.readouterr().out)
    assert list(rows) == ["bundled, epoch 1", "JPEG files, epoch 1"]
    for speed, waiting in rows.values():
        assert speed > 0
        assert 0 < waiting < 100


@pytest.mark.parametrize("script", ["accuracy"], indirect=True)
def test_accuracy_prints_every_model_and_goes_on(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"--out {tmp_path} --seeds 0 --epochs 1 --images 64 --data fashion-mnist-small"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options.split()])
    monkeypatch.setattr(script, "ProcessPoolExecutor", OneProcess)
    for _ in range(2):
        script.main()
        lines = capsys.readouterr().out.splitlines()[4:]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert [row[1] for row in rows] == ["all", "8 learned, halfway"]
        assert [float(row[2]) for row in rows] == [0.0163, 0.0097]  # as in the demo's table
    assert len(list(tmp_path.glob("*/checkpoint.pt"))) == 2


class OneProcess:
    """What is used of a pool of processes, without any."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def map(self, run: Callable[[Any], None], jobs: list[Any]) -> list[None]:
        return [run(job) for job in jobs]


@pytest.mark.parametrize("script", ["segmentation"], indirect=True)
def test_segmentation_labels_pixels_by_class_and_brightness(script: ModuleType) -> None:
    data = load_data("fashion-mnist-small", "test")
    images, labels = data.take(torch.tensor([3, 4]))
    pixels = script.truth(images, labels, data)
    bright = data.images[[3, 4], 0] > script.BRIGHT
    assert torch.equal(pixels, bright * (1 + labels[:, None, None]))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["segmentation"], indirect=True)
def test_segmentation_prints_host_and_fused_and_draws_them(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"--out {tmp_path} --seeds 0 --epochs 1 --host-epochs 1 --images 128"
    monkeypatch.setattr(sys, "argv", ["segmentation.py", *options.split()])
    monkeypatch.setattr(script, "CALIBRATION", {"images": 64, "steps": 5})
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows[1:]] == ["host"] * 2 + [
        "8 tokens, fused"
    ] * 2
    assert (tmp_path / "segmentation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["against_flax"], indirect=True)
@pytest.mark.parametrize("learner", ["v1", "v11"])
def test_against_flax_compares_equal_models(
    script: ModuleType,
    learner: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script itself refuses models whose numbers differ."""
    options = f"--model vit_tiny_patch16_tl8at6_224 --learner {learner} --tokens 4 --batches 2"
    monkeypatch.setattr(
        sys, "argv", ["against_flax.py", *options.split(), "--size", "64", "--rounds", "2"]
    )
    script.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:8]]
    forms = ("eager", "Flax", "compiled")
    assert [row[0] for row in rows] == [f"| {m}, {f}" for m in ("plain", "4 tokens") for f in forms]
    assert [row[3] for row in rows[::3]] == ["1.00 (1.00-1.00)"] * 2
    assert all(float(row[2]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["against_flax"], indirect=True)
def test_against_flax_refuses_other_numbers(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "in_flax", lambda *_: lambda images: torch.ones(len(images), 1000))
    options = "--model vit_tiny_patch16_tl8at6_224 --tokens 4 --batches 1 --no-compile"
    monkeypatch.setattr(sys, "argv", ["against_flax.py", *options.split()])
    with pytest.raises(AssertionError, match="not close"):
        script.main()
