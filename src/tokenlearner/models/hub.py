"""Models on the Hugging Face Hub, their model cards, and the methods that save and load classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import (
    HfApi,
    ModelCard,
    ModelCardData,
    ModelHubMixin,
    hf_hub_download,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..utils.io import atomic_write
from ..utils.modules import uncompiled
from ..utils.text import plain_text
from ..utils.validation import check_choice, require
from .adapters import ADAPTER, Host, adapter_file, read_adapter, write_adapter
from .connection import get_connection, learners_of
from .features import new_parameters
from .hub_access import hub_or_cache, within
from .insertion import get_insertion
from .serialization import (
    CARD,
    CONFIG,
    WEIGHTS,
    get_build_args,
    read_config,
    read_files,
    weights_file,
    write_files,
)

Measured = Mapping[str, Mapping[str, object]]
TAGS = ["timm", "token-reduction", "tokenlearner"]
LIBRARY, PAPER = "tokenlearner", "https://arxiv.org/abs/2106.11297"
CODE = "https://github.com/google-research/scenic/tree/main/scenic/projects/token_learner"
TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"

_HUB = "hf-hub:"
_SECONDS = 15  # in which the Hub answers, tried again and again; one try has 10
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]")  # of Markdown and HTML, in a cell
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_FILES = (".safetensors", *_PICKLES)
_REPO = re.compile(r"(?:hf-hub:)?(\w[\w.-]*/\w[\w.-]*)(?:@([^@]+))?")


class HubModel(
    ModelHubMixin,
    library_name=LIBRARY,
    tags=list(TAGS),
    paper_url=PAPER,
    repo_url=CODE,
):
    """Gives a class `save_pretrained`, `from_pretrained` and `push_to_hub`; comes first in bases.

    The mixin's own methods write a file after the other and take no `.safetensors` file; here a
    folder is that of `serialization.py`, written atomically. A model can be saved if
    `tokenlearner.create_model`, `timm.create_model` or a loading function made it.
    """

    takes_tokens = True  # as arguments of its class, by the names that `insert` has

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any,
        save_directory: str | Path,
        *,
        measured: Measured | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the folder, and uploads it if `push_to_hub` is set.

        Args:
            save_directory: The folder; other files and an existing README are kept.
            measured: As in `model_card`.
            repo_id: For `push_to_hub`; by default the folder's name.
            push_to_hub: Upload the model too.
            push_to_hub_kwargs: As in `push_to_hub`.

        Returns:
            The address of the commit, None without upload.

        Raises:
            ValueError: The model could not be built again from the folder.
        """
        if push_to_hub_kwargs and not push_to_hub:
            names = ", ".join(push_to_hub_kwargs)
            raise ValueError(f"save_pretrained takes {names} with push_to_hub=True only")
        save_model(self, save_directory, measured)
        if not push_to_hub:
            return None
        repo_id = repo_id or Path(save_directory).name
        return self.push_to_hub(repo_id, measured=measured, **push_to_hub_kwargs)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self: Any, repo_id: str, *, measured: Measured | None = None, **kwargs: Any
    ) -> str:
        """Uploads the model, as `tokenlearner.push_to_hub`."""
        return push_to_hub(self, repo_id, measured, **kwargs)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> Any:
        """Loads a model of this class as it was saved, in evaluation mode.

        Args:
            pretrained_model_name_or_path: As in `tokenlearner.load_model`; `user/repo` is a model
                on the Hub too, where there is neither such a path nor a folder `user` here.
            options: As in `tokenlearner.load_model`. No argument can change the model; call
                `reset_classifier` or `set_input_size` afterwards.

        Raises:
            ValueError: There is no such model, it is damaged or half-written, or of another class.
        """
        name = pretrained_model_name_or_path
        is_repo = isinstance(name, str) and _REPO.fullmatch(name) and not name.startswith(_HUB)
        if is_repo and not (local := Path(name)).exists() and local.suffix not in _FILES:
            _check_no_folder(local)
            name = f"{_HUB}{name}"
        model = load_model(name, **options)
        if not isinstance(model, cls):
            raise ValueError(
                f"{pretrained_model_name_or_path} has a {type(model).__name__}, expected a "
                f"{cls.__name__}; call tokenlearner.load_model, which takes any"
            )
        return model

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Returns `model_card` as the Hub's type."""
        return ModelCard(model_card(self, *args, **kwargs))


