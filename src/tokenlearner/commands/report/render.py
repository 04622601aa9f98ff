"""Writes one HTML file about what ran and its results: `write_report(folder)`.

It holds its images and its style, makes no network request, and runs no script.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from ...models.serialization import WEIGHTS, weights_file
from ...utils.imports import require_package
from ...utils.io import atomic_write, check_output_file, without_folders
from ...utils.validation import check_count, plain_text, require
from .._console import show_progress
from .._runs import run_options, show_used
from .confusion import Reevaluation, reevaluate
from .figures import legend_svg
from .reader import ReportSource, Run, read_source
from .sections import Section, default_title, make_sections

REPORT = "report.html"
_IMAGES = 2000  # on which each model is evaluated by default


@dataclass(frozen=True)
class ReportConfig:
    """Writes one HTML file about a training, a comparison or a benchmark.

    Args:
        source: A folder that train or demo wrote, a folder of such folders, or a JSON file of bench
            or of a benchmark.
        out: File to write, which ends in .html; of a folder it is report.html in it by default, of
            a JSON file its name with .html.
        title: The heading; the name of the source by default.
        images: Held-out images at most on which each saved model is evaluated once more, for the
            confusion matrix; 0 leaves that out.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range.
    """

    source: str
    out: str = ""
    title: str = ""
    images: int = _IMAGES
    device: str = "auto"

    def __post_init__(self) -> None:
        check_count("images", self.images, least=0)


def write_report(
    source: str | Path,
    out: str | Path | None = None,
    *,
    title: str = "",
    images: int = _IMAGES,
    device: str = "auto",
) -> Path:
    """Writes a report of what the commands left in a folder or a file.

    What is damaged or missing there is named in the report and does not stop it.

    Args:
        source: As in `ReportConfig`, like all others.
        out: File to write.
        title: The heading.
        images: Held-out images at most on which each model is evaluated.
        device: Such as cpu or cuda.

    Returns:
        The file.

    Raises:
        ValueError: There is nothing to report on, or `out` does not end in .html.
    """
    check_count("images", images, least=0)
    require_package("matplotlib", "train", "the report")
    contents = read_source(source)
    path = _output_path(contents, out)
    skipped = bool(contents.finished_runs) and not images
    results: list[Reevaluation] = []
    if not skipped and contents.finished_runs:
        with show_progress(f"evaluating the models of {contents.path} for the report"):
            results += _reevaluate_all(contents, images, device)
    problems = ["Left out, since images is 0."] if skipped else []
    sections = make_sections(contents, results, problems)
    page = _page(title or default_title(contents), sections, contents)
    with atomic_write(path) as temporary:
        temporary.write_text(plain_text(page, "\n\t"), encoding="utf-8")
    return path


def show_data_of_runs(source: str | Path) -> None:
    """Prints in a line what data each run names; images of them get into the report."""
    for run in read_source(source).finished_runs:
        with suppress(ValueError):  # which the report tells
            show_used(str(run.folder), run_options(str(run.folder)))


def _output_path(source: ReportSource, out: str | Path | None) -> Path:
    if not out:
        folder = source.path.is_dir()
        out = source.path / REPORT if folder else source.path.with_suffix(".html")
    is_html = Path(out).suffix in (".html", ".htm")
    require(is_html, f"out is {str(out)!r}, expected a file that ends in .html")
    return check_output_file(out)


def _reevaluate_all(source: ReportSource, images: int, device: str) -> Iterator[Reevaluation]:
    """Evaluates the models of all runs, and the hosts that tokens were inserted in."""
    with_maps = {folder for folder in source.folders if any(folder.glob("maps*.png"))}
    weights = {(run.folder / WEIGHTS).resolve() for run in source.finished_runs}
    for run in source.finished_runs:
        if (host := _host(run)) and weights_file(host).resolve() not in weights:
            named = replace(run, name=_host_name(source, run))
            if _is_near(weights_file(host), run):
                yield reevaluate(named, images, device, draw=False, host=host)
            else:
                problem = f"{named.name}: {host} lies outside, and is not evaluated"
                yield Reevaluation(named.name, None, None, [problem])
        draw = with_maps.isdisjoint((run.folder, run.folder.parent))
        yield reevaluate(run, images, device, draw=draw)


def _host(run: Run) -> Path | None:
    """Returns the checkpoint that a run inserted tokens in, if it is still there."""
    name = run.options.get("model")
    if not run.options.get("insert") or not isinstance(name, str):
        return None
    return path if weights_file(path := Path(name).expanduser()).is_file() else None


def _is_near(path: Path, run: Run) -> bool:
    """Returns whether a file that a train.json names is where a report may read it.

    That is beside the run's folder, or below the working folder.
    """
    path = path.resolve()
    return any(path.is_relative_to(at.resolve()) for at in (run.folder.absolute().parent, Path()))


def _host_name(source: ReportSource, run: Run) -> str:
    """Names the host as the run's comparison does."""
    models = [f.models for f in source.of_kind("comparison") if f.path.parent == run.folder]
    return models[0][0]["name"] if models and models[0] else f"host of {run.name}"


def _page(title: str, sections: Sequence[Section], source: ReportSource) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    assets = Path(str(files("tokenlearner") / "assets" / "report"))
    environment = Environment(
        loader=FileSystemLoader(assets),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=partial(without_folders, root=source.path.parent),
    )
    names = dict.fromkeys(name for section in sections for name in section.legend)
    environment.filters["base64"] = lambda data: b64encode(data).decode()
    return environment.get_template("report.html.jinja").render(
        css=(assets / "report.css").read_text(encoding="utf-8"),
        title=title,
        sections=sections,
        styles={name: number for number, name in enumerate(names)},
        legend_svg=legend_svg,
    )
