"""The page in a real Chromium: upload, choose, see maps, bad files, keyboard only, no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints, requested
from selenium.webdriver.support.wait import WebDriverWait
from test_app import MINI, written
from test_app_uploads import make_image, make_video, png_of
from tiny import randomized

from tokenlearner import create_model, save_model
from tokenlearner.commands.app.page import TITLE

pytestmark = pytest.mark.slow
pytest.importorskip("gradio")

SECONDS = 60  # until something has to be seen
SEEN = "return document.body.innerText"
# Says whom it connects to or asks for, but for itself.
SERVER = """
import sys

def told(event, args):
    if event == "socket.connect" and str(args[1][0]) not in ("127.0.0.1", "::1"):
        print("connects", args[1], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and str(args[0]) not in ("127.0.0.1", "localhost", "None"):
        print("looks up", args[0], file=sys.stderr, flush=True)

sys.addaudithook(told)
from tokenlearner.commands.app.server import AppConfig, app

app(AppConfig(sys.argv[1:], max_upload_mib=1, max_pixels=1_000_000))
"""


@contextmanager
def server(room: Path, *models: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A page in a process of its own, whose temporary files are in a folder; and its address."""
    room.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *map(str, models)],
        env=os.environ | {"TMPDIR": str(room)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=room.parent,
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("The page is at http://127.0.0.1:"), process.communicate()
            yield line.split()[4], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page with a model of images, one of clips and one without learned tokens."""
    root = tmp_path_factory.mktemp("models")
    written(root / "learned", 4)
    written(root / "plain", 0)
    model = create_model("vivit_mini_patch8x2_32", num_tokens=3, depth=2, in_chans=1)
    save_model(randomized(model), root / "clips")
    paths = [root / name for name in ("learned", "plain", "clips")]
    with server(root / "room", *paths) as (found, _):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(address: str, browser: Any) -> Any:
    """The page, once it has looked at its first example and measured it."""
    browser.get("about:blank")  # Gradio complains of requests that end as its page is left
    complaints(browser), requested(browser)
    browser.get(address)
    until(browser, lambda text: "Measured now" in text)
    return browser


def until(browser: Any, holds: Callable[[str], bool]) -> str:
    """Waits until the page's text is as it should be."""
    end, text = time.monotonic() + SECONDS, ""
    while time.monotonic() < end:
        text = browser.execute_script(SEEN)
        if holds(text):
            return text
        time.sleep(0.1)
    raise AssertionError(f"still not as expected after {SECONDS} s:\n{text}")


def status(browser: Any) -> str:
    return browser.execute_script("return document.getElementById('tl-status').innerText").strip()


def upload(browser: Any, path: Path) -> None:
    browser.find_element("css selector", "#tl-file input[type=file]").send_keys(str(path))


def choose(browser: Any, label: str, value: str) -> None:
    """Chooses in a list, whose options have no text until it has faded in."""

    def shown(browser: Any) -> Any:
        options = browser.find_elements("css selector", "[role=option]")
        return next((one for one in options if one.text.strip().endswith(value)), None)

    browser.find_element("css selector", f"input[aria-label='{label}']").click()
    WebDriverWait(browser, SECONDS).until(shown).click()


def alts(browser: Any) -> list[str | None]:
    tags = browser.find_elements("tag name", "img")
    return [tag.get_attribute("alt") for tag in tags]


def press(browser: Any, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def focused(browser: Any) -> tuple[str, str]:
    """What the keyboard is at: its role or kind, and its name or value."""
    return tuple(
        browser.execute_script(
            "const e = document.activeElement;"
            "return [e.getAttribute('role') || e.type || e.tagName,"
            " e.getAttribute('aria-label') || e.value || e.innerText || '']"
        )
    )


def tab_to(browser: Any, kind: str, name: str) -> None:
    for _ in range(40):
        press(browser, "\ue004")
        if focused(browser) == (kind, name):
            return
    raise AssertionError(f"Tab does not lead to {kind} {name!r}")


# --- images and clips -------------------------------------------------------------------------


def test_an_example_is_shown_with_prediction_maps_numbers_and_cost_at_once(page: Any) -> None:
    text = page.execute_script(SEEN)
    for title in ("Where all tokens look", "Prediction", "All tokens", "In numbers", "Cost"):
        assert title in text
    assert "with learned tokens" in text


def test_an_image_that_is_uploaded_is_looked_at(page: Any, tmp_path: Path) -> None:
    upload(page, make_image(tmp_path / "mine.jpg"))
    until(page, lambda text: "mine.jpg: learned says" in text)
    assert "mine.jpg, as the model gets it: 28 × 28 pixels." in alts(page)


def test_another_token_shows_another_map(page: Any) -> None:
    page.find_element("css selector", "input[type=radio][value='3']").click()
    until(page, lambda text: "Where token 3 looks" in text)
    assert any((alt or "").startswith("Map of token 3 over the image.") for alt in alts(page))


def test_another_model_looks_at_the_same_image(page: Any, tmp_path: Path) -> None:
    upload(page, make_image(tmp_path / "mine.jpg"))
    until(page, lambda text: "mine.jpg: learned says" in text)
    choose(page, "Model", "plain")
    text = until(page, lambda text: "mine.jpg: plain says" in text)
    assert "This model has no learned tokens, so there are no maps." in text


def test_another_example_is_looked_at(page: Any) -> None:
    choose(page, "Or an example", "Bag")
    until(page, lambda text: "its label is Bag" in text)


def test_a_clip_is_looked_at_frame_by_frame(page: Any, tmp_path: Path) -> None:
    choose(page, "Model", "clips")
    until(page, lambda text: "clips says" in text or "choose a clip" in text)
    upload(page, make_video(tmp_path / "mine.mp4"))
    until(page, lambda text: "mine.mp4, frame 1 of 8" in text)
    field = page.find_element("css selector", "input[type=number]")
    field.clear()
    field.send_keys("5\ue007")
    until(page, lambda text: "mine.mp4, frame 5 of 8" in text)


def test_the_cost_is_measured_again_when_asked_for(page: Any) -> None:
    before = page.execute_script(SEEN).partition("Cost")[2]
    [button] = [b for b in page.find_elements("tag name", "button") if "again" in b.text]
    button.click()
    until(page, lambda text: text.partition("Cost")[2] not in ("", before))


# --- what is refused ----------------------------------------------------------------------------


def test_a_broken_file_gives_a_message_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    upload(page, tmp_path / "broken.png")
    text = until(page, lambda text: "broken.png starts like PNG, but cannot be read" in text)
    assert "Traceback" not in text
    choose(page, "Or an example", "Bag")
    until(page, lambda text: "its label is Bag" in text)


def test_a_file_that_is_too_large_is_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(3 * 2**20))
    upload(page, tmp_path / "large.png")
    until(page, lambda text: "large.png has 3.0 MiB, 1 are allowed" in text)


def test_a_file_that_is_very_large_is_cut_off_and_the_page_goes_on(
    page: Any, tmp_path: Path
) -> None:
    (tmp_path / "huge.png").write_bytes(bytes(9 * 2**20))
    upload(page, tmp_path / "huge.png")
    until(page, lambda text: "maximum allowed size" in text)
    choose(page, "Or an example", "Bag")
    until(page, lambda text: "its label is Bag" in text)


def test_a_decompression_bomb_is_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(50_000, 50_000))
    upload(page, tmp_path / "bomb.png")
    until(page, lambda text: "bomb.png has more than the 1 million pixels" in text)


