"""The tables of the pages, made of `results/*.json`; `make numbers` writes them by cog.

A page calls a function between two comments, and what it prints stands there until it is written
anew. `make check` compares. Tables that a script prints are in `printed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import printed
from printed import spread, table, timed

RESULTS = Path(__file__).parent / "results"


@cache
def read(name: str) -> Any:
    """What a script kept."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def show(text: str) -> None:
    """Prints a table with empty lines around it, without which mkdocs takes it for a paragraph."""
    print(f"\n{text}\n")


def script(name: str) -> None:
    """The table that a script prints of what it kept."""
    show(SCRIPTS[name](read(name)))


SCRIPTS: dict[str, Callable[[Any], str]] = {
    "accuracy": lambda found: printed.accuracy_table(found["rows"]),
    "against_flax": lambda found: printed.flax_table(found["rows"]),
    "connectors": lambda found: printed.captions_table(found["rows"]),
    "policy": lambda found: printed.policy_table(found["runs"], found["costs"]),
    "reduce_picks": lambda found: printed.picks_table("clothes", found["rows"]),
    "scaling": lambda found: printed.scaling_table(found["points"]),
}


def first_token() -> None:
    """What a vision-language model gains on few tokens."""
    show(printed.first_token_table(read("connectors")["costs"]))


# --- insertion.py --------------------------------------------------------------------------------


def insertion(name: str, budget: float) -> None:
    """All contenders on a set."""
    show(printed.insertion_table(read(f"insertion_{name}")["rows"], budget, {}))


RIVALS = {  # the contender of each way, on clothes and where detail decides
    "learned tokens": ("8 tokens at 3", "16 tokens at 4-5"),
    "a slightly smaller image and learned tokens": (
        "24 pixels, 16 tokens at 3",
        "168 pixels, 16 tokens at 9-10",
    ),
    "a smaller image alone": ("20 pixels", "154 pixels"),
    "token merging in every block (saves no time on a GPU)": (
        "6 merged in every block",
        "21 merged in every block",
    ),
    "token merging at once": ("merged to 8 at 3", "merged to 16 at 5"),
    "average pooling": ("pooled to 8 at 3", "pooled to 16 at 5"),
    "top-k by class attention": ("top 8 at 3", "top 16 at 5"),
}
SETS = {"clothes": "small ViT, clothes", "detail": "pretrained ViT-S, fine lines decide"}


def rivals(*sets: str) -> None:
    """The host and ways to spend half of it, two columns for a set, the best of each in bold."""
    columns, cells = [""], [["the host"], *([way] for way in RIVALS)]
    for name in sets:
        found, place = read(f"insertion_{name}"), [*SETS].index(name)
        runs = printed.ranked(found["rows"], 0.5)
        own = [runs[ways[place]] for ways in RIVALS.values()]
        errors = [f"{printed.middle(rows, 'error'):.3f}" for rows in own]
        right = [f"{printed.middle(rows, 'accuracy_percent'):.1f}" for rows in own]
        columns += [f"{SETS[name]}: left open", "top-1, %"]
        cells[0] += ["0", f"{found['host']['accuracy_percent']:.1f}"]
        for line, rows, error, share in zip(cells[1:], own, errors, right, strict=True):
            few = {1: " (1 seed)", 2: " (2 seeds)"}.get(len(rows), "")
            line += [bold(error, min(errors, key=float)) + few]
            line += [bold(share, max(right, key=float))]
    show(table(columns, cells))


def bold(text: str, best: str) -> str:
    return f"**{text}**" if text == best else text


# --- other scripts -------------------------------------------------------------------------------

COMPARED = {  # file of compare.py, contender, labels
    "learned tokens, calibrated and distilled": ("compare", "calibrated", "none"),
    "learned tokens, distilled": ("compare", "random", "none"),
    "token merging, distilled": ("compare", "merge", "none"),
    "top-k by class attention, distilled": ("compare", "topk", "none"),
    "average pooling, distilled": ("compare", "pool", "none"),
    "learned tokens, calibrated and distilled for 24 epochs, not 6": (
        "compare_24_epochs",
        "calibrated",
        "none",
    ),
    "token merging, distilled for 24 epochs": ("compare_24_epochs", "merge", "none"),
    "a smaller host, from scratch": ("compare", "smaller", "all"),
    "TokenLearner V1, from scratch": ("compare", "v1", "all"),
    "TokenLearner V1.1, from scratch": ("compare", "v11", "all"),
}


def trained_host() -> None:
    """What compare.py found at half of the host."""
    cells = []
    for label, (file, contender, labels) in COMPARED.items():
        host, runs = read(file)["host"]["test_top1_percent"], read(file)["runs"]
        top1 = [
            run["top1_percent"]
            for run in runs
            if (run["contender"], run["budget"]) == (contender, "half")
        ]
        label += f"; host of {host:.2f} %" if file != "compare" else ""
        cells.append([label, spread(top1), f"{median(top1) - host:+.2f}", labels])
    show(table(("", "top-1, %", "against the host", "labels"), cells, "lrrl"))


