"""Other ways to few tokens, to compare learned ones with: `average_pool`, `top_k`, `merge`, `undo`.

Each changes a trained timm VisionTransformer in place, adds no parameter, and holds nothing from
one call to the next. Queries and keys are read by hooks that live as long as a call, so that the
host's own attention runs, with all that it has (QK norm, dropout, gates), and only once;
`torch.compile` leaves these blocks alone. `count_macs` grows by one row of attention with `top_k`,
by the similarities in every block with `merge`, and by nothing with `average_pool`.

Axes: `b` batch, `p` prefix tokens, `h w` grid, `n` positions, `k` tokens, `c` channels, `d` a head.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.blocks import ReducedBlock
from tokenlearner.layers.functional import upcast
from tokenlearner.models.insertion import block_index
from tokenlearner.utils.validation import Grid, check_count, check_grid


def average_pool(model: VisionTransformer, num_tokens: int, at: int | float) -> VisionTransformer:
    """Makes `model` run on the means of `num_tokens` regions of its grid from block `at` on.

    Raises:
        ValueError: The host is unknown or changed already, or an argument does not fit it.
    """
    blocks, grid = _untouched(model), model.patch_embed.grid_size
    index, learner = block_index(at, len(blocks)), RegionMeans(num_tokens, grid)
    new = ReducedBlock(blocks[index], learner, model.num_prefix_tokens, 1, model.patch_embed)
    new.training = learner.training = model.training
    blocks[index] = new
    return model


class RegionMeans(nn.Module):
    """A learner without parameters: the means of `nn.AdaptiveAvgPool2d`, which may overlap."""

    def __init__(self, num_tokens: int, grid: Grid):
        super().__init__()
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.grid = grid
        self.regions = partition(num_tokens, grid)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Pools the regions, `b n c -> b k c`; `ValueError` if the grid has other than `n`."""
        h, _ = check_grid(grid or self.grid, x.shape[1])
        planes = rearrange(x, "b (h w) c -> b c h w", h=h)
        return rearrange(F.adaptive_avg_pool2d(planes, self.regions), "b c r s -> b (r s) c")

    def attention(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """The weights of the means, `b n c -> b k n`: what becomes of the identity."""
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return self.forward(identity[None], grid).expand(x.shape[0], -1, -1)


def partition(num_tokens: int, grid: Grid) -> Grid:
    """The rows and columns whose aspect is nearest to the grid's; of two as near, fewer rows."""
    h, w = grid
    pairs = [(r, num_tokens // r) for r in range(1, num_tokens + 1) if num_tokens % r == 0]
    if not (fitting := [(r, s) for r, s in pairs if r <= h and s <= w]):
        products = (r * s for r in range(1, h + 1) for s in range(1, w + 1))
        near = min(products, key=lambda product: abs(product - num_tokens))
        raise ValueError(f"no rows and columns of a {h} x {w} grid make {num_tokens}; take {near}")
    return min(fitting, key=lambda pair: round(abs(math.log(pair[0] * w / (pair[1] * h))), 9))


def top_k(
    model: VisionTransformer, num_tokens: int, at: int | float, mean_of_rest: bool = False
) -> VisionTransformer:
    """Lets only the positions that the class token attends to most into block `at` and after.

    It is the attention in the block before, mean over heads. Prefix tokens stay besides. With
    `mean_of_rest` the last of the tokens is the mean of the other positions, by that attention.

    Raises:
        ValueError: The host is unknown, changed already or without class token, or `at` is 0.

    Source: Haurum et al., "Which Tokens to Use?", ICCVW 2023, "Top-K"; scores as in Liang et al.,
    arXiv 2202.07800 (EViT). Both drop tokens between attention and MLP of several blocks, and EViT
    adds the mean of what it drops. Here it is once, behind a block.
    """
    blocks, n = _untouched(model), math.prod(model.patch_embed.grid_size)
    if (index := block_index(at, len(blocks))) == 0:
        raise ValueError(f"at is {at!r}: no block before block 0 says which to keep; take at=1")
    if model.cls_token is None:
        raise ValueError("top_k asks the class token what to keep, and this model has none")
    if check_count("num_tokens", num_tokens) > n:
        raise ValueError(f"num_tokens is {num_tokens}, but an image has {n}; ask for fewer")
    blocks[index - 1] = TopKBlock(
        blocks[index - 1], num_tokens, model.num_prefix_tokens, mean_of_rest
    )
    return model


class TopKBlock(nn.Module):
    """Runs a block as it is and hands on the positions that its first token attended to most."""

    def __init__(
        self,
        block: nn.Module,
        num_tokens: int,
        num_prefix_tokens: int = 1,
        mean_of_rest: bool = False,
    ):
        super().__init__()
        _check_kind(getattr(block, "attn", None), Attention)
        self.block = block
        self.num_tokens = num_tokens
        self.mean_of_rest = mean_of_rest
        self.num_prefix_tokens = num_prefix_tokens
        self.training = block.training

    @torch.compiler.disable  # it may miss hooks that come and go
    def forward(self, x: Tensor) -> Tensor:
        """Runs the block and keeps `k`, the best first: `b (p + n) c -> b (p + k) c`."""
        p, attn = self.num_prefix_tokens, self.block.attn
        with _outputs(attn.q_norm, attn.k_norm) as seen:
            y = self.block(x)
        scores = class_attention(*seen, attn.scale)[:, p:]
        kept = scores.topk(self.num_tokens - self.mean_of_rest, dim=1).indices
        tokens = [y[:, :p], _take(y[:, p:], kept)]
        if self.mean_of_rest:
            weights = scores.scatter(1, kept, 0)[:, None].to(y.dtype)
            tokens.append(weights @ y[:, p:] / weights.sum(-1, keepdim=True).clamp(min=1e-6))
        return torch.cat(tokens, dim=1)


def class_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """How the first token attends to all, mean over heads: `b heads n d` to `b n`, no gradient."""
    logits = queries[:, :, :1].detach() * scale @ keys.detach().mT
    return upcast(logits).softmax(-1).mean(1).squeeze(1)


def merge(model: VisionTransformer, r: int | Sequence[int]) -> VisionTransformer:
    """Makes every block merge `r` pairs of similar positions between its attention and its MLP.

    `r` is one number for all blocks or a list with one for each, lowered to half of a block's
    positions where it is larger. Prefix tokens are left alone. A host that averages its tokens for
    the head counts a merged one once.

    Raises:
        ValueError: The host is unknown, changed already or checkpoints gradients, or `r` misfits.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3. Written
    from the paper; LayerScale, QK norm and drop paths, which it does not speak of, take part.
    """
    blocks = _untouched(model)
    if model.grad_checkpointing:
        raise ValueError("merging runs all blocks as one; call set_grad_checkpointing(False)")
    schedule = r if isinstance(r, Sequence) else [r] * len(blocks)
    model.blocks = MergedBlocks(blocks, schedule, model.num_prefix_tokens)
    return model


class MergedBlocks(nn.Module):
    """All blocks of a host, in the place of its list and with the names they had there.

    One module over all can hand the sizes of the tokens from block to block as an argument, where
    wrappers of single blocks would have to leave them somewhere. It is no list on purpose: code
    that takes blocks one by one, such as `forward_intermediates`, fails instead of not merging.
    """

    def __init__(self, blocks: nn.Sequential, schedule: Sequence[int], num_prefix_tokens: int = 1):
        super().__init__()
        self.schedule = tuple(check_count("r", r, least=0) for r in schedule)
        self.num_prefix_tokens = num_prefix_tokens
        self.training = blocks.training
        if len(schedule) != len(blocks):
            raise ValueError(f"r has {len(schedule)} numbers, expected {len(blocks)}, one a block")
        for i, block in enumerate(blocks):
            _check_kind(block, Block)
            _check_kind(block.attn, Attention)
            self.add_module(str(i), block)
        self.handed_on = nn.Identity().train(blocks.training)  # for hooks on every block's tokens

    def forward(self, x: Tensor) -> Tensor:
        """Runs all blocks: `b (p + n) c -> b (p + k) c`, `n - k` being what was merged."""
        return self.with_sizes(x)[0]

    def with_sizes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with the number of tokens that each one stands for, `b (p + k)`."""
        sizes = upcast(x.new_ones(x.shape[:2]))
        for i, r in enumerate(self.schedule):
            x, sizes = self.run_block(self.get_submodule(str(i)), x, sizes, r)
            x = self.handed_on(x)
        return x, sizes

    @torch.compiler.disable
    def run_block(
        self, block: nn.Module, x: Tensor, sizes: Tensor, r: int
    ) -> tuple[Tensor, Tensor]:
        """Runs a block and merges `r` pairs within it, `b n c, b n`, both fewer after it."""
        p, n = self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens
        with _outputs(block.attn.k_norm) as seen:
            attended = proportional_attention(block.attn, block.norm1(x), sizes)
        x = x + block.drop_path1(block.ls1(attended))
        if r := min(r, n // 2):
            pairs = match(seen[0][:, :, p:].mean(1), r)
            merged, counts = merge_pairs(x[:, p:], sizes[:, p:], *pairs)
            x, sizes = torch.cat([x[:, :p], merged], 1), torch.cat([sizes[:, :p], counts], 1)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), sizes


def proportional_attention(attn: Attention, x: Tensor, sizes: Tensor) -> Tensor:
    """Attends to each token as to as many alike as it stands for: `b n c, b n -> b n c`."""
    return attn(x, attn_mask=sizes.log().to(x.dtype)[:, None, None])


def match(keys: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the `r` most similar pairs of positions: `b n d` to `b r, b r, b (m - r)`.

    Every other position, from the first on, is one of `m` in A, and looks for the nearest direction
    in the rest, B. Returns what of A is merged, best first, into what of B, and what of A stays.
    """
    directions = F.normalize(keys.detach(), dim=-1)
    similarity, partner = (directions[:, ::2] @ directions[:, 1::2].mT).max(-1)
    order = similarity.argsort(1, descending=True)
    merged, kept = order[:, :r], order[:, r:].sort(1).values
    return merged, partner.gather(1, merged), kept


def merge_pairs(
    x: Tensor, sizes: Tensor, merged: Tensor, into: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Takes means by size of what `match` chose: `b n c, b n -> b (n-r) c, b (n-r)`, A before B."""
    sums = torch.cat([x * sizes[..., None], sizes[..., None]], dim=-1)  # sizes add up alike
    a, b = sums[:, ::2], sums[:, 1::2]
    b = b.scatter_add(1, into[..., None].expand(-1, -1, b.shape[-1]), _take(a, merged))
    sums = torch.cat([_take(a, kept), b], dim=1)
    return (sums[..., :-1] / sums[..., -1:]).to(x.dtype), sums[..., -1]


@dataclass(frozen=True)
class Schedule:
    """How many pairs each block merges, and what an image then costs in multiply-adds."""

    r: int
    macs: int
    host_macs: int

    @property
    def share(self) -> float:
        return self.macs / self.host_macs


def schedule_for(model: VisionTransformer, images: Tensor, share: float) -> Schedule:
    """Finds the `r` with which `merge` leaves a share of the cost, or as near to it as `r` gets.

    It is counted on the first of `images`; the model is left as it was. Raises as `merge` does.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}, expected one above 0 and at most 1, such as 0.5")
    blocks = _untouched(model)

    @cache
    def macs(r: int) -> int:
        merge(model, r)
        try:
            return count_macs(model, images[:1])
        finally:
            model.blocks = blocks

    host_macs = count_macs(model, images[:1])
    most = math.prod(model.patch_embed.grid_size) // 2
    enough = bisect_left(range(most), -share * host_macs, key=lambda r: -macs(r))
    r = min(max(enough - 1, 0), enough, key=lambda r: abs(macs(r) - share * host_macs))
    return Schedule(r, macs(r), host_macs)


def undo(model: VisionTransformer) -> VisionTransformer:
    """Takes all reduction of tokens out again; `ValueError` if there is none."""
    old = [block for block in model.blocks.children() if not isinstance(block, nn.Identity)]
    new = [b.block if isinstance(b, ReducedBlock | TopKBlock) else b for b in old]
    if new == old and not isinstance(model.blocks, MergedBlocks):
        raise ValueError("this model's tokens are not reduced; there is nothing to undo")
    model.blocks = nn.Sequential(*new)
    model.blocks.training = model.training
    return model


@contextmanager
def _outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _in, out: seen.append(out)) for m in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _take(x: Tensor, indices: Tensor) -> Tensor:
    return x.take_along_dim(indices[..., None], dim=1)


def _untouched(model: VisionTransformer) -> nn.Sequential:
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"the model is {type(model).__name__}, expected timm's VisionTransformer")
    if any(isinstance(m, ReducedBlock | TopKBlock | MergedBlocks) for m in model.modules()):
        raise ValueError("this model's tokens are reduced already; undo that first")
    return model.blocks


def _check_kind(module: nn.Module | None, expected: type[nn.Module]) -> None:
    if type(module) is not expected:  # what derives from it may do something else
        raise ValueError(
            f"expected a host of timm's {expected.__name__}, got {type(module).__name__}"
        )