def test_the_name_of_a_file_is_shown_and_not_run(page: Any, tmp_path: Path) -> None:
    upload(page, make_image(tmp_path / "<img src=x onerror=alert(1)>${1+1}.png"))
    until(page, lambda text: ("learned says" in text and "onerror" in text) or "img src" in text)
    assert "x" not in [img.get_attribute("src") for img in page.find_elements("tag name", "img")]


@pytest.mark.parametrize("file", ["/etc/passwd", __file__, "pyproject.toml"])
def test_files_of_the_server_are_not_served(file: str, address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}gradio_api/file={file}")
    caught.value.close()
    assert caught.value.code in (403, 404)


def test_a_file_of_the_server_cannot_be_passed_off_as_an_upload(address: str) -> None:
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    uploading = [
        one for one in config["dependencies"] if any(t[1] == "upload" for t in one["targets"])
    ]
    given = {
        "path": str(Path(__file__).parents[1] / "golden"),
        "meta": {"_type": "gradio.FileData"},
    }
    body = {"data": ["learned", given, None], "fn_index": uploading[0]["id"], "session_hash": "x"}
    request = urllib.request.Request(
        f"{address}gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=x") as events:
        told = [json.loads(line[6:]) for line in events if line.startswith(b"data: ")]
    [done] = [one for one in told if one["msg"] == "process_completed"]
    assert done["success"] is False


