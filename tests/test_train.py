"""`train`: a run that can be trusted, and mistakes that are found before it starts."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenlearner import TrainConfig, load_model, train
from tokenlearner.data import ImageDataset
from tokenlearner.train import pick_device

CLASSES = ("dark", "left", "right", "bright")


def quarter_pictures(name: str, split: str = "train", **_: Any) -> ImageDataset:
    """Pictures whose bright half is their class: a few steps tell them apart."""
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    labels = torch.arange(64) % 4
    images = torch.randint(0, 60, (64, 1, 28, 28), generator=generator)
    images[labels % 2 == 1, :, :, :14] += 150
    images[labels >= 2, :, :, 14:] += 150
    return ImageDataset(name, split, images.byte(), labels, CLASSES, (0.3,), (0.3,))


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("tokenlearner.train"), "load_data", quarter_pictures)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(out=str(tmp_path / "run"), epochs=3, batch_size=16, num_tokens=2, lr=3e-3)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**vars(config), **changes})


def metrics(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_what_the_pictures_show(config: TrainConfig) -> None:
    history = train(config).history
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert history[-1]["test_top1_percent"] > 80


def test_the_checkpoint_is_the_trained_model(config: TrainConfig) -> None:
    result = train(config)
    images, _ = next(quarter_pictures("x", "test").batches(8))
    torch.testing.assert_close(load_model(config.out)(images), result.model(images), rtol=0, atol=0)
    assert not result.model.training


def test_metrics_and_config_are_written_as_returned(config: TrainConfig) -> None:
    result = train(config)
    assert metrics(config.out) == result.history
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert json.loads((Path(config.out) / "train.json").read_text()) == vars(config)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(config: TrainConfig) -> None:
    def weights(**changes: Any) -> torch.Tensor:
        model = train(changed(config, epochs=2, **changes)).model
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    out = Path(config.out)
    first = weights()
    torch.testing.assert_close(weights(out=str(out / "again")), first, rtol=0, atol=0)
    assert not torch.equal(weights(out=str(out / "other"), seed=1), first)


def test_the_learning_rate_rises_and_falls(config: TrainConfig) -> None:
    rows: list[dict[str, Any]] = []
    train(config, rows.append)
    lrs = [row["lr"] for row in rows if "epoch" not in row]
    assert lrs[3] == max(lrs) == config.lr  # 4 steps an epoch, 1 epoch of warm-up
    assert lrs[:4] == sorted(lrs[:4])
    assert lrs[3:] == sorted(lrs[3:], reverse=True)
    assert lrs[-1] < 0.01 * config.lr


def test_every_step_and_every_epoch_are_reported(config: TrainConfig) -> None:
    rows: list[dict[str, Any]] = []
    train(config, rows.append)
    assert [row["step"] for row in rows if "epoch" not in row] == list(range(1, 13))
    assert {row["steps"] for row in rows if "epoch" not in row} == {12}


def test_gradients_are_clipped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(changed(config, clip_grad=0.01))
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(row: dict[str, Any]) -> None:
        if "epoch" in row:
            monkeypatch.setattr(
                "torch.nn.functional.cross_entropy", lambda *a, **k: torch.tensor(torch.nan)
            )

    with pytest.raises(RuntimeError, match=r"the loss is nan at step 5 of 12; the last checkpoint"):
        train(config, poison)
    assert load_model(config.out) is not None


def test_a_finished_run_is_not_overwritten(config: TrainConfig) -> None:
    train(config)
    before = (Path(config.out) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; pass another out"):
        train(changed(config, seed=7))
    assert (Path(config.out) / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected an integer of 1 or more"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"num_tokens": -1}, "num_tokens is -1, expected an integer of 0 or more"),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip_grad": float("inf")}, "clip_grad is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a number from 0 on"),
        ({"smoothing": 1.0}, "smoothing is 1.0, expected a share"),
        ({"warmup_epochs": 3.0}, "warmup_epochs is 3.0, expected fewer than 3 epochs"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_nonsense_is_refused_when_the_config_is_built(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        changed(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 65}, "batch_size is 65, but fashion-mnist-small has 64"),
        ({"model": "vit_mini_patch4_29"}, "there is no model 'vit_mini_patch4_29'; did you mean"),
        ({"model": "vit_tiny_patch16_224"}, r"does not take pictures of \[1, 28, 28\]"),
        ({"num_tokens": 50}, "num_tokens is 50, but a picture has 49"),
        ({"at": 6}, "at is 6, expected a block from 0 to 5"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not to be had here"),
        ({"device": "abacus"}, "device 'abacus' is not to be had here"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(changed(config, **changes))
    assert not Path(config.out).exists()


def test_auto_picks_a_gpu_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
