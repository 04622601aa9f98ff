"""Connectors fitted to the model with all image tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import same
from vision_language import FAMILIES, MARKS, K, picture

from tokenlearner import connect, fit_connector
from tokenlearner.models.connection import connector_of, learners_of
from tokenlearner.training.connector_fit import TextTeacher

pytestmark = pytest.mark.filterwarnings(  # of torch's tensors, in the processor of PaliGemma
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
TEXTS = ["a b c", "d e", "f g h i", "j"]


def examples(name: str, count: int = 8) -> list[dict[str, Any]]:
    mark = MARKS.get(name, "<image>")
    return [
        {"text": f"{mark} {TEXTS[i % 4]} {TEXTS[(i + 1) % 4]}", "images": [picture(i)]}
        for i in range(count)
    ]


def made(name: str, **options: Any) -> tuple[Any, Any]:
    model, processor = FAMILIES[name]()
    return connect(model, processor, K.get(name, 4), **options), processor


@pytest.mark.parametrize("name", ["Llava", "LlavaOnevision", "PaliGemma", "Gemma3", "Idefics3"])
def test_fitting_comes_closer_to_the_model_with_all_tokens(name: str) -> None:
    model, processor = made(name)
    learned = {id(p) for learner in learners_of(model) for p in learner.parameters()}
    others = {n: p.clone() for n, p in model.named_parameters() if id(p) not in learned}
    flags = [p.requires_grad for p in model.parameters()]
    done = fit_connector(model, processor, examples(name), steps=20, batch_size=4, held_out=0)
    assert done.kl_after < done.kl_before
    assert (done.examples, done.steps, done.held_out) == (8, 20, 0)
    assert same({n: p for n, p in model.named_parameters() if n in others}, others)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("kind", ["feature", "logit+feature"])
def test_hidden_states_are_a_teacher_too(kind: Any) -> None:
    model, processor = made("Llava")
    teacher, rows = TextTeacher(model, processor, examples("Llava"), kind), torch.arange(8)
    before = sum(loss.item() for loss in teacher.losses(model, rows))
    options: dict[str, Any] = {"steps": 20, "batch_size": 8, "held_out": 0, "lr": 1e-3}
    fit_connector(model, processor, examples("Llava"), kind=kind, **options)
    assert sum(loss.item() for loss in teacher.losses(model, rows)) < before


def test_the_best_state_on_held_out_texts_is_kept() -> None:
    model, processor = made("Llava")
    done = fit_connector(model, processor, examples("Llava"), steps=20, batch_size=4, held_out=0.25)
    assert (done.examples, done.held_out) == (6, 2)
    assert done.kl_after <= done.kl_before
    teacher = TextTeacher(model, processor, examples("Llava"))
    everything = torch.arange(8)
    assert teacher.error(model, everything) > 0


def test_a_model_on_all_its_positions_is_its_own_teacher() -> None:
    model, processor = FAMILIES["Llava"]()
    connect(model, processor, 16, learner="pool")  # cells of one position
    assert TextTeacher(model, processor, examples("Llava")).error(model, torch.arange(8)) < 1e-6


def test_the_projector_is_fitted_on_demand() -> None:
    model, processor = made("Llava", learner="pool")
    before = [p.clone() for p in connector_of(model).projector.parameters()]
    options: dict[str, Any] = {"steps": 10, "batch_size": 4, "held_out": 0}
    with pytest.raises(ValueError, match=r"nothing to fit.*projector_lr"):
        fit_connector(model, processor, examples("Llava"), **options)
    done = fit_connector(model, processor, examples("Llava"), projector_lr=1e-2, **options)
    assert done.kl_after < done.kl_before
    after = connector_of(model).projector.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_clips_are_examples_too() -> None:
    model, processor = FAMILIES["LlavaOnevision"]()
    processor.video_processor.do_sample_frames = False
    connect(model, processor, 4, video_tokens=8, num_frames=4)
    texts = [
        {"text": f"<video> {TEXTS[i]} a", "videos": [[picture(9 * i + t) for t in range(4)]]}
        for i in range(4)
    ]
    done = fit_connector(model, processor, texts, steps=10, batch_size=2, held_out=0)
    assert done.kl_after < done.kl_before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"text": "<image> a", "images": []}], "number of examples"),
        ([{"text": "a"}, {"text": "b"}], "expected"),
        (["<image> a", "<image> b"], "expected"),
        ([{"text": "a", "images": []}, {"text": "a", "videos": []}], "expected"),
    ],
)
def test_examples_that_are_no_texts_with_images_are_refused(given: Any, message: str) -> None:
    model, processor = made("Llava")
    with pytest.raises(ValueError, match=message):
        fit_connector(model, processor, given)


@pytest.mark.parametrize(
    ("option", "value"),
    [("kind", "x"), ("steps", 0), ("lr", 0), ("projector_lr", -1), ("held_out", 1)],
)
def test_numbers_out_of_range_are_refused(option: str, value: Any) -> None:
    model, processor = made("Llava")
    with pytest.raises(ValueError, match=option):
        fit_connector(model, processor, examples("Llava"), **{option: value})


def test_a_model_that_is_not_connected_is_refused() -> None:
    with pytest.raises(ValueError, match="not connected"):
        fit_connector(*FAMILIES["Llava"](), examples("Llava"))


def test_texts_that_are_cut_off_are_refused() -> None:
    model, processor = made("Llava")
    teacher = TextTeacher(model, processor, examples("Llava"))
    teacher.hidden[0] = teacher.hidden[0][:-1]
    with pytest.raises(ValueError, match="truncation"):
        teacher.error(model, torch.arange(8))
