"""`tokenlearner bench`: what is measured of which models, and how it is told."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from tokenlearner import create_model, insert, save_model
from tokenlearner.commands.bench import models as bench_models
from tokenlearner.commands.bench import run as bench_run
from tokenlearner.commands.bench.config import BenchConfig, parse_bench_model
from tokenlearner.commands.bench.models import load_bench_models
from tokenlearner.commands.bench.run import BenchResult, BenchRow, Measurement, Speed, bench
from tokenlearner.commands.bench.table import (
    bench_json,
    bench_notes,
    bench_table,
    size_table,
    speed_table,
)
from tokenlearner.commands.main import main
from tokenlearner.evaluation import hardware as machine
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.hardware import describe_machine, read_gigabytes_per_second
from tokenlearner.evaluation.latency import Seconds, Timing, peak_memory_mib
from tokenlearner.layers.onednn import OneDNNLinear

MINI = "vit_mini_patch4_28"
REDUCED = f"{MINI}+insert(8,3)"
CPU = torch.device("cpu")

# --- models as they are named -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "base", "tokens"),
    [
        ("vit", "vit", {}),
        ("runs/a+b", "runs/a+b", {}),
        ("vit+insert(8)", "vit", {"num_tokens": 8}),
        ("vit+insert(8,6)", "vit", {"num_tokens": 8, "at": 6}),
        ("vit+insert(8, 0)", "vit", {"num_tokens": 8, "at": 0}),
        ("vit+insert(8,0.25)", "vit", {"num_tokens": 8, "at": 0.25}),
        ("vit+insert(8,fuse)", "vit", {"num_tokens": 8, "fuse": True}),
        (
            "a/b.safetensors+insert(4,v1-mean,.5,fuse)",
            "a/b.safetensors",
            {"num_tokens": 4, "learner": "v1-mean", "at": 0.5, "fuse": True},
        ),
    ],
)
def test_a_model_is_a_name_and_what_is_inserted(
    text: str, base: str, tokens: dict[str, Any]
) -> None:
    candidate = parse_bench_model(text)
    assert (candidate.text, candidate.base, candidate.tokens) == (text, base, tokens)
    assert [type(value) for value in candidate.tokens.values()] == [*map(type, tokens.values())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no model in ''"),
        ("+insert(8)", "there is no model in '+insert(8)'"),
        ("vit+insert", "there is no model in 'vit+insert'"),
        ("vit+insert(8,6", "there is no model in 'vit+insert(8,6'"),
        ("vit+insert(8)+insert(4)", "there is no model in 'vit+insert(8)+insert(4)'"),
        ("vit+insert()", "'vit+insert()' has '' for the number of tokens"),
        ("vit+insert(0)", "'vit+insert(0)' has '0' for the number of tokens"),
        ("vit+insert(v1)", "'vit+insert(v1)' has 'v1' for the number of tokens"),
        ("vit+insert(8,-1)", "'vit+insert(8,-1)' has '-1'"),
        ("vit+insert(8,1.5)", "'vit+insert(8,1.5)' has '1.5'"),
        ("vit+insert(8,)", "'vit+insert(8,)' has ''"),
        ("vit+insert(8,v3)", "'vit+insert(8,v3)' has 'v3'"),
    ],
)
def test_what_is_no_model_is_refused_with_the_form_that_is_expected(
    text: str, message: str
) -> None:
    expected = ", expected MODEL or MODEL+insert(NUM_TOKENS, AT), AT a block such as 6 or a share"
    with pytest.raises(ValueError, match=re.escape(message + expected)):
        parse_bench_model(text)


def test_onednn_stands_behind_a_model_and_what_is_inserted() -> None:
    plain, reduced = map(parse_bench_model, ("vit+onednn", "vit+insert(8,6)+onednn"))
    assert (plain.base, plain.tokens, plain.onednn) == ("vit", {}, True)
    assert (reduced.base, reduced.tokens) == ("vit", {"num_tokens": 8, "at": 6})
    assert reduced.onednn
    assert not parse_bench_model("vit+insert(8,6)").onednn
    with pytest.raises(ValueError, match=re.escape("'vit+onednn+insert(8)'")):
        parse_bench_model("vit+onednn+insert(8)")


@pytest.mark.parametrize(
    ("words", "message"),
    [("8,6,0.5", "at twice, 6 and 0.5"), ("8,v1,v11", "learner twice, v1 and v11")],
)
def test_what_is_said_twice_is_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"says {message}; keep one"):
        parse_bench_model(f"vit+insert({words})")


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "there are 0 models, expected 1 or more"),
        ({"models": [MINI, "vit", MINI]}, f"{MINI} is named twice; name each model once"),
        ({"models": ["vit+insert"]}, "there is no model in 'vit+insert'"),
        ({"batch_size": 0}, "batch_size is 0, expected an integer of 1 or more"),
        ({"img_size": -1}, "img_size is -1, expected an integer of 0 or more"),
        ({"rounds": 1}, "rounds is 1, expected an integer of 2 or more"),
        ({"threads": -1}, "threads is -1, expected an integer of 0 or more"),
        ({"dtype": "half"}, "dtype is 'half', expected one of 'float32', 'bfloat16', 'float16'"),
        ({"models": ["vit+onednn"], "dtype": "bfloat16"}, "'vit+onednn' asks for oneDNN, which"),
        ({"models": ["vit+onednn"], "compile": True}, "'vit+onednn' asks for oneDNN, which"),
        ({"json": "x.txt"}, "json is 'x.txt', expected a file that ends in .json"),
        ({"plot": "x.pdf"}, "plot is 'x.pdf', expected a file that ends in .png"),
        ({"json": "no/x.json"}, "json is 'no/x.json', but there is no folder no; make it"),
        ({"plot": "there.png"}, "plot is 'there.png', which is a folder; name a file"),
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


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to; take another"):
        BenchConfig([MINI], json=str(tmp_path / "x.json"))


def test_the_command_has_the_models_and_what_is_not_as_usual() -> None:
    config = BenchConfig(["vit", "vit+insert(8,6)"], batch_size=2, training=False, compile=True)
    assert config.command == (
        "tokenlearner bench vit 'vit+insert(8,6)' --batch_size 2 --compile true --training false"
    )


# --- models that can be run ---------------------------------------------------------------------


def loaded(*texts: str, img_size: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return load_bench_models([*map(parse_bench_model, texts)], img_size, CPU, dtype)


def test_tokens_are_inserted_as_named() -> None:
    models, axes = loaded(MINI, f"{MINI}+insert(4,2,fuse,v1)")
    image = torch.zeros(1, *axes)
    assert axes == [1, 28, 28]
    expected = [create_model(MINI), insert(create_model(MINI), 4, 2, fuse=True, learner="v1")]
    assert [count_macs(model, image) for model in models.values()] == [
        count_macs(model, image) for model in expected
    ]


def test_onednn_computes_the_models_that_ask_for_it() -> None:
    models, _ = loaded(MINI, f"{REDUCED}+onednn")
    used = [any(isinstance(m, OneDNNLinear) for m in model.modules()) for model in models.values()]
    assert used == [False, True]


def test_onednn_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="computes on a CPU, and the device is meta"):
        load_bench_models([parse_bench_model("vit+onednn")], 0, torch.device("meta"), torch.float32)


def test_models_are_turned_into_the_dtype() -> None:
    models, _ = loaded(REDUCED, dtype=torch.bfloat16)
    assert {p.dtype for p in models[REDUCED].parameters()} == {torch.bfloat16}


def test_tokens_that_do_not_fit_are_refused_with_the_model_s_name() -> None:
    with pytest.raises(ValueError, match=rf"{MINI}\+insert\(50\): num_tokens is 50, but an image"):
        loaded(f"{MINI}+insert(50)")


def test_a_checkpoint_is_loaded_and_tells_its_size(tmp_path: Path) -> None:
    saved = save_model(create_model(MINI, in_chans=2, img_size=16, depth=3), tmp_path / "model")
    models, axes = loaded(f"{saved}+insert(4)")
    assert axes == [2, 16, 16]
    assert len(models[f"{saved}+insert(4)"].blocks) == 3


def test_models_of_different_sizes_are_refused_unless_a_size_is_given() -> None:
    texts = (MINI, "vivit_mini_patch8x2_32")
    told = f"different sizes ({MINI} 1 x 28 x 28, {texts[1]} 3 x 8 x 32 x 32); pass img_size"
    with pytest.raises(ValueError, match=re.escape(told)):
        loaded(*texts)
    with pytest.raises(ValueError, match="3 x 8 x 32 x 32\\); measure them apart"):
        loaded(*texts, img_size=32)


@pytest.mark.parametrize("name", [MINI, "vivit_mini_patch8x2_32"])
def test_a_model_is_resized(name: str) -> None:
    models, axes = loaded(name, img_size=40)
    assert axes[-2:] == [40, 40]
    assert models[name](torch.zeros(2, *axes)).shape == (2, 10)


def test_tokens_are_inserted_in_the_model_of_the_size_that_is_asked_for() -> None:
    assert loaded(f"{MINI}+insert(60)", img_size=40)[1] == [1, 40, 40]  # 49 at its own size


def test_a_size_without_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no images of 3 x 3 \(.*; pass another img_size"):
        loaded(MINI, img_size=3)


def test_an_error_that_no_size_was_the_cause_of_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(bench_models, "load_sized", fails)
    with pytest.raises(RuntimeError, match=r"^no memory left$"):
        loaded(MINI)


def test_a_model_that_cannot_be_resized_is_refused() -> None:
    with pytest.raises(ValueError, match="mixer_mini_patch4_tl8at3_28 cannot be set to 56 pixels"):
        loaded("mixer_mini_patch4_tl8at3_28", img_size=56)


def test_a_model_without_transformer_blocks_is_measured_too() -> None:
    assert loaded("mixer_mini_patch4_tl8at3_28")[1] == [1, 28, 28]


# --- measuring ----------------------------------------------------------------------------------


class Stopwatch:
    """In place of `time_models`: the seconds are known, and what was asked for is kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int, dict[str, bool]]] = []

    def __call__(self, models: Any, images: Any, rounds: int, **told: bool) -> dict[str, Any]:
        self.calls.append(([*images.shape], rounds, told))
        seconds = len(images) * (3.0 if told["training"] else 1.0)
        return {name: Seconds([seconds / (i + 1)] * rounds) for i, name in enumerate(models)}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    stopwatch = Stopwatch()
    monkeypatch.setattr(bench_run, "time_models", stopwatch)
    monkeypatch.setattr(bench_run, "read_gigabytes_per_second", lambda device: 10.0)
    return stopwatch


