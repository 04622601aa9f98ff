"""The baselines of the comparison, each against a slow and obvious reference of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from tokenlearner import insert
from tokenlearner.evaluation.flops import count_macs

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
baselines = importlib.import_module("baselines")

C, HEADS, DEPTH = 24, 3, 4
HOSTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer-scale-qk-norm": {"init_values": 0.1, "qk_norm": True},
    "registers": {"reg_tokens": 2, "init_values": 0.1},
    "wide": {"img_size": (12, 28)},
}
REDUCTIONS: dict[str, Callable[[VisionTransformer], VisionTransformer]] = {
    "average_pool": lambda model: baselines.average_pool(model, 6, at=2),
    "top_k": lambda model: baselines.top_k(model, 6, at=2),
    "merge": lambda model: baselines.merge(model, 4),
}
each_host = pytest.mark.parametrize("host", HOSTS)
each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)


def vit(host: str = "plain", **arguments: Any) -> VisionTransformer:
    """A small ViT in float64 with every parameter drawn at random, so that none hides another."""
    shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 5}
    size = {"embed_dim": C, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}
    model = VisionTransformer(**shape | size | HOSTS[host] | arguments).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def make_images(model: VisionTransformer, count: int = 3) -> Tensor:
    return torch.randn(count, 1, *model.patch_embed.img_size, dtype=torch.float64)


def embedded(model: VisionTransformer, images: Tensor) -> Tensor:
    return model._pos_embed(model.patch_embed(images))


def classified(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.forward_head(model.norm(x))


def heads_of(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one image, `n c` to thrice `heads n d`."""
    rows = attn.qkv(x).split(C, dim=-1)
    q, k, v = (part.unflatten(-1, (HEADS, C // HEADS)).transpose(0, 1) for part in rows)
    return attn.q_norm(q), attn.k_norm(k), v


# --- means over fixed regions ------------------------------------------------------------------


def slow_means(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`h w c` to `k c`, region by region."""
    h, w, _ = x.shape
    means = []
    for i in range(rows):
        for j in range(columns):
            down = slice(int(np.floor(i * h / rows)), int(np.ceil((i + 1) * h / rows)))
            right = slice(int(np.floor(j * w / columns)), int(np.ceil((j + 1) * w / columns)))
            means.append(x[down, right].mean(axis=(0, 1)))
    return np.stack(means)


@pytest.mark.parametrize(
    ("k", "grid", "regions"),
    [(12, (7, 7), (3, 4)), (6, (9, 4), (3, 2)), (2, (6, 6), (1, 2)), (7, (7, 3), (7, 1))],
)
def test_regions_have_the_aspect_nearest_to_the_grids_and_their_means_are_those_of_a_loop(
    k: int, grid: tuple[int, int], regions: tuple[int, int]
) -> None:
    assert baselines.partition(k, grid) == regions
    x, learner = torch.randn(1, grid[0] * grid[1], C), baselines.RegionMeans(k, grid)
    expected = torch.tensor(slow_means(x.reshape(*grid, C).numpy(), *regions))[None]
    torch.testing.assert_close(learner(x), expected)
    torch.testing.assert_close(learner.attention(x) @ x, expected)


@each_host
def test_average_pool_runs_the_later_blocks_on_prefix_and_means(host: str) -> None:
    model, k = vit(host), 6
    images, p = make_images(model), model.num_prefix_tokens
    h, w = model.patch_embed.grid_size
    x = model.blocks[:2](embedded(model, images))
    means = [slow_means(one.reshape(h, w, C).detach().numpy(), 2, 3) for one in x[:, p:]]
    tokens = torch.cat([x[:, :p], torch.tensor(np.stack(means))], dim=1)
    expected = classified(model, model.blocks[2:](tokens))
    torch.testing.assert_close(baselines.average_pool(model, k, at=0.5)(images), expected)


# --- what the class token looks at -------------------------------------------------------------


def looked_at(block: Any, x: Tensor, p: int) -> np.ndarray:
    """Positions of one image, `n c`, by the class token's weight in the full attention matrix."""
    q, k, _ = heads_of(block.attn, block.norm1(x))
    logits = (q @ k.mT / (C // HEADS) ** 0.5).detach().numpy()
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.argsort(-weights.mean(0)[0, p:])


@each_host
@pytest.mark.parametrize("at", [1, 3])
def test_top_k_keeps_what_the_full_attention_matrix_tells(host: str, at: int) -> None:
    model, k = vit(host), 6
    images, p = make_images(model), model.num_prefix_tokens
    before = model.blocks[: at - 1](embedded(model, images))
    x = model.blocks[at - 1](before)
    kept = [
        torch.cat([one[:p], one[p:][looked_at(model.blocks[at - 1], seen, p)[:k].copy()]])
        for one, seen in zip(x, before, strict=True)
    ]
    expected = classified(model, model.blocks[at:](torch.stack(kept)))
    torch.testing.assert_close(baselines.top_k(model, k, at)(images), expected)


# --- bipartite soft matching -------------------------------------------------------------------


def slow_match(keys: np.ndarray, r: int) -> list[tuple[int, int]]:
    """The `r` best edges of one image, keys `n d`, as pairs of positions."""
    edges = []
    for i in range(0, len(keys), 2):
        scores = {}
        for j in range(1, len(keys), 2):
            lengths = np.linalg.norm(keys[i]) * np.linalg.norm(keys[j])
            scores[j] = keys[i] @ keys[j] / lengths
        best = max(scores, key=lambda j: scores[j])
        edges.append((scores[best], i, best))
    return [(i, j) for _, i, j in sorted(edges, reverse=True)[:r]]


def slow_merge(
    x: np.ndarray, sizes: np.ndarray, edges: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the edges one by one: what stays of A, then B."""
    x, sizes = x.copy(), sizes.copy()
    for i, j in edges:
        x[j] = (x[i] * sizes[i] + x[j] * sizes[j]) / (sizes[i] + sizes[j])
        sizes[j] += sizes[i]
    gone = {i for i, _ in edges}
    order = [i for i in range(0, len(x), 2) if i not in gone] + list(range(1, len(x), 2))
    return x[order], sizes[order]


def slow_blocks(model: VisionTransformer, x: Tensor, schedule: list[int]) -> Tensor:
    """All blocks on one image, `n c`, with softmax weights times size in place of any mask."""
    p, sizes = model.num_prefix_tokens, np.ones(len(x))
    for block, r in zip(model.blocks, schedule, strict=True):
        q, k, v = heads_of(block.attn, block.norm1(x))
        weights = (q @ k.mT / (C // HEADS) ** 0.5).exp() * torch.tensor(sizes)
        values = (weights / weights.sum(-1, keepdim=True)) @ v
        x = x + block.ls1(block.attn.proj(values.transpose(0, 1).flatten(1)))
        if r:
            edges = slow_match(k.mean(0)[p:].detach().numpy(), r)
            rest, counts = slow_merge(x[p:].detach().numpy(), sizes[p:], edges)
            x, sizes = torch.cat([x[:p], torch.tensor(rest)]), np.concatenate([sizes[:p], counts])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


@each_host
@pytest.mark.parametrize("schedule", [[4, 4, 4, 4], [0, 5, 0, 2], [0, 0, 0, 0]], ids=str)
def test_merge_is_equal_to_the_paper_in_loops(host: str, schedule: list[int]) -> None:
    model = vit(host)
    images = make_images(model, 2)
    ends = [slow_blocks(model, one, schedule) for one in embedded(model, images)]
    expected = classified(model, torch.stack(ends))
    r: Any = schedule[0] if len(set(schedule)) == 1 else schedule
    torch.testing.assert_close(baselines.merge(model, r)(images), expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain-attention"])
def test_merging_nothing_is_the_host_also_in_training(fused: bool) -> None:
    model = vit("layer-scale-qk-norm", drop_path_rate=0.4, proj_drop_rate=0.2).train()
    for block in model.blocks:
        block.attn.fused_attn = fused
    images, outputs = make_images(model), []
    for change in (lambda model: model, lambda model: baselines.merge(model, 0)):
        torch.manual_seed(1)
        outputs.append(change(model)(images))
    torch.testing.assert_close(*outputs)


def test_a_schedule_is_the_nearest_of_all_and_tells_its_true_cost() -> None:
    model = vit(img_size=(8, 20))  # 10 positions
    images = make_images(model)
    host, costs = count_macs(model, images[:1]), []
    for r in range(6):
        costs.append(count_macs(baselines.merge(model, r), images[:1]))
        baselines.undo(model)
    for share in (0.01, 0.6, 0.75, 1.0):
        found = baselines.schedule_for(model, images, share)
        assert found.r == min(range(6), key=lambda r: abs(costs[r] - share * host))
        assert (found.macs, found.host_macs) == (costs[found.r], host)
        assert found.share == costs[found.r] / host


# --- all three ---------------------------------------------------------------------------------


@each_reduction
def test_every_parameter_gets_a_gradient(reduce: Callable[..., VisionTransformer]) -> None:
    model = reduce(vit("layer-scale-qk-norm").train())
    model(make_images(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@each_reduction
def test_calls_leave_nothing_behind_and_undo_gives_the_host_back(
    reduce: Callable[..., VisionTransformer],
) -> None:
    model = vit()
    images, parameters = make_images(model), dict(model.named_parameters())
    blocks, expected = list(model.blocks), model(images)
    first = reduce(model)(images)
    assert not torch.allclose(first, expected)
    model(make_images(model, 5))
    assert torch.equal(model(images), first)
    assert not any(module._forward_hooks for module in model.modules())
    assert baselines.undo(model) is model
    assert torch.equal(model(images), expected)
    assert list(model.blocks) == blocks
    assert [*model.named_parameters()] == [*parameters.items()]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: baselines.average_pool(vit(), 11, 2), "11"),
        (lambda: baselines.average_pool(vit(), 0, 2), "num_tokens is 0"),
        (lambda: baselines.average_pool(vit(), 4, 4), "at is 4"),
        (lambda: baselines.average_pool(nn.Linear(1, 1), 4, 2), "Linear"),
        (lambda: baselines.top_k(vit(), 6, 0), "at is 0"),
        (lambda: baselines.top_k(vit(), 50, 2), "num_tokens is 50"),
        (lambda: baselines.top_k(vit(class_token=False, global_pool="avg"), 6, 2), "class token"),
        (lambda: baselines.merge(vit(block_fn=ParallelScalingBlock), 2), "ParallelScalingBlock"),
        (lambda: baselines.merge(vit(), [1, 2]), "r has 2"),
        (lambda: baselines.merge(insert(vit(), 4), 2), "reduced"),
        (lambda: baselines.schedule_for(vit(), torch.ones(1), 1.5), "share is 1.5"),
        (lambda: baselines.undo(vit()), "not reduced"),
    ],
)
def test_errors_name_what_came(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
