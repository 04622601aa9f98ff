"""`train`: a run that can be trusted, and mistakes that are found before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TINY, quarter_images

from tokenlearner import TrainConfig, calibrate, create_model, load_model, save_model, train
from tokenlearner.data.factory import ImageDataset
from tokenlearner.models.insertion import wrapped_blocks
from tokenlearner.training.calibration import Calibration
from tokenlearner.training.setup import prepare
from tokenlearner.utils.modules import pick_device


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("tokenlearner.training.run"), "load_data", quarter_images)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        model_kwargs=TINY,
        num_tokens=2,
        epochs=3,
        batch_size=16,
        lr=1e-2,
        log_interval=1,
    )


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**vars(config), **changes})


def metrics(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_from_weights_keeps_their_classifier_with_keep_head(
    config: TrainConfig, tmp_path: Path, keep: bool
) -> None:
    saved = create_model("vit_mini_patch4_28", num_classes=4, in_chans=1, num_tokens=2, **TINY)
    save_model(saved, tmp_path / "saved")
    start = {"init_from": str(tmp_path / "saved" / "model.safetensors"), "keep_head": keep}
    data, cpu = quarter_images("quarters"), torch.device("cpu")
    model = prepare(changed(config, **start), data, cpu).model
    assert torch.equal(model.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(model.head.weight, saved.head.weight) is keep


def test_training_learns_what_the_images_show(config: TrainConfig) -> None:
    history = train(changed(config, model_kwargs=None, lr=3e-3)).history
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert history[-1]["test_top1_percent"] > 80


def test_the_checkpoint_is_the_trained_model(config: TrainConfig) -> None:
    result = train(config)
    images, _ = next(quarter_images("x", "test").batches(8))
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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(row: dict[str, Any]) -> None:
        if "epoch" in row:
            monkeypatch.setattr(
                "torch.nn.functional.cross_entropy",
                lambda *a, **k: torch.tensor(torch.nan, requires_grad=True),
            )

    with pytest.raises(RuntimeError, match=r"loss is nan at step 5 of 12"):
        train(config, poison)
    assert load_model(config.out) is not None


def test_a_finished_run_is_not_overwritten(config: TrainConfig) -> None:
    train(config)
    before = (Path(config.out) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="resume='auto'"):
        train(changed(config, seed=7))
    assert (Path(config.out) / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 65}, "batch_size is 65, .* 64"),
        ({"batch_size": 16, "images": 8}, "batch_size is 16, .* 8"),
        ({"images": 65}, "64 images"),
        ({"model_kwargs": {"num_classes": 3}}, "3 classes, fashion-mnist-small has 4"),
        ({"model": "vit_mini_patch4_29"}, "'vit_mini_patch4_29'"),
        ({"model": "vit_tiny_patch16_224"}, r"\[1, 28, 28\]"),
        ({"num_tokens": 50}, "num_tokens is 50"),
        ({"at": 6}, "at is 6"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config: TrainConfig, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        train(changed(config, **changes))
    assert not Path(config.out).exists()


def test_auto_picks_a_gpu_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- inserting in a trained model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as a run leaves them: a host, a wider one, one with other classes."""
    folder = tmp_path_factory.mktemp("hosts")
    torch.manual_seed(0)
    for name, changes in {
        "host": {},
        "wide": {"embed_dim": 24},
        "deep": {"depth": 4},
        "classes": {"num_classes": 3},
        "color": {"in_chans": 3},
        "learned": {"num_tokens": 2, "at": 1},
    }.items():
        model = create_model("vit_mini_patch4_28", **{"num_classes": 4, **TINY, **changes})
        save_model(model, folder / name)
    save_model(create_model("resnet10t", num_classes=4, in_chans=1), folder / "resnet")
    return folder


