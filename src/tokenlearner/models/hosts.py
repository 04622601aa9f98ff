"""The models that tokens can be inserted in: a table, and `find_host(model)` that reads it.

A family of models is a row in `HOSTS`; a new one needs a row here and one in
tests/models/test_hosts.py. Models whose blocks cannot run on tokens have a row in `REFUSED` with
the reason. Classes are given by name, so that nothing has to be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn

from ..layers.blocks import PatchGrid, PositionArgs
from ..utils.validation import require

Source = str | int | Callable[[Any], Any]  # path of an attribute, value, or function of the model


@dataclass(frozen=True)
class Host:
    """Describes a family of models: for each field, where the model keeps the value.

    Args:
        blocks: Paths to the list of blocks, or functions; the first that exists counts.
        width: Channels of a token.
        num_prefix_tokens: Tokens in front of the positions.
        grid: Module or object with a `grid_size`.
        frames: Frames in the sequence.
        dynamic_img_size: Whether the model takes images of several sizes.
        position_args: What a block takes of positions besides its input.
        pools_positions: Whether the head reads a mean of positions besides prefix tokens.
    """

    blocks: tuple[Source, ...]
    width: Source
    num_prefix_tokens: Source
    grid: Source
    frames: Source = 1
    dynamic_img_size: Source = False
    position_args: PositionArgs | None = None
    pools_positions: Source = False


@dataclass(frozen=True)
class Place:
    """Holds the host that a model is or has, with the values that insertion needs.

    Args:
        name: Path of the host in the model; empty if it is the model itself.
        host: The module that has the blocks.
        blocks: The container of the blocks; they are wrapped where tokens are learned.
        width: Channels `c` of a token.
        num_prefix_tokens: Tokens in front of the positions.
        frames: Frames `t` in the sequence.
        grid: Module or object with the `grid_size` of a frame.
        dynamic_img_size: Whether the host takes images of several sizes.
        position_args: What a block takes of positions besides its input.
        pools_positions: Whether the head reads a mean of positions besides prefix tokens.
    """

    name: str
    host: nn.Module
    blocks: nn.Sequential | nn.ModuleList
    width: int
    num_prefix_tokens: int
    frames: int
    grid: Any
    dynamic_img_size: bool
    position_args: PositionArgs | None
    pools_positions: bool


def _pair(size: Any) -> tuple[int, int]:
    h, w = (size, size) if isinstance(size, int) else size
    return int(h), int(w)


def _patches(path: str = "") -> Callable[[Any], PatchGrid]:
    """Returns a function that reads `image_size` and `patch_size` of the module at a path."""

    def find(model: nn.Module) -> PatchGrid:
        owner: Any = model.get_submodule(path)
        return PatchGrid(_pair(owner.image_size), _pair(owner.patch_size))

    return find


def _batch_first(blocks: Any) -> Any:
    """Returns blocks of open_clip; those before version 2.24 run on `n b c`."""
    require(
        getattr(blocks[0].attn, "batch_first", True),
        "blocks of this version of open_clip take positions before images; update open_clip_torch",
    )
    return blocks


_TIMM = Host(
    blocks=("blocks",),
    width="embed_dim",
    num_prefix_tokens="num_prefix_tokens",
    grid="patch_embed",
    frames=lambda model: getattr(model.patch_embed, "frames", 1),  # of our video models
    dynamic_img_size=lambda model: not getattr(model.patch_embed, "strict_img_size", True),
    pools_positions=lambda model: model.global_pool not in ("token", ""),
)
_TORCHVISION = Host(
    blocks=("encoder.layers",), width="hidden_dim", num_prefix_tokens=1, grid=_patches()
)
_OPEN_CLIP = Host(
    blocks=(lambda model: _batch_first(model.transformer.resblocks),),
    width="transformer.width",
    num_prefix_tokens=1,
    grid=_patches(),
    pools_positions=lambda model: model.pool_type == "avg",
)
_TRANSFORMERS = Host(
    blocks=("layers", "encoder.layer", "encoder.layers"),  # as versions and families have it
    width="config.hidden_size",
    num_prefix_tokens=1,
    grid=_patches("embeddings.patch_embeddings"),
    dynamic_img_size=True,  # by interpolate_pos_encoding
    position_args=PositionArgs(exported=("attention_mask",)),
)


def _tubelets(model: Any) -> PatchGrid:
    """Returns the grid of a frame of transformers' ViViT, whose patches are tubelets, `t h w`."""
    _, height, width = model.config.tubelet_size
    return PatchGrid(_pair(model.config.image_size), (height, width))


_CLIP = replace(_TRANSFORMERS, grid=_patches("embeddings"), position_args=None)
_SIGLIP = replace(_CLIP, num_prefix_tokens=0)

