"""Make the part of Fashion-MNIST that comes with the package.

`python scripts/make_fashion_mnist_small.py SOURCE_DIR OUT_DIR` takes the first images of each
class from the full files in SOURCE_DIR and writes them into OUT_DIR as one compressed .npz file,
with their license and a README. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenlearner.data.factory import ImageDataset, load_data
from tokenlearner.data.fashion_mnist import SMALL

LICENSE = """\
The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of
this software and associated documentation files (the "Software"), to deal in
the Software without restriction, including without limitation the rights to
use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
the Software, and to permit persons to whom the Software is furnished to do so,
subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS
FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
README = """\
# A part of Fashion-MNIST

{train:,} training and {test:,} test images, {h} x {w}, gray, the same number from each of 10
classes of clothes. Training images come from the full training files, test images from the
full test files; no image is in both. `tokenlearner.load_data("fashion-mnist-small")` reads it.

- Source: <https://github.com/zalandoresearch/fashion-mnist>; H. Xiao, K. Rasul, R. Vollgraf,
  "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
  arXiv:1708.07747. MIT License, (c) 2017 Zalando SE, see `LICENSE`.
- Made by `python scripts/make_fashion_mnist_small.py SOURCE_DIR OUT_DIR` from the four full files
  (Debian: `apt-get install dataset-fashion-mnist`): the first images of each class, one class
  after the other in turn, so that the first 10, 20, 30 ... are balanced too.
- All {full:,} training images, scaled to [0, 1], have mean {mean:.6f} and standard deviation
  {std:.6f}. Batches are normalized with these.

sha256 of the file:

{packed}

sha256 of the arrays in it (another version of zlib may pack them into other bytes):

{unpacked}
"""


def make(source: Path, out: Path, per_class: dict[str, int]) -> None:
    """Write the small set; nothing is written when something is wrong with the full one."""
    full = {split: load_data("fashion-mnist", split, root=source) for split in per_class}
    chosen = {split: first_of_each_class(full[split], per_class[split]) for split in full}
    images = {s: {p.tobytes() for p in full[s].images[chosen[s]].numpy()} for s in full}
    if shared := len(images["train"] & images["test"]):
        raise ValueError(f"{shared} test images are also training images, expected none")
    arrays = {}
    for split, index in chosen.items():
        arrays[f"{split}_images"] = full[split].images[index, 0].numpy()
        arrays[f"{split}_labels"] = full[split].labels[index].to(torch.uint8).numpy()
    np.savez_compressed(file := io.BytesIO(), **arrays)
    packed = {SMALL: file.getvalue()}
    n, _, h, w = full["train"].images.shape
    std, mean = torch.std_mean(full["train"].images.double() / 255, correction=0)
    readme = README.format(
        train=len(chosen["train"]),
        test=len(chosen["test"]),
        full=n,
        h=h,
        w=w,
        mean=mean.item(),
        std=std.item(),
        packed=checksums(packed),
        unpacked=checksums({name: array.tobytes() for name, array in arrays.items()}),
    )
    texts = {"LICENSE": LICENSE.encode(), "README.md": readme.encode()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (packed | texts).items():
        write(out / name, content)


def first_of_each_class(data: ImageDataset, per_class: int) -> Tensor:
    """Numbers of the first `per_class` images of every class; the classes take turns."""
    found = torch.bincount(data.labels, minlength=len(data.classes))
    fewest = int(found.argmin())
    if not 0 < per_class <= found[fewest]:
        raise ValueError(
            f"{per_class} {data.split} images a class were asked for, expected 1 to "
            f"{found[fewest]}, as many as there are of {data.classes[fewest]!r}; "
            f"pass another --{data.split}"
        )
    of_class = [(data.labels == label).nonzero()[:per_class] for label in range(len(found))]
    return torch.cat(of_class, dim=1).flatten()


def checksums(contents: dict[str, bytes]) -> str:
    """Lines as `sha256sum` prints them, indented to be code in Markdown."""
    return "\n".join(f"    {hashlib.sha256(c).hexdigest()}  {n}" for n, c in contents.items())


def write(path: Path, content: bytes) -> None:
    """Put the whole file in place at once, so that no reader sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the bundled part of Fashion-MNIST.")
    parser.add_argument("source", metavar="SOURCE_DIR", type=Path, help="the four full idx files")
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="made when it is missing")
    parser.add_argument("--train", type=int, default=800, help="images a class (800)")
    parser.add_argument("--test", type=int, default=200, help="images a class (200)")
    options = parser.parse_args(arguments)
    try:
        make(options.source, options.out, {"train": options.train, "test": options.test})
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
