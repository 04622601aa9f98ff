"""Models on the Hugging Face Hub, and the methods with which classes save and load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from .card import CODE, LIBRARY, LICENSE, PAPER, TAGS, Measured, model_card
from .serialization import (
    CARD,
    CONFIG,
    WEIGHTS,
    is_config,
    read_config,
    read_files,
    weights_file,
    write_files,
)

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_REPO = re.compile(r"(?:hf-hub:)?(\w[\w.-]*/\w[\w.-]*)(?:@([^@]+))?")


class HubModel(
    ModelHubMixin,
    library_name=LIBRARY,
    tags=list(TAGS),
    license=LICENSE,
    paper_url=PAPER,
    repo_url=CODE,
):
    """Gives a class `save_pretrained`, `from_pretrained` and `push_to_hub`; comes first in bases.

    A model knows how it was built if `tokenlearner.create_model`, `timm.create_model` or a loading
    function made it. Its folder is described at the top of `saving.py`.
    """

    takes_tokens = True  # by the names that `insert` has, when it is built

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes an instance without the mixin's record of the arguments: ours is more exact."""
        return object.__new__(cls)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        *,
        measured: Measured | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the folder, and uploads it if told to.

        Args:
            save_directory: The folder; what it has besides is kept, a README too.
            measured: As in `model_card`.
            repo_id: For `push_to_hub`; the folder's name if it is not told.
            push_to_hub: Upload the model too.
            push_to_hub_kwargs: As in `push_to_hub`.

        Returns:
            The address of the commit if there is one.

        Raises:
            ValueError: The model could not be built again from the folder.
        """
        if push_to_hub_kwargs and not push_to_hub:
            names = ", ".join(push_to_hub_kwargs)
            raise ValueError(f"save_pretrained takes {names} with push_to_hub=True only")
        write_model(self, save_directory, measured)
        if not push_to_hub:
            return None
        repo_id = repo_id or Path(save_directory).name
        return self.push_to_hub(repo_id, measured=measured, **push_to_hub_kwargs)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, repo_id: str, *, measured: Measured | None = None, **kwargs: Any
    ) -> str:
        """Uploads the model; the arguments and errors are those of `upload_model`."""
        return upload_model(self, repo_id, measured, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Loads a model of this class, in evaluation mode.

        Args:
            pretrained_model_name_or_path: As in `tokenlearner.load_model`.
            force_download: Download what is in the cache already.
            token: For the Hub; by default that of `hf auth login`.
            cache_dir: Of the Hub's files.
            local_files_only: Take the Hub's files from the cache only.
            revision: A branch, tag or commit on the Hub.
            model_kwargs: None can be taken: the model is as it was saved.

        Raises:
            ValueError: There is no such model, it is damaged or half-written, or of another class.
        """
        if model_kwargs:
            raise ValueError(
                f"from_pretrained takes no {', '.join(model_kwargs)}: a model comes as it was "
                "saved; call reset_classifier or set_input_size on it afterwards"
            )
        return cls._from_pretrained(
            model_id=pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Returns `model_card` as the Hub's type."""
        return ModelCard(model_card(self, *args, **kwargs))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str | Path, **options: Any) -> Any:  # pyright: ignore
        model = read_model(model_id, **options)
        if not isinstance(model, cls):
            raise ValueError(
                f"{model_id} has a {type(model).__name__}, expected a {cls.__name__}; call "
                "tokenlearner.load_model, which takes any"
            )
        return model


def write_model(
    model: Any, path: str | Path, measured: Measured | None = None, place: str | None = None
) -> Path:
    """Writes a model to a file, or to a folder with a model card if that has none.

    Args:
        model: As in `write_files`.
        path: As in `write_files`.
        measured: As in `model_card`; for a folder.
        place: As in `model_card`.

    Returns:
        The file with the weights.

    Raises:
        ValueError: The model could not be built again, or `measured` is no table or has no place.
    """
    path, model = Path(path), getattr(model, "_orig_mod", model)  # where torch.compile wraps it
    if weights_file(path) != path:
        card = None if (path / CARD).exists() else model_card(model, measured, place)
        return write_files(model, path, card)
    if measured is not None:
        raise ValueError(f"{path} is one file and has no model card; pass measured with a folder")
    return write_files(model, path)


