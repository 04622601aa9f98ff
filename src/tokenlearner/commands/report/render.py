"""One HTML file that tells what ran and what came of it: `write_report(folder)`.

It holds its images and its style, asks the network for nothing, and runs no script.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from ...models.serialization import WEIGHTS, weights_file
from ...utils.io import atomic_write
from ...utils.validation import check_count, require
from .charts import drawn_chart, line_style
from .confusion import Reevaluation, reevaluate
from .parts import Section
from .reader import Found, FoundRun, read_source
from .sections import all_sections, title_of

REPORT = "report.html"
_JUDGED = 2000  # images, unless another number is asked for


@dataclass(frozen=True)
class ReportConfig:
    """Writes one HTML file about a training, a comparison or a benchmark.

    Args:
        source: A folder that train, demo or benchmarks/compare.py wrote, a folder of such folders,
            or a JSON file of bench or of a benchmark.
        out: File to write, which ends in .html; of a folder it is report.html in it by default, of
            a JSON file its name with .html.
        title: What stands on top; the name of the source by default.
        images: Held-out images at most that each saved model is judged by once more, for the
            confusion matrix; 0 leaves that out.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range.
    """

    source: str
    out: str = ""
    title: str = ""
    images: int = _JUDGED
    device: str = "auto"

    def __post_init__(self) -> None:
        check_count("images", self.images, least=0)


def write_report(
    source: str | Path,
    out: str | Path | None = None,
    *,
    title: str = "",
    images: int = _JUDGED,
    device: str = "auto",
) -> Path:
    """Writes a report of what the commands left in a folder or a file.

    What is damaged or missing there is named in the report and does not stop it.

    Args:
        source: As in `ReportConfig`.
        out: As in `ReportConfig`.
        title: As in `ReportConfig`.
        images: As in `ReportConfig`.
        device: As in `ReportConfig`.

    Returns:
        The file.

    Raises:
        ValueError: There is nothing to report on, or `out` does not end in .html.
    """
    check_count("images", images, least=0)
    found = read_source(source)
    path = _place(found, out)
    looks, problems = _looks(found, images, device)
    page = _page(title or title_of(found), all_sections(found, looks, problems))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _place(found: Found, out: str | Path | None) -> Path:
    if out:
        path = Path(out).expanduser()
        ends = path.suffix in (".html", ".htm")
        require(ends, f"out is {str(out)!r}, expected a file that ends in .html")
        require(not path.is_dir(), f"out is {str(out)!r}, which is a folder; name a file")
        return path
    return found.source / REPORT if found.source.is_dir() else found.source.with_suffix(".html")


def _looks(found: Found, images: int, device: str) -> tuple[list[Reevaluation], list[str]]:
    """What the models of runs that are over make of held-out images; why there is none."""
    runs = [run for run in found.runs if run.history]
    if not images:
        return [], ["Left out, since images is 0."] if runs else []
    drawn = {folder for folder in found.folders if any(folder.glob("maps*.png"))}
    own = {(run.folder / WEIGHTS).resolve() for run in runs}
    looks = []
    for run in runs:
        if (host := _host(run)) and weights_file(host).resolve() not in own:
            named = replace(run, name=_host_name(found, run))
            looks.append(reevaluate(named, images, device, draw=False, host=host))
        has_maps = not drawn.isdisjoint((run.folder, run.folder.parent))
        looks.append(reevaluate(run, images, device, draw=not has_maps))
    return looks, []


def _host(run: FoundRun) -> Path | None:
    """What a run inserted tokens in, if it is still where it was."""
    name = run.options.get("model")
    if not run.options.get("insert") or not isinstance(name, str):
        return None
    return path if weights_file(path := Path(name).expanduser()).is_file() else None


def _host_name(found: Found, run: FoundRun) -> str:
    """As the run's comparison calls it."""
    own = [file for file in found.of_kind("contest") if file.path.parent == run.folder]
    return own[0].models[0]["name"] if own and own[0].models else f"host of {run.name}"


def _page(title: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    assets = Path(str(files("tokenlearner") / "assets" / "report"))
    environment = Environment(
        loader=FileSystemLoader(assets),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"drawn": drawn_chart, "styled": line_style, "data_url": _data_url}
    css = Markup((assets / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.jinja").render(
        css=css, title=title, sections=sections
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
