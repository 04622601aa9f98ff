"""Video models that see each frame alone until it is a few tokens, for live video.

The arrangement is that of RT-1: an image encoder turns every frame into tokens, and a transformer
runs on the tokens of the last frames; `stream.py` feeds it frame by frame.

Names: `framevit_{size}_patch{p}_f{frames}_tl{tokens}at{block}_{resolution}`.
Axes: `b` batch, `c` channels, `t` frames, `s` images of a frame, `k` tokens of a frame.
Source: Brohan et al., arXiv 2212.06817, for the arrangement. Here the encoder is a ViT, attention
is not causal, and there is no language.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from ..layers.blocks import ReducedBlock
from ..layers.token_learner import LEARNERS
from ..utils.validation import check_choice, check_count
from .hub import HubModel
from .insertion import InsertionConfig, block_index
from .registry import build_variant, register_variants, sized, variant_cfg
from .video_embed import FORMATS
from .vivit import ViViT


class FrameViT(HubModel, nn.Module):
    """A video transformer that sees each frame alone until it is `k` tokens.

    The blocks of one ViT are shared out and keep their numbers: those before `at` run on the
    positions of a frame, then its tokens are learned, and the rest run on the tokens of all frames.
    A learned embedding tells how old a frame is; the newest always has the last one, so clips may
    be shorter than `num_frames`.

    Args:
        num_frames: Frames that the model sees at most, RT-1's 6 by default.
        num_tokens: Tokens `k` of a frame.
        at: Blocks on the positions of a frame, as a number or a share of the depth.
        learner: As in `insert`.
        tubelet_size: Images that make one frame; above 1 a frame is a tubelet.
        input_format: Axes of a clip, `"bcthw"` or `"btchw"`. It is never guessed.
        num_classes: Outputs of the classifier; 0 leaves it out.
        depth: Blocks in all.
        kwargs: What timm's VisionTransformer takes, for the embedding and the blocks. The tokens
            are averaged in front of the classifier.

    Shape:
        `b c t h w -> b classes`, with `t` up to `num_frames * tubelet_size`

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        num_frames: int = 6,
        num_tokens: int = 8,
        at: int | float = 0.5,
        learner: str = "v11",
        tubelet_size: int = 1,
        input_format: str = "bcthw",
        num_classes: int = 400,
        depth: int = 12,
        **kwargs: Any,
    ):
        super().__init__()
        self.num_frames = check_count("num_frames", num_frames)
        self.tubelet_size = check_count("tubelet_size", tubelet_size)
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.input_format = check_choice("input_format", input_format, list(FORMATS))
        check_choice("learner", learner, list(LEARNERS))
        check_count("num_classes", num_classes, least=0)
        if refused := {"global_pool", "representation_size", "fuse", "sampling"} & kwargs.keys():
            raise ValueError(f"a FrameViT has no {', '.join(sorted(refused))}; leave them out")
        index = block_index(at, check_count("depth", depth))
        one = {"num_frames": tubelet_size, "tubelet_size": tubelet_size, "depth": depth}
        whole = ViViT(**one, num_classes=num_classes, **kwargs)
        self.embed_dim = self.num_features = self.head_hidden_size = whole.embed_dim
        self.num_classes, self.grad_checkpointing = num_classes, False
        self.blocks = whole.blocks[index:]
        self.norm, self.head_drop, self.head = whole.norm, whole.head_drop, whole.head
        self.encoder = self._encoder(whole, index, LEARNERS[learner](whole.embed_dim, num_tokens))
        self.tokenlearner_insertion = InsertionConfig(num_tokens, index, learner)
        like = whole.patch_embed.proj.weight
        self.time_embed = nn.Parameter(like.new_empty(1, num_frames, 1, whole.embed_dim))
        trunc_normal_(self.time_embed, std=0.02)

    def encode(self, clips: Tensor) -> Tensor:
        """Turns each frame into its tokens, by itself: `b c t h w -> b t k c`.

        Raises:
            ValueError: The clips are not as the model was built for.
        """
        clips = self._checked(clips)
        frames = rearrange(clips, "b c (t s) h w -> (b t) c s h w", s=self.tubelet_size)
        return rearrange(self.encoder(frames), "(b t) k c -> b t k c", b=clips.shape[0])

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Classifies from the tokens of frames in their order: `b t k c -> b classes`.

        Raises:
            ValueError: There are more frames than the model knows, or other tokens.
        """
        return self.forward_head(self._forward_tokens(tokens))

    def forward_features(self, clips: Tensor) -> Tensor:
        """Runs everything but the head: `b c t h w -> b (t k) c`."""
        return self._forward_tokens(self.encode(clips))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Averages the tokens and classifies: `b (t k) c -> b classes`."""
        x = self.head_drop(x.mean(1))
        return x if pre_logits else self.head(x)

    def forward(self, clips: Tensor) -> Tensor:
        """Classifies clips: `b c t h w -> b classes`."""
        return self.forward_head(self.forward_features(clips))

    def get_classifier(self) -> nn.Module:
        """Returns the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Exchanges the classifier for an untrained one; 0 leaves it out."""
        self.num_classes = check_count("num_classes", num_classes, least=0)
        like = {"device": self.time_embed.device, "dtype": self.time_embed.dtype}
        linear = nn.Linear(self.embed_dim, num_classes, **like) if num_classes else nn.Identity()
        self.head = linear.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes activations again for the gradient, in place of keeping them."""
        self.grad_checkpointing = enable
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"encoder.pos_embed", "time_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters by depth; the blocks are numbered through."""
        return {
            "stem": r"^(?:encoder\.(?:patch_embed|pos_embed)|time_embed)",
            "blocks": [(r"^(?:encoder\.)?blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _encoder(self, whole: ViViT, index: int, learner: nn.Module) -> ViViT:
        """Makes of the whole network the part that sees one frame, and ends in its tokens."""
        like = whole.patch_embed.proj.weight
        reduce = ReducedBlock(nn.Identity(), learner, grid=whole.patch_embed)
        whole.blocks = nn.Sequential(*whole.blocks[:index], reduce.to(like.device, like.dtype))
        whole.norm = nn.Identity()
        whole.reset_classifier(0, "")
        return whole

    def _forward_tokens(self, tokens: Tensor) -> Tensor:
        expected = (self.num_tokens, self.embed_dim)
        if tokens.ndim != 4 or tokens.shape[2:] != expected or not self._fits(tokens.shape[1]):
            raise ValueError(
                f"tokens are {list(tokens.shape)}, expected [b, t, {expected[0]}, {expected[1]}] "
                f"with 1 to {self.num_frames} frames; model.encode makes them"
            )
        x = rearrange(tokens + self.time_embed[:, -tokens.shape[1] :], "b t k c -> b (t k) c")
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)

    def _fits(self, frames: int) -> bool:
        return 1 <= frames <= self.num_frames

    def _checked(self, clips: Tensor) -> Tensor:
        """Returns clips as `b c t h w`; the encoder checks channels and size."""
        axes = FORMATS[self.input_format]
        if clips.ndim != 5:
            raise ValueError(f"clips are {list(clips.shape)}, expected {axes}")
        if self.input_format == "btchw":
            clips = rearrange(clips, "b t c h w -> b c t h w")
        images = clips.shape[2]  # no divmod: torch.compile has none for clips of any length
        if images % self.tubelet_size or not self._fits(images // self.tubelet_size):
            whole = f" in whole tubelets of {self.tubelet_size}" if self.tubelet_size > 1 else ""
            raise ValueError(
                f"a clip has {images} frames, expected 1 to "
                f"{self.num_frames * self.tubelet_size}{whole}; cut it, or build the model with "
                "another num_frames"
            )
        return clips


def _named(size: str) -> dict[str, Any]:
    return sized(size, 16, 224) | {"num_frames": 6, "num_tokens": 8, "at": 6, "num_classes": 400}


FRAMES: dict[str, dict[str, Any]] = {  # not in the paper; V1.1
    "framevit_mini_patch8_f6_tl4at3_32": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "num_frames": 6,
        "num_tokens": 4,
        "at": 3,
        "num_classes": 10,
    },
    "framevit_tiny_patch16_f6_tl8at6_224": _named("tiny"),
    "framevit_small_patch16_f6_tl8at6_224": _named("small"),
    "framevit_base_patch16_f6_tl8at6_224": _named("base"),
}

default_cfgs = generate_default_cfgs(  # the name under which timm looks for it
    {name: variant_cfg(row, "encoder.patch_embed.proj") for name, row in FRAMES.items()}
)


def build_framevit(name: str, pretrained: bool = False, **kwargs: Any) -> FrameViT:
    """Builds a named model for live video, as `timm.create_model` does.

    Args:
        name: A key of `FRAMES`.
        pretrained: Load the weights that timm was told of; there are no published ones.
        kwargs: What FrameViT takes; goes before the variant's own.

    Raises:
        ValueError: Weights are asked for and there are none, or an argument is out of range.
    """
    if kwargs.get("features_only"):
        raise ValueError("timm's features_only is for images; call encode for a frame's tokens")
    return build_variant(FrameViT, name, FRAMES[name], pretrained, kwargs)


register_variants(__name__, FRAMES, build_framevit)