def read_model(path: str | Path, **options: Any) -> Any:
    """Builds the model in a file, in a folder or on the Hub, in evaluation mode.

    Args:
        path: A file, a folder, or a string `user/repo`, `user/repo@revision` or
            `hf-hub:user/repo` where no such path exists.
        options: For the Hub: what `hf_hub_download` takes.

    Raises:
        ValueError: There is no such model, or it is damaged, half-written or of another kind.
    """
    local, repo = Path(path), _REPO.fullmatch(path) if isinstance(path, str) else None
    if repo and not local.exists() and local.suffix not in (".safetensors", *_PICKLES):
        return read_files(*_download(repo[1], repo[2], options))
    _check_kind(local)
    file, config_file = weights_file(local), local / CONFIG
    if not file.is_file():
        raise ValueError(f"there is no {file}; pass the file or folder that save_model wrote")
    return read_files(file, config_file if config_file.is_file() else None)


def _check_kind(path: Path) -> None:
    """Refuses files that only unpickling can read, alone or in a folder without ours."""
    found = [path]
    if path.is_dir() and not (path / WEIGHTS).exists():
        found = sorted(path.iterdir())
    for file in found:
        if file.suffix.lower() in _PICKLES and not file.is_dir():
            raise ValueError(
                f"{file} is of a kind that has weights but no config, and may hold code; it is not "
                "opened. tokenlearner.checkpoints.read_weights reads it and executes nothing; give "
                "what it returns to model.load_state_dict"
            )


def _download(repo_id: str, revision: str | None, options: Mapping[str, Any]) -> tuple[Path, Path]:
    """The weights and the config of a repository, in the cache."""
    told = options.get("revision")
    if revision and told and revision != told:
        raise ValueError(f"{repo_id} is asked for at {revision} and at {told}; name one revision")
    options = {**options, "revision": revision or told, "library_name": LIBRARY}
    config = _file_of(repo_id, CONFIG, options)
    if not is_config(read_config(config)):
        raise ValueError(
            f"{repo_id} on the Hub has a {CONFIG} that is not one of tokenlearner.save_model's; "
            "timm's own models are built by tokenlearner.create_model(name, pretrained=True)"
        )
    return _file_of(repo_id, WEIGHTS, options), config


def _file_of(repo_id: str, name: str, options: Mapping[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(repo_id, name, **options))
    except Exception as error:  # the Hub's, the network's and the disk's are of many kinds
        where = f" at {options['revision']}" if options["revision"] else ""
        raise ValueError(
            f"{repo_id} is no file or folder here, and the Hub does not give {name} of a model "
            f"{repo_id}{where} ({type(error).__name__}: {str(error).strip()}); correct the path or "
            "the name, connect, or log in with `hf auth login` if it is private"
        ) from error


def upload_model(
    model: Any,
    repo_id: str,
    measured: Measured | None = None,
    *,
    commit_message: str = "Push a model of tokenlearner",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    **upload: Any,
) -> str:
    """Uploads a model's folder in one commit; the repository is made if there is none.

    Args:
        model: As in `write_model`.
        repo_id: Such as `user/name`.
        measured: As in `model_card`. A README that the repository has is kept.
        commit_message: Of the commit.
        private: Whether a new repository is private.
        token: For the Hub; by default that of `hf auth login`.
        branch: To push to; by default `main`.
        upload: What `HfApi.upload_folder` takes besides, such as `create_pr`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The model could not be built again, or `repo_id` is no name; before anything
            is made on the Hub.
    """
    validate_repo_id(repo_id)
    with TemporaryDirectory() as folder:
        write_model(model, folder, measured, repo_id)
        api = HfApi(token=token, library_name=LIBRARY)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id, CARD, revision=branch):
            (Path(folder) / CARD).unlink()
        where = {"repo_id": repo_id, "folder_path": folder, "revision": branch}
        return api.upload_folder(**where, commit_message=commit_message, **upload)
