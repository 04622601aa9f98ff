"""`tokenlearner reduce`: the cheaper model that is closest to a host on a folder of images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..evaluation.hardware import describe_machine
from ..evaluation.map_figures import check_matplotlib
from ..evaluation.maps import attention_maps
from ..evaluation.prediction import read_images
from ..models.factory import create_model, load_model, save_model
from ..models.features import wrapped_blocks
from ..models.preprocessing import get_input_size, get_preprocessing
from ..models.serialization import WEIGHTS
from ..training.candidate_store import STATE, CandidateRow
from ..training.candidates import DEFAULT_TOKENS, check_budget, resize
from ..training.reduction import Reduction, reduce
from ..utils.io import check_output_folder, is_model_path, write_json
from ..utils.modules import pick_device
from ..utils.validation import check_count, counted, parse_seconds, require
from ._arguments import read_config, read_counts
from ._comparison import denormalized, draw_maps
from ._console import console, say, show_progress
from ._tables import filled_table
from .report.render import write_report

RESULTS = "reduction.json"
_SHOWN = 6  # images in the figure of maps
_DOING = {  # that is no fitting of a candidate, and what is counted
    "host": ("running the whole model, on images and crops of them", "views"),
    "times": ("measuring times", "batch sizes"),
}
_FEW_STEPS, _FEW_IMAGES = 200, 200
_LEGEND = (
    "share: of the host's multiply-adds. left open: share of the variance of its output on "
    "held-out images. speed-up: of a batch of so many images, medians, – where no time was left. "
    "rounds: of fitting. tokens at 4-5: learned in front of block 4, and all that is "
    "left from block 5 on, counted from 0."
)


@dataclass(frozen=True, kw_only=True)
class ReduceConfig:
    """Makes a trained ViT cheaper, by learned tokens or a smaller image, whichever is closer to it.

    Args:
        model: A name of timm's or ours, whose trained weights are taken, hf-hub:user/name, or what
            train or save_model wrote.
        images: Folder of images without labels, such as the model is used on.
        budget: Share of its multiply-adds.
        out: Folder for the model, the table, figures and the report.
        time: How long to take, about, such as 90s, 30m or 2h.
        resume: auto goes on where the run in out was cut off, or starts it; None only starts.
        most: Images to read at most, drawn by the seed.
        tokens: Numbers of tokens to try, with commas between them.
        views: Each image, and so many crops of it less one; None is 4, or as many as the model runs
            on in a tenth of the time.
        batch_size: Images an update; None is 64, on a CPU 16.
        latency_batch: Images at a time that the speed is measured of, besides 1.
        pretrained: Whether a name has trained weights; false is random ones, to try it out.
        follow_links: Take files out of a folder too, where links in it lead there.
        seed: Of all that is drawn.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range, or out cannot be written.
    """

    model: str
    images: str
    budget: float = 0.5
    out: str = "runs/reduced"
    time: str = "30m"
    resume: Literal["auto"] | None = None
    most: int = 2000
    tokens: str = ",".join(map(str, DEFAULT_TOKENS))
    views: int | None = None
    batch_size: int | None = None
    latency_batch: int = 32
    pretrained: bool = True
    follow_links: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("most", "latency_batch"):
            check_count(name, getattr(self, name))
        for name, least in (("views", 1), ("batch_size", 2)):
            if (count := getattr(self, name)) is not None:
                check_count(name, count, least=least)
        parse_seconds("time", self.time)
        for k in self.num_tokens:
            check_count("tokens", k)
        check_output_folder(self.out)
        check_matplotlib()
        begun, weights = (Path(self.out).expanduser() / name for name in (STATE, WEIGHTS))
        require(
            begun.exists() or not weights.exists(),
            f"{weights} is of another model, and would be written over; pass another --out",
        )
        require(
            self.resume is not None or not begun.exists(),
            f"{begun} is of an earlier run; pass --resume auto to go on with it, or another --out",
        )

    @property
    def seconds(self) -> float:
        """The time in seconds."""
        return parse_seconds("time", self.time)

    @property
    def num_tokens(self) -> list[int]:
        """The numbers in `tokens`."""
        return read_counts("tokens", self.tokens)


def reduce_command(arguments: Sequence[str]) -> None:
    """Reduces a model, and prints what was chosen and why."""
    model = {"help": "name, hf-hub:user/name, or what train or save_model wrote"}
    run_reduction(read_config("reduce", ReduceConfig, arguments, model=model))


def run_reduction(config: ReduceConfig) -> Reduction:
    """Reduces a model; writes it, a table, figures and a report to `config.out`, and says so.

    Raises:
        ValueError: As `reduce`, or the model or the images cannot be read.
    """
    host, images = load_host(config)
    out = Path(config.out).expanduser()
    done = search(config, host, images, folder=out)
    console().print(table(done.rows), explanation(done), _LEGEND, sep="\n")
    save_model(done.model, out, {done.best.name: _measured(done.best)})
    rows = [{"name": row.name, **asdict(row)} for row in done.rows]
    facts = {"images": done.images, "held_out": done.held_out, "seconds": done.seconds}
    facts |= {
        "command": _command(config),
        "machine": describe_machine(next(host.parameters()).device),
        "notes": explanation(done).splitlines(),
    }
    write_json(out / RESULTS, {"candidates": rows, "config": asdict(config), **facts})
    if wrapped_blocks(done.model):
        _draw(done.model, images, out / "maps.png")
    title = f"{config.model} at {config.budget:g} of its multiply-adds"
    say(f"The model is in {out}, and all of this in {write_report(out, title=title, images=0)}")
    kept = (out / STATE).parent
    size = sum(file.stat().st_size for file in kept.iterdir()) / 1e6
    say(f"{kept} ({size:,.0f} MB) is for going on with this run only; delete it at will")
    return done


def load_host(config: ReduceConfig) -> tuple[nn.Module, Tensor]:
    """Loads the model, and the images as it takes them.

    Raises:
        ValueError: There is no such model, its weights cannot be fetched, or no image can be read.
    """
    device = pick_device(config.device)
    is_there = Path(config.images).expanduser().exists()  # before weights are fetched
    require(is_there, f"there is no file or folder {config.images!r}; correct the path")
    if is_model_path(config.model):
        model = load_model(config.model)
    else:
        model = _named(config.model, config.pretrained)
    images, left_out = read_images(
        model, [config.images], most=config.most, seed=config.seed, follow_links=config.follow_links
    )
    for reason in left_out:
        say(f"left out: {reason}", file=sys.stderr)
    return model.to(device).eval(), images.to(device)


def _named(name: str, pretrained: bool) -> nn.Module:
    """Builds a model by name, with its trained weights."""
    try:
        return create_model(name, pretrained=pretrained)
    except ValueError:
        raise
    except Exception as error:  # the Hub's and the network's are of many kinds
        raise ValueError(
            f"the trained weights of {name} cannot be had ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); connect, or pass a folder that timm or save_model "
            "wrote"
        ) from error


def search(
    config: ReduceConfig,
    host: nn.Module,
    images: Tensor,
    *,
    folder: Path | None = None,
    train_best: bool = True,
) -> Reduction:
    """Calls `reduce` as a config says, and shows how far it is."""
    shown = ""
    with show_progress(f"running {config.model} on images", round(config.seconds)) as advance:
        passed = 0.0

        def report(row: dict[str, Any]) -> None:
            nonlocal passed, shown
            what, unit = _DOING.get(row["candidate"], (f"fitting {row['candidate']}", "steps"))
            title = f"round {row['round'] + 1} of {row['rounds']}: {what}"
            if row["candidate"] == "times":
                title = what
            advance(f"{title}, {row['step']} of {row['steps']} {unit}", row["seconds"] - passed)
            passed = row["seconds"]
            if title != shown and not console(stderr=True).is_terminal:
                so_far = f"{passed:.0f} of {config.seconds:.0f} s"
                say(f"{so_far}: {title}, {row['steps']} {unit}", file=sys.stderr)
            shown = title

        return reduce(
            host,
            images,
            config.budget,
            seconds=config.seconds,
            num_tokens=config.num_tokens,
            views=config.views,
            batch_size=config.batch_size,
            latency_batches=sorted({1, config.latency_batch}),
            train_best=train_best,
            folder=folder,
            seed=config.seed,
            report=report,
        )


def _command(config: ReduceConfig) -> str:
    """Writes the command that does the same again."""
    changed = {
        field.name: value
        for field in fields(config)
        if (value := getattr(config, field.name)) != field.default and field.name != "model"
    }
    options = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    return shlex.join(["tokenlearner", "reduce", config.model, *options])


def table(rows: Sequence[CandidateRow]) -> Any:
    """Makes a table of the host and the candidates, the best first, for rich."""
    columns: dict[str, Callable[[CandidateRow], str]] = {
        "": lambda row: row.name,
        "share": lambda row: f"{row.macs_share:.2f}",
        "left open": lambda row: f"{row.errors[-1]:.3f}" if row.errors else "0",
    }
    if any(row.agreement is not None for row in rows):
        columns["same class"] = lambda row: (
            "100 %" if row.agreement is None else f"{row.agreement:.0%}"
        )
    for batch in rows[0].latency_ms:
        columns[f"speed-up, {batch}"] = lambda row, b=batch: (
            f"{row.speedup[b].median:.2f}" if b in row.speedup else "–"
        )
    columns["rounds"] = lambda row: str(len(row.errors)) if row.candidate else ""
    made = filled_table(columns, rows)
    made.columns[0].no_wrap = True
    return made


def explanation(done: Reduction) -> str:
    """Says what was chosen and why, in sentences on lines of their own."""
    best, others = done.best, done.rows[2:]
    lines = [
        f"{best.name} is closest to the host within the budget: of the variance of its output on "
        f"{counted(done.held_out, 'held-out image')} it leaves open {best.errors[-1]:.3f} "
        "(0 is a perfect copy, 1 the mean of all images)."
    ]
    chosen: Any = best.candidate
    rivals = [row for row in others if _kind(row) != _kind(best)]
    if rivals:
        rival = min(rivals, key=lambda row: (-len(row.errors), row.errors[-1]))
        after = f"after {counted(len(rival.errors), 'round')}"
        worse = ", worse than the mean of all images" if rival.errors[-1] > 1 else ""
        lines.append(f"The best {_kind(rival)} came to {rival.errors[-1]:.3f} {after}{worse}.")
    if best.steps < _FEW_STEPS or done.images < _FEW_IMAGES:
        lines.append(
            f"It was fitted by {counted(best.steps, 'update')} on {counted(done.images, 'image')}, "
            "which ranks candidates and makes none good; hundreds of images and a longer --time do."
        )
    if best.errors[-1] >= 1:
        lines.append("Nothing was learned yet: the mean of all images would be as close.")
    elif len(best.errors) > 1 and best.errors[0] == best.errors[-1]:
        lines.append("Fitting brought nothing after the first round.")
    if done.untried:
        lines.append(
            f"No time was left to try {'; '.join(done.untried)}. A longer --time tries them too."
        )
    if chosen.img_size:
        h, w = chosen.img_size
        lines.append(f"The model takes images of {h} x {w} pixels; its config says so.")
    return "\n".join(lines)


def _kind(row: CandidateRow) -> str:
    candidate: Any = row.candidate
    kinds = (candidate.img_size and "smaller image", candidate.num_tokens and "learned tokens")
    return " with ".join(kind for kind in kinds if kind)


def _measured(row: CandidateRow) -> dict[str, object]:
    """Returns what a model card says of the best."""
    found: dict[str, object] = {
        "GMACs": row.gmacs,
        "share of the host's": row.macs_share,
        "variance of the host's output left open": row.errors[-1],
    }
    if row.agreement is not None:
        found["images in the host's class, %"] = 100 * row.agreement
    return found | {f"times as fast, batch {b}": t.median for b, t in row.speedup.items()}


def _draw(model: nn.Module, images: Tensor, path: Path) -> None:
    """Draws where the first learner looks on some of the images."""
    h, w = get_input_size(model)[-2:]
    some = resize(images[:_SHOWN], (h, w))
    maps = next(iter(attention_maps(model, some).values())).cpu()
    shares = maps / maps.sum((-2, -1), keepdim=True)
    found = get_preprocessing(model, some.shape[1])
    pixels = denormalized(some.cpu(), found) if found else some.cpu()
    draw_maps(path, pixels, shares, [""] * len(some), "Where the learned tokens look")
