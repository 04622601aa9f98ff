"""How should a new TokenFuser start? Gradients before the first step, then a short training.

Each start changes the fusers of the same seeded model in place; images come in the same order.
25 steps of warm-up, weight decay 0.05, batches of 64. A loss is the mean of the last 10 steps.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from itertools import product
from statistics import fmean, median

import torch
import torch.nn.functional as F
from measured import add_device, closing
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from tokenlearner import TokenFuser, create_model, evaluate, load_data
from tokenlearner.data.factory import ImageDataset
from tokenlearner.models.insertion import wrapped_blocks


def start_at(mix: Callable[[Tensor], Tensor], gain: float) -> Callable[[TokenFuser], None]:
    def start(fuser: TokenFuser) -> None:
        mix(fuser.mix.weight)
        nn.init.constant_(fuser.mix_norm2.weight, gain)

    return start


def without_norms(fuser: TokenFuser) -> None:
    fuser.mix_norm1 = fuser.mix_norm2 = nn.Identity()
    nn.init.zeros_(fuser.mix.weight)


STARTS: dict[str, Callable[[TokenFuser], None]] = {
    "mix": start_at(nn.init.zeros_, gain=1),
    "norm": start_at(nn.init.xavier_uniform_, gain=0),
    "norm-identity": start_at(nn.init.eye_, gain=0),
    "mix-no-norms": without_norms,
    "nothing": start_at(nn.init.xavier_uniform_, gain=1),
}


def fused_vit(start: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("vit_mini_patch4_28", num_tokens=8, fuse=True)
    for block in wrapped_blocks(model).values():
        STARTS[start](block.fuser)
    return model


def gradient_norms(
    start: str, seed: int, data: ImageDataset, device: torch.device
) -> dict[str, float]:
    model, (images, labels) = fused_vit(start, seed).to(device), next(_batches(data, seed, device))
    F.cross_entropy(model(images), labels).backward()
    squares: dict[str, float] = {}  # by the parameter's name, all fusers together
    for name, parameter in model.named_parameters():
        group = f"`{name.split('.fuser.')[1]}`" if ".fuser." in name else "all but the fusers"
        squares[group] = squares.get(group, 0.0) + parameter.grad.square().sum().item()
    total, one = sum(squares.values()), max(v for k, v in squares.items() if "`" in k)
    rows = {f"gradient norm: {k}": v**0.5 for k, v in sorted(squares.items())}
    rows["share of one fuser parameter in the squared norm, %"] = 100 * one / total
    return rows | {"clipping at 1.0 scales by": min(1.0, total**-0.5)}


def training(start: str, seed: int, data: ImageDataset, how: Namespace) -> dict[str, float]:
    model, losses = fused_vit(start, seed).to(how.device), []
    optimizer = create_optimizer_v2(model, opt=how.opt, lr=how.lr, weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 25, total_iters=24)
    batches = _batches(data, seed, how.device)
    for _, (images, labels) in zip(range(how.steps), batches, strict=False):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), how.clip)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    marks = [mark for mark in (25, 50) if mark < how.steps] + [how.steps]
    rows = {f"loss after {mark} steps": fmean(losses[:mark][-10:]) for mark in marks}
    held_out = load_data(data.name, "test")
    return rows | {"held-out accuracy, %": evaluate(model, held_out).top1_percent}


def _batches(
    data: ImageDataset, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.Generator().manual_seed(seed)
    while True:
        for images, labels in data.batches(64, shuffle=True, generator=order, drop_last=True):
            yield images.to(device), labels.to(device)


def cell(values: list[float]) -> str:
    low, middle, high = (f"{v:.3g}" for v in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each start")
    parser.add_argument("--steps", type=int, default=125, help="of training; 125 are one epoch")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; or inf")
    parser.add_argument("--opt", default="adamw", help="a name of timm's, such as sgd")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--threads", type=int, default=1)
    add_device(parser)
    how = parser.parse_args()
    torch.set_num_threads(how.threads)
    data, starts = load_data("fashion-mnist-small", "train"), how.starts
    table: dict[str, dict[str, list[float]]] = {}
    for seed, start in product(range(how.seeds), starts):
        run = gradient_norms(start, seed, data, how.device) | training(start, seed, data, how)
        for row, value in run.items():
            table.setdefault(row, {}).setdefault(start, []).append(value)
        print(start, seed, *(f"{v:.3g}" for v in run.values()), file=sys.stderr, flush=True)
    print(f"| median of {how.seeds} (range), clip {how.clip} |", " | ".join(starts), "|")
    print("| --- |" + " --: |" * len(starts))
    for row, cells in table.items():
        print(f"| {row} |", " | ".join(cell(cells[s]) if s in cells else "–" for s in starts), "|")
    print(closing("fuser_init.py", how.threads, device=how.device))


if __name__ == "__main__":
    main()