def model_card(
    model: Any,
    measured: Measured | None = None,
    location: str | None = None,
    only: Literal["learned"] | None = None,
) -> str:
    """Returns the text of a model card: what the model is, how to load it, what was measured.

    Args:
        model: As in `write_files`.
        measured: A table as columns of rows, such as `{"ours": asdict(benchmark(...)["ours"])}`
            or `{"ours": {"top-1": 0.81}}`.
        location: Path of the model, or its name on the Hub, `hf-hub:user/name`.
        only: As in `save_model`.

    Raises:
        ValueError: `measured` is no table, or the model does not know how it was built.
    """
    name = _host_name(model) if only else get_build_args(model)["name"]
    parts = [*(new_parameters(model) if only else model.parameters())]
    if only and (connection := get_connection(model)):
        parts += [p for learner in learners_of(model) for p in learner.parameters()]
    else:
        connection = None
    task = "video-classification" if hasattr(model, "num_frames") else "image-classification"
    if not getattr(model, "num_classes", 1):
        task = "image-feature-extraction"
    data = ModelCardData(
        library_name=LIBRARY,
        license=getattr(model, "pretrained_cfg", {}).get("license"),
        pipeline_tag="image-text-to-text" if connection else task,
        tags=list(TAGS),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        only=only,
        class_name=type(model).__name__,
        is_ours=isinstance(model, HubModel),
        parameters=sum(parameter.numel() for parameter in parts),
        insertion=get_insertion(model),
        connection=connection,
        location=location or "path/to/this/folder",
        paper=PAPER,
        code=CODE,
        table=_table(measured) if measured else None,
    )
    return f"{card.content}\n"


def _table(measured: Measured) -> list[list[str]]:
    """Returns the cells of a table: a row of names, then a row for each thing that was measured."""
    is_table = isinstance(measured, Mapping)
    if not is_table or not all(isinstance(column, Mapping) for column in measured.values()):
        raise ValueError(
            f"measured is {measured!r}, expected columns of rows, such as "
            "{'this model': {'top-1': 0.81}}; take dataclasses.asdict of a result"
        )
    names = dict.fromkeys(name for column in measured.values() for name in column)
    rows = [[name, *(column.get(name, "") for column in measured.values())] for name in names]
    return [[_cell(value) for value in row] for row in [["", *measured], *rows]]


