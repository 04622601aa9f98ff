"""Where families of models keep what insertion needs: a table, and `look(model)` that reads it.

A family is a row in `HOSTS`. A new one is a row here and a row in tests/test_hosts.py. Models whose
blocks cannot run on tokens have a row in `REFUSED` that says why. Nothing is imported for either:
classes are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn

from ..layers.blocks import PatchGrid, PositionArgs

Source = str | int | Callable[[Any], Any]  # a path to an attribute, the value, or what finds it


@dataclass(frozen=True)
class Host:
    """Where a family of models keeps what insertion needs.

    Args:
        blocks: Paths to the list of blocks; the first that is there counts.
        width: Of a token.
        num_prefix_tokens: Tokens in front of the positions.
        grid: What knows `grid_size`.
        frames: Frames in the sequence.
        any_size: Whether images of several sizes are taken without the grid being told.
        of_positions: What a block is told of positions besides its input.
        pools_positions: Whether the head reads a mean of positions besides prefix tokens.
    """

    blocks: tuple[str, ...]
    width: Source
    num_prefix_tokens: Source
    grid: Source
    frames: Source = 1
    any_size: Source = False
    of_positions: PositionArgs | None = None
    pools_positions: Source = False


@dataclass(frozen=True)
class Place:
    """What was found in a model: the host, and what insertion needs of it.

    Args:
        name: Path of the host in the model; empty if it is the model itself.
        host: The module that has the blocks.
        blocks: They themselves, in their container; wrapped where tokens are learned.
        width: Channels `c` of a token.
        num_prefix_tokens: Tokens in front of the positions.
        frames: Frames `t` in the sequence.
        grid: What knows the `grid_size` of a frame.
        any_size: Whether images of several sizes are taken without the grid being told.
        of_positions: What a block is told of positions besides its input.
        pools_positions: Whether the head reads a mean of positions besides prefix tokens.
    """

    name: str
    host: nn.Module
    blocks: nn.Sequential | nn.ModuleList
    width: int
    num_prefix_tokens: int
    frames: int
    grid: Any
    any_size: bool
    of_positions: PositionArgs | None
    pools_positions: bool


def _pair(size: Any) -> tuple[int, int]:
    h, w = (size, size) if isinstance(size, int) else size
    return int(h), int(w)


def _patches(path: str = "") -> Callable[[Any], PatchGrid]:
    """Finds `image_size` and `patch_size` in the module at a path."""

    def find(model: nn.Module) -> PatchGrid:
        owner: Any = model.get_submodule(path)
        return PatchGrid(_pair(owner.image_size), _pair(owner.patch_size))

    return find


_TIMM = Host(
    blocks=("blocks",),
    width="embed_dim",
    num_prefix_tokens="num_prefix_tokens",
    grid="patch_embed",
    frames=lambda model: getattr(model.patch_embed, "frames", 1),  # our video models' tell
    any_size=lambda model: not getattr(model.patch_embed, "strict_img_size", True),
    pools_positions=lambda model: model.global_pool not in ("token", ""),
)
_TORCHVISION = Host(
    blocks=("encoder.layers",), width="hidden_dim", num_prefix_tokens=1, grid=_patches()
)
_TRANSFORMERS = Host(
    blocks=("layers", "encoder.layer", "encoder.layers"),  # as versions and families have it
    width="config.hidden_size",
    num_prefix_tokens=1,
    grid=_patches("embeddings.patch_embeddings"),
    any_size=True,  # by interpolate_pos_encoding
    of_positions=PositionArgs(exported=("attention_mask",)),
)
_CLIP = replace(_TRANSFORMERS, grid=_patches("embeddings"), of_positions=None)
_SIGLIP = replace(_CLIP, num_prefix_tokens=0)

HOSTS: dict[str, Host] = {
    "timm.models.vision_transformer.VisionTransformer": _TIMM,
    "timm.models.eva.Eva": replace(_TIMM, of_positions=PositionArgs(arguments=("rope",))),
    "timm.models.beit.Beit": replace(
        _TIMM,
        of_positions=PositionArgs(
            arguments=("shared_rel_pos_bias",), parameters=("attn.relative_position_bias_table",)
        ),
    ),
    "torchvision.models.vision_transformer.VisionTransformer": _TORCHVISION,
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
        any_size=False,
        of_positions=None,
    ),
}

_WINDOWS = "attends in windows of the grid, and learned tokens have no place in one"
_GRID = "pools or convolves the grid in its blocks, and learned tokens have no place in one"
_MIXES = "mixes tokens with weights whose size depends on the count of tokens"
_MAPS = "gives feature maps of blocks, which learned tokens are not; take the family's bare model"
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
    "tokenlearner.models.mixer": f"{_MIXES}; build it anew with num_tokens and at",
    "tokenlearner.models.framevit": "learns tokens by itself; build it anew with num_tokens and at",
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


def find_host(model: nn.Module) -> Place:
    """Finds the host in a model, which is the model itself or a part of it.

    Works with and without learned tokens. A part is taken if there is one host only: so the vision
    tower of a model of images and text is found, and its text tower is no host.

    Args:
        model: Any module.

    Raises:
        ValueError: There is no host, or several, or its blocks cannot run on tokens.

    >>> import timm
    >>> look(timm.create_model("vit_tiny_patch16_224")).num_prefix_tokens
    1
    """
    found = {id(part): (name, part, row) for name, part, row in _search(model)}
    hosts = [one for one in found.values() if isinstance(one[2], Host)]
    if len(hosts) == 1:
        return _place(*hosts[0])
    if hosts:
        names = ", ".join(f"{name} ({type(part).__name__})" for name, part, _ in hosts)
        raise ValueError(
            f"{type(model).__name__} has several models that tokens can be inserted in: {names}; "
            f"pass the one you mean, such as model.{hosts[0][0]}"
        )
    for _, part, reason in found.values():
        raise ValueError(f"{_class(type(part))} is {_NO_HOST}: it {reason}")
    raise ValueError(f"{_class(type(model))} is {_NO_HOST}; {_known()}")


def check_positions_are_not_needed(model: nn.Module) -> None:
    """Refuses a model that reads all positions from its host's output.

    Raises:
        ValueError: It is one.
    """
    for part in model.modules():
        if any(_class(cls) in NEEDS_POSITIONS for cls in type(part).__mro__):
            raise ValueError(
                f"{type(part).__name__} reads positions from its blocks, of which learned tokens "
                "are left; insert with fuse=True, which puts the tokens back on all positions"
            )


_NO_HOST = "no model that tokens can be inserted in"


def _known() -> str:
    families: dict[str, list[str]] = {}
    for name in HOSTS:
        families.setdefault(name.partition(".")[0], []).append(name.rpartition(".")[2])
    known = "; ".join(f"{', '.join(names)} of {family}" for family, names in families.items())
    return (
        f"known: {known}. For others, wrap a block yourself with "
        "tokenlearner.layers.blocks.ReducedBlock, or add a row to tokenlearner.models.hosts.HOSTS"
    )


def _search(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, Host | str]]:
    """The outermost parts that have a row, with it: a host, or why it is none."""
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
        any_size=_read(model, host.any_size),
        of_positions=host.of_positions,
        pools_positions=_read(model, host.pools_positions),
    )


def _blocks(model: nn.Module, host: Host) -> Any:
    found = (_read(model, path) for path in host.blocks)
    return next((blocks for blocks in found if blocks is not None), None)


def _read(model: nn.Module, source: Source) -> Any:
    if isinstance(source, str):
        return reduce(lambda owner, name: getattr(owner, name, None), source.split("."), model)
    return source(model) if callable(source) else source


def _class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
