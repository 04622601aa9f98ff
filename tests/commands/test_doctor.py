"""`tokenlearner doctor` says what is there, and what is wrong."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from tokenlearner.commands import doctor
from tokenlearner.commands.doctor import diagnose, report
from tokenlearner.commands.main import main


def test_here_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(doctor, "_NVIDIA", Path("not there"))
    main(["doctor"])
    out = capsys.readouterr().out
    assert out.endswith("nothing is wrong\n")
    assert version("tokenlearner") in out
    assert torch.__version__ in out
    found = diagnose()
    assert not any(found.extras.values())
    assert {*found.extras} == {*doctor._EXTRAS}


def test_what_is_missing_or_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str) -> str:
        if name == "av":
            raise PackageNotFoundError
        return {"timm": "0.9.2", "onnx": "1.0"}.get(name) or version(name)

    monkeypatch.setattr(doctor, "version", fake)
    found = diagnose()
    assert any("timm is 0.9.2, expected >=" in problem for problem in found.problems)
    assert found.extras["video"] == ["av is missing"]
    assert found.extras["export"] == ["onnx is 1.0, expected >=1.19"]
    assert found.extras["demo"] == found.extras["train"] == []


def test_a_package_that_is_broken_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return import_module(name)

    monkeypatch.setattr(doctor, "import_module", broken)
    [problem] = [p for p in diagnose().problems if "torchvision" in p]
    reason = "operator torchvision::nms does not exist"
    assert problem == f"torchvision cannot be imported ({reason}); install it again"


def test_more_threads_than_processors_and_a_gpu_that_torch_does_not_see(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "usable_processors", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_NVIDIA", tmp_path)
    found = diagnose()
    assert any("set OMP_NUM_THREADS=1" in problem for problem in found.problems)
    assert any("nvidia-smi" in problem for problem in found.problems)
    assert report(found)[-1].startswith("wrong: ")


def test_it_needs_no_extra_and_fails_where_something_is_wrong() -> None:
    program = (
        "import sys; sys.modules['jsonargparse'] = sys.modules['timm'] = None\n"
        "from tokenlearner.commands.main import main; main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "wrong: timm cannot be imported" in done.stdout
