"""`train`: a run that can be trusted, and mistakes that are found before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TINY, quarter_images

from tokenlearner import TrainConfig, calibrate, create_model, load_model, save_model, train
from tokenlearner.data.factory import ImageDataset
from tokenlearner.evaluation.accuracy import mean_metrics
from tokenlearner.models.insertion import wrapped_blocks
from tokenlearner.training.distillation import Distillation
from tokenlearner.training.run import TrainResult
from tokenlearner.training.setup import prepare


@pytest.fixture(scope="module", autouse=True)
def small_data() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("tokenlearner.training.run"), "load_data", quarter_images)
        yield


def small(out: Path, **changes: Any) -> TrainConfig:
    """Learned tokens for a model that is built new, on labels."""
    options = {"model_kwargs": TINY, "num_tokens": 2, "epochs": 2, "lr": 1e-2, "batch_size": 16}
    options |= {"log_interval": 1, "warmup_epochs": 0.0, "device": "cpu"}
    return TrainConfig(**{"out": str(out), **options, **changes})


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small(tmp_path / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    """A run that is over."""
    config = small(tmp_path_factory.mktemp("trained") / "run")
    torch.manual_seed(0)
    return config, train(config)


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
    model = prepare(changed(config, **start), data, data, cpu).model
    assert torch.equal(model.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(model.head.weight, saved.head.weight) is keep


def test_a_trained_model_goes_on_and_gets_a_classifier_for_other_classes(
    trained: tuple[TrainConfig, TrainResult], tmp_path: Path
) -> None:
    start, cpu = str(trained[0].out), torch.device("cpu")
    config = TrainConfig(model=start, out=str(tmp_path), epochs=1, batch_size=16)
    data = quarter_images("quarters")
    model = prepare(config, data, data, cpu).model
    state = load_model(start).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    others = data.with_preprocessing(classes=("north", "east", "south", "west"))
    model = prepare(config, others, others, cpu).model
    assert not torch.equal(model.head.weight, state["head.weight"])
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    with pytest.raises(ValueError, match=r"is a trained model, num_tokens for a new one"):
        replace(config, num_tokens=4)


def test_the_best_epoch_is_kept_on_request_and_its_card_has_its_numbers(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies, evaluate = iter([50.0, 75.0, 25.0]), mean_metrics
    monkeypatch.setattr(
        import_module("tokenlearner.training.run"),
        "mean_metrics",
        lambda *args: replace(evaluate(*args), top1_percent=next(accuracies)),
    )
    config = changed(config, epochs=3, keep="best", license="mit")
    states, out = list[dict[str, Any]](), Path(config.out)

    def report(row: dict[str, Any]) -> None:
        if "epoch" in row:
            states.append({k: v.clone() for k, v in load_model(out).state_dict().items()})

    model = train(config, report).model
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    for kept in (states[2], model.state_dict()):
        assert all(torch.equal(kept[key], value) for key, value in states[1].items())
    card = (out / "README.md").read_text()
    assert ("75.00 %" in card, "2 of 3, the best one" in card, "license: mit" in card) == (
        True,
    ) * 3


def test_a_card_that_was_edited_is_kept(config: TrainConfig) -> None:
    readme = Path(config.out) / "README.md"
    train(config, lambda row: "epoch" in row and readme.write_text("Mine."))
    assert readme.read_text() == "Mine."


def test_training_learns_what_the_images_show(config: TrainConfig, device: torch.device) -> None:
    options = {"model_kwargs": None, "epochs": 3, "lr": 3e-3, "warmup_epochs": 1.0}
    history = train(changed(config, **options, device=str(device))).history
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert history[-1]["test_top1_percent"] > 80


def test_model_metrics_and_config_are_written_as_returned_and_not_overwritten(
    trained: tuple[TrainConfig, TrainResult],
) -> None:
    config, result = trained
    images, _ = next(quarter_images("x", "test").batches(8))
    torch.testing.assert_close(load_model(config.out)(images), result.model(images), rtol=0, atol=0)
    assert not result.model.training
    assert metrics(config.out) == result.history
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert json.loads((Path(config.out) / "train.json").read_text()) == vars(config)
    before = (Path(config.out) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="resume='auto'"):
        train(changed(config, seed=7))
    assert (Path(config.out) / "model.safetensors").read_bytes() == before


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    trained: tuple[TrainConfig, TrainResult], tmp_path: Path
) -> None:
    first = vector(trained[1].model)
    again, other = (train(small(tmp_path / str(seed), seed=seed)).model for seed in (0, 1))
    assert torch.equal(vector(again), first)
    assert not torch.equal(vector(other), first)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 65}, "batch_size is 65, .* 64"),
        ({"batch_size": 16, "images": 8}, "batch_size is 16, .* 8"),
        ({"images": 65}, "images is 65"),
        ({"model_kwargs": {"num_classes": 3}}, "3 classes, fashion-mnist-small has 4"),
        ({"model": "vit_mini_patch4_29"}, "'vit_mini_patch4_29'"),
        ({"model": "vit_tiny_patch16_224"}, r"\[1, 28, 28\]"),
        ({"num_tokens": 50}, "num_tokens is 50"),
        ({"at": 6}, "at is 6"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"held_out": 0.8}, "batch_size is 16, .* 13"),
        ({"held_out": 0.01, "images": 32}, "held_out is 0.01, .* 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config: TrainConfig, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        train(changed(config, **changes))
    assert not Path(config.out).exists()


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


def inserting(out: Path, hosts: Path, **changes: Any) -> TrainConfig:
    """Four learned tokens for the trained host, which is the teacher, without labels."""
    options = {"model": str(hosts / "host"), "insert": 4, "at": 1, "teacher": "host", "lr": 1e-3}
    return small(out, **{"model_kwargs": None, "num_tokens": 0, **options, **changes})


@pytest.fixture
def insertion(tmp_path: Path, hosts: Path) -> TrainConfig:
    return inserting(tmp_path / "run", hosts, epochs=1, calibrate=0)


def vector(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("how", [{"overlap": 1}, {"fuse": True}], ids=str)
def test_an_insertion_is_calibrated_trained_and_read_back(
    how: dict[str, Any],
    hosts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    setup = import_module("tokenlearner.training.setup")
    monkeypatch.setattr(setup, "calibrate", partial(calibrate, steps=2))
    rows: list[dict[str, Any]] = []
    options = {**how, "calibrate": 20, "device": str(device)}
    result = train(inserting(tmp_path / "run", hosts, **options), rows.append)
    images = next(quarter_images("x", "test").batches(8))[0].to(device)
    loaded = load_model(tmp_path / "run").to(device)
    assert wrapped_blocks(loaded)[1 - how.get("overlap", 0)].learner.num_tokens == 4
    torch.testing.assert_close(loaded(images), result.model(images), rtol=0, atol=0)
    # the calibration comes first, is reported, and written as returned
    steps = [(row["step"], row["steps"]) for row in rows if "epoch" not in row]
    assert steps == [(1, 2), (2, 2)] + [(i, 8) for i in range(1, 9)]
    assert all("images_per_second" in row for row in rows)
    assert result.calibration is not None
    assert result.calibration.images == 20
    written = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert written == vars(result.calibration)
    # the host is as it was, and can be trained further
    assert result.host is not None
    assert not result.host.training
    assert all(p.requires_grad for p in result.host.parameters())
    assert torch.equal(vector(result.host).cpu(), vector(load_model(hosts / "host")))


def test_calibrating_can_be_left_out_and_the_number_of_images_be_given(
    insertion: TrainConfig,
) -> None:
    result = train(changed(insertion, images=32))
    assert result.calibration is None
    assert not (Path(insertion.out) / "calibration.json").exists()
    assert result.images == 32
    assert result.history[-1]["step"] == 2  # of 16 images each


def test_labels_play_no_part_when_they_count_for_nothing(
    insertion: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, **changes: Any) -> torch.Tensor:
        return vector(train(changed(insertion, out=f"{insertion.out}-{name}", **changes)).model)

    def shuffled(config: TrainConfig, split: str) -> ImageDataset:
        data = quarter_images(config, split)
        return replace(data, labels=data.labels.flip(0)) if split == "train" else data

    first, with_labels = weights("a"), weights("b", task_loss_weight=1.0)
    monkeypatch.setattr(import_module("tokenlearner.training.run"), "load_data", shuffled)
    assert torch.equal(weights("c"), first)
    assert not torch.equal(weights("d", task_loss_weight=1.0), with_labels)


@pytest.mark.parametrize(("kind", "teacher"), [("logit", "wide"), ("feature", "host")])
def test_another_trained_model_can_be_the_teacher(
    insertion: TrainConfig, hosts: Path, kind: str, teacher: str
) -> None:
    config = changed(insertion, teacher=str(hosts / teacher), kd_distill_type=kind)
    assert train(config).history[-1]["train_loss"] > 0


def test_a_model_built_new_can_have_a_teacher_and_has_no_host(
    config: TrainConfig, hosts: Path
) -> None:
    result = train(changed(config, epochs=1, at=1, teacher=str(hosts / "host")))
    assert wrapped_blocks(result.model)
    assert result.host is None


@pytest.mark.parametrize("keep", [None, "last"])
def test_without_labels_the_held_out_loss_ends_a_run_and_says_which_model_is_kept(
    keep: str | None, insertion: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, states = [3.0, 1.0, 2.0, 1.0], list[torch.Tensor]()
    run = import_module("tokenlearner.training.run")
    measure = run.sum_metrics

    def measured(*args: Any) -> torch.Tensor:
        states.append(vector(args[0]).clone())
        sums = measure(*args).clone()
        sums[5] = losses[len(states) - 1] * sums[0]
        return sums

    monkeypatch.setattr(run, "sum_metrics", measured)
    config = changed(insertion, patience=2, epochs=9, keep=keep, onednn=True)
    result = train(config)
    assert [row["test_distill_loss"] for row in result.history] == losses
    assert result.kept == (3 if keep else 1)
    again = train(replace(config, resume="auto"))
    assert (again.history, again.kept, len(states)) == (result.history, result.kept, 4)
    for model in (result.model, again.model, load_model(config.out)):
        assert torch.equal(vector(model), states[result.kept])


def test_images_are_held_out_of_training_and_compared_with_the_teacher(
    insertion: TrainConfig, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = import_module("tokenlearner.training.run"), list[str]()

    def load(config: TrainConfig, split: str) -> ImageDataset:
        read.append(split)
        return quarter_images(config, split)

    monkeypatch.setattr(run, "load_data", load)
    config = changed(insertion, held_out=0.25, batch_size=10, kd_distill_type="logit")
    result = train(config)
    assert (read, result.images) == (["train"], 48)
    whole = {image.tobytes() for image in quarter_images(config).images.numpy()}
    ours = {image.tobytes() for image in result.held_out.images.numpy()}
    assert (len(ours), ours < whole, result.held_out.split) == (16, True, "val")
    images, _ = next(result.held_out.batches(16))
    with torch.no_grad():
        loss = Distillation(load_model(hosts / "host").eval(), "logit")(result.model, images)[1]
    assert result.history[-1]["test_distill_loss"] == pytest.approx(loss.item(), rel=1e-4)


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
        ({"insert": 17}, "num_tokens is 17"),
        ({"at": 3}, "at is 3"),
        ({"overlap": 2}, "overlap is 2, but there are 1 blocks"),
        ({"learner": "v2"}, "learner is 'v2'"),
        ({"images": 1, "batch_size": 1, "kd_distill_type": "logit", "calibrate": 8}, "images is"),
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
