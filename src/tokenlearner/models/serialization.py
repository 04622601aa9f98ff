"""Writes a model to one file, or to a folder that timm reads too, and reads it again.

`model.safetensors` has the config in its header, with preprocessing and names of classes, and needs
nothing else. A folder also has a `config.json` in timm's form and a model card. Nothing is ever
unpickled.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import get_ident
from time import thread_time
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..utils.files import check_downloaded, read_json
from ..utils.io import atomic_write
from ..utils.modules import building_on_meta, check_plain, training_mode
from ..utils.validation import find_not_finite, require, shortened
from .features import wrapped_blocks
from .hub_access import hub_or_cache
from .insertion import get_insertion, insert, remove
from .outputs import output_tensor
from .preprocessing import check_input_size, get_input_size, take_config, without_classes

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # in a model's folder

_LOGGER = logging.getLogger(__name__)
_KEY = "tokenlearner"  # of the config, in the header of the weights and in config.json
_DATA = "pretrained_cfg"  # timm's, for preprocessing and classes, in both
_NOT_SAVED = (  # arguments for where weights come from or are kept, not for what the model is
    *("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("device", "dtype"),
)
_OF_SOURCE = (  # keys of timm's config about the weights that the model started from
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"),
    *("architecture", "tag", "custom_load", "label_offset"),
)
_ARGS_LOST = (
    "timm made this model with arguments that it does not say, or it was changed since; make it "
    "with tokenlearner.create_model, which keeps them"
)
_DEPTHS = ("depth", "depths", "layers", "num_blocks")  # arguments that count blocks
_MOST_MODULES = 20  # for a tensor; models have one or two
_MOST_SECONDS = 5.0  # of building a model without weights; models take tenths
_OF_SIZE = ("test_input_size", "pool_size", "test_pool_size")
_BUILD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError)


def named_models() -> list[str]:
    """Returns the names of our models, which timm knows from here on."""
    from .framevit import FRAMES
    from .mixer import MIXERS
    from .temporal import TEMPORAL
    from .vit import VARIANTS
    from .vivit import VIDEOS

    return [*VARIANTS, *MIXERS, *VIDEOS, *FRAMES, *TEMPORAL]


def build_named(name: str, kwargs: Mapping[str, Any]) -> Any:
    """Builds a model that timm knows by name, and keeps name and arguments on it.

    Raises:
        ValueError: The name is unknown, or an argument is out of range.
    """
    if name not in named_models() and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "list_models() names ours"
        raise ValueError(f"there is no model {name!r}; {hint}")
    linear = {"fuser_bottleneck_dim": 0} if "fuser_bottleneck_dim" in kwargs else {}
    given: dict[str, Any] = linear | {k: value for k, value in kwargs.items() if value is not None}
    with hub_or_cache() if _is_of_hub(given) else nullcontext():
        model: Any = timm.create_model(name, **given)  # which would leave out a None
    model.tokenlearner_config = {"name": name, "kwargs": given}
    if not given.get("pretrained") and getattr(model, "pretrained_cfg", {}).get("license"):
        # timm says that of its own weights of every new model
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {"license": None}
    return model


def _is_of_hub(kwargs: Mapping[str, Any]) -> bool:
    """Returns whether weights are taken that may have to be fetched."""
    configs = [kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")]
    said = {key for config in configs if isinstance(config, Mapping) for key in config}
    return bool(kwargs.get("pretrained")) and not said & {"file", "state_dict", "url"}


def write_files(model: Any, path: Path, card: str | None = None) -> Path:
    """Writes a model to a file or a folder, atomically, and only if it can be built again.

    In a folder, a `config.json` that is not a model's is kept.

    Args:
        model: Made by `build_named`, or by timm under one of our names.
        path: A file that ends in `.safetensors`, or a folder.
        card: The text of a model card to write to the folder.

    Returns:
        The file with the weights.

    Raises:
        ValueError: The model could not be built again.
    """
    weights = model.state_dict()
    for key, value in weights.items():
        check_plain(key, value, "save")
    state = {key: value.detach().contiguous().cpu() for key, value in weights.items()}
    if broken := find_not_finite(dict(model.named_parameters())):
        _LOGGER.warning(
            "%s is saved with NaN or infinity in %s; load_model will refuse it",
            *(path, shortened(broken)),
        )
    config, named_tokens = _config(model)
    if not hasattr(model, "tokenlearner_config"):
        _check_outputs(model, state, config)
    file, texts, outer = weights_file(path), {}, path / CONFIG
    timm_config = _timm_config(model, config, named_tokens)
    header = {_KEY: json.dumps(config | {_DATA: timm_config[_DATA]})}  # the order of two varies
    if file != path and (not outer.exists() or read_config(outer)):
        texts[CONFIG] = json.dumps(timm_config, indent=2) + "\n"
    if card is not None:
        texts[CARD] = card
    with ExitStack() as stack:  # left in reverse: the weights take their place first
        for name, text in texts.items():
            stack.enter_context(atomic_write(path / name)).write_text(text, encoding="utf-8")
        temporary = stack.enter_context(atomic_write(file))
        safetensors.torch.save_file(state, str(temporary), metadata=header)
    return file


def read_files(file: Path, config_file: Path | None = None) -> Any:
    """Builds the model that `write_files` wrote, or timm's `save_for_hf`, in evaluation mode.

    Args:
        file: The weights.
        config_file: The folder's `config.json`, which has to describe the same model. Without, what
            the file itself says of preprocessing counts, or of older files a `config.json` beside.
            Of timm's files it alone says what the model is.

    Raises:
        ValueError: The files are damaged, of two models, or of another kind, or weights are NaN
            or infinite.
    """
    config, data, state = _read_weights(file)
    if config is None:
        config, data = _read_timm_config(file, config_file)
    outer = read_config(config_file) if config_file else {}
    if outer.get(_KEY, config) != config:
        raise ValueError(
            f"{config_file} and {file.name} are of two models: saving was interrupted; save the "
            "model again, or load the .safetensors file alone"
        )
    with building_on_meta():  # a file of few bytes may name a model of many
        empty = _build(file, config, len(state))
    _check_shapes(state, empty, f"{file} does not fit the model it names")
    model = _build(file, config, len(state))
    model.load_state_dict(state, assign=True)  # with the dtype that was saved
    broken = find_not_finite(dict(model.named_parameters()))
    require(
        not broken,
        f"{file} has NaN or infinity in {shortened(broken)}, as after a training that failed; take "
        "an earlier one, or read its weights with tokenlearner.checkpoints.read_weights",
    )
    check_input_size(get_input_size(model))
    if not outer and data is None and (beside := file.parent / CONFIG).is_file():
        found = read_config(beside)
        outer = found if found.get(_KEY) == config else {}
    if (data := outer.get(_DATA, data)) is not None:
        sources = {k: v for k, v in model.pretrained_cfg.items() if k in _OF_SOURCE}
        taken = take_config(data, str(config_file or file), model.pretrained_cfg)
        model.pretrained_cfg = model.default_cfg = sources | taken
    return model.eval()


def _build(file: Path, config: Any, tensors: int) -> Any:
    """Builds the model of a config, which has at most as many blocks as a file has tensors."""
    try:
        kwargs = {key: value for key, value in config["kwargs"].items() if key not in _NOT_SAVED}
        for name in _DEPTHS:
            depth = kwargs.get(name) or 0
            total = sum(depth) if isinstance(depth, list) else depth
            require(total <= tensors, f"{name} is {depth}, but the file has {tensors} tensors")
        if (size := kwargs.get("img_size")) is not None:
            check_input_size([1, *(size if isinstance(size, list) else (size, size))])
        is_trial = torch.get_default_device().type == "meta"
        seconds = _MOST_SECONDS if is_trial else math.inf  # weights are drawn, for as long as it is
        with _bounded(_MOST_MODULES * (tensors + 10), seconds):
            return _with_tokens(build_named(config["name"], kwargs), config["insert"])
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"no model can be built from the config in {file} ({error!r}); save the model again"
        ) from error


@contextmanager
def _bounded(most: int, seconds: float) -> Iterator[None]:
    """Ends what this thread builds in the block once it has more modules, or took longer."""
    left, thread, start = most, get_ident(), thread_time()

    def count(*_: object) -> None:
        nonlocal left
        if get_ident() != thread:
            return
        left -= 1
        require(left >= 0, f"it has more than {most} modules, far more than the file has tensors")
        took = thread_time() - start
        require(took <= seconds, f"it takes more than {seconds:g} s to build, even without weights")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def weights_file(path: Path) -> Path:
    """Returns the file with the weights: the path itself, or the file in that folder."""
    return path if path.suffix == ".safetensors" else path / WEIGHTS


def read_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`; returns an empty dict if it is not one of ours."""
    try:
        content = read_json(path)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and _KEY in content else {}