def _cell(value: object) -> str:
    """Formats a value; a timing, which is a mapping, as its median and quartiles."""
    if isinstance(value, Mapping):
        if value.keys() == {"median", "low", "high"}:
            return f"{_cell(value['median'])} ({_cell(value['low'])} to {_cell(value['high'])})"
        return ", ".join(f"{_cell(key)} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _MARKUP.sub(r"\\\g<0>", plain_text(" ".join(str(value).split())))


def save_model(
    model: nn.Module,
    path: str | Path,
    measured: Measured | None = None,
    *,
    only: Literal["learned"] | None = None,
    host: nn.Module | None = None,
) -> Path:
    """Writes a model and all that is needed to build it again, to a file or a folder.

    The classes, the pooling and the size of images may have been changed since it was made, by
    `reset_classifier` and `set_input_size`.

    With `only="learned"` the learners and fusers are written alone, for `load_adapter`; a few
    hundred kilobytes. The model may then be any host that `insert` takes.

    Args:
        model: Made by `create_model` or `load_model`, or a named one of ours by
            `timm.create_model`; with or without learned tokens.
        path: A file that ends in `.safetensors`, or a folder for `model.safetensors`,
            `config.json`, which timm reads too, and a model card; with `only` for
            `adapter.safetensors` and a card. An existing README is kept, and so is a `config.json`
            that is not a model's: timm cannot read the folder then.
        measured: A table for the model card, as columns of rows: `{"ours": {"top-1": 0.81}}`.
        only: `"learned"`, or None for the whole model.
        host: With `only`, the host as it was before tokens were inserted, to write what was fitted
            of it too, as by `calibrate(tail=True)`. None takes the host as it is in the model.

    Returns:
        The file with the weights.

    Raises:
        ValueError: The model could not be built again, or `measured` is no table or has no card;
            with `only`, it has no learned tokens, or is not the host with tokens.
    """
    path, model = Path(path).expanduser(), uncompiled(model)
    check_only(only, host)
    has_card = path.suffix != ".safetensors"
    require(
        has_card or measured is None,
        f"{path} is one file and has no model card; pass measured with a folder",
    )
    has_card &= not (path / CARD).exists()
    if only is None:
        return write_files(model, path, model_card(model, measured) if has_card else None)
    card = model_card(model, measured, only=only) if has_card else None
    file = write_adapter(model, path, host)
    if card is not None:
        with atomic_write(path / CARD) as temporary:
            temporary.write_text(card, encoding="utf-8")
    return file


def load_adapter(host: Host, path: str | Path, *, token: str | bool | None = None) -> Host:
    """Inserts the learned tokens that `save_model(only="learned")` wrote; changes a host in place.

    Args:
        host: The same as they were written for, with the same weights, in the same dtype.
        path: The file, its folder, or on the Hub `hf-hub:user/repo` or `hf-hub:user/repo@revision`.
        token: For the Hub; by default that of `hf auth login`.

    Returns:
        The host with tokens; its mode, device and dtype stay.

    Raises:
        ValueError: There is no such file, it is damaged, or of another host. The host is as it was
            then.

    >>> import tempfile, timm
    >>> from tokenlearner import insert, remove
    >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = save_model(insert(vit, 2), folder, only="learned")
    ...     again = load_adapter(remove(vit), folder)
    >>> get_insertion(again)["num_tokens"]
    2
    """
    repo = _REPO.fullmatch(path) if isinstance(path, str) and path.startswith(_HUB) else None
    if repo is None:
        return read_adapter(host, adapter_file(path))
    with hub_or_cache():
        options = {"revision": repo[2], "token": token}
        return read_adapter(host, _download_file(repo[1], ADAPTER, options))


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> nn.Module:
    """Builds the model that `save_model` wrote, learned tokens included, in evaluation mode.

    Args:
        path: The file, the folder, or a model on the Hub, `hf-hub:user/repo` or
            `hf-hub:user/repo@revision`; nothing else is looked up there.
        revision: On the Hub: a branch, a tag or a commit.
        cache_dir: Where files of the Hub are kept.
        token: For the Hub; by default that of `hf auth login`.
        force_download: Download files again that are kept already.
        local_files_only: Take files of the Hub only where they are kept already.

    Raises:
        ValueError: There is no such model here or on the Hub, it is not one of `save_model`'s, or
            its weights are NaN or infinite.
    """
    local, repo = Path(path).expanduser(), _REPO.fullmatch(path) if isinstance(path, str) else None
    if repo and str(path).startswith(_HUB):
        if repo[2] and revision and repo[2] != revision:
            raise ValueError(f"{path} and revision={revision!r} differ; pass one revision")
        options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        options |= {"revision": repo[2] or revision, "force_download": force_download}
        with nullcontext() if local_files_only else hub_or_cache():
            return read_files(*_download(repo[1], options))
    if not path or not local.exists():
        hint = f"; a model on the Hub is {_HUB}{path}" if repo else ""
        raise ValueError(
            f"there is no file or folder {path or repr(path)}; pass one that train or save_model "
            f"wrote{hint}"
        )
    _check_kind(local)
    file, config_file = weights_file(local), local / CONFIG
    if not file.is_file():
        raise ValueError(f"there is no {file}; pass the file or folder that save_model wrote")
    return read_files(file, config_file if config_file.is_file() else None)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    measured: Measured | None = None,
    *,
    only: Literal["learned"] | None = None,
    host: nn.Module | None = None,
    commit_message: str = "Push a model of tokenlearner",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    **upload: Any,
) -> str:
    """Uploads to the Hub what `save_model` writes to a folder, in one commit.

    Args:
        model: As in `save_model`.
        repo_id: Such as `user/name`; the repository is created if there is none.
        measured: As in `save_model`. An existing README of the repository is kept.
        only: As in `save_model`.
        host: As in `save_model`.
        commit_message: Message of the commit.
        private: Make a new repository private.
        token: For the Hub; by default that of `hf auth login`.
        branch: Branch to push to; by default `main`.
        upload: Further arguments of `HfApi.upload_folder`, such as `create_pr`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The model could not be built again, or `repo_id` is no name. Nothing has been
            created on the Hub then.
    """
    validate_repo_id(repo_id)
    check_only(only, host)
    model = uncompiled(model)
    with TemporaryDirectory() as folder:
        card = model_card(model, measured, f"{_HUB}{repo_id}", only)
        if only:
            write_adapter(model, folder, host)
            (Path(folder) / CARD).write_text(card, encoding="utf-8")
        else:
            write_files(model, Path(folder), card)
        api = HfApi(token=token, library_name=LIBRARY)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id, CARD, revision=branch):
            (Path(folder) / CARD).unlink()
        options = {"repo_id": repo_id, "folder_path": folder, "revision": branch}
        return api.upload_folder(**options, commit_message=commit_message, **upload)


