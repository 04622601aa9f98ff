"""What a host makes of images, kept for students that are fitted to it.

Images are shown in several views, each to teacher and student alike. What enters the first block in
which both differ is computed once; it is in memory, or in a file where it would fill that.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.hosts import Place, find_host
from ..models.outputs import first_tensor, outputs_logits, summarize_tokens
from ..utils.modules import training_mode
from ..utils.validation import check_count, require
from .distillation import (
    BlockOutputs,
    HostFinder,
    feature_loss,
    forward_with_features,
    logit_loss,
    unexplained_variance,
)

_LEAST_AREA, _ASPECT = 0.35, 4 / 3  # of a crop, at most and at least
_SHARE_OF_MEMORY = 0.4  # of what is free, that tokens may take


class ImageViews:
    """Images, and crops of them that are turned about: rows `0..n-1` are the images themselves.

    Args:
        images: `b c h w`, or clips with 5 axes, of which all frames are cropped alike.
        views: Rows of each image; row `v n + i` is view `v` of image `i`.
        seed: Of the crops.
    """

    def __init__(self, images: Tensor, views: int = 1, seed: int = 0):
        self.images, self.views = images, check_count("views", views)
        crops, random = len(images) * (views - 1), torch.Generator("cpu").manual_seed(seed)
        area, aspect, flip, *center = torch.rand(5, crops, generator=random, device="cpu")
        area = _LEAST_AREA + (1 - _LEAST_AREA) * area
        ratio = torch.exp((2 * aspect - 1) * math.log(_ASPECT) / 2)
        sides = torch.stack([area.sqrt() * ratio, area.sqrt() / ratio]).clamp(max=1)
        self._centers = (2 * torch.stack(center) - 1) * (1 - sides)
        self._sides = sides * torch.stack(
            [1 - 2 * (flip < 0.5).float(), torch.ones(crops, device="cpu")]
        )

    def __len__(self) -> int:
        return len(self.images) * self.views

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Returns some of the rows as a batch."""
        n = len(self.images)
        images = self.images[rows.to(self.images.device) % n]
        if bool((is_crop := rows >= n).any()):
            crops = is_crop.to(images.device)
            images[crops] = self._crop(images[crops], rows[is_crop] - n)
        return images

    def _crop(self, images: Tensor, crops: Tensor) -> Tensor:
        planes = images.flatten(1, -3).float()
        theta = torch.zeros(len(crops), 2, 3, device="cpu")
        theta[:, [0, 1], [0, 1]] = self._sides[:, crops].T
        theta[:, :, 2] = self._centers[:, crops].T
        grid = F.affine_grid(theta.to(planes.device), list(planes.shape), align_corners=False)
        found = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
        return found.reshape(images.shape).to(images.dtype)


