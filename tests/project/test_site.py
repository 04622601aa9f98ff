"""The site of the documentation: it builds without a warning and fetches nothing."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from markdown_blocks import ROOT

from check_site import check_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None: ...


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(site: Path) -> None:
    assert check_site(site) == []
    assert len(list(site.rglob("*.html"))) > 25


@pytest.mark.slow
def test_pages_fetch_nothing_from_elsewhere_fit_a_phone_and_can_be_searched(site: Path) -> None:
    from browser import chromium, complaints, requested
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    with served(site) as address, chromium(500, 900) as browser:
        for page in sorted(site.rglob("*.html")):
            browser.get(f"{address}/{page.relative_to(site).as_posix()}")
            width = "return [document.documentElement.scrollWidth, window.innerWidth]"
            content, screen = browser.execute_script(width)
            assert content <= screen, page.name
            assert all(url.startswith(address) for url in requested(browser))
            assert complaints(browser) == []
        browser.get(f"{address}/index.html?q=calibrate")
        results = WebDriverWait(browser, 20).until(
            lambda b: b.find_elements(By.CSS_SELECTOR, ".md-search-result__item a")
        )
        assert any("distilling.html" in (link.get_attribute("href") or "") for link in results)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_on_the_pages_keeps_people_out(scheme: str, site: Path) -> None:
    from browser import barriers, chromium, prefer_scheme

    with served(site) as address, chromium() as browser:
        prefer_scheme(browser, scheme)
        for page in sorted(site.rglob("*.html")):
            browser.get(f"{address}/{page.relative_to(site).as_posix()}")
            assert barriers(browser) == [], page.name


# --- the tools ---------------------------------------------------------------------------------


def write_site(folder: Path, body: str) -> Path:
    (folder / "b.html").write_text("<h1 id='there'>B</h1>")
    (folder / "a.html").write_text(f"<html><body id='top'>{body}</body></html>")
    return folder


def test_a_sound_page_passes(tmp_path: Path) -> None:
    body = (
        "<a href='b.html#there'>b</a><a href='#top'>up</a><a href='/b.html'>absolute</a>"
        "<a href='https://arxiv.org/abs/2106.11297'>out</a><a href='mailto:a@b.c'>mail</a>"
        "<img src='data:image/png;base64,AA'>"
    )
    assert check_site(write_site(tmp_path, body)) == []


@pytest.mark.parametrize(
    ("body", "target"),
    [
        ("<a href='c.html'>c</a>", "c.html"),
        ("<img src='c.png'>", "c.png"),
        ("<a href='b.html#no'>b</a>", "b.html#no"),
        ("<a href='#no'>up</a>", "#no"),
        ("<script src='//x.org/a.js'></script>", "//x.org/a.js"),
        ("<link rel=stylesheet href='http://x.org/a'>", "http://x.org/a"),
        ("<style>@import 'https://x.org/a'</style>", "https://x.org/a"),
        ("<p style='background:url(https://x.org/a)'>", "https://x.org/a"),
    ],
)
def test_a_broken_page_is_named(body: str, target: str, tmp_path: Path) -> None:
    [problem] = check_site(write_site(tmp_path, body))
    assert problem.startswith("a.html ")
    assert target in problem
