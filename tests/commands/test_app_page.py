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
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import barriers, chromium, complaints, requested
from files import MINI, make_checkpoint, make_image, make_video, png_bomb
from selenium.webdriver.support.wait import WebDriverWait
from tiny import randomized

from tokenlearner import create_model, save_model

pytest.importorskip("gradio")
from tokenlearner.commands.app.page import NO_MAPS, TITLE

pytestmark = pytest.mark.slow

SECONDS = 60  # until something has to be seen
TEXT = "return document.body.innerText"
# Says whom it connects to or asks for, but for itself.
SERVER = """
import sys

def report(event, args):
    if event == "socket.connect" and str(args[1][0]) not in ("127.0.0.1", "::1"):
        print("connects", args[1], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and str(args[0]) not in ("127.0.0.1", "localhost", "None"):
        print("looks up", args[0], file=sys.stderr, flush=True)

sys.addaudithook(report)
from tokenlearner.commands.app.server import AppConfig, app

app(AppConfig(sys.argv[1:], max_upload_mib=1, max_pixels=1_000_000))
"""


@contextmanager
def server(room: Path, *models: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A page in a process of its own, whose temporary files are in a folder; and its address."""
    room.mkdir(exist_ok=True)
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
    make_checkpoint(root / "learned", 4)
    make_checkpoint(root / "plain", 0)
    model = create_model("vivit_mini_patch8x2_32", num_tokens=3, depth=2, in_chans=1)
    save_model(randomized(model), root / "clips")
    paths = [root / name for name in ("learned", "plain", "clips")]
    with server(root / "room", *paths) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as program:
        yield program


@pytest.fixture
def page(address: str, browser: Any) -> Any:
    """The page, once it has looked at its first example."""
    browser.get("about:blank")  # Gradio complains of requests that end as its page is left
    complaints(browser)
    requested(browser)
    browser.get(address)
    until(browser, lambda text: "held-out example, T-shirt/top: learned says" in text)
    return browser


def until(browser: Any, holds: Callable[[str], bool]) -> str:
    """Waits until the page's text is as it should be."""
    end, text = time.monotonic() + SECONDS, ""
    while time.monotonic() < end:
        text = browser.execute_script(TEXT)
        if holds(text):
            return text
        time.sleep(0.1)
    raise AssertionError(f"still not as expected after {SECONDS} s:\n{text}")


def found(browser: Any, selector: str) -> list[Any]:
    """The elements, once there are any: they come after the text that tells of them."""
    wait = WebDriverWait(browser, SECONDS)
    return wait.until(lambda b: b.find_elements("css selector", selector))


def upload(browser: Any, path: Path) -> None:
    browser.find_element("css selector", "#file input[type=file]").send_keys(str(path))


def choose_model(browser: Any, index: int) -> None:
    """Chooses in the list by keys; the first model, which is chosen as the page opens, is 0."""
    field = browser.find_element("css selector", "input[aria-label='Model']")
    field.send_keys("\ue015" * index + "\ue007")  # down, enter


def choose_bag(browser: Any) -> str:
    browser.find_element("css selector", "#examples [aria-label^='Thumbnail 9']").click()
    return until(browser, lambda text: "held-out example, Bag: learned says" in text)


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


def test_nothing_on_the_page_keeps_people_out(page: Any) -> None:
    of_gradio = ("aria-allowed-attr", "image-redundant-alt")  # its meters, and its thumbnails
    assert [found for found in barriers(page) if not found.startswith(of_gradio)] == []


def test_an_image_that_is_uploaded_is_looked_at_by_one_model_after_the_other(
    page: Any, tmp_path: Path
) -> None:
    upload(page, make_image(tmp_path / "mine.jpg"))
    text = until(page, lambda text: "mine.jpg: learned says" in text)
    assert "Block 1: 4 tokens of 7 × 7 positions." in text
    assert "mine.jpg, as the model gets it: 28 × 28" in alts(page)
    choose_model(page, 2)
    until(page, lambda text: "mine.jpg: plain says" in text and NO_MAPS in text)


def test_a_clip_is_looked_at_frame_by_frame(page: Any, tmp_path: Path) -> None:
    choose_model(page, 1)
    until(page, lambda text: "choose an image or a clip" in text)
    upload(page, make_video(tmp_path / "mine.mp4"))
    until(page, lambda text: "mine.mp4: clips says" in text)
    [field] = found(page, "input[type=number]")
    field.clear()
    field.send_keys("5\ue007")
    until(page, lambda text: "mine.mp4, frame 5 of 8" in text)


def test_the_cost_is_measured_while_the_next_image_is_looked_at(page: Any, tmp_path: Path) -> None:
    [button] = [b for b in page.find_elements("tag name", "button") if b.text == "Measure cost"]
    button.click()
    until(page, lambda text: "GMACs each" in text)
    upload(page, make_image(tmp_path / "mine.jpg"))
    until(page, lambda text: "mine.jpg: learned says" in text and "GMACs each" not in text)
    assert "mine" not in choose_bag(page)  # the file is let go


# --- what is refused ----------------------------------------------------------------------------


def test_a_bad_file_gives_a_message_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    for content, expected in (
        (b"\x89PNG\r\n\x1a\nnothing", "a.png is neither an image nor"),
        (bytes(2**20 + 1), "maximum allowed size"),
        (png_bomb(50_000, 50_000), "more than the 1 million pixels"),
    ):
        (tmp_path / "a.png").write_bytes(content)
        upload(page, tmp_path / "a.png")
        text = until(page, lambda text, expected=expected: expected in text)
        assert "Traceback" not in text
        assert str(tmp_path) not in text
        choose_bag(page)
    upload(page, make_image(tmp_path / "<img src=x onerror=alert(1)>![a](x).png"))
    until(page, lambda text: "alert" in text and "learned says" in text)  # shown and not run
    sources = [tag.get_attribute("src") or "" for tag in page.find_elements("tag name", "img")]
    assert all(source.startswith(("http://127.0.0.1", "data:")) for source in sources)


def send(url: str, body: bytes | None = None, method: str | None = None, **headers: str) -> int:
    """Sends a request as another program or site would; returns the answer's status."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        request = urllib.request.Request(url, body, named, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def event_of(address: str, path: str) -> bytes:
    """What the page sends when a file was uploaded."""
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    [uploading] = [
        one for one in config["dependencies"] if any(t[1] == "upload" for t in one["targets"])
    ]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = {"data": ["learned", file, None], "fn_index": uploading["id"], "session_hash": "x"}
    return json.dumps(data).encode()


def multipart(content: bytes) -> tuple[bytes, dict[str, str]]:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n", {"Content_Type": "multipart/form-data; boundary=x"}


def test_strangers_get_nothing_leave_nothing_and_make_the_server_fetch_nothing(
    tmp_path: Path,
) -> None:
    room = tmp_path / "room"
    with server(room, MINI) as (address, process):
        join, upload = (f"{address}gradio_api/{path}" for path in ("queue/join", "upload"))
        for file in ("/etc/passwd", __file__, "pyproject.toml", "http://192.0.2.1/a.png"):
            assert send(f"{address}gradio_api/file={file}") == 404
        golden = str(Path(__file__).parents[1] / "golden")
        json_type = {"Content_Type": "application/json"}
        for path in ("http://192.0.2.1/a.png", "https://example.org/a.png", golden):
            assert send(join, event_of(address, path), **json_type) == 403
        body, kind = multipart(b"small")
        for name in ("Host", "Origin"):
            stranger = {name: "evil.test" if name == "Host" else "http://evil.test"}
            assert send(upload, body, **kind, **stranger) == 403
        assert send(f"{address}config", Host="evil.test") == 403
        preflight = {"Origin": "http://evil.test", "Access_Control_Request_Method": "POST"}
        for host in ("evil.test", urlsplit(address).netloc):
            assert send(upload, None, "OPTIONS", Host=host, **preflight) == 403
        too_large, kind = multipart(bytes(2**20 + 1))
        assert send(upload, too_large, **kind) == 413
        assert [path for path in room.glob("*/files/**/*") if path.is_file()] == []
        assert send(upload, body, **kind) == 200
        assert len([*room.glob("*/files/*/a.png")]) == 1
        process.kill()
        _, errors = process.communicate(timeout=SECONDS)
    assert "connects" not in errors
    assert "looks up" not in errors
    with server(room, MINI):
        assert [*room.glob("*/files/*/a.png")] == []


def test_a_page_of_another_site_neither_writes_here_nor_becomes_this_one(tmp_path: Path) -> None:
    room, resolved = tmp_path / "room", "--host-resolver-rules=MAP evil.test 127.0.0.1"
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with (
        server(room, MINI) as (address, _),
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as other,
        chromium(1200, 900, resolved) as browser,
    ):
        Thread(target=other.serve_forever, daemon=True).start()
        browser.get(f"http://evil.test:{other.server_port}/")
        sent = browser.execute_async_script(
            "const [url, done] = arguments, form = new FormData();"
            "form.append('files', new File(['a'.repeat(1e5)], 'a.png'));"
            "fetch(url, {method: 'POST', mode: 'no-cors', body: form}).then("
            "answer => done(answer.type), error => done(String(error)))",
            f"{address}gradio_api/upload",
        )
        assert sent == "opaque"  # it arrived, and was refused
        assert [path for path in room.glob("*/files/**/*") if path.is_file()] == []
        browser.get(address.replace("127.0.0.1", "evil.test"))
        assert "does not answer under this name" in browser.execute_script(TEXT)
        browser.get(address.replace("127.0.0.1", "localhost"))
        until(browser, lambda text: "T-shirt/top: " in text)
        other.shutdown()


# --- for everybody ------------------------------------------------------------------------------


def test_everything_works_by_the_keyboard_and_is_named_and_announced(page: Any) -> None:
    assert len(alts(page)) == 10 + 1 + 4 + 2  # examples, image, maps, their mean and the colors
    assert all(alts(page))
    assert page.title == TITLE
    assert page.execute_script("return document.documentElement.lang") == "en"
    status = page.find_element("id", "status")
    assert (status.get_attribute("role"), status.get_attribute("aria-live")) == ("status", "polite")
    tab_to(page, "combobox", "Model")
    tab_to(page, "submit", "Click to upload or drop files")
    tab_to(page, "submit", "Thumbnail 2 of 10")
    press(page, "\ue007")
    until(page, lambda text: "held-out example, Trouser: learned says" in text)
    tab_to(page, "submit", "Thumbnail 3 of 7")
    press(page, "\ue007")
    until(page, lambda _: any((alt or "").startswith("token 2: row ") for alt in alts(page)))
    tab_to(page, "submit", "Measure cost")
    press(page, "\ue007")
    until(page, lambda text: "GMACs each" in text)


def test_nothing_is_asked_of_other_servers_and_the_console_has_no_complaint(
    page: Any, address: str, tmp_path: Path
) -> None:
    upload(page, make_image(tmp_path / "mine.jpg"))
    until(page, lambda text: "mine.jpg: learned says" in text)
    urls = requested(page)
    assert len(urls) > 5
    assert [url for url in urls if not url.startswith(address)] == []
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
        until(browser, lambda text: "T-shirt/top: " in text)
        upload(browser, mine)
        until(browser, lambda text: "mine.jpg:" in text)
        assert len([*room.glob("*/files/*/mine.jpg")]) == 1
        time.sleep(3)  # what is asked of other servers may be asked from a thread
        process.send_signal(number)
        said, errors = process.communicate(timeout=3 * SECONDS)  # beside other tests
    assert (process.returncode, errors) == (0, "")
    assert said == "The page is closed; uploads are removed\n"
    assert [*room.iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jpg", "room"]
