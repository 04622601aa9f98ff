"""`tokenlearner bench --advise true`: the forms of a model, and which is said to be the fastest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tokenlearner import create_model
from tokenlearner.commands.bench import advise as advising
from tokenlearner.commands.bench.advise import Advice, AdviceRow, Form, advice_lines, advise
from tokenlearner.commands.bench.config import BenchConfig
from tokenlearner.commands.bench.run import Measurement
from tokenlearner.commands.main import main
from tokenlearner.evaluation.latency import Timing

MINI = "vit_mini_patch4_28"
REDUCED = f"{MINI}+insert(8,3)"
CPU = torch.device("cpu")
EXACT = {"float32", "float32 by oneDNN", "ONNX Runtime"}
HALF = {"bfloat16", "bfloat16, plain attention"}


@pytest.fixture(scope="module")
def advice() -> Iterator[Advice]:
    config = BenchConfig([MINI, REDUCED], batch_size=2, rounds=2, time="1s", training=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advising, "find_spec", lambda name: None)
        yield advise(config)


def test_every_form_of_every_model_is_measured_beside_the_first_in_float32(advice: Advice) -> None:
    assert [(row.model, row.form) for row in advice.rows[:2]] == [
        (MINI, "float32"),
        (MINI, "float32 by oneDNN"),
    ]
    assert {row.form for row in advice.rows if row.model == REDUCED} == EXACT | HALF
    labels = [f"{name}, ms" for name in ("latency at batch 1", "latency at batch 2")]
    labels.append("training at batch 2, ms")
    assert [one.label for one in advice.measurements] == labels
    assert all(one.rounds == 2 for one in advice.measurements)
    assert advice.rows[0].speedups[labels[0]] == Timing(1, 1, 1)
    for row in advice.rows:
        is_file = row.form == "ONNX Runtime"
        assert [*row.speeds] == (labels[:2] if is_file else labels)
        assert bool(row.realized) == (row.model == REDUCED)


def test_forms_compute_what_the_model_computes(advice: Advice) -> None:
    for row in advice.rows:
        assert row.difference < (1e-4 if row.form in EXACT else 0.2), row
    assert all(row.difference > 1e-4 for row in advice.rows if row.form in HALF)


def test_what_cannot_be_measured_is_named_with_the_reason(advice: Advice) -> None:
    assert [*advice.left_out] == [f"{MINI} in OpenVINO", f"{REDUCED} in OpenVINO"]
    assert advice_lines(advice)[-1] == (
        f"Not measured: {REDUCED} in OpenVINO (pip install openvino has it measured too)."
    )


def test_the_simpler_of_forms_that_are_as_fast_is_advised(advice: Advice) -> None:
    one = Measurement("latency", 1, "ms", 3)

    def row(form: str, ms: float) -> AdviceRow:
        speeds, speedups = ({one.label: Timing(x, x, x)} for x in (ms, 10 / ms))
        return AdviceRow("vit", form, f"use {form}", 0.0, speeds, speedups)

    rows = [row("float32", 10), row("bfloat16", 5.1), row("ONNX Runtime", 5)]
    found = replace(advice, measurements=[one], rows=rows, left_out={})
    said = "latency at batch 1, ms: take bfloat16, 1.96 times as fast as vit in float32 "
    assert advice_lines(found) == [f"{said}(use bfloat16)."]
    assert replace(found, rows=[*rows[:2], row("ONNX Runtime", 4)]).best(one.label) == row(
        "ONNX Runtime", 4
    )


def test_a_model_is_exported_once_for_all_forms_that_run_the_file(tmp_path: Path) -> None:
    model, images = create_model(MINI).eval(), torch.randn(2, 1, 28, 28)
    file = tmp_path / "x.onnx"
    forms = {form.name: form for form in advising._forms(CPU, file)}
    forms["ONNX Runtime"].inference(model, images)
    written = file.stat().st_mtime_ns
    expected = forms["ONNX Runtime"].inference(model, images)(images)
    assert file.stat().st_mtime_ns == written
    torch.testing.assert_close(expected, model(images), rtol=1e-4, atol=1e-5)


def test_plain_attention_is_what_a_form_runs_on_and_torch_is_as_before() -> None:
    forms = {form.name: form for form in advising._forms(CPU, Path())}
    model = create_model(MINI).eval()
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    images, ran = torch.randn(2, 1, 28, 28), {}
    for name in HALF:
        run = forms[name].inference(model, images)
        with torch.inference_mode(), torch.profiler.profile() as profile:
            run(images)
        ran[name] = {event.key for event in profile.key_averages()}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert {name: fused in operators for name, operators in ran.items()} == {
        "bfloat16": True,
        "bfloat16, plain attention": False,
    }
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == allowed


@pytest.mark.parametrize("name", ["float32", "float32 by oneDNN", *sorted(HALF)])
def test_training_has_all_gradients_and_leaves_the_model_as_it_is(name: str) -> None:
    [form] = [form for form in advising._forms(CPU, Path()) if form.name == name]
    model, images = create_model(MINI).eval(), torch.randn(2, 1, 28, 28)
    found = form.training(model, images)(images)
    model.zero_grad()
    model(images).mean().backward()
    rtol, atol = (0.1, 0.02) if name in HALF else (1e-4, 1e-6)
    for grad, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=rtol, atol=atol)
    model.zero_grad()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert all(p.grad is None for p in model.parameters())


def test_the_command_says_which_form_to_take_and_writes_all_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forms(*args: Any) -> list[Form]:
        return [form for form in original(*args) if form.name == "float32"]

    original: Any = advising._forms
    monkeypatch.setattr(advising, "_forms", forms)
    path = tmp_path / "x.json"
    options = f"--batch_size 1 --rounds 2 --json {path}".split()
    main(["bench", MINI, "--advise", "true", *options])
    out = " ".join(capsys.readouterr().out.split())
    assert f"latency at batch 1, ms: {MINI} ms times as fast" in out
    assert out.endswith(
        f"take float32, 1.00 times as fast as {MINI} in float32 (the model as it is)."
    )
    [row] = json.loads(path.read_text())["rows"]
    assert row["speedups"] == {"latency at batch 1, ms": {"median": 1, "low": 1, "high": 1}}