# --- for everybody ------------------------------------------------------------------------------


def test_every_image_has_an_alternative_text(page: Any) -> None:
    assert len(alts(page)) >= 8
    assert all(alts(page))


def test_the_page_has_a_title_a_language_and_announces_what_it_shows(page: Any) -> None:
    assert page.title == TITLE
    assert page.execute_script("return document.documentElement.lang") == "en"
    told = page.find_element("id", "tl-status")
    assert (told.get_attribute("role"), told.get_attribute("aria-live")) == ("status", "polite")


def test_everything_works_by_the_keyboard(page: Any) -> None:
    tab_to(page, "combobox", "Model")
    tab_to(page, "submit", "Click to upload or drop files")
    tab_to(page, "combobox", "Or an example")
    press(page, "\ue015", "\ue015", "\ue007")  # down, down, enter
    text = until(page, lambda text: "its label is T-shirt/top" not in text and "Measured" in text)
    assert "A held-out example; its label is" in text
    tab_to(page, "radio", "2")
    press(page, " ")
    until(page, lambda text: "Where token 2 looks" in text)
    tab_to(page, "radio", "4")  # the keyboard is where it was
    press(page, " ")
    until(page, lambda text: "Where token 4 looks" in text)
    tab_to(page, "submit", "Measure the cost again")
    before = text.partition("Cost")[2]
    press(page, "\ue007")
    until(page, lambda text: text.partition("Cost")[2] not in ("", before))


def test_nothing_is_asked_of_other_servers(page: Any, address: str, tmp_path: Path) -> None:
    upload(page, make_image(tmp_path / "mine.jpg"))
    until(page, lambda text: "mine.jpg: learned says" in text)
    found = requested(page)
    assert len(found) > 5
    assert [url for url in found if not url.startswith(address)] == []


def test_the_console_has_no_complaint(page: Any, tmp_path: Path) -> None:
    upload(page, make_image(tmp_path / "mine.jpg"))
    until(page, lambda text: "mine.jpg: learned says" in text)
    known = "Method not implemented."  # by which Gradio ends every upload
    assert [one for one in complaints(page) if known not in one] == []


# --- the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_cleanly_leaves_nothing_and_connects_nowhere(
    number: int, browser: Any, tmp_path: Path
) -> None:
    room, mine = tmp_path / "room", make_image(tmp_path / "mine.jpg")
    with server(room, MINI) as (address, process):
        browser.get(address)
        until(browser, lambda text: "Measured now" in text)
        upload(browser, mine)
        until(browser, lambda text: "mine.jpg:" in text)
        assert len([*room.glob("*/*/mine.jpg")]) == 1
        time.sleep(3)  # what is asked of other servers may be asked from a thread
        process.send_signal(number)
        said, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (0, "")
    assert said == "The page is closed; uploads are removed\n"
    assert [*room.iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jpg", "room"]
