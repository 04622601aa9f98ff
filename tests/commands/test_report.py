"""The report: what it tells of each kind of source, and a page that is whole, safe and readable."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, complaints, requested
from matplotlib import colormaps
from PIL import Image
from torch import nn

from tokenlearner import TrainConfig, create_model, evaluate, load_data, load_model, save_model
from tokenlearner.commands.report.charts import drawn_chart, line_style
from tokenlearner.commands.report.confusion import Confusions, _confusion_counts, confusion_matrix
from tokenlearner.commands.report.parts import (
    Chart,
    ChartLine,
    Mark,
    cividis,
    number_text,
    spread_text,
)
from tokenlearner.commands.report.reader import read_source
from tokenlearner.commands.report.render import ReportConfig, write_report

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7}
FEW = 40  # images that a model is judged by
VOID = {"meta", "link", "img", "line", "polyline", "br"}


class Page(HTMLParser):
    """A page as its elements, in order, each with its attributes and the text inside."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, *tags: str) -> list[tuple[dict[str, str | None], str]]:
        found = ((attrs, "".join(texts)) for tag, attrs, texts in self.elements if tag in tags)
        return [(attrs, " ".join(text.split())) for attrs, text in found]

    def row(self, label: str) -> list[str]:
        """The cells of the first row that starts with a label."""
        cells: list[str] = []
        for tag, attrs, texts in self.elements:
            if tag == "tr" and cells:
                break
            if tag == "th" and attrs.get("scope") == "row":
                cells = ["".join(texts)] if "".join(texts) == label else []
            elif tag == "td" and cells:
                cells.append("".join(texts))
        return cells[1:]

    @property
    def headings(self) -> list[str]:
        return [text for _, text in self.all("h2")]

    @property
    def problems(self) -> str:
        return " ".join(text for attrs, text in self.all("ul") if attrs.get("class") == "problems")


def epochs(n: int = 2, start: float = 50.0) -> list[dict[str, Any]]:
    return [
        {
            "epoch": i,
            "train_loss": 2.0 / i,
            "train_seconds": 1.5,
            "images_per_second": 100.0 * i,
            "waiting_percent": 1.0,
            "test_loss": 2.5 / i,
            "test_top1_percent": start + i,
            "test_top5_percent": 90.0 + i,
        }
        for i in range(1, n + 1)
    ]


