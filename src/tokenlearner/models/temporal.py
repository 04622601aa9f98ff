"""Transformers over time alone, which run on the tokens of frames that were encoded before.

It is the half of a `FrameViT` behind its encoder. Where the encoder is frozen, as an image model
usually is, the tokens of a large archive are made once (`tokenlearner encode`), and training reads
them: a step costs no more than a small transformer on `t k` tokens.

Names: `temporal_{size}`. Axes: `b` clips, `t` frames, `k` tokens of a frame, `d` channels of a
token as it is kept, `c` channels here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..utils.validation import check_count, check_flag, require
from .framevit import FrameViT
from .registry import SIZES, register

_MOST_LETTERS = 10_000  # of what is said about tokens
_NORM: Any = partial(nn.LayerNorm, eps=1e-6)


class TemporalTransformer(FrameViT):
    """A `FrameViT` without its encoder: it takes the tokens of frames in place of clips.

    What `FrameViT` says of `present`, `ages`, `causal` and `num_bins` holds here too. Tokens are
    normalized and projected first, as they come from the middle of another model.

    Args:
        num_frames: Maximum number of frames of a clip.
        tokens_per_frame: Tokens of a frame, of all cameras together.
        token_dim: Channels of a token as it comes.
        embed_dim: Channels of the blocks.
        depth: Blocks.
        num_heads: Heads of attention.
        mlp_ratio: Width of the MLPs, times `embed_dim`.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Rate at which clips skip the last block; earlier ones less often.
        num_classes: Outputs of the classifier; 0 leaves it out.
        num_bins: As in `FrameViT`.
        causal: As in `FrameViT`.
        token_source: What the tokens are made by, as `tokenlearner.evaluation.encode` writes it
            beside them; tokens of another source are refused in training and evaluation.

    Shape:
        `b t k d -> b classes`, with `t` up to `num_frames`

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        num_frames: int = 16,
        tokens_per_frame: int = 8,
        token_dim: int = 768,
        embed_dim: int = 192,
        depth: int = 4,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 400,
        num_bins: int = 0,
        causal: bool = False,
        token_source: Mapping[str, Any] | None = None,
    ):
        nn.Module.__init__(self)
        self.num_frames = check_count("num_frames", num_frames)
        self.num_tokens = check_count("tokens_per_frame", tokens_per_frame)
        self.token_dim = check_count("token_dim", token_dim)
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_classes = check_count("num_classes", num_classes, least=0)
        self.num_bins = check_count("num_bins", num_bins, least=0)
        self.causal = check_flag("causal", causal)
        self.token_source = _check_source(token_source)
        self.grad_checkpointing = False
        require(
            check_count("embed_dim", embed_dim) % check_count("num_heads", num_heads) == 0,
            f"embed_dim is {embed_dim}, which {num_heads} heads do not divide; pass another",
        )
        self.embed = nn.Sequential(_NORM(token_dim), nn.Linear(token_dim, embed_dim))
        rates = torch.linspace(0, drop_path_rate, check_count("depth", depth), device="cpu")
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=True,
                    drop_path=rate,
                    norm_layer=_NORM,
                )
                for rate in rates.tolist()
            )
        )
        self.norm, self.head_drop = _NORM(embed_dim), nn.Dropout(drop_rate)
        self.time_embed = nn.Parameter(torch.empty(1, num_frames, 1, embed_dim))
        trunc_normal_(self.time_embed, std=0.02)
        self.reset_classifier(num_classes)

    # What the methods of FrameViT read of a model with an encoder.
    num_cameras, condition_dim, tubelet_size, input_format = 1, 0, 1, "btkc"

    @property
    def token_shape(self) -> tuple[int, int, int]:
        """`(t, k, d)` of a clip."""
        return self.num_frames, self.num_tokens, self.token_dim

    def encode(self, clips: Tensor, condition: Tensor | None = None) -> Tensor:
        """Projects the tokens of frames: `b t k d -> b t k c`.

        Raises:
            ValueError: There are more frames than the model knows, or other tokens.
        """
        require(condition is None, "a model of tokens takes no condition; omit it")
        expected = self.token_shape[1:]
        fits = clips.ndim == 4 and tuple(clips.shape[2:]) == expected
        if not fits or not 1 <= clips.shape[1] <= self.num_frames:
            raise ValueError(
                f"tokens are {list(clips.shape)}, expected [b, t, {expected[0]}, {expected[1]}] "
                f"with 1 to {self.num_frames} frames, as tokenlearner.evaluation.encode makes them"
            )
        return self.embed(clips)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, in place of keeping them."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that weight decay should leave alone."""
        return {"time_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns how timm groups parameters by depth."""
        return {
            "stem": r"^(?:embed|time_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _check_source(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns what is said of tokens, which a file of a stranger may say."""
    if source is None:
        return None
    try:
        text = json.dumps(source) if isinstance(source, Mapping) else ""
    except (TypeError, ValueError):
        text = ""
    require(
        0 < len(text) <= _MOST_LETTERS,
        f"token_source is {source!r:.80}, expected what manifest.json beside the tokens says",
    )
    return dict(source)  # pyright: ignore[reportArgumentType]


def _variant(size: str, depth: int) -> dict[str, Any]:
    """Returns the arguments of a named model, for tokens of a ViT of that size."""
    width, heads, _ = SIZES[size]
    shape = {"token_dim": width, "embed_dim": width, "num_heads": heads, "depth": depth}
    return {"num_frames": 16, "tokens_per_frame": 8, "num_classes": 400} | shape


TEMPORAL: dict[str, dict[str, Any]] = {  # not in the paper
    "temporal_mini": _variant("mini", 3),
    "temporal_tiny": _variant("tiny", 4),
    "temporal_small": _variant("small", 4),
    "temporal_base": _variant("base", 6),
}

build_temporal = register(
    TemporalTransformer, TEMPORAL, first_conv="embed", is_video=True, takes_pixels=False
)
