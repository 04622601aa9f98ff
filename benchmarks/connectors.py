"""What does a vision-language model lose on few tokens an image, and what does it gain?

A small LLaVA is trained on captions (captions.py), and then connected: learned tokens against the
mean of neighbors, the rival that DeCo (arXiv 2405.20985) says is enough. Both are fitted to the
model on all positions for as many steps, on the same captions; of averaging it is the projector.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from captions import GRID, WORDS, Inputs, draw_scenes, make_model, make_processor, train_model
from measured import add_device, closing, in_ms, machine, write_results
from printed import captions_table, first_token_table

from tokenlearner.evaluation.latency import time_interleaved
from tokenlearner.models import connect, disconnect
from tokenlearner.training import fit_connector
from tokenlearner.training.connector_fit import TextTeacher

ALL = "all positions"
CONTENDERS: dict[str, tuple[str, float, float]] = {  # learner, its rate, the projector's
    "neighbors averaged": ("pool", 0, 0),
    "neighbors averaged, projector fitted": ("pool", 0, 3e-3),
    "learned": ("v11", 1e-2, 0),
    "learned, projector fitted": ("v11", 1e-2, 3e-3),
}
KEPT = ("scenes", "tower_steps", "train_steps", "fit_scenes", "steps", "test", "host")


def trained(options: Any, seed: int) -> Any:
    """A model trained on scenes of its own; read where it was trained before."""
    torch.manual_seed(seed)
    model, folder = make_model().to(options.device), Path(options.models) / f"seed{seed}"
    if (folder / "config.json").exists():
        return type(model).from_pretrained(folder).to(options.device).eval()
    scenes = draw_scenes(options.scenes, 100 * (seed + 1))
    inputs = Inputs(scenes, make_processor(), options.device)
    train_model(model, inputs, options.tower_steps, options.train_steps)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def captions_of(model: Any, processor: Any, examples: Any, batch: int = 50) -> list[str]:
    """What the model answers."""
    found = []
    for i in range(0, len(examples), batch):
        part = examples[i : i + batch]
        texts, images = ([e[name] for e in part] for name in ("text", "images"))
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        answers = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        new = answers[:, inputs["input_ids"].shape[1] :]
        found += [
            " ".join(WORDS[i] for i in row if WORDS[i] not in ("<pad>", "<end>")) for row in new
        ]
    return found


def judged(found: list[str], whole: list[str], truth: list[str]) -> dict[str, float]:
    """Captions like those on all positions, right ones, and garments named at their place."""
    pairs = list(zip(found, truth, strict=True))
    parts = [(set(a.strip(" .").split(" , ")), set(b.strip(" .").split(" , "))) for a, b in pairs]
    return {
        "same_percent": 100 * mean(a == b for a, b in zip(found, whole, strict=True)),
        "exact_percent": 100 * mean(a == b for a, b in pairs),
        "found_percent": 100 * sum(len(a & b) for a, b in parts) / sum(len(b) for _, b in parts),
    }


class Trial:
    """A seed's model, with scenes to fit connectors on and others to judge them on."""

    def __init__(self, options: Any, seed: int):
        self.options, self.seed = options, seed
        self.model = trained(options, seed if options.host is None else options.host)
        scenes = draw_scenes(options.fit_scenes, 100 * (seed + 1) + 1)
        test = draw_scenes(options.test, 100 * (seed + 1) + 2, "test")
        self.to_fit = scenes.examples(range(options.fit_scenes))
        self.asked, self.truth = test.examples(range(options.test), False), test.captions
        self.whole = captions_of(self.model, make_processor(), self.asked)
        connect(self.model, processor := make_processor(), GRID**2, learner="pool")
        self.teacher = TextTeacher(self.model, processor, test.examples(range(options.test)))
        disconnect(self.model, processor)

    def row(self, name: str, k: int) -> dict[str, Any]:
        """Fits a contender and judges it."""
        torch.manual_seed(self.seed)
        model, processor = copy.deepcopy(self.model), make_processor()
        if name != ALL:
            learner, lr, projector_lr = CONTENDERS[name]
            connect(model, processor, k, learner=learner)
            if lr or projector_lr:
                rates = {
                    "lr": lr or 1,
                    "projector_lr": projector_lr,
                }  # averaging has nothing to fit
                steps, seed = self.options.steps, self.seed
                fit_connector(model, processor, self.to_fit, steps=steps, seed=seed, **rates)
        self.teacher.processor = processor
        kl = self.teacher.error(model, torch.arange(self.options.test))
        found = captions_of(model, processor, self.asked)
        made = {"seed": self.seed, "contender": name, "tokens": k}
        return made | {"kl": kl, **judged(found, self.whole, self.truth)}


