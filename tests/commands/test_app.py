"""What the page offers, predicts and shows, and how it is served; without a browser."""

from __future__ import annotations

import asyncio
import errno
import re
import shutil
import socket
import sys
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import MINI, make_checkpoint, make_image, make_image_folder, make_video
from tiny import randomized

from tokenlearner import attention_maps, create_model, load_data, remove, save_model
from tokenlearner.commands._inputs import InputPipeline
from tokenlearner.commands.app import inference
from tokenlearner.commands.app.addresses import reachable
from tokenlearner.commands.app.inference import Prediction, measure_cost, predict
from tokenlearner.commands.app.models import (
    WITHOUT_CHECKPOINT,
    OfferedModel,
    load_offered,
    offered_sources,
)
from tokenlearner.commands.app.server import AppConfig, serving
from tokenlearner.commands.app.uploads import UploadLimits
from tokenlearner.commands.app.view import map_images, map_notes, map_numbers
from tokenlearner.commands.maps import compute_maps
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import Seconds
from tokenlearner.evaluation.map_figures import overlay

pytest.importorskip("gradio")
from tokenlearner.commands.app.page import NO_MAPS, AppPage
from tokenlearner.utils.preprocessing import Preprocessing

TL4, VIT = "tokenlearner-demo/vit-tl4", "tokenlearner-demo/vit"