class TeacherCache:
    """The features and outputs of a host on images, for students that share its first blocks.

    Args:
        host: The teacher.
        images: Normalized images, `b c h w`, or clips.
        first: The first block behind which student and teacher are compared.
        whole: Compare all tokens behind the last block too; for students that keep all positions.
        batch_size: Images at a time.
        views: As in `ImageViews`.
        seed: Of the views.
        shares_front: Whether students have the host's blocks in front of `first`, which are not run
            again then.
        skipped: Blocks behind which features are not compared, see `mixed_blocks`.
        targets: What `targets` returned of another cache of the same, which the host is run for
            else.
        report: Called with how many views the host was run on, and how many there are.

    Raises:
        ValueError: There are fewer than 2 images, or they are all the same.
    """

    def __init__(
        self,
        host: nn.Module,
        images: Tensor,
        first: int,
        *,
        whole: bool = False,
        batch_size: int = 64,
        views: int = 1,
        seed: int = 0,
        shares_front: bool = True,
        skipped: Collection[int] = (),
        targets: Mapping[str, Tensor] | None = None,
        report: Callable[[int, int], None] | None = None,
    ):
        check_count("batch_size", batch_size, least=2)  # one image has no variance
        if not isinstance(images, Tensor) or len(images) < 2:
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images is {got}, expected a tensor of 2 images or more, b c h w")
        require(bool((images != images[:1]).any()), "images are all the same; pass different ones")
        self.images = images.clone() if images.is_inference() else images
        self.views = ImageViews(self.images, views, seed)
        self.first, self.whole, self.batch_size = first, whole, batch_size
        self._find_student, self._place = HostFinder(), find_host(host)
        self.skipped = skipped
        self._front: _CachedBlocks | None = None
        self._report = report
        if targets is None:
            self._run_teacher(host, shares_front and first > 0)
        else:
            self.output = targets["output"]
            self.features = [targets[f"{i}"] for i in range(len(targets) - 1)]
            self._is_logits = outputs_logits(host, self.output.shape[-1])
        self._variances = [_variance(layer) for layer in self.features]
        self._output_variance = _variance(self.output)
        square = self.output.float().square().mean()
        self._has_output = bool(self._output_variance.mean() > 1e-9 * square)

    def targets(self) -> dict[str, Tensor]:
        """Returns the host's features and outputs, for another cache of the same to begin with."""
        return {"output": self.output, **{f"{i}": x for i, x in enumerate(self.features)}}

    def from_block(
        self,
        first: int,
        host: nn.Module | None = None,
        skipped: Collection[int] = (),
        known: TeacherCache | None = None,
    ) -> TeacherCache:
        """Returns a cache for students that differ from a later block on; targets are shared.

        Args:
            first: That block; behind the last one only the output is compared.
            host: Run again up to it, for students that have the blocks in front; else None.
            skipped: As in the class, instead of its own.
            known: What this returned for the same host and a block no later; the host is gone on
                with from there.
        """
        other, blocks = copy.copy(self), range(first, len(self._place.blocks))
        kept = [i - self.first for i in blocks if i not in skipped]
        other.features = [self.features[i] for i in kept]
        other._variances = [self._variances[i] for i in kept]
        other.first, other.skipped, other._front = first, skipped, None
        other._find_student = HostFinder()
        if host is not None and first:
            if known and known.first == first:
                other._front = known._front
            else:
                other._run_front(host, known)
        return other

    def rows(self, images: Tensor) -> Tensor:
        """Returns the rows of all views of some images."""
        starts = len(self.images) * torch.arange(self.views.views, device="cpu")
        return (starts[:, None] + images).flatten()

    def run(self, student: nn.Module, rows: Tensor) -> BlockOutputs:
        """Runs a student on some of the rows; returns its output and features from `first` on."""
        images, place = self.views[rows], self._find_student(student)
        with self.fronted(rows, place):
            return forward_with_features(student, images, self.first, place, self.skipped)

    @contextmanager
    def fronted(self, rows: Tensor, place: Place | None = None) -> Iterator[None]:
        """Lets a model's forward begin with what is known of rows; without a front with images."""
        if self._front is None:
            yield
            return
        with _replaced_front(place or self._place, self.first, self._front.select(rows)):
            yield

    def losses(self, student: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses of a student's features and of its output on some of the rows."""
        features, output = self._compared(self.run(student, rows))
        if self._is_logits:
            of_output = logit_loss(output, self.output[rows])
        else:
            of_output = unexplained_variance(output, self.output[rows], self._output_variance)
        if not self.features:
            return of_output.new_zeros(()), of_output
        targets = [layer[rows] for layer in self.features]
        return feature_loss(features, targets, variances=self._variances), of_output

    @torch.no_grad()
    def error(self, student: nn.Module, rows: Tensor) -> float:
        """Returns the share of the variance of the host's output that a student leaves open.

        0 is a perfect copy; the mean of all images would score 1. Logits are compared up to what is
        added to all of them. Where the output is the same for all images, as of a head that was
        never trained, it is the share of the last block's features.
        """
        with training_mode(student, training=False):
            found = [
                self._compared(self.run(student, part)) for part in rows.split(self.batch_size)
            ]
        if self._has_output:
            output = torch.cat([output for _, output in found])
            return unexplained_variance(output, self.output[rows], self._output_variance).item()
        last = torch.cat([features[-1] for features, _ in found])
        return unexplained_variance(last, self.features[-1][rows], self._variances[-1]).item()

    @torch.no_grad()
    def agreement(self, student: nn.Module, rows: Tensor) -> float | None:
        """Returns the share of rows that a student puts in the host's class; None without any."""
        if not self._is_logits:
            return None
        with training_mode(student, training=False):
            outputs = [self.run(student, part).output for part in rows.split(self.batch_size)]
        return (torch.cat(outputs).argmax(1) == self.output[rows].argmax(1)).float().mean().item()

    @torch.no_grad()
    def _run_teacher(self, host: nn.Module, keep_front: bool) -> None:
        """Runs the host on all rows; keeps what enters block `first`."""
        entering = list(self._place.blocks)[: self.first][-1:] if keep_front else []
        raw: list[Any] = []
        hooks = [b.register_forward_hook(lambda _, __, out: raw.append(out)) for b in entering]
        self.features, self.output = list[Tensor](), torch.empty(0)
        try:
            with training_mode(host, training=False):
                for rows in torch.arange(len(self.views), device="cpu").split(self.batch_size):
                    run = forward_with_features(
                        host, self.views[rows], self.first, self._place, self.skipped
                    )
                    self._is_logits = outputs_logits(host, run.output.shape[-1])
                    self._keep(rows, *self._compared(run), raw)
                    self._say(rows)
        finally:
            for hook in hooks:
                hook.remove()

    def _say(self, rows: Tensor) -> None:
        if self._report:
            self._report(int(rows[-1]) + 1, len(self.views))

    @torch.no_grad()
    def _run_front(self, host: nn.Module, known: TeacherCache | None) -> None:
        """Runs the blocks of the host in front of `first`, and keeps what they return."""
        raw: list[Any] = []

        def stop(_: nn.Module, __: Any, out: Any) -> None:
            raw.append(out)
            raise _Stopped

        handle = list(self._place.blocks)[self.first - 1].register_forward_hook(stop)
        try:
            with training_mode(host, training=False):
                for rows in torch.arange(len(self.views), device="cpu").split(self.batch_size):
                    with suppress(_Stopped), known.fronted(rows) if known else nullcontext():
                        host(self.views[rows])
                    self._keep_front(rows, raw)
                    self._say(rows)
        finally:
            handle.remove()

    def _keep_front(self, rows: Tensor, raw: list[Any]) -> None:
        out = raw.pop()
        tokens = first_tensor(out)
        if self._front is None:
            kept = _allocate(len(self.views), tokens)
            self._front = _CachedBlocks(kept, isinstance(out, tuple), tokens.device)
        self._front.tokens[rows] = tokens.to(self._front.tokens.device)

    def _keep(self, rows: Tensor, features: list[Tensor], output: Tensor, raw: list[Any]) -> None:
        if not self.features:
            self.features = [_allocate(len(self.views), layer) for layer in features]
            self.output = _allocate(len(self.views), output)
        for kept, new in zip((*self.features, self.output), (*features, output), strict=True):
            kept[rows] = new.to(kept.device)
        if raw:
            self._keep_front(rows, raw)

    def _compared(self, run: BlockOutputs) -> tuple[list[Tensor], Tensor]:
        """Returns each block's summary, with `whole` all tokens of the last one, and the output."""
        place = self._place
        features = [
            summarize_tokens(tokens, place.num_prefix_tokens, place.pools_positions)
            for tokens in run.features
        ]
        output = run.output
        if self._is_logits:  # a constant changes no probability
            output = output - output.mean(-1, keepdim=True)
        return [*features, run.features[-1]] if self.whole else features, output


class _Stopped(Exception):
    """Ends a forward pass whose rest is not needed."""


def _variance(x: Tensor) -> Tensor:
    return x.float().var(0, correction=0, keepdim=True)


def _allocate(rows: int, like: Tensor) -> Tensor:
    """Returns a tensor for a tensor's rows: on its device, or in a file that ends with the process.

    The file is without a name, in the folder of temporary files (`TMPDIR`).
    """
    shape, size = (rows, *like.shape[1:]), rows * like[0].numel() * like.element_size()
    if size <= _SHARE_OF_MEMORY * _free_memory(like.device):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    descriptor, path = tempfile.mkstemp(suffix=".tokens")
    try:
        os.ftruncate(descriptor, size)
        return torch.from_file(
            path, True, size // like.element_size(), dtype=like.dtype, device="cpu"
        ).view(shape)
    finally:
        os.close(descriptor)
        os.unlink(path)


def _free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**33


class _CachedBlocks(nn.Module):
    """Stands for blocks that have run already: returns what the last of them returned.

    A module, not a hook, so that a host that runs blocks again in the backward pass (gradient
    checkpointing) finds it too. Older transformers return tokens in a tuple.
    """

    def __init__(self, tokens: Tensor, in_tuple: bool, device: torch.device):
        super().__init__()
        self.tokens, self.in_tuple, self.device = tokens, in_tuple, device

    def select(self, rows: Tensor) -> _CachedBlocks:
        """Returns the same for some of the rows, on the device that blocks run on."""
        tokens = self.tokens[rows.to(self.tokens.device)].to(self.device)
        return _CachedBlocks(tokens, self.in_tuple, self.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.tokens,) if self.in_tuple else self.tokens


@contextmanager
def _replaced_front(place: Place, first: int, cached: _CachedBlocks) -> Iterator[None]:
    """Lets a model's forward begin at a block, on the tokens that are known to enter it."""
    blocks, front = place.blocks, list(place.blocks)[:first]
    try:
        for i in range(first):
            blocks[i] = cached
        yield
    finally:
        for i, block in enumerate(front):
            blocks[i] = block
