"""What the page offers, looks at and shows, and how it is served; without a browser."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_app_uploads import make_image, make_video
from tiny import randomized

from tokenlearner import attention_maps, create_model, load_data, remove, save_model
from tokenlearner.commands._inputs import InputPipeline
from tokenlearner.commands.app import server as app_module
from tokenlearner.commands.app.inference import ALL_TOKENS, measure_cost, predict
from tokenlearner.commands.app.models import (
    RANDOM,
    WITHOUT_CHECKPOINT,
    OfferedModel,
    load_offered,
    offered_sources,
)
from tokenlearner.commands.app.page import AppPage
from tokenlearner.commands.app.server import AppConfig
from tokenlearner.commands.app.uploads import UploadLimits
from tokenlearner.commands.app.view import (
    cost_view,
    map_view,
    numbers_view,
    prediction_view,
    sheet_view,
)
from tokenlearner.commands.maps import compute_maps
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import Seconds
from tokenlearner.evaluation.map_figures import overlay
from tokenlearner.utils.io import write_json

MINI = "vit_mini_patch4_28"
CLASSES = ("T-shirt/top", "Trouser")


def written(folder: Path, tokens: int, data: str = "fashion-mnist-small") -> Path:
    """A checkpoint as `train` leaves one."""
    save_model(randomized(create_model(MINI, num_tokens=tokens, depth=2)), folder)
    write_json(folder / "train.json", {"data": data, "root": None})
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tokenlearner demo` leaves, as far as the page is concerned."""
    root = tmp_path_factory.mktemp("work") / "tokenlearner-demo"
    written(root / "vit", 0)
    written(root / "vit-tl4", 4)
    return root


@pytest.fixture(scope="module")
def offered(demo: Path) -> dict[str, OfferedModel]:
    return load_offered([str(demo)], "cpu")


@pytest.fixture(scope="module")
def with_tokens(offered: dict[str, OfferedModel]) -> OfferedModel:
    return offered["tokenlearner-demo/vit-tl4"]


@pytest.fixture(scope="module")
def page(offered: dict[str, OfferedModel]) -> AppPage:
    return AppPage(offered, UploadLimits(mib=1))


@pytest.fixture(scope="module")
def clips() -> OfferedModel:
    """A model of clips, with two blocks that fuse, and without examples."""
    model = create_model(
        "vivit_mini_patch8x2_32", num_tokens=3, depth=2, at=0, fuse=True, in_chans=1
    )
    intake = InputPipeline((1, 8, 32, 32), (0.5,), (0.5,), 1.0, 8, 1, False, "made up")
    return OfferedModel("clips", randomized(model), intake, None, False, None)


def images(html: str) -> list[tuple[np.ndarray, str]]:
    """The images of a piece of the page, and their alternative texts."""
    tags = re.findall(r"<img [^>]*>", html)
    found = [re.search(r'src="data:image/png;base64,([^"]+)" alt="([^"]*)"', tag) for tag in tags]
    assert all(found), tags
    return [
        (np.asarray(Image.open(io.BytesIO(base64.b64decode(one[1])))), one[2])
        for one in found
        if one
    ]


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


# --- what is offered ----------------------------------------------------------------------------


def test_a_folder_of_the_demo_stands_for_the_models_in_it(demo: Path) -> None:
    assert offered_sources([str(demo)]) == {
        "tokenlearner-demo/vit": str(demo / "vit"),
        "tokenlearner-demo/vit-tl4": str(demo / "vit-tl4"),
    }


def test_without_checkpoints_the_demos_of_the_working_folder_are_offered(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo.parent)
    assert [*offered_sources([])] == ["tokenlearner-demo/vit", "tokenlearner-demo/vit-tl4"]


def test_without_anything_a_model_with_random_weights_is_offered_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [model] = load_offered([], "cpu").values()
    assert model.name == f"{WITHOUT_CHECKPOINT} (random weights)"
    assert (model.is_random, model.has_tokens) == (True, True)
    status = AppPage({model.name: model}, UploadLimits()).look(False, model.name, None, None)[1]
    assert words(status).endswith(words(RANDOM))