def test_latency_is_of_one_image_and_the_rest_of_the_batch(watch: Stopwatch) -> None:
    found = bench(BenchConfig([MINI], batch_size=4, rounds=3, compile=True))
    assert watch.calls == [
        ([1, 1, 28, 28], 3, {"training": False, "compiled": True}),
        ([4, 1, 28, 28], 3, {"training": False, "compiled": True}),
        ([4, 1, 28, 28], 3, {"training": True, "compiled": True}),
    ]
    assert found.measurements == [
        Measurement("latency", 1, "ms"),
        Measurement("throughput", 4, "images/s"),
        Measurement("training", 4, "images/s"),
    ]


def test_speeds_are_in_their_units_and_against_the_first(watch: Stopwatch) -> None:
    found = bench(BenchConfig([MINI, REDUCED], batch_size=4, rounds=2))
    first, second = (row.speeds for row in found.rows)
    assert {name: speed.value.median for name, speed in second.items()} == {
        "latency": 500,
        "throughput": 2,
        "training": pytest.approx(2 / 3),
    }
    assert {speed.speedup for speed in first.values()} == {Timing(1, 1, 1)}
    assert {speed.speedup for speed in second.values()} == {Timing(2, 2, 2)}


def test_a_row_has_what_is_counted(watch: Stopwatch) -> None:
    found = bench(BenchConfig([MINI, REDUCED], batch_size=4, rounds=2, dtype="bfloat16"))
    models, _ = loaded(MINI, REDUCED, dtype=torch.bfloat16)
    images = torch.zeros(4, 1, 28, 28, dtype=torch.bfloat16)
    macs = [count_macs(model, images[:1]) for model in models.values()]
    row, parameters = found.rows[1], sum(p.numel() for p in models[REDUCED].parameters())
    assert (row.parameters, row.weights_mib) == (parameters, 2 * parameters / 2**20)
    assert (row.gmacs, row.gflops) == (macs[1] / 1e9, 2 * macs[1] / 1e9)
    assert row.macs_ratio == macs[0] / macs[1]
    assert row.speeds["latency"].of_macs_ratio == pytest.approx(2 * macs[1] / macs[0])
    assert row.peak_memory_mib == peak_memory_mib(models[REDUCED], images)
    assert row.training_peak_memory_mib == peak_memory_mib(models[REDUCED], images, training=True)


