"""Where there is no GPU, the installation takes PyTorch without CUDA, if it can be had."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cpu_torch import pip_option


def test_the_index_is_named_on_linux_without_a_gpu_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO()

    monkeypatch.setattr("cpu_torch.urlopen", answer)
    none, index = tmp_path / "no GPU", "https://some.index/cpu"
    assert pip_option(index, none, "linux") == f"--extra-index-url {index}"
    assert pip_option(index, tmp_path, "linux") == ""
    assert pip_option(index, none, "darwin") == ""
    assert asked == [f"{index}/torch/"]


def test_an_index_that_does_not_answer_is_no_error(tmp_path: Path) -> None:
    assert pip_option("http://127.0.0.1:9", tmp_path / "no GPU", "linux") == ""
    assert pip_option("no address", tmp_path / "no GPU", "linux") == ""