@pytest.fixture
def insertion(tmp_path: Path, hosts: Path) -> TrainConfig:
    """Four learned tokens for the trained host, which is the teacher, without labels."""
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=str(hosts / "host"),
        insert=4,
        at=1,
        teacher="host",
        epochs=2,
        batch_size=16,
        lr=1e-3,
        log_interval=1,
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrating takes two steps."""
    monkeypatch.setattr(import_module("tokenlearner.training.setup"), "calibrate", few_steps)


def few_steps(*args: Any, **kwargs: Any) -> Calibration:
    return calibrate(*args, **kwargs, steps=2)


def vector(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_with_inserted_tokens_is_read_back(insertion: TrainConfig, fuse: bool) -> None:
    result = train(changed(insertion, fuse=fuse))
    images, _ = next(quarter_images("x", "test").batches(8))
    loaded = load_model(insertion.out)
    assert wrapped_blocks(loaded)[1].learner.num_tokens == 4
    torch.testing.assert_close(loaded(images), result.model(images), rtol=0, atol=0)


@pytest.mark.usefixtures("short")
def test_the_host_is_returned_as_it_was_and_can_be_trained_further(
    insertion: TrainConfig, hosts: Path
) -> None:
    host = train(insertion).host
    assert host is not None
    assert not host.training
    assert all(p.requires_grad for p in host.parameters())
    assert torch.equal(vector(host), vector(load_model(hosts / "host")))


@pytest.mark.usefixtures("short")
def test_the_calibration_is_written_as_returned(insertion: TrainConfig) -> None:
    result = train(changed(insertion, calibrate=20))
    assert result.calibration is not None
    assert result.calibration.images == 20
    written = json.loads((Path(insertion.out) / "calibration.json").read_text())
    assert written == vars(result.calibration)


def test_calibrating_can_be_left_out(insertion: TrainConfig) -> None:
    assert train(changed(insertion, calibrate=0)).calibration is None
    assert not (Path(insertion.out) / "calibration.json").exists()


@pytest.mark.usefixtures("short")
def test_calibrating_comes_first_and_is_reported(insertion: TrainConfig) -> None:
    rows: list[dict[str, Any]] = []
    train(insertion, rows.append)
    steps = [(row["step"], row["steps"]) for row in rows if "epoch" not in row]
    assert steps == [(1, 2), (2, 2)] + [(i, 8) for i in range(1, 9)]
    assert all("images_per_second" in row for row in rows)


@pytest.mark.usefixtures("short")
def test_labels_play_no_part_when_they_count_for_nothing(
    insertion: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled(config: TrainConfig, split: str) -> ImageDataset:
        data = quarter_images(config, split)
        return replace(data, labels=data.labels.flip(0)) if split == "train" else data

    out = Path(insertion.out)
    first = vector(train(insertion).model)
    with_labels = vector(train(changed(insertion, out=str(out / "b"), task_loss_weight=1.0)).model)
    monkeypatch.setattr(import_module("tokenlearner.training.run"), "load_data", shuffled)
    assert torch.equal(vector(train(changed(insertion, out=str(out / "c"))).model), first)
    other = vector(train(changed(insertion, out=str(out / "d"), task_loss_weight=1.0)).model)
    assert not torch.equal(other, with_labels)


@pytest.mark.usefixtures("short")
def test_the_number_of_images_can_be_given(insertion: TrainConfig) -> None:
    result = train(changed(insertion, images=32))
    assert result.images == 32
    assert result.history[-1]["step"] == 4  # two epochs of two batches of 16


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_another_trained_model_can_be_the_teacher(
    insertion: TrainConfig, hosts: Path, kind: str
) -> None:
    teacher = {"logit": "wide", "feature": "host"}[kind]
    config = changed(insertion, teacher=str(hosts / teacher), kd_distill_type=kind)
    assert train(config).history[-1]["train_loss"] > 0


def test_a_model_built_new_can_have_a_teacher_and_has_no_host(
    config: TrainConfig, hosts: Path
) -> None:
    result = train(changed(config, epochs=2, at=1, teacher=str(hosts / "host")))
    assert wrapped_blocks(result.model)
    assert result.host is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "vit_mini_patch4_28"}, "vit_mini_patch4_28"),
        ({"model": "learned"}, "learned tokens already"),
        ({"model": "classes"}, "3 classes, fashion-mnist-small has 4"),
        ({"model": "color"}, r"color .*\[1, 28, 28\]"),
        ({"teacher": "classes"}, "3 classes, fashion-mnist-small has 4"),
        ({"teacher": "wide"}, "16 wide, the teacher 24; .*kd_distill_type='logit'"),
        ({"teacher": "deep"}, "2 blocks, the teacher of 3; .*kd_distill_type='logit'"),
        ({"teacher": "resnet"}, "teacher is a ResNet, .*kd_distill_type='logit'"),
        ({"batch_size": 1}, "1 image; .*batch_size"),
        ({"insert": 17}, "num_tokens is 17"),
        ({"at": 3}, "at is 3"),
        ({"learner": "v2"}, "learner is 'v2'"),
        ({"images": 1, "batch_size": 1, "kd_distill_type": "logit"}, "images is"),
    ],
    ids=str,
)
def test_an_insertion_that_does_not_fit_is_refused_before_anything_is_written(
    insertion: TrainConfig, hosts: Path, changes: dict[str, Any], named: str
) -> None:
    folders = {path.name for path in hosts.iterdir()}
    paths = {k: str(hosts / v) if v in folders else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=named):
        train(changed(insertion, **paths))
    assert not Path(insertion.out).exists()
