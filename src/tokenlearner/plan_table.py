"""A plan as a person reads it: what `tokenlearner plan` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checks import check_count
from .engine import pick_device
from .hosts import look
from .plan import Option, check_plan, plan
from .zoo import create_model, load_model


@dataclass(frozen=True)
class PlanConfig:
    """Lists where tokens can be learned, and how many, within a budget.

    Args:
        model: A name that `create_model` knows, ours or timm's, or a checkpoint of `save_model`.
        budget: Share of what the model costs, above 0 and up to 1.
        measure: What the budget is a share of: macs or latency.
        tokens: Numbers of tokens to try, with commas between them.
        learner: v11, v1, v1-mean or grouped.
        fuse: Put learned tokens back on all positions behind each block.
        batch_size: Pictures at a time; changes the speed only.
        img_size: Height and width of the pictures; 0 leaves them as the model has them.
        rounds: Timed runs of each model.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range.
    """

    model: str
    budget: float = 0.5
    measure: str = "macs"
    tokens: str = "4,8,16,32"
    learner: str = "v11"
    fuse: bool = False
    batch_size: int = 1
    img_size: int = 0
    rounds: int = 15
    device: str = "auto"

    def __post_init__(self) -> None:
        check_plan(self.budget, self.measure, self.num_tokens, self.rounds)
        check_count("batch_size", self.batch_size)
        check_count("img_size", self.img_size, least=0)

    @property
    def num_tokens(self) -> list[int]:
        """The numbers in `tokens`."""
        try:
            return [int(part) for part in self.tokens.split(",")]
        except ValueError as error:
            message = f"tokens is {self.tokens!r}, expected numbers and commas, such as 4,8,16"
            raise ValueError(message) from error


def plan_table(config: PlanConfig) -> tuple[Any, str]:
    """Makes a plan into a table for rich, and a line on how it was measured.

    Raises:
        ValueError: As `plan`, or there is no such model or device.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    model, size = load_sized(config.model, config.img_size, config.device, hosts_only=True)
    images = torch.randn(config.batch_size, *size).to(next(model.parameters()))
    told = ("budget", "measure", "num_tokens", "learner", "fuse", "rounds")
    columns = (Column(name, justify="right") for name in COLUMNS)
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for option in plan(model, images, **{name: getattr(config, name) for name in told}):
        table.add_row(*(cell(option) for cell in COLUMNS.values()))
    where = f"{images.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return table, (
        f"{config.model}: {config.batch_size} x {' x '.join(map(str, size))} on {where}; medians "
        f"(quartiles) of {config.rounds} rounds in turn. share: of the host's GMACs; of MACs: the "
        "speed-up as a share of what the GMACs promise."
    )


_MS = "{0.median:.1f} ({0.low:.1f}–{0.high:.1f})"
COLUMNS: dict[str, Callable[[Option], str]] = {
    "at": lambda option: "–" if option.at is None else str(option.at),
    "tokens": lambda option: str(option.num_tokens or "–"),
    "GMACs": lambda option: f"{option.gmacs:.3f}",
    "share": lambda option: f"{option.macs_share:.2f}",
    "ms a batch": lambda option: _MS.format(option.latency_ms),
    "speed-up": lambda option: f"{option.speedup.median:.2f}",
    "of MACs": lambda option: f"{option.of_macs_ratio:.2f}",
    "images/s": lambda option: f"{option.images_per_second.median:.1f}",
}


def load_sized(
    name: str, img_size: int, device: str, *, hosts_only: bool = False
) -> tuple[nn.Module, list[int]]:
    """Loads a model by name or from a checkpoint, and tells the axes of one of its inputs.

    Args:
        name: As in `PlanConfig`.
        img_size: As in `PlanConfig`.
        device: As in `PlanConfig`.
        hosts_only: Refuse what `insert` does not know.

    Returns:
        The model, and `c h w` of its pictures or `c t h w` of its clips.

    Raises:
        ValueError: There is no such model or device, it cannot have the size, or it is no host.
    """
    place = pick_device(device)
    saved = "/" in name or name.endswith(".safetensors") or Path(name).exists()
    model: Any = load_model(name) if saved else create_model(name)
    if hosts_only:
        look(model)
    if img_size:
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"{name} cannot be set to {img_size} pixels; pass img_size 0, or save a model that "
                f"create_model built with img_size={img_size}, and pass the file"
            )
        model.set_input_size((img_size, img_size))
    embed = _embedding(model)
    channels, *size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    channels = next((m.in_channels for m in convolutions), channels)
    tubelet = getattr(model, "tubelet_size", 1)  # a FrameViT counts frames in tubelets
    frames = [model.num_frames * tubelet] if hasattr(model, "num_frames") else []
    return model.to(place), [channels, *frames, *(getattr(embed, "img_size", None) or size)]


def _embedding(model: Any) -> Any:
    """What makes tokens of pictures, and has their size: of a ViT, a FrameViT or a Mixer."""
    owner = getattr(model, "encoder", model)
    return getattr(owner, "patch_embed", getattr(owner, "stem", None))