def test_checkpoints_of_the_same_name_are_both_offered(demo: Path, tmp_path: Path) -> None:
    other = shutil.copytree(demo / "vit", tmp_path / "vit")
    told = [str(demo / "vit"), str(other)]
    assert [*offered_sources(told).values()] == told


def test_models_with_learned_tokens_come_first(offered: dict[str, OfferedModel]) -> None:
    assert [one.has_tokens for one in offered.values()] == [True, False]


def test_trained_models_are_not_called_random(offered: dict[str, OfferedModel]) -> None:
    assert [one.is_random for one in offered.values()] == [False, False]


def test_a_model_knows_the_names_of_its_classes(with_tokens: OfferedModel) -> None:
    assert (with_tokens.class_name(0), with_tokens.class_name(1)) == CLASSES


def test_classes_without_names_are_numbered(clips: OfferedModel) -> None:
    assert clips.class_name(3) == "class 3"


def test_a_model_of_another_set_is_not_given_the_names_of_the_examples(tmp_path: Path) -> None:
    [model] = load_offered([str(written(tmp_path / "a", 2, data="hfds/a"))], "cpu").values()
    assert (model.classes, model.examples[:2]) == (None, [*CLASSES])


def test_an_example_is_what_the_model_is_judged_on(with_tokens: OfferedModel) -> None:
    data = load_data("fashion-mnist-small", "test")
    index = int((data.labels == 1).nonzero()[0])
    expected, _ = data.get_batch(torch.tensor([index]))
    torch.testing.assert_close(with_tokens.example("Trouser").taken, expected)


def test_an_unknown_example_is_refused(with_tokens: OfferedModel) -> None:
    with pytest.raises(ValueError, match="no example 'Hat', expected one of: T-shirt/top, Trouser"):
        with_tokens.example("Hat")


@pytest.mark.parametrize("order", ["bcthw", "btchw"])
def test_a_model_of_clips_is_tried_on_the_clips_it_is_judged_on(order: str) -> None:
    pytest.importorskip("skimage")
    data = load_data("moving-photographs", "test", frames=4, img_size=16)
    intake = InputPipeline((1, 4, 16, 16), data.mean, data.std, 1.0, 4, 1, order == "btchw", "")
    model = OfferedModel("clips", torch.nn.Identity(), intake, data.classes, False, data)
    seen = model.example("right")
    expected, _ = data.get_batch((data.labels == 1).nonzero()[:1, 0])
    taken = seen.taken.transpose(1, 2) if order == "btchw" else seen.taken
    torch.testing.assert_close(taken, expected)
    assert (seen.seen.shape, seen.is_video) == ((4, 1, 16, 16), True)


def test_a_missing_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        load_offered(["nowhere"], "cpu")


# --- what is looked at --------------------------------------------------------------------------


def test_the_prediction_and_the_maps_are_those_of_the_model(with_tokens: OfferedModel) -> None:
    seen = with_tokens.example("Trouser")
    looked = predict(with_tokens, seen)
    torch.testing.assert_close(looked.shares, with_tokens.model(seen.taken)[0].softmax(-1).detach())
    torch.testing.assert_close(looked.maps, attention_maps(with_tokens.model, seen.taken))


def test_a_model_without_learned_tokens_has_a_prediction_and_no_maps(
    offered: dict[str, OfferedModel],
) -> None:
    plain = offered["tokenlearner-demo/vit"]
    looked = predict(plain, plain.example("Trouser"))
    assert (looked.maps, looked.blocks, len(looked.shares)) == ({}, [], 10)


