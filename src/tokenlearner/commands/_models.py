"""A model by name or from a checkpoint, and the size of its inputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.factory import create_model
from ..models.hosts import find_host
from ..models.hub import load_local
from ..utils.io import is_model_path
from ..utils.modules import pick_device


def load_sized(
    name: str, img_size: int, device: str, *, hosts_only: bool = False
) -> tuple[nn.Module, list[int]]:
    """Loads a model by name or from a checkpoint, and finds the size of its inputs.

    Args:
        name: Of a model that `create_model` knows, ours or timm's, or a checkpoint of `save_model`.
        img_size: Height and width of the images; 0 leaves them as the model has them.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        hosts_only: Accept only models that `insert` knows.

    Returns:
        The model, and `c h w` of its images or `c t h w` of its clips.

    Raises:
        ValueError: There is no such model or device, it cannot have the size, or it is no host.
    """
    target = pick_device(device)
    model: Any = load_local(name) if is_model_path(name) else create_model(name)
    if hosts_only:
        find_host(model)
    if img_size:
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"{name} cannot be set to {img_size} pixels; pass img_size 0, or save a model that "
                f"create_model built with img_size={img_size}, and pass the file"
            )
        model.set_input_size((img_size, img_size))
    channels, *size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    channels = next((m.in_channels for m in convolutions), channels)
    tubelet = getattr(model, "tubelet_size", 1)  # a FrameViT counts frames in tubelets
    frames = [model.num_frames * tubelet] if hasattr(model, "num_frames") else []
    owner = getattr(model, "encoder", model)  # of a FrameViT
    embed = getattr(owner, "patch_embed", getattr(owner, "stem", None))  # a Mixer's is its stem
    return model.to(target), [channels, *frames, *(getattr(embed, "img_size", None) or size)]
