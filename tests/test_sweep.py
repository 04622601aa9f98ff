"""Every public call on every kind of host: right, or a `ValueError` of ours.

A cell is a call, a dtype, a kind of host and a way of inserting. Right means finite, within the
rounding of the dtype of what float64 gives for the same weights, and the model left as it was.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from files import make_image
from tiny import HF, TIMM, drawn
from torch import Tensor, nn

import tokenlearner as tl
from tokenlearner.commands.main import COMMANDS, main
from tokenlearner.data import ImageDataset
from tokenlearner.deploy import quantize
from tokenlearner.evaluation import count_macs
from tokenlearner.training import Distillation, forward_with_features

CLASSES, SOURCE = 5, str(Path(tl.__file__).parent)
OURS: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": CLASSES}
VIT = partial(tl.create_model, "vit_tiny_patch16_224", **TIMM)
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "timm": VIT,
    "timm_positions": partial(VIT, class_token=False, global_pool="avg"),
    "timm_registers": partial(VIT, reg_tokens=2),
    "torchvision": lambda: torchvision.models.VisionTransformer(
        16, 4, 3, 2, 16, 32, num_classes=CLASSES
    ),
    "transformers": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**HF, num_labels=CLASSES)
    ),
    "transformers_bare": lambda: transformers.ViTModel(transformers.ViTConfig(**HF)),
    "ours": partial(tl.create_model, "vit_mini_patch4_28", in_chans=3, img_size=16, **OURS),
    "video": partial(tl.create_model, "vivit_mini_patch8x2_32", img_size=16, patch_size=4, **OURS),
}
WAYS: dict[str, dict[str, Any]] = {
    "reduced": {"num_tokens": 4, "at": 1},
    "fused": {"num_tokens": 4, "at": 1, "fuse": True},
    "two": {"num_tokens": (4, 2), "at": (1, 2)},
}
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


def _plan(case: Case) -> Any:
    options = tl.plan(tl.remove(case.model), case.x, 0.99, num_tokens=[2], rounds=2)
    return [(o.at, o.num_tokens, o.macs_share) for o in options if o.at is not None]


def _export(suffix: str, case: Case) -> Any:
    x = case.x.float()
    file = tl.export(case.model, case.folder / f"model{suffix}", x, tolerance=0.1, rounds=2)
    return [check.largest_output for check in file.checks]


def _calibrate(case: Case) -> float:
    return tl.calibrate(case.model, case.x, steps=2).error_before


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
    "use_onednn": lambda c: tl.use_onednn(c.model)(c.x),
    "count_macs": lambda c: count_macs(c.model, c.x),
    "forward_with_features": lambda c: vars(forward_with_features(c.model, c.x)),
    "Distillation": _train,
    "export": partial(_export, ".pt2"),
    "quantize": lambda c: quantize(c.model, "float32")(c.x.float()),
}
COMMAND_CALLS: dict[str, Callable[[str, str], list[str]]] = {
    "eval": lambda file, out: ["--checkpoint", file, "--data", "folder", "--root", f"{out}/data"],
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
        ("list_models", "load_data", "TrainConfig", "demo", "models", "app", "report"),
        "take no model",
    ),
    **dict.fromkeys(("push_to_hub",), "asks the network; it writes what save_model writes"),
    **dict.fromkeys(("load_model",), "is called behind save_model"),
    **dict.fromkeys(("train", "maps", "convert"), "have other inputs; tests/commands"),
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


CHANGING = {"remove", "plan", "calibrate", "use_onednn", "Distillation"}


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


def _check(call: str, host: str, way: str, dtype: torch.dtype, folder: Path) -> str:
    """Returns why a cell is not right, or an empty text."""
    try:
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
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def _sweep(cells: Any, folder: Path) -> None:
    failed, count = [], 0
    for count, cell in enumerate(cells, 1):  # noqa: B007
        if reason := _check(*cell, folder):
            failed.append(f"{' x '.join(map(str, cell))}: {reason}")
    print(f"{count} cells")
    assert not failed, f"{len(failed)} of {count} cells:\n" + "\n".join(failed)


def test_a_diagonal_of_all_cells_is_right(tmp_path: Path) -> None:
    hosts, ways, dtypes = list(HOSTS), list(WAYS), list(DTYPES)
    diagonal = [
        (c, hosts[i % 8], ways[i % 3], dtypes[i // 3 % 3])
        for i, c in enumerate(CALLS)
        if c != "export"
    ]
    _sweep(diagonal, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_every_cell_of_a_call_is_right(call: str, tmp_path: Path) -> None:
    dtypes = [torch.float32] if call in ("export", "plan") else DTYPES  # seconds a cell
    _sweep(product([call], HOSTS, WAYS, dtypes), tmp_path)


def test_every_public_name_and_command_is_swept_or_has_a_reason() -> None:
    assert not {*tl.__all__, *COMMANDS} - {*CALLS, *COMMAND_CALLS, *NOT_SWEPT}


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "device meta": lambda: torch.device("meta"),
    "device cpu": lambda: torch.device("cpu"),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
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
    failed, calls = [], [call for call in CALLS if call != "export"]
    cells = list(product(calls, ["timm", "transformers"], WAYS))
    for call, host, way in cells:
        if call == "Distillation" and context in ("no_grad", "inference_mode"):
            continue  # it is differentiated
        case = _case(host, way, torch.float32, tmp_path)
        expected = _run(call, copy.deepcopy(case))
        try:
            with CONTEXTS[context]():
                found = _run(call, case)
            if isinstance(expected, str) or isinstance(found, str):
                right = found == expected
            else:
                right = _difference(found, expected) < 1e-4
            reason = "" if right else f"{found} is not {expected}"
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
        if reason:
            failed.append(f"{call} x {host} x {way}: {reason[:300]}")
    print(f"{len(cells)} cells")
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMAND_CALLS)
def test_commands_run_on_every_saved_model(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = []
    for split, name in product(("train", "val"), "abcde"):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        make_image(tmp_path / "data" / split / name / "0.png", (24, 20))
    cells = list(product(HOSTS, WAYS, DTYPES))
    for host, way, dtype in cells:
        case = _case(host, way, dtype, tmp_path)
        if command == "plan":
            tl.remove(case.model)
        try:
            file = case.saved()
        except ValueError as error:
            _ours(error)
            continue
        reason = ""
        try:
            main([command, *COMMAND_CALLS[command](file, str(tmp_path))])
            if "nan" in capsys.readouterr().out:
                reason = "nan"
        except SystemExit as end:
            try:
                _ours(end.__context__ or end)
            except AssertionError as error:
                reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            failed.append(f"{command} x {host} x {way} x {dtype}: {reason[:300]}")
    print(f"{len(cells)} cells")
    assert not failed, "\n".join(failed)
