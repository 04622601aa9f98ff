"""Is PyTorch as fast as Flax under `jit`, and what closes the gap? The same ViT, in many forms.

With and without learned tokens; the Flax models are those of `flax_models.py`, with the PyTorch
models' own weights. Before anything is timed, outputs are compared. All forms run in turn in one
process, and ratios to eager PyTorch are taken round by round. Inference only.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import torch
from flax_models import FlaxViT, filled, in_jax, in_torch
from measured import add_device, closing, compiled, in_ms, machine, write_results
from printed import flax_line, flax_table
from torch import Tensor, nn

from tokenlearner import create_model, export, remove, use_onednn
from tokenlearner.checkpoints.scenic import to_scenic
from tokenlearner.deploy.formats import load_exported
from tokenlearner.deploy.quantization import quantize
from tokenlearner.evaluation.latency import time_interleaved

NAME = "vit_base_patch16_tl8at6_224"
PACKAGES = ("jax", "flax")


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
        model.eval().to(options.device)
    return found


@dataclass(frozen=True)
class Form:
    """What runs a batch, and what turns its output into logits to compare."""

    run: Callable[[], Any]
    read: Callable[[Any], Tensor] = lambda out: out.cpu()


def in_flax(model: Any, images: Tensor) -> Form:
    """The same model in Flax, compiled; images are laid out for it before."""
    blocks, weights = model.blocks, filled(to_scenic(model))
    at = next((i for i, block in enumerate(blocks) if hasattr(block, "learner")), None)
    learner = None if at is None else blocks[at].learner
    twin = FlaxViT(
        depth=len(blocks),
        embed_dim=model.embed_dim,
        num_heads=blocks[0].attn.num_heads,
        num_classes=model.num_classes,
        patch_size=model.patch_embed.patch_size[0],
        at=at,
        num_tokens=0 if learner is None else learner.num_tokens,
        learner="v1" if type(learner).__name__ == "TokenLearner" else "v11",
    )
    run = partial(jax.jit(twin.apply), weights, in_jax(images.permute(0, 2, 3, 1)))
    return Form(lambda: run().block_until_ready(), in_torch)


def in_onnx(model: nn.Module, images: Tensor) -> Form:
    """The same model in ONNX Runtime, with as many threads as torch has."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own insides
        path = export(model, Path(folder) / "model.onnx", images, rounds=2).path
        return Form(partial(load_exported(path, images.device), images))


def packed(model: nn.Module, images: Tensor) -> Form:
    """Linear layers of oneDNN, whose weights are packed beforehand, on a CPU."""
    if images.is_cuda:
        raise SystemExit("oneDNN packs weights for a CPU only; leave packed out of --forms")
    changed = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # they are made of torch.jit still
        from torch.utils.mkldnn import to_mkldnn

        for parent in list(changed.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, to_mkldnn(child))
    return Form(partial(changed, images))


def with_onednn(model: nn.Module, images: Tensor) -> Form:
    """Linear layers of oneDNN, the weights as they are, on a CPU."""
    if images.is_cuda:
        raise SystemExit("oneDNN computes on a CPU only; leave onednn out of --forms")
    return Form(partial(use_onednn(copy.deepcopy(model)), images))


def in_bfloat16(model: nn.Module, images: Tensor, frozen: bool = False) -> Form:
    """Weights and activations of 16 bits, eager or compiled and frozen."""
    narrowed = quantize(model, "bfloat16")
    return Form(partial(compiled(narrowed, freezing=True) if frozen else narrowed, images))


FORMS: dict[str, Callable[[nn.Module, Tensor], Form]] = {
    "eager": lambda model, images: Form(partial(model, images)),
    "Flax": in_flax,
    "compiled": lambda model, images: Form(partial(compiled(model), images)),
    "frozen": lambda model, images: Form(partial(compiled(model, freezing=True), images)),
    "onednn": with_onednn,
    "packed": packed,
    "onnx": in_onnx,
    "bfloat16": in_bfloat16,
    "bfloat16-frozen": partial(in_bfloat16, frozen=True),
}
REDUCED = ("bfloat16", "bfloat16-frozen")


def checked(label: str, form: Form, right: Tensor, reduced: bool) -> None:
    """Refuses a form whose numbers are others; 16 bits have 3 digits."""
    tolerance = 0.05 if reduced else 1e-3
    torch.testing.assert_close(
        form.read(form.run()),
        right,
        rtol=tolerance,
        atol=tolerance * right.abs().max().item(),
        msg=lambda text: f"{label} gives other numbers than eager PyTorch: {text}",
    )


@torch.inference_mode()
def measure(options: Namespace, batch: int) -> list[dict[str, Any]]:
    """A row for each model and form: how many times as fast as eager PyTorch."""
    side = options.size or 224
    images = torch.randn(batch, 3, side, side).to(options.device)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in contenders(options).items():
        right = model(images).cpu()
        for kind in dict.fromkeys(("eager", *options.forms)):
            form = FORMS[kind](model, images)
            checked(f"{name}, {kind}", form, right, reduced=kind in REDUCED)
            runs[name, kind] = form.run
    seconds = time_interleaved(runs, options.rounds)
    return [
        {
            "model": name,
            "form": kind,
            "batch": batch,
            "latency_ms": in_ms(own),
            "times_as_fast_as_eager": asdict(own.speedup_over(seconds[name, "eager"])),
            "times_as_fast_as_plain": asdict(own.speedup_over(seconds["plain", kind])),
        }
        for (name, kind), own in seconds.items()
    ]


def main() -> None:
    options, rows = parse(), []
    print(flax_table([]))
    for batch in options.batches:
        rows += (found := measure(options, batch))
        print("\n".join(map(flax_line, found)), flush=True)
    header = {"machine": machine(options.device, packages=PACKAGES), "rounds": options.rounds}
    write_results(options.json, "against_flax.py", header | {"rows": rows})
    how = {"device": options.device, "rounds": options.rounds, "packages": PACKAGES}
    print(closing("against_flax.py", **how))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=NAME, help="with learned tokens; tokens are set by --tokens"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--learner", default="v1", choices=["v1", "v11"])
    parser.add_argument("--size", type=int, help="of the images, if not 224")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="file for all numbers, for programs")
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