def test_images_that_a_model_cannot_take_are_refused_before_anything_is_timed(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Conv2d(3, 2, 3)
    monkeypatch.setattr(bench_run, "load_bench_models", lambda *_: ({"net": net}, [3, 2, 2]))
    with pytest.raises(ValueError, match=r"net cannot take 3 x 2 x 2 \(.*; pass another img_size"):
        bench(BenchConfig(["net"], rounds=2))
    assert not watch.calls


def test_training_is_left_out_on_demand(watch: Stopwatch) -> None:
    [row] = bench(BenchConfig([MINI], rounds=2, training=False)).rows
    assert [*row.speeds] == ["latency", "throughput"]
    assert row.training_peak_memory_mib is None
    assert len(watch.calls) == 2


def test_threads_are_given_for_as_long_as_it_lasts(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    bench(BenchConfig([MINI], rounds=2, threads=5))
    bench(BenchConfig([MINI], rounds=2))
    assert given == [5, 2, 2, 2]


def test_what_comes_next_is_reported(watch: Stopwatch) -> None:
    lines: list[str] = []
    bench(BenchConfig([MINI], rounds=2, training=False), lines.append)
    assert lines == [
        "building",
        "counting multiply-adds and memory",
        "latency at batch 1, ms, in 4 rounds",
        "throughput at batch 8, images/s, in 4 rounds",
    ]


def test_a_model_that_is_measured_in_earnest_has_numbers_above_zero() -> None:
    found = bench(BenchConfig([MINI, REDUCED], batch_size=2, rounds=2, training=False))
    speeds = [speed.value for row in found.rows for speed in row.speeds.values()]
    assert all(0 < s.low <= s.median <= s.high for s in speeds)
    assert found.read_gigabytes_per_second > 0


def test_the_machine_is_described() -> None:
    told = describe_machine(CPU)
    assert (told["device"], told["torch"]) == ("cpu", torch.__version__)
    assert told["threads"] == torch.get_num_threads()
    assert told["cpu"]
    assert told["accelerator"] is None


def test_reading_speed_is_bytes_in_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "time_interleaved", lambda runs, rounds: {"sum": [9.0, 0.5, 0.25]})
    monkeypatch.setattr(machine, "_READ_BYTES", 4000)
    assert read_gigabytes_per_second(CPU) == 4000 / 1e9 / 0.5


# --- what is said of it -------------------------------------------------------------------------


def made(
    ratio: float = 2.0, weights_mib: float = 1.0, batch_size: int = 8, **speedups: float | Timing
) -> BenchResult:
    """A host of 100 ms, 10 images a second in any batch, and a model that is so much faster."""
    measurements = [
        Measurement("latency", 1, "ms"),
        Measurement("throughput", batch_size, "images/s"),
        Measurement("training", batch_size, "images/s"),
    ]
    whole = {"latency": 100.0, "throughput": 10.0, "training": 10.0}

    def row(name: str, ratio: float, speedups: dict[str, float | Timing]) -> BenchRow:
        speeds = {}
        for what, value in whole.items():
            given = speedups.get(what, 1.0)
            spread = given if isinstance(given, Timing) else Timing(given, given, given)
            own = value / spread.median if what == "latency" else value * spread.median
            speeds[what] = Speed(Timing(own, own, own), spread, spread.median / ratio)
        gmacs = 4 / ratio
        return BenchRow(name, 10, weights_mib, gmacs, 2 * gmacs, ratio, 5.0, 6.0, speeds)

    rows = [row("vit", 1.0, {}), row("vit+insert(8)", ratio, speedups)]
    config = BenchConfig(["vit", "vit+insert(8)"], batch_size=batch_size, rounds=2)
    machine = {**describe_machine(CPU), "cpu": "Chip", "threads": 3, "torch": "2.9"}
    return BenchResult(config, machine, 10.0, [3, 224, 224], measurements, rows)


def even(speedup: float) -> dict[str, float]:
    return {"latency": speedup, "throughput": speedup, "training": speedup}


def test_where_the_multiply_adds_become_speed_nothing_is_said() -> None:
    assert bench_notes(made(2.0, **even(1.9))) == []


def test_less_than_0_95_of_what_is_promised_is_said() -> None:
    [note] = bench_notes(made(2.0, **even(1.9) | {"training": Timing(1.89, 1.8, 1.95)}))
    assert note == (
        "vit+insert(8) has 2.00 times fewer multiply-adds than vit, but gains less in training at "
        "batch 8: 1.89 (1.80–1.95) times as fast, 0.94 of that."
    )


def test_slower_than_the_first_is_said_to_not_pay_even_where_little_is_promised() -> None:
    [note] = bench_notes(made(1.02, **even(1.0) | {"throughput": Timing(0.99, 0.98, 1.0)}))
    assert "but does not pay in throughput at batch 8: 0.99 (0.98–1.00) times as fast" in note


def test_one_line_has_all_that_does_not_pay() -> None:
    [note] = bench_notes(made(2.0, **even(1.5)))
    assert [*re.findall(r"gains less in (\w+) at batch (\d)", note)] == [
        ("latency", "1"),
        ("throughput", "8"),
        ("training", "8"),
    ]


def test_quartiles_that_reach_what_is_promised_are_called_noise() -> None:
    [note] = bench_notes(made(2.0, **even(2.0) | {"training": Timing(1.5, 1.2, 2.0)}))
    assert note.endswith("1.50 (1.20–2.00) times as fast, 0.75 of that, within the noise.")


def test_a_faster_form_of_the_same_model_needs_no_note() -> None:
    assert bench_notes(made(1.0, **even(1.2))) == []
    [note] = bench_notes(made(1.0, **even(1.2) | {"training": Timing(0.9, 0.8, 1.0)}))
    assert "there is no reduction that could pay" in note


def test_a_model_with_more_multiply_adds_is_said_to_be_no_reduction() -> None:
    [note] = bench_notes(made(0.8, **even(0.5)))
    assert (
        note
        == "vit+insert(8) has 1.25 times the multiply-adds of vit: there is no reduction "
        + ("that could pay.")
    )


@pytest.mark.parametrize(("weights_mib", "is_said"), [(40.0, True), (30.0, False)])
def test_reading_weights_is_named_where_it_takes_a_quarter_of_what_is_missing(
    weights_mib: float, is_said: bool
) -> None:
    # 66.7 ms, where 50 are promised; a quarter of what is missing is 4.2 ms, or 39.7 MiB
    [note] = bench_notes(made(2.0, weights_mib, **even(2.0) | {"latency": 1.5}))
    assert ("At batch 1 reading 40 MiB of weights takes about 4.2 of 66.7 ms" in note) is is_said
    assert ("reading" in note) is is_said


def test_a_batch_that_does_more_a_second_is_named() -> None:
    [note] = bench_notes(made(4.0, batch_size=16, **even(4.0) | {"latency": 2.0}))
    assert note.endswith(
        "At batch 16 it does 2.0 times as many multiply-adds a second as at batch 1, where "
        "starting operations takes time too: larger batches may gain more."
    )


def test_training_that_gains_less_gives_no_reason_that_is_not_known() -> None:
    [note] = bench_notes(made(4.0, 400.0, throughput=8.0, latency=4.0, training=2.0))
    assert note.endswith("0.50 of that.")


# --- tables and files ---------------------------------------------------------------------------


def text_of(*parts: Any, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(*parts, sep="\n")
    return out.getvalue()


def cells(text: str, start: str) -> list[str]:
    """The first line of a text that starts so, as cells."""
    lines = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    return next(line for line in lines if line[0] == start)


def test_the_table_of_sizes_has_what_is_counted() -> None:
    text = text_of(size_table(made(2.0)), width=100)
    assert cells(text, "vit") == ["vit", "0.00", "4.000", "8.000", "1.00", "5.0", "6.0"]
    assert cells(text, "model") == [
        *("model", "params M", "GMACs", "GFLOPs", "MACs ratio", "peak MiB", "train MiB")
    ]


def test_the_table_of_speeds_has_a_part_for_each_measurement() -> None:
    given = made(2.0, latency=Timing(1.6, 1.5, 1.75), throughput=2.0, training=1.9)
    lines = [re.split(r" {2,}", line.strip()) for line in text_of(speed_table(given)).splitlines()]
    assert [line for line in lines if len(line) > 1 or line[0].endswith(("ms", "/s"))] == [
        ["median (quartiles)", "speed-up", "of MACs"],
        ["latency at batch 1, ms"],
        ["vit", "100 (100–100)", "1.00 (1.00–1.00)", "1.00"],
        ["vit+insert(8)", "62.5 (62.5–62.5)", "1.60 (1.50–1.75)", "0.80"],
        ["throughput at batch 8, images/s"],
        ["vit", "10.0 (10.0–10.0)", "1.00 (1.00–1.00)", "1.00"],
        ["vit+insert(8)", "20.0 (20.0–20.0)", "2.00 (2.00–2.00)", "1.00"],
        ["training at batch 8, images/s"],
        ["vit", "10.0 (10.0–10.0)", "1.00 (1.00–1.00)", "1.00"],
        ["vit+insert(8)", "19.0 (19.0–19.0)", "1.90 (1.90–1.90)", "0.95"],
    ]


def test_json_has_what_was_run_where_and_what_came_out() -> None:
    given = made(2.0, **even(1.5))
    told = json.loads(json.dumps(bench_json(given), allow_nan=False))
    assert told["command"] == "tokenlearner bench vit 'vit+insert(8)' --rounds 2"
    assert told["machine"]["cpu"] == "Chip"
    assert told["config"]["dtype"] == "float32"
    assert told["notes"] == bench_notes(given)
    assert [(m["base"], m["insert"]) for m in told["models"]] == [
        ("vit", {}),
        ("vit", {"num_tokens": 8}),
    ]
    speed = told["models"][1]["speeds"]["throughput"]
    assert speed["value"] == {"median": 15, "low": 15, "high": 15}
    assert (speed["speedup"]["median"], speed["of_macs_ratio"]) == (1.5, 0.75)
    assert told["measurements"][1] == {"name": "throughput", "batch_size": 8, "unit": "images/s"}


def test_a_run_gives_tables_and_lines_and_leaves_the_files(
    watch: Stopwatch, tmp_path: Path
) -> None:
    files = {"json": str(tmp_path / "x.json"), "plot": str(tmp_path / "x.png")}
    sizes, speeds, *lines = bench_table(BenchConfig([MINI, REDUCED], rounds=2, **files))
    assert REDUCED in text_of(speeds)
    assert "+insert(8,3)" in text_of(sizes)
    assert lines[-1].startswith("1 x 28 x 28 on cpu (")
    assert "float32; medians (quartiles) of 2 rounds in turn." in lines[-1]
    told = json.loads((tmp_path / "x.json").read_text())
    assert [model["name"] for model in told["models"]] == [MINI, REDUCED]
    with Image.open(tmp_path / "x.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
    assert {(0, 114, 178), (230, 159, 0), (0, 158, 115)} <= colors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]


def test_no_file_is_left_that_was_not_asked_for(
    watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench_table(BenchConfig([MINI], rounds=2))
    assert not list(tmp_path.iterdir())


def test_brackets_in_a_name_are_no_markup(watch: Stopwatch, tmp_path: Path) -> None:
    saved = str(save_model(create_model(MINI), tmp_path / "[red]" / "m.safetensors"))
    parts = bench_table(BenchConfig([saved], rounds=2))
    assert text_of(*parts, width=300).count("[red]") == 5  # in each table's rows, and in the line


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_package_that_is_missing_is_told_before_any_work(
    package: str, watch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = BenchConfig([MINI], plot=str(tmp_path / "x.png"))
    with pytest.raises(ValueError, match=f"bench needs {package}; run pip install 'tokenlearner"):
        bench_table(config)
    assert not watch.calls


def test_matplotlib_is_not_needed_without_a_plot(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert len(bench_table(BenchConfig([MINI], rounds=2))) == 3


def test_the_command_prints_what_it_measured_and_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    options = ["--rounds", "2", "--batch_size", "2", "--training", "false", "--json", str(path)]
    main(["bench", MINI, f"{MINI}+insert(8,3)", *options])
    out, err = capsys.readouterr()
    assert "throughput at batch 2, images/s" in out
    assert err.startswith("building\ncounting multiply-adds and memory\nlatency at batch 1")
    assert len(json.loads(path.read_text())["models"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MINI, "--batch_size", "0"], "batch_size is 0, expected an integer of 1 or more"),
        ([f"{MINI}+insert(x)"], f"'{MINI}+insert(x)' has 'x' for the number of tokens"),
        (["nothing_like_it"], "there is no model 'nothing_like_it'"),
        (["--rounds", "2"], ""),
    ],
)
def test_a_mistake_gets_a_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments])
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert f"tokenlearner bench: {message}" in err
