"""The paper's ViTs on learned tokens, by name: timm's layers and our wrappers.

Importing this file registers the names below with timm. As in the paper's code there is no class
token: the final LayerNorm is followed by pooling over the tokens that remain.

Names follow timm: `vit_{size}_patch{p}[_d{depth}][_tl{tokens}at{block}][_fuser]_{resolution}`,
with `_gap` for a plain model of a size that timm names too.
Source: scenic `TokenLearnerViT`; the layers are timm's, with flax's numbers (eps 1e-6, tanh GELU).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import lecun_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..layers.blocks import ReducedBlock
from ..utils.validation import check_choice, check_count
from .features import check_has_grid
from .hub import HubModel
from .insertion import insert
from .registry import register, sized

_OFFICIAL: dict[str, Any] = {
    "class_token": False,
    "final_norm": True,
    "fc_norm": False,
    "act_layer": "gelu_tanh",
    "weight_init": "jax",
}
_POOLS = ("avg", "max", "sum", "avgmax", "token", "map", "prr", "")


class TokenLearnerViT(HubModel, VisionTransformer):
    """A ViT that runs on learned tokens from one of its blocks on; timm's interface is intact.

    Args:
        num_tokens: Tokens `k` to learn; 0 is the plain ViT.
        at: The learner runs in front of this block, counted from 0, or at this share of the depth.
        learner: As in `insert`.
        fuse: As in `insert`: the tokens go back on all positions behind each block from `at` on.
        fuser_bottleneck_dim: As in `insert`.
        overlap: As in `insert`.
        elastic: As in `insert`.
        active_tokens: As in `insert`.
        representation_size: Width of a linear layer with tanh in front of the classifier.
        global_pool: `"avg"`, `"max"` or `"sum"` over the tokens (scenic's gap, gmp and gsp), or
            one of timm's others; `""` returns all tokens.
        kwargs: What timm's VisionTransformer takes. The defaults that differ from timm's: no class
            token, the LayerNorm before pooling, tanh GELU, scenic's initialization (a head of 0).

    Shape:
        `b c h w -> b classes`

    Raises:
        ValueError: An argument is out of range, or the tokens do not fit.

    Source: scenic `TokenLearnerViT`.
    """

    passes_grid = True  # forward_features gives V1 the grid of images of any size

    def __init__(
        self,
        *,
        num_tokens: int = 0,
        at: int | float = 0.5,
        learner: str = "v11",
        fuse: bool = False,
        fuser_bottleneck_dim: int | None = 64,
        overlap: int = 0,
        elastic: bool = False,
        active_tokens: int | None = None,
        representation_size: int | None = None,
        global_pool: str = "avg",
        **kwargs: Any,
    ):
        kwargs = _OFFICIAL | kwargs
        _check_pool(global_pool, kwargs["class_token"])
        super().__init__(global_pool=_timm_pool(global_pool), **kwargs)
        self.global_pool = global_pool
        if check_count("num_tokens", num_tokens, least=0):
            insert(
                self,
                num_tokens,
                at,
                learner=learner,
                fuse=fuse,
                fuser_bottleneck_dim=fuser_bottleneck_dim,
                overlap=overlap,
                elastic=elastic,
                active_tokens=active_tokens,
            )
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size is not None:
            self._add_pre_logits(check_count("representation_size", representation_size))

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Runs everything but the head: `b c h w -> b k c`, with fusers `b c h w -> b n c`."""
        masked = attn_mask is not None or is_causal
        if not self.dynamic_img_size or not self._needs_grid() or masked:
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            run = partial(block, grid=grid) if isinstance(block, ReducedBlock) else block
            x = checkpoint(run, x) if self.grad_checkpointing else run(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        **kwargs: Any,
    ) -> Any:
        """Returns the features behind chosen blocks, with or without the final ones, as timm does.

        Raises:
            ValueError: A feature map is requested where only learned tokens remain, or V1 would
                have to know the grid of an image that has not the model's size.
        """
        taken, _ = feature_take_indices(len(self.blocks), indices)
        if output_fmt == "NCHW":
            check_has_grid(self, taken)
        size, needs_grid = tuple(x.shape[-2:]), self.dynamic_img_size and self._needs_grid()
        if needs_grid and self.patch_embed.dynamic_feat_size(size) != self.patch_embed.grid_size:
            raise ValueError(
                f"V1's learner is built for a {self.patch_embed.grid_size} grid, the image is "
                f"{size}; call set_input_size({size}), or build the model with learner='v11'"
            )
        return super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, **kwargs
        )

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pools the tokens that remain: `b k c -> b c`."""
        if (self.global_pool if pool_type is None else pool_type) == "sum":
            return x[:, 0 if self.pool_include_prefix else self.num_prefix_tokens :].sum(1)
        return super().pool(x, pool_type)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies: `b k c -> b classes`, or the classifier's input."""
        x = self.fc_norm(self.pool(x))
        if isinstance(self.pre_logits, nn.Linear):
            x = torch.tanh(self.pre_logits(x))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by an untrained one, and the pooling if one is given.

        Raises:
            ValueError: There is no such pooling.
        """
        if global_pool is not None:
            _check_pool(global_pool, self.has_class_token)
        pool = self.global_pool if global_pool is None else global_pool
        super().reset_classifier(num_classes, global_pool and _timm_pool(global_pool))
        self.global_pool = pool
        if num_classes and isinstance(self.pre_logits, nn.Linear):
            self.head = self._linear(self.head_hidden_size, num_classes)

    def _add_pre_logits(self, size: int) -> None:
        self.pre_logits = self._linear(self.embed_dim, size)
        lecun_normal_(self.pre_logits.weight)
        nn.init.zeros_(self.pre_logits.bias)
        self.head_hidden_size = size
        if isinstance(self.head, nn.Linear):
            self.head = self._linear(size, self.num_classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        like = self.patch_embed.proj.weight
        linear = nn.Linear(inputs, outputs, device=like.device, dtype=like.dtype)
        return linear.train(self.training)

    def _needs_grid(self) -> bool:
        return any(isinstance(b, ReducedBlock) and b.needs_grid for b in self.blocks)


def _check_pool(pool: str, class_token: bool) -> None:
    check_choice(
        "global_pool", pool, _POOLS if class_token else [p for p in _POOLS if p != "token"]
    )


def _timm_pool(pool: str) -> Any:
    """Returns a pooling that timm knows; our `pool` does the sum."""
    return "avg" if pool == "sum" else pool


def _filter_state(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Fits weights to a ViT as timm does, and keeps the representation layer, which timm drops."""
    kept = {key: value for key, value in state.items() if key.startswith("pre_logits.")}
    return checkpoint_filter_fn(state, model) | kept


