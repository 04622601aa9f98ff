"""What does it save to train on tokens that were kept? Accuracy and processor time, in one run.

Videos that slide over one of nine photographs are written to files; which photograph it is, is
the class, and held-out ones lie in a part of it that no other video shows. A `FrameViT` is trained
on the files end to end. Then its encoder is frozen, the videos are encoded once, and a transformer
over time is trained anew on the tokens, with as many epochs and blocks and the same rate; and so
for an encoder that never saw a video, a ViT trained on the bundled pictures of clothes. Time is
that of the processor, so that other work on the machine does not count; an epoch has its
evaluation in it.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import skimage.data
from measured import add_device, closing, machine, write_results
from PIL import Image

from tokenlearner import TrainConfig, train
from tokenlearner.data.moving_photos import MOVING_PHOTOGRAPHS
from tokenlearner.evaluation import encode

FRAMES, SIZE, SIDE, TRAINED = 8, 32, 256, 0.7  # of each photograph, its left part
ENCODER: dict[str, Any] = {"in_chans": 1, "num_frames": FRAMES, "depth": 6, "at": 3}
BLOCKS: dict[str, Any] = {"embed_dim": 64, "num_heads": 2, "depth": 3}


def write_videos(root: Path, count: int) -> None:
    """Lossless videos by folders of classes, `count` to train on and a fifth of it held out."""
    draw = np.random.default_rng(0)
    for i in range(count + count // 5):
        name = MOVING_PHOTOGRAPHS["train"][i % 9]
        pixels = np.asarray(
            Image.fromarray(getattr(skimage.data, name)()).convert("L").resize((SIDE, SIDE))
        )
        held_out, border = i >= count, round(SIDE * TRAINED)
        low, high = (border, SIDE) if held_out else (0, border)
        path = draw.integers(-2, 3, 2) * np.arange(FRAMES)[:, None]
        free = np.array([SIDE, high - low]) - SIZE - np.ptp(path, axis=0)
        places = draw.integers(free + 1) - path.min(0) + path + [0, low]
        folder = root / ("val" if held_out else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / f"{i:05d}.mkv"), "w") as container:
            stream: Any = container.add_stream("ffv1", rate=8)
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "gray"
            for y, x in places.tolist():
                window = np.ascontiguousarray(pixels[y : y + SIZE, x : x + SIZE])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="gray")))
            container.mux(stream.encode())


def run(out: Path, options: Namespace, **changes: Any) -> tuple[dict[str, float], Any]:
    """Trains, and returns the accuracy of the last epoch and the seconds of each."""
    shared = {"epochs": options.epochs, "batch_size": 32, "lr": 2e-3, "device": str(options.device)}
    shared |= {"out": str(out), "seed": options.seed, "workers": 0}
    ends = [time.process_time()]

    def report(row: dict[str, Any]) -> None:
        if "epoch" in row:
            ends.append(time.process_time())

    result = train(TrainConfig(**shared | changes), report)
    seconds = np.diff(ends).tolist()
    row = {
        "top1_percent": result.history[-1]["test_top1_percent"],
        "epoch_seconds": median(seconds[1:]),  # the first has the start in it
        "epoch_seconds_low": min(seconds[1:]),
        "epoch_seconds_high": max(seconds[1:]),
    }
    print(out.name, row, flush=True)
    return row, result.model


def on_tokens(model: Any, name: str, folder: Path, options: Namespace) -> dict[str, float]:
    """Encodes the videos and trains on the tokens."""
    start, out = time.process_time(), folder / f"tokens of {name}"
    encode(model.to(options.device), folder / "videos", out, stride=1, workers=0, name=name)
    seconds = time.process_time() - start
    tokens = {"data": "tokens", "root": str(out), "frames": FRAMES, "stride": 1}
    blocks = {"model": "temporal_mini", "model_kwargs": BLOCKS}
    row, _ = run(folder / f"kept tokens, {name}", options, **tokens, **blocks)
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    return row | {"encode_seconds": seconds, "mib": size / 2**20}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=720)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    add_device(parser)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_videos(folder / "videos", options.videos)
        videos = {"data": "video-folder", "root": str(folder / "videos"), "img_size": SIZE}
        videos |= {"in_chans": 1, "crop_pct": 1.0, "frames": FRAMES, "stride": 1}
        model = {"model": "framevit_mini_patch8_f6_tl4at3_32", "model_kwargs": ENCODER}
        rows["end to end"], whole = run(folder / "end to end", options, **videos, **model)
        rows["its encoder, frozen"] = on_tokens(whole, "FrameViT", folder, options)
        clothes = {"model": "vit_mini_patch4_tl8at3_28", "epochs": 2, "batch_size": 64}
        _, image = run(folder / "clothes", options, **clothes)
        rows["ViT of clothes, frozen"] = on_tokens(image, "ViT", folder, options)
    for name, row in rows.items():
        print(name, row)
    print(closing("frame_tokens.py", device=options.device))
    write_results(options.json, "frame_tokens.py", machine(options.device) | {"runs": rows})


if __name__ == "__main__":
    main()
