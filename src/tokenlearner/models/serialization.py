"""A model as one file, or as a folder that timm reads too, and back.

`model.safetensors` has the config in its header and needs nothing else. A folder has besides it
`config.json`, in timm's form, and a model card. Nothing here is ever unpickled.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..utils.io import atomic_write
from .insertion import get_insertion, insert, remove

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # in a model's folder

_KEY = "tokenlearner"  # of the config, in the header of the weights and in config.json
_PASSING = (  # arguments that say where weights came from or are kept, not what the model is
    *("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("device", "dtype"),
)
_NOT_EXPORTED = (  # of timm's config: it is about the weights that the model started from
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"),
    *("architecture", "tag", "custom_load", "label_offset"),
)
_OF_CLASSES = ("label_names", "label_descriptions")
_OF_SIZE = ("test_input_size", "pool_size", "test_pool_size")
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError)


def build_named(name: str, kwargs: Mapping[str, Any]) -> Any:
    """Builds a model that timm knows by name; it remembers name and arguments.

    Raises:
        ValueError: The name is unknown, or an argument is out of range.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "list_models() names ours"
        raise ValueError(f"there is no model {name!r}; {hint}")
    linear = {"fuser_bottleneck_dim": 0} if "fuser_bottleneck_dim" in kwargs else {}
    kept: dict[str, Any] = linear | {k: value for k, value in kwargs.items() if value is not None}
    model: Any = timm.create_model(name, **kept)  # which would leave out a None
    model.tokenlearner_config = {"name": name, "kwargs": kept}
    return model


def write_files(model: Any, path: Path, card: str | None = None) -> Path:
    """Writes a model to a file or a folder: as a whole, and only if it can be built again.

    In a folder, a `config.json` that is not a model's is kept.

    Args:
        model: One that `build_named` made, or timm under one of our names.
        path: A file that ends in `.safetensors`, or a folder.
        card: The text of a model card to write to the folder.

    Returns:
        The file with the weights.

    Raises:
        ValueError: The model could not be built again.
    """
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    config, own = _config(model)
    file, texts, outer = weights_file(path), {}, path / CONFIG
    if file != path and (not outer.exists() or is_config(read_config(outer))):
        texts[CONFIG] = json.dumps(_timm_form(model, config, own), indent=2) + "\n"
    if card is not None:
        texts[CARD] = card
    with ExitStack() as stack:  # left in reverse: the weights take their place first
        for name, text in texts.items():
            stack.enter_context(atomic_write(path / name)).write_text(text, encoding="utf-8")
        temporary = stack.enter_context(atomic_write(file))
        safetensors.torch.save_file(state, str(temporary), metadata={_KEY: json.dumps(config)})
    return file


def read_files(file: Path, config_file: Path | None = None) -> Any:
    """Builds the model that `write_files` wrote, in evaluation mode.

    Args:
        file: The weights.
        config_file: The folder's `config.json`, which has to tell of the same model.

    Raises:
        ValueError: The files are damaged, of two models, or of another kind.
    """
    config, state = _read_weights(file)
    outer = read_config(config_file) if config_file else {}
    if outer.get(_KEY, config) != config:
        raise ValueError(
            f"{config_file} and {file.name} are of two models: a save was cut off; save the model "
            "again, or load the .safetensors file alone"
        )
    try:
        kwargs = {key: value for key, value in config["kwargs"].items() if key not in _PASSING}
        model = _with_tokens(build_named(config["name"], kwargs), config["insert"])
    except _BROKEN as error:
        raise ValueError(
            f"{file} has a config that makes no model ({error!r}); save the model again, or load "
            "it with tokenlearner.load_model, which knows all names"
        ) from error
    _check_fit(state, model, f"{file} does not fit the model it names")
    model.load_state_dict(state, assign=True)  # with the dtype that was saved
    if isinstance(data := outer.get("pretrained_cfg"), dict) and is_config(outer):
        sources = {k: v for k, v in model.pretrained_cfg.items() if k in _NOT_EXPORTED}
        model.pretrained_cfg = model.default_cfg = sources | data
    return model.eval()


def weights_file(path: Path) -> Path:
    """The file with the weights: the path itself, or in the folder that it is."""
    return path if path.suffix == ".safetensors" else path / WEIGHTS


