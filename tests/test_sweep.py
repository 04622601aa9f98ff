"""Every public call on every kind of host: right, or a `ValueError` of ours.

A cell is a call, a dtype, a kind of host and a way of inserting. Right means finite, within the
rounding of the dtype of what float64 gives for the same weights, and the model left as it was.
"""

from __future__ import annotations

import copy
import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from files import make_image, make_image_folder, make_video
from tiny import HF, TIMM, drawn, torchvision_vit, transformers_vit
from torch import Tensor, nn

import tokenlearner as tl
from tokenlearner.checkpoints.convert import ConvertConfig, convert_checkpoint
from tokenlearner.commands.app.inference import predict as predict_for_page
from tokenlearner.commands.app.models import load_offered
from tokenlearner.commands.main import COMMANDS, main
from tokenlearner.commands.maps import MapsConfig, run_maps
from tokenlearner.data import ImageDataset
from tokenlearner.deploy import load_exported, quantize
from tokenlearner.evaluation import count_macs
from tokenlearner.training import Distillation, forward_with_features

CLASSES, SOURCE = 5, str(Path(tl.__file__).parent)
OURS: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": CLASSES}
VIT = partial(tl.create_model, "vit_tiny_patch16_224", **TIMM)
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "timm": VIT,
    "timm_positions": partial(VIT, class_token=False, global_pool="avg"),
    "timm_registers": partial(VIT, reg_tokens=2),
    "torchvision": torchvision_vit,
    "transformers": transformers_vit,
    "transformers_bare": lambda: transformers.ViTModel(transformers.ViTConfig(**HF)),
    "ours": partial(tl.create_model, "vit_mini_patch4_28", in_chans=3, img_size=16, **OURS),
    "video": partial(tl.create_model, "vivit_mini_patch8x2_32", img_size=16, patch_size=4, **OURS),
}
WAYS: dict[str, dict[str, Any]] = {
    "reduced": {"num_tokens": 4, "at": 1},
    "fused": {"num_tokens": 4, "at": 1, "fuse": True},
    "two": {"num_tokens": (4, 2), "at": (1, 2)},
    "overlap": {"num_tokens": 4, "at": 2, "overlap": 2, "elastic": True, "active_tokens": 3},
}
PLACES = list(zip(HOSTS, cycle(WAYS), strict=False))  # each host, and each way with some
DTYPES = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}


@dataclass
class Case:
    """A host with tokens, its input, and a folder to write to."""

    model: Any
    x: Tensor
    folder: Path

    @property
    def data(self) -> ImageDataset:
        shape, n = self.x.shape[1:], 4
        images = (torch.arange(n * shape.numel(), device="cpu") % 251).reshape(n, *shape).byte()
        labels = torch.arange(n, device="cpu") % CLASSES
        names = tuple("abcde")
        return ImageDataset("sweep", "test", images, labels, names, (0.5,) * 3, (0.5,) * 3)

    def saved(self) -> str:
        return str(tl.save_model(self.model, self.folder / "model.safetensors"))

    @property
    def file(self) -> Path:
        """An image, or for a model of clips a video."""
        if self.x.ndim == 4:
            return make_image(self.folder / "x.png")
        return make_video(self.folder / "x.mp4")


def _plan(case: Case) -> Any:
    options = tl.plan(tl.remove(case.model), case.x, 0.99, num_tokens=[2], rounds=2)
    return [(o.at, o.num_tokens, o.macs_share) for o in options if o.at is not None]


def _export(suffix: str, case: Case) -> Any:
    """What the file computes, and in float64 what the model does."""
    if case.x.dtype == torch.float64:
        result = case.model(case.x)
        return getattr(result, "logits", getattr(result, "pooler_output", result))
    x, path = case.x.float(), case.folder / f"model{suffix}"
    tl.export(case.model, path, x, tolerance=0.1, rounds=2)
    return load_exported(path)(x)


def _calibrate(case: Case) -> float:
    """The loss of the first step; errors of the output make much of rounding where it is small."""
    rows = list[Any]()
    tl.calibrate(case.model, case.x, steps=2, held_out=0, report=rows.append)
    return rows[0]["loss"]


