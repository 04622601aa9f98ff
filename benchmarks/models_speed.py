"""Is a model with learned tokens as much faster as it has fewer multiply-adds? Is token merging?

The plain model, the one with learned tokens, and the plain one with similar tokens merged in every
block (`baselines.py`) at as many multiply-adds run in turn in one process; ratios are taken round
by round. A training step is forward and backward, and with `--optimizer` a step of AdamW too. With
`--onednn` the plain model and the one with learned tokens also run with the linear layers of
oneDNN; each is set against the plain model, and against it with oneDNN too.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from statistics import median
from typing import Any

import torch
from baselines import MergedBlocks, merge, schedule_for
from measured import add_device, closing, compiled, in_ms, machine, write_results
from torch import Tensor, nn

from tokenlearner import create_model, remove, use_onednn
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import (
    Seconds,
    Timing,
    peak_memory_mib,
    time_interleaved,
)

ONEDNN = ", oneDNN"
MODELS = ["vit_base_patch16_tl8at6_224", "vit_base_patch16_tl16at6_224"]


def pair(name: str, size: int | None) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain model, the one with learned tokens, and one image."""
    kwargs = {} if size is None else {"img_size": size}
    torch.manual_seed(0)
    plain, learned = remove(create_model(name, **kwargs)), create_model(name, **kwargs)
    channels, height, width = learned.pretrained_cfg["input_size"]
    return plain, learned, torch.randn(1, channels, size or height, size or width)


def contenders(name: str, options: Namespace) -> tuple[dict[str, nn.Module], Tensor]:
    """All that is compared, the plain model first, and one image, on their device."""
    plain, learned, image = pair(name, options.size)
    models = {"plain": plain, f"`{name}`": learned}
    if options.onednn:
        models |= {f"{k}{ONEDNN}": use_onednn(copy.deepcopy(m)) for k, m in models.items()}
    if not options.no_merge:
        share = count_macs(learned, image) / count_macs(plain, image)
        host: Any = copy.deepcopy(plain)
        r = schedule_for(host, image, share).r
        models[f"merging {r} in every block"] = merge(host, r)
    return {k: m.to(options.device) for k, m in models.items()}, image.to(options.device)


def inference(
    model: nn.Module, images: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        (forward or model)(images)

    model.eval()
    return run


def training(
    model: nn.Module,
    images: Tensor,
    optimizer: bool,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[], None]:
    model.train()
    steps = torch.optim.AdamW(model.parameters(), fused=True) if optimizer else None

    def run() -> None:
        (forward or model)(images).square().mean().backward()
        if steps:
            steps.step()
        model.zero_grad(set_to_none=True)

    return run


def runner(
    model: nn.Module, images: Tensor, what: str, is_compiled: bool, options: Namespace
) -> Callable[[], None]:
    """One batch through a model, to be timed. Merging is compiled in parts: its hooks are not."""
    merging = any(isinstance(module, MergedBlocks) for module in model.modules())
    forward = compiled(model, whole=not merging) if is_compiled else None
    if what == "inference":
        return inference(model, images, forward)
    return training(model, images, options.optimizer, forward)


def ratio(slow: Callable[[], None], fast: Callable[[], None], rounds: int) -> tuple[Timing, float]:
    """How many times as fast the second is, and the seconds it takes (median)."""
    seconds = time_interleaved({"slow": slow, "fast": fast}, rounds)
    return seconds["fast"].speedup_over(seconds["slow"]), median(seconds["fast"])


def measure(name: str, options: Namespace) -> Iterator[dict[str, Any]]:
    """A row for every contender, batch, task and form."""
    models, image = contenders(name, options)
    macs = {label: count_macs(model, image) for label, model in models.items()}
    for batch, what in product(options.batches, options.what):
        images = image.expand(batch, -1, -1, -1).contiguous()
        train = what == "training"
        peaks = {k: peak_memory_mib(m, images, training=train) for k, m in models.items()}
        for is_compiled in (False, True) if options.compile else (False,):
            labels = {"pair": name, "what": what, "batch": batch, "compiled": is_compiled}
            runs = {k: runner(m, images, what, is_compiled, options) for k, m in models.items()}
            seconds = time_interleaved(runs, options.rounds)
            yield from (labels | one for one in compared(seconds, macs, peaks))


def compared(
    seconds: dict[str, Seconds], macs: dict[str, int], peaks: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Every contender against the plain model, by time, multiply-adds and memory."""
    against = [(label, "plain") for label in seconds]
    against += [(label, "plain" + ONEDNN) for label in seconds if label.endswith(ONEDNN)][1:]
    for label, plain in against:
        own = seconds[label]
        speedup, of_macs = own.speedup_over(seconds[plain]), macs["plain"] / macs[label]
        yield {
            "model": label,
            "against": plain,
            "gmacs": macs[label] / 1e9,
            "macs_ratio": of_macs,
            "speedup": asdict(speedup),
            "share_of_macs_ratio": speedup.median / of_macs,
            "latency_ms": in_ms(own),
            "peak_memory_mib": peaks[label],
            "of_plain_memory": peaks[label] / peaks["plain"],
        }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    against = "" if row["against"] == "plain" else f" against {row['against']}"
    form, latency = ", compiled" if row["compiled"] else "", row["latency_ms"]["median"]
    cells = [
        f"{row['model']}{against}, {row['what']}{form}, {row['batch']}",
        f"{row['macs_ratio']:.2f}",
        f"{Timing(**row['speedup']):.2f}",
        f"{row['share_of_macs_ratio']:.2f}",
        f"{latency:.{0 if latency >= 100 else 1}f}",
        f"{row['peak_memory_mib']:.1f}",
        f"{row['of_plain_memory']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    options, rows = parse(), []
    print(
        "| model, what, batch | MACs ratio | speed-up (quartiles) | of the MACs ratio | ms |",
        end="",
    )
    print(" peak MiB | of plain's |\n| --- | --: | --: | --: | --: | --: | --: |")
    for name in options.models:
        for row in measure(name, options):
            rows.append(row)
            if row["model"] != "plain":
                print(line(row), flush=True)
    found = {"machine": machine(options.device), "rounds": options.rounds, "rows": rows}
    write_results(options.json, "models_speed.py", found)
    print(closing("models_speed.py", device=options.device, rounds=options.rounds))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="with learned tokens")
    parser.add_argument("--size", type=int, help="of the images, if not the model's own")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    whats = ["inference", "training"]
    parser.add_argument("--what", nargs="+", default=whats, choices=whats)
    parser.add_argument("--optimizer", action="store_true", help="count a step of AdamW too")
    parser.add_argument("--compile", action="store_true", help="what torch.compile makes of it too")
    parser.add_argument("--onednn", action="store_true", help="what `use_onednn` makes of it too")
    parser.add_argument("--no-merge", action="store_true", help="leave out token merging")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for all numbers, for programs")
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
