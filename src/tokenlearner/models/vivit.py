"""The paper's video models: ViViT with joint space-time attention on a few tokens a frame.

A learner runs on each frame by itself: `t` frames of `k` tokens remain. Divided space-time
attention and the X(2+1)D networks of the paper's Charades and AViD tables are not part of this;
for live video see `streaming.py`.

Names: `vivit_{size}_patch{p}x{tubelet}[_d{depth}][_tl{tokens}at{block}][_fuser]_{resolution}`.
Axes: `b` batch, `c` channels, `t` frames (behind the embedding: tubelets), `h w` grid, `n` tokens.
Source: scenic `TokenLearnerViT` with the tokenizer `video`, and its `vivit` project.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..utils.validation import check_choice
from .features import check_has_grid
from .registry import register, sized
from .video_embed import ClipEmbed
from .vit import FUSED, TokenLearnerViT


class ViViT(TokenLearnerViT):
    """A video transformer with joint space-time attention, on `k` learned tokens a frame.

    For the headless representation model pass `num_classes=0, global_pool=""`: the output is then
    `b (t k) c`, the normalized tokens of all frames.

    Args:
        num_frames: Frames of a clip, as in `ClipEmbed`.
        tubelet_size: As in `ClipEmbed`.
        sampling: As in `ClipEmbed`.
        tubelet_init: As in `ClipEmbed`.
        input_format: Axes of a clip: `"bcthw"`, or `"btchw"`. It is never guessed.
        kwargs: What `TokenLearnerViT` takes, with `num_tokens` counted for one frame.

    Shape:
        `b c t h w -> b classes`

    Raises:
        ValueError: An argument is out of range, or the tokens do not fit.

    Source: scenic `TokenLearnerViT` and `TokenLearnerViTRepresentation`, ViViT's Model 1.
    """

    def __init__(
        self,
        *,
        num_frames: int = 32,
        tubelet_size: int = 2,
        sampling: str = "tubelet",
        tubelet_init: str = "central",
        input_format: str = "bcthw",
        **kwargs: Any,
    ):
        for name in ("class_token", "reg_tokens", "patch_drop_rate"):
            if kwargs.get(name):
                raise ValueError(f"a video model takes no {name}; leave it out")
        embed = partial(
            ClipEmbed,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            sampling=sampling,
            tubelet_init=tubelet_init,
            input_format=input_format,
        )
        super().__init__(embed_layer=embed, **kwargs)
        self.num_frames = num_frames

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Sets the size of the frames and resamples the position embeddings of each.

        Raises:
            ValueError: As `ClipEmbed.set_input_size`.
        """
        old, positions = self.patch_embed.grid_size, self.pos_embed
        set_image_size: Any = super().set_input_size  # typed for pairs only
        self.pos_embed = None  # timm would take the frames' positions for those of one image
        try:
            set_image_size(img_size, patch_size)
        finally:
            self.pos_embed = positions
        new = self.patch_embed.grid_size
        if positions is None or new == old:
            return
        frames = rearrange(positions.detach(), "1 (t n) c -> t 1 n c", t=self.patch_embed.frames)
        resampled = [resample_abs_pos_embed(frame, list(new), list(old), 0) for frame in frames]
        self.pos_embed = nn.Parameter(torch.cat(resampled, dim=1), positions.requires_grad)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCTHW",
        intermediates_only: bool = False,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """Returns the features behind chosen blocks: `b c t h w`, or `b (t n) c` as `"NLC"`.

        Args:
            x: Clips.
            indices: Blocks, or how many of the last ones; None is all.
            return_prefix_tokens: There are none; taken because timm's models take it.
            norm: Apply the final LayerNorm to the features.
            stop_early: Run no block behind the last in `indices`.
            output_fmt: `"NCTHW"` or `"NLC"`.
            intermediates_only: Leave the final features out.
            attn_mask: For the blocks of a model without learned tokens.

        Raises:
            ValueError: A grid is requested where only learned tokens remain.
        """
        check_choice("output_fmt", output_fmt, ("NCTHW", "NLC"))
        taken, last = feature_take_indices(len(self.blocks), indices)
        if output_fmt == "NCTHW":
            check_has_grid(self, taken)
        x, features = self.norm_pre(self._pos_embed(self.patch_embed(x))), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            run = block if attn_mask is None else partial(block, attn_mask=attn_mask)
            x = checkpoint(run, x) if self.grad_checkpointing else run(x)
            if i in taken:
                features.append(self.norm(x) if norm else x)
        if output_fmt == "NCTHW":
            h, w = self.patch_embed.grid_size
            features = [rearrange(f, "b (t h w) c -> b c t h w", h=h, w=w) for f in features]
        return features if intermediates_only else (self.norm(x), features)


def _plain(
    size: str, patch: int, resolution: int = 224, depth: int | None = None
) -> dict[str, Any]:
    """Returns the arguments for 32 frames in tubelets of 2 and the 400 classes of Kinetics-400."""
    clip = {"num_frames": 32, "tubelet_size": 2, "num_classes": 400}
    return sized(size, patch, resolution, depth) | clip


def _learned(
    size: str, patch: int, tokens: int, at: int, depth: int | None = None
) -> dict[str, Any]:
    """Returns the arguments of a model in the paper's tables: V1 learns the tokens."""
    return _plain(size, patch, 224, depth) | {"num_tokens": tokens, "at": at, "learner": "v1"}


_MINI = sized("mini", 8, 32) | {"num_classes": 10, "num_frames": 8, "tubelet_size": 2}
VIDEOS: dict[str, dict[str, Any]] = {
    # for trying things out; V1.1
    "vivit_mini_patch8x2_32": _MINI,
    "vivit_mini_patch8x2_tl4at3_32": {**_MINI, "num_tokens": 4, "at": 3},
    # baselines of tables 6 to 8
    "vivit_large_patch16x2_224": _plain("large", 16),
    "vivit_large_patch16x2_320": _plain("large", 16, 320),
    # tables 6 to 8; the depths are those at which the printed GFLOPs come out
    "vivit_large_patch16x2_tl16at12_224": _learned("large", 16, 16, 12),
    "vivit_large_patch16x2_d30_tl8at18_224": _learned("large", 16, 8, 18, depth=30),
    "vivit_large_patch14x2_d35_tl16at18_224": _learned("large", 14, 16, 18, depth=35),
    "vivit_large_patch10x2_d35_tl16at18_224": _learned("large", 10, 16, 18, depth=35),
    "vivit_large_patch10x2_d35_tl16at18_fuser_224": _learned("large", 10, 16, 18, 35) | FUSED,
    # not in the paper; V1.1
    "vivit_tiny_patch16x2_tl8at6_224": _learned("tiny", 16, 8, 6) | {"learner": "v11"},
    "vivit_small_patch16x2_tl8at6_224": _learned("small", 16, 8, 6) | {"learner": "v11"},
    "vivit_base_patch16x2_tl8at6_224": _learned("base", 16, 8, 6) | {"learner": "v11"},
}

build_vivit = register(ViViT, VIDEOS, first_conv="patch_embed.proj", is_video=True)
