"""`export`: files that give the model's numbers at any batch size, and none that do not."""

from __future__ import annotations

import copy
import io
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny import TIMM, snapshot, torchvision_vit, transformers_vit
from torch import Tensor, nn

import tokenlearner
from tokenlearner import create_model, evaluate, insert, load_data, load_model, save_model
from tokenlearner.commands.export import (
    ExportConfig,
    export_table,
)
from tokenlearner.deploy import formats as formats_module
from tokenlearner.deploy.exporting import BatchCheck, Exported, export
from tokenlearner.deploy.formats import load_exported, write_program
from tokenlearner.evaluation.latency import Timing

slow = pytest.mark.slow
MINI = "vit_mini_patch4_28"
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 7}


def lively(model: nn.Module) -> Any:
    """Every weight at random, so that no head of zeros makes all outputs alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def small_vit(**kwargs: Any) -> Any:
    return lively(create_model(MINI, **SMALL | kwargs))


Built = tuple[Callable[[], nn.Module], tuple[int, ...]]
FAMILIES: dict[str, Built] = {
    "not-square": (
        lambda: create_model(MINI, **SMALL | {"depth": 1}, num_tokens=2, img_size=(28, 42)),
        (1, 28, 42),
    ),
    "v1-fused": (
        lambda: create_model(MINI, **SMALL, num_tokens=2, learner="v1", fuse=True),
        (1, 28, 28),
    ),
    "mixer": (lambda: create_model("mixer_mini_patch4_tl8at3_28"), (1, 28, 28)),
    "framevit": (lambda: create_model("framevit_mini_patch8_f6_tl4at3_32"), (3, 6, 32, 32)),
    "eva-fused": (
        lambda: insert(timm.models.Eva(**TIMM, use_rot_pos_emb=True), 2, fuse=True),
        (3, 16, 16),
    ),
    "two-places": (
        lambda: insert(create_model(MINI, **SMALL), (4, 2), at=(0, 1)),
        (1, 28, 28),
    ),
    "vivit": (lambda: create_model("vivit_mini_patch8x2_32", num_tokens=2), (3, 8, 32, 32)),
    "torchvision": (lambda: insert(torchvision_vit(), 2), (3, 16, 16)),
    "transformers": (lambda: insert(transformers_vit(), 2), (3, 16, 16)),
}
NOT_SWEPT = ("v1-fused", "mixer", "framevit", "eva-fused")  # the rest are in test_sweep


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out = model.eval()(images)
    return out if isinstance(out, Tensor) else out.logits


def agree(name: str, suffix: str, folder: Path) -> None:
    build, shape = FAMILIES[name]
    model, images = lively(build()), torch.randn(4, *shape)
    made = export(model, folder / f"model{suffix}", images, rounds=2)
    assert [check.batch_size for check in made.checks] == [4, 1]
    file = load_exported(made.path)
    assert file.inputs == {"images": ("batch", *shape)}
    for n in (1, 7):  # neither was traced
        images = torch.randn(n, *shape)
        expected = logits(model, images)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(file(images), expected, rtol=1e-4, atol=1e-4)


@slow
@pytest.mark.parametrize("name", NOT_SWEPT)
def test_onnx_gives_the_numbers_of_every_family(name: str, tmp_path: Path) -> None:
    agree(name, ".onnx", tmp_path)


@slow
@pytest.mark.parametrize("name", NOT_SWEPT)
def test_a_program_gives_the_numbers_of_every_family(name: str, tmp_path: Path) -> None:
    agree(name, ".pt2", tmp_path)


# --- what comes back, and what is left ----------------------------------------------------------


class Affine(nn.Module):
    """A model that is exported at once: `b 1 h w -> b 2`."""

    def __init__(self, size: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(16, 2)
        nn.init.constant_(self.linear.weight, size / 16)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


ONES = torch.ones(5, 1, 4, 4)


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    model = small_vit(depth=1, num_tokens=2).train()
    model.blocks[0].eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def made(vit: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("made") / "vit.pt2"
    return export(vit, str(path), torch.randn(2, 1, 28, 28), rounds=2)


def test_the_result_has_the_file_and_both_ends_and_nothing_else_is_left(made: Exported) -> None:
    assert [path.name for path in made.path.parent.iterdir()] == ["vit.pt2"]
    assert made.precision == "float32"
    assert made.size_mib == made.path.stat().st_size / 2**20
    assert (made.inputs, made.outputs) == (
        {"images": ("batch", 1, 28, 28)},
        {"logits": ("batch", 10)},
    )
    assert torch.export.load(made.path).example_inputs is None  # the images are not in the file


def test_a_program_gives_the_models_numbers_at_other_batch_sizes_and_no_gradient(
    vit: Any, made: Exported
) -> None:
    model, file = copy.deepcopy(vit), load_exported(made.path)
    for n in (1, 7):
        images = torch.randn(n, 1, 28, 28, requires_grad=True)
        expected, out = logits(model, images), file(images)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert not out.requires_grad


@slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_is_left_as_it_was(vit: Any, precision: str, tmp_path: Path) -> None:
    before = snapshot(vit)
    export(vit, tmp_path / "vit.pt2", torch.zeros(2, 1, 28, 28), precision=precision, rounds=2)
    assert snapshot(vit) == before


def test_saving_a_model_leaves_it_as_it_was(vit: Any, tmp_path: Path) -> None:
    before = snapshot(vit)
    save_model(vit, tmp_path / "model.safetensors")
    assert snapshot(vit) == before


@slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_model_on_the_chosen_device_is_exported(
    suffix: str, tmp_path: Path, device: torch.device
) -> None:
    model, images = small_vit(num_tokens=2).to(device), torch.randn(3, 1, 28, 28, device=device)
    made = export(model, tmp_path / f"model{suffix}", images, tolerance=1e-2, rounds=2)
    out = load_exported(made.path, device)(images)
    torch.testing.assert_close(out.to(device), logits(model, images), rtol=1e-2, atol=1e-2)


def test_the_model_runs_in_evaluation_mode_and_is_left_in_its_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.9), Affine().requires_grad_(False), nn.Linear(2, 2).eval())
    before = snapshot(model)
    made = export(model, tmp_path / "a.pt2", ONES[:1], rounds=2)
    assert snapshot(model) == before
    assert [check.batch_size for check in made.checks] == [1, 2]  # one image beside two
    torch.testing.assert_close(load_exported(made.path)(ONES), logits(model, ONES))


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=slow)])
def test_a_file_holds_no_path_of_this_machine(
    suffix: str, vit: Any, made: Exported, tmp_path: Path
) -> None:
    path = made.path
    if suffix == ".onnx":
        path = export(vit, tmp_path / "m.onnx", torch.rand(2, 1, 28, 28), rounds=2).path
    content = [path.read_bytes()]
    if suffix == ".pt2":
        archive = zipfile.ZipFile(path)
        content = [archive.read(entry) for entry in archive.namelist()]
    folders = (str(Path(tokenlearner.__file__).parent), "site-packages", str(Path.home()) + "/")
    assert not [f for f in folders if any(f.encode() in part for part in content)]


def test_a_file_is_evaluated_like_its_model(vit: Any, made: Exported) -> None:
    data = load_data("fashion-mnist-small", "test").sample(50)
    file, model = evaluate(load_exported(made.path), data), evaluate(vit, data)
    assert file.loss == pytest.approx(model.loss, rel=1e-5)
    assert replace(file, loss=0) == replace(model, loss=0)


# --- files that would be wrong ------------------------------------------------------------------


def off_by(difference: float) -> Callable[..., None]:
    """Writes a file of another model than the given one."""

    def write(model: Any, *rest: Any) -> None:
        with torch.no_grad():
            other = copy.deepcopy(model)
            other.model.linear.bias += difference
            write_program(other, *rest)

    return write


@pytest.mark.parametrize(
    ("size", "difference", "tolerance", "passes"),
    [
        *((0.01, 9e-5, 1e-4, True), (100, 9e-3, 1e-4, True), (1, 0.1, 0.2, True)),
        *((0.01, 1.2e-4, 1e-4, False), (100, 1.2e-2, 1e-4, False)),
        (1, float("nan"), 1e-4, False),
    ],
)
def test_a_difference_that_is_too_large_leaves_what_was_there(
    size: float,
    difference: float,
    tolerance: float,
    passes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.pt2").write_text("before")
    monkeypatch.setitem(export.__globals__, "write_program", off_by(difference))
    options: dict[str, Any] = {"tolerance": tolerance, "rounds": 2}
    if passes:
        made = export(Affine(size), tmp_path / "a.pt2", ONES, **options)
        assert made.largest_difference == pytest.approx(difference, rel=0.01)
        assert made.checks[0].largest_output == pytest.approx(size)
        return
    message = re.escape(f"differs from the model by {difference:.2g}")
    with pytest.raises(RuntimeError, match=message):
        export(Affine(size), tmp_path / "a.pt2", ONES, **options)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


class Branching(Affine):
    """The branch depends on the numbers, which no graph has."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


