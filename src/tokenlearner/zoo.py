"""A name becomes a model, a model becomes a file, and a file the same model again."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import written_whole
from .insert import insert, insertion, remove

_KEY = "tokenlearner"  # of the config in the header of a safetensors file
_FILE = "model.safetensors"
_STARTS = ("pretrained", "checkpoint_path", "cache_dir")  # where weights came from: now the file


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

    Args:
        name: One of `list_models()` or of `timm.list_models()`.
        num_tokens: Tokens to insert; 0 leaves the model as its name says.
        at: As in `insert`.
        learner: As in `insert`.
        fuse: As in `insert`.
        kwargs: For the model: `num_classes`, `img_size`, `in_chans`, `pretrained`, ...

    Raises:
        ValueError: The name is unknown, or learned tokens do not fit the model.

    >>> create_model("vit_mini_patch4_28", num_tokens=4)(torch.ones(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    timm = _timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "list_models() names ours"
        raise ValueError(f"there is no model {name!r}; {hint}")
    model = timm.create_model(name, **kwargs)
    model.tokenlearner_config = {"name": name, "kwargs": kwargs}
    tokens = {"num_tokens": num_tokens, "at": at, "learner": learner, "fuse": fuse}
    return insert(model, **tokens) if num_tokens else model


def list_models(pattern: str = "*") -> list[str]:
    """Lists this package's own models, those that match a pattern such as `"*tl8*"`."""
    from .vit import VARIANTS

    return sorted(fnmatch.filter(VARIANTS, pattern))


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Writes a model and all that is needed to build it again to one safetensors file.

    Args:
        model: Made by `create_model` or `load_model`; with or without learned tokens.
        path: A file that ends in `.safetensors`, or a folder, where it is `model.safetensors`.

    Returns:
        The file.

    Raises:
        ValueError: The model could not be built again from the file.
    """
    from safetensors.torch import save_file

    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    config = _config(model)
    with torch.device("meta"):
        rebuilt = _build(config)
    _check_fit(state, rebuilt, "the model was changed since create_model made it")
    if _pooling(model) != _pooling(rebuilt):  # timm's; no parameter shows it
        raise ValueError(
            f"global_pool was changed from {_pooling(rebuilt)!r} to {_pooling(model)!r} since "
            "create_model made the model; pass it to create_model"
        )
    file = _file(path)
    with written_whole(file) as temporary:
        save_file(state, str(temporary), metadata={_KEY: json.dumps(config)})
    return file


def load_model(path: str | Path) -> nn.Module:
    """Builds the model that `save_model` wrote, learned tokens included, in evaluation mode.

    Args:
        path: The file, or the folder that has it.

    Raises:
        ValueError: There is no such file, or it is not one of `save_model`'s.
    """
    from safetensors import SafetensorError, safe_open

    file = _file(path)
    if not file.is_file():
        raise ValueError(f"there is no {file}; pass the file or folder that save_model wrote")
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error})") from error
    if _KEY not in header:
        raise ValueError(f"{file} has weights but no config; save it with tokenlearner.save_model")
    try:
        model = _build(json.loads(header[_KEY]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{file} has a config that makes no model ({error!r}); save the model again"
        raise ValueError(message) from error
    _check_fit(state, model, f"{file} does not fit the model it names")
    model.load_state_dict(state, assign=True)  # with the dtype that was saved
    return model.eval()


def _timm() -> Any:
    import timm

    from . import vit  # noqa: F401  (registers our names)

    return timm


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "tokenlearner_config", None)
    if config is None:
        raise ValueError(
            f"this {type(model).__name__} does not know how it was built; make it with "
            "tokenlearner.create_model, or save model.state_dict() yourself"
        )
    kwargs = {key: value for key, value in config["kwargs"].items() if key not in _STARTS}
    config = {"name": config["name"], "kwargs": kwargs, "insert": insertion(model)}
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise ValueError(f"{kwargs} cannot be saved as JSON ({error}); use plain values") from error


def _build(config: Mapping[str, Any]) -> nn.Module:
    model = create_model(config["name"], **config["kwargs"])
    if insertion(model) == config["insert"]:
        return model
    if insertion(model):
        remove(model)
    return insert(model, **config["insert"]) if config["insert"] else model


def _check_fit(state: Mapping[str, Tensor], model: nn.Module, what: str) -> None:
    found = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if differing := sorted({key for key, _ in found.items() ^ expected.items()}):
        raise ValueError(f"{what}: {', '.join(differing[:5])} ({len(differing)} in all) differ")


def _pooling(model: nn.Module) -> str | None:
    return getattr(model, "global_pool", None)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / _FILE
