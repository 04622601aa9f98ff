"""The scripts in benchmarks/ run at a tiny size and print a table of sane numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
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
from tokenlearner.data.factory import ImageDataset

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODEL = "model.safetensors"
Run = Callable[[ModuleType, str], str]


SCRIPTS = [p.stem for p in sorted(BENCHMARKS.glob("*.py")) if "__main__" in p.read_text("utf-8")]
MEASURING = [name for name in SCRIPTS if name != "compare_report"]


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script with options, split at spaces, and returns what it prints."""

    def go(script: ModuleType, options: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *shlex.split(options)])
        script.main()
        return capsys.readouterr().out

    return go


def run_apart(script: ModuleType, options: str) -> str:
    """Runs a script in a process of its own: where jax has run, no other test may fork."""
    command = [sys.executable, f"{BENCHMARKS / script.__name__}.py", *shlex.split(options)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


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
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    options = "--seeds 1 --steps 1 --threads 1 --starts norm mix"
    monkeypatch.setattr(script, "load_data", a_tenth)
    try:
        text = run(script, options)
    finally:
        torch.set_num_threads(threads)
    starts, rows = table(text)
    assert starts == ["norm", "mix"]
    assert rows["gradient norm: `mix.weight`"][0] == 0 < rows["gradient norm: `mix.weight`"][1]
    assert all(2 < loss < 3 for loss in rows["loss after 1 steps"])  # ln 10 is 2.3
    assert all(0 < accuracy < 100 for accuracy in rows["held-out accuracy, %"])
    assert text.splitlines()[-1] == f"python benchmarks/fuser_init.py {options}"


@pytest.mark.parametrize("script", ["modules_memory"], indirect=True)
@pytest.mark.parametrize("name", ["V1", "V1.1 grouped", "V1.1 MLP"])
def test_the_textbook_form_gives_the_same_tokens(script: ModuleType, name: str) -> None:
    learner, x = script.LEARNERS[name](), torch.randn(2, 5, 7, 128)
    torch.testing.assert_close(script.textbook(learner, x), learner(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_measured_peak_contains_what_the_textbook_form_makes() -> None:
    """Of 32 frames `b k n c` is 128 MiB in float32, as large as 8 inputs."""
    words = ["--batch", "32", "--child", "V1.1 MLP", "textbook", "forward"]
    command = [sys.executable, str(BENCHMARKS / "modules_memory.py"), *words]
    assert 128 < float(subprocess.check_output(command)) < 512


@pytest.mark.slow
@pytest.mark.parametrize("script", ["models_speed"], indirect=True)
def test_models_speed_prints_ratios_of_time_multiply_adds_and_memory(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    name = "vit_mini_patch4_tl8at3_28"
    options = f"--models {name} --batches 2 --rounds 2 --optimizer --json {tmp_path / 'all.json'}"
    text = run(script, options)
    _, rows = table(text)
    labels = [f"`{name}`", "merging 6 in every block"]
    assert list(rows) == [f"{a}, {b}, 2" for b in ("inference", "training") for a in labels]
    for label, (of_macs, speedup, share, _, peak, of_peak) in rows.items():
        assert of_macs == (1.65 if "merging" in label else 1.69)  # as in the demo's table
        assert share == pytest.approx(speedup / of_macs, abs=0.02)
        assert peak > 0
        assert of_peak > 0
    assert rows[f"`{name}`, training, 2"][5] < 0.8  # fewer tokens are kept for the backward pass
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["plain", *labels] * 2
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
def test_streaming_prints_what_a_new_frame_costs(script: ModuleType, run: Run) -> None:
    name = "framevit_mini_patch8_f6_tl4at3_32"
    _, rows = table(run(script, f"--models {name} --rounds 2"))
    of_macs, speedup, _, difference = rows[f"`{name}`"]
    assert of_macs == 3.1  # 20.1 MMACs for the clip, of which 5/6 of the encoding are saved
    assert speedup > 0
    assert difference < 1e-5


@pytest.mark.parametrize("script", ["kill"], indirect=True)
def test_kill_finds_weights_that_differ(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(out: Path, options: Any) -> Any:
        out.mkdir(parents=True)
        save_file({"w": torch.zeros(2) + different * (out.name == "killed")}, out / MODEL)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(script, "kill_again_and_again", lambda *_: [])
    monkeypatch.setattr(script, "start", start)
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
@pytest.mark.parametrize("script", ["accuracy"], indirect=True)
def test_accuracy_prints_every_model_and_goes_on(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"--out {tmp_path} --seeds 0 --epochs 1 --images 64 --data fashion-mnist-small"
    monkeypatch.setattr(script, "ProcessPoolExecutor", OneProcess)
    for _ in range(2):
        lines = run(script, options).splitlines()[4:]
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


TINY_FLAX = "--model vit_tiny_patch16_tl8at6_224 --tokens 4 --batches 2 --size 64 --rounds 2"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["against_flax"], indirect=True)
@pytest.mark.parametrize("learner", ["v1", "v11"])
def test_against_flax_compares_equal_models(script: ModuleType, learner: str) -> None:
    """The script itself refuses models whose numbers differ."""
    text = run_apart(script, f"{TINY_FLAX} --learner {learner}")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    names = [f"| {model}, {form}" for model in ("plain", "4 tokens") for form in script.FORMS]
    assert [row[0] for row in rows] == names
    assert [row[3] for row in rows if "eager" in row[0]] == ["1.00 (1.00–1.00)"] * 2
    assert all(float(row[2]) >= 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["against_flax"], indirect=True)
def test_against_flax_refuses_other_numbers(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = script.Form(lambda: torch.ones(2, 1000))
    monkeypatch.setitem(script.FORMS, "Flax", lambda *_: ones)
    with pytest.raises(AssertionError, match="plain, Flax gives other numbers than eager"):
        run(script, f"{TINY_FLAX} --forms Flax")


SMALL_SHAPE = "--shapes '8 x 14 x 14 x 768' --batch 1 --rounds 2"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["modules_against"], indirect=True)
@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_modules_against_times_flax_and_keras_that_give_the_same_tokens_and_gradients(
    script: ModuleType, what: str, tmp_path: Path
) -> None:
    """The script itself refuses what differs by more than 1e-4 of the largest number."""
    path = tmp_path / "all.json"
    options = f"{SMALL_SHAPE} --passes '{what}' --forms Flax Keras --json {path}"
    text = run_apart(script, options)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| V1")]
    forms = [
        f"| {n}, {form}, {what}" for n in script.LEARNERS for form in ("ours", "Flax", "Keras")
    ]
    assert [row[0] for row in rows] == forms
    assert {row[1] for row in rows} == {"1 x 14 x 14 x 768"}
    found = json.loads(path.read_text())
    assert {row["times_as_fast_as_ours"]["low"] for row in found["rows"][::3]} == {1.0}
    assert found["machine"]["keras"] in text


@pytest.mark.slow
@pytest.mark.parametrize("script", ["modules_against"], indirect=True)
def test_modules_against_refuses_other_tokens(script: ModuleType) -> None:
    right = torch.tensor([1.0, 100.0])
    script.check_same("V1, Flax", right + 0.009, right)
    with pytest.raises(SystemExit, match=r"V1, Flax differs by 1\.1e-04 of the largest"):
        script.check_same("V1, Flax", right + 0.011, right)
    with pytest.raises(SystemExit, match="differs by nan"):
        script.check_same("V1, Flax", right * float("nan"), right)
    with pytest.raises(SystemExit, match=r"gives \[1\], expected \[2\]"):
        script.check_same("V1, Flax", right[:1], right)


SCALING = (
    "--image-model vit_mini_patch4_tl8at3_28 --video-model vivit_mini_patch8x2_tl4at3_32 "
    "--rounds 2 --resolution 28 56 --tokens 1 4 --frames 4 8 --batch 1 2"
)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["scaling"], indirect=True)
def test_scaling_measures_draws_and_goes_on_where_it_stopped(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"{SCALING} --json {tmp_path / 'points.json'} --out {tmp_path}"
    _, rows = table(run(script, options))
    points = json.loads((tmp_path / "points.json").read_text())["points"]
    assert list(rows) == [f"{axis} {v}" for axis in script.VALUES for v in VALUES_DRAWN[axis]]
    assert rows["resolution 28"][:2] == rows["batch 1"][:2] == [0.0163, 0.00965]  # as in the demo
    assert rows["batch 2"][0] == pytest.approx(2 * 0.0163, rel=0.01)
    assert rows["tokens 1"][1] < rows["tokens 4"][1] < rows["tokens 4"][0]
    assert rows["resolution 56"][0] > 4 * rows["resolution 28"][0]  # attention grows faster
    assert rows["tokens 4"][9] < rows["tokens 4"][8]  # in training
    for axis in script.VALUES:
        assert (tmp_path / f"scaling-{axis}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("measured again"))
    _, again = table(run(script, options))
    assert again == rows
    assert json.loads((tmp_path / "points.json").read_text())["points"] == points


VALUES_DRAWN = {"resolution": (28, 56), "tokens": (1, 4), "frames": (4, 8), "batch": (1, 2)}


@pytest.mark.parametrize("script", ["scaling"], indirect=True)
def test_scaling_does_not_mix_points_of_other_rounds_or_machines(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "points.json"
    options = f"--resolution --tokens --frames --batch --json {path}"
    then = script.machine(torch.device("cpu")) | {"cpu": "abacus"}
    path.write_text(json.dumps({"machine": then, "rounds": 5, "points": []}))
    with pytest.raises(SystemExit, match=r"cpu abacus, now .*rounds 5, now 3: remove it, or name"):
        run(script, f"{options} --rounds 3")


@pytest.mark.parametrize("script", MEASURING, indirect=True)
def test_every_script_takes_a_device_and_refuses_one_that_is_not_there(
    script: ModuleType, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"compare_frozen": "--wheel a --drawings b", "accuracy": "--drawings b"}
    needed["against_version"] = "src"
    with pytest.raises(SystemExit):
        run(script, f"{needed.get(script.__name__, '')} --device cuda:99")
    said = capsys.readouterr().err
    assert "--device" in said
    assert "cuda:99" in said


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("modules_speed", "--batch 1 --rounds 2 --shapes '8 x 14 x 14 x 768'"),
        pytest.param(
            *(
                "models_speed",
                "--models vit_mini_patch4_tl8at3_28 --batches 1 --rounds 2 --no-merge",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    indirect=["script"],
)
def test_everything_that_is_timed_is_on_the_device(
    script: ModuleType, options: str, run: Run
) -> None:
    """The meta device holds no numbers, and raises on tensors that are on another one."""
    assert "meta" in run(script, f"{options} --device meta").splitlines()[-1]
