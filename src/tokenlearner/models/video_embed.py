"""From clips to positions: tubelets by a 3-D convolution, or the patches of some frames.

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
        num_frames: Frames that the model sees. Tubelets want clips of exactly so many; uniform
            sampling takes as many out of longer clips.
        tubelet_size: Frames of a tubelet; those that fill none at the end are left out.
        sampling: `"tubelet"`, a 3-D convolution, or `"uniform"`, frames at even distances with a
            2-D convolution each.
        tubelet_init: The start of the 3-D kernel: `"central"` (sees the middle frame only),
            `"average"` (all frames alike) or `"random"`.
        input_format: Axes of a clip, `"bcthw"` or `"btchw"`.
        bias: Whether the convolution has one.
        device: Of the parameters.
        dtype: Of the parameters.
        unused: timm's arguments for images of any size, which clips cannot have; no others.

    Raises:
        ValueError: An argument is out of range, or no patch or tubelet fits.

    Source: scenic `vivit` `temporal_encode`. Its random `central` start zeroes columns of a patch
    in place of frames; this one zeroes frames, as its start from an image model does.
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
        **unused: Any,
    ):
        super().__init__()
        _refuse_any_size(unused)
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
            raise ValueError(f"{num_frames} frames hold no tubelet of {tubelet_size}; use more")
        kernel = (self.tubelet_size, *self.patch_size)
        like = {"bias": bias, "device": device, "dtype": dtype}
        if self._is_tubelet:
            self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel, **like)
        else:
            self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, **like)
        self.tubelet_init = tubelet_init
        self.init_weights()

    def init_weights(self) -> None:
        """Starts the kernel anew; timm's models call this when they are initialized."""
        lecun_normal_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)
        if self._is_tubelet:
            _share_out(self.proj.weight, self.tubelet_init)

    @property
    def _is_tubelet(self) -> bool:
        return self.sampling == "tubelet"

    @property
    def num_patches(self) -> int:
        """Positions of a clip."""
        return self.frames * self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Sets the size of a frame; the patches stay as they are.

        Raises:
            ValueError: Another patch size is asked for, or no patch fits a frame.
        """
        if patch_size is not None and _pair("patch_size", patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size} and cannot become {patch_size}; build another "
                "model and fill it with tokenlearner.adapt.init_from"
            )
        if img_size is None:
            return
        height, width = _pair("img_size", img_size)
        grid = height // self.patch_size[0], width // self.patch_size[1]
        if not all(grid):
            raise ValueError(f"a {height} x {width} frame holds no patch of {self.patch_size}")
        self.img_size, self.grid_size = (height, width), grid

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels for one step on the grid, as timm asks for them."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        """The grid of a frame of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, clips: Tensor) -> Tensor:
        """Embeds clips of the model's format: `b c t h w -> b (t h w) c`.

        Raises:
            ValueError: The clips are not as the model was built for.
        """
        self._check(clips)
        if self.input_format == "btchw":
            clips = rearrange(clips, "b t c h w -> b c t h w")
        if self._is_tubelet:
            return rearrange(self.proj(clips), "b c t h w -> b (t h w) c")
        chosen = clips[:, :, sample_frames(clips.shape[2], self.num_frames)]
        patches = self.proj(rearrange(chosen, "b c t h w -> (b t) c h w"))
        return rearrange(patches, "(b t) c h w -> b (t h w) c", t=self.frames)

    def _check(self, clips: Tensor) -> None:
        axes = FORMATS[self.input_format]
        if clips.ndim != 5:
            raise ValueError(f"clips are {list(clips.shape)}, expected {axes}")
        sizes = dict(zip(self.input_format, clips.shape, strict=True))
        t, fits = sizes["t"], sizes["t"] == self.num_frames
        fits = fits if self._is_tubelet else t >= self.num_frames
        if sizes["c"] != self.in_chans or (sizes["h"], sizes["w"]) != self.img_size or not fits:
            more = "" if self._is_tubelet else " or more"
            other = next(f for f in FORMATS if f != self.input_format)
            raise ValueError(
                f"clips are {list(clips.shape)}, expected {axes} with {self.in_chans} channels, "
                f"{self.num_frames}{more} frames of {self.img_size}; build the model for them "
                f"(input_format={other!r} takes {FORMATS[other]})"
            )


def sample_frames(available: int, wanted: int) -> list[int]:
    """Chooses frames at even distances, and as far from the clip's ends.

    Source: scenic `sample_frames_uniformly`, with its rounding (half to even).

    >>> sampled_frames(8, 4)
    [2, 3, 5, 6]
    """
    if wanted >= available:
        return list(range(available))
    exact = [Fraction(available * (i + 1), wanted + 1) for i in range(wanted)]
    return [min(round(frame), available - 1) for frame in exact]


@torch.no_grad()
def _share_out(kernel: Tensor, how: str) -> None:
    """Makes a kernel see the middle frame alone, or all frames alike: `o i t h w`."""
    if how == "average":
        kernel.copy_(kernel[:, :, :1].expand_as(kernel).clone())
    if how == "central":
        kernel[:, :, [i for i in range(kernel.shape[2]) if i != kernel.shape[2] // 2]] = 0.0


def _pair(name: str, size: int | tuple[int, int]) -> Grid:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"{name} is {size}, expected a number or (height, width)")
    return check_count(f"height of {name}", pair[0]), check_count(f"width of {name}", pair[1])


def _refuse_any_size(arguments: dict[str, Any]) -> None:
    """Refuses timm's arguments that are not in their neutral state, and all others."""
    if others := arguments.keys() - {"dynamic_img_pad", "strict_img_size", "output_fmt"}:
        raise ValueError(f"ClipEmbed takes no {', '.join(sorted(others))}; leave it out")
    if arguments.get("dynamic_img_pad") or arguments.get("strict_img_size") is False:
        raise ValueError(
            "a video model takes frames of one size; leave dynamic_img_size and dynamic_img_pad "
            "out, and call set_input_size for another size"
        )
