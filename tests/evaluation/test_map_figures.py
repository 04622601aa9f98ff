"""Figures and animations: their layout, what colors mean, and files that play."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torch import Tensor

from tokenlearner.evaluation.map_figures import (
    FigureRow,
    MapScale,
    map_scale,
    overlay,
    patch_size,
    write_animation,
    write_figure,
)
from tokenlearner.utils.validation import plain_text

SCALE = MapScale(4, gates=False)


def row(k: int = 2, label: str = "block 3", h: int = 8, w: int = 8) -> FigureRow:
    maps = torch.rand(k, 4).softmax(-1).unflatten(-1, (2, 2))
    return FigureRow(label, torch.rand(1, h, w), maps)


def lightness(value: float, image: float = 0.5) -> float:
    pixels = overlay(torch.full((1, 4, 4), image), torch.full((2, 2), value), SCALE)
    return float(pixels[0, 0] @ np.array([0.2126, 0.7152, 0.0722]))


def peaked(at: int) -> Tensor:
    maps = torch.zeros(1, 4)
    maps[0, at] = 1
    return maps.unflatten(-1, (2, 2))


# --- scales -------------------------------------------------------------------------------------


def test_weights_are_shown_as_multiples_of_the_even_share() -> None:
    shown = SCALE.shown(torch.full((3, 2, 5), 1 / 10))
    torch.testing.assert_close(shown, torch.ones(4, 2, 5))


def test_gates_are_shown_as_they_are_on_0_to_1() -> None:
    gates = torch.rand(3, 2, 5) * 0.4
    scale = map_scale([FigureRow("", torch.rand(1, 8, 8), gates)], gates=True)
    assert (scale.top, scale.label) == (1, "gate, from 0 to 1")
    assert torch.equal(scale.shown(gates)[:3], gates)


def test_behind_the_maps_comes_their_sum_by_their_count() -> None:
    maps = torch.rand(3, 2, 5)
    torch.testing.assert_close(SCALE.shown(maps)[3], maps.sum(0) * 10 / 3)


def test_even_maps_do_not_look_like_peaks() -> None:
    even = FigureRow("", torch.rand(1, 8, 8), torch.full((2, 2, 2), 0.25))
    assert map_scale([even], gates=False).top == 2


def test_one_scale_reaches_up_to_the_peaks_of_all_rows() -> None:
    even, peak = torch.full((1, 2, 2), 0.25), peaked(0)
    rows = [FigureRow("", torch.rand(1, 8, 8), maps) for maps in (even, peak)]
    assert map_scale(rows, gates=False).top == pytest.approx(4, rel=0.05)


# --- colors ------------------------------------------------------------------------------------


def test_colors_rise_in_lightness_with_the_value_as_in_gray_print() -> None:
    steps = np.diff([lightness(value) for value in np.linspace(0, 4, 9)])
    assert steps.min() > 0.02
    assert steps.max() < 2 * steps.min()


def test_the_image_beneath_changes_lightness_less_than_a_third_of_the_scale() -> None:
    assert 0 < lightness(2, 1.0) - lightness(2, 0.0) < (lightness(4) - lightness(0))
    assert lightness(2, 1.0) - lightness(2, 0.5) < (lightness(4) - lightness(0)) / 3


def test_a_square_is_a_position_and_nothing_is_smoothed() -> None:
    pixels = overlay(torch.full((3, 4, 6), 0.5), torch.tensor([[0.0, 4.0, 1.0]]), SCALE)
    assert pixels.shape == (4, 6, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 3
    assert (pixels[:, :2] == pixels[0, 0]).all()
    assert (pixels[:, 2:4] == pixels[0, 2]).all()


def test_an_edge_that_no_patch_covers_stays_uncolored() -> None:
    pixels = overlay(torch.full((1, 5, 7), 0.5), torch.ones(2, 3), SCALE)
    assert (pixels[4] == 0.5).all()
    assert (pixels[:, 6] == 0.5).all()
    assert (pixels[:4, :6] != 0.5).any(-1).all()


# --- figures ------------------------------------------------------------------------------------


def test_a_figure_is_a_png_with_a_line_for_each_row(tmp_path: Path) -> None:
    one, three = (write_figure(tmp_path / f"{n}.png", [row()] * n, SCALE, "t") for n in (1, 3))
    assert one.read_bytes().startswith(b"\x89PNG")
    assert imread(three).shape[0] - imread(one).shape[0] == pytest.approx(2 * 122, abs=2)


def test_a_figure_has_a_column_for_each_map(tmp_path: Path) -> None:
    two, five = (write_figure(tmp_path / f"{k}.png", [row(k)], SCALE, "t") for k in (2, 5))
    assert imread(five).shape[1] - imread(two).shape[1] == pytest.approx(3 * 125, abs=2)


def columns(path: Path) -> int:
    """Counts the stretches of a figure's middle line that hold anything."""
    inside = (imread(path)[100:140, :, :3].min((0, 2)) < 0.97).astype(int)
    return int((np.diff(inside) == 1).sum())


