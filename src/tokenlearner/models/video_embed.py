"""Patch embedding of clips: tubelets by a 3-D convolution, or the patches of some frames.

Axes: `b` batch, `c` channels, `t` frames (behind the embedding: tubelets), `h w` grid.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from einops import rearrange
from timm.layers import lecun_normal_
from torch import Tensor, nn

from ..utils.validation import Grid, check_choice, check_count

FORMATS = {"bcthw": "[b, c, t, h, w]", "btchw": "[b, t, c, h, w]"}


class ClipEmbed(nn.Module):
    """Turns clips into positions: tubelets, or the patches of some of the frames.

    Args:
        img_size: Height and width of a frame, or one number for both.
        patch_size: The same for a patch.
        in_chans: Channels of a frame.
        embed_dim: Channels of a position.
        num_frames: Frames that the model uses. Tubelets need clips of exactly so many; uniform
            sampling takes as many out of longer clips.
        tubelet_size: Frames of a tubelet; an incomplete one at the end is left out.
        sampling: `"tubelet"`, a 3-D convolution, or `"uniform"`, frames at even distances with a
            2-D convolution each.
        tubelet_init: Initialization of the 3-D kernel: `"central"` (not 0 for the middle frame
            only), `"average"` (equal for all frames) or `"random"`.
        input_format: Axes of a clip, `"bcthw"` or `"btchw"`.
        bias: Whether the convolution has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        kwargs: timm's arguments for images of any size, at their defaults; no others.

    Raises:
        ValueError: An argument is out of range, or no patch or tubelet fits.

    Source: scenic `vivit` `temporal_encode`. Its random `central` kernel has zeros in columns of a
    patch in place of frames; here they are in frames, as in its start from an image model.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        num_frames: int = 32,
        tubelet_size: int = 2,
        sampling: str = "tubelet",
        tubelet_init: str = "central",
        input_format: str = "bcthw",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        _check_one_size(kwargs)
        self.sampling = check_choice("sampling", sampling, ("tubelet", "uniform"))
        self.input_format = check_choice("input_format", input_format, list(FORMATS))
        check_choice("tubelet_init", tubelet_init, ("central", "average", "random"))
        self.in_chans = check_count("in_chans", in_chans)
        self.patch_size = _pair("patch_size", patch_size)
        self.num_frames = check_count("num_frames", num_frames)
        self.tubelet_size = check_count("tubelet_size", tubelet_size) if self._is_tubelet else 1
        self.frames = num_frames // self.tubelet_size
        self.set_input_size(img_size)
        if not self.frames:
            raise ValueError(
                f"num_frames is {num_frames}, expected at least one tubelet of {tubelet_size}"
            )
        kernel = (self.tubelet_size, *self.patch_size)
        like = {"bias": bias, "device": device, "dtype": dtype}
        if self._is_tubelet:
            self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel, **like)
        else:
            self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, **like)
        self.tubelet_init = tubelet_init
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes the kernel; timm's models call this when they initialize theirs."""
        lecun_normal_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)
        if self._is_tubelet:
            _init_frames(self.proj.weight, self.tubelet_init)

    @property
    def _is_tubelet(self) -> bool:
        return self.sampling == "tubelet"

    @property
    def num_patches(self) -> int:
        """Number of positions of a clip."""
        return self.frames * self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Sets the size of a frame; the patches stay as they are.

        Raises:
            ValueError: Another patch size is given, or no patch fits a frame.
        """
        if patch_size is not None and _pair("patch_size", patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size is {patch_size}, expected {self.patch_size}; build another model and "
                "fill it with tokenlearner.adapt.init_from"
            )
        if img_size is None:
            return
        height, width = _pair("img_size", img_size)
        grid = height // self.patch_size[0], width // self.patch_size[1]
        if not all(grid):
            raise ValueError(
                f"img_size is {(height, width)}, expected at least one patch of {self.patch_size}"
            )
        self.img_size, self.grid_size = (height, width), grid

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Returns the pixels for a step on the grid; timm's models call it."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        """Returns the grid of a frame of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, clips: Tensor) -> Tensor:
        """Embeds clips of the model's format: `b c t h w -> b (t h w) c`.

        Raises:
            ValueError: The clips are not as the model was built for.
        """
        clips = to_bcthw(clips, self.input_format)
        self._check(clips)
        if self._is_tubelet:
            return rearrange(self.proj(clips), "b c t h w -> b (t h w) c")
        chosen = clips[:, :, sample_frames(clips.shape[2], self.num_frames)]
        patches = self.proj(rearrange(chosen, "b c t h w -> (b t) c h w"))
        return rearrange(patches, "(b t) c h w -> b (t h w) c", t=self.frames)

    def _check(self, clips: Tensor) -> None:
        b, c, t, *size = clips.shape
        fits = t == self.num_frames if self._is_tubelet else t >= self.num_frames
        if c == self.in_chans and tuple(size) == self.img_size and fits:
            return
        shape = [b, t, c, *size] if self.input_format == "btchw" else [b, c, t, *size]
        other = next(name for name in FORMATS if name != self.input_format)
        raise ValueError(
            f"clips are {shape}, expected {FORMATS[self.input_format]} with {self.in_chans} "
            f"channels, {self.num_frames}{'' if self._is_tubelet else ' or more'} frames of "
            f"{self.img_size}; build the model for them (input_format={other!r} takes "
            f"{FORMATS[other]})"
        )


def to_bcthw(clips: Tensor, input_format: str) -> Tensor:
    """Returns clips of a format as `b c t h w`.

    Raises:
        ValueError: They do not have five axes.
    """
    if clips.ndim != 5:
        raise ValueError(f"clips are {list(clips.shape)}, expected {FORMATS[input_format]}")
    return rearrange(clips, "b t c h w -> b c t h w") if input_format == "btchw" else clips


def sample_frames(available: int, num_frames: int) -> list[int]:
    """Chooses frames at even distances, and as far from the clip's ends.

    Source: scenic `sample_frames_uniformly`, with its rounding (half to even).

    >>> sample_frames(8, 4)
    [2, 3, 5, 6]
    """
    if num_frames >= available:
        return list(range(available))
    exact = [Fraction(available * (i + 1), num_frames + 1) for i in range(num_frames)]
    return [min(round(frame), available - 1) for frame in exact]


@torch.no_grad()
def _init_frames(kernel: Tensor, tubelet_init: str) -> None:
    """Makes a random kernel 0 but for the middle frame, or equal for all frames: `o i t h w`."""
    if tubelet_init == "average":
        kernel.copy_(kernel[:, :, :1].expand_as(kernel).clone())
    if tubelet_init == "central":
        kernel[:, :, [i for i in range(kernel.shape[2]) if i != kernel.shape[2] // 2]] = 0.0


def _pair(name: str, size: int | tuple[int, int]) -> Grid:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"{name} is {size}, expected a number or (height, width)")
    return check_count(f"height of {name}", pair[0]), check_count(f"width of {name}", pair[1])


def _check_one_size(kwargs: dict[str, Any]) -> None:
    """Checks that timm's arguments for images of any size are at their defaults."""
    if others := kwargs.keys() - {"dynamic_img_pad", "strict_img_size", "output_fmt"}:
        raise ValueError(f"ClipEmbed takes no {', '.join(sorted(others))}; leave it out")
    if kwargs.get("dynamic_img_pad") or kwargs.get("strict_img_size") is False:
        raise ValueError(
            "frames have one size; leave dynamic_img_size and dynamic_img_pad out, and call "
            "set_input_size for another size"
        )
