"""What `tokenlearner maps` does: images and videos become sheets of maps, and numbers about them.

Axes: `t` frames as the maps have them, `k` tokens, `h w` grid.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import UnreadableFile
from ..evaluation.map_figures import (
    FigureRow,
    check_matplotlib,
    map_scale,
    write_animation,
    write_figure,
)
from ..evaluation.map_stats import AttentionStats, map_stats
from ..evaluation.maps import attention_maps, has_gates
from ..models.insertion import wrapped_blocks
from ..utils.io import write_json
from ..utils.validation import check_choice, check_count, require
from ._inputs import InputPipeline, MapInput, input_pipeline, is_video, list_inputs
from ._map_table import ByKind, counted, stats_numbers, stats_remarks, stats_table
from ._models import load_sized

ANIMATIONS: dict[str, tuple[str, ...]] = {
    "both": (".gif", ".mp4"),
    "gif": (".gif",),
    "mp4": (".mp4",),
    "none": (),
}
MAX_TIME_STEPS = 8  # of a video that its sheet shows


@dataclass(frozen=True)
class MapsConfig:
    """Draws where learned tokens look, and measures how far they differ.

    Args:
        model: A checkpoint that `train` or `save_model` wrote, or a model's name (random weights).
        source: An image, a video, or a folder of them.
        out: Folder for the sheets, the animations and maps.json.
        img_size: Height and width of what the model sees; 0 leaves them as the model has them.
        frames: Frames of a video that a model of images looks at; None is 16.
        stride: Frames of the video from one of these to the next, 0 spreads them over the whole
            video; None is as it was trained on videos or clips, or 4.
        animation: Of videos: both, gif, mp4 or none.
        frames_per_second: How fast the animations run.
        limit: Files of a folder to take, the first ones by name.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range, or there is no such kind of animation.
    """

    model: str
    source: str
    out: str
    img_size: int = 0
    frames: int | None = None
    stride: int | None = None
    animation: str = "both"
    frames_per_second: int = 4
    limit: int = 20
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("animation", self.animation, list(ANIMATIONS))
        for name, value in (("frames_per_second", self.frames_per_second), ("limit", self.limit)):
            check_count(name, value)
        for name, least in (("img_size", 0), ("stride", 0), ("frames", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)


DrawnFile = tuple[MapInput, dict[int, Tensor]]  # what was looked at, and `t k h w` for each block


def run_maps(
    config: MapsConfig, loaded: tuple[nn.Module, Sequence[int]] | None = None
) -> tuple[Any, ...]:
    """Draws the maps of a model on files, and measures them.

    A file of a folder that cannot be read is left out and named. Everything else that does not fit
    is refused before anything is drawn.

    Args:
        config: What to look at.
        loaded: A model of yours, and `c h w` of its images or `c t h w` of its clips, in place of
            loading `config.model`, which is then but a name. Images are normalized as its
            `pretrained_cfg` says (`mean`, `std`, `crop_pct`), or by ImageNet's numbers.

    Returns:
        A table for rich, and sentences on what was drawn and what is remarkable.

    Raises:
        ValueError: The model has no learned tokens or does not take what the source holds, nothing
            can be read, or `out` cannot be written to.
    """
    paths = list_inputs(config.source)
    _check_out(Path(config.out).expanduser(), Path(config.source).expanduser())
    check_matplotlib()
    model, size = loaded or load_sized(config.model, config.img_size, config.device)
    _check_tokens(model, config.model)
    saved = None if loaded else config.model
    intake = input_pipeline(model, size, saved, frames=config.frames, stride=config.stride)
    fitting = _fitting(paths, intake, config)
    drawn, broken = _look_and_draw(model, intake, fitting, config)
    stats = {kind: _measured(drawn, videos) for kind, videos in (("image", False), ("video", True))}
    said = [*stats_remarks(stats), *(f"left out: {reason}" for reason in broken)]
    if len(paths) > len(fitting):
        more = counted(len(paths) - len(fitting), "more file")
        said.append(f"not looked at: {more} in {config.source}")
    if not loaded and not Path(config.model).exists() and "/" not in config.model:
        said.append(f"{config.model} is a name and no checkpoint: its weights are random")
    _write_numbers(config, model, intake, stats, said)
    return stats_table(stats), *_told(config, has_gates(model), intake, len(drawn)), *said


def compute_maps(model: nn.Module, seen: MapInput) -> dict[int, Tensor]:
    """Runs a model on what one file holds: its maps, `t k h w` for each block with a learner.

    Raises:
        ValueError: The model does not take it.
    """
    like = next(model.parameters())
    try:
        maps = attention_maps(model, seen.taken.to(like))
    except (AssertionError, RuntimeError) as error:  # timm's and torch's, where sizes differ
        raise ValueError(
            f"the model does not take {list(seen.taken.shape)} ({error}); pass img_size, or a "
            "model that was built for it"
        ) from error
    return {i: (one[0] if one.ndim == 5 else one).float().cpu() for i, one in maps.items()}


def time_step_rows(seen: MapInput, maps: dict[int, Tensor], frame: int) -> list[FigureRow]:
    """A row for each block, of the frame counted from 0; a tubelet's frames share its maps."""
    t = len(next(iter(maps.values())))
    tubelet = min(frame // (len(seen.seen) // t), t - 1)
    when = f"frame {frame + 1}\n" if seen.is_video else ""
    return [
        FigureRow(f"{when}block {i}", seen.seen[frame], one[tubelet]) for i, one in maps.items()
    ]


def _look_and_draw(
    model: nn.Module, intake: InputPipeline, paths: dict[str, Path], config: MapsConfig
) -> tuple[list[DrawnFile], list[str]]:
    """Looks at and draws one file after the other; also says which ones cannot be read."""
    drawn: list[DrawnFile] = []
    broken: list[str] = []
    for name, path in paths.items():
        try:
            seen = intake.read(path, name)
        except UnreadableFile as error:
            broken.append(str(error))
            continue
        maps = compute_maps(model, seen)
        _draw(seen, maps, has_gates(model), config)
        nothing = torch.empty(0)  # pixels are of no use from here on
        drawn.append((MapInput(name, nothing, nothing, seen.is_video), maps))
    require(bool(drawn), f"nothing in {config.source} can be read: {(broken or [''])[0]}")
    return drawn, broken


def _draw(seen: MapInput, maps: dict[int, Tensor], gates: bool, config: MapsConfig) -> None:
    """Writes the sheet, and of a video the animations, with one scale."""
    t, frames = len(next(iter(maps.values()))), len(seen.seen)
    each = frames // t  # frames of a tubelet
    moments = [time_step_rows(seen, maps, frame) for frame in range(t * each)]
    chosen = torch.linspace(0, t - 1, min(t, MAX_TIME_STEPS)).round().int().tolist()
    middle = [moments[i * each + each // 2] for i in chosen]
    rows = [row for moment in middle for row in moment]
    scale = map_scale([row for moment in moments[::each] for row in moment], gates)
    base = Path(config.out).expanduser() / seen.name
    write_figure(f"{base}.png", rows, scale, seen.name)
    if seen.is_video and (ends := ANIMATIONS[config.animation]):
        paths = [f"{base}{end}" for end in ends]
        write_animation(paths, moments, scale, seen.name, config.frames_per_second)


def _check_out(out: Path, source: Path) -> None:
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    require(there.is_dir(), f"{out} cannot be made: {there} is a file; pass another folder")
    require(os.access(there, os.W_OK | os.X_OK), f"{there} cannot be written to; pass another out")
    inside = source.is_dir() and out.resolve().is_relative_to(source.resolve())
    require(not inside, f"{out} is in {source}, whose images are read; pass a folder outside")


def _check_tokens(model: nn.Module, name: str) -> None:
    require(
        bool(wrapped_blocks(model)),
        f"{name} has no learned tokens to look at; `tokenlearner train --model {name} --insert 8` "
        "adds some, and `tokenlearner models '*tl*'` lists models that have them",
    )


def _fitting(paths: dict[str, Path], intake: InputPipeline, config: MapsConfig) -> dict[str, Path]:
    """The first files that the model takes; a model of clips takes no images."""
    found = {n: p for n, p in paths.items() if is_video(p) or not intake.takes_clips}
    require(
        bool(found),
        f"{config.model} takes clips of {intake.frames} frames, but {config.source} holds images "
        "only; pass a video",
    )
    found = dict([*found.items()][: config.limit])
    needs_av = any(map(is_video, found.values()))
    require(
        not needs_av or find_spec("av") is not None,
        "videos need PyAV; run pip install 'tokenlearner[video]'",
    )
    return found


def _measured(drawn: Sequence[DrawnFile], videos: bool) -> dict[int, AttentionStats]:
    """The numbers of each block, over all images or over all videos."""
    chosen = [maps for seen, maps in drawn if seen.is_video == videos]
    blocks = chosen[0] if chosen else {}
    return {
        i: map_stats((torch.stack if videos else torch.cat)([maps[i] for maps in chosen]))
        for i in blocks
    }


def _told(config: MapsConfig, gates: bool, intake: InputPipeline, n: int) -> list[str]:
    """What was drawn, and what the numbers mean."""
    scale = "gates from 0 to 1" if gates else "multiples of the even share 1/n"
    return [
        "overlap: of two tokens' maps, Bhattacharyya, 1 is the same map; bits: a map's entropy; "
        "spread: the share of the image that it covers; next, other: a token's overlap with "
        "itself in the next frame, in another file. Means over tokens; maps.json has each.",
        f"The sheets of {counted(n, 'file')} are in {config.out}; colors are {scale}.",
        f"The model took {' x '.join(map(str, intake.size))}, normalized as {intake.told_by}.",
    ]


def _write_numbers(
    config: MapsConfig, model: nn.Module, intake: InputPipeline, stats: ByKind, said: list[str]
) -> None:
    maps = "gates" if has_gates(model) else "distributions"
    write_json(
        Path(config.out).expanduser() / "maps.json",
        {
            "config": asdict(config),
            "intake": asdict(intake),
            "maps": maps,
            "stats": stats_numbers(stats),
            "remarks": said,
        },
    )
