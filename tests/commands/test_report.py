"""The report: its content for each kind of source, and a page that is whole, safe and readable."""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib.metadata import version
from itertools import dropwhile, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import barriers, chromium, complaints, prefer_scheme, requested
from PIL import Image
from torch import nn

from tokenlearner import TrainConfig, create_model, evaluate, load_data, load_model, save_model
from tokenlearner.commands.main import main
from tokenlearner.commands.report.confusion import Confusions, confusion_counts, reevaluate
from tokenlearner.commands.report.figures import percent
from tokenlearner.commands.report.reader import Run, read_source
from tokenlearner.commands.report.render import ReportConfig, write_report
from tokenlearner.commands.report.tables import value_text
from tokenlearner.models.preprocessing import Preprocessing, get_preprocessing, set_preprocessing

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 7}
FEW = 40  # images that a model is evaluated on
COMPARED = ROOT / "benchmarks" / "results" / "compare.json"
VOID = {"meta", "link", "img", "br"}
EVIL = '<script>alert("x")</script>'


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

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, *tags: str, **having: str) -> list[tuple[dict[str, str | None], str]]:
        elements = ((attrs, "".join(texts)) for tag, attrs, texts in self.elements if tag in tags)
        return [(a, " ".join(text.split())) for a, text in elements if having.items() <= a.items()]

    def texts(self, *tags: str, **having: str) -> list[str]:
        return [text for _, text in self.all(*tags, **having)]

    def row(self, label: str) -> list[str]:
        """The cells of the first row that starts with a label."""
        cells = (element for element in self.elements if element[0] in ("tr", "th", "td"))
        row = dropwhile(
            lambda cell: (cell[1].get("scope"), "".join(cell[2])) != ("row", label), cells
        )
        return ["".join(texts) for _, _, texts in takewhile(lambda cell: cell[0] != "tr", row)][1:]

    @property
    def figures(self) -> list[str]:
        """The alternative texts of drawings."""
        return [str(attrs["aria-label"]) for attrs, _ in self.all("div", role="img")]

    @property
    def problems(self) -> str:
        return " ".join(self.texts("ul", **{"class": "problems"}))


def epochs(n: int = 2, start: float = 50.0) -> list[dict[str, Any]]:
    return [
        {
            "epoch": i,
            "train_loss": 2.0 / i,
            "train_seconds": 1.5,
            "images_per_second": 100.0 * i,
            "test_loss": 2.5 / i,
            "test_top1_percent": start + i,
            "test_top5_percent": 90.0 + i,
        }
        for i in range(1, n + 1)
    ]