def _maps(case: Case) -> Any:
    out = case.folder / "maps"
    config = MapsConfig("a model", str(case.file), str(out), animation="none")
    run_maps(config, (case.model, case.x.shape[1:]))
    stats = json.loads((out / "maps.json").read_text())["stats"]
    return [(b["overlap"], b["entropy_bits"]) for kind in stats.values() for b in kind.values()]


def _app(case: Case) -> Any:
    """The prediction and the maps that the page shows."""
    file = case.file
    [offered] = load_offered([case.saved()], "cpu").values()
    shown = predict_for_page(offered, offered.pipeline.read(file, "x"))
    return shown.shares, shown.maps


def _adapter(case: Case) -> Any:
    """What a copy of the host computes with the tokens that were written alone."""
    file = tl.save_model(case.model, case.folder / "a.safetensors", only="learned")
    return tl.load_adapter(tl.remove(copy.deepcopy(case.model)), file)(case.x)


def _convert(case: Case) -> Any:
    """There and back."""
    there, back = case.folder / "checkpoint_7", case.folder / "back.safetensors"
    convert_checkpoint(ConvertConfig(case.saved(), str(there)))
    frames = getattr(case.model, "num_frames", 1)
    convert_checkpoint(ConvertConfig(str(there), str(back), at=1, num_frames=frames))
    return tl.load_model(back).to(case.x.dtype)(case.x)  # checkpoints of scenic have float32


def _train(case: Case) -> None:
    """Distills by one step of ours, as `train` does with `--insert`."""
    teacher = tl.remove(copy.deepcopy(case.model))
    output, loss = Distillation(teacher)(case.model, case.x)
    loss.backward()
    return output, loss


CALLS: dict[str, Callable[[Case], Any]] = {
    "insert": lambda c: c.model(c.x),
    "remove": lambda c: tl.remove(c.model)(c.x),
    "attention_maps": lambda c: tl.attention_maps(c.model, c.x),
    "benchmark": lambda c: tl.benchmark({"a": c.model}, c.x, rounds=2)["a"].gmacs,
    "calibrate": _calibrate,
    "plan": _plan,
    "evaluate": lambda c: tl.evaluate(c.model, c.data).loss,
    "save_model": lambda c: tl.load_model(c.saved())(c.x),
    "load_adapter": _adapter,
    "use_onednn": lambda c: tl.use_onednn(c.model)(c.x),
    "count_macs": lambda c: count_macs(c.model, c.x),
    "forward_with_features": lambda c: vars(forward_with_features(c.model, c.x)),
    "Distillation": _train,
    "export": partial(_export, ".pt2"),
    "set_num_tokens": lambda c: tl.set_num_tokens(c.model, 1)(c.x),
    "quantize": lambda c: quantize(c.model, "float32")(c.x.float()),
    "maps": _maps,
    "app": _app,
    "convert": _convert,
    "export .onnx": partial(_export, ".onnx"),
}
SECONDS = ("export", "export .onnx", "plan", "maps")  # a cell takes
SLOW = (*SECONDS, "app", "convert", "benchmark", "count_macs")
TRAIN = "--data=folder --epochs=1 --batch_size=4 --workers=0 --device=cpu"
COMMAND_CALLS: dict[str, Callable[[str, str], list[str]]] = {
    "train": lambda file, out: [
        "--model",
        file,
        "--root",
        f"{out}/data",
        "--out",
        f"{out}/run",
        *TRAIN.split(),
    ],
    "report": lambda file, out: [f"{out}/run", "--device", "cpu"],
    "maps": lambda file, out: [file, f"{out}/data/val/a", f"{out}/maps", "--animation", "none"],
    "convert": lambda file, out: [file, f"{out}/checkpoint_7"],
    "eval": lambda file, out: ["--checkpoint", file, "--data", "folder", "--root", f"{out}/data"],
    "predict": lambda file, out: [file, f"{out}/data"],
    "plan": lambda file, out: f"--model {file} --budget 0.99 --tokens 2 --rounds 2".split(),
    "bench": lambda file, out: ["--models", file, "--rounds", "2", "--batch_size", "2"],
    "export": lambda file, out: ["--model", file, "--out", f"{out}/x.pt2", "--rounds", "2"],
}
NOT_SWEPT = {
    **dict.fromkeys(("create_model", "insert"), "build every host of the sweep"),
    **dict.fromkeys(
        ("TokenFuser", "TokenLearner", "TokenLearnerModuleV11", "TokenLearnerV11"),
        "are parts of every host; tests/layers has their dtypes",
    ),
    **dict.fromkeys(
        ("list_models", "load_data", "TrainConfig", "demo", "doctor", "models"),
        "take no model",
    ),
    **dict.fromkeys(("push_to_hub",), "asks the network; it writes what save_model writes"),
    **dict.fromkeys(("load_model",), "is called behind save_model"),
    **dict.fromkeys(
        ("connect", "disconnect", "fit_connector", "load_connected", "TokenConnector"),
        "are for vision-language models; tests/models/test_connection.py has all families",
    ),
    **dict.fromkeys(("compile_model",), "takes seconds; tests/models compile every host"),
    **dict.fromkeys(("encode",), "takes videos; tests/evaluation/test_encoding.py has other hosts"),
    **dict.fromkeys(
        ("reduce",), "fits for a while; tests/training/test_reduction.py has other hosts"
    ),
}


