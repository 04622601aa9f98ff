"""How fast is a TokenLearner against the textbook form of it, and against what cannot be undercut?

The textbook form is that of `modules_memory.py`: normalize, convolve, multiply every position with
every map (`b k n c`), reduce; same weights, same tokens, same dtype. The bound is one matrix
product of the size of the first layer's and two reads of the input; with a backward pass three and
six. All run in turn in one process, and ratios are
taken round by round.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from measured import add_device, closing
from modules_memory import textbook
from torch import Tensor

from tokenlearner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from tokenlearner.evaluation.latency import time_interleaved

SHAPES = {"64 x 32 x 32 x 128": (64, 32, 32, 128), "8 x 14 x 14 x 768": (8, 14, 14, 768)}
SHAPES["8 x 24 x 24 x 1024"] = (8, 24, 24, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = 8
PER_TOKEN = 9  # taps of a 3 x 3 convolution
LEARNERS: dict[str, Callable[[int], Any]] = {
    "V1": lambda c: TokenLearner(c, TOKENS, use_sum_pooling=True),
    "V1.1 grouped": lambda c: TokenLearnerModuleV11(c, TOKENS, num_groups=8),
    "V1.1 MLP": lambda c: TokenLearnerV11(c, TOKENS),
}
FIRST_LAYER = {"V1": PER_TOKEN * TOKENS, "V1.1 grouped": TOKENS, "V1.1 MLP": 64}  # its width


def forward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> None:
        function(x)

    return run


def both_ways(
    function: Callable[[Tensor], Tensor], x: Tensor, weights: Any
) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    inputs = [x, *weights]
    return lambda: torch.autograd.grad(function(x).square().mean(), inputs)


def bound(name: str, x: Tensor, backward: bool) -> Callable[[], object]:
    """The product of the first layer and two reads; there and back it is that three times."""
    c = x.shape[-1]
    rows, weight = x.reshape(-1, c), torch.randn(c, FIRST_LAYER[name]).to(x)
    out = x.new_empty(len(rows), FIRST_LAYER[name])
    rows_out, weight_out = torch.empty_like(rows), torch.empty_like(weight)

    @torch.inference_mode()
    def run() -> None:
        torch.mm(rows, weight, out=out)
        for _ in range(6 if backward else 2):
            x.sum()
        if backward:
            torch.mm(out, weight.t(), out=rows_out)
            torch.mm(rows.t(), out, out=weight_out)

    return run


def row(name: str, shape: str, dtype: str, backward: bool, options: Namespace) -> str:
    """One line: how many times as fast as the textbook, and what share of the bound's speed."""
    torch.manual_seed(0)
    batch, *axes = SHAPES[shape]
    x = torch.randn(options.batch or batch, *axes).to(options.device, DTYPES[dtype])
    learner = LEARNERS[name](x.shape[-1]).to(x)
    forms = {"textbook": lambda x: textbook(learner, x), "ours": learner}
    if backward:
        runs = {form: both_ways(f, x, learner.parameters()) for form, f in forms.items()}
    else:
        runs = {form: forward(f, x) for form, f in forms.items()}
    seconds = time_interleaved({**runs, "bound": bound(name, x, backward)}, options.rounds)
    faster = seconds["ours"].speedup_over(seconds["textbook"])
    slower = seconds["bound"].speedup_over(seconds["ours"])
    what = "forward and backward" if backward else "forward"
    ms = 1000 * median(seconds["ours"])
    cells = [f"{ratio:.1f}" for ratio in (faster, slower)]
    return f"| {name}, {dtype}, {what} | {shape} | {' | '.join(cells)} | {ms:.1f} |"


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=list(LEARNERS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--batch", type=int, help="frames, in place of those of the shapes")
    parser.add_argument("--rounds", type=int, default=15)
    add_device(parser)
    options = parser.parse_args()
    print("| learner | input | times as fast as the textbook | times the bound | ms |")
    print("| --- | --- | --: | --: | --: |")
    for dtype in options.dtypes:
        for backward in (False, True):
            for name in options.learners:
                for shape in options.shapes:
                    print(row(name, shape, dtype, backward, options), flush=True)
    print(closing("modules_speed.py", device=options.device, rounds=options.rounds))


if __name__ == "__main__":
    main()
