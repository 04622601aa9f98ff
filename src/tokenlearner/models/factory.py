"""A name becomes a model, a model becomes a file, a folder or a repository, and that the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .insertion import insert, wrapped_blocks


def create_model(
    name: str,
    *,
    num_tokens: int = 0,
    at: int | float | None = None,
    learner: str | None = None,
    fuse: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model by name, ours or any of timm's, with learned tokens if asked to.

    Args:
        name: One of `list_models()` or of `timm.list_models()`.
        num_tokens: Tokens to learn; 0 leaves it to the name.
        at: As in `insert`; goes before what the name says, as all others do.
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
    from .serialization import build_named

    told = {"at": at, "learner": learner, "fuse": fuse}
    tokens = {key: value for key, value in told.items() if value is not None}
    if num_tokens:
        tokens["num_tokens"] = num_tokens
    if any(name in table for table in _tables()):
        model = build_named(name, kwargs | tokens)
    else:
        if "fuser_bottleneck_dim" in kwargs:
            tokens["fuser_bottleneck_dim"] = kwargs.pop("fuser_bottleneck_dim")
        model = build_named(name, kwargs)
        if num_tokens:
            insert(model, **tokens)
    if tokens and not wrapped_blocks(model):
        names = ", ".join(tokens)
        raise ValueError(f"{name} learns no tokens, but {names} is given; pass num_tokens too")
    return model


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

    The classes, the pooling and the size of images may have been changed since it was made, by
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
    from .vit import VARIANTS
    from .vivit import VIDEOS

    return [VARIANTS, MIXERS, VIDEOS, FRAMES]
