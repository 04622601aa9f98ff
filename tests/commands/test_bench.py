"""`tokenlearner bench`: which models, what is measured of them, and its tables and files."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tokenlearner import create_model, insert, save_model
from tokenlearner.commands._console import console
from tokenlearner.commands.bench import run as bench_run
from tokenlearner.commands.bench.config import BenchConfig, parse_bench_model
from tokenlearner.commands.bench.run import (
    Measurement,
    bench,
    load_bench_models,
)
from tokenlearner.commands.bench.table import bench_tables
from tokenlearner.commands.main import main
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import Seconds, Timing, peak_memory_mib
from tokenlearner.layers.onednn import OneDNNLinear

MINI = "vit_mini_patch4_28"
REDUCED, MIXER = f"{MINI}+insert(8,3)", "mixer_mini_patch4_tl8at3_28"
CPU = torch.device("cpu")
OUT_OF_RANGE = {"batch_size": 0, "img_size": -1, "rounds": 1, "threads": -1, "dtype": "half"}
OUT_OF_RANGE |= {"json": "x.txt", "plot": "x.pdf"}

# --- models as they are named -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "base", "tokens"),
    [
        ("runs/a+b", "runs/a+b", {}),
        ("vit+insert(8)", "vit", {"num_tokens": 8}),
        ("vit+insert(8,6)", "vit", {"num_tokens": 8, "at": 6}),
        ("vit+insert(8, 0)", "vit", {"num_tokens": 8, "at": 0}),
        ("vit+insert(8,0.25)", "vit", {"num_tokens": 8, "at": 0.25}),
        ("vit+insert(8,fuse)", "vit", {"num_tokens": 8, "fuse": True}),
        ("vit+insert(8,overlap=1,6)", "vit", {"num_tokens": 8, "overlap": 1, "at": 6}),
        ("a/b+insert(4,v1-mean,.5)", "a/b", {"num_tokens": 4, "learner": "v1-mean", "at": 0.5}),
    ],
)
def test_a_model_is_a_name_and_what_is_inserted(text: str, base: str, tokens: Any) -> None:
    for end in ("", "+onednn"):
        model = parse_bench_model(text + end)
        assert (model.text, model.base, model.tokens) == (text + end, base, tokens)
        assert [*map(type, model.tokens.values())] == [*map(type, tokens.values())]
        assert model.onednn == bool(end)


@pytest.mark.parametrize(
    "text",
    [
        *("", "+insert(8)", "vit+insert", "vit+insert(8,6", "vit+insert(8)+insert(4)"),
        *("vit+insert()", "vit+insert(0)", "vit+insert(v1)", "vit+onednn+insert(8)"),
        *("vit+insert(8,-1)", "vit+insert(8,1.5)", "vit+insert(8,)", "vit+insert(8,v3)"),
        *("vit+insert(8,6,0.5)", "vit+insert(8,v1,v11)"),
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_bench_model(text)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"models": [MINI, "vit", MINI]}, f"{MINI} twice"),
        ({"models": ["vit+insert"]}, "'vit+insert'"),
        *(({name: value}, f"{name} is {value!r}") for name, value in OUT_OF_RANGE.items()),
        ({"models": ["vit+onednn"], "dtype": "bfloat16"}, "'vit+onednn' uses oneDNN"),
        ({"models": ["vit+onednn"], "compile": "default"}, "'vit+onednn' uses oneDNN"),
        ({"time": "fast"}, "time is 'fast', expected such as 90s"),
        (
            {"advise": True, "compile": "default", "dtype": "bfloat16"},
            "leave out compile and dtype",
        ),
        ({"advise": True, "models": ["vit+onednn"]}, "leave out vit+onednn"),
        ({"json": "no/x.json"}, "there is no folder no"),
        ({"plot": "there.png"}, "plot is 'there.png', which is a folder"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchConfig(**{"models": [MINI]} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


@pytest.mark.parametrize(("given", "mode"), [(True, "default"), (False, "no"), ("no", "no")])
def test_compile_may_be_what_it_was_in_version_0_4(given: Any, mode: str) -> None:
    assert BenchConfig([MINI], compile=given).compile == mode


# --- models that can be run ---------------------------------------------------------------------


def loaded(*texts: str, img_size: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return load_bench_models([*map(parse_bench_model, texts)], img_size, CPU, dtype)


def test_models_are_built_as_named() -> None:
    names = (MINI, f"{MINI}+insert(4,2,fuse,v1)", f"{MINI}+onednn")
    models, axes = loaded(*names, dtype=torch.float32)
    assert axes == [1, 28, 28]
    host, reduced = create_model(MINI), insert(create_model(MINI), 4, 2, fuse=True, learner="v1")
    macs = [count_macs(model, torch.zeros(1, *axes)) for model in (host, reduced, *models.values())]
    assert macs[:2] == macs[2:4]
    used = [any(isinstance(m, OneDNNLinear) for m in model.modules()) for model in models.values()]
    assert used == [False, False, True]
    models, _ = loaded(REDUCED, dtype=torch.bfloat16)
    assert {p.dtype for p in models[REDUCED].parameters()} == {torch.bfloat16}


def test_a_checkpoint_is_loaded_at_its_size(tmp_path: Path) -> None:
    saved = save_model(create_model(MINI, in_chans=2, img_size=16, depth=3), tmp_path / "model")
    models, axes = loaded(f"{saved}+insert(4)")
    assert axes == [2, 16, 16]
    assert len(models[f"{saved}+insert(4)"].blocks) == 3


@pytest.mark.parametrize(
    ("names", "img_size", "message"),
    [
        ([f"{MINI}+insert(50)"], 0, rf"{MINI}\+insert\(50\): num_tokens is 50"),
        ([MINI, "vivit_mini_patch8x2_32"], 0, "vivit_mini_patch8x2_32 3 x 8 x 32 x 32"),
        ([MINI], 3, f"{MINI} .* 3"),
        ([MIXER], 56, f"{MIXER} .* 56"),
    ],
)
def test_models_that_do_not_fit_are_refused(names: list[str], img_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(*names, img_size=img_size)
    with pytest.raises(ValueError, match=r"onednn.*meta"):
        load_bench_models([parse_bench_model("vit+onednn")], 0, torch.device("meta"), torch.float32)


@pytest.mark.parametrize(
    ("name", "img_size", "size"),
    [
        (f"{MINI}+insert(60)", 40, [1, 40, 40]),  # 49 positions at its own size
        ("vivit_mini_patch8x2_32", 40, [3, 8, 40, 40]),
        (MIXER, 0, [1, 28, 28]),
        ("framevit_mini_patch8_f6_tl4at3_32", 0, [3, 6, 32, 32]),
        ("resnet10t", 0, [3, 176, 176]),
    ],
)
def test_a_model_takes_the_size_that_is_given_or_found(
    name: str, img_size: int, size: list[int]
) -> None:
    models, axes = loaded(name, img_size=img_size)
    assert axes == size
    assert models[name].eval()(torch.zeros(2, *axes)).ndim == 2


# --- measuring ----------------------------------------------------------------------------------


def measurements(batch_size: int) -> list[Measurement]:
    counted = [Measurement(name, batch_size, "images/s", 3) for name in ("throughput", "training")]
    return [Measurement("latency", 1, "ms", 3), *counted]


class Stopwatch:
    """In place of `time_models`: the seconds are known, and the arguments are kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int, dict[str, Any]]] = []

    def __call__(self, models: Any, images: Any, rounds: int, **kwargs: Any) -> dict[str, Any]:
        self.calls.append(([*images.shape], rounds, kwargs))
        seconds = len(images) * (3.0 if kwargs["training"] else 1.0)
        return {name: Seconds([seconds / (i + 1)] * rounds) for i, name in enumerate(models)}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    stopwatch = Stopwatch()
    monkeypatch.setattr(bench_run, "time_models", stopwatch)
    monkeypatch.setattr(bench_run, "read_gigabytes_per_second", lambda device: 10.0)
    return stopwatch


