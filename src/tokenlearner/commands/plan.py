"""`tokenlearner plan`: where tokens can be learned, and how many, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..evaluation.planning import Option, check_plan, plan
from ..utils.validation import check_count, check_literals, counted, require
from ._arguments import read_config, read_counts
from ._console import console, show_progress
from ._models import load_sized
from ._tables import REALIZED, filled_table, realized_text


@dataclass(frozen=True)
class PlanConfig:
    """Lists where tokens can be learned, and how many, within a budget.

    Args:
        model: A name that `create_model` knows, ours or timm's, or a checkpoint of `save_model`.
        budget: Share of what the model costs, above 0 and up to 1.
        measure: What the budget is a share of, multiply-adds or latency.
        tokens: Numbers of tokens to try, with commas between them.
        learner: v11, v1, v1-mean or grouped.
        fuse: Put learned tokens back on all positions behind each block.
        overlap: Blocks in front of `at` that run on tokens and positions.
        batch_size: Images at a time; changes the speed only.
        img_size: Height and width of the images; 0 leaves them as the model has them.
        rounds: Timed runs of each model.
        images: Folder of images: fits candidates for a while, and ranks them with smaller images of
            the same cost, as reduce does before it trains the best.
        time: How long that may take, such as 90s or 10m.
        pretrained: With images, whether a name has trained weights.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range.
    """

    model: str
    budget: float = 0.5
    measure: Literal["macs", "latency"] = "macs"
    tokens: str = "4,8,16,32"
    learner: str = "v11"
    fuse: bool = False
    overlap: int = 0
    batch_size: int = 1
    img_size: int = 0
    rounds: int = 15
    images: str = ""
    time: str = "10m"
    pretrained: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        check_literals(self)
        check_plan(self.budget, self.measure, self.num_tokens, self.rounds)
        check_count("batch_size", self.batch_size)
        for name in ("img_size", "overlap"):
            check_count(name, getattr(self, name), least=0)

    @property
    def num_tokens(self) -> list[int]:
        """The numbers in `tokens`."""
        return read_counts("tokens", self.tokens)


def plan_command(arguments: Sequence[str]) -> None:
    """Prints the table of a model's insertions within a budget."""
    config = read_config("plan", PlanConfig, arguments)
    console().print(*(ranking if config.images else plan_table)(config), sep="\n")


def ranking(config: PlanConfig) -> tuple[Any, ...]:
    """Fits candidates to the model on images, and returns a table and what it says.

    Raises:
        ValueError: As `reduce`, or an option does not go with images.
    """
    from .reduce import ReduceConfig, explanation, load_host, search, table

    usual = PlanConfig(model="", measure="macs", learner="v11")
    for name in ("measure", "learner", "fuse", "overlap", "img_size"):
        require(
            getattr(config, name) == getattr(usual, name),
            f"{name} is {getattr(config, name)!r}, which images do not go with; leave one out",
        )
    names = ("model", "images", "budget", "time", "tokens", "pretrained", "device")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    asked = ReduceConfig(**options, latency_batch=config.batch_size, resume="auto")
    done = search(asked, *load_host(asked), train_best=False)
    return table(done.rows), explanation(done)


def plan_table(config: PlanConfig) -> tuple[Any, str]:
    """Plans, and returns a table for rich and a line on how it was measured.

    Raises:
        ValueError: As `plan`, or there is no such model or device.
    """
    model, size = load_sized(config.model, config.img_size, config.device, hosts_only=True)
    images = torch.randn(config.batch_size, *size).to(next(model.parameters()))
    names = ("budget", "measure", "num_tokens", "learner", "fuse", "overlap", "rounds")
    with show_progress(f"measuring {config.model} with and without learned tokens"):
        options = plan(model, images, **{name: getattr(config, name) for name in names})
    setting = (
        f"{images.device}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"
    )
    columns = {
        "clips/s" if len(size) == 4 and name == "images/s" else name: text
        for name, text in COLUMNS.items()
    }
    return filled_table(columns, options), (
        f"{config.model}: {config.batch_size} x {' x '.join(map(str, size))} on {setting}; medians "
        f"(quartiles) of {config.rounds} interleaved rounds. share: of the host's GMACs; realized: "
        f"the speed-up as a share of what the GMACs allow, * where it is below {REALIZED}."
    )


COLUMNS: dict[str, Callable[[Option], str]] = {
    "at": lambda option: "–" if option.at is None else str(option.at),
    "tokens": lambda option: str(option.num_tokens or "–"),
    "GMACs": lambda option: f"{option.gmacs:.3f}",
    "share": lambda option: f"{option.macs_share:.2f}",
    "ms a batch": lambda option: f"{option.latency_ms:.1f}",
    "speed-up": lambda option: f"{option.speedup.median:.2f}",
    "realized": lambda option: realized_text(option.realized_speedup),
    "images/s": lambda option: f"{option.images_per_second.median:.1f}",
}
