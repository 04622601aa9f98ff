"""Are the TokenLearners as fast as in Flax and in Keras? The same weights, the same frames.

The others are those of `flax_models.py` and `keras_modules.py`, under `jax.jit`. Outputs, and
with a backward pass the gradients of the input, are compared before anything is timed. All forms
run in turn in one process; ratios are taken round by round. Float32.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import torch
from flax_models import LearnerGrouped, LearnerV1, LearnerV11, filled, in_jax, in_torch
from keras_modules import keras_learner, pure_keras
from measured import add_device, closing, compiled, in_ms, machine, write_results
from modules_speed import SHAPES, TOKENS
from torch import Tensor

from tokenlearner import TokenLearner, TokenLearnerModuleV11, TokenLearnerV11
from tokenlearner.checkpoints.scenic import to_scenic
from tokenlearner.evaluation.latency import Timing, time_interleaved

LEARNERS: dict[str, Callable[[int], Any]] = {  # with the official numbers, as the others have them
    "V1": lambda c: TokenLearner(c, TOKENS, True, norm_eps=1e-6, approximate="tanh"),
    "V1.1 grouped": lambda c: TokenLearnerModuleV11(c, TOKENS, num_groups=8, norm_eps=1e-6),
    "V1.1 MLP": lambda c: TokenLearnerV11(c, TOKENS),
}
IN_FLAX = {"V1": LearnerV1, "V1.1 grouped": LearnerGrouped, "V1.1 MLP": LearnerV11}
FORMS = ("ours", "compiled", "Flax", "Keras")
PASSES = ("forward", "forward and backward")
TOLERANCE = 1e-4  # of the largest number
PACKAGES = ("jax", "flax", "keras")


@dataclass(frozen=True)
class Form:
    """A learner that can be timed.

    Args:
        run: One batch, waited for.
        result: What to compare: tokens, or with a backward pass the gradient of the input.
    """

    run: Callable[[], object]
    result: Callable[[], Tensor]


def in_pytorch(function: Callable[[Tensor], Tensor], x: Tensor, learner: Any, back: bool) -> Form:
    """Our learner, as it is or compiled."""
    if back:
        x = x.clone().requires_grad_()
        inputs = [x, *learner.parameters()]

        def gradients() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(x).square().mean(), inputs)

        return Form(gradients, lambda: gradients()[0].cpu())

    @torch.inference_mode()
    def tokens() -> Tensor:
        return function(x)

    return Form(tokens, lambda: tokens().cpu())


def under_jit(function: Callable[[Any, Any], Any], weights: Any, x: Tensor, back: bool) -> Form:
    """A function of weights and frames, compiled by XLA."""
    frames = in_jax(x)
    if not back:
        run = partial(jax.jit(function), weights, frames)
        return Form(lambda: run().block_until_ready(), lambda: in_torch(run()))

    def loss(weights: Any, frames: Any) -> Any:
        return (function(weights, frames) ** 2).mean()

    run = partial(jax.jit(jax.grad(loss, argnums=(1, 0))), weights, frames)
    return Form(lambda: jax.block_until_ready(run()), lambda: in_torch(run()[0]))


def flax_form(name: str, learner: Any, x: Tensor, back: bool) -> Form:
    flat = x.flatten(1, 2)
    form = under_jit(IN_FLAX[name](TOKENS).apply, flax_weights(learner, name), flat, back)
    return Form(form.run, lambda: form.result().reshape(x.shape if back else (len(x), TOKENS, -1)))


def flax_weights(learner: Any, name: str) -> Any:
    """With a kernel of one axis for 1 x 1 convolutions, which run on flat frames."""
    params = to_scenic(learner)
    if name == "V1.1 grouped":
        params = {k: v[0] if v.ndim == 4 else v for k, v in params.items()}
    return filled(params)


def keras_form(name: str, learner: Any, x: Tensor, back: bool) -> Form:
    model = keras_learner(name, tuple(x.shape[1:]), TOKENS)
    return under_jit(*pure_keras(model, to_scenic(learner)), x, back)


def forms(name: str, x: Tensor, back: bool, options: Namespace) -> dict[str, Form]:
    """All forms, `ours` first, once they are known to give the same."""
    learner = LEARNERS[name](x.shape[-1]).to(x)
    makers: dict[str, Callable[[], Form]] = {
        "ours": lambda: in_pytorch(learner, x, learner, back),
        "compiled": lambda: in_pytorch(compiled(learner), x, learner, back),
        "Flax": lambda: flax_form(name, learner, x, back),
        "Keras": lambda: keras_form(name, learner, x, back),
    }
    names = dict.fromkeys(("ours", *options.forms))
    found = {form: makers[form]() for form in names}
    expected = found["ours"].result()
    for form, one in found.items():
        check_same(f"{name}, {form}", one.result(), expected)
    return found


def check_same(label: str, actual: Tensor, expected: Tensor) -> None:
    """Ends the script where numbers differ, for then their speeds say nothing."""
    if actual.shape != expected.shape:
        raise SystemExit(f"{label} gives {list(actual.shape)}, expected {list(expected.shape)}")
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"{label} differs by {difference:.1e} of the largest, above {TOLERANCE}")


def measure(name: str, shape: str, what: str, options: Namespace) -> Iterator[dict[str, Any]]:
    """A row for every form."""
    torch.manual_seed(0)
    batch, *axes = SHAPES[shape]
    x = torch.randn(options.batch or batch, *axes).to(options.device)
    found = forms(name, x, what != "forward", options)
    seconds = time_interleaved({form: one.run for form, one in found.items()}, options.rounds)
    for form, own in seconds.items():
        yield {
            "learner": name,
            "pass": what,
            "input": list(x.shape),
            "form": form,
            "latency_ms": in_ms(own),
            "times_as_fast_as_ours": asdict(own.speedup_over(seconds["ours"])),
        }


def line(row: dict[str, Any]) -> str:
    axes = " x ".join(map(str, row["input"]))
    latency, ratio = Timing(**row["latency_ms"]), Timing(**row["times_as_fast_as_ours"])
    cells = [f"{latency:.1f}", f"{ratio:.2f}"]
    return f"| {row['learner']}, {row['form']}, {row['pass']} | {axes} | {' | '.join(cells)} |"


def main() -> None:
    options, rows = parse(), []
    print("| learner, form, pass | input | ms (quartiles) | times as fast as ours |")
    print("| --- | --- | --: | --: |")
    for what in options.passes:
        for name in options.learners:
            for shape in options.shapes:
                for row in measure(name, shape, what, options):
                    rows.append(row)
                    print(line(row), flush=True)
    found = {"machine": machine(options.device, packages=PACKAGES), "rounds": options.rounds}
    write_results(options.json, "modules_against.py", found | {"rows": rows})
    setup = {"device": options.device, "rounds": options.rounds, "packages": PACKAGES}
    print(closing("modules_against.py", **setup))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=list(LEARNERS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--batch", type=int, help="frames, in place of those of the shapes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for all numbers, for programs")
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
