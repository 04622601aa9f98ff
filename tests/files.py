"""Images, videos and checkpoints that several tests write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import randomized

from tokenlearner import create_model, save_model
from tokenlearner.utils.io import write_json

MINI = "vit_mini_patch4_28"
_PIXELS = {"mjpeg": "yuvj420p"}


def make_checkpoint(folder: Path, tokens: int, **run: Any) -> Path:
    """A checkpoint as `train` leaves one, by default of the bundled images."""
    save_model(randomized(create_model(MINI, num_tokens=tokens, depth=2)), folder)
    write_json(folder / "train.json", {"data": "fashion-mnist-small", "root": None} | run)
    return folder


def make_image(
    path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any
) -> Path:
    """A ramp from black at the left to white."""
    width, height = size
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None], (height, width, 3)).copy()
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def make_video(
    path: Path,
    size: tuple[int, int] = (32, 24),
    frames: int = 12,
    codec: str = "mpeg4",
    rate: int = 8,
) -> Path:
    """A video of noise."""
    import av

    rng, (width, height) = np.random.default_rng(0), size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, _PIXELS.get(codec, "yuv420p")
        for _ in range(frames):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header names a large size and that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", empty) + chunk(b"IEND", b"")