def test_latency_is_of_one_image_and_the_rest_of_the_batch_against_the_first_model(
    watch: Stopwatch,
) -> None:
    lines: list[str] = []
    config = BenchConfig([MINI, REDUCED], batch_size=4, rounds=3, compile="default", training=True)
    result = bench(config, lines.append)
    assert lines[2] == "latency at batch 1, ms, in 3 rounds and 2 to warm up"
    for (shape, rounds, kwargs), batch_size in zip(watch.calls, (1, 4, 4), strict=True):
        assert (shape, rounds, kwargs["compiled"]) == ([batch_size, 1, 28, 28], 3, "default")
    assert [kwargs["training"] for *_, kwargs in watch.calls] == [False, False, True]
    assert result.measurements == measurements(4)
    first, second = (row.speeds for row in result.rows)
    values = [500, 2, pytest.approx(2 / 3)]
    assert [speed.value.median for speed in second.values()] == values
    assert {speed.speedup for speed in first.values()} == {Timing(1, 1, 1)}
    assert {speed.speedup for speed in second.values()} == {Timing(2, 2, 2)}


def test_clips_are_not_called_images(watch: Stopwatch) -> None:
    result = bench(BenchConfig(["vivit_mini_patch8x2_32"], batch_size=2, rounds=2, training=True))
    assert [one.unit for one in result.measurements] == ["ms", "clips/s", "clips/s"]


def test_a_row_has_what_is_counted(watch: Stopwatch) -> None:
    config = BenchConfig([MINI, REDUCED], batch_size=4, rounds=2, dtype="bfloat16", training=True)
    result = bench(config)
    models, _ = loaded(MINI, REDUCED, dtype=torch.bfloat16)
    images = torch.zeros(4, 1, 28, 28, dtype=torch.bfloat16)
    macs = [count_macs(model, images[:1]) for model in models.values()]
    row, parameters = result.rows[1], sum(p.numel() for p in models[REDUCED].parameters())
    assert (row.parameters, row.weights_mib) == (parameters, 2 * parameters / 2**20)
    assert (row.gmacs, row.gflops) == (macs[1] / 1e9, 2 * macs[1] / 1e9)
    assert row.macs_ratio == macs[0] / macs[1]
    assert row.speeds["latency"].realized_speedup == pytest.approx(2 * macs[1] / macs[0])
    assert row.peak_memory_mib == peak_memory_mib(models[REDUCED], images)
    assert row.training_peak_memory_mib == peak_memory_mib(models[REDUCED], images, training=True)


