"""Train the small models that a release carries: `python scripts/make_models.py [FOLDER]`.

Each is one recipe, trained as anyone does by `tokenlearner train RECIPE`; a folder with weights,
config, what was measured, and a card that says which data it is of and under which license. They
are packed into one `.zip` each. Ten minutes on two cores; models that are there stay.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard

FOLDER = Path("build/models")
CLOTHES = (
    "Trained on 8,000 images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) "
    "(arXiv 1708.07747), MIT License, (c) 2017 Zalando SE."
)
PHOTOGRAPHS = (
    "Trained on clips made of the photographs that scikit-image ships, each CC0, in the public "
    "domain or without known copyright restrictions."
)
MODELS = {  # by its recipe: what it is trained on
    "fashion_mnist": CLOTHES,
    "fashion_mnist_tl8": CLOTHES,
    "distill_inserted": f"{CLOTHES} Their labels were not used: its teacher is `fashion_mnist`.",
    "moving_photographs": PHOTOGRAPHS,
}
KEPT = ("README.md", "config.json", "metrics.jsonl", "model.safetensors", "train.json")


def train(recipe: str, folder: Path) -> None:
    """Trains a recipe into `FOLDER/runs/RECIPE`."""
    runs = folder / "runs"
    options = ["--out", str(runs / recipe)]
    if recipe == "distill_inserted":
        options += ["--model", str(runs / "fashion_mnist")]
    tool = [sys.executable, "-m", "tokenlearner", "train", recipe]
    subprocess.run([*tool, *options, "--resume", "auto"], check=True)


def pack(recipe: str, folder: Path) -> Path:
    """Copies what is of use of a run, says where its data come from, and packs it."""
    run, out = folder / "runs" / recipe, folder / recipe
    out.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(run / name, out / name)
    card = ModelCard.load(out / "README.md")
    card.data.license = "apache-2.0"
    card.text += f"\n## Data\n\n{MODELS[recipe]}\n\n## Made by\n\n```console\n"
    card.text += f"$ tokenlearner train {recipe}\n```\n"
    card.save(out / "README.md")
    return Path(shutil.make_archive(str(out), "zip", folder, recipe))


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in MODELS:
        train(recipe, folder)
        path = pack(recipe, folder)
        print(f"{path.stat().st_size / 1e6:.1f} MB  {path}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
