"""How long a step waits for data: bundled images in memory, and a folder of JPEG files.

The model is a ViT-S/16 at 224 for the files, which are crops of the photographs that scikit-image
ships, and the mini ViT for the bundled images. Files are read, cut out and mirrored at random by
worker processes while the model trains.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import skimage.data
import torch
from measured import add_device, command
from PIL import Image

from tokenlearner import TrainConfig, train
from tokenlearner.data.moving_photos import MOVING_PHOTOGRAPHS

SIDE = 256
FILES: dict[str, Any] = {
    "data": "folder",
    "model": "vit_small_patch16_224",
    "img_size": 224,
    "scale": [0.08, 1.0],
    "hflip": 0.5,
    "batch_size": 16,
}


def write_photographs(root: Path, count: int) -> None:
    """Writes crops of photographs as JPEG, a class a photograph, half of them held out."""
    draw = torch.Generator().manual_seed(0)
    names = MOVING_PHOTOGRAPHS["train"]
    for number in range(count):
        name = names[number % len(names)]
        folder = root / ("val" if number // len(names) % 8 == 7 else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        left, top = (
            int(torch.randint(max(side - SIDE, 0) + 1, (), generator=draw)) for side in image.size
        )
        crop = image.crop((left, top, left + SIDE, top + SIDE))
        crop.save(folder / f"{number:05}.jpg", quality=90)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=360, help="JPEG files to write")
    parser.add_argument("--images", type=int, default=0, help="bundled images; 0 is all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes that read files")
    parser.add_argument("--model", default=FILES["model"], help="what trains on the files")
    add_device(parser)
    options = parser.parse_args()
    print(command("waiting.py"), "", sep="\n")
    print("| data | images/s | of it waiting, % |\n| --- | --: | --: |")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_photographs(place / "photographs", options.files)
        files = FILES | {"model": options.model, "root": str(place / "photographs")}
        several = {"epochs": options.epochs, "warmup_epochs": 0.0, "workers": options.workers}
        several["device"] = str(options.device)
        for name, recipe in {"bundled": {"images": options.images}, "JPEG files": files}.items():
            result = train(TrainConfig(**{**recipe, **several, "out": str(place / name)}))
            for row in result.history:
                cells = f"{row['images_per_second']:.1f} | {row['waiting_percent']:.2f}"
                print(f"| {name}, epoch {row['epoch']} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
