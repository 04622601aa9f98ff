"""How does the cost grow with resolution, tokens, frames and images at a time?

A ViT and a ViViT with and without learned tokens, in turn at every point: latency, multiply-adds,
and tensors alive at once, at inference and in a training step. Each point is written as soon as it
is measured, and a command that was cut off goes on where it stopped. `scaling_plot.py` draws it.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measured import add_device, closing, in_ms, machine, write_results
from printed import scaling_line, scaling_table
from scaling_plot import plot_scaling
from torch import Tensor, nn

from tokenlearner import create_model, remove
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.evaluation.latency import peak_memory_mib, time_models
from tokenlearner.models.insertion import wrapped_blocks
from tokenlearner.utils.modules import clone_structure

IMAGE_MODEL, VIDEO_MODEL = "vit_small_patch16_tl8at6_224", "vivit_tiny_patch16x2_tl8at6_224"
VALUES = {
    "resolution": [224, 320, 448, 640, 832, 1024],
    "tokens": [1, 2, 4, 8, 16, 32, 64],
    "frames": [4, 8, 16, 32, 64],
    "batch": [1, 2, 4, 8, 16, 32, 64],
}
BATCH = {"tokens": 8}  # where one image would say little of memory; elsewhere 1
KWARGS = {"resolution": "img_size", "tokens": "num_tokens", "frames": "num_frames"}
SAME = ("cpu", "threads", "device", "accelerator", "torch")  # of machines whose points go together


def models_at(axis: str, value: int, options: Namespace) -> tuple[dict[str, nn.Module], Tensor]:
    """The model without and with learned tokens, and what it takes, at one point."""
    name = options.video_model if axis == "frames" else options.image_model
    kwargs: dict[str, Any] = {KWARGS[axis]: value} if axis in KWARGS else {}
    torch.manual_seed(0)
    learned: Any = create_model(name, **kwargs)
    channels, *size = learned.pretrained_cfg["input_size"]
    size = [value, value] if axis == "resolution" else size
    frames = [value] if axis == "frames" else []
    batch = value if axis == "batch" else BATCH.get(axis, 1)
    images = torch.randn(batch, channels, *frames, *size)
    models = {"plain": remove(create_model(name, **kwargs)), "learned": learned}
    return {k: m.to(options.device) for k, m in models.items()}, images.to(options.device)


def measure(axis: str, value: int, options: Namespace) -> dict[str, Any]:
    """One point, as it is written."""
    models, images = models_at(axis, value, options)
    learners = (block.learner for block in wrapped_blocks(models["learned"]).values())
    counts = {
        k: count_macs(clone_structure(m, "meta"), images[:1].to("meta")) for k, m in models.items()
    }
    peaks = {k: peak_memory_mib(m, images) for k, m in models.items()}
    training = {k: peak_memory_mib(m, images, training=True) for k, m in models.items()}
    seconds = time_models(models, images, options.rounds)
    speedup = seconds["learned"].speedup_over(seconds["plain"])
    return {
        "axis": axis,
        "value": value,
        "model": options.video_model if axis == "frames" else options.image_model,
        "num_tokens": next(learners).num_tokens,
        "input": list(images.shape),
        "speedup": asdict(speedup),
        "share_of_macs_ratio": speedup.median * counts["learned"] / counts["plain"],
        "forms": {
            k: {
                "latency_ms": in_ms(seconds[k]),
                "gmacs": counts[k] * len(images) / 1e9,
                "peak_memory_mib": peaks[k],
                "training_peak_memory_mib": training[k],
            }
            for k in models
        },
    }


def kept(options: Namespace) -> list[dict[str, Any]]:
    """The points of an earlier call; `SystemExit` if they are not to be mixed with this one's."""
    path, now = Path(options.json), machine(options.device)
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    then = found["machine"] | {"rounds": found["rounds"]}
    now |= {"rounds": options.rounds}
    other = [f"{k} {then[k]}, now {now[k]}" for k in (*SAME, "rounds") if then[k] != now[k]]
    if other:
        raise SystemExit(f"{path} has {'; '.join(other)}: remove it, or name another with --json")
    return found["points"]


def main() -> None:
    options, requested = parse(), []
    points, header = kept(options), {"machine": machine(options.device), "rounds": options.rounds}
    print(scaling_table([]))
    for axis, value in [(name, value) for name in VALUES for value in getattr(options, name)]:
        model = options.video_model if axis == "frames" else options.image_model
        point = next((p for p in points if _key(p) == (axis, value, model)), None)
        if point is None:
            points.append(point := measure(axis, value, options))
            write_results(options.json, "scaling.py", {**header, "points": points})
        requested.append(point)
        print(scaling_line(point), flush=True)
    plot_scaling(Path(options.out), requested, header)
    print(closing("scaling.py", device=options.device, rounds=options.rounds))


def _key(point: dict[str, Any]) -> tuple[str, int, str]:
    return point["axis"], point["value"], point["model"]


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    for axis, values in VALUES.items():
        what = f"values of this axis (default: {' '.join(map(str, values))}); none leaves it out"
        parser.add_argument(f"--{axis}", nargs="*", type=int, default=values, help=what)
    parser.add_argument("--image-model", default=IMAGE_MODEL, help="with learned tokens")
    parser.add_argument("--video-model", default=VIDEO_MODEL, help="with learned tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="benchmarks/results/scaling.json", help="for all points")
    parser.add_argument("--out", default="docs", help="folder for scaling-*.png")
    add_device(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