def test_a_model_that_cannot_be_exported_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be exported to \.pt2") as info:
        export(Branching(), tmp_path / "a.pt2", ONES)
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("a.pth", {}, "a.pth ends in '.pth'"),
        ("a", {}, "a ends in ''"),
        ("none/a.onnx", {}, "none for a.onnx"),
        ("a.pt2", {"precision": "int4"}, "precision is 'int4'"),
        ("a.onnx", {"precision": "bfloat16"}, "bfloat16"),
        ("a.pt2", {"rounds": 1}, "rounds is 1"),
        ("a.pt2", {"tolerance": 0}, "tolerance is 0"),
        ("a.pt2", {"images": ONES[0]}, "images are [1, 4, 4]"),
        ("a.pt2", {"images": ONES[:0]}, "images are [0, 1, 4, 4]"),
        ("a.pt2", {"images": "cat.png"}, "images are []"),
        ("a.pt2", {"images": ONES.byte()}, "images are torch.uint8"),
        ("a.pt2", {"images": ONES[..., :3]}, "images of [5, 1, 4, 3]"),
        ("a.onnx", {"model": Affine().double()}, "weights of torch.float64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    path: str, kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments = {"model": Affine(), "images": ONES} | kwargs
    with pytest.raises(ValueError, match=re.escape(message)):
        export(path=tmp_path / path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "path", "precision"),
    [
        ("onnx", "a.onnx", "float32"),
        ("onnxscript", "a.onnx", "float32"),
        ("onnxruntime", "a.onnx", "int8"),
        ("torchao.quantization", "a.pt2", "int8"),
    ],
)
def test_a_missing_package_is_an_error_before_any_work(
    module: str, path: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=module.partition(".")[0]):
        export(nn.Identity(), tmp_path / path, ONES, precision=precision)


