"""The scripts in benchmarks/ run at a tiny size and print a table of sane numbers."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from simulators import require_gym_pusht
from timm.models import VisionTransformer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"
MODEL = "model.safetensors"
Run = Callable[[ModuleType, str], str]


SCRIPTS = [p.stem for p in sorted(BENCHMARKS.glob("*.py")) if "__main__" in p.read_text("utf-8")]
MEASURING = [
    pytest.param(
        name, marks=pytest.mark.slow if "against" in name else ()
    )  # jax takes seconds to import
    for name in SCRIPTS
    if name not in ("compare_report", "figures")
]


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


def test_every_script_is_in_the_readme_with_its_command() -> None:
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for path in BENCHMARKS.glob("*.py"):
        is_script = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        assert (f"python benchmarks/{path.name}" if is_script else path.name) in readme


@pytest.mark.parametrize("script", ["modules_memory"], indirect=True)
@pytest.mark.parametrize("name", ["V1", "V1.1 grouped", "V1.1 MLP"])
def test_the_textbook_form_gives_the_same_tokens(script: ModuleType, name: str) -> None:
    learner, x = script.LEARNERS[name](), torch.randn(2, 5, 7, 128)
    torch.testing.assert_close(script.textbook(learner, x), learner(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["models_speed"], indirect=True)
def test_models_speed_prints_ratios_of_time_multiply_adds_and_memory(
    script: ModuleType, run: Run
) -> None:
    name = "vit_mini_patch4_tl8at3_28"
    _, rows = table(run(script, f"--models {name} --batches 2 --rounds 2"))
    labels = [f"`{name}`", "merging 6 in every block"]
    assert list(rows) == [f"{a}, {b}, 2" for b in ("inference", "training") for a in labels]
    for label, (of_macs, speedup, share, *_) in rows.items():
        assert of_macs == (1.65 if "merging" in label else 1.69)  # as in the demo's table
        assert share == pytest.approx(speedup / of_macs, abs=0.02)
    assert rows[f"`{name}`, training, 2"][5] < 0.8  # fewer tokens are kept for the backward pass


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


TINY_FLAX = "--model vit_tiny_patch16_tl8at6_224 --tokens 4 --batches 2 --size 64 --rounds 2"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["against_flax"], indirect=True)
@pytest.mark.parametrize(
    ("learner", "forms"), [("v1", "Flax"), ("v11", "Flax compiled onednn packed bfloat16")]
)
def test_against_flax_compares_equal_models(script: ModuleType, learner: str, forms: str) -> None:
    """The script itself refuses models whose numbers differ."""
    text = run_apart(script, f"{TINY_FLAX} --learner {learner} --forms {forms}")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    kinds = ["eager", *forms.split()]
    names = [f"| {model}, {kind}" for model in ("plain", "4 tokens") for kind in kinds]
    assert [row[0] for row in rows] == names


@pytest.mark.slow
@pytest.mark.parametrize("script", ["against_flax"], indirect=True)
def test_against_flax_refuses_other_numbers(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = script.Form(lambda: torch.ones(2, 1000))
    monkeypatch.setitem(script.FORMS, "Flax", lambda *_: ones)
    with pytest.raises(AssertionError, match="plain, Flax gives other numbers than eager"):
        run(script, f"{TINY_FLAX} --forms Flax")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["modules_against"], indirect=True)
@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_modules_against_times_flax_and_keras_that_give_the_same_tokens_and_gradients(
    script: ModuleType, what: str
) -> None:
    """The script itself refuses what differs by more than 1e-4 of the largest number."""
    shape = "--shapes '8 x 14 x 14 x 768' --batch 1 --rounds 2"
    text = run_apart(script, f"{shape} --passes '{what}' --forms Flax Keras")
    forms = [
        f"| {n}, {form}, {what}" for n in script.LEARNERS for form in ("ours", "Flax", "Keras")
    ]
    lines = [line for line in text.splitlines() if line.startswith("| V1")]
    assert [line.split(" | ")[0] for line in lines] == forms
    right = torch.tensor([1.0, 100.0])
    script.check_same("V1, Flax", right + 0.009, right)
    with pytest.raises(SystemExit, match=r"V1, Flax differs by 1\.1e-04 of the largest"):
        script.check_same("V1, Flax", right + 0.011, right)
    with pytest.raises(SystemExit, match="differs by nan"):
        script.check_same("V1, Flax", right * float("nan"), right)


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
    assert rows["resolution 28"][:2] == rows["batch 1"][:2] == [0.0163, 0.00965]  # as in the demo
    assert rows["batch 2"][0] == pytest.approx(2 * 0.0163, rel=0.01)
    assert rows["tokens 1"][1] < rows["tokens 4"][1] < rows["tokens 4"][0]
    assert rows["resolution 56"][0] > 4 * rows["resolution 28"][0]  # attention grows faster
    assert len(list(tmp_path.glob("scaling-*.png"))) == len(script.VALUES)
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("measured again"))
    _, again = table(run(script, options))
    assert again == rows


SLOWER = (
    "models calibrate modules training tf32 larger stream "
    "compiled compiled-modules compiled-training"
)


@pytest.mark.parametrize("tables", ["ceilings", pytest.param(SLOWER, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_gpu_fills_all_tables_at_the_size_of_a_toy(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: str
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # at once
    out = tmp_path / "gpu.json"
    run(script, f"--device cpu --time 1000 --tables {tables} --out {out}")
    found = json.loads(out.read_text())["tables"]
    assert [*found] == tables.split()
    assert all(t["rows"] and not (t["failed"] or t["left_out"]) for t in found.values())
    report = run(script, f"--markdown {out}")
    assert report.count("\n| --- ") == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_gpu_reports_what_fails_and_what_is_left_out(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(fails: bool) -> Any:
        yield {"row": "one", "ms": 1.0}
        if fails:
            raise torch.OutOfMemoryError("no memory")

    jobs = {name: script.Job(name, lambda name=name: rows(name == "b"), 1.0) for name in "abc"}
    late = script.Job("late", lambda: rows(False), 1e6)
    table = script.Table("A table", 1.0, lambda _: [late, *jobs.values()])
    monkeypatch.setitem(script.TABLES, "stream", table)
    with pytest.raises(SystemExit, match="some rows failed"):
        run(script, f"--device cpu --tables stream --out {tmp_path / 'gpu.json'}")
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["tables"].values()
    assert found["failed"] == {"b": "OutOfMemoryError: no memory"}
    assert (len(found["rows"]), found["left_out"]) == (3, ["late"])
    report = run(script, f"--markdown {tmp_path / 'gpu.json'}")
    assert "Failed: b: OutOfMemoryError" in report
    assert "Left out for time: late." in report


@pytest.mark.parametrize("script", ["gpu_tables"], indirect=True)
def test_the_textbook_form_of_the_fuser_gives_the_same(script: ModuleType) -> None:
    forms, _ = script.fuser_forms("fuser", x := torch.randn(2, 5, 7, 16))
    torch.testing.assert_close(forms["textbook"](x), forms["ours"](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script", ["openclipart"], indirect=True)
def test_near_duplicates_are_in_one_part_of_the_drawings(
    script: ModuleType, tmp_path: Path
) -> None:
    """Each drawing is there in three sizes, on another page and in slightly other colors."""
    (tmp_path / "food").mkdir()
    for number in range(20):
        noise = Image.fromarray(np.random.default_rng(number).integers(0, 200, (6, 6, 3), np.uint8))
        for copy, side in enumerate((60, 90, 180)):
            page = Image.new("RGBA", (200 + copy, 200))
            page.paste(noise.resize((side, side), Image.Resampling.BICUBIC), (5 * copy, 7))
            page.save(tmp_path / ("food" if number % 2 else "") / f"{number}-{copy}.png")
    parts = script.load_drawings(tmp_path, 32)
    kept, held_out = parts
    assert [len(part.images) for part in parts] == [48, 12]
    assert all(
        part.groups.unique(return_counts=True)[1].tolist() == [3] * n
        for part, n in ((kept, 16), (held_out, 4))
    )
    assert not set(kept.groups.tolist()) & set(held_out.groups.tolist())
    labels = torch.cat([kept.labels, held_out.labels]).unique(return_counts=True)
    assert [values.tolist() for values in labels] == [[-1, script.CLASSES.index("food")], [30, 30]]
    assert held_out.images.shape[1:] == (3, 32, 32)
    assert held_out.images[:, :, 2:-2, 2:-2].max() < 255  # it fills the page


@pytest.mark.parametrize("script", ["detail"], indirect=True)
def test_detail_makes_the_same_image_of_the_same_number(script: ModuleType) -> None:
    garments = {"data": "fashion-mnist-small"}
    images, labels = script.load_detail("test", 3, **garments)
    again, _ = script.load_detail("test", 2, **garments)
    assert (images.shape, images.dtype) == ((3, 3, 224, 224), torch.uint8)
    assert labels.tolist() == [script.DetailImages("test", **garments)[i][1] for i in range(3)]
    assert torch.equal(images[:2], again)
    for other in ({"split": "train"}, {"split": "test", "seed": 1}):
        assert not torch.equal(script.load_detail(count=2, **other, **garments)[0], again)


@pytest.mark.parametrize("script", ["detail"], indirect=True)
def test_detail_prints_what_the_host_loses_on_smaller_images(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host(wheel: Path, size: int) -> torch.nn.Module:
        shape: dict[str, Any] = {"embed_dim": 12, "depth": 7, "num_heads": 2, "num_classes": 0}
        torch.manual_seed(size)
        return VisionTransformer(size, 14, **shape).eval()

    monkeypatch.setattr(script, "dinov2_small", host)
    options = f"--wheel a --data fashion-mnist-small --out {tmp_path} --sizes 154"
    _, rows = table(run(script, options := f"{options} --images 2 --epochs 1 --test 4"))
    assert list(rows) == ["224", "154"]
    assert rows["224"][1] == 0
    monkeypatch.setattr(script, "_fit", lambda *_: pytest.fail("trained again"))
    assert table(run(script, options))[1] == rows
    with pytest.raises(ValueError, match="detail-host"):
        run(script, options.replace("--epochs 1", "--epochs 2"))


@pytest.mark.parametrize("script", ["pusht"], indirect=True)
def test_the_expert_gets_to_the_t_and_mirrored_clips_show_mirrored_places(
    script: ModuleType,
) -> None:
    require_gym_pusht()
    data = script.collect(3, 64, noise=0.0)
    ends = [*data.first.unique().tolist()[1:], len(data.first)]
    assert max(end - start for start, end in zip([0, *ends], ends, strict=False)) < script.STEPS
    last = torch.arange(len(data.first))
    frames, places, present = data.clips(last, 2, torch.Generator().manual_seed(0))
    assert torch.equal(present[:, 0], last > data.first)
    blue = (frames[:, -1].float() * torch.tensor([-1.0, 0.0, 1.0])).sum(-1)  # the agent's color
    columns = blue.flatten(1).argmax(1) % 64
    assert ((8 * columns - places[:, -1, 2]).abs() < 24).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("script", ["policy"], indirect=True)
def test_policy_trains_acts_and_goes_on_where_it_stopped(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_gym_pusht()
    options = f"--out {tmp_path} --seeds 0 --episodes 3 --steps 2 --held_out 2 --rounds 2"
    _, rows = table(run(script, options))
    assert [*rows] == [*script.CONTENDERS]
    macs = {name: row[0] for name, row in rows.items()}
    assert macs["4 learned tokens"] < macs["8 learned tokens"] < macs["all positions"] / 2
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained again"))
    assert [*table(run(script, options))[1]] == [*rows]
    with pytest.raises(ValueError, match=r"was made with .* expected .* the same options"):
        run(script, options.replace("--steps 2", "--steps 3"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["insertion"], indirect=True)
def test_insertion_fits_all_contenders_alike_and_goes_on_where_it_was(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = importlib.import_module("insertion_sets")

    def host(wheel: Path, size: int) -> torch.nn.Module:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0}
        return VisionTransformer(size, 14, **shape).eval()

    def drawings(root: Path, size: int) -> Any:
        for count in (30, 20):
            images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
            yield sets.Drawings(images, torch.arange(count) % 3 - 1, torch.arange(count))

    monkeypatch.setattr(sets, "dinov2_small", host)
    monkeypatch.setattr(sets, "load_drawings", drawings)
    options = f"--out {tmp_path} --size 56 --steps 2 --views 1 --budgets 0.9 --seeds 0"
    options += " --batch_size 8 --batches 1 --rounds 2 --rates 1e-3"
    _, rows = table(run(script, options))
    kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("run-*.json"))]
    assert {row["kind"] for row in kept} >= {
        *("smaller image", "8 tokens", "pooled to 8", "top 8", "merged to 8", "elastic"),
        *("merged in every block", "no tokens", "first blocks", "token-level loss"),
    }
    assert {row["steps"] for row in kept} == {2}
    assert all(0 < row["share"] <= 0.9 for row in kept)
    assert {*rows} == {row["name"] for row in kept}
    assert {tuple(row["error_by_count"]) for row in kept if "error_by_count" in row} == {
        ("2", "4", "8")
    }
    monkeypatch.setattr(script, "fit", lambda *_: pytest.fail("fitted again"))
    assert [*table(run(script, options))[1]] == [*rows]
    picks = importlib.import_module("reduce_picks")
    run(picks, f"{options} --minutes 0.02")
    [found] = json.loads((tmp_path / "reduce_picks.json").read_text())["rows"]
    assert found["picked"] in found["full_errors"]
    assert {*found["brief_errors"]} == {row["name"] for row in kept if row["candidate"]}
    known = shutil.move(tmp_path / "results.json", tmp_path / "known.json")
    for path in tmp_path.glob("run-*"):
        path.unlink()
    monkeypatch.setattr(script, "load_setting", lambda *_: pytest.fail("loaded again"))
    assert {*table(run(script, f"{options} --known {known} --no_runs"))[1]} == {*rows}
    with pytest.raises(ValueError, match=r"was made with .* expected .* the same options"):
        run(script, f"{options} --known {known} --no_runs --views 2")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["insertion_sets"], indirect=True)
def test_sets_of_insertion_have_a_host_and_images_for_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host(*args: object, **options: object) -> torch.nn.Module:
        shape: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
        return VisionTransformer(224, 14, **shape).eval()

    monkeypatch.setattr(script, "finetuned_host", host)
    options = {"out": tmp_path, "data": "fashion-mnist-small", "garments": None, "wheel": None}
    options |= {"device": "cpu", "images": 20, "detail_images": 24, "host_epochs": 1}
    options["dtype"] = "float32"
    for name, count in (("detail", 8), ("clothes", 2000)):
        found = script.load_setting(SimpleNamespace(set=name, **options))
        assert (len(found.train.images), len(found.test.images)) == (20, count)
        images = found.normalized(found.train.images)
        assert abs(images.mean()) < 1.5
        assert found.host(images[:2]).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["connectors"], indirect=True)
def test_connectors_fits_all_contenders_alike_and_goes_on_where_it_was(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    options = f"--models {tmp_path} --out {tmp_path / 'a.json'} --tokens 16 --scenes 8 --test 4"
    options += " --tower-steps 1 --train-steps 1 --fit-scenes 8 --steps 2 --rounds 2 --batch 1"
    run(script, f"{options} --seeds 0")
    assert (tmp_path / "seed0" / "model.safetensors").exists()
    text = run(script, f"{options} --seeds 0 1")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + len(script.CONTENDERS))
    assert all(row["kl"] < 1e-6 for row in rows if row["contender"] == script.ALL)
    assert "'seed': 0" not in text  # made already
    with pytest.raises(SystemExit):
        run(script, f"{options} --seeds 0 --steps 3")


@pytest.mark.parametrize("script", MEASURING, indirect=True)
def test_every_script_takes_a_device_and_refuses_one_that_is_not_there(
    script: ModuleType, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"accuracy": "--drawings b", "against_version": "src", "detail": "--wheel a"}
    needed |= {"pretrained_maps": "--wheel a"}
    with pytest.raises(SystemExit):
        run(script, f"{needed.get(script.__name__, '')} --device cuda:99")
    said = capsys.readouterr().err
    assert "--device" in said
    assert "cuda:99" in said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["compile_time"], indirect=True)
def test_compile_time_counts_graphs(script: ModuleType, run: Run) -> None:
    header, rows = table(run(script, "--model test_vit --modes default --batches 2 3"))
    assert header[-2:] == ["graphs", "more at 3 images"]
    assert [row[2:] for row in rows.values()] == [[1, 0], [2, 0]]  # blocks, and the learner's


@pytest.mark.parametrize("script", ["figures"], indirect=True)
def test_figures_draws_the_kept_results(script: ModuleType, run: Run, tmp_path: Path) -> None:
    run(script, f"--out {tmp_path}")
    for name in ("errors.png", "curves.png", "speed.png"):
        with Image.open(tmp_path / name) as found, Image.open(DOCS / name) as kept:
            assert found.size == kept.size
            assert len(found.convert("RGB").quantize(64).getcolors()) > 8


@pytest.mark.parametrize("script", ["figures"], indirect=True)
def test_a_figure_has_the_best_of_each_family(script: ModuleType) -> None:
    def row(kind: str, error: float, seed: int = 0) -> dict[str, Any]:
        shared = {"name": kind, "budget": 0.5, "rate": 1e-4, "share": 0.4, "stopping_error": 1}
        return {"kind": kind, "error": error, "seed": seed, **shared}

    rows = [row("8 tokens", 0.3), row("8 tokens", 0.2, 1), row("16 tokens early", 0.4)]
    rows += [row("smaller image 1 and 16 tokens", 0.1), row("4 tokens, same place", 0.05)]
    assert script.best_points(rows) == {
        "learned tokens": [(0.4, [0.3, 0.2])],
        "smaller image and learned tokens": [(0.4, [0.1])],
    }