def test_images_that_a_model_cannot_take_are_refused_before_anything_is_timed(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Conv2d(3, 2, 3)
    monkeypatch.setattr(bench_run, "load_bench_models", lambda *_: ({"net": net}, [3, 2, 2]))
    with pytest.raises(ValueError, match=r"net .* img_size 2"):
        bench(BenchConfig(["net"], rounds=2, img_size=2))
    assert not watch.calls


def test_training_is_measured_on_demand_and_threads_are_given_for_as_long_as_it_lasts(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for threads in (5, 0):
        [row] = bench(BenchConfig([MINI], rounds=2, threads=threads)).rows
    assert given == [5, 2, 2, 2]
    assert [*row.speeds] == ["latency", "throughput"]
    assert row.training_peak_memory_mib is None


def test_time_is_shared_among_measurements_and_ends_rounds(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    bench(BenchConfig([MINI], rounds=2, time="1m", training=True))
    assert [kwargs["seconds"] for *_, kwargs in watch.calls] == [20, 30, 60]


def test_tables_come_as_they_are_measured(watch: Stopwatch) -> None:
    parts = bench_tables(BenchConfig([MINI], rounds=2))
    assert "GMACs" in text_of(next(parts))
    assert not watch.calls
    assert "latency at batch 1" in text_of(next(parts))
    assert len(watch.calls) == 1


# --- tables and files ---------------------------------------------------------------------------


def text_of(*parts: Any, width: int = 80) -> str:
    out = io.StringIO()
    console(file=out, width=width).print(*parts, sep="\n")
    return out.getvalue()


def test_a_run_gives_tables_and_a_line_and_writes_the_files(
    watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = BenchConfig(
        [MINI, REDUCED], batch_size=4, rounds=2, json="x.json", plot="x.png", training=True
    )
    parts = bench_tables(config)
    sizes, latency, _, training, line = (text_of(part, width=120) for part in parts)
    assert re.search(r"0\.31 +0\.010 +0\.019 +1\.69 ", sizes)
    assert re.search(r"500 \(500–500\) +2\.00 \(2\.00–2\.00\) +1\.18", latency)
    assert re.search(r"0\.7 \(0\.7–0\.7\) +2\.00 \(2\.00–2\.00\) +1\.18", training)
    assert line.startswith("1 x 28 x 28 on cpu (")
    values = json.loads((tmp_path / "x.json").read_text())
    options = "--rounds 2 --batch_size 4 --training true --json x.json --plot x.png"
    assert {*values["command"].split()} == {
        *f"tokenlearner bench {MINI} '{REDUCED}' {options}".split()
    }
    assert values["config"]["dtype"] == "float32"
    assert [m["insert"] for m in values["models"]] == [{}, {"num_tokens": 8, "at": 3}]
    speed = values["models"][1]["speeds"]["throughput"]
    assert speed["value"] == {"median": 2, "low": 2, "high": 2}
    assert speed["realized_speedup"] == pytest.approx(2 / values["models"][1]["macs_ratio"])
    assert speed["of_macs_ratio"] == speed["realized_speedup"]  # what version 0.3 called it
    throughput = {"name": "throughput", "batch_size": 4, "unit": "images/s", "rounds": 2}
    assert values["measurements"][1] == throughput
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 600


def test_without_files_nothing_is_written_and_a_missing_package_is_an_error_before_any_work(
    watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = str(save_model(create_model(MINI), tmp_path / "[red]" / "m.safetensors"))
    for package, plot in (("matplotlib", "x.png"), ("rich", "")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=f"needs {package}"):
                next(bench_tables(BenchConfig([saved], plot=plot)))
    assert not watch.calls
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # which only a plot needs
    parts = bench_tables(BenchConfig([saved], rounds=2))
    assert text_of(*parts, width=300).count("[red]") == 4  # no markup, in three tables and the line
    assert [path.name for path in tmp_path.iterdir()] == ["[red]"]


def test_the_command_prints_what_it_measured_and_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    options = ["--rounds", "2", "--batch_size", "2", "--time", "60s", "--json", str(path)]
    main(["bench", MINI, f"{MINI}+insert(8,3)", *options])
    out, err = capsys.readouterr()
    assert "throughput at batch 2, images/s" in out
    assert err.startswith("building\ncounting multiply-adds and memory\nlatency at batch 1")
    result = json.loads(path.read_text())
    speeds = [speed["value"] for row in result["models"] for speed in row["speeds"].values()]
    assert len(speeds) == 4
    assert all(0 < s["low"] <= s["median"] <= s["high"] for s in speeds)
    assert result["read_gigabytes_per_second"] > 0