def test_a_model_too_large_for_one_onnx_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats_module, "_ONNX_BYTES", 4 * (2 * 16 + 2))
    with pytest.raises(ValueError, match="GiB of weights"):
        export(Affine(), tmp_path / "a.onnx", ONES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pth", "a.pth ends in '.pth'"),
        ("none.onnx", "there is no file"),
        ("damaged.onnx", "damaged.onnx cannot be read"),
        ("damaged.pt2", "damaged.pt2 cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch warns of missing files first
def test_a_file_that_cannot_be_read_is_refused(name: str, message: str, tmp_path: Path) -> None:
    for suffix in (".onnx", ".pt2"):
        (tmp_path / f"damaged{suffix}").write_bytes(b"no model")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_exported(tmp_path / name)


# --- other precisions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("int8") / "vit.onnx"
    model, images = small_vit(depth=1, num_tokens=2), torch.randn(4, 1, 28, 28)
    return export(model, path, images, precision="int8", rounds=2)


@slow
def test_int8_in_onnx_rounds_products_with_weights_and_nothing_else(int8: Exported) -> None:
    import onnx

    count = [node.op_type for node in onnx.load(int8.path).graph.node].count
    block, learner, attention = 4, 2, 2
    assert count("MatMulInteger") == block + learner + 1  # and the head
    assert count("MatMul") >= attention
    assert count("Conv") == 1


@slow
def test_int8_in_onnx_is_near_the_model_at_any_batch_and_leaves_one_file(int8: Exported) -> None:
    assert 1e-4 < int8.largest_difference < 0.2 * int8.checks[0].largest_output
    assert load_exported(int8.path)(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert [path.name for path in int8.path.parent.iterdir()] == ["vit.onnx"]


@slow
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_program_of_lower_precision_is_near_the_model_and_not_equal_to_it(
    precision: str, tmp_path: Path
) -> None:
    images = torch.randn(4, 1, 28, 28)
    path = tmp_path / "vit.pt2"
    made = export(small_vit(num_tokens=2), path, images, precision=precision, rounds=2)
    assert made.precision == precision
    assert 1e-4 < made.largest_difference < 0.2 * made.checks[0].largest_output
    out = load_exported(path)(images[:3])
    assert (out.shape, out.dtype) == ((3, 10), torch.float32)


class Int8Product(nn.Module):
    """Multiplies images by themselves, rounded to int8."""

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1).to(torch.int8)
        return torch._int_mm(rows, rows.T).float()


def test_a_program_that_multiplies_int8_is_refused_where_products_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "product.pt2"
    write_program(Int8Product(), torch.ones(32, 1, 8, 8), path)
    for exact in (True, False):
        monkeypatch.setattr(formats_module, "int8_products_are_exact", lambda _, it=exact: it)
        if exact:
            load_exported(path)
        else:
            with pytest.raises(ValueError, match=r"overflow on this processor.*to \.onnx\)$"):
                load_exported(path)


# --- the command --------------------------------------------------------------------------------


def printed(**options: Any) -> str:
    """Returns what the command prints on a terminal of 80 columns."""
    from rich.console import Console

    out = io.StringIO()
    config = ExportConfig(**{"rounds": 2, "device": "cpu"} | options)
    Console(file=out, width=80).print(*export_table(config), sep="\n")
    return out.getvalue()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = small_vit(depth=1, num_tokens=2)
    return str(save_model(model, tmp_path_factory.mktemp("saved") / "model.safetensors"))


def few(*name: str, **kwargs: Any) -> Any:
    return load_data(*name, **kwargs).sample(64)


@pytest.fixture(scope="module")
def output(saved: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file that the command wrote, and what it printed."""
    path = tmp_path_factory.mktemp("output") / "a.pt2"
    options: dict[str, Any] = {"batch_size": 3, "img_size": 35, "data": "fashion-mnist-small"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(export_table.__globals__, "load_data", few)
        return path, printed(model=saved, out=str(path), **options)


def test_the_command_evaluates_model_and_file_on_data(saved: str, output: tuple[Path, str]) -> None:
    model = load_model(saved)
    model.set_input_size((35, 35))
    top1 = evaluate(model, few("fashion-mnist-small", "test", img_size=35)).top1_percent
    rows = {line.split()[0]: line.split() for line in output[1].splitlines() if line.strip()}
    assert rows["model"][1] == rows["file"][1] == f"{top1:.2f}"
    assert max(float(rows[batch][1]) for batch in ("3", "1")) < 1e-4
    text = " ".join(output[1].split())
    assert "Top-1 of the 64 held-out images of fashion-mnist-small." in text
    size = f"{output[0].stat().st_size / 2**20:.1f} MiB"
    ends = "takes images (batch x 1 x 35 x 35), gives logits (batch x 10)"
    assert f"a.pt2: float32, {size}, {ends}" in text
    assert "nothing was compared" not in text


def test_the_command_says_where_a_zero_head_leaves_nothing_to_compare(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ms = tmp_path / "a.pt2", Timing(1, 1, 1)

    def exported(model: nn.Module, path: Path, images: Tensor, **_: Any) -> Exported:
        assert images.shape == (8, 1, 28, 28)
        return Exported(path, "float32", 1, {}, {}, (BatchCheck(8, 0, 0, ms, ms, ms),))

    monkeypatch.setitem(export_table.__globals__, "export", exported)
    assert "All outputs are 0" in printed(model=saved, out=str(path))


@slow
def test_clips_are_exported_on_noise(tmp_path: Path) -> None:
    out = printed(model="vivit_mini_patch8x2_32", out=str(tmp_path / "a.pt2"), batch_size=2)
    assert "noise, 3 x 8 x 32 x 32" in " ".join(out.split())


@pytest.mark.parametrize(
    ("out", "form", "name"),
    [("a.pt2", "auto", "a.pt2"), ("a.pt2", "pt2", "a.pt2"), ("v1.0", "onnx", "v1.0.onnx")],
)
def test_a_format_gives_the_file_its_ending(out: str, form: str, name: str, tmp_path: Path) -> None:
    assert ExportConfig("m", str(tmp_path / out), format=form).path == tmp_path / name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format is 'tflite'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"img_size": -1}, "img_size is -1"),
        ({"rounds": 1}, "rounds is 1"),
        ({"out": "a.bin"}, "a.bin ends in '.bin'"),
        ({"precision": "int2"}, "precision is 'int2'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ExportConfig(**{"model": MINI, "out": "a.pt2"} | options)


def test_data_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = create_model(MINI, **SMALL, img_size=(28, 35))
    oblong = str(save_model(model, tmp_path / "model.safetensors"))
    out, data = str(tmp_path / "a.pt2"), "fashion-mnist-small"
    for name, shape in (("vivit_mini_patch8x2_32", "3 x 8 x 32 x 32"), (oblong, "1 x 28 x 35")):
        with pytest.raises(ValueError, match=f"takes {shape}"):
            export_table(ExportConfig(name, out, data=data))