@torch.inference_mode()
def costs(options: Any) -> dict[int, dict[str, Any]]:
    """Time to the first token, of the language model alone, and the cache, by image tokens."""
    runs: dict[Any, Any] = {}
    bytes_of: dict[int, int] = {}
    example = draw_scenes(options.batch, 0).examples(range(options.batch), False)
    texts, images = ([e[name] for e in example] for name in ("text", "images"))
    for k in (GRID**2, *sorted(options.tokens, reverse=True)):
        torch.manual_seed(0)
        model, processor = make_model().to(options.device).eval(), make_processor()
        if k < GRID**2:
            connect(model, processor, k)
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(options.device)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        mask = inputs["attention_mask"]
        runs[k, "first"] = partial(model, **inputs, use_cache=True, logits_to_keep=1)
        language = partial(model.model.language_model, inputs_embeds=embeds, attention_mask=mask)
        runs[k, "language"] = partial(language, use_cache=True)
        output = runs[k, "first"]()
        cache = getattr(output, "cache", None) or output.past_key_values  # as versions name it
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        bytes_of[k] = sum(t.nbytes for t in tensors) // options.batch
    found = time_interleaved(runs, options.rounds)
    return {
        k: {
            "prefill_ms": in_ms(found[k, "first"]),
            "language_ms": in_ms(found[k, "language"]),
            "cache_kib": count / 1024,
        }
        for k, count in bytes_of.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_device(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--host", type=int, help="a seed whose model all seeds take")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 16, 8])
    parser.add_argument("--scenes", type=int, default=4000, help="to train the model on")
    parser.add_argument("--tower-steps", type=int, default=200, help="of the tower, on patches")
    parser.add_argument("--train-steps", type=int, default=350, help="of the model, on captions")
    parser.add_argument("--fit-scenes", type=int, default=1000, help="to fit connectors on")
    parser.add_argument("--steps", type=int, default=200, help="of fitting")
    parser.add_argument("--test", type=int, default=300, help="images to judge on")
    parser.add_argument("--batch", type=int, default=4, help="images, for the times")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--costs-only", action="store_true", help="make no further rows")
    parser.add_argument("--models", default="runs/connectors", help="keeps trained models")
    parser.add_argument("--out", help="JSON with the rows; those in it are not made again")
    options = parser.parse_args()
    path = Path(options.out) if options.out else None
    kept = {name: getattr(options, name) for name in KEPT}
    known = (
        json.loads(path.read_text()) if path and path.exists() else {"rows": [], "options": kept}
    )
    if known["options"] != kept:
        parser.error(f"{path} was made with {known['options']}; take these, or another --out")
    rows, trials = known["rows"], dict[int, Trial]()
    setup = {"machine": machine(options.device, packages=("transformers",)), **known}
    places = [(ALL, GRID**2), *((name, k) for k in options.tokens for name in CONTENDERS)]
    for name, k in [] if options.costs_only else places:
        for seed in options.seeds:
            if any((r["seed"], r["contender"], r["tokens"]) == (seed, name, k) for r in rows):
                continue
            trial = trials[seed] = trials.get(seed) or Trial(options, seed)
            rows.append(trial.row(name, k))
            print(rows[-1], flush=True)
            write_results(path, "connectors.py", setup)
    setup["costs"] = costs(options)
    write_results(path, "connectors.py", setup)
    print(captions_table(rows), first_token_table(setup["costs"]), sep="\n\n")
    script = "connectors.py"
    print(closing(script, device=options.device, rounds=options.rounds, packages=("transformers",)))


if __name__ == "__main__":
    main()
