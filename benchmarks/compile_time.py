"""How long does a training step take to compile, and when does it compile again?

The first step of a ViT as it is and with 8 tokens learned halfway, under bfloat16 autocast with
gradient checkpointing; then steps with other numbers of images, and the graphs made for each.
Every model is compiled as if it were the first on its machine.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from itertools import pairwise, product
from typing import Any

import timm
import torch
from measured import add_device, closing
from printed import head, line
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.functional import cross_entropy

from tokenlearner import compile_model, insert


def train_step(model: nn.Module, images: Tensor) -> float:
    """Forward and backward; seconds."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    model.zero_grad()
    start = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = cross_entropy(model(images), labels)
    loss.backward()
    float(model.get_parameter("cls_token").grad.sum())  # the last of all, so everything is done
    return time.perf_counter() - start


def measure(model: Any, images: Tensor, batches: list[int], mode: str) -> list[str]:
    """Seconds to compile, of a step then, graphs, and those that each other batch added."""
    torch.compiler.reset()
    counters.clear()
    compile_model(model, mode)
    first, made = train_step(model, images[: batches[0]]), [counters["stats"]["unique_graphs"]]
    later = min(train_step(model, images[: batches[0]]) for _ in range(3))
    for count in batches[1:]:
        train_step(model, images[:count])
        made.append(counters["stats"]["unique_graphs"])
    added = [str(after - before) for before, after in pairwise(made)]
    return [f"{first - later:.1f}", f"{later:.2f}", str(made[0]), ", ".join(added)]


def build(options: Namespace, name: str) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=10)
    if name != "plain":
        insert(model, 8, 0.5)
    model.set_grad_checkpointing()
    return model.to(options.device)


def main() -> None:
    options = parse()
    size = timm.get_pretrained_cfg(options.model).input_size
    images = torch.randn(max(options.batches), *size, device=options.device)
    first, *others = options.batches
    at = f"more at {', '.join(map(str, others))} images"
    print("\n".join(head(("s to compile", f"s a step of {first} images", "graphs", at))))
    for mode, name in product(options.modes, ("plain", "8 tokens")):
        with fresh_cache():
            cells = measure(build(options, name), images, options.batches, mode)
        print(line(f"{mode}, {name}", cells), flush=True)
    print(closing("compile_time.py", device=options.device))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm")
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"])
    parser.add_argument("--batches", type=int, nargs="+", default=[3, 8, 32, 1])
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
