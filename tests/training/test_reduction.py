"""Reducing: candidates meet the budget, the best is kept, and what is done is not done again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from tiny import TIMM, torchvision_vit, transformers_vit
from torch import Tensor, nn

from tokenlearner import create_model, insert, load_model, reduce, save_model
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.models.insertion import get_insertion
from tokenlearner.models.preprocessing import get_input_size
from tokenlearner.training import reduction
from tokenlearner.training.calibration import split_held_out
from tokenlearner.training.candidates import Candidate, ResizedInput, find_candidates, resize
from tokenlearner.training.distillation import unexplained_variance
from tokenlearner.training.teacher import TeacherCache

SHAPE: dict[str, Any] = TIMM | {"img_size": 32, "depth": 4, "patch_size": 8}
slow = pytest.mark.slow
QUICK: dict[str, Any] = {"seconds": 60, "views": 1, "latency_batches": [2], "batch_size": 8}


def vit(**changes: Any) -> Any:
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **SHAPE | changes).eval()


def make_images(n: int = 20, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "_MOST_STEPS", 3)


# --- candidates ---------------------------------------------------------------------------------


def test_candidates_meet_the_budget_and_could_not_be_one_step_dearer() -> None:
    host, image, budget = vit(patch_size=4), make_images(1), 0.5
    (none, whole), *found = find_candidates(host, image, budget, [8])
    assert (none, whole) == (Candidate(), count_macs(host, image))
    for candidate, macs in found:
        model = candidate.apply(copy.deepcopy(host))
        size = candidate.img_size or (32, 32)
        assert macs == count_macs(model, image.new_zeros(1, 3, *size)) <= budget * whole
        if candidate.num_tokens and candidate.at < 3:
            deeper = Candidate(**vars(candidate) | {"at": candidate.at + 1})
            assert count_macs(deeper.apply(copy.deepcopy(host)), torch.zeros(1, 3, *size)) > (
                budget * whole
            )
    kinds = [(bool(c.num_tokens), c.img_size is not None) for c, _ in found]
    assert {(True, False), (False, True), (True, True)} <= {*kinds}
    assert kinds.count((False, True)) == 1


def test_hosts_of_rotated_positions_learn_no_token_early() -> None:
    host = Eva(
        **{k: v for k, v in SHAPE.items() if k != "class_token"}, use_rot_pos_emb=True
    ).eval()
    found = find_candidates(host, make_images(1), 0.7, [4])
    assert [c for c, _ in found if c.num_tokens]
    assert not [c for c, _ in found if c.overlap]


def test_a_budget_that_nothing_meets_names_the_cheapest() -> None:
    with pytest.raises(ValueError, match=r"budget of 0\.01 .* smallest share is 0\.\d+, with "):
        find_candidates(vit(), make_images(1), 0.01, [4])


def test_a_smaller_image_is_resized_for_its_model() -> None:
    model = Candidate(img_size=(24, 24)).apply(vit())
    images = make_images(2)
    expected = model(resize(images, (24, 24)))
    torch.testing.assert_close(ResizedInput(model, (24, 24))(images), expected)


# --- reduce -------------------------------------------------------------------------------------


def test_the_best_on_held_out_images_is_returned(tmp_path: Path) -> None:
    host, images = vit(num_classes=0), make_images(40)
    before, drawn = copy.deepcopy(host.state_dict()), torch.get_rng_state()
    done = reduce(host, images, 0.6, num_tokens=[4], **QUICK)
    torch.testing.assert_close(host.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (done.images, done.held_out) == (36, 4)
    assert done.rows[0].name == "host"
    assert done.rows[0].macs_share == 1.0
    assert done.best.macs_share <= 0.6
    assert [len(row.errors) for row in done.rows[1:]] == sorted(
        (len(row.errors) for row in done.rows[1:]), reverse=True
    )
    assert len(done.best.errors) == 3
    assert done.untried == []
    assert all(row.latency_ms.keys() == {2} for row in done.rows)
    held_out = split_held_out(40, 0.1)[1]
    with torch.no_grad():
        theirs = host(images)
        size: Any = getattr(done.best.candidate, "img_size", None) or (32, 32)
        ours = done.model(resize(images[held_out], size))
    variance = theirs.var(0, correction=0, keepdim=True)
    error = unexplained_variance(ours, theirs[held_out], variance)
    assert done.best.errors[-1] == pytest.approx(error.item(), rel=1e-3)
    save_model(done.model, tmp_path)
    loaded, x = load_model(tmp_path), torch.randn(2, 3, *size)
    torch.testing.assert_close(loaded(x), done.model(x))
    assert get_input_size(loaded) == [3, *size]


def test_of_a_classifier_the_share_of_equal_classes_is_said() -> None:
    done = reduce(vit(), make_images(), 0.6, num_tokens=[4], train_best=False, **QUICK)
    assert all(0 <= (row.agreement or 0) <= 1 for row in done.rows[1:])
    assert {row.agreement is None for row in done.rows[1:]} == {False}
    assert len(done.best.errors) == 2


def test_without_time_one_candidate_of_each_kind_is_tried() -> None:
    host, images = vit(), make_images()
    done = reduce(host, images, 0.6, num_tokens=[2, 4], **QUICK | {"seconds": 1e-3})
    found = [candidate for candidate, _ in find_candidates(host, images[:1], 0.6, [2, 4])][1:]
    tried = [row.candidate for row in done.rows[1:]]
    kinds = [(c.num_tokens > 0, c.img_size is not None) for c in tried if c]
    assert sorted(kinds) == sorted({(c.num_tokens > 0, c.img_size is not None) for c in found})
    assert (True, False) in kinds
    assert (False, True) in kinds
    assert {*done.untried} == {c.name for c in found if c not in tried}
    assert done.untried
    assert all(row.steps == 3 * len(row.errors) for row in done.rows[1:])
    timed = [bool(row.latency_ms) for row in done.rows]
    assert timed == [True, True, *(False for _ in timed[2:])]


@pytest.mark.parametrize(("share", "views"), [(1e-9, 1), (1e9, 4)])
def test_as_many_views_are_shown_as_there_is_time_for(
    share: float, views: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "_HOST_SHARE", share)
    options: dict[str, Any] = QUICK | {"num_tokens": [4], "folder": tmp_path, "views": None}
    seen = list[int]()
    reduce(
        vit(),
        make_images(),
        0.6,
        train_best=False,
        report=lambda row: seen.append(row["steps"]) if row["candidate"] == "host" else None,
        **options,
    )
    assert {*seen} == {20 * views}


@pytest.mark.slow
def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, images = vit(), make_images()
    options: dict[str, Any] = QUICK | {"num_tokens": [4], "folder": tmp_path}
    expected = reduce(host, images, 0.6, **options | {"folder": None})
    fitted, stops = list[tuple[int, str]](), True

    def note(row: dict[str, Any]) -> None:
        if row["candidate"] not in ("host", "times"):
            fitted.append((row["round"], row["candidate"]))
        if stops and len({*fitted}) == 3 and row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reduce(host, images, 0.6, report=note, **options)
    finished, stops = {*fitted[:-2]}, False
    fitted.clear()
    with monkeypatch.context() as patched:  # what the host makes of images was kept
        patched.setattr(TeacherCache, "_run_teacher", None)
        done = reduce(host, images, 0.6, report=note, **options)
    assert not {*fitted} & finished
    assert [row.name for row in done.rows] == [row.name for row in expected.rows]
    assert done.best.errors == pytest.approx(expected.best.errors, rel=1e-3)
    fitted.clear()
    again = reduce(host, images, 0.6, report=note, **options)
    assert (again.best.errors, fitted) == (done.best.errors, [])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": 1.0}, "budget is 1.0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"images": make_images(3)}, r"images is \[3, 3, 32, 32\], expected a tensor of 16"),
        ({"images": "photos"}, "images is str"),
        ({"num_tokens": [0]}, "num_tokens is 0"),
        ({"model": insert(vit(), 2, 1)}, "has learned tokens"),
        ({"model": nn.Linear(2, 2)}, "no model that tokens can be inserted in"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], named: str) -> None:
    options: dict[str, Any] = {"model": vit(), "images": make_images(), **QUICK}
    with pytest.raises(ValueError, match=named):
        reduce(**options | changes)


OTHERS: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
    "ours": (lambda: create_model("vit_mini_patch4_28", depth=3), (1, 28, 28), torch.float32),
    "bfloat16": (vit, (3, 32, 32), torch.bfloat16),
    "torchvision": (torchvision_vit, (3, 16, 16), torch.float32),
    "transformers": (transformers_vit, (3, 16, 16), torch.float32),
}


@pytest.mark.parametrize(
    "kind", ["ours", *(pytest.param(k, marks=slow) for k in OTHERS if k != "ours")]
)
def test_other_hosts_are_reduced_by_what_they_can(kind: str) -> None:
    make, shape, dtype = OTHERS[kind]
    host, images = make().eval().to(dtype), torch.rand(20, *shape).to(dtype)
    done = reduce(host, images, 0.8, num_tokens=[4], **QUICK)
    has_sizes = any(row.candidate and row.candidate.img_size for row in done.rows)
    assert has_sizes == (kind in ("ours", "bfloat16"))
    chosen = done.best.candidate
    found = get_insertion(done.model)
    assert (found is not None) == bool(chosen and chosen.num_tokens)
    assert {p.dtype for p in done.model.parameters()} == {dtype}
