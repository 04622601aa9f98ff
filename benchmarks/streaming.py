"""What does a new frame of live video cost, against running the whole clip again?

The stream keeps the learned tokens of old frames; the other side encodes all frames every time.
Both run in turn in one process; the ratio is taken frame by frame.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from itertools import product

import torch
from measured import add_device, closing
from models_speed import ratio
from printed import head, line
from torch import Tensor

from tokenlearner import create_model
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.streaming import TokenStream

HEADER = ("MACs ratio", "speed-up (quartiles)", "ms a new frame", "largest difference")


def macs(model: FrameViT, clip: Tensor) -> float:
    """How many times fewer multiply-adds a new frame takes."""
    whole = count_macs(model, clip)
    encoding = count_macs(model.encoder, clip[:, :, :1])
    return whole / (whole - (model.num_frames - 1) * encoding)


def measure(name: str, robots: int, rounds: int, device: torch.device) -> str:
    torch.manual_seed(0)
    model = create_model(name).eval().to(device)
    torch.nn.init.normal_(model.head.weight)  # as it starts, it is 0, and so are all differences
    channels, height, width = model.pretrained_cfg["input_size"]
    clip = torch.randn(robots, channels, model.num_frames, height, width).to(device)
    stream = TokenStream(model)
    for i in range(model.num_frames):
        out = stream.push(clip[:, :, i])
    with torch.inference_mode():
        error = (out - model(clip)).abs().max().item()
        speedup, seconds = ratio(lambda: model(clip), lambda: stream.push(clip[:, :, 0]), rounds)
    cells = [f"{macs(model, clip[:1]):.2f}", f"{speedup:.2f}", f"{1000 * seconds:.1f}"]
    return line(f"`{name}`, {robots}", [*cells, f"{error:.1e}"])


def main() -> None:
    arguments = parse()
    print("\n".join(head(HEADER)))
    for name, robots in product(arguments.models, arguments.robots):
        print(measure(name, robots, arguments.rounds, arguments.device), flush=True)
    print(closing("streaming.py", device=arguments.device, rounds=arguments.rounds))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    names = [f"framevit_{size}_patch16_f6_tl8at6_224" for size in ("tiny", "small", "base")]
    parser.add_argument("--models", nargs="+", default=names)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 4, 16], help="at a time")
    parser.add_argument("--rounds", type=int, default=15)
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