def test_rows_with_fewer_maps_leave_the_rest_of_their_line_empty(tmp_path: Path) -> None:
    figures = [write_figure(tmp_path / f"{k}.png", [row(k), row(4)], SCALE, "t") for k in (1, 4)]
    assert columns(figures[1]) - columns(figures[0]) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_itself_stands_in_its_own_colors(tmp_path: Path, channels: int) -> None:
    image = torch.zeros(channels, 8, 8)
    image[0] = 1
    figure = write_figure(tmp_path / "a.png", [FigureRow("", image, peaked(0))], SCALE, "t")
    color = [1, 0, 0] if channels == 3 else [1, 1, 1]
    matches = (imread(figure)[90:120, 40:120, :3] == color).all(-1)
    assert matches.mean() > 0.5


def test_other_maps_give_another_figure_and_the_same_ones_the_same(tmp_path: Path) -> None:
    image = torch.full((1, 8, 8), 0.5)
    a, b, c = (
        write_figure(tmp_path / f"{i}.png", [FigureRow("", image, peaked(at))], SCALE, "t")
        for i, at in enumerate((0, 0, 3))
    )
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_a_figure_without_rows_is_refused_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image to draw"):
        write_figure(tmp_path / "a.png", [], SCALE, "t")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="matplotlib"):
        write_figure(tmp_path / "a.png", [row()], SCALE, "t")


# --- animations ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animations(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three time steps, in which the peak goes from the first position on to the third."""
    folder, image = tmp_path_factory.mktemp("animations"), torch.full((1, 8, 8), 0.5)
    time_steps = [[FigureRow(f"frame {i}", image, peaked(i))] for i in range(3)]
    paths = [folder / "a.gif", folder / "a.mp4"]
    assert write_animation(paths, time_steps, SCALE, "title", frames_per_second=5) == paths
    return paths


def gif_frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        frames = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
        return frames


def mp4_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]


def test_a_gif_has_a_frame_for_each_time_step_and_goes_round(animations: list[Path]) -> None:
    with Image.open(animations[0]) as image:
        gif: Any = image
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 200, 0)


@pytest.mark.parametrize("which", [0, 1], ids=["gif", "mp4"])
def test_every_frame_shows_its_own_maps(animations: list[Path], which: int) -> None:
    first, *others = (gif_frames, mp4_frames)[which](animations[which])
    for other in others:
        assert (np.abs(first - other).max(-1) > 40).mean() > 0.005


def test_nothing_moves_when_a_label_grows(tmp_path: Path) -> None:
    time_steps = [
        [FigureRow(label, torch.full((1, 8, 8), 0.5), peaked(0))] for label in ("1", "1\n\n2")
    ]
    (path,) = write_animation([tmp_path / "a.gif"], time_steps, SCALE, "title")
    first, second = gif_frames(path)
    assert (first[:, 40:] == second[:, 40:]).all()


def test_both_show_the_same_at_the_rate(animations: list[Path]) -> None:
    with av.open(str(animations[1])) as video:
        assert video.streams.video[0].average_rate == 5
    for one, other in zip(gif_frames(animations[0]), mp4_frames(animations[1]), strict=True):
        assert np.abs(one - other).mean() < 4


def test_another_kind_of_animation_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end in \.gif or \.mp4"):
        write_animation([tmp_path / "a.gif", tmp_path / "a.webp"], [[row()]], SCALE, "t")
    assert list(tmp_path.iterdir()) == []


def test_an_animation_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no time step to draw"):
        write_animation([tmp_path / "a.gif"], [], SCALE, "t")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="av;"):
        write_animation([tmp_path / "a.mp4"], [[row()]], SCALE, "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pixels", "patch"), [(30, 8), (250, 32), (255, 16), (224, 16), (100, 14), (28, 4), (24, 12)]
)
def test_squares_lie_over_their_patches_where_these_do_not_fill_the_image(
    pixels: int, patch: int
) -> None:
    assert patch_size(pixels, pixels // patch) == patch


def test_names_are_drawn_as_they_are_and_without_control_characters(tmp_path: Path) -> None:
    label = "price_$5_$6\x1b[31m $\\bad$"
    assert write_figure(tmp_path / "a.png", [row(label=label)], MapScale(4, False), "$_$").is_file()
    assert (
        plain_text("a\x1b[31mb\tc") == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}c"
    )