def read_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`; of anything but a JSON object it makes an empty dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def is_config(content: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of ours."""
    return _KEY in content


def _read_weights(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """The config and the weights."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error})") from error
    if _KEY not in header:
        raise ValueError(f"{file} has weights but no config; save it with tokenlearner.save_model")
    try:
        return json.loads(header[_KEY]), state
    except ValueError as error:
        message = f"{file} has a config that makes no model ({error!r}); save the model again"
        raise ValueError(message) from error


def _config(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What builds the model again, after trying that it does; and the tokens it has by its name."""
    told = get_build_args(model)
    kwargs = {key: value for key, value in told["kwargs"].items() if key not in _PASSING}
    tokens = get_insertion(model)
    with torch.device("meta"):
        base = build_named(told["name"], kwargs)
        if changed := _changes(model, base):
            try:
                base = build_named(told["name"], kwargs | changed)
            except _BROKEN as error:
                raise ValueError(_refusal(changed, base)) from error
        own, rebuilt = get_insertion(base), _with_tokens(base, tokens)
    _check_fit(model.state_dict(), rebuilt, "the model was changed since create_model made it")
    if left := _changes(model, rebuilt):
        raise ValueError(_refusal(left, rebuilt))
    kwargs |= changed
    try:
        config = json.dumps({"name": told["name"], "kwargs": kwargs, "insert": tokens})
    except TypeError as error:
        raise ValueError(f"{kwargs} cannot be saved as JSON ({error}); use plain values") from error
    return json.loads(config), own


def get_build_args(model: Any) -> dict[str, Any]:
    """Returns the name and the arguments that a model was built with.

    Raises:
        ValueError: It does not know them.
    """
    told = getattr(model, "tokenlearner_config", None)
    if told is None:
        raise ValueError(
            f"this {type(model).__name__} does not know how it was built; make it with "
            "tokenlearner.create_model, or save model.state_dict() yourself"
        )
    return told


def _changes(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """Arguments for what timm's `reset_classifier` and `set_input_size` changed."""
    now, before = _traits(model), _traits(base)
    changed = {key: value for key, value in now.items() if value != before.get(key)}
    if "global_pool" in changed and hasattr(model, "fc_norm"):  # timm's default follows the pooling
        changed["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    return changed


def _traits(model: nn.Module) -> dict[str, Any]:
    """The arguments that can be read off a model, as far as it tells them."""
    owner = getattr(model, "encoder", model)  # of frames
    embed = getattr(owner, "patch_embed", getattr(owner, "stem", None))
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    traits = {
        "num_classes": getattr(model, "num_classes", None),
        "global_pool": _pooling(model),
        "img_size": list(size) if isinstance(size, tuple) else None,
        "patch_size": list(patch) if isinstance(patch, tuple) else None,
        "in_chans": getattr(getattr(embed, "proj", None), "in_channels", None),
    }
    return {key: value for key, value in traits.items() if value is not None}


def _pooling(model: nn.Module) -> str | None:
    for owner in (getattr(model, "head", None), model):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)  # where it is a module
        if isinstance(pool, str):
            return pool
    return None


def _refusal(changed: Mapping[str, Any], base: nn.Module) -> str:
    name, now = next(iter(changed.items()))
    return (
        f"{name} was changed from {_traits(base).get(name)!r} to {now!r} since create_model made "
        "the model; pass it to create_model"
    )


def _with_tokens(model: Any, told: Mapping[str, Any] | None) -> Any:
    """The model with the learned tokens that `insertion` told of; a Mixer is built with them."""
    if get_insertion(model) == told:
        return model
    if get_insertion(model):
        remove(model)
    return insert(model, **told) if told else model


def _check_fit(state: Mapping[str, Tensor], model: nn.Module, what: str) -> None:
    found = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if differing := sorted({key for key, _ in found.items() ^ expected.items()}):
        raise ValueError(f"{what}: {', '.join(differing[:5])} ({len(differing)} in all) differ")


def _timm_form(model: Any, config: dict[str, Any], own: Any) -> dict[str, Any]:
    """The content of `config.json`."""
    traits = _traits(model)
    form = {"architecture": config["name"], "num_classes": traits.get("num_classes")}
    form |= {"num_features": getattr(model, "num_features", None)}
    form |= {"global_pool": traits["global_pool"]} if traits.get("global_pool") else {}
    arguments = _timm_arguments(model, config, own)
    if arguments is None:  # a name that timm refuses: it would drop the learners, or the grid
        form["architecture"] += " with tokens inserted, for tokenlearner.load_model"
    form |= {"model_args": arguments or {}, "pretrained_cfg": _exported(model, traits)}
    return json.loads(json.dumps({**form, _KEY: config}))


def _timm_arguments(model: Any, config: dict[str, Any], own: Any) -> dict[str, Any] | None:
    """Arguments with which timm builds the model; None if there are none that do."""
    tokens = config["insert"]
    if own == tokens:
        return config["kwargs"]
    told = tokens or {}
    if (
        not getattr(model, "takes_tokens", False)
        or "grid" in told
        or isinstance(told.get("at"), list)
    ):
        return None
    return config["kwargs"] | (
        {"fuser_bottleneck_dim": 64} | tokens if tokens else {"num_tokens": 0}
    )


def _exported(model: Any, traits: Mapping[str, Any]) -> dict[str, Any]:
    """The config of timm for data and the model's two ends, as they are now."""
    start = getattr(model, "pretrained_cfg", {})
    now = {key: value for key, value in start.items() if key not in _NOT_EXPORTED}
    channels, *size = now.get("input_size") or (3, 224, 224)
    size = traits.get("img_size", size)
    now["input_size"] = [traits.get("in_chans", channels), *size]
    now["num_classes"] = traits.get("num_classes")
    if list(now["input_size"]) != list(start.get("input_size", ())):
        now = {key: value for key, value in now.items() if key not in _OF_SIZE}
    if now["num_classes"] != start.get("num_classes"):
        now = {key: value for key, value in now.items() if key not in _OF_CLASSES}
    return now
