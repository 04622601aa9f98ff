"""How much memory does a TokenLearner need beyond its input, and how much the textbook form of it?

The textbook form writes the paper's equation down as it stands: normalize, convolve, multiply every
position with every map (`b k n c`), reduce. Both use the same weights and give the same tokens.
Each number is how far the peak of a fresh process rises (VmHWM, so Linux only), the input included
before; a small call goes first, for what torch loads on first use. On a GPU it is how far the peak
of what torch has allocated rises.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measured import add_device, closing
from torch import Tensor

from tokenlearner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11

Learner = TokenLearner | TokenLearnerModuleV11 | TokenLearnerV11
LEARNERS: dict[str, Callable[[], Learner]] = {
    "V1": lambda: TokenLearner(128, 8, use_sum_pooling=True),
    "V1.1 grouped": lambda: TokenLearnerModuleV11(128, 8, num_groups=8),
    "V1.1 MLP": lambda: TokenLearnerV11(128, 8),
}
FORMS = ("ours", "textbook")
PASSES = ("forward", "forward+backward")


def textbook(learner: Learner, x: Tensor) -> Tensor:
    """`b h w c -> b k c`, with everything in memory that the equation names."""
    normal, values = learner.norm(x), x
    if isinstance(learner, TokenLearnerV11):
        logits = learner.attention_maps(normal).movedim(-1, 1).flatten(2)
    else:
        logits = learner.attention_maps(normal.movedim(-1, 1)).flatten(2)
    if isinstance(learner, TokenLearnerModuleV11):
        values = learner.feat_conv(x.movedim(-1, 1)).movedim(1, -1)
    maps = logits.sigmoid() if isinstance(learner, TokenLearner) else logits.softmax(-1)
    return (maps[..., None] * values.flatten(1, 2)[:, None]).sum(2)


def run(name: str, form: str, passes: str, x: Tensor) -> None:
    learner = LEARNERS[name]().to(x.device)
    x.requires_grad_(passes == "forward+backward")
    with torch.set_grad_enabled(x.requires_grad):
        tokens = learner(x) if form == "ours" else textbook(learner, x)
        if x.requires_grad:
            tokens.square().mean().backward()


def peak_mib(device: torch.device) -> float:
    """The most memory that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def child(name: str, form: str, passes: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    run(name, form, passes, torch.randn(1, 32, 32, 128).to(options.device))
    x = torch.randn(options.batch, 32, 32, 128).to(options.device)
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
    before = peak_mib(options.device)
    run(name, form, passes, x)
    print(peak_mib(options.device) - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="frames of 32 x 32 x 128")
    parser.add_argument("--runs", type=int, default=3, help="processes a number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar="NAME", help=argparse.SUPPRESS)
    add_device(parser)
    arguments = parser.parse_args()
    batch, threads = arguments.batch, arguments.threads
    if arguments.child:
        return child(*arguments.child, arguments)
    size = batch * 32 * 32 * 128 * 4 / 2**20
    columns = [(passes, form) for passes in PASSES for form in FORMS]
    print(f"| MiB beyond the input of {size:g} |", " | ".join(map(", ".join, columns)), "|")
    print("| --- | --: | --: | --: | --: |")
    for name in LEARNERS:
        cells = []
        for passes, form in columns:
            options = f"--batch {batch} --threads {threads} --device {arguments.device}".split()
            command = [sys.executable, __file__, *options, "--child", name, form, passes]
            values = [float(subprocess.check_output(command)) for _ in range(arguments.runs)]
            cells.append(f"{median(values):.0f} ({min(values):.0f}–{max(values):.0f})")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    print(closing("modules_memory.py", threads, device=arguments.device))


if __name__ == "__main__":
    main()
