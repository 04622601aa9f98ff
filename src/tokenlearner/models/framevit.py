"""Video models for live video, which process each frame alone until it is a few tokens.

The arrangement is that of RT-1: an image encoder turns every frame into tokens, and a transformer
runs on the tokens of the last frames; `streaming.py` feeds it frame by frame.

Names: `framevit_{size}_patch{p}_f{frames}_tl{tokens}at{block}_{resolution}`.
Axes: `b` batch, `n` cameras, `c` channels, `t` frames, `s` images of a frame, `k` tokens of a frame
(of all its cameras), `d` channels of a condition.
Source: Brohan et al., arXiv 2212.06817, for the arrangement; FiLM of Perez et al., arXiv
1709.07871. Here the encoder is a ViT, with FiLM at its end only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from ..layers.blocks import ReducedBlock
from ..layers.token_learner import LEARNERS
from ..utils.validation import check_choice, check_count, check_flag, require
from .hub import HubModel
from .insertion import InsertionConfig, block_index
from .registry import register, sized
from .video_embed import FORMATS, to_bcthw
from .vivit import ViViT

_UNKNOWN = {"global_pool", "representation_size", "fuse", "sampling"}
_UNKNOWN |= {"overlap", "elastic", "active_tokens"}


class _Encoder(ViViT):
    """What runs on a frame alone; a condition changes its positions in front of the learner."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.film: nn.Linear | None = None

    def forward(self, frames: Tensor, condition: Tensor | None = None) -> Tensor:
        """Turns frames into tokens: `f c s h w`, `f d` -> `f k c`."""
        if self.film is None or condition is None:
            return super().forward(frames)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(frames))))
        *blocks, learn = self.blocks
        for block in blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        scale, shift = self.film(condition)[:, None].chunk(2, dim=-1)
        return learn(x * (1 + scale) + shift)