def _read_timm_config(file: Path, config_file: Path | None) -> tuple[Any, Any]:
    """Reads config and preprocessing of weights that timm's `save_for_hf` wrote.

    Raises:
        ValueError: There is no `config.json` of timm's.
    """
    said: Any = None
    if config_file is not None:
        with suppress(ValueError):  # it is no JSON
            said = read_json(config_file)
    architecture = said.get("architecture") if isinstance(said, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        hint = f"; {config_file} names no model of timm's" if config_file else ""
        raise ValueError(
            f"{file} has weights but no config{hint}; give them to a model of create_model, and "
            "save it with tokenlearner.save_model"
        )
    args, data = said.get("model_args") or {}, said.get(_DATA) or {}
    args = {k: said[k] for k in ("num_classes",) if said.get(k) is not None} | args
    names = {key: said[key] for key in ("label_names", "label_descriptions") if key in said}
    return {"name": architecture, "kwargs": args, "insert": None}, data | names


def _read_weights(file: Path) -> tuple[Any, Any, dict[str, Tensor]]:
    """Reads the config, what is said of preprocessing, each None if nothing, and the weights."""
    check_downloaded(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from error
    if _KEY not in header:
        return None, None, state
    try:
        config = json.loads(header[_KEY])
        return config, config.pop(_DATA, None) if isinstance(config, dict) else None, state
    except (ValueError, RecursionError) as error:
        message = f"no model can be built from the config in {file} ({error!r}); save it again"
        raise ValueError(message) from error


def get_build_args(model: Any) -> dict[str, Any]:
    """Returns the name and the arguments that a model was built with.

    One that timm made says its name alone.

    Raises:
        ValueError: It was built in another way.
    """
    if (config := getattr(model, "tokenlearner_config", None)) is None:
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        if type(model).__module__.startswith("timm.") and name and timm.is_model(name):
            return {"name": name, "kwargs": {}}
        raise ValueError(
            f"this {type(model).__name__} does not know how it was built; make it with "
            "tokenlearner.create_model, or save model.state_dict() yourself"
        )
    return config


def _config(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the config that builds the model again, which is tried, and the name's own tokens."""
    args = get_build_args(model)
    name = args["name"]
    kwargs = {key: value for key, value in args["kwargs"].items() if key not in _NOT_SAVED}
    tokens = get_insertion(model)
    if tokens is None and wrapped_blocks(model):
        raise ValueError(
            "blocks of this model were wrapped by hand or pickled by version 0.3; set the model's "
            "tokenlearner_insertion to a tokenlearner.models.InsertionConfig that describes them"
        )
    with building_on_meta():
        base = build_named(name, kwargs)
        if changed := _changed_traits(model, base):
            try:
                base = build_named(name, kwargs | changed)
            except _BUILD_ERRORS as error:
                raise ValueError(_change_message(changed, base)) from error
        named_tokens, rebuilt = get_insertion(base), _with_tokens(base, tokens)
    is_named = hasattr(model, "tokenlearner_config")
    message = "the model was changed since create_model made it" if is_named else _ARGS_LOST
    _check_shapes(model.state_dict(), rebuilt, message)
    if remaining := _changed_traits(model, rebuilt):
        raise ValueError(_change_message(remaining, rebuilt))
    kwargs |= changed
    try:
        config = json.dumps({"name": name, "kwargs": kwargs, "insert": tokens})
    except TypeError as error:
        raise ValueError(f"{kwargs} cannot be saved as JSON ({error}); use plain values") from error
    return json.loads(config), named_tokens


@torch.no_grad()
def _check_outputs(model: Any, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Checks that what will be built again gives the outputs of a model that timm made.

    Arguments that change no weight, such as a number of heads, are not seen in it otherwise.

    Raises:
        ValueError: It gives others.
    """
    with torch.random.fork_rng(devices=[]):
        rebuilt = _with_tokens(build_named(config["name"], config["kwargs"]), config["insert"])
        image = torch.rand(1, *get_input_size(model))
    rebuilt.load_state_dict(state, assign=True)
    parameter = next(model.parameters())
    rebuilt, image = rebuilt.to(parameter.device), image.to(parameter)
    with training_mode(model, training=False), training_mode(rebuilt, training=False):
        pairs = [  # features too, as a new head may be 0
            [output_tensor(run(image)).float() for run in (of(rebuilt), of(model))]
            for of in (lambda made: made, lambda made: getattr(made, "forward_features", made))
        ]
    require(
        all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item()) for a, b in pairs),
        _ARGS_LOST,
    )


def _changed_traits(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """Returns arguments for what `reset_classifier` and `set_input_size` changed since `base`."""
    before = _traits(base)
    changed = {key: value for key, value in _traits(model).items() if value != before.get(key)}
    if "global_pool" in changed and hasattr(model, "fc_norm"):  # timm's default follows the pooling
        changed["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    return changed


def _traits(model: nn.Module) -> dict[str, Any]:
    """Reads the arguments that timm's methods can change off a model, where it has them."""
    owner = getattr(model, "encoder", model)  # of frames
    embed = getattr(owner, "patch_embed", getattr(owner, "stem", None))
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    pools = [getattr(part, "global_pool", None) for part in (getattr(model, "head", None), model)]
    pools = [getattr(pool, "pool_type", pool) for pool in pools]  # where it is a module
    traits = {
        "num_classes": getattr(model, "num_classes", None),
        "global_pool": next((pool for pool in pools if isinstance(pool, str)), None),
        "img_size": list(size) if isinstance(size, tuple) else None,
        "patch_size": list(patch) if isinstance(patch, tuple) else None,
        "in_chans": getattr(getattr(embed, "proj", None), "in_channels", None),
    }
    return {key: value for key, value in traits.items() if value is not None}


def _change_message(changed: Mapping[str, Any], base: nn.Module) -> str:
    name, value = next(iter(changed.items()))
    return (
        f"{name} was changed from {_traits(base).get(name)!r} to {value!r} since create_model made "
        "the model; pass it to create_model"
    )


def _with_tokens(model: Any, tokens: Mapping[str, Any] | None) -> Any:
    """Returns the model with these learned tokens; a Mixer is built with them."""
    if get_insertion(model) == tokens:
        return model
    if get_insertion(model):
        remove(model)
    return insert(model, **tokens) if tokens else model


def _check_shapes(state: Mapping[str, Tensor], model: nn.Module, message: str) -> None:
    got, expected = (
        {(key, tuple(value.shape)) for key, value in tensors.items()}
        for tensors in (state, model.state_dict())
    )
    if differing := sorted({key for key, _ in got ^ expected}):
        raise ValueError(f"{message}: {shortened(differing)} differ")


def _timm_config(
    model: Any, config: dict[str, Any], named_tokens: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the content of `config.json`: ours, in the form that timm reads."""
    traits, name = _traits(model), config["name"]
    kwargs = _timm_kwargs(model, config, named_tokens)
    if kwargs is None:  # a name that timm refuses: it would drop the learners, or the grid
        name += " with tokens inserted, for tokenlearner.load_model"
    content = {
        "architecture": name,
        "num_classes": traits.get("num_classes"),
        "num_features": getattr(model, "num_features", None),
        **({"global_pool": traits["global_pool"]} if traits.get("global_pool") else {}),
        "model_args": kwargs or {},
        _DATA: _pretrained_cfg(model, traits),
        _KEY: config,
    }
    return json.loads(json.dumps(content))


def _timm_kwargs(
    model: Any, config: dict[str, Any], named_tokens: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Returns arguments with which timm builds the model, None if it cannot."""
    tokens = config["insert"]
    if tokens == named_tokens:
        return config["kwargs"]
    if tokens is None and getattr(model, "takes_tokens", False):
        return config["kwargs"] | {"num_tokens": 0}
    only_insert = tokens is None or "grid" in tokens or isinstance(tokens["at"], list)
    if only_insert or not getattr(model, "takes_tokens", False):
        return None
    defaults = {"fuser_bottleneck_dim": 64, "overlap": 0, "elastic": False, "active_tokens": None}
    return config["kwargs"] | defaults | tokens


def _pretrained_cfg(model: Any, traits: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's config for preprocessing, input and classifier, as they are now."""
    start = getattr(model, "pretrained_cfg", {})
    cfg = {key: value for key, value in start.items() if key not in _OF_SOURCE}
    channels, *size = cfg.get("input_size") or (3, 224, 224)
    cfg["input_size"] = [traits.get("in_chans", channels), *traits.get("img_size", size)]
    cfg["num_classes"] = traits.get("num_classes")
    outdated = _OF_SIZE if cfg["input_size"] != list(start.get("input_size", ())) else ()
    if cfg["num_classes"] != start.get("num_classes"):
        cfg = without_classes(cfg)
    return {key: value for key, value in cfg.items() if key not in outdated}
