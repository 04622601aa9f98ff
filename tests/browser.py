"""A headless Chromium for tests of pages: what it shows, asks the network for, complains of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "Chromium and its driver are missing; run apt-get install chromium chromium-driver"


@contextmanager
def chromium(width: int = 1200, height: int = 900, *flags: str) -> Iterator[webdriver.Chrome]:
    """Starts the browser; CI has to have one, elsewhere the test is skipped without."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, *flags, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def requested(browser: webdriver.Chrome) -> list[str]:
    """The addresses that pages asked for since the last call, without those inside the page."""
    events = (json.loads(row["message"])["message"] for row in browser.get_log("performance"))
    sent = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    return [url for url in sent if urlsplit(url).scheme not in ("data", "blob")]


def prefer_scheme(browser: webdriver.Chrome, scheme: str) -> None:
    """Lets pages think that the user prefers `"light"` or `"dark"`."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What went wrong on the page since the last call, as its console tells."""
    rows = browser.get_log("browser")
    return [row["message"] for row in rows if row["level"] in ("SEVERE", "WARNING")]


def barriers(browser: webdriver.Chrome) -> list[str]:
    """What on the page keeps people out, as axe finds it: contrast, names, alt texts, headings."""
    still = "*, ::before, ::after {transition: none !important}"  # colors are the last ones at once
    browser.execute_script(
        "document.head.append(Object.assign(document.createElement('style'), {textContent: "
        "arguments[0]}))",
        still,
    )
    script = files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
    browser.execute_script(script)
    run = "axe.run(document, {resultTypes: ['violations']}).then(arguments[arguments.length - 1])"
    return [
        f"{rule['id']}: {rule['help']}: {node['html'][:200]} {node['target']}"
        for rule in browser.execute_async_script(run)["violations"]
        for node in rule["nodes"]
    ]


def shoot_page(browser: webdriver.Chrome, path: Path, width: int = 1200) -> None:
    """Writes the whole page as a PNG, however long it is."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.set_window_size(width, int(height) + 150)
    assert browser.save_screenshot(str(path))
