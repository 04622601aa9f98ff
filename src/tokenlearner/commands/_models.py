"""A model by name or from a checkpoint, and the size of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..deploy.formats import SUFFIXES, load_exported
from ..models.factory import create_model
from ..models.hosts import find_host
from ..models.hub import load_model
from ..models.preprocessing import get_input_size
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
    model: Any = load_model(name) if is_model_path(name) else create_model(name)
    if hosts_only:
        find_host(model)
    if img_size:
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"{name} cannot be set to {img_size} pixels; pass img_size 0, or save a model that "
                f"create_model built with img_size={img_size}, and pass the file"
            )
        model.set_input_size((img_size, img_size))
    return model.to(target), get_input_size(model)


def load_checkpoint(path: str, device: str) -> nn.Module:
    """Loads what `train`, `save_model` or `export` wrote, on a device as `pick_device` takes it.

    Raises:
        ValueError: There is no such model or device.
    """
    target = pick_device(device)
    is_exported = Path(path).suffix in SUFFIXES
    return load_exported(path, target) if is_exported else load_model(path).to(target)
