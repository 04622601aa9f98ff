"""A name becomes a model, a model becomes a file, a folder or a repository, and that the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .insert import insert

_TOKENS: dict[str, Any] = {"at": 0.5, "learner": "v11", "fuse": False}


def create_model(
    name: str,
    *,
    num_tokens: int = 0,
    at: int | float = 0.5,
    learner: str = "v11",
    fuse: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by name, ours or any of timm's, and inserts learned tokens if asked to.

    A Mixer or a model for live video is built with as many tokens, in place of its own.

    Args:
        name: One of `list_models()` or of `timm.list_models()`.
        num_tokens: Tokens to insert; 0 leaves the model as its name says.
        at: As in `insert`.
        learner: As in `insert`.
        fuse: As in `insert`.
        kwargs: For the model: `num_classes`, `img_size`, `in_chans`, `pretrained`, ...; and
            `fuser_bottleneck_dim`, as in `insert`.

    Raises:
        ValueError: The name is unknown, or learned tokens do not fit the model.

    >>> import torch
    >>> create_model("vit_mini_patch4_28", num_tokens=4)(torch.ones(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    _tables()
    from .framevit import FRAMES
    from .mixer import MIXERS
    from .saving import build_named

    if not num_tokens:
        return build_named(name, kwargs)
    tokens = {"at": at, "learner": learner, "fuse": fuse}
    if name in {**MIXERS, **FRAMES}:  # built with their tokens: they take what differs from ours
        told = {key: value for key, value in tokens.items() if value != _TOKENS[key]}
        return build_named(name, {**kwargs, "num_tokens": num_tokens, **told})
    if "fuser_bottleneck_dim" in kwargs:
        tokens["fuser_bottleneck_dim"] = kwargs.pop("fuser_bottleneck_dim")
    return insert(build_named(name, kwargs), num_tokens, **tokens)


def list_models(pattern: str = "*") -> list[str]:
    """Lists this package's own models, those that match a pattern such as `"*tl8*"`."""
    names = [name for table in _tables() for name in table]
    return sorted(fnmatch.filter(names, pattern))


def save_model(
    model: nn.Module,
    path: str | Path,
    measured: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """Writes a model and all that is needed to build it again, to a file or a folder.

    The classes, the pooling and the size of pictures may have been changed since it was made, by
    `reset_classifier` and `set_input_size`.

    Args:
        model: Made by `create_model` or `load_model`, or a named one of ours by
            `timm.create_model`; with or without learned tokens.
        path: A file that ends in `.safetensors`, or a folder for `model.safetensors`,
            `config.json`, which timm reads too, and a model card. A README that is there is kept,
            and so is a `config.json` that is not a model's: the folder is then not for timm.
        measured: A table for the model card, as columns of rows: `{"ours": {"top-1": 0.81}}`.

    Returns:
        The file with the weights.

    Raises:
        ValueError: The model could not be built again, or `measured` is no table or has no place.
    """
    from .hub import write_model

    return write_model(model, path, measured)


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Builds the model that `save_model` wrote, learned tokens included, in evaluation mode.

    Args:
        path: The file, the folder, or a model on the Hub: `user/repo`, `user/repo@revision` or
            `hf-hub:user/repo`. A string is looked up on the Hub if there is no such path.
        revision: On the Hub: a branch, a tag or a commit.
        cache_dir: Of the Hub's files.
        token: For the Hub; by default that of `hf auth login`.

    Raises:
        ValueError: There is no such model here or on the Hub, or it is not one of `save_model`'s.
    """
    _tables()
    from .hub import read_model

    return read_model(path, revision=revision, cache_dir=cache_dir, token=token)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    measured: Mapping[str, Mapping[str, object]] | None = None,
    **kwargs: Any,
) -> str:
    """Uploads to the Hub what `save_model` writes to a folder, in one commit.

    Args:
        model: As in `save_model`.
        repo_id: Such as `user/name`; the repository is made if there is none.
        measured: As in `save_model`.
        kwargs: As in `upload_model`: `commit_message`, `private`, `token`, `branch`, ...

    Returns:
        The address of the commit.

    Raises:
        ValueError: The model could not be built again, or `repo_id` is no name.
    """
    from .hub import upload_model

    return upload_model(model, repo_id, measured, **kwargs)


def _tables() -> list[Mapping[str, Any]]:
    """Our named models, which are known to timm from here on."""
    from .framevit import FRAMES
    from .mixer import MIXERS
    from .video import VIDEOS
    from .vit import VARIANTS

    return [VARIANTS, MIXERS, VIDEOS, FRAMES]