def test_of_a_clip_a_model_of_images_predicts_the_mean(
    with_tokens: OfferedModel, tmp_path: Path
) -> None:
    path = make_video(tmp_path / "a.mp4", frames=30)
    seen = with_tokens.intake.read(path, "a")
    looked = predict(with_tokens, seen)
    expected = with_tokens.model(seen.taken).softmax(-1).mean(0).detach()
    torch.testing.assert_close(looked.shares, expected)
    assert (looked.frames, looked.is_video) == (16, True)


def test_a_model_that_makes_no_numbers_is_refused(with_tokens: OfferedModel) -> None:
    broken = create_model(MINI, num_tokens=2, depth=1).eval()
    with torch.no_grad():
        for parameter in broken.get_classifier().parameters():
            parameter.fill_(float("nan"))
    model = OfferedModel("broken", broken, with_tokens.intake, None, False, None)
    with pytest.raises(ValueError, match="broken makes no finite numbers of it"):
        predict(model, with_tokens.example("Trouser"))


def test_a_token_is_shown_as_multiples_of_the_even_share(with_tokens: OfferedModel) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    block = looked.blocks[0]
    maps = looked.maps[int(block)][0]
    torch.testing.assert_close(looked.shown(block, "2", 1), maps[1] * 49)
    torch.testing.assert_close(looked.shown(block, ALL_TOKENS, 1), maps.mean(0) * 49)


@pytest.mark.parametrize(
    ("block", "token", "frame", "expected"),
    [
        ("9", "1", 1, "block is '9', expected one of '1'"),
        ("1", "5", 1, "token is '5', expected one of 'sum', '1', '2', '3', '4'"),
        ("1", "1", 2, "frame is 2, expected 1 to 1"),
    ],
)
def test_what_there_is_not_cannot_be_shown(
    block: str, token: str, frame: int, expected: str, with_tokens: OfferedModel
) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    with pytest.raises(ValueError, match=re.escape(expected)):
        looked.shown(block, token, frame)


def test_a_clip_shows_the_maps_of_the_tubelet_that_a_frame_is_in(
    clips: OfferedModel, tmp_path: Path
) -> None:
    seen = clips.intake.read(make_video(tmp_path / "a.mp4", frames=20), "a")
    looked, maps = predict(clips, seen), compute_maps(clips.model, seen)
    assert looked.blocks == ["0", "1"]
    each = looked.frames // len(maps[1])
    torch.testing.assert_close(looked.rows(each)[1].maps, maps[1][0])
    torch.testing.assert_close(looked.rows(each + 1)[1].maps, maps[1][1])


# --- cost ---------------------------------------------------------------------------------------


def test_the_cost_without_tokens_is_that_of_the_host(with_tokens: OfferedModel) -> None:
    seen = with_tokens.example("Trouser")
    report = measure_cost(with_tokens, seen.taken)
    host = remove(create_model(MINI, num_tokens=4, depth=2))
    expected = [count_macs(model, seen.taken) / 1e9 for model in (host, with_tokens.model)]
    assert [one.gmacs for one in report.costs] == expected
    assert [one.name for one in report.costs] == ["without learned tokens", "with learned tokens"]
    assert (report.size, report.remark) == ("1 x 28 x 28", "")


def test_measuring_leaves_the_learned_tokens_in_the_model(with_tokens: OfferedModel) -> None:
    measure_cost(with_tokens, with_tokens.example("Trouser").taken)
    assert with_tokens.has_tokens