def made_run(folder: Path, tokens: int = 0, rows: list[Any] | None = None, **told: Any) -> Path:
    """A run as `train` leaves it, of a model that has not learned anything."""
    folder.mkdir(parents=True)
    config = TrainConfig(out=str(folder), model_kwargs=TINY, num_tokens=tokens, epochs=2, **told)
    (folder / "train.json").write_text(json.dumps(asdict(config)))
    lines = [json.dumps(row) for row in (epochs() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    save_model(create_model("vit_mini_patch4_28", num_tokens=tokens, **TINY), folder)
    return folder


def costs(speed: float) -> dict[str, Any]:
    spread = {"median": speed, "low": 0.9 * speed, "high": 1.1 * speed}
    return {
        "parameters": 1000,
        "gmacs": 2 / speed,
        "images_per_second": spread,
        "training_images_per_second": spread,
        "peak_memory_mib": 5.0,
        "training_peak_memory_mib": 6.0,
    }


def contest(**models: list[dict[str, Any]]) -> dict[str, Any]:
    """What `demo` writes to metrics.json: two models, by name their epochs."""
    rows = [
        {"name": name, "top1_percent": 60.0 + i, "cost": costs(100.0 + i), "epochs": history}
        for i, (name, history) in enumerate(models.items())
    ]
    config = {"out": "x", "tokens": 2, "at": 0.5, "epochs": 2, "seed": 3}
    environment = {"torch": "2.9.9", "threads": 7}
    return {"config": config, "environment": environment, "models": rows, "notes": ["A note."]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    made_run(out / "vit")
    made_run(out / "vit-tl2", tokens=2, rows=epochs(start=60.0))
    models = {"ViT": epochs(), "ViT on tokens": epochs(start=60.0)}
    (out / "metrics.json").write_text(json.dumps(contest(**models)))
    Image.new("RGB", (40, 20), (9, 99, 199)).save(out / "maps-clothes.png")
    write_report(out, images=FEW)
    return out


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return Page(demo / "report.html")


# --- the demo ---------------------------------------------------------------------------------


def test_the_demo_s_report_has_every_section(page: Page) -> None:
    assert page.headings == [
        "What ran",
        "Results",
        "Learning curves",
        "Accuracy against speed",
        "Where the learned tokens look",
        "Confusion matrix",
        "Environment",
        "All options",
    ]
    assert page.problems == ""


def test_every_section_says_how_to_read_it(page: Page) -> None:
    leads = [text for attrs, text in page.all("p") if attrs.get("class") == "lead"]
    assert len(leads) == len(page.headings)
    assert all(len(lead.split()) > 8 for lead in leads)


def test_runs_are_called_as_the_contest_calls_them(page: Page) -> None:
    heads = [text for attrs, text in page.all("th") if attrs.get("scope") == "col"]
    assert heads[:2] == ["ViT", "ViT on tokens"]
    assert page.row("learned tokens") == ["–", "2 learned at 0.5"]


def test_the_command_that_makes_it_again_is_told(page: Page) -> None:
    assert page.row("command") == ["tokenlearner demo --tokens 2 --at 0.5 --epochs 2 --seed 3"]


def test_the_table_has_the_contest_s_numbers_and_their_ratio(page: Page) -> None:
    assert page.row("top-1 on held-out images, %") == ["60.0", "61.0", "+1.0 points"]
    assert page.row("images/s, inference") == ["100.0 (90.0–110.0)", "101.0 (90.9–111.1)", "1.01"]
    assert page.row("seconds of training") == ["3.000", "3.000", "1.00"]
    assert ("A note.") in [text for _, text in page.all("li")]


def test_curves_are_drawn_by_epochs_and_by_seconds(page: Page) -> None:
    titles = [text for _, text in page.all("figcaption")]
    metrics = ("Training loss", "Held-out loss", "Held-out top-1")
    assert titles[:6] == [f"{one}, by {axis}" for axis in ("epochs", "time") for one in metrics]
    told = [text for _, text in page.all("desc")]
    assert "ViT from (1, 2.000) to (2, 1.000)" in told[0]
    assert "ViT on tokens from (1.500, 61.0) to (3.000, 62.0)" in told[5]


def test_accuracy_is_drawn_against_speed(page: Page) -> None:
    told = [text for _, text in page.all("desc")]
    expected = "held-out top-1, % against images/s, inference: ViT (100.0, 60.0); ViT on tokens"
    assert told[6].startswith(expected)


def test_maps_that_are_there_are_shown_and_no_others_drawn(page: Page, demo: Path) -> None:
    [(attrs, _)] = page.all("img")
    head, _, data = str(attrs["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert import_module("base64").b64decode(data) == (demo / "maps-clothes.png").read_bytes()


def test_the_confusion_matrix_is_that_of_the_saved_model(page: Page, demo: Path) -> None:
    data = load_data("fashion-mnist-small", "test").sample(FEW, 0)
    for folder, name in (("vit", "ViT"), ("vit-tl2", "ViT on tokens")):
        right = evaluate(load_model(demo / folder), data).top1_percent
        title = [text for _, text in page.all("h3")].index(name)
        remark = [text for _, text in page.all("p") if "are right" in text][title]
        assert f"{FEW} images of 2,000, drawn by a seed" in remark
        assert f"{right:.1f} % are right" in remark


def test_the_environment_is_what_was_recorded(page: Page) -> None:
    assert page.row("threads") == ["7"]
    assert page.row("timm") == [import_module("timm").__version__]


def test_options_are_folded_and_those_that_differ_stand_out(page: Page) -> None:
    assert page.all("summary")[0][1].startswith("train: ")
    marked = [text for attrs, text in page.all("tr") if attrs.get("class") == "marked"]
    assert [text for text in marked if not text.startswith("out")] == ["num_tokens02"]


def test_the_same_folder_gives_the_same_report(demo: Path, tmp_path: Path) -> None:
    again = write_report(demo, tmp_path / "again.html", images=FEW)
    assert again.read_bytes() == (demo / "report.html").read_bytes()


# --- the page ---------------------------------------------------------------------------------


def test_the_page_holds_all_it_needs(page: Page) -> None:
    for _, attrs, _ in page.elements:
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert str(attrs.get(name) or "#").startswith(("data:", "#"))
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not page.all("script", "iframe", "object")


def test_the_page_forbids_itself_everything_else(page: Page) -> None:
    [policy] = [attrs for attrs, _ in page.all("meta") if "http-equiv" in attrs]
    assert policy["http-equiv"] == "Content-Security-Policy"
    expected = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy["content"] == expected


def test_the_page_can_be_read_without_seeing_it(page: Page) -> None:
    [(html, _)] = page.all("html")
    assert html["lang"] == "en"
    assert all(attrs.get("alt") for attrs, _ in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs, _ in page.all("th"))
    drawings = [attrs for attrs, _ in page.all("svg") if "aria-hidden" not in attrs]
    ids = Counter(attrs["id"] for _, attrs, _ in page.elements if attrs.get("id"))
    assert len(drawings) == 8
    assert all(ids[name] == 1 for one in drawings for name in str(one["aria-labeledby"]).split())
    assert max(ids.values()) == 1


def test_headings_are_in_order_and_links_lead_to_them(page: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = {attrs.get("id") for _, attrs, _ in page.elements}
    links = {str(attrs["href"])[1:] for attrs, _ in page.all("a")}
    assert len(links) == len(page.headings)
    assert links <= ids


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_chromium_shows_it_without_a_request_or_a_complaint(demo: Path, width: int) -> None:
    address = (demo / "report.html").as_uri()
    with chromium(width) as browser:
        told = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", told)
        browser.get(address)
        assert requested(browser) == [address]
        assert complaints(browser) == []
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        shown = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
        assert shown == [40]


@pytest.mark.slow
def test_chromium_has_other_colors_in_the_dark_with_contrast(demo: Path) -> None:
    script = "return getComputedStyle(document.body)[arguments[0]]"
    seen = {}
    with chromium() as browser:
        browser.get((demo / "report.html").as_uri())
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            seen[scheme] = [
                sum(
                    int(part.strip(" rgb()"))
                    for part in browser.execute_script(script, one).split(",")
                )
                for one in ("color", "backgroundColor")
            ]
    assert seen["light"][0] < 150 < 700 < seen["light"][1]
    assert seen["dark"][1] < 150 < 600 < seen["dark"][0]


# --- what users write -------------------------------------------------------------------------

EVIL = '<script>alert("x")</script>'


def test_names_of_classes_and_options_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_run(tmp_path / "<b>run", teacher=EVIL)
    whole = load_data("fashion-mnist-small", "test").sample(FEW)
    named = replace(whole, classes=(EVIL, *whole.classes[1:]))
    monkeypatch.setattr(
        import_module("tokenlearner.data.factory"), "load_data", lambda *a, **k: named
    )
    page = Page(write_report(folder, title=f"{EVIL} title", images=FEW))
    assert not page.all("script", "b")
    assert [text for _, text in page.all("h1")] == [f"{EVIL} title"]
    assert page.row("teacher") == [EVIL]
    assert EVIL in [text for _, text in page.all("th")]


def test_names_in_a_file_are_text(tmp_path: Path) -> None:
    told = contest(**{EVIL: epochs(), "other": epochs(1)})
    told["notes"] = [EVIL]
    (tmp_path / "metrics.json").write_text(json.dumps(told))
    page = Page(write_report(tmp_path))
    assert not page.all("script")
    assert page.source.count("<script") == 0
    assert EVIL in [text for _, text in page.all("li")]


# --- other sources ----------------------------------------------------------------------------


def test_a_run_with_tokens_gets_maps_drawn(tmp_path: Path) -> None:
    page = Page(write_report(made_run(tmp_path / "run", tokens=2), images=FEW))
    assert page.headings[3:5] == ["Where the learned tokens look", "Confusion matrix"]
    [(attrs, _)] = page.all("img")
    assert str(attrs["alt"]).endswith("run: held-out images and where each learned token looks.")
    assert page.row("held-out top-1, last epoch, %") == ["52.0"]
    assert page.row("training images/s, median") == ["150.0"]


def test_runs_in_one_folder_stand_side_by_side(tmp_path: Path) -> None:
    made_run(tmp_path / "a")
    made_run(tmp_path / "b", rows=epochs(start=55.0), lr=0.5)
    page = Page(write_report(tmp_path, images=0))
    assert page.row("learning rate") == ["0.001", "0.5"]
    assert page.row("held-out top-1, best epoch, %") == ["52.0", "57.0", "+5.0 points"]
    assert "Top-1 against training speed" in [text for _, text in page.all("figcaption")]
    assert "Left out, since images is 0." in page.problems


def test_of_many_runs_each_has_a_row(tmp_path: Path) -> None:
    for name in "abcde":
        made_run(tmp_path / name)
    page = Page(write_report(tmp_path, images=0))
    assert page.row("a")[0] == "vit_mini_patch4_28"
    heads = [text for attrs, text in page.all("th") if attrs.get("scope") == "col"]
    assert "held-out top-1, last epoch, %" in heads


def test_a_file_of_a_run_stands_for_its_folder(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    assert write_report(folder / "metrics.jsonl", images=0) == folder / "report.html"


def test_the_host_of_an_inserted_model_is_judged_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_model(create_model("vit_mini_patch4_28", **TINY), tmp_path / "host.safetensors")
    told = {"model": str(tmp_path / "host.safetensors"), "insert": 2}
    folder = made_run(tmp_path / "run")
    recipe = json.loads((folder / "train.json").read_text()) | told
    (folder / "train.json").write_text(json.dumps(recipe))
    models: dict[str, Any] = {"host": [], "2 learned tokens": epochs()}
    (folder / "metrics.json").write_text(json.dumps(contest(**models)))
    page = Page(write_report(folder, images=FEW))
    assert [text for _, text in page.all("h3")] == ["host", "2 learned tokens"]
    assert page.row("learned tokens") == ["2 inserted at 0.5"]


def test_a_name_has_one_color_in_all_charts(tmp_path: Path) -> None:
    models: dict[str, Any] = {"host": [], "tokens": epochs()}
    (tmp_path / "metrics.json").write_text(json.dumps(contest(**models)))
    page = Page(write_report(tmp_path))
    legends = [text for attrs, text in page.all("ul") if attrs.get("class") == "legend"]
    assert legends == ["tokens", "host tokens"]
    swatches = [attrs["class"] for attrs, _ in page.all("svg") if "aria-hidden" in attrs]
    assert swatches == ["c1", "c0", "c1"]


def test_contests_side_by_side_have_their_folders_names(tmp_path: Path) -> None:
    for name, start in (("a", 10.0), ("b", 20.0)):
        models: dict[str, Any] = {"host": [], "tokens": epochs(start=start)}
        made_run(tmp_path / name, rows=epochs(start=start))
        (tmp_path / name / "metrics.json").write_text(json.dumps(contest(**models)))
    found = read_source(tmp_path)
    assert [run.name for run in found.runs] == ["a: tokens", "b: tokens"]
    page = Page(write_report(tmp_path, images=0))
    assert "a/metrics.json" in [text for _, text in page.all("th")]


def test_a_run_that_is_not_the_contest_s_does_not_take_its_name(tmp_path: Path) -> None:
    made_run(tmp_path / "host", rows=epochs(start=1.0))
    models: dict[str, Any] = {"host": [], "tokens": epochs()}
    (tmp_path / "metrics.json").write_text(json.dumps(contest(**models)))
    assert [run.name for run in read_source(tmp_path).runs] == ["host/"]


BENCH: dict[str, Any] = {
    "command": "tokenlearner bench 'a' 'b+insert(8)'",
    "machine": {"cpu": "a fast one", "torch": "2.9.9", "accelerator": None},
    "read_gigabytes_per_second": 12.5,
    "config": {"models": ["a", "b+insert(8)"], "rounds": 3},
    "measurements": [{"name": "latency", "batch_size": 1, "unit": "ms"}],
    "models": [
        {
            "name": name,
            "parameters": 5_000_000,
            "gmacs": 4 / ratio,
            "macs_ratio": ratio,
            "peak_memory_mib": 3.5,
            "training_peak_memory_mib": None,
            "speeds": {
                "latency": {
                    "value": {"median": 8 / speed, "low": 7 / speed, "high": 9 / speed},
                    "speedup": {"median": speed, "low": 0.9 * speed, "high": 1.1 * speed},
                    "of_macs_ratio": speed / ratio,
                }
            },
        }
        for name, ratio, speed in (("a", 1.0, 1.0), ("b+insert(8)", 2.0, 1.6))
    ],
    "notes": ["b gains less."],
}


@pytest.fixture
def bench(tmp_path: Path) -> Page:
    (tmp_path / "speed.json").write_text(json.dumps(BENCH))
    path = write_report(tmp_path / "speed.json")
    assert path == tmp_path / "speed.html"
    return Page(path)


def test_a_bench_has_tables_of_what_is_counted_and_timed(bench: Page) -> None:
    assert bench.headings[:3] == ["What ran", "Results", "Speed against multiply-adds"]
    assert bench.row("b+insert(8)") == ["5.00", "2.000", "2.00", "3.500", "–"]
    cells = [text for _, text in bench.all("td")]
    timed = ["5.000 (4.375–5.625)", "1.60 (1.44–1.76)", "0.80"]
    assert cells[cells.index(timed[0]) :][:3] == timed
    assert bench.row("command") == [BENCH["command"]]
    assert "b gains less." in [text for _, text in bench.all("li")]
    assert bench.row("memory read, 1e9 bytes/s") == ["12.5"]
    assert bench.row("accelerator") == []


def test_a_bench_is_drawn_against_what_is_promised(bench: Page) -> None:
    [(_, told)] = bench.all("desc")
    what, _, points = told.partition(": ")
    assert what == "times as fast against times fewer multiply-adds"
    assert points == "a (1.000, 1.000); b+insert(8) (2.000, 1.600)."
    lines = [attrs for attrs, _ in bench.all("line") if attrs.get("class") == "diagonal"]
    assert len(lines) == 1


def test_a_comparison_shows_every_model_at_every_budget(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "compare.json").read_text())
    page = Page(write_report(RESULTS / "compare.json", tmp_path / "compare.html"))
    runs = [r for r in content["runs"] if (r["contender"], r["budget"]) == ("v11", "half")]
    tops = sorted(run["top1_percent"] for run in runs)
    assert page.row("v11")[0] == f"{tops[1]:.1f} ({tops[0]:.1f}–{tops[2]:.1f})"
    host = content["host"]["test_top1_percent"]
    assert page.row("v11")[1] == f"{tops[1] - host:+.2f}"
    assert len(page.all("table")) > len(content["costs"])
    speed = content["costs"]["half"]["host"]["1"]["images_per_second"]["median"]
    assert f"host ({number_text(1000 / speed)}, {host:.1f})" in page.all("desc")[0][1]


def test_rows_of_any_benchmark_are_a_table(tmp_path: Path) -> None:
    rows = [{"data": "x", "top1_percent": [1.0, 3.0, 2.0]}, {"data": "y", "odd": None}]
    (tmp_path / "one.json").write_text(json.dumps({"rows": rows, "command": "python one.py"}))
    page = Page(write_report(tmp_path / "one.json"))
    assert page.row("x") == ["2.000 (1.000–3.000)", "–"]
    assert page.row("y") == ["–", "–"]


# --- what is damaged or missing ---------------------------------------------------------------


def test_a_line_that_was_cut_off_is_named_and_the_rest_is_told(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 3, "train_')
    page = Page(write_report(folder, images=0))
    assert f"line 3 of {metrics} cannot be read" in page.problems
    assert page.row("held-out top-1, last epoch, %") == ["52.0"]


def test_rows_of_an_older_version_have_gaps(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": "odd", "test_loss": None}]
    page = Page(write_report(made_run(tmp_path / "run", rows=rows), images=0))
    assert page.row("epochs") == ["2"]
    assert page.row("held-out top-1, last epoch, %") == ["–"]
    charts = [text for attrs, text in page.all("figure") if attrs.get("class") == "chart"]
    assert [chart.split(",")[0] for chart in charts] == ["Training loss"]


def test_numbers_that_are_none_are_not_drawn(tmp_path: Path) -> None:
    rows = [*epochs(), {"epoch": 3, "train_loss": float("nan"), "train_seconds": float("inf")}]
    page = Page(write_report(made_run(tmp_path / "run", rows=rows), images=0))
    assert not [text for _, text in page.all("desc", "td", "text") if text in ("nan", "inf")]
    assert all("nan" not in text for _, text in page.all("desc"))
    assert "by time" not in " ".join(text for _, text in page.all("figcaption"))


def test_a_contest_of_an_older_version_has_gaps(tmp_path: Path) -> None:
    told = contest(a=epochs(), b=epochs(1)) | {"notes": "no list"}
    del told["environment"], told["models"][0]["top1_percent"]
    del told["models"][1]["cost"]["images_per_second"]
    (tmp_path / "metrics.json").write_text(json.dumps(told))
    page = Page(write_report(tmp_path))
    assert page.row("top-1 on held-out images, %") == ["–", "61.0", ""]
    assert page.row("images/s, inference") == ["100.0 (90.0–110.0)", "–", ""]
    assert not [attrs for attrs, _ in page.all("ul") if attrs.get("class") == "notes"]


def test_broken_files_beside_a_run_are_named(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    (folder / "metrics.json").write_text('{"models": [')
    (folder / "maps.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "train.json").write_text("[]")
    page = Page(write_report(folder, images=FEW))
    assert f"{folder / 'metrics.json'} cannot be read" in page.problems
    assert f"{folder / 'maps.png'} is no complete PNG file" in page.problems
    assert "train.json holds a list, expected a JSON object" in page.problems
    assert "Not shown for run" in page.problems
    assert not page.all("img")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": "hfds/some/set"}, "hfds/some/set may have to be fetched"),
        ({"data": "folder", "root": "nowhere"}, "nowhere is not there"),
        ({"img_size": 14}, "Input height (14)"),
    ],
)
def test_why_a_model_cannot_be_judged_is_said(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = made_run(tmp_path / "run")
    recipe = json.loads((folder / "train.json").read_text()) | changes
    (folder / "train.json").write_text(json.dumps(recipe))
    page = Page(write_report(folder, images=FEW))
    assert f"Not shown for run: {reason}" in page.problems
    assert not [text for _, text in page.all("h3")]


def test_a_run_without_weights_or_recipe_says_so(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    (folder / "model.safetensors").unlink()
    (folder / "train.json").unlink()
    page = Page(write_report(folder))
    assert "has no train.json" in page.problems
    assert "there is no" in page.problems
    left = ["What ran", "Results", "Learning curves", "Confusion matrix", "Environment"]
    assert page.headings == left


def test_a_run_without_an_epoch_is_told_of(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    page = Page(write_report(folder))
    assert page.row("finished") == ["no epoch yet"]
    assert page.headings == ["What ran", "Environment", "All options"]


@pytest.mark.parametrize("holds", [{}, {"metrics.json": "{"}, {"notes.json": "{}", "a.png": ""}])
def test_a_folder_of_nothing_known_is_refused(holds: dict[str, str], tmp_path: Path) -> None:
    for name, text in holds.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"holds nothing for a report.*looked for metrics.jsonl"):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*holds}


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        write_report(tmp_path / "nowhere")
    folder = made_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.html"):
        write_report(folder, tmp_path / "report.txt")
    (tmp_path / "x.html").mkdir()
    with pytest.raises(ValueError, match="which is a folder; name a file"):
        write_report(folder, tmp_path / "x.html")
    with pytest.raises(ValueError, match="images is -1, expected an integer of 0 or more"):
        ReportConfig("x", images=-1)
    assert not [*tmp_path.rglob("report.*")]


def test_a_report_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    first = write_report(folder, images=0).read_text()
    (folder / "metrics.jsonl").write_text(json.dumps(epochs(1, start=80.0)[0]))
    os.utime(folder / "metrics.jsonl", (0, 0))
    second = write_report(folder, images=0).read_text()
    assert "81.0" in second
    assert "81.0" not in first
    assert "1970-01-01 00:00 UTC" in second
    assert not [*folder.glob(".report*")]


# --- charts and matrices ----------------------------------------------------------------------


def chart(points: list[tuple[float, float]], **told: Any) -> Any:
    line = ChartLine("one", 0, [Mark(*point) for point in points])
    return drawn_chart(Chart("title", "x", "y", [line], **told))


def test_points_lie_where_their_numbers_are() -> None:
    drawn = chart([(0, 0), (5, 10), (10, 20)])
    [line] = drawn.lines
    a, b, c = line.dots
    assert drawn.left <= a.x < b.x < c.x <= drawn.right
    assert drawn.top <= c.y < b.y < a.y <= drawn.bottom
    assert b.x - a.x == pytest.approx(c.x - b.x, abs=0.2)
    ticks = {tick.text: tick.place for tick in drawn.x_ticks}
    assert ticks["10"] == c.x


@pytest.mark.parametrize("low", [0, 1, -3, 1e-6, 12345])
@pytest.mark.parametrize("width", [0, 1e-4, 0.37, 1, 99, 1e6])
def test_an_axis_has_some_numbers_that_differ(low: float, width: float) -> None:
    texts = [tick.text for tick in chart([(0, low), (1, low + width)]).y_ticks]
    assert 2 <= len(texts) <= 9
    assert len(set(texts)) == len(texts)


def test_epochs_are_whole_numbers() -> None:
    drawn = chart([(1, 3), (2, 4)], whole=True)
    assert [tick.text for tick in drawn.x_ticks] == ["1", "2"]


def test_a_spread_reaches_from_low_to_high() -> None:
    mark = Mark(5, 5, x_span=(4, 7), y_span=(5, 6))
    drawn = drawn_chart(Chart("t", "x", "y", [ChartLine("one", 0, [mark], joined=False)]))
    assert drawn is not None
    [line] = drawn.lines
    [dot] = line.dots
    across, up = dot.spreads
    assert line.points == ""
    assert across[0] < dot.x < across[2]
    assert across[1] == across[3] == dot.y
    assert (up[1], up[0], up[2]) == (dot.y, dot.x, dot.x)
    assert up[3] < dot.y


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart([]) is None


def test_a_dozen_lines_all_look_different() -> None:
    looks = [line_style(number) for number in range(12)]
    assert len({(look.color, look.shape) for look in looks}) == 12
    assert looks[0].dashes != looks[1].dashes


def test_the_colors_are_cividis() -> None:
    for share in np.linspace(0, 1, 41):
        ground, _ = cividis(float(share))
        shown = [int(ground[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert np.abs(np.array(shown) - colormaps["cividis"](share)[:3]).max() < 0.04


def test_the_ink_can_be_read_on_every_color() -> None:
    for share in np.linspace(-0.1, 1.1, 61):
        ground, ink = cividis(float(share))
        shown = np.array([int(ground[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
        light = float(linear @ [0.2126, 0.7152, 0.0722])
        contrast = (light + 0.05) / 0.05 if ink == "#000" else 1.05 / (light + 0.05)
        assert contrast >= 4.5


def test_a_matrix_has_shares_of_rows_and_lists_what_is_mistaken_most() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 4, 0], [5, 0, 0]])
    matrix = confusion_matrix("m", Confusions(counts, ("a", "b", "c"), "data, test", 17))
    assert [[cell.text for cell in row] for row in matrix.cells] == [
        ["75", "25", ""],
        ["", "100", ""],
        ["100", "", ""],
    ]
    assert matrix.cells[0][1].told == "2 of 8 of a taken for b"
    assert matrix.worst.rows == [["c taken for a", "5", "100"], ["a taken for b", "2", "25"]]
    assert matrix.remark == "17 images (data, test); 58.8 % are right."


def test_of_many_classes_those_that_are_mistaken_most_are_shown() -> None:
    counts = 10 * torch.eye(30, dtype=torch.int64)
    counts[29, 7] = 3
    names = tuple(f"class {i}" for i in range(30))
    matrix = confusion_matrix("m", Confusions(counts, names, "data, test", 303))
    assert len(matrix.names) == len(matrix.cells) == 20
    assert {"class 29", "class 7"} <= {*matrix.names}
    assert matrix.remark.endswith("Shown are the 20 of 30 classes mistaken most.")


def test_of_several_views_the_mean_is_judged() -> None:
    three = [[3.0, 0.0], [0.0, 2.0], [0.0, 2.0]]  # the largest logit and the first view say a
    views = torch.tensor([three, [[0.0, 1.0]] * 3, [[1.0, 0.0]] * 3])

    def batches(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield views[..., None, None], torch.tensor([1, 1, 0])

    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x.flatten(1)

    data: Any = SimpleNamespace(name="x", classes=("a", "b"), shape=(2, 1, 1), batches=batches)
    assert _confusion_counts(Judge(), data).tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0109, "0.01090"), (12.34, "12.3"), (1234.5, "1,234"), (304906, "304,906"),
     ("words", "words"), (True, "True")],
)  # fmt: skip
def test_numbers_have_the_digits_that_matter(value: object, text: str) -> None:
    assert number_text(value) == text


def test_a_spread_without_quartiles_is_its_median() -> None:
    assert spread_text({"median": 2.0}) == "2.000"
    assert spread_text({"median": 2.0, "low": 1.0, "high": 3.0}, 1) == "2.0 (1.0–3.0)"
    assert spread_text(None) == "–"