HOSTS: dict[str, Host] = {
    "timm.models.vision_transformer.VisionTransformer": _TIMM,
    "timm.models.eva.Eva": replace(_TIMM, position_args=PositionArgs(arguments=("rope",))),
    "timm.models.beit.Beit": replace(
        _TIMM,
        position_args=PositionArgs(
            arguments=("shared_rel_pos_bias",), parameters=("attn.relative_position_bias_table",)
        ),
    ),
    "torchvision.models.vision_transformer.VisionTransformer": _TORCHVISION,
    "open_clip.transformer.VisionTransformer": _OPEN_CLIP,
    "transformers.models.vit.modeling_vit.ViTModel": _TRANSFORMERS,
    "transformers.models.deit.modeling_deit.DeiTModel": replace(_TRANSFORMERS, num_prefix_tokens=2),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": _TRANSFORMERS,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersModel": replace(
        _TRANSFORMERS, num_prefix_tokens=lambda model: 1 + model.config.num_register_tokens
    ),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": _SIGLIP,
    "transformers.models.siglip.modeling_siglip.SiglipVisionTransformer": _SIGLIP,  # before 5
    "transformers.models.clip.modeling_clip.CLIPVisionModel": _CLIP,
    "transformers.models.clip.modeling_clip.CLIPVisionTransformer": _CLIP,  # before 5
    "transformers.models.videomae.modeling_videomae.VideoMAEModel": replace(
        _TRANSFORMERS,
        num_prefix_tokens=0,
        frames=lambda model: model.config.num_frames // model.config.tubelet_size,
        dynamic_img_size=False,
        position_args=None,
    ),
    "transformers.models.vivit.modeling_vivit.VivitModel": replace(
        _TRANSFORMERS,
        grid=_tubelets,
        frames=lambda model: model.config.num_frames // model.config.tubelet_size[0],
        dynamic_img_size=False,  # its interpolate_pos_encoding takes clips for squares of positions
    ),
}

_WINDOWS = "attends in windows of the grid, and learned tokens have no place in one"
_GRID = "pools or convolves the grid in its blocks, and learned tokens have no place in one"
_DIVIDED = (
    "attends over time and over the grid of a frame in turn, and learned tokens have no place in "
    "one; take transformers' ViViT or VideoMAE, where all positions attend to each other"
)
_MIXES = "mixes tokens with weights whose size depends on the count of tokens"
_MAPS = "returns feature maps of its blocks, which learned tokens are not; use the plain model"
_OUTER = "wraps a model: insert into that model first, then compile or distribute it"
_WINDOWED = {
    "timm.models": "swin_transformer swin_transformer_v2 swin_transformer_v2_cr maxxvit hiera "
    "hieradet_sam2 vision_transformer_sam twins nest davit gcvit tiny_vit",
    "torchvision.models": "swin_transformer maxvit",
    "transformers.models": "swin.modeling_swin swinv2.modeling_swinv2 hiera.modeling_hiera "
    "maskformer.modeling_maskformer_swin donut.modeling_donut_swin vitdet.modeling_vitdet "
    "sam.modeling_sam",
}
REFUSED: dict[str, str] = {  # classes, or files with all of theirs
    **{f"{at}.{name}": _WINDOWS for at, names in _WINDOWED.items() for name in names.split()},
    "timm.models.mvitv2": _GRID,
    "timm.models.pvt_v2": _GRID,
    "timm.models.xcit": _GRID,
    "timm.models.levit": _GRID,
    "torchvision.models.video.mvit": _GRID,
    "timm.models.mlp_mixer": f"{_MIXES}; tokenlearner.models.TokenLearnerMixer is built for them",
    "tokenlearner.models.mixer": f"{_MIXES}; pass num_tokens and at when you build it",
    "tokenlearner.models.framevit": "learns tokens already; pass num_tokens when you build it",
    "tokenlearner.models.temporal": "runs on learned tokens already",
    "transformers.models.timesformer.modeling_timesformer": _DIVIDED,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Backbone": _MAPS,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersBackbone": _MAPS,
    "torch._dynamo.eval_frame.OptimizedModule": _OUTER,
    "torch.nn.parallel.distributed.DistributedDataParallel": _OUTER,
    "torch.nn.parallel.data_parallel.DataParallel": _OUTER,
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": _OUTER,
}
NEEDS_POSITIONS = {  # classes around a host that read positions from its output
    "timm.models._features.FeatureGetterNet",
    "transformers.models.vit.modeling_vit.ViTForMaskedImageModeling",
    "transformers.models.deit.modeling_deit.DeiTForMaskedImageModeling",
    "transformers.models.videomae.modeling_videomae.VideoMAEForPreTraining",
}
COUNTS_IMAGE_TOKENS = (  # in configs of vision-language models, as transformers names them
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("image_seq_length", "mm_tokens_per_image"),
)


