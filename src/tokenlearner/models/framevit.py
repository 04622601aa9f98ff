"""Video models for live video, which process each frame alone until it is a few tokens.

The arrangement is that of RT-1: an image encoder turns every frame into tokens, and a transformer
runs on the tokens of the last frames; `streaming.py` feeds it frame by frame.

Names: `framevit_{size}_patch{p}_f{frames}_tl{tokens}at{block}_{resolution}`.
Axes: `b` batch, `c` channels, `t` frames, `s` images of a frame, `k` tokens of a frame.
Source: Brohan et al., arXiv 2212.06817, for the arrangement. Here the encoder is a ViT, attention
is not causal, and there is no language.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from torch import Tensor, nn

from ..layers.blocks import ReducedBlock
from ..layers.token_learner import LEARNERS
from ..utils.validation import check_choice, check_count
from .hub import HubModel
from .insertion import InsertionConfig, block_index
from .registry import register, sized
from .video_embed import FORMATS, to_bcthw
from .vivit import ViViT

_UNKNOWN = {"global_pool", "representation_size", "fuse", "sampling"}
_UNKNOWN |= {"overlap", "elastic", "active_tokens"}


class FrameViT(HubModel, nn.Module):
    """A video transformer that processes each frame alone until it is `k` tokens.

    The blocks of a ViT are split and keep their numbers: those before `at` run on the positions of
    a frame, then its tokens are learned, and the rest run on the tokens of all frames. A learned
    embedding stands for the age of a frame; the newest always has the last one, so clips may be
    shorter than `num_frames`.

    Args:
        num_frames: Maximum number of frames, RT-1's 6 by default.
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
        if unknown := _UNKNOWN & kwargs.keys():
            raise ValueError(f"a FrameViT takes no {', '.join(sorted(unknown))}; leave it out")
        index = block_index(at, check_count("depth", depth))
        frame = {"num_frames": tubelet_size, "tubelet_size": tubelet_size, "depth": depth}
        vivit = ViViT(**frame, num_classes=num_classes, **kwargs)
        self.embed_dim = self.num_features = self.head_hidden_size = vivit.embed_dim
        self.num_classes, self.grad_checkpointing = num_classes, False
        self.blocks = vivit.blocks[index:]
        self.norm, self.head_drop, self.head = vivit.norm, vivit.head_drop, vivit.head
        self.encoder = _to_encoder(vivit, index, LEARNERS[learner](vivit.embed_dim, num_tokens))
        self.tokenlearner_insertion = InsertionConfig(num_tokens, index, learner)
        like = vivit.patch_embed.proj.weight
        self.time_embed = nn.Parameter(like.new_empty(1, num_frames, 1, vivit.embed_dim))
        trunc_normal_(self.time_embed, std=0.02)

    def encode(self, clips: Tensor) -> Tensor:
        """Turns each frame into its tokens, by itself: `b c t h w -> b t k c`.

        Raises:
            ValueError: The clips are not as the model was built for.
        """
        clips = to_bcthw(clips, self.input_format)
        self._check_frames(clips.shape[2])
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
        """Replaces the classifier by an untrained one; 0 leaves it out."""
        self.num_classes = check_count("num_classes", num_classes, least=0)
        like = {"device": self.time_embed.device, "dtype": self.time_embed.dtype}
        linear = nn.Linear(self.embed_dim, num_classes, **like) if num_classes else nn.Identity()
        self.head = linear.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, in place of keeping them."""
        self.grad_checkpointing = enable
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that weight decay should leave alone."""
        return {"encoder.pos_embed", "time_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns how timm groups parameters by depth; the blocks have one numbering."""
        return {
            "stem": r"^(?:encoder\.(?:patch_embed|pos_embed)|time_embed)",
            "blocks": [(r"^(?:encoder\.)?blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

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

    def _check_frames(self, images: int) -> None:
        """Checks the length of clips; the encoder checks channels and size."""
        # no divmod: torch.compile has none for clips of any length
        if images % self.tubelet_size or not self._fits(images // self.tubelet_size):
            whole = f" in whole tubelets of {self.tubelet_size}" if self.tubelet_size > 1 else ""
            raise ValueError(
                f"a clip has {images} frames, expected 1 to "
                f"{self.num_frames * self.tubelet_size}{whole}; cut it, or build the model with "
                "another num_frames"
            )


def _to_encoder(vivit: ViViT, index: int, learner: nn.Module) -> ViViT:
    """Makes a whole network the encoder of a frame, which ends in its tokens, in place."""
    like = vivit.patch_embed.proj.weight
    reduce = ReducedBlock(nn.Identity(), learner, grid=vivit.patch_embed)
    vivit.blocks = nn.Sequential(*vivit.blocks[:index], reduce.to(like.device, like.dtype))
    vivit.norm = nn.Identity()
    vivit.reset_classifier(0, "")
    return vivit


def _variant(size: str, patch: int = 16, resolution: int = 224, **kwargs: int) -> dict[str, Any]:
    """Returns the arguments of a named model, with the 400 classes of Kinetics-400."""
    tokens = {"num_frames": 6, "num_tokens": 8, "at": 6, "num_classes": 400}
    return sized(size, patch, resolution) | tokens | kwargs


FRAMES: dict[str, dict[str, Any]] = {  # not in the paper; V1.1
    "framevit_mini_patch8_f6_tl4at3_32": _variant(
        "mini", 8, 32, num_tokens=4, at=3, num_classes=10
    ),
    "framevit_tiny_patch16_f6_tl8at6_224": _variant("tiny"),
    "framevit_small_patch16_f6_tl8at6_224": _variant("small"),
    "framevit_base_patch16_f6_tl8at6_224": _variant("base"),
}

build_framevit = register(FrameViT, FRAMES, first_conv="encoder.patch_embed.proj", is_video=True)