def check_only(only: str | None, host: nn.Module | None) -> None:
    """Checks what of a model is to be written.

    Raises:
        ValueError: `only` is unknown, or a host is given without it.
    """
    if only is not None:
        check_choice("only", only, ("learned",))
    require(only is not None or host is None, 'host is for only="learned"; leave it out')


def _host_name(model: Any) -> str:
    """Returns what a host is called, whoever built it."""
    built = (getattr(model, "tokenlearner_config", None) or {}).get("name")
    config = getattr(model, "config", None)
    known = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return built or architecture or known or type(model).__name__


def _check_no_folder(path: Path) -> None:
    if path.parent.is_dir():
        raise ValueError(
            f"there is no {path}, though {path.parent} is a folder here; correct the name, or "
            f"write {_HUB}{path} for a model on the Hub"
        )


def _check_kind(path: Path) -> None:
    """Raises ValueError for files that only unpickling reads, alone or in a folder."""
    is_other_folder = path.is_dir() and not (path / WEIGHTS).exists()
    for file in sorted(path.iterdir()) if is_other_folder else [path]:
        if file.suffix.lower() in _PICKLES and not file.is_dir():
            raise ValueError(
                f"{file} has weights but no config, and may contain code, so it is not opened; "
                "load its weights with tokenlearner.checkpoints.read_weights, which executes "
                "nothing, and pass them to model.load_state_dict"
            )


def _download(repo_id: str, options: Mapping[str, Any]) -> tuple[Path, Path]:
    """Downloads the weights and the config of a repository to the cache."""
    config = _download_file(repo_id, CONFIG, options)
    if not read_config(config):
        raise ValueError(
            f"{repo_id} on the Hub has a {CONFIG} that is not one of tokenlearner.save_model's; "
            "timm's own models are built by tokenlearner.create_model(name, pretrained=True)"
        )
    return _download_file(repo_id, WEIGHTS, options), config


def _download_file(repo_id: str, name: str, options: Mapping[str, Any]) -> Path:
    """Downloads a file; the config, which comes first, within some seconds."""
    download = partial(hf_hub_download, repo_id, name, library_name=LIBRARY, **options)
    try:
        return Path(within(_SECONDS, download) if name == CONFIG else download())
    except Exception as error:  # the Hub's, the network's and the disk's are of many kinds
        where = f" at {options['revision']}" if options["revision"] else ""
        raise ValueError(
            f"{repo_id} is not a file or folder, and {name} of {repo_id}{where} cannot be loaded "
            f"from the Hub ({type(error).__name__}: {str(error).strip()}); correct the path or the "
            "name, connect, or log in with `hf auth login` if it is private"
        ) from error
