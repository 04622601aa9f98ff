"""Workers read for a training what the process itself reads, however they are started."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    BEIT,
    DISTILLED,
    INSERTED,
    SGD,
    each_start_method,
    quarter_images,
    recipe,
    save_host,
)
from torch import nn

from tokenlearner import train

SMALL: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0.0, "images": 32, "hflip": 0.5}
RUNS: dict[str, dict[str, Any]] = {"plain": SGD, "distilled": DISTILLED, "beit": INSERTED}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_spawned_and_forked_workers_train_to_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("tokenlearner.training.run"), "load_data", quarter_images)
    host = {"distilled": {"model": save_host(tmp_path / "vit")}}
    host |= {"beit": {"model": save_host(tmp_path / "beit", BEIT)}}

    def weights(out: str, workers: int) -> dict[str, torch.Tensor]:
        options = {**RUNS[name], **host.get(name, {}), **SMALL, "workers": workers}
        model: nn.Module = train(recipe(tmp_path / out, **options)).model
        return model.state_dict()

    expected = weights("none", 0)
    for method in each_start_method():
        for key, value in weights(method, 1).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=key)
