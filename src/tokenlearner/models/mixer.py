"""MLP-Mixers that run on learned tokens, by name: timm's blocks and our wrappers.

The MLP that mixes tokens has a weight for every position, so a block built for `n` positions cannot
take `k` tokens and `insert` cannot put a learner into a Mixer that exists. Here the blocks behind
the learner are built for `k` from the start.

Importing this file registers the names below with timm. They follow timm's:
`mixer_{size}{patch}_tl{tokens}at{block}[_fuser]_{resolution}`.
Source: Tolstikhin et al., arXiv 2105.01601, for the Mixer, whose layers are timm's with flax's
numbers (eps 1e-6, tanh GELU); arXiv 2106.11297 for the learners.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from ..layers.token_learner import LEARNERS
from ..utils.validation import check_choice, check_count, check_flag
from .features import check_has_grid
from .hub import HubModel
from .insertion import InsertionConfig, block_index, wrap
from .registry import register

_OFFICIAL: dict[str, Any] = {
    "act_layer": partial(nn.GELU, approximate="tanh"),
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
}


class TokenLearnerMixer(HubModel, MlpMixer):
    """An MLP-Mixer that runs on learned tokens from one of its blocks on.

    timm's interface is intact. Images have one size, that of `img_size`, as in every Mixer.

    Args:
        num_tokens: Tokens `k` to learn; 0 is the plain Mixer.
        at: The learner runs in front of this block, counted from 0, or at this share of the depth.
        learner: As in `insert`.
        fuse: As in `insert`: the tokens go back on all positions behind each block from `at` on.
        fuser_bottleneck_dim: As in `insert`.
        num_blocks: As in timm's MlpMixer.
        block_layer: As in timm's MlpMixer; built for `k` tokens from `at` on.
        kwargs: What timm's MlpMixer takes besides. The one default that differs: tanh GELU.

    Shape:
        `b c h w -> b classes`

    Raises:
        ValueError: An argument is out of range, or there are fewer positions than tokens.

    Source: timm's MlpMixer, and scenic's `EncoderMod` and `EncoderModFuser` for the learners.

    >>> import torch
    >>> mixer = TokenLearnerMixer(num_tokens=8, img_size=64, embed_dim=32, num_classes=10)
    >>> images = torch.ones(2, 3, 64, 64)
    >>> mixer(images).shape, mixer.forward_features(images).shape
    (torch.Size([2, 10]), torch.Size([2, 8, 32]))
    """

    def __init__(
        self,
        *,
        num_tokens: int = 0,
        at: int | float = 0.5,
        learner: str = "v11",
        fuse: bool = False,
        fuser_bottleneck_dim: int | None = 64,
        num_blocks: int = 8,
        block_layer: Callable[..., nn.Module] = MixerBlock,
        **kwargs: Any,
    ):
        check_count("num_tokens", num_tokens, least=0)
        index = block_index(at, check_count("num_blocks", num_blocks))
        check_choice("learner", learner, list(LEARNERS))
        check_flag("fuse", fuse)
        if fuser_bottleneck_dim:
            check_count("fuser_bottleneck_dim", fuser_bottleneck_dim)
        build: Any = _shorter_from(index, num_tokens, block_layer) if num_tokens else block_layer
        super().__init__(num_blocks=num_blocks, block_layer=build, **(_OFFICIAL | kwargs))
        end = num_blocks if fuse else index + 1
        # after timm's initialization, so that learners and fusers keep their own
        for i in range(index, end if num_tokens else index):
            module = LEARNERS[learner](self.embed_dim, num_tokens)
            self.blocks[i] = wrap(
                self.blocks[i], module, fuse, fuser_bottleneck_dim, grid=self.stem
            )
        if num_tokens:
            self.tokenlearner_insertion = InsertionConfig(
                num_tokens, index, learner, fuse, fuser_bottleneck_dim or 0
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """Runs everything but the head: `b c h w -> b k c`, or `b n c` fused or without tokens.

        Raises:
            ValueError: The images do not have the model's size.
        """
        self._check_images(x)
        return super().forward_features(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns the features behind chosen blocks, with or without the final ones, as timm does.

        Raises:
            ValueError: The images do not have the model's size, or a feature map is requested
                where only learned tokens remain.
        """
        self._check_images(x)
        if output_fmt == "NCHW":
            check_has_grid(self, feature_take_indices(len(self.blocks), indices)[0])
        return super().forward_intermediates(
            x, indices, norm, stop_early, output_fmt, intermediates_only
        )

    def _check_images(self, x: Tensor) -> None:
        """Refuses images that the stem was not built for."""
        size: Any = self.stem.img_size  # a pair, as the stem is built with one
        expected = (self.stem.proj.in_channels, *size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"images are {list(x.shape)}, expected [b, {', '.join(map(str, expected))}]; "
                "resize them, or build the Mixer with another img_size or in_chans"
            )


def _shorter_from(
    index: int, num_tokens: int, block_layer: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    """Returns a `block_layer` that builds its blocks for `num_tokens` from the index-th one on."""
    built = 0

    def build(dim: int, seq_len: int, *args: Any, **kwargs: Any) -> nn.Module:
        nonlocal built
        if num_tokens > seq_len:
            raise ValueError(
                f"num_tokens is {num_tokens}, expected at most the {seq_len} positions of an image"
            )
        built += 1
        length = num_tokens if built > index else seq_len
        return block_layer(dim, length, *args, **kwargs)

    return build


_SMALL = {"num_blocks": 8, "embed_dim": 512}
_BASE = {"num_blocks": 12, "embed_dim": 768}
_LARGE = {"num_blocks": 24, "embed_dim": 1024}
_MINI = {"num_blocks": 6, "embed_dim": 64, "img_size": 28, "in_chans": 1, "num_classes": 10}
_FUSED = {"num_tokens": 8, "fuse": True}
MIXERS: dict[str, dict[str, Any]] = {  # learners are V1.1
    # for trying things out
    "mixer_mini_patch4_tl8at3_28": {**_MINI, "patch_size": 4, "num_tokens": 8, "at": 3},
    # timm's sizes, with 8 tokens from the middle on
    "mixer_s32_tl8at4_224": {**_SMALL, "patch_size": 32, "num_tokens": 8, "at": 4},
    "mixer_s16_tl8at4_224": {**_SMALL, "patch_size": 16, "num_tokens": 8, "at": 4},
    "mixer_b32_tl8at6_224": {**_BASE, "patch_size": 32, "num_tokens": 8, "at": 6},
    "mixer_b16_tl8at6_224": {**_BASE, "patch_size": 16, "num_tokens": 8, "at": 6},
    "mixer_l32_tl8at12_224": {**_LARGE, "patch_size": 32, "num_tokens": 8, "at": 12},
    "mixer_l16_tl8at12_224": {**_LARGE, "patch_size": 16, "num_tokens": 8, "at": 12},
    # the same, with all positions behind each block
    "mixer_s16_tl8at4_fuser_224": {**_SMALL, "patch_size": 16, **_FUSED, "at": 4},
    "mixer_b16_tl8at6_fuser_224": {**_BASE, "patch_size": 16, **_FUSED, "at": 6},
    "mixer_l16_tl8at12_fuser_224": {**_LARGE, "patch_size": 16, **_FUSED, "at": 12},
}

build_mixer = register(TokenLearnerMixer, MIXERS, first_conv="stem.proj", crop_pct=0.875)
