"""Is PyTorch as fast as Flax under `jit`? The same ViT, with and without learned tokens, in both.

The Flax models are those of `flax_models.py`, with the PyTorch models' own weights; before anything
is timed, their outputs are compared. Eager PyTorch, PyTorch compiled, and Flax run in turn in one
process, and ratios to eager PyTorch are taken round by round. Inference only.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import numpy as np
import torch
from flax_models import FlaxViT, filled
from models_speed import closing
from torch import Tensor, nn

from tokenlearner import create_model, remove
from tokenlearner.benchmark import Spread, speed_ratio, times_in_turn
from tokenlearner.convert import to_scenic

NAME = "vit_base_patch16_tl8at6_224"


def contenders(options: Namespace) -> dict[str, nn.Module]:
    """The plain model, and one for each number of tokens."""
    kwargs: dict[str, Any] = {"learner": options.learner}
    if options.size:
        kwargs["img_size"] = options.size
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {"plain": remove(create_model(options.model, **kwargs))}
    for k in options.tokens:
        found[f"{k} tokens"] = create_model(options.model, num_tokens=k, **kwargs)
    for model in found.values():
        nn.init.normal_(model.get_submodule("head").weight, std=0.02)  # new ones are 0
        model.eval()
    return found


def in_flax(model: Any, tokens: int, options: Namespace) -> Callable[[Tensor], np.ndarray]:
    """The same model in Flax, compiled, for pictures `b c h w`."""
    blocks, weights = model.blocks, filled(to_scenic(model))
    at = next((i for i, block in enumerate(blocks) if hasattr(block, "learner")), None)
    twin = FlaxViT(
        depth=len(blocks),
        embed_dim=model.embed_dim,
        num_heads=blocks[0].attn.num_heads,
        num_classes=model.num_classes,
        patch_size=model.patch_embed.patch_size[0],
        at=at,
        num_tokens=tokens,
        learner=options.learner,
    )
    apply = jax.jit(twin.apply)

    def run(images: Tensor) -> np.ndarray:
        return np.array(apply(weights, images.permute(0, 2, 3, 1).contiguous().numpy()))

    return run


def forms(model: nn.Module, name: str, options: Namespace) -> dict[str, Callable[[Tensor], Any]]:
    """What runs a batch, by the name of the form."""
    tokens = 0 if name == "plain" else int(name.split()[0])
    found: dict[str, Callable[[Tensor], Any]] = {
        "eager": model,
        "Flax": in_flax(model, tokens, options),
    }
    if not options.no_compile:
        found["compiled"] = torch.compile(model, fullgraph=True)
    return found


@torch.inference_mode()
def measure(options: Namespace, batch: int) -> list[str]:
    """A line for each model and form: how many times as fast as eager PyTorch."""
    models = contenders(options)
    side = options.size or 224
    images = torch.randn(batch, 3, side, side)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        right = model(images)
        for form, run in forms(model, name, options).items():
            found = torch.as_tensor(run(images))
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
            runs[name, form] = lambda run=run: run(images)
    seconds = times_in_turn(runs, options.rounds)
    return [
        f"| {name}, {form} | {batch} | {1000 * median(seconds[name, form]):.0f} | "
        f"{cell(speed_ratio(seconds[name, 'eager'], values))} | "
        f"{cell(speed_ratio(seconds['plain', form], values))} |"
        for (name, form), values in seconds.items()
    ]


def cell(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=NAME, help="with learned tokens; tokens are set by --tokens"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--learner", default="v1", choices=["v1", "v11"])
    parser.add_argument("--size", type=int, help="of the pictures, if not 224")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    print("| model, form | batch | ms | times as fast as eager | times as fast as plain |")
    print("| --- | --: | --: | --: | --: |")
    for batch in options.batches:
        print("\n".join(measure(options, batch)), flush=True)
    print(closing("against_flax.py"))


if __name__ == "__main__":
    main()
