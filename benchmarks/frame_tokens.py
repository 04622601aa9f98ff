"""What does it save to train on tokens that were kept? Accuracy and clips a second, in one run.

Films of moving photographs (`--videos` to train on) are written to files. A `FrameViT` is trained
on them end to end. Then its encoder is frozen, the films are encoded once, and a transformer over
time is trained anew on the tokens, with as many epochs, the same blocks and the same rate. So it is
for tokens of an encoder that never saw a film: a ViT trained on the bundled pictures of clothes.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from measured import add_device, closing, machine, write_results

from tokenlearner import TrainConfig, load_data, train
from tokenlearner.data.moving_photos import MOTIONS
from tokenlearner.evaluation import encode

FRAMES, SIZE = 8, 32
ENCODER: dict[str, Any] = {
    "img_size": SIZE,
    "in_chans": 1,
    "num_frames": FRAMES,
    "num_classes": len(MOTIONS),
    "depth": 6,
    "at": 3,
    "num_tokens": 4,
}
BLOCKS: dict[str, Any] = {"embed_dim": 64, "num_heads": 2, "depth": 3}


def write_films(root: Path, count: int) -> None:
    """Films by folders of classes, lossless, `count` to train on and a fifth of it held out."""
    for split, name, number in (("train", "train", count), ("val", "test", count // 5)):
        data = load_data("moving-photographs", name, frames=FRAMES, img_size=SIZE).sample(number)
        for i in range(number):
            folder = root / split / data.classes[int(data.labels[i])]
            folder.mkdir(parents=True, exist_ok=True)
            with av.open(str(folder / f"{i:05d}.mkv"), "w") as container:
                stream: Any = container.add_stream("ffv1", rate=8)
                stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "gray"
                for frame in data.images[i, 0].numpy():
                    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="gray")
                    container.mux(stream.encode(image))
                container.mux(stream.encode())


def run(out: Path, options: Namespace, **changes: Any) -> tuple[dict[str, float], Any]:
    """Trains, and returns accuracy and speed of the last epoch, or the mean of several."""
    shared = {"epochs": options.epochs, "batch_size": 32, "lr": 2e-3, "device": str(options.device)}
    shared |= {"frames": FRAMES, "stride": 1, "out": str(out), "seed": options.seed}
    start = time.perf_counter()
    result = train(TrainConfig(**shared | changes))
    speeds = [row["images_per_second"] for row in result.history[1:] or result.history]
    row = {
        "top1_percent": result.history[-1]["test_top1_percent"],
        "clips_per_second": float(np.median(speeds)),
        "clips_per_second_low": min(speeds),
        "clips_per_second_high": max(speeds),
        "seconds": time.perf_counter() - start,
    }
    return row, result


def on_tokens(model: Any, name: str, folder: Path, options: Namespace, **changes: Any) -> Any:
    """Encodes the films and trains on the tokens."""
    start, out = time.perf_counter(), folder / f"tokens of {name}"
    found = encode(model.to(options.device), folder / "films", out, stride=1, workers=1, name=name)
    seconds = time.perf_counter() - start
    row, _ = run(
        folder / f"on {name}",
        options,
        data="tokens",
        root=str(out),
        model="temporal_mini",
        **{"model_kwargs": BLOCKS} | changes,
    )
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    return row | {"encode_seconds": seconds, "encoded_frames": found.frames, "mib": size / 2**20}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=2700)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    add_device(parser)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_films(folder / "films", options.videos)
        mean = {key: list(getattr(load_data("moving-photographs"), key)) for key in ("mean", "std")}
        films = {"data": "video-folder", "root": str(folder / "films"), "in_chans": 1}
        rows["end to end"], whole = run(
            folder / "whole",
            options,
            model="framevit_mini_patch8_f6_tl4at3_32",
            model_kwargs=ENCODER,
            **{"img_size": SIZE, "crop_pct": 1.0, "workers": 1, **films, **mean},
        )
        print("end to end", rows["end to end"], flush=True)
        rows["kept tokens, the same encoder"] = on_tokens(whole.model, "FrameViT", folder, options)
        print(rows["kept tokens, the same encoder"], flush=True)
        torch.manual_seed(options.seed)
        clothes = {"model": "vit_mini_patch4_tl8at3_28", "epochs": 6, "batch_size": 64}
        clothes |= {"data": "fashion-mnist-small", "frames": None}
        _, image = run(folder / "clothes", options, **clothes)
        rows["kept tokens, of clothes"] = on_tokens(image.model, "ViT", folder, options)
        print(rows["kept tokens, of clothes"], flush=True)
    print(closing("frame_tokens.py", device=options.device))
    write_results(options.json, "frame_tokens.py", machine(options.device) | {"runs": rows})


if __name__ == "__main__":
    main()