SCRATCH = {
    "fashion-mnist-small": "clothes (Fashion-MNIST, 8,000; 6 epochs at a rate of 1e-3)",
    "moving-photographs": "photographs that move in 9 ways (8 epochs)",
    "openclipart": "drawings (859; 40 epochs)",
}


def from_scratch() -> None:
    """Small models with all tokens and with few, and the ratio of multiply-adds."""
    rows = {(row["data"], row["tokens"]): row for row in read("accuracy")["rows"]}
    cells = []
    for data, label in SCRATCH.items():
        both = [rows[data, tokens] for tokens in ("all", "8 learned, halfway")]
        top1 = [printed.deviating(row["top1_percent"]) for row in both]
        smaller = [
            f"{printed.deviating(row['top1_percent'])} ({row['gmacs'] / both[0]['gmacs']:.2f})"
            for (of, tokens), row in rows.items()
            if of == data and tokens.endswith("pixels")
        ]
        share = f"{both[1]['gmacs'] / both[0]['gmacs']:.2f}"
        cells.append([label, *top1, share, ", ".join(smaller)])
    names = ("all tokens, top-1, %", "8 learned tokens, top-1, %", "multiply-adds")
    names += ("all of a smaller image, top-1, % (multiply-adds)",)
    show(table(("data", *names), cells))


def policy_long() -> None:
    """Policies after many updates, the best first."""
    runs = sorted(read("policy_long")["runs"], key=lambda run: -run["success_percent"])
    names = [run["contender"] for run in runs]
    faster = [timed(read("policy_long")["costs"][name]["speedup"]) for name in names]
    cells = zip(names, [printed.success([run]) for run in runs], faster, strict=True)
    show(table(("6,000 updates, one seed", "success, %", "times as fast"), [*cells]))


def modules_against() -> None:
    """Our learners, and all other forms of them by how fast they are against ours."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in read("modules_against")["rows"]:
        label = f"{row['learner']}, {row['pass']}", " x ".join(map(str, row["input"]))
        own = row["form"] == "ours"
        time = timed(row["latency_ms"], 1) if own else timed(row["times_as_fast_as_ours"])
        cells.setdefault(label, [*label]).append(time)
    columns = ("learner, pass", "input", "ours, ms", "compiled", "Flax", "Keras")
    show(table(columns, cells.values(), "ll"))


FORMS = {
    "onnx": "`.onnx` in ONNX Runtime",
    "onednn": "`use_onednn(model)`, eager",
    "Flax": "Flax under `jit`",
    "packed": "oneDNN with packed weights (`torch.utils.mkldnn`)",
    "frozen": "`torch.compile`, frozen weights",
    "compiled": "`torch.compile`",
    "bfloat16-frozen": "bfloat16, compiled and frozen",
}


def forms_on_a_cpu() -> None:
    """Forms of a model, how fast they are against eager PyTorch."""
    times = {
        (row["form"], row["model"], row["batch"]): row["times_as_fast_as_eager"]["median"]
        for row in read("against_flax")["rows"]
    }
    places = [(model, batch) for model in ("plain", "8 tokens") for batch in (1, 4)]
    cells = [
        [label, *(f"{times[form, model, batch]:.2f}" for model, batch in places)]
        for form, label in FORMS.items()
    ]
    columns = ("form", "plain, batch 1", "batch 4", "8 tokens, batch 1", "batch 4")
    show(table(columns, cells))


CONNECTORS = {
    "neighbors averaged": "neighbors averaged, nothing fitted",
    "neighbors averaged, projector fitted": "neighbors averaged, projector fitted",
    "learned": "learned tokens, fitted alone",
    "learned, projector fitted": "learned tokens and projector fitted",
}


def divergence() -> None:
    """What connectors leave of the divergence, by tokens."""
    rows, counts = read("connectors")["rows"], (64, 16, 8)
    cells = []
    for name, label in CONNECTORS.items():
        own = [row for row in rows if row["contender"] == name]
        each = [[row["kl"] for row in own if row["tokens"] == k] for k in counts]
        cells.append([label, *(spread(errors, 3, mean) for errors in each)])
    show(table(("", *(f"{k} tokens" for k in counts)), cells))


FROZEN = {
    "end to end": "end to end, from files",
    "its encoder, frozen": "on kept tokens of its encoder",
    "ViT of clothes, frozen": "on kept tokens of a ViT of clothes",
}


def frame_tokens() -> None:
    """Training on files, and on tokens that were kept."""
    runs = read("frame_tokens")["runs"]
    cells = []
    for name, label in FROZEN.items():
        run, seconds = runs[name], runs[name]["epoch_seconds"]
        ends = {end: run[f"epoch_seconds_{end}"] for end in ("low", "high")}
        faster = f"{runs['end to end']['epoch_seconds'] / seconds:.2f}"
        encoding = f"{run['encode_seconds']:.1f}" if "encode_seconds" in run else ""
        time = timed({"median": seconds, **ends})
        cells.append([label, f"{run['top1_percent']:.1f}", time, faster, encoding])
    names = ("top-1, %", "an epoch, s of a processor (range)", "times as fast")
    show(table(("trained", *names, "encoding once, s"), cells))
