"""Figures and animations: their layout, what colors mean, and files that play."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
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


def peaked(at: int) -> Tensor:
    maps = torch.zeros(1, 4)
    maps[0, at] = 1
    return maps.unflatten(-1, (2, 2))


# --- scales -------------------------------------------------------------------------------------


def test_weights_are_multiples_of_the_even_share_with_their_sum_by_their_count_behind() -> None:
    torch.testing.assert_close(SCALE.shown(torch.full((3, 2, 5), 1 / 10)), torch.ones(4, 2, 5))
    maps = torch.rand(3, 2, 5)
    torch.testing.assert_close(SCALE.shown(maps)[3], maps.sum(0) * 10 / 3)


def test_gates_are_shown_as_they_are_on_0_to_1() -> None:
    gates = torch.rand(3, 2, 5) * 0.4
    scale = map_scale([FigureRow("", torch.rand(1, 8, 8), gates)], gates=True)
    assert (scale.top, scale.label) == (1, "gate, from 0 to 1")
    assert torch.equal(scale.shown(gates)[:3], gates)


def test_one_scale_reaches_up_to_the_peaks_of_all_rows_and_even_maps_do_not_look_like_some() -> (
    None
):
    even, peak = (
        FigureRow("", torch.rand(1, 8, 8), maps)
        for maps in (torch.full((1, 2, 2), 0.25), peaked(0))
    )
    assert map_scale([even], gates=False).top == 2
    assert map_scale([even, peak], gates=False).top == pytest.approx(4, rel=0.05)


# --- colors ------------------------------------------------------------------------------------


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


def test_other_maps_give_another_figure_and_the_same_ones_the_same(tmp_path: Path) -> None:
    image = torch.full((1, 8, 8), 0.5)
    a, b, c = (
        write_figure(tmp_path / f"{i}.png", [FigureRow("", image, peaked(at))], SCALE, "t")
        for i, at in enumerate((0, 0, 3))
    )
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [[row()]]
    with pytest.raises(ValueError, match="no image to draw"):
        write_figure(tmp_path / "a.png", [], SCALE, "t")
    with pytest.raises(ValueError, match="no time step to draw"):
        write_animation([tmp_path / "a.gif"], [], SCALE, "t")
    with pytest.raises(ValueError, match=r"end in \.gif or \.mp4"):
        write_animation([tmp_path / "a.gif", tmp_path / "a.webp"], one, SCALE, "t")
    for package, name in (("av", "a.mp4"), ("matplotlib", "a.gif")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=package):
            write_animation([tmp_path / name], one, SCALE, "t")
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("which", [0, 1], ids=["gif", "mp4"])
def test_every_frame_shows_its_own_maps(animations: list[Path], which: int) -> None:
    first, *others = (gif_frames, mp4_frames)[which](animations[which])
    for other in others:
        assert (np.abs(first - other).max(-1) > 40).mean() > 0.005


def test_both_show_the_same_at_the_rate(animations: list[Path]) -> None:
    with Image.open(animations[0]) as image:
        assert (image.info["duration"], image.info["loop"]) == (200, 0)
    with av.open(str(animations[1])) as video:
        assert video.streams.video[0].average_rate == 5
    for one, other in zip(gif_frames(animations[0]), mp4_frames(animations[1]), strict=True):
        assert np.abs(one - other).mean() < 4


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
    assert plain_text("a\x1b[31mb\tc\u202e\udce9\n") == "a\\x1b[31mb\\tc\\u202e\\udce9\n"
