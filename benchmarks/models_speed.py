"""Is a model with learned tokens as much faster as it has fewer multiply-adds?

Both models of a pair run in turn in one process; the ratio is taken round by round. A training step
is forward and backward, and with `--optimizer` a step of AdamW too.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from tokenlearner import create_model, remove
from tokenlearner.benchmark import Spread, count_macs, speed_ratio, times_in_turn
from tokenlearner.machine import describe_machine


def pair(name: str, size: int | None) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain model, the one with learned tokens, and one picture."""
    kwargs = {} if size is None else {"img_size": size}
    torch.manual_seed(0)
    plain, learned = remove(create_model(name, **kwargs)), create_model(name, **kwargs)
    channels, height, width = learned.pretrained_cfg["input_size"]
    return plain, learned, torch.randn(1, channels, size or height, size or width)


def inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        model(images)

    model.eval()
    return run


def training(model: nn.Module, images: Tensor, optimizer: bool) -> Callable[[], None]:
    model.train()
    steps = torch.optim.AdamW(model.parameters(), fused=True) if optimizer else None

    def run() -> None:
        model(images).square().mean().backward()
        if steps:
            steps.step()
        model.zero_grad(set_to_none=True)

    return run


def ratio(slow: Callable[[], None], fast: Callable[[], None], rounds: int) -> tuple[Spread, float]:
    """How many times as fast the second is, and the seconds it takes (median)."""
    seconds = times_in_turn({"slow": slow, "fast": fast}, rounds)
    return speed_ratio(seconds["slow"], seconds["fast"]), median(seconds["fast"])


def row(label: str, of_macs: float, measured: tuple[Spread, float]) -> str:
    speedup, seconds = measured
    spread = f"{speedup.median:.2f} ({speedup.low:.2f}–{speedup.high:.2f})"
    share = speedup.median / of_macs
    return f"| {label} | {of_macs:.2f} | {spread} | {share:.2f} | {1000 * seconds:.0f} |"


def main() -> None:
    arguments = parse()
    print("| model, what, batch | MACs ratio | speed-up (quartiles) | of the MACs ratio | ms |")
    print("| --- | --: | --: | --: | --: |")
    for name in arguments.models:
        plain, learned, image = pair(name, arguments.size)
        of_macs = count_macs(plain, image) / count_macs(learned, image)
        for batch in arguments.batches:
            images = image.expand(batch, -1, -1, -1).contiguous()
            for what in arguments.what:
                runs = [
                    inference(model, images)
                    if what == "inference"
                    else training(model, images, arguments.optimizer)
                    for model in (plain, learned)
                ]
                measured = ratio(runs[0], runs[1], arguments.rounds)
                print(row(f"`{name}`, {what}, {batch}", of_macs, measured), flush=True)
    print(closing("models_speed.py"))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_tl8at6_224"])
    parser.add_argument("--size", type=int, help="of the pictures, if not the model's own")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--what", nargs="+", default=["inference", "training"])
    parser.add_argument("--optimizer", action="store_true", help="count a step of AdamW too")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def closing(script: str, threads: int | None = None) -> str:
    """The machine and the command, as every script of these ends."""
    machine = describe_machine(torch.device("cpu"))
    command = shlex.join([f"benchmarks/{script}", *sys.argv[1:]])
    torch_build = f"{threads or machine['threads']} threads, torch {machine['torch']}"
    return f"\n{machine['cpu']}, {torch_build}; command:\npython {command}"


if __name__ == "__main__":
    main()