def _learned(
    size: str, patch: int, resolution: int, tokens: int, at: int, depth: int | None = None
) -> dict[str, Any]:
    """Returns the arguments of a model in the paper's tables: V1 learns the tokens."""
    plain = sized(size, patch, resolution, depth)
    return {**plain, "num_tokens": tokens, "at": at, "learner": "v1"}


_MINI = sized("mini", 4, 28) | {"in_chans": 1, "num_classes": 10, "weight_init": ""}
FUSED = {"fuse": True, "fuser_bottleneck_dim": 0}  # a linear mask, as when the paper was written
# fmt: off
VARIANTS: dict[str, dict[str, Any]] = {
    # for the demo and for trying things out; V1.1
    "vit_mini_patch4_28": _MINI,
    "vit_mini_patch4_tl8at3_28": {**_MINI, "num_tokens": 8, "at": 3},
    # baselines of tables 1 and 2
    "vit_small_patch32_gap_384": sized("small", 32, 384),
    "vit_base_patch16_gap_384": sized("base", 16, 384),
    "vit_large_patch16_gap_512": sized("large", 16, 512),
    # table 1
    "vit_small_patch32_tl8at6_384": _learned("small", 32, 384, 8, 6),
    "vit_small_patch32_d22_tl8at11_384": _learned("small", 32, 384, 8, 11, depth=22),
    "vit_base_patch32_d20_tl8at10_384": _learned("base", 32, 384, 8, 10, depth=20),
    "vit_base_patch16_d21_tl8at10_384": _learned("base", 16, 384, 8, 10, depth=21),
    "vit_base_patch16_d21_tl16at10_384": _learned("base", 16, 384, 16, 10, depth=21),
    # tables 1 and 4
    "vit_base_patch16_tl8at6_384": _learned("base", 16, 384, 8, 6),
    "vit_base_patch16_tl8at6_fuser_384": _learned("base", 16, 384, 8, 6) | FUSED,
    "vit_base_patch16_tl16at6_384": _learned("base", 16, 384, 16, 6),
    "vit_base_patch16_tl16at6_fuser_384": _learned("base", 16, 384, 16, 6) | FUSED,
    # tables 2 and 4
    "vit_large_patch16_tl16at12_512": _learned("large", 16, 512, 16, 12),
    "vit_large_patch16_tl16at12_fuser_512": _learned("large", 16, 512, 16, 12) | FUSED,
    "vit_large_patch16_d35_tl16at12_512": _learned("large", 16, 512, 16, 12, depth=35),
    "vit_large_patch16_tl8at18_512": _learned("large", 16, 512, 8, 18),
    "vit_large_patch16_tl8at18_fuser_512": _learned("large", 16, 512, 8, 18) | FUSED,
    "vit_large_patch16_d30_tl8at18_512": _learned("large", 16, 512, 8, 18, depth=30),
    "vit_large_patch14_d35_tl16at18_512": _learned("large", 14, 512, 16, 18, depth=35),
    # tables 3 and 4
    "vit_large_patch10_d35_tl16at18_512": _learned("large", 10, 512, 16, 18, depth=35),
    "vit_large_patch10_d35_tl16at18_fuser_512":
        _learned("large", 10, 512, 16, 18, depth=35) | FUSED,
    "vit_large_patch8_d35_tl16at18_512": _learned("large", 8, 512, 16, 18, depth=35),
    # figure 4 and the few-shot plot; the pre-training sizes
    "vit_small_patch32_tl8at6_224": _learned("small", 32, 224, 8, 6),
    "vit_small_patch32_d22_tl8at11_224": _learned("small", 32, 224, 8, 11, depth=22),
    "vit_base_patch32_d20_tl8at10_224": _learned("base", 32, 224, 8, 10, depth=20),
    "vit_base_patch16_tl8at3_224": _learned("base", 16, 224, 8, 3),
    "vit_base_patch16_tl8at6_224": _learned("base", 16, 224, 8, 6),
    "vit_base_patch16_tl8at9_224": _learned("base", 16, 224, 8, 9),
    "vit_base_patch16_tl16at3_224": _learned("base", 16, 224, 16, 3),
    "vit_base_patch16_tl16at6_224": _learned("base", 16, 224, 16, 6),
    "vit_base_patch16_d21_tl8at10_224": _learned("base", 16, 224, 8, 10, depth=21),
    "vit_base_patch16_d21_tl16at10_224": _learned("base", 16, 224, 16, 10, depth=21),
    "vit_large_patch10_d35_tl16at18_224": _learned("large", 10, 224, 16, 18, depth=35),
    # the configuration that scenic ships for ImageNet-1k, which has V1.1
    "vit_base_patch16_tl16at9_224": _learned("base", 16, 224, 16, 9) | {"learner": "v11"},
    # not in the paper; V1.1
    "vit_tiny_patch16_tl8at6_224": _learned("tiny", 16, 224, 8, 6) | {"learner": "v11"},
    "vit_small_patch16_tl8at6_224": _learned("small", 16, 224, 8, 6) | {"learner": "v11"},
}
# fmt: on

build_vit = register(
    TokenLearnerViT, VARIANTS, first_conv="patch_embed.proj", filter_fn=_filter_state
)