def make_page(*models: OfferedModel) -> AppPage:
    """Builds a page within an event loop; outside of one Gradio opens some and leaves them open."""

    async def build() -> AppPage:
        return AppPage({model.name: model for model in models}, UploadLimits(max_upload_mib=1))

    return asyncio.run(build())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tokenlearner demo` leaves, as far as the page is concerned."""
    root = tmp_path_factory.mktemp("work") / "tokenlearner-demo"
    make_checkpoint(root / "vit", 0)
    make_checkpoint(root / "vit-tl4", 4)
    return root


@pytest.fixture(scope="module")
def offered(demo: Path) -> dict[str, OfferedModel]:
    return load_offered([str(demo)], "cpu")


@pytest.fixture(scope="module")
def with_tokens(offered: dict[str, OfferedModel]) -> OfferedModel:
    return offered[TL4]


@pytest.fixture(scope="module")
def prediction(with_tokens: OfferedModel) -> Prediction:
    return predict(with_tokens, with_tokens.examples["Trouser"])


@pytest.fixture(scope="module")
def page(offered: dict[str, OfferedModel]) -> AppPage:
    return make_page(*offered.values())


@pytest.fixture(scope="module")
def clips() -> OfferedModel:
    """A model of clips, with two blocks that fuse, and without examples."""
    options: dict[str, Any] = {"num_tokens": 3, "depth": 2, "at": 0, "fuse": True, "in_chans": 1}
    model = create_model("vivit_mini_patch8x2_32", **options)
    pipeline = InputPipeline(
        (1, 8, 32, 32), Preprocessing((0.5,), (0.5,), 1.0), 8, 1, False, "made up"
    )
    return OfferedModel("clips", randomized(model), pipeline, None, False, {})


# --- what is offered ----------------------------------------------------------------------------


def test_the_models_of_a_folder_or_of_paths_are_offered_and_a_missing_one_is_refused(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {VIT: str(demo / "vit"), TL4: str(demo / "vit-tl4")}
    assert offered_sources([str(demo)]) == expected
    monkeypatch.chdir(demo.parent)
    assert [*offered_sources([])] == [*expected]
    same_name = [str(demo / "vit"), str(shutil.copytree(demo / "vit", tmp_path / "vit"))]
    assert offered_sources(same_name) == dict(zip(("vit", "vit (2)"), same_name, strict=True))
    with pytest.raises(ValueError, match="nowhere"):
        load_offered(["nowhere"], "cpu")


def test_without_anything_a_model_with_random_weights_is_offered_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [model] = load_offered([], "cpu").values()
    assert model.name == f"{WITHOUT_CHECKPOINT} (random weights)"
    page = make_page(model)
    shown = page.look(model.name, None, None)
    for state in (shown, page.redraw(shown[page.state], None, 1)):
        assert "This model has random weights" in state[page.status]


def test_classes_with_one_name_are_told_apart(
    offered: dict[str, OfferedModel], tmp_path: Path
) -> None:
    path, best = str(make_image(tmp_path / "a.png")), []
    for classes in (tuple(map(str, range(10))), ("crane",) * 9 + ("owl",)):
        found = make_page(replace(offered[TL4], classes=classes))
        updates = found.look(TL4, path, None)
        best += re.findall(r"says (.+), (\d+) %", updates[found.status])
        shares = updates[found.prediction]["value"]
    (number, share), (name, same) = best
    assert (name, same) == (f"crane ({number})" if number != "9" else "owl", share)
    assert [*shares] == [*(f"crane ({i})" for i in range(9)), "owl"]


def test_a_backbone_without_classifier_is_looked_at_and_says_nothing(tmp_path: Path) -> None:
    model = create_model("vit_mini_patch4_28", num_classes=0, num_tokens=4, depth=2)
    save_model(model, tmp_path / "bare")
    [offered] = load_offered([str(tmp_path / "bare")], "cpu").values()
    page = make_page(offered)
    shown = page.look(offered.name, str(make_image(tmp_path / "a.png")), None)
    assert "bare has no classifier" in shown[page.status]
    assert not shown[page.prediction]["visible"]
    assert shown[page.maps]["value"]


def test_models_with_learned_tokens_come_first_with_names_of_classes_and_evaluated_examples(
    offered: dict[str, OfferedModel], clips: OfferedModel
) -> None:
    kinds = [(one.has_tokens, one.is_random) for one in offered.values()]
    assert kinds == [(True, False), (False, False)]
    assert [offered[TL4].class_name(i) for i in (0, 1)] == ["T-shirt/top", "Trouser"]
    assert clips.class_name(3) == "class 3"
    data, examples = load_data("fashion-mnist-small", "test"), offered[TL4].examples
    expected = data.eval_transform(data.load(int((data.labels == 1).nonzero()[0])))
    torch.testing.assert_close(examples["Trouser"].model_input[0], expected)
    assert len(examples) == 10


def test_a_model_of_a_folder_has_its_examples_and_classes(tmp_path: Path) -> None:
    make_image_folder(tmp_path, [*map(str, range(10))])
    (tmp_path / "val" / "3" / "0.png").write_bytes(b"broken")
    folder = make_checkpoint(tmp_path / "run", 2, data="folder", root=str(tmp_path))
    [model] = load_offered([str(folder)], "cpu").values()
    assert model.classes == tuple(map(str, range(10)))
    assert [*model.examples] == [name for name in map(str, range(10)) if name != "3"]


@pytest.mark.parametrize("run", [{"data": "folder", "root": "/nowhere"}, {"data": "hfds/a"}])
def test_a_model_whose_data_are_not_here_has_no_examples(
    run: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = InputPipeline(
        (1, 28, 28), Preprocessing((0.5,), (0.5,), 1.0), 16, 1, False, "made up"
    )
    monkeypatch.setattr("tokenlearner.commands.app.models.input_pipeline", lambda *_: pipeline)
    [model] = load_offered([str(make_checkpoint(tmp_path / "a", 2, **run))], "cpu").values()
    assert (model.classes, model.examples) == (None, {})
    page = make_page(model)
    assert "choose an image or a clip" in page.look(model.name, None, None)[page.status]


@pytest.mark.parametrize("order", ["bcthw", "btchw"])
def test_a_model_of_clips_is_tried_on_the_clips_it_is_evaluated_on(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    data = load_data("moving-photographs", "test", frames=4, img_size=16)
    pipeline = InputPipeline(
        (1, 4, 16, 16), Preprocessing(data.mean, data.std, 1.0), 4, 1, order == "btchw", ""
    )
    monkeypatch.setattr("tokenlearner.commands.app.models.input_pipeline", lambda *_: pipeline)
    folder = make_checkpoint(tmp_path / "a", 2, data="moving-photographs")
    [model] = load_offered([str(folder)], "cpu").values()
    example = model.examples["right"]
    expected = data.eval_transform(data.load(int((data.labels == 1).nonzero()[0])))
    taken = example.model_input.transpose(1, 2) if order == "btchw" else example.model_input
    torch.testing.assert_close(taken[0], expected)
    assert (example.pixels.shape, example.is_video) == ((4, 1, 16, 16), True)


# --- prediction and cost ------------------------------------------------------------------------


def test_the_prediction_and_the_maps_are_those_of_the_model(
    with_tokens: OfferedModel, offered: dict[str, OfferedModel], prediction: Prediction
) -> None:
    model, image = with_tokens.model, with_tokens.examples["Trouser"]
    shares = model(image.model_input)[0].softmax(-1).detach()
    torch.testing.assert_close(prediction.shares, shares)
    torch.testing.assert_close(prediction.maps, attention_maps(model, image.model_input))
    assert predict(offered[VIT], image).maps == {}


def test_of_a_clip_a_model_of_images_predicts_the_mean(with_tokens: Any, tmp_path: Path) -> None:
    clip = with_tokens.pipeline.read(make_video(tmp_path / "a.mp4", frames=30), "a")
    prediction = predict(with_tokens, clip)
    expected = with_tokens.model(clip.model_input).softmax(-1).mean(0).detach()
    torch.testing.assert_close(prediction.shares, expected)
    assert prediction.frames == 16


def test_a_model_that_returns_nan_is_refused(with_tokens: OfferedModel) -> None:
    broken: Any = create_model(MINI, num_tokens=2, depth=1).eval()
    torch.nn.init.constant_(broken.get_classifier().bias, float("nan"))
    model = replace(with_tokens, name="broken", model=broken)
    with pytest.raises(ValueError, match="broken"):
        predict(model, with_tokens.examples["Trouser"])


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.001, [(1, 2), (1, 30), (32, 20)]), (1.0, [(1, 2), (1, 3)])]
)
def test_the_cost_is_that_of_the_host_if_any_and_a_slow_model_s_not_of_a_batch(
    seconds: float, expected: Any, with_tokens: OfferedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, int]] = []

    def timed(models: dict[str, Any], images: torch.Tensor, rounds: int) -> dict[str, Seconds]:
        runs.append((len(images), rounds))
        return {name: Seconds([seconds * (i + 1)] * rounds) for i, name in enumerate(models)}

    monkeypatch.setattr(inference, "time_models", timed)
    image = with_tokens.examples["Trouser"].model_input
    rows, notes = measure_cost(with_tokens, image)
    assert runs == expected
    host = remove(create_model(MINI, num_tokens=4, depth=2))
    gmacs = [f"{count_macs(model, image) / 1e9:.4f}" for model in (host, with_tokens.model)]
    assert [row[:3] for row in rows[:2]] == [["without", gmacs[0], "1"], ["with", gmacs[1], "1"]]
    assert [row[-1] for row in rows[:2]] == ["1.00 (1.00–1.00)", "0.50 (0.50–0.50)"]
    assert "1 x 28 x 28" in notes
    assert with_tokens.has_tokens
    model = create_model("mixer_mini_patch4_tl8at3_28").eval()  # does not run without
    rows, _ = measure_cost(replace(with_tokens, model=model), torch.zeros(1, 1, 28, 28))
    assert {row[0] for row in rows} == {"with (does not run without)"}


# --- what is shown ------------------------------------------------------------------------------


def test_each_map_is_shown_over_the_image_and_described_in_words(prediction: Prediction) -> None:
    [(block, maps)] = prediction.maps.items()
    images = map_images(prediction, block, 1)
    names = [caption.partition(":")[0] for _, caption in images[1:]]
    assert names == ["token 1", "token 2", "token 3", "token 4", "sum / 4", "colors"]
    shown = maps[0, 1] * 49  # multiples of the even share
    expected = overlay(prediction.image.pixels[0], shown, prediction.scale)
    np.testing.assert_allclose(np.asarray(images[2][0])[8::16, 8::16], expected * 255, atol=0.51)
    row, column = divmod(int(shown.argmax()), 7)
    words = f"row {row + 1} of 7, column {column + 1} of 7, {float(shown.max()):.1f} × even share"
    assert images[2][1] == f"token 2: {words}"
    assert map_numbers(prediction, block, 1)[1][1] == words
    collapsed = replace(prediction.stats[block], pairs=[[1.0] * 4] * 4)
    assert "Warning: tokens 1, 2, 3, 4" in map_notes(block, collapsed)


def test_a_clip_shows_the_maps_of_the_tubelet_that_a_frame_is_in(
    clips: OfferedModel, tmp_path: Path
) -> None:
    clip = clips.pipeline.read(make_video(tmp_path / "a.mp4", frames=20), "a")
    prediction, maps = predict(clips, clip), compute_maps(clips.model, clip)
    each = prediction.frames // len(maps[1])
    torch.testing.assert_close(prediction.row(1, each).maps, maps[1][0])
    torch.testing.assert_close(prediction.row(1, each + 1).maps, maps[1][1])


# --- the page's events --------------------------------------------------------------------------


def test_a_file_is_looked_at_or_else_an_example(page: AppPage, tmp_path: Path) -> None:
    shown = page.look(TL4, str(make_image(tmp_path / "mine.png")), "Trouser")
    assert shown[page.status].startswith(f"mine.png: {TL4} says ")
    assert shown[page.example] is None
    assert len(shown[page.prediction]["value"]) == 10
    hidden = [page.block, page.frame, page.cost]
    assert [shown[component]["visible"] for component in hidden] == [False] * 3
    for given, expected in (("Trouser", "Trouser"), (None, "T-shirt/top")):  # without a file
        shown = page.look(TL4, None, given)
        assert shown[page.status].startswith(f"held-out example, {expected}: {TL4} says ")
        assert shown[page.example] == expected
    plain = page.look(VIT, None, None)
    assert (plain[page.notes], plain[page.maps]["visible"]) == (NO_MAPS, False)


def test_of_a_broken_file_a_message_is_all_that_is_shown(page: AppPage, tmp_path: Path) -> None:
    (tmp_path / "<b>broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    shown = page.look(TL4, str(tmp_path / "<b>broken.png"), None)
    assert 'role="alert">&lt;b&gt;broken.png ' in shown[page.status]
    assert shown[page.state] is None
    for component in (page.prediction, page.maps, page.numbers):
        assert (shown[component]["value"], shown[component]["visible"]) == (None, False)
    assert [*page.measure(shown[page.state])] == [page.cost_notes]


def test_a_file_that_is_refused_is_deleted_unless_another_model_may_take_it(
    page: AppPage, clips: OfferedModel, tmp_path: Path
) -> None:
    broken, whole = tmp_path / "a" / "a.png", tmp_path / "b" / "b.png"
    for path in (broken, whole):
        path.parent.mkdir()
    broken.write_bytes(b"no image")
    assert page.look(TL4, str(broken), None)[page.file] is None
    assert not broken.parent.exists()
    for_clips = make_page(clips)
    assert for_clips.file not in for_clips.look("clips", str(make_image(whole)), None)
    assert whole.exists()


def test_no_folder_of_the_server_is_in_a_message(
    page: AppPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(f"{tmp_path}/inner/mine.png cannot be read")

    monkeypatch.setattr("tokenlearner.commands.app.page.predict", fail)
    status = page.look(TL4, None, None)[page.status]
    assert str(tmp_path) not in status
    assert "mine.png cannot be read" in status


def test_an_unexpected_error_is_printed_to_the_terminal_only(
    page: AppPage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenlearner.commands.app.page.predict", lambda *_: {}["secret"])
    status = page.look(TL4, None, None)[page.status]
    assert "KeyError" in status
    assert "secret" not in status
    assert "KeyError: 'secret'" in capsys.readouterr().err


def test_a_full_disk_of_the_server_is_one_sentence(
    page: AppPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tokenlearner.commands.app.uploads.shutil.copyfile", full)
    clip = str(make_video(tmp_path / "a.mp4"))
    assert "disk is full" in page.look(TL4, clip, None)[page.status]


def test_another_block_and_frame_are_announced(clips: OfferedModel, tmp_path: Path) -> None:
    page = make_page(clips)
    shown = page.look("clips", str(make_video(tmp_path / "a.mp4", frames=20)), None)
    assert (shown[page.block]["visible"], shown[page.frame]["maximum"]) == (True, 8)
    again = page.redraw(shown[page.state], "1", 7)
    expected = map_images(shown[page.state][1], 1, 7)
    assert [caption for _, caption in again[page.maps]["value"]] == [one[1] for one in expected]
    assert again[page.status] == "a.mp4, frame 7 of 8, block 1."
    assert page.maps not in page.redraw(None, None, 1)


# --- serving ------------------------------------------------------------------------------------


def test_options_out_of_range_are_refused_and_by_default_only_this_computer_is_served() -> None:
    config = AppConfig()
    assert (config.host, config.share, config.browser) == ("127.0.0.1", False, False)
    for name, value in [("port", 70_000), *((n, 0) for n in ("port", *vars(UploadLimits())))]:
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            replace(config, **{name: value})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", "::1"])
def test_the_address_that_is_printed_can_be_opened(host: str) -> None:
    address = ip_address(reachable(host).strip("[]").replace("localhost", "127.0.0.1"))
    assert not address.is_unspecified
    assert address.is_loopback or host in ("0.0.0.0", "::")


def test_a_missing_package_or_a_port_that_is_taken_is_refused() -> None:
    for package in ("gradio", "matplotlib"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=r"'\.\[app\]'"), serving(AppConfig()):
                pass
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"{port}"), serving(AppConfig(port=port)):
            pass
