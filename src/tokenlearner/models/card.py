"""What a model's page on the Hub says: `model_card(model)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from .insertion import get_insertion
from .serialization import get_build_args

Measured = Mapping[str, Mapping[str, object]]
TAGS = ["timm", "token-reduction", "tokenlearner"]
LIBRARY, LICENSE, PAPER = "tokenlearner", "apache-2.0", "https://arxiv.org/abs/2106.11297"
CODE = "https://github.com/google-research/scenic/tree/main/scenic/projects/token_learner"


def model_card(model: Any, measured: Measured | None = None, place: str | None = None) -> str:
    """Returns the text of a model card: what the model is, how to load it, what was measured.

    Args:
        model: As in `write_files`.
        measured: A table as columns of rows, such as `{"ours": asdict(benchmark(...)["ours"])}`
            or `{"ours": {"top-1": 0.81}}`.
        place: Where the model will be, such as `user/name` on the Hub.

    Raises:
        ValueError: `measured` is no table, or the model does not know its name.
    """
    name, tokens, kind = get_build_args(model)["name"], get_insertion(model), type(model).__name__
    place = place or "path/to/this/folder"
    count = sum(parameter.numel() for parameter in model.parameters())
    loads = [f'model = tokenlearner.load_model("{place}")  # in evaluation mode']
    if hasattr(model, "from_pretrained"):
        module = type(model).__module__
        loads += [
            "# or",
            f"from {module} import {kind}",
            f'model = {kind}.from_pretrained("{place}")',
        ]
    parts = [
        f"---\n{_front_matter(model)}\n---",
        f"# {name}",
        f"A {kind} with {count:,} parameters. {_sentence(tokens)}",
        f"The idea is from [TokenLearner]({PAPER}), whose [code]({CODE}) is in JAX.",
        "## Load it",
        "\n".join(["```python", "import tokenlearner", "", *loads, "```"]),
        "## Measured",
        _table(measured) if measured else "Nothing was measured when this model was saved.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Any) -> str:
    is_video = hasattr(model, "num_frames")
    data = ModelCardData(
        library_name=LIBRARY,
        license=getattr(model, "pretrained_cfg", {}).get("license") or LICENSE,
        pipeline_tag="video-classification" if is_video else "image-classification",
        tags=list(TAGS),
    )
    return data.to_yaml().strip()


def _sentence(tokens: Mapping[str, Any] | None) -> str:
    if tokens is None:
        return "It has no learned tokens."
    count, at, learner = tokens["num_tokens"], tokens["at"], tokens["learner"]
    where = f"It learns {count} tokens in front of block {at}, counted from 0 (learner `{learner}`)"
    if tokens["fuse"]:
        return f"{where}, and each block from there on puts them back on all positions."
    return f"{where}, and the blocks from there on see nothing else."


def _table(measured: Measured) -> str:
    is_table = isinstance(measured, Mapping)
    if not is_table or not all(isinstance(column, Mapping) for column in measured.values()):
        raise ValueError(
            f"measured is {measured!r}, expected columns of rows, such as "
            "{'this model': {'top-1': 0.81}}; take dataclasses.asdict of a result"
        )
    rows = dict.fromkeys(str(row) for column in measured.values() for row in column)
    columns = [{str(row): _cell(v) for row, v in c.items()} for c in measured.values()]
    lines = [["", *map(_cell, measured)], ["---", *["--:"] * len(columns)]]
    lines += [[_cell(row), *(column.get(row, "") for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    """A value as text; a spread, which is a mapping, as its median and quartiles."""
    if isinstance(value, Mapping):
        if value.keys() == {"median", "low", "high"}:
            return f"{_cell(value['median'])} ({_cell(value['low'])} to {_cell(value['high'])})"
        return ", ".join(f"{_cell(key)} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