def _case(host: str, way: str, dtype: torch.dtype, folder: Path) -> Case:
    torch.manual_seed(0)
    model: Any = tl.insert(HOSTS[host]().eval(), **WAYS[way])
    x = torch.randn(8, 3, *([model.num_frames] if host == "video" else []), 16, 16)
    return Case(drawn(model, 0.15).to(dtype), x.to(dtype), folder)


def _state(model: nn.Module) -> Any:
    """What a call leaves as it was: modes, hooks, dtypes, flags, values, and torch's globals."""
    modules = [
        (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    tensors = [
        (n, t.dtype, t.requires_grad, t.double().sum().item(), t.grad is None)
        for n, t in (*model.named_parameters(), *model.named_buffers())
    ]
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
    return modules, tensors, flags


CHANGING = {"remove", "set_num_tokens", "plan", "calibrate", "use_onednn", "Distillation"}


def _ours(error: BaseException) -> str:
    """The message of an error that our code raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1].filename
    if not (isinstance(error, ValueError) and frame.startswith(SOURCE)):
        raise AssertionError(f"not ours: {frame}: {error}")
    return str(error)


def _run(call: str, case: Case) -> Any:
    """The result as a list of float64 tensors, or the message of an error of ours."""
    before = _state(case.model)
    try:
        result = CALLS[call](case)
    except ValueError as error:
        return _ours(error)
    assert call in CHANGING or _state(case.model) == before, "the model was changed"
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    flat = torch.utils._pytree.tree_leaves(result)
    numbers = [
        torch.as_tensor(v, dtype=torch.float64, device="cpu").detach()
        for v in flat
        if v is not None
    ]
    assert all(v.isfinite().all() for v in numbers), "not finite"
    return numbers


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    assert [v.shape for v in found] == [v.shape for v in expected]
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=0.1)).item() for a, b in pairs)


def _check(folder: Path, call: str, host: str, way: str, dtype: torch.dtype) -> str:
    """Returns why a cell is not right, or an empty text."""
    case = _case(host, way, dtype, folder)
    exact = Case(copy.deepcopy(case.model).double(), case.x.double(), folder)
    found = _run(call, case)
    if isinstance(found, str):
        return ""
    expected = _run(call, exact)
    if isinstance(expected, str):
        return f"float64 says {expected}"
    off = _difference(found, expected)
    return "" if off <= DTYPES[dtype] else f"off by {off:.2g}"


def _sweep(check: Callable[..., str], cells: Iterable[tuple[Any, ...]]) -> None:
    """Fails with the reasons of all cells that are not right, or raise what is not ours."""
    failed, count = [], 0
    for count, cell in enumerate(cells, 1):  # noqa: B007
        try:
            reason = check(*cell)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            failed.append(f"{' x '.join(map(str, cell))}: {reason[:300]}")
    print(f"{count} cells")
    assert not failed, f"{len(failed)} of {count} cells:\n" + "\n".join(failed)


def test_a_diagonal_of_all_cells_is_right(tmp_path: Path) -> None:
    calls, dtypes = [call for call in CALLS if call not in SECONDS], cycle(DTYPES)
    diagonal = [(call, *PLACES[i % 8], next(dtypes)) for i, call in enumerate(calls)]
    _sweep(partial(_check, tmp_path), diagonal)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_every_cell_of_a_call_is_right(call: str, tmp_path: Path) -> None:
    dtypes = [torch.float32] if call in SECONDS else DTYPES
    places = PLACES if call in SLOW else product(HOSTS, WAYS)
    cells = ((call, *place, dtype) for place, dtype in product(places, dtypes))
    _sweep(partial(_check, tmp_path), cells)


def test_every_public_name_and_command_is_swept_or_has_a_reason() -> None:
    assert not {*tl.__all__, *COMMANDS} - {*CALLS, *COMMAND_CALLS, *NOT_SWEPT}


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "device meta": lambda: torch.device("meta"),
    "float64": lambda: _default_dtype(torch.float64),
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_set_around_a_call_changes_nothing(context: str, tmp_path: Path) -> None:
    is_off = context in ("no_grad", "inference_mode")
    calls = (
        set(CALLS) - ({*SLOW} - {"plan", "benchmark"}) - ({"Distillation"} if is_off else set())
    )  # a loss to minimize

    def check(call: str, host: str, way: str) -> str:
        case = _case(host, way, torch.float32, tmp_path)
        expected = _run(call, copy.deepcopy(case))
        with CONTEXTS[context]():
            found = _run(call, case)
        if isinstance(expected, str) or isinstance(found, str):
            right = found == expected
        else:
            right = _difference(found, expected) < 1e-4
        return "" if right else f"{found} is not {expected}"

    places = [*(("timm", way) for way in WAYS), ("transformers", "reduced")]
    _sweep(check, [(call, *place) for call in sorted(calls) for place in places])


BEFORE = {"report": ["train"]}  # it reads what that command wrote
NUMBERS = {"eval": r"loss: (.*)", "predict": r",([\d.]+)\n", "report": r'_loss": ([^,}]+)'}


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMAND_CALLS if c != "train"])
def test_commands_run_on_every_saved_model(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they print is that of float32, within the rounding of the dtype."""
    make_image_folder(tmp_path / "data", "abcde")
    of_float32: list[float] = []

    def check(host: str, way: str, dtype: torch.dtype) -> str:
        nonlocal of_float32
        folder = tmp_path / f"{host} {dtype}"
        folder.mkdir()
        (folder / "data").symlink_to(tmp_path / "data")
        case = _case(host, way, dtype, folder)
        if command == "plan":
            tl.remove(case.model)
        capsys.readouterr()
        try:
            file = case.saved()
            for each in (*BEFORE.get(command, ()), command):
                main([each, *COMMAND_CALLS[each](file, str(folder))])
        except ValueError as error:
            _ours(error)
            return ""
        except SystemExit as end:
            _ours(end.__context__ or end)
            return ""
        text = capsys.readouterr().out
        text += "".join(p.read_text() for p in folder.glob("run/metrics.jsonl"))
        found = [*map(float, re.findall(NUMBERS.get(command, "(?!)"), text))]
        of_float32 = found if dtype == torch.float32 else of_float32
        right = found == pytest.approx(of_float32, rel=DTYPES[dtype]) and "nan" not in text.lower()
        return "" if right else f"{found} is not {of_float32}, or not finite"

    places = PLACES[::6] if command == "report" else PLACES  # it trains
    _sweep(check, [(*place, dtype) for place in places for dtype in DTYPES])