class FrameViT(HubModel, nn.Module):
    """A video transformer that processes each frame alone until it is `k` tokens.

    The blocks of a ViT are split and keep their numbers: those before `at` run on the positions of
    a frame, then its tokens are learned, and the rest run on the tokens of all frames. A learned
    embedding stands for the age of a frame; the newest always has the last one, so clips may be
    shorter than `num_frames`.

    All methods that take clips or tokens take these too:

    - `condition`, of a model with `condition_dim`: `b d` for whole clips or `b t d`, such as a goal
      or the embedding of an instruction.
    - `present`, `b t`: False where there is no frame, as before the first one of an episode or
      where one was lost. What stands there instead is not seen; rows without any frame give the
      output of nothing.
    - `ages`, `b t`: how old frames are, in intervals between frames; the newest is usually 0.
      Between whole numbers embeddings are interpolated. By default they count up from the last.

    Args:
        num_frames: Maximum number of frames, RT-1's 6 by default.
        num_tokens: Tokens of an image, of each camera's.
        at: Blocks on the positions of a frame, as a number or a share of the depth.
        learner: As in `insert`.
        tubelet_size: Images that make one frame; above 1 a frame is a tubelet.
        input_format: Axes of a clip, `"bcthw"` or `"btchw"`. It is never guessed.
        num_classes: Outputs of the classifier; 0 leaves it out.
        num_bins: Bins of each output, as for discrete actions (`ActionBins`); 0 is one number each.
        causal: Frames do not see later ones, and outputs are the newest frame's; so one clip trains
            the outputs of all of its frames (`forward_frames`).
        num_cameras: Images of a frame from as many cameras, with an embedding for each.
        condition_dim: Channels of a condition, which scales and shifts the positions of a frame in
            front of the learner (FiLM); it changes nothing in a new model. 0 is none.
        depth: Blocks in all.
        kwargs: What timm's VisionTransformer takes, for the embedding and the blocks. The tokens
            are averaged in front of the classifier.

    Shape:
        `b c t h w -> b classes`, with `t` up to `num_frames * tubelet_size`; of several cameras
        `b n c t h w`; with bins `b classes bins`

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
        num_bins: int = 0,
        causal: bool = False,
        num_cameras: int = 1,
        condition_dim: int = 0,
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
        self.num_bins = check_count("num_bins", num_bins, least=0)
        self.causal = check_flag("causal", causal)
        self.num_cameras = check_count("num_cameras", num_cameras)
        self.condition_dim = check_count("condition_dim", condition_dim, least=0)
        if unknown := _UNKNOWN & kwargs.keys():
            raise ValueError(f"a FrameViT takes no {', '.join(sorted(unknown))}; leave it out")
        index = block_index(at, check_count("depth", depth))
        frame = {"num_frames": tubelet_size, "tubelet_size": tubelet_size, "depth": depth}
        vivit = _Encoder(**frame, num_classes=num_classes * max(1, num_bins), **kwargs)
        self.embed_dim = self.num_features = self.head_hidden_size = vivit.embed_dim
        self.num_classes, self.grad_checkpointing = num_classes, False
        self.blocks = vivit.blocks[index:]
        self.norm, self.head_drop, self.head = vivit.norm, vivit.head_drop, vivit.head
        self.encoder = _to_encoder(vivit, index, LEARNERS[learner](vivit.embed_dim, num_tokens))
        self.tokenlearner_insertion = InsertionConfig(num_tokens, index, learner)
        like = vivit.patch_embed.proj.weight
        self.time_embed = nn.Parameter(like.new_empty(1, num_frames, 1, vivit.embed_dim))
        trunc_normal_(self.time_embed, std=0.02)
        if num_cameras > 1:
            self.camera_embed = nn.Parameter(like.new_empty(num_cameras, 1, vivit.embed_dim))
            trunc_normal_(self.camera_embed, std=0.02)
        if condition_dim:
            film = nn.Linear(condition_dim, 2 * vivit.embed_dim)
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)
            self.encoder.film = film.to(like.device, like.dtype)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame, of all cameras together."""
        return self.num_cameras * self.num_tokens

    def encode(self, clips: Tensor, condition: Tensor | None = None) -> Tensor:
        """Turns each frame into its tokens, by itself: `b c t h w -> b t k c`.

        Raises:
            ValueError: The clips or the condition are not as the model was built for.
        """
        clips = self._to_bcthw(clips)
        b, t = clips.shape[0] // self.num_cameras, clips.shape[2] // self.tubelet_size
        self._check_frames(clips.shape[2])
        frames = rearrange(clips, "b c (t s) h w -> (b t) c s h w", s=self.tubelet_size)
        tokens = self.encoder(frames, self._of_frames(condition, b, t))
        tokens = rearrange(tokens, "(b n t) k c -> b t n k c", b=b, t=t)
        if self.num_cameras > 1:
            tokens = tokens + self.camera_embed
        return tokens.flatten(2, 3)

    def forward_tokens(
        self, tokens: Tensor, present: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Classifies from the tokens of frames in their order: `b t k c -> b classes`.

        Raises:
            ValueError: There are more frames than the model knows, or other tokens.
        """
        return self.predict(self.forward_token_features(tokens, present, ages), present)

    def forward_token_features(
        self, tokens: Tensor, present: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """Runs the blocks on the tokens of frames: `b t k c -> b (t k) c`.

        Raises:
            ValueError: As `forward_tokens`.
        """
        expected = (self.tokens_per_frame, self.embed_dim)
        if tokens.ndim != 4 or tokens.shape[2:] != expected or not self._fits(tokens.shape[1]):
            raise ValueError(
                f"tokens are {list(tokens.shape)}, expected [b, t, {expected[0]}, {expected[1]}] "
                f"with 1 to {self.num_frames} frames; model.encode makes them"
            )
        b, t, k, _ = tokens.shape
        for name, value in (("present", present), ("ages", ages)):
            if value is not None:
                got = list(value.shape)
                require(got == [b, t], f"{name} is {got}, expected one value a frame, {[b, t]}")
        if present is not None:  # whatever is in the other slots, even NaN
            tokens = tokens.where(present.to(tokens.device)[..., None, None], 0)
        x = (tokens + self._time_embed(t, ages)).flatten(1, 2)
        mask = self._mask(t, k, present, x.device)
        for block in self.blocks:
            run: Any = block if mask is None else partial(block, attn_mask=mask)
            x = checkpoint(run, x) if self.grad_checkpointing else run(x)
        return self.norm(x)

    def predict(self, x: Tensor, present: Tensor | None) -> Tensor:
        """Classifies from the features of frames, of which some may be missing.

        Shape:
            `b (t k) c`, `b t -> b classes`
        """
        if present is None:
            return self.forward_head(x)
        x = x.unflatten(1, (-1, self.tokens_per_frame)).mean(2)
        weights = present.to(x.dtype)
        if self.causal:  # the newest alone: no frame stands behind it
            weights = weights * (weights.flip(1).cumsum(1).flip(1) == 1)
        mean = (weights[:, None] @ x)[:, 0] / weights.sum(1, keepdim=True).clamp(min=1)
        return self._classify(self.head_drop(mean))

    def forward_features(
        self,
        clips: Tensor,
        condition: Tensor | None = None,
        present: Tensor | None = None,
        ages: Tensor | None = None,
    ) -> Tensor:
        """Runs everything but the head: `b c t h w -> b (t k) c`."""
        return self.forward_token_features(self.encode(clips, condition), present, ages)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Averages tokens, the newest frame's of a causal model, and classifies.

        Shape:
            `b (t k) c -> b classes`
        """
        x = self.head_drop(x[:, -self.tokens_per_frame :].mean(1) if self.causal else x.mean(1))
        return x if pre_logits else self._classify(x)

    def forward(
        self,
        clips: Tensor,
        condition: Tensor | None = None,
        present: Tensor | None = None,
        ages: Tensor | None = None,
    ) -> Tensor:
        """Classifies clips: `b c t h w -> b classes`."""
        features = self.forward_features(clips, condition, present, ages)
        return self.predict(features, present)

    def forward_frames(
        self,
        clips: Tensor,
        condition: Tensor | None = None,
        present: Tensor | None = None,
        ages: Tensor | None = None,
    ) -> Tensor:
        """Classifies at every frame of clips, from it and those before: `b c t h w -> b t classes`.

        The last is what `forward` returns; the others train a policy on all of a clip's frames.

        Raises:
            ValueError: The model is not causal, or something does not fit.
        """
        require(self.causal, "the model is not causal, so frames see later ones; build it with it")
        x = self.forward_features(clips, condition, present, ages)
        x = x.unflatten(1, (-1, self.tokens_per_frame)).mean(2)
        return self._classify(self.head_drop(x))

    def get_classifier(self) -> nn.Module:
        """Returns the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by an untrained one; 0 leaves it out."""
        self.num_classes = check_count("num_classes", num_classes, least=0)
        like = {"device": self.time_embed.device, "dtype": self.time_embed.dtype}
        outputs = num_classes * max(1, self.num_bins)
        linear = nn.Linear(self.embed_dim, outputs, **like) if outputs else nn.Identity()
        self.head = linear.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, in place of keeping them."""
        self.grad_checkpointing = enable
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that weight decay should leave alone."""
        return {"encoder.pos_embed", "time_embed", "camera_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns how timm groups parameters by depth; the blocks have one numbering."""
        return {
            "stem": r"^(?:encoder\.(?:patch_embed|pos_embed|film)|time_embed|camera_embed)",
            "blocks": [(r"^(?:encoder\.)?blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _classify(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        return logits.unflatten(-1, (-1, self.num_bins)) if self.num_bins else logits

    def _time_embed(self, t: int, ages: Tensor | None) -> Tensor:
        """Returns the embeddings of frames: `b t 1 c`."""
        if ages is None:
            return self.time_embed[:, -t:]
        last = self.num_frames - 1
        place = last - ages.to(torch.float32).clamp(0, last)
        below = place.floor().long()
        part = (place - below)[..., None, None].to(self.time_embed.dtype)
        embeddings = self.time_embed[0]
        return embeddings[below].lerp(embeddings[(below + 1).clamp(max=last)], part)

    def _mask(self, t: int, k: int, present: Tensor | None, device: torch.device) -> Tensor | None:
        """Returns which tokens see which, True where they do; None where all see all."""
        if present is None and not self.causal:
            return None
        sees = torch.ones(t, t, dtype=torch.bool, device=device)
        itself = torch.eye(t, dtype=torch.bool, device=device)  # else a slot would see nothing
        sees = (sees.tril() if self.causal else sees)[None]
        if present is not None:
            seen = present.to(device, torch.bool)[:, None]
            sees = (sees.logical_and(seen)).logical_or(itself)
        return sees.repeat_interleave(k, 1).repeat_interleave(k, 2)[:, None]

    def _to_bcthw(self, clips: Tensor) -> Tensor:
        """Returns clips with the cameras in the batch: `(b n) c t h w`."""
        if self.num_cameras > 1:
            got, axes = list(clips.shape), ", ".join(self.input_format)
            require(
                clips.ndim == 6 and clips.shape[1] == self.num_cameras,
                f"clips are {got}, expected [b, {self.num_cameras} cameras, "
                f"{axes.removeprefix('b, ')}]",
            )
            clips = clips.flatten(0, 1)
        return to_bcthw(clips, self.input_format)

    def _of_frames(self, condition: Tensor | None, b: int, t: int) -> Tensor | None:
        """Returns a condition for each image of each camera: `(b n t) d`."""
        d = self.condition_dim
        if condition is None:
            require(not d, f"condition is missing, and the model has condition_dim={d}; pass one")
            return None
        got = list(condition.shape)
        require(d > 0, f"condition is {got}, and the model has none; build it with condition_dim")
        if got == [b, d]:
            condition = condition[:, None].expand(b, t, d)
        require(
            list(condition.shape) == [b, t, d],
            f"condition is {got}, expected [{b}, {d}] or one a frame, [{b}, {t}, {d}]",
        )
        like = self.time_embed
        condition = condition.to(like.device, like.dtype)
        return condition[:, None].expand(b, self.num_cameras, t, d).flatten(0, 2)

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


def _to_encoder(vivit: _Encoder, index: int, learner: nn.Module) -> _Encoder:
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