def find_host(model: nn.Module) -> Place:
    """Finds the host in a model: the model itself, or the only part that is one.

    Works with and without learned tokens. Of a model for images and text it is the vision tower.

    Args:
        model: Any module.

    Raises:
        ValueError: There is no host, or several, or its blocks cannot run on tokens.

    >>> import timm
    >>> find_host(timm.create_model("vit_tiny_patch16_224")).num_prefix_tokens
    1
    """
    matches = {id(part): (name, part, row) for name, part, row in _search(model)}
    hosts = [match for match in matches.values() if isinstance(match[2], Host)]
    if len(hosts) == 1:
        return _place(*hosts[0])
    if hosts:
        names = ", ".join(f"{name} ({type(part).__name__})" for name, part, _ in hosts)
        raise ValueError(
            f"{type(model).__name__} has several models that tokens can be inserted in: {names}; "
            f"pass one of them, such as model.{hosts[0][0]}"
        )
    for _, part, reason in matches.values():
        raise ValueError(f"{_class(type(part))} is {_NO_HOST}: it {reason}")
    raise ValueError(f"{_class(type(model))} is {_NO_HOST}; {_known_hosts()}")


def check_positions_are_not_needed(model: nn.Module) -> None:
    """Checks that nothing around a host in the model needs all positions of the host's output.

    Raises:
        ValueError: Something does.
    """
    for name, _, row in _search(model):
        if isinstance(row, Host):
            for part in _around(model, name):
                if need := _need_of_positions(part):
                    raise ValueError(
                        f"{type(part).__name__} {need}; insert with fuse=True, which puts the "
                        f"tokens back on all positions, or in model.{name} for use on its own"
                        + _hint(part)
                    )


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yields the modules that a part of this path is inside of, the outermost first."""
    steps = name.split(".") if name else []
    for depth in range(len(steps)):
        yield model.get_submodule(".".join(steps[:depth]))


def _need_of_positions(part: nn.Module) -> str:
    """Returns how a module depends on all positions of the host in it, empty if it does not."""
    if any(_class(cls) in NEEDS_POSITIONS for cls in type(part).__mro__):
        return "reads all positions from its host, but learned tokens have none"
    config = getattr(part, "config", None)
    if any(getattr(config, name, None) is not None for name in COUNTS_IMAGE_TOKENS):
        return "reserves a place in its text for every position, but learned tokens are fewer"
    return ""


def _hint(part: nn.Module) -> str:
    """Returns another way out for a model whose text has a place for every position."""
    reserves = any(getattr(getattr(part, "config", None), n, None) for n in COUNTS_IMAGE_TOKENS)
    return "; tokenlearner.connect gives its language model fewer image tokens" if reserves else ""


_NO_HOST = "no model that tokens can be inserted in"


def _known_hosts() -> str:
    families: dict[str, list[str]] = {}
    for name in HOSTS:
        families.setdefault(name.partition(".")[0], []).append(name.rpartition(".")[2])
    known = "; ".join(f"{', '.join(names)} of {family}" for family, names in families.items())
    return (
        f"supported: {known}. For other models, wrap a block with "
        "tokenlearner.layers.ReducedBlock, or add a row to tokenlearner.models.HOSTS"
    )


def _search(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, Host | str]]:
    """Yields the outermost parts that have a row in a table: path, module, `Host` or reason."""
    if (row := _row(model)) is not None:
        yield name, model, row
        return
    for child_name, child in model.named_children():
        yield from _search(child, f"{name}.{child_name}" if name else child_name)


def _row(model: nn.Module) -> Host | str | None:
    for cls in type(model).__mro__:
        if reason := REFUSED.get(_class(cls)) or REFUSED.get(cls.__module__):
            return reason
        if (host := HOSTS.get(_class(cls))) and _blocks(model, host) is not None:
            return host
    return None


def _place(name: str, model: nn.Module, host: Any) -> Place:
    return Place(
        name=name,
        host=model,
        blocks=_blocks(model, host),
        width=_read(model, host.width),
        num_prefix_tokens=_read(model, host.num_prefix_tokens),
        frames=_read(model, host.frames),
        grid=_read(model, host.grid),
        dynamic_img_size=_read(model, host.dynamic_img_size),
        position_args=host.position_args,
        pools_positions=_read(model, host.pools_positions),
    )


def _blocks(model: nn.Module, host: Host) -> Any:
    candidates = (_read(model, path) for path in host.blocks)
    return next((blocks for blocks in candidates if blocks is not None), None)


def _read(model: nn.Module, source: Source) -> Any:
    if isinstance(source, str):
        return reduce(lambda owner, name: getattr(owner, name, None), source.split("."), model)
    return source(model) if callable(source) else source


def _class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
