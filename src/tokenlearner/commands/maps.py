"""`tokenlearner maps`: figures of the maps of images and videos, and numbers about them.

Axes: `t` frames as the maps have them, `k` tokens, `h w` grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.dataset import UnreadableFile
from ..evaluation.map_figures import FigureRow, map_scale, write_animation, write_figure
from ..evaluation.map_stats import AttentionStats, map_stats
from ..evaluation.maps import attention_maps, has_gates
from ..models.insertion import wrapped_blocks
from ..utils.imports import require_package
from ..utils.io import check_output_folder, without_folders, write_json
from ..utils.validation import check_count, check_literals, counted, require
from ._console import console, show_progress
from ._inputs import InputPipeline, MapInput, input_pipeline, is_video, list_inputs
from ._models import load_sized
from ._tables import plain_table

ANIMATIONS = {"both": (".gif", ".mp4"), "gif": (".gif",), "mp4": (".mp4",), "none": ()}
MAX_TIME_STEPS = 8  # of a video, on its figure
HEADER = ("of", "block", "tokens", "overlap", "most alike", "bits", "spread", "next", "other")
LEGEND = (
    "overlap: of two tokens' maps, Bhattacharyya, 1 is the same map; bits: a map's entropy; "
    "spread: the share of the image that it covers; next, other: a token's overlap with itself in "
    "the next frame, in another file. Means over tokens; maps.json has each."
)

ImageMaps = dict[int, Tensor]  # `t k h w` for each block with a learner
StatsByKind = dict[str, dict[int, AttentionStats]]  # by "image" and "video", then by block


@dataclass(frozen=True)
class MapsConfig:
    """Draws where learned tokens look, and measures how far they differ.

    Args:
        model: A checkpoint that `train` or `save_model` wrote, or a model's name (random weights).
        source: An image, a video, or a folder of them.
        follow_links: Take files out of a folder too, where links in it lead there.
        out: Folder for the figures, the animations and maps.json.
        img_size: Height and width of the model's images; 0 leaves them as the model has them.
        frames: Frames of a video, for a model of images; None is 16.
        stride: Frames of the video from one of these to the next, 0 spreads them over the whole
            video; None is as it was trained on videos or clips, or 4.
        animation: Of videos: both, gif, mp4 or none.
        frames_per_second: Speed of the animations.
        limit: Files of a folder to take, the first ones by name.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range, or there is no such kind of animation.
    """

    model: str
    source: str
    out: str
    follow_links: bool = False
    img_size: int = 0
    frames: int | None = None
    stride: int | None = None
    animation: Literal["both", "gif", "mp4", "none"] = "both"
    frames_per_second: int = 4
    limit: int = 20
    device: str = "auto"

    def __post_init__(self) -> None:
        check_literals(self)
        least = {"img_size": 0, "frames": 1, "stride": 0, "frames_per_second": 1, "limit": 1}
        for name, minimum in least.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), minimum)

    @property
    def folder(self) -> Path:
        """`out` as a path."""
        return Path(self.out).expanduser()


def maps_command(arguments: Sequence[str]) -> None:
    """Runs `tokenlearner maps`."""
    from ._arguments import read_config

    console().print(*run_maps(read_config("maps", MapsConfig, arguments)), sep="\n")


def run_maps(
    config: MapsConfig, loaded: tuple[nn.Module, Sequence[int]] | None = None
) -> tuple[Any, ...]:
    """Draws the maps of a model on files, and measures them.

    Unreadable files of a folder are left out and named. Everything else that does not fit raises
    before anything is drawn.

    Args:
        config: Options of the command.
        loaded: A model of yours, and `c h w` of its images or `c t h w` of its clips, in place of
            loading `config.model`, which is then but a name. Images are normalized as its
            `pretrained_cfg` says (`mean`, `std`, `crop_pct`), or by ImageNet's numbers.

    Returns:
        A table for rich, and lines: the legend, the files, and warnings.

    Raises:
        ValueError: The model has no learned tokens or does not take the source's files, none of
            them can be read, or `out` cannot be written to.
    """
    paths = list_inputs(config.source, config.follow_links)
    _check_out(config.folder, Path(config.source).expanduser())
    require_package("matplotlib", "train", "drawing maps")
    model, size = loaded or load_sized(config.model, config.img_size, config.device)
    _check_tokens(model, config.model)
    saved = None if loaded else config.model
    pipeline = input_pipeline(model, size, saved, frames=config.frames, stride=config.stride)
    chosen = _choose(paths, pipeline, config)
    drawn, unreadable = _draw_all(model, pipeline, chosen, config)
    stats = {kind: _stats(drawn, videos) for kind, videos in (("image", False), ("video", True))}
    remarks = [*_warnings(stats), *(f"left out: {reason}" for reason in unreadable)]
    if rest := len(paths) - len(chosen):
        more = counted(rest, "more file")
        remarks.append(f"beyond --limit {config.limit}: {more} in {config.source}")
    if not loaded and not Path(config.model).exists() and "/" not in config.model:
        remarks.append(f"{config.model} is a name and no checkpoint: its weights are random")
    content = {
        "config": asdict(config),
        "intake": asdict(pipeline),
        "maps": "gates" if has_gates(model) else "distributions",
        "stats": stats_json(stats),
        "remarks": remarks,
    }
    write_json(config.folder / "maps.json", without_folders(content))
    scale = "gates from 0 to 1" if has_gates(model) else "multiples of the even share 1/n"
    return (
        stats_table(stats),
        LEGEND,
        f"The figures of {counted(len(drawn), 'file')} are in {config.out}; colors are {scale}.",
        f"The model took {' x '.join(map(str, pipeline.size))}, normalized as {pipeline.origin}.",
        *remarks,
    )


def compute_maps(model: nn.Module, item: MapInput) -> ImageMaps:
    """Runs a model on one file, and returns its maps, `t k h w` for each block with a learner.

    Raises:
        ValueError: The model does not take it.
    """
    like = next(model.parameters())
    try:
        maps = attention_maps(model, item.model_input.to(like))
    except (AssertionError, RuntimeError) as error:  # timm's and torch's, where sizes differ
        raise ValueError(
            f"the model does not take {list(item.model_input.shape)} ({error}); pass img_size, "
            "or a model that was built for it"
        ) from error
    return {i: (x[0] if x.ndim == 5 else x).float().cpu() for i, x in maps.items()}


def time_step_rows(item: MapInput, maps: ImageMaps, frame: int) -> list[FigureRow]:
    """Returns a row for each block, of the frame counted from 0; a tubelet's frames share maps."""
    t = len(next(iter(maps.values())))
    tubelet = min(frame // (len(item.pixels) // t), t - 1)
    when = f"frame {frame + 1}\n" if item.is_video else ""
    return [FigureRow(f"{when}block {i}", item.pixels[frame], x[tubelet]) for i, x in maps.items()]


def _draw_all(
    model: nn.Module, pipeline: InputPipeline, paths: dict[str, Path], config: MapsConfig
) -> tuple[list[tuple[bool, ImageMaps]], list[str]]:
    """Draws file by file; returns, for each, whether it is a video, and its maps; and errors."""
    drawn: list[tuple[bool, ImageMaps]] = []
    unreadable: list[str] = []
    with show_progress("drawing maps", len(paths)) as advance:
        for name, path in paths.items():
            try:
                item = pipeline.read(path, name)
                maps = compute_maps(model, item)
                _draw(item, maps, has_gates(model), config)
                drawn.append((item.is_video, maps))
            except UnreadableFile as error:
                unreadable.append(str(error))
            advance()
    require(bool(drawn), f"nothing in {config.source} can be read: {(unreadable or [''])[0]}")
    return drawn, unreadable


def _draw(item: MapInput, maps: ImageMaps, gates: bool, config: MapsConfig) -> None:
    """Writes the figure, and of a video the animations, with one scale."""
    t, frames = len(next(iter(maps.values()))), len(item.pixels)
    each = frames // t  # frames of a tubelet
    steps = [time_step_rows(item, maps, frame) for frame in range(t * each)]
    chosen = torch.linspace(0, t - 1, min(t, MAX_TIME_STEPS)).round().int().tolist()
    rows = [row for i in chosen for row in steps[i * each + each // 2]]
    scale = map_scale([row for step in steps[::each] for row in step], gates)
    base = config.folder / item.name
    write_figure(f"{base}.png", rows, scale, item.name)
    if item.is_video and (suffixes := ANIMATIONS[config.animation]):
        paths = [f"{base}{suffix}" for suffix in suffixes]
        write_animation(paths, steps, scale, item.name, config.frames_per_second)


def _check_out(out: Path, source: Path) -> None:
    check_output_folder(out)
    inside = source.is_dir() and out.resolve().is_relative_to(source.resolve())
    require(not inside, f"{out} is in {source}, whose images are read; pass a folder outside")


def _check_tokens(model: nn.Module, name: str) -> None:
    require(
        bool(wrapped_blocks(model)),
        f"{name} has no learned tokens; `tokenlearner train --model {name} --insert 8` adds some, "
        "and `tokenlearner models '*tl*'` lists models that have them",
    )


def _choose(paths: dict[str, Path], pipeline: InputPipeline, config: MapsConfig) -> dict[str, Path]:
    """Returns the first files that the model takes; a model of clips takes no images."""
    fitting = [(n, p) for n, p in paths.items() if is_video(p) or not pipeline.takes_clips]
    require(
        bool(fitting),
        f"{config.model} takes clips of {pipeline.frames} frames, but {config.source} holds "
        "images only; pass a video",
    )
    chosen = dict(fitting[: config.limit])
    if any(map(is_video, chosen.values())):
        require_package("av", "video", "reading videos")
    return chosen


def _stats(drawn: Sequence[tuple[bool, ImageMaps]], videos: bool) -> dict[int, AttentionStats]:
    """Returns the numbers of each block, over all images or over all videos."""
    chosen = [maps for is_video, maps in drawn if is_video == videos]
    join = torch.stack if videos else torch.cat
    blocks = chosen[0] if chosen else {}
    return {i: map_stats(join([maps[i] for maps in chosen])) for i in blocks}


def _warnings(stats: StatsByKind) -> list[str]:
    return [
        f"warning, block {i}, {kind}s: {warning}"
        for kind, by_block in stats.items()
        for i, block in by_block.items()
        for warning in block.warnings()
    ]


def stats_table(stats: StatsByKind) -> Any:
    """Returns a table for rich: a row for each block, means over its tokens."""
    table = plain_table(HEADER, no_wrap=True)
    for kind, by_block in stats.items():
        for i, block in by_block.items():
            alike = "–"
            if block.alike:
                value, (first, second) = block.alike
                alike = f"{value:.2f} ({first}, {second})"
            each = (
                block.entropy_bits,
                block.effective_share,
                block.over_frames,
                block.across_images,
            )
            means = [sum(values) / len(values) if values else None for values in each]
            cells = [_two_digits(block.overlap), alike, *map(_two_digits, means)]
            table.add_row(counted(block.images, kind), str(i), str(len(block.pairs)), *cells)
    return table


def stats_json(stats: StatsByKind) -> dict[str, Any]:
    """Returns the numbers of each token and each pair of tokens for JSON, to 4 digits."""
    return {
        kind: {
            str(i): _rounded(asdict(block) | {"collapsed": block.collapsed})
            for i, block in by_block.items()
        }
        for kind, by_block in stats.items()
        if by_block
    }


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _rounded(value: Any) -> Any:
    """Rounds the numbers in nested containers."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