def make_run(folder: Path, tokens: int = 0, rows: list[Any] | None = None, **options: Any) -> Path:
    """Writes a run as `train` leaves it, of a model that has not learned anything."""
    folder.mkdir(parents=True)
    config = TrainConfig(out=str(folder), model_kwargs=TINY, num_tokens=tokens, epochs=2)
    (folder / "train.json").write_text(json.dumps({**asdict(config), **options}))
    lines = [json.dumps(row) for row in (epochs() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    save_model(create_model("vit_mini_patch4_28", num_tokens=tokens, **TINY), folder)
    return folder


def comparison(**models: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what `demo` of version 0.3 wrote to metrics.json: models, by name their epochs."""
    rows = []
    for i, (name, history) in enumerate(models.items()):
        speed = 100.0 + i
        timing = {"median": speed, "low": 0.9 * speed, "high": 1.1 * speed}
        cost = {"images_per_second": timing, "training_images_per_second": timing}
        cost |= {"parameters": 1000, "gmacs": 2 / speed, "peak_memory_mib": 5.0}
        rows += [{"name": name, "top1_percent": 60.0 + i, "cost": cost, "epochs": history}]
    config = {"out": "x", "tokens": 2, "at": 0.5, "epochs": 2, "seed": 3}
    environment = {"torch": "2.9.9", "threads": 7}
    return {"config": config, "environment": environment, "models": rows, "notes": ["A note."]}


def write_comparison(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes figures empty, for tests that look at everything else."""
    monkeypatch.setattr("tokenlearner.commands.report.figures._svg", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    make_run(out / "vit")
    make_run(out / "vit-tl2", tokens=2, rows=epochs(start=60.0))
    write_comparison(out, comparison(**{"ViT": epochs(), "ViT on tokens": epochs(start=60.0)}))
    Image.new("RGB", (40, 20), (9, 99, 199)).save(out / "maps-clothes.png")
    write_report(out, images=FEW)
    return out


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return Page(demo / "report.html")


# --- the demo ---------------------------------------------------------------------------------


def test_the_report_of_the_demo_has_every_section_and_the_numbers_of_the_files(page: Page) -> None:
    assert page.texts("h2") == [
        *("What ran", "Results", "Learning curves", "Accuracy against speed"),
        *("Where the learned tokens look", "Confusion matrix", "Environment", "All options"),
    ]
    assert page.problems == ""
    assert page.texts("th", scope="col")[:2] == ["ViT", "ViT on tokens"]
    assert page.row("learned tokens") == ["–", "2 learned at 0.5"]
    assert page.row("command") == ["tokenlearner demo --tokens 2 --at 0.5 --epochs 2 --seed 3"]
    assert page.row("top-1 on held-out images, %") == ["60.0", "61.0", "+1.0 points"]
    assert page.row("images/s, inference") == ["100.0 (90.0–110.0)", "101.0 (90.9–111.1)", "1.01"]
    assert page.row("seconds of training") == ["3.000", "3.000", "1.00"]
    assert "A note." in page.texts("li")
    assert page.row("timm") == [version("timm")]
    curves, [inference, _, *matrices] = page.figures[:6], page.figures[6:]
    assert "ViT from (1, 2.000) to (2, 1.000)" in curves[0]
    assert "ViT on tokens from (1.500, 61.0) to (3.000, 62.0)" in curves[5]
    assert "held-out top-1, % against images/s, inference: ViT (100.0, 60.0); ViT on" in inference
    assert len(matrices) == 2
    assert all("Ankle boot" in text for text in matrices)


def test_maps_are_kept_and_the_matrix_is_that_of_the_model(page: Page, demo: Path) -> None:
    [(attrs, _)] = page.all("img")
    head, _, data = str(attrs["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert b64decode(data) == (demo / "maps-clothes.png").read_bytes()
    images = load_data("fashion-mnist-small", "test").sample(FEW, 0)
    remarks = [text for text in page.texts("p") if "are right" in text]
    for folder, remark in zip(("vit", "vit-tl2"), remarks, strict=True):
        model: Any = load_model(demo / folder)
        found: Any = get_preprocessing(model, 1)
        taken = images.with_preprocessing(**found.to_kwargs())
        right = evaluate(model, taken).top1_percent
        assert f"{FEW} images of 2,000, drawn by a seed" in remark
        assert f"{right:.1f} % are right" in remark


@pytest.mark.slow
def test_the_same_folder_gives_the_same_report(demo: Path, tmp_path: Path) -> None:
    again = write_report(demo, tmp_path / "again.html", images=FEW)
    assert again.read_bytes() == (demo / "report.html").read_bytes()  # on the same machine


# --- the page ---------------------------------------------------------------------------------


def test_the_page_holds_all_it_needs_and_forbids_the_rest(page: Page) -> None:
    for _, attrs, _ in page.elements:
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert str(attrs.get(name) or "#").startswith(("data:", "#"))
    assert not [word for word in ("url(", "@import") if word in page.source]
    assert not page.all("script", "iframe", "object", "foreignobject")
    [policy] = [attrs for attrs, _ in page.all("meta") if "http-equiv" in attrs]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_can_be_read_without_seeing_it(page: Page) -> None:
    assert page.all("html")[0][0]["lang"] == "en"
    assert all(attrs.get("alt") for attrs, _ in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs, _ in page.all("th"))
    legends = page.all("span", **{"aria-hidden": "true"})
    assert len(page.all("svg")) == len(page.figures) + len(legends) == 10 + 4
    ids = Counter(attrs["id"] for _, attrs, _ in page.elements if attrs.get("id"))
    assert max(ids.values()) == 1
    links = {str(attrs["href"])[1:] for attrs, _ in page.all("a")}
    assert links == {attrs["id"] for attrs, _ in page.all("section")} <= {*ids}


def luminance(color: str) -> float:
    """Of a CSS color, `rgb(9, 99, 199)`."""
    values = np.array([int(part.strip(" rgb()")) for part in color.split(",")]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.slow
def test_chromium_renders_it_at_every_width_in_light_and_dark_without_a_request(demo: Path) -> None:
    """Texts and lines of figures, whose colors are the page's, have contrast too."""
    address = (demo / "report.html").as_uri()
    script = """
      const color = (query, name) => getComputedStyle(document.querySelector(query))[name];
      return [color("body", "backgroundColor"), color("body", "color"),
              color(".chart svg text", "fill"), color(".matrix svg text", "fill"),
              color(".chart svg use", "fill")];
    """
    with chromium() as browser:
        for width in (1200, 390):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(address)
            assert requested(browser) == [address]
            assert complaints(browser) == []
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            widths = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
            assert widths == [40]
        for scheme, is_light in (("light", True), ("dark", False)):
            prefer_scheme(browser, scheme)
            assert barriers(browser) == []
            ground, *inks = map(luminance, browser.execute_script(script))
            assert (ground > 0.5) == is_light
            for ink in inks:
                low, high = sorted((ground, ink))
                assert (high + 0.05) / (low + 0.05) >= 4.5


# --- what users write -------------------------------------------------------------------------


def test_names_of_classes_models_and_options_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "<b>run", teacher=EVIL)
    write_comparison(folder, comparison(**{EVIL: epochs(1), "b": epochs(3)}) | {"notes": [EVIL]})
    whole = load_data("fashion-mnist-small", "test").sample(FEW)
    evil = replace(whole, classes=(EVIL, "$x^2$ -->", "靴", "no \udce9", *whole.classes[4:]))
    monkeypatch.setattr("tokenlearner.data.factory.load_data", lambda *a, **k: evil)
    page = Page(write_report(folder, title=f"{EVIL} title", images=FEW))
    assert not page.all("script", "b")
    assert page.texts("h1") == [f"{EVIL} title"]
    assert page.row("teacher") == [EVIL]
    assert {EVIL, "$x^2$ -->", "靴", "no ?"} <= {*page.texts("text")}
    assert EVIL in page.figures[-1]
    assert all(EVIL in page.texts(tag) for tag in ("li", "th"))


# --- other sources ----------------------------------------------------------------------------


@pytest.mark.usefixtures("sketches")
def test_a_run_with_tokens_gets_maps_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tokens=2)
    assert write_report(folder / "metrics.jsonl", images=FEW) == folder / "report.html"
    page = Page(folder / "report.html")
    assert page.texts("h2")[3:5] == ["Where the learned tokens look", "Confusion matrix"]
    [(attrs, _)] = page.all("img")
    assert str(attrs["alt"]).endswith("run: held-out images and where each learned token looks.")
    assert page.row("held-out top-1, last epoch, %") == ["52.0"]
    assert page.row("training images/s, median") == ["150.0"]


def test_the_matrix_is_of_images_as_the_model_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says is right is what `eval` says."""
    folder = make_run(tmp_path / "run")
    model: Any = load_model(folder)
    set_preprocessing(model, Preprocessing((0.3,), (0.01,)))
    save_model(model, folder)
    main(["eval", str(folder), "--device", "cpu"])
    [top1] = re.findall(r"top1_percent: ([0-9.]+)", capsys.readouterr().out)
    reevaluated = reevaluate(Run("run", folder), 2000, "cpu", draw=False).confusions
    assert reevaluated is not None
    assert reevaluated.remark.endswith(f" {float(top1):.1f} % are right.")


def test_a_matrix_and_the_table_beside_it_round_alike() -> None:
    """Half a percent: 51, 37 and 35 of 200."""
    assert [percent(count / 200) for count in (51, 37, 35)] == ["26", "19", "18"]
    counts = torch.tensor([[163, 37], [35, 165]])
    found = Confusions("m", counts, ("a", "b"), "data, test", 400)
    assert [row[2] for row in found.most_frequent.rows] == ["19", "18"]
    cells = re.findall(r">(\d+)<", re.sub(r"</?tspan[^>]*>", "", found.svg("x")))
    assert {"19", "18"} <= {*cells}


@pytest.mark.usefixtures("sketches")
def test_speeds_of_clips_are_of_clips(tmp_path: Path) -> None:
    make_run(tmp_path / "run", data="video-folder")
    make_run(tmp_path / "other", data="moving-photographs")
    page = Page(write_report(tmp_path, images=FEW))
    assert page.row("training clips/s, median") == ["150.0", "150.0", "1.00"]
    assert "images/s" not in page.source
    make_run(tmp_path / "mixed")
    page = Page(write_report(tmp_path, images=FEW))
    assert "training images or clips/s, median" in page.source
    content = comparison(ViT=epochs(), other=epochs())
    content["config"]["data"] = "video-folder"
    page = Page(write_report(write_comparison(tmp_path / "compared", content), images=FEW))
    assert page.row("GMACs a clip")
    assert "images/s" not in page.source


@pytest.mark.usefixtures("sketches")
def test_runs_in_one_folder_are_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", rows=epochs(start=55.0), lr=0.5)
    page = Page(write_report(tmp_path, images=0))
    assert page.row("learning rate") == ["0.001", "0.5"]
    assert page.row("held-out top-1, best epoch, %") == ["52.0", "57.0", "+5.0 points"]
    assert "Top-1 against training speed" in page.texts("figcaption")
    assert "images is 0" in page.problems
    for name in "cde":
        make_run(tmp_path / name)
    page = Page(write_report(tmp_path, images=0))
    assert page.row("a")[0] == "vit_mini_patch4_28"
    assert "held-out top-1, last epoch, %" in page.texts("th", scope="col")


def test_the_host_of_an_inserted_model_is_evaluated_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    host = tmp_path / "host.safetensors"
    save_model(create_model("vit_mini_patch4_28", **TINY), host)
    folder = make_run(tmp_path / "run", model=str(host), insert=2)
    write_comparison(folder, comparison(**{"host": [], "2 learned tokens": epochs()}))
    page = Page(write_report(folder, images=FEW))
    assert page.texts("h3") == ["host", "2 learned tokens"]
    assert page.row("learned tokens") == ["2 inserted at 0.5"]


def test_a_host_that_a_stranger_s_run_names_is_read_beside_it_only(tmp_path: Path) -> None:
    host = tmp_path / "mine" / "host.safetensors"
    save_model(create_model("vit_mini_patch4_28", **TINY), host)
    folder = make_run(tmp_path / "theirs" / "run", model=str(host), insert=2)
    page = Page(write_report(folder, images=FEW))
    assert "host of run: " in page.problems
    assert "lies outside" in page.problems
    assert page.texts("h3") == ["run"]


@pytest.mark.usefixtures("sketches")
def test_runs_have_the_names_of_their_comparison(tmp_path: Path) -> None:
    """By the folder that is recorded; of version 0.3 by the metrics."""
    one, two = tmp_path / "one", tmp_path / "two"
    content = comparison(host=epochs(1), tokens=epochs())
    for name in ("a", "b"):
        make_run(one / name, rows=epochs(1, start=7.0))
    make_run(one / "host", rows=epochs(start=1.0))
    write_comparison(one, content)
    assert [run.name for run in read_source(one).runs] == ["a", "b", "host/"]
    content["models"][1]["run"] = "b"
    write_comparison(one, content)
    assert [run.name for run in read_source(one).runs] == ["tokens", "a", "host/"]
    for name, start in (("a", 10.0), ("b", 20.0)):  # side by side
        folder = make_run(two / name, rows=epochs(start=start))
        write_comparison(folder, comparison(host=[], tokens=epochs(start=start)))
    assert [run.name for run in read_source(two).runs] == ["a: tokens", "b: tokens"]
    assert "a/metrics.json" in Page(write_report(two, images=0)).texts("th")


def bench(name: str, ratio: float, speed: float) -> dict[str, Any]:
    """Returns a model of what `bench` writes."""
    value = {"median": 8 / speed, "low": 7 / speed, "high": 9 / speed}
    speedup = {"median": speed, "low": 0.9 * speed, "high": 1.1 * speed}
    counted = {"parameters": 5_000_000, "gmacs": 4 / ratio, "macs_ratio": ratio}
    counted |= {"peak_memory_mib": 3.5, "training_peak_memory_mib": None}
    latency = {"value": value, "speedup": speedup, "of_macs_ratio": speed / ratio}
    return {"name": name, **counted, "speeds": {"latency": latency}}


def test_a_bench_has_tables_and_a_chart(tmp_path: Path) -> None:
    content = {
        "command": "tokenlearner bench 'a' 'b+insert(8)'",
        "machine": {"cpu": "a fast one", "torch": "2.9.9", "accelerator": None},
        "read_gigabytes_per_second": 12.5,
        "config": {"models": ["a", "b+insert(8)"], "rounds": 3},
        "measurements": [{"name": "latency", "batch_size": 1, "unit": "ms"}],
        "models": [bench("a", 1.0, 1.0), bench("b+insert(8)", 2.0, 1.6)],
        "notes": ["b gains less."],
    }
    (tmp_path / "speed.json").write_text(json.dumps(content))
    assert write_report(tmp_path / "speed.json") == tmp_path / "speed.html"
    page = Page(tmp_path / "speed.html")
    assert page.texts("h2")[:3] == ["What ran", "Results", "Speed against multiply-adds"]
    assert page.row("b+insert(8)") == ["5.00", "2.000", "2.00", "3.500", "–"]
    assert {"5.000 (4.375–5.625)", "1.60 (1.44–1.76)", "0.80"} <= {*page.texts("td")}
    assert page.row("command") == [content["command"]]
    assert "b gains less." in page.texts("li")
    assert page.row("memory read, 1e9 bytes/s") == ["12.5"]
    assert page.row("accelerator") == []
    [text] = page.figures
    assert "times as fast against times fewer multiply-adds: a (1.000, 1.000); b+insert" in text
    rows = [{"data": "x", "top1_percent": [1.0, 3.0, 2.0]}, {"data": "y", "odd": None}]
    (tmp_path / "one.json").write_text(json.dumps({"rows": rows, "command": "python one.py"}))
    page = Page(write_report(tmp_path / "one.json"))  # of any benchmark
    assert (page.row("x"), page.row("y")) == (["2.000 (1.000–3.000)", "–"], ["–", "–"])


@pytest.mark.usefixtures("sketches")
def test_a_run_and_the_option_of_version_0_3_are_read(tmp_path: Path) -> None:
    run, path = ROOT / "tests" / "version_0_3" / "run", tmp_path / "r.html"
    for option in (["--pictures", "0"], ["--pictures=0"]):
        main(["report", str(run), "--out", str(path), *option])
        page = Page(path)
        assert "images is 0" in page.problems
        assert (page.row("epochs")[0] in ("1", "2"), page.row("model") != ["–"]) == (True, True)


# --- what is damaged or missing ---------------------------------------------------------------


def test_damaged_rows_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [*epochs(), {"epoch": 3, "train_loss": nan, "train_seconds": inf}]
    rows += [{"epoch": 4, "train_loss": "odd", "test_loss": None}]
    rows += [{"epoch": 5, "train_loss": 1e308}, {"epoch": 6, "train_loss": 10**400}]
    folder = make_run(tmp_path / "run", rows=rows)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 7, "train_')
    page = Page(write_report(folder, images=0))
    assert "line 7 of run/metrics.jsonl cannot be read" in page.problems
    best, last = (page.row(f"held-out top-1, {which} epoch, %") for which in ("best", "last"))
    assert (best, last) == (["52.0"], ["–"])
    assert not [text for text in page.texts("td", "text") if text in ("nan", "inf")]
    assert "from (1, 2.000) to (2, 1.000)" in page.figures[0]
    assert not [text for text in page.texts("figcaption") if "by time" in text]


@pytest.mark.usefixtures("sketches")
def test_a_comparison_of_an_older_version_has_gaps(tmp_path: Path) -> None:
    content: dict[str, Any] = comparison(a=epochs(), b=epochs(1)) | {"notes": "no list"}
    del content["environment"], content["models"][0]["top1_percent"]
    del content["models"][1]["cost"]["images_per_second"]
    page = Page(write_report(write_comparison(tmp_path, content)))
    assert page.row("top-1 on held-out images, %") == ["–", "61.0", ""]
    assert page.row("images/s, inference") == ["100.0 (90.0–110.0)", "–", ""]


@pytest.mark.usefixtures("sketches")
def test_broken_and_missing_files_of_a_run_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "maps-linked.png").symlink_to(tmp_path / "secret.png")
    (folder / "maps-loop.png").symlink_to("maps-loop.png")
    for name in ("maps-pipe.png", "results.json", "x.json", "table.txt"):
        os.mkfifo(folder / name)
    (folder / "metrics.json").write_text('{"models": [')
    (folder / "maps.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "train.json").write_text("[]")
    page = Page(write_report(folder, images=FEW))
    for problem in (
        "run/metrics.json cannot be read",
        "run/maps.png is no complete PNG file",
        "run/maps-linked.png is a link out of the folder",
        "run/maps-loop.png is no complete PNG file",
        "run/maps-pipe.png is no complete PNG file",
        "run/results.json cannot be read (it is a pipe",
        "train.json holds a list, expected a JSON object",
        "Missing for run",
    ):
        assert problem in page.problems
    assert not page.all("img")
    folder = make_run(tmp_path / "other")
    (folder / "model.safetensors").unlink()
    options = (folder / "train.json").rename(tmp_path / "train.json")
    page = Page(write_report(folder))
    assert all(text in page.problems for text in ("has no train.json", "there is no"))
    assert page.row("held-out top-1, last epoch, %") == ["52.0"]
    options.rename(folder / "train.json")
    (folder / "metrics.jsonl").unlink()
    page = Page(write_report(folder))
    assert page.row("finished") == ["no epoch yet"]
    assert page.texts("h2") == ["What ran", "Environment", "All options"]


def test_why_a_model_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    reasons: dict[str, dict[str, Any]] = {
        "hfds/some/set may have to be fetched": {"data": "hfds/some/set"},
        "/nowhere; pass --root, or correct it in that file": {"data": "folder", "root": "nowhere"},
        "Input height (14)": {"img_size": 14},
    }
    for i, (reason, changes) in enumerate(reasons.items()):
        [run] = read_source(make_run(tmp_path / str(i), **changes)).runs
        result = reevaluate(run, FEW, "cpu", draw=False)
        assert result.confusions is None
        [problem] = result.problems
        assert problem.startswith(f"{i}: ")
        assert reason in problem


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for folder, name in (("x.html", "a.png"), ("damaged", "metrics.json"), ("other", "notes.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}" if folder == "other" else "{")
    before = {*tmp_path.rglob("*")}
    for source, out, message in (
        ("nowhere", None, "nowhere"),
        ("x.html", None, r"nothing for a report.*metrics\.jsonl"),
        ("damaged", None, r"nothing for a report.*metrics\.jsonl"),
        ("other", None, r"nothing for a report.*metrics\.jsonl"),
        ("run", "report.txt", r"out is .*report\.txt"),
        ("run", "x.html", r"out is .*x\.html"),
        (COMPARED, "y.html", r"compare\.json.*benchmarks/compare_report\.py"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / source, out and tmp_path / out)
    with pytest.raises(ValueError, match="images is -1"):
        ReportConfig("x", images=-1)
    assert {*tmp_path.rglob("*")} == before


# --- figures and matrices ---------------------------------------------------------------------


def test_a_matrix_has_shares_of_rows_of_the_classes_with_the_most_mistakes() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 4, 0], [5, 0, 0]])
    matrix = Confusions("m", counts, ("a", "b", "c"), "data, test", 17)
    rows = [["c taken for a", "5", "100"], ["a taken for b", "2", "25"]]
    assert matrix.most_frequent.rows == rows
    assert matrix.remark == "17 images (data, test); 58.8 % are right."
    assert matrix.description.endswith("a 75 %, b 100 %, c 0 %.")
    matrix = Confusions("m", 10 * torch.eye(30).long(), (*map(str, range(30)),), "data, test", 303)
    matrix.counts[29, 7] = 3
    assert matrix.shares.shape == (20, 20)
    assert {29, 7} <= {*matrix.selected}


def test_the_mean_of_several_views_is_evaluated() -> None:
    three = [[3.0, 0.0], [0.0, 2.0], [0.0, 2.0]]  # the largest logit and the first view say a
    views = torch.tensor([three, [[0.0, 1.0]] * 3, [[1.0, 0.0]] * 3])

    def batches(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield views[..., None, None], torch.tensor([1, 1, 0])

    same = nn.Conv2d(2, 2, 1, bias=False)
    nn.init.dirac_(same.weight)
    data: Any = SimpleNamespace(name="x", classes=("a", "b"), shape=(2, 1, 1), batches=batches)
    assert confusion_counts(nn.Sequential(same, nn.Flatten()), data).tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0109, "0.01090"), (12.34, "12.3"), (1234.5, "1,234"), (304906, "304,906"),
     ({"median": 2.0}, "2.000"), ({"median": 2.0, "low": 1.0, "high": 3.0}, "2.000 (1.000–3.000)"),
     ("words", "words"), (True, "True")],
)  # fmt: skip
def test_numbers_have_the_digits_that_matter(value: object, text: str) -> None:
    assert value_text(value) == text