def test_every_run_that_is_reported_was_made(
    with_tokens: OfferedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    def timed(models: dict[str, Any], images: torch.Tensor, rounds: int) -> dict[str, Seconds]:
        made.append((len(images), rounds))
        return {name: Seconds([0.001 * (i + 1)] * rounds) for i, name in enumerate(models)}

    monkeypatch.setattr("tokenlearner.commands.app.inference.time_models", timed)
    report = measure_cost(with_tokens, with_tokens.example("Trouser").taken)
    assert made == [(1, 2), (1, 30), (32, 10)]
    assert report.rounds == 30
    assert [one.latency_ms.median for one in report.costs] == [1.0, 2.0]
    assert [one.speedup.median for one in report.costs] == [1.0, 0.5]


def test_a_slow_model_is_measured_a_few_times_and_not_in_a_batch(
    with_tokens: OfferedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    def timed(models: dict[str, Any], images: torch.Tensor, rounds: int) -> dict[str, Seconds]:
        made.append((len(images), rounds))
        return {name: Seconds([1.0] * rounds) for name in models}

    monkeypatch.setattr("tokenlearner.commands.app.inference.time_models", timed)
    report = measure_cost(with_tokens, with_tokens.example("Trouser").taken)
    assert made == [(1, 2), (1, 3)]
    assert "–" in cost_view(report)


def test_a_model_that_cannot_be_without_tokens_is_measured_alone() -> None:
    model = create_model("mixer_mini_patch4_tl8at3_28").eval()
    intake = InputPipeline((1, 28, 28), (0.5,), (0.5,), 1.0, 16, 1, False, "")
    offered = OfferedModel("mixer", model, intake, None, False, None)
    report = measure_cost(offered, torch.zeros(1, 1, 28, 28))
    assert len(report.costs) == 1
    assert report.remark.startswith("It does not run without its learned tokens")
    assert report.remark in words(cost_view(report))


# --- what is shown ------------------------------------------------------------------------------


def test_the_map_that_is_shown_is_the_chosen_tokens(with_tokens: OfferedModel) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    block = looked.blocks[0]
    (_, _), (shown, alt), (_, bar) = images(map_view(looked, block, "2", 1))
    expected = overlay(looked.seen[0], looked.shown(block, "2", 1), looked.scale)
    np.testing.assert_allclose(shown[8::16, 8::16], expected * 255, atol=0.51)
    assert alt.startswith("Map of token 2 over the image. Strongest at row ")
    assert bar.startswith("Colors from dark blue for 0 to yellow for ")


def test_the_words_say_where_a_token_looks(with_tokens: OfferedModel) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    shown = looked.shown(looked.blocks[0], "1", 1)
    row, column = divmod(int(shown.argmax()), 7)
    share = 100 * float(shown.max() / 49)
    expected = (
        f"Strongest at row {row + 1} of 7, column {column + 1} of 7: {float(shown.max()):.1f} "
        f"times the even share, {share:.0f} % of its weight."
    )
    assert expected in words(map_view(looked, looked.blocks[0], "1", 1))


def test_all_maps_are_shown_with_their_sum_each_with_its_alternative_text(
    with_tokens: OfferedModel,
) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    alts = [alt for _, alt in images(sheet_view(looked, 1))]
    starts = [*(f"Map of token {i}. Strongest" for i in (1, 2, 3, 4)), "Map of sum / 4. Strongest"]
    assert [alt.startswith(start) for alt, start in zip(alts, starts, strict=True)] == [True] * 5


def test_the_numbers_are_those_of_the_maps(with_tokens: OfferedModel) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    [stats] = looked.stats.values()
    text = words(numbers_view(looked, 1))
    assert f"Overlap of two tokens, mean: {stats.overlap:.2f}." in text
    assert all(f"{100 * share:.0f} %" in text for share in stats.effective_share)
    assert stats.alike is not None
    assert f"{stats.alike[0]:.2f}" in text


def test_collapsed_tokens_are_warned_of(with_tokens: OfferedModel) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    [(block, stats)] = looked.stats.items()
    looked.stats[block] = replace(stats, pairs=[[1.0] * 4] * 4)
    assert "Warning: tokens 1, 2, 3, 4 have collapsed" in words(numbers_view(looked, 1))


def test_a_frame_is_named_in_every_part(clips: OfferedModel, tmp_path: Path) -> None:
    looked = predict(clips, clips.intake.read(make_video(tmp_path / "a.mp4", frames=20), "a"))
    parts = (map_view(looked, "1", "3", 5), sheet_view(looked, 5))
    assert all("frame 5 of 8" in words(part) for part in parts)
    assert "From frame to frame:" in words(numbers_view(looked, 5))


def test_the_classes_with_the_largest_shares_are_told_in_order(with_tokens: OfferedModel) -> None:
    looked = predict(with_tokens, with_tokens.example("Trouser"))
    found = re.findall(r"([\d.]+) %", words(prediction_view(with_tokens, looked)))
    expected = (100 * looked.shares).sort(descending=True).values[:5]
    assert found == [f"{share:.1f}" for share in expected.tolist()]


@pytest.mark.parametrize("name", ["<script>x</script>.png", '" onerror="x.png'])
def test_the_name_of_a_file_cannot_become_a_part_of_the_page(
    name: str, with_tokens: OfferedModel, page: AppPage
) -> None:
    seen = with_tokens.example("Trouser")
    looked = predict(with_tokens, type(seen)(name, seen.seen, seen.taken, False))
    html = map_view(looked, looked.blocks[0], "1", 1)
    assert name not in html
    assert "<script" not in page.look(False, with_tokens.name, f"/nowhere/{name}", None)[1]


# --- the page's events --------------------------------------------------------------------------

STATE, STATUS, PREDICTION, MAP, SHEET, NUMBERS, TOKEN, BLOCK, FRAME, EXAMPLE, FILE = range(11)
TL4, VIT = "tokenlearner-demo/vit-tl4", "tokenlearner-demo/vit"


def test_a_file_is_looked_at_and_the_example_is_let_go(page: AppPage, tmp_path: Path) -> None:
    shown = page.look(False, TL4, str(make_image(tmp_path / "mine.png")), "Trouser")
    assert words(shown[STATUS]).startswith(f"mine.png: {TL4} says ")
    assert shown[EXAMPLE]["value"] is None
    assert "value" not in shown[FILE]


def test_an_example_is_looked_at_and_the_file_is_let_go(page: AppPage, tmp_path: Path) -> None:
    shown = page.look(True, TL4, str(make_image(tmp_path / "mine.png")), "Trouser")
    assert words(shown[STATUS]).startswith(f"Trouser: {TL4} says ")
    assert (shown[EXAMPLE]["value"], shown[FILE]["value"]) == ("Trouser", None)
    assert "its label is Trouser" in words(shown[PREDICTION])


def test_without_a_file_the_first_example_is_looked_at(page: AppPage) -> None:
    shown = page.look(False, TL4, None, "of another model")
    assert shown[EXAMPLE]["value"] == "T-shirt/top"
    assert shown[TOKEN]["choices"] == ["sum", "1", "2", "3", "4"]
    assert (shown[BLOCK]["visible"], shown[FRAME]["visible"]) == (False, False)


def test_a_model_without_tokens_says_that_there_are_no_maps(page: AppPage) -> None:
    shown = page.look(False, VIT, None, None)
    assert "This model has no learned tokens, so there are no maps." in words(shown[MAP])
    assert (shown[SHEET], shown[NUMBERS], shown[TOKEN]["visible"]) == ("", "", False)


def test_a_broken_file_gives_a_message_and_shows_nothing_else(
    page: AppPage, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    shown = page.look(False, TL4, str(tmp_path / "broken.png"), None)
    assert "broken.png starts like PNG, but cannot be read" in words(shown[STATUS])
    assert 'role="alert"' in shown[STATUS]
    assert shown[STATE] is None
    assert [*shown[PREDICTION:TOKEN]] == [""] * 4
    assert page.measure(TL4, shown[STATE]) == ""


def test_what_nobody_expected_is_told_to_the_terminal_only(
    page: AppPage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenlearner.commands.app.page.look_with", lambda *_: {}["secret"])
    shown = page.look(False, TL4, None, None)
    message = "This went wrong on the server (KeyError); try another file."
    assert words(shown[STATUS]) == message
    assert "KeyError: 'secret'" in capsys.readouterr().err


def test_a_model_of_clips_without_anything_asks_for_a_clip(clips: OfferedModel) -> None:
    shown = AppPage({"clips": clips}, UploadLimits()).look(False, "clips", None, None)
    assert words(shown[STATUS]) == "choose a clip to look at"


def test_another_token_is_drawn_and_announced(page: AppPage) -> None:
    state = page.look(False, TL4, None, None)[STATE]
    views = page.redraw(False, state, None, "3", 1)
    assert views[0] == map_view(state[0], "1", "3", 1)
    assert words(views[-1]) == "T-shirt/top: token 3."


def test_random_weights_are_named_whatever_token_is_shown(page: AppPage) -> None:
    looked, taken, _ = page.look(False, TL4, None, None)[STATE]
    status = page.redraw(False, (looked, taken, True), None, "3", 1)[-1]
    assert words(status) == f"T-shirt/top: token 3. {words(RANDOM)}"


def test_a_model_of_other_classes_is_not_told_the_examples_label(
    with_tokens: OfferedModel,
) -> None:
    other = replace(with_tokens, classes=None)
    shown = AppPage({other.name: other}, UploadLimits()).look(True, other.name, None, "Trouser")
    assert "label" not in words(shown[PREDICTION])
    assert "names are not known." in words(shown[PREDICTION])


def test_another_token_leaves_its_control_alone_so_that_the_keyboard_stays_there(
    page: AppPage,
) -> None:
    state = page.look(False, TL4, None, None)[STATE]
    assert set(page.redraw(False, state, None, "3", 1)[3]) == {"__type__"}


def test_another_block_brings_its_tokens(clips: OfferedModel, tmp_path: Path) -> None:
    page = AppPage({"clips": clips}, UploadLimits())
    shown = page.look(False, "clips", str(make_video(tmp_path / "a.mp4", frames=20)), None)
    assert (shown[BLOCK]["visible"], shown[FRAME]["maximum"]) == (True, 8)
    views = page.redraw(True, shown[STATE], "1", "9", 7)
    assert views[0] == map_view(shown[STATE][0], "1", ALL_TOKENS, 7)
    assert views[3]["value"] == ALL_TOKENS


def test_nothing_is_drawn_before_anything_is_looked_at(page: AppPage) -> None:
    assert all(set(one) == {"__type__"} for one in page.redraw(False, None, None, "1", 1))


# --- serving ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"port": 0}, "port is 0, expected an integer of 1 or more"),
        ({"port": 70_000}, "port is 70000, expected 1 to 65535"),
        ({"max_upload_mib": 0}, "max_upload_mib is 0"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"max_frames": -1}, "max_frames is -1"),
        ({"max_seconds": 0}, "max_seconds is 0"),
    ],
)
def test_options_out_of_range_are_refused(told: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        AppConfig(**told)


def test_by_default_only_this_computer_can_open_the_page() -> None:
    config = AppConfig()
    assert (config.host, config.share, config.browser) == ("127.0.0.1", False, False)


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "find_spec", lambda _: None)
    with (
        pytest.raises(ValueError, match=r"run pip install 'tokenlearner\[app\]'"),
        app_module.serving(AppConfig()),
    ):
        pass


def test_a_port_that_is_taken_is_refused_where_it_was_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"has no free port of {port} .*pass another port"),
            app_module.serving(AppConfig(port=port)),
        ):
            pass


def test_a_port_that_is_taken_is_passed_over_where_none_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(app_module, "FIRST_PORT", port)
        assert port < app_module._free_port(AppConfig()) < port + 100


def test_settings_of_the_environment_are_put_back_and_uploads_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADIO_SHARE", "mine")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    with app_module._room_for_uploads():
        room = Path(os.environ["GRADIO_TEMP_DIR"])
        (room / "upload").mkdir()
        assert (os.environ["GRADIO_SHARE"], os.environ["GRADIO_ANALYTICS_ENABLED"]) == (
            "False",
        ) * 2
    assert os.environ["GRADIO_SHARE"] == "mine"
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ
    assert not (room / "upload").exists()
