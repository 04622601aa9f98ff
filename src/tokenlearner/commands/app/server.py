"""The web page that `tokenlearner app` serves: drop an image, see where learned tokens look."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...evaluation.map_figures import check_matplotlib
from ...utils.validation import check_count, require
from .models import load_offered
from .page import ON_LOAD, AppPage
from .uploads import UploadLimits
from .view import STYLE

FIRST_PORT, _PORTS = 7860, 100
_CUT_OFF = 4  # times the allowed size, at which an upload ends; below it the page says what fits
_VISITORS = 20  # whose last image is remembered
_SETTINGS = {  # of Gradio, which reads them when it is imported or started
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]


@dataclass(frozen=True)
class AppConfig:
    """Serves a web page on which images and clips are looked at.

    Args:
        checkpoints: Checkpoints, folders of `tokenlearner demo`, or names of models (random
            weights); none takes the demos of the working folder.
        host: Address to listen at; 127.0.0.1 is this computer only, 0.0.0.0 everybody.
        port: Where to listen; None is 7860, or the next that is free.
        share: Ask Gradio's server for a public link that leads here.
        browser: Open the page in the browser.
        device: Such as cpu or cuda; auto takes a GPU where there is one.
        max_upload_mib: Size of a file that can be uploaded, in MiB.
        max_pixels: Of an image, or of a clip's frame.
        max_frames: Of a clip.
        max_seconds: Of a clip.

    Raises:
        ValueError: A number is out of range.
    """

    checkpoints: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    browser: bool = False
    device: str = "auto"
    max_upload_mib: int = 32
    max_pixels: int = 25_000_000
    max_frames: int = 1800
    max_seconds: int = 120

    def __post_init__(self) -> None:
        if self.port is not None:
            check_count("port", self.port)
            require(self.port < 2**16, f"port is {self.port}, expected 1 to {2**16 - 1}")
        for name in ("max_upload_mib", "max_pixels", "max_frames", "max_seconds"):
            check_count(name, getattr(self, name))

    @property
    def limits(self) -> UploadLimits:
        """What an upload may have."""
        return UploadLimits(self.max_upload_mib, self.max_pixels, self.max_frames, self.max_seconds)


def app(config: AppConfig) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and removes what was uploaded.

    Args:
        config: What is offered, and where.

    Raises:
        ValueError: A package or a checkpoint is missing, or the port is taken.
    """
    end = threading.Event()
    with _ended_by(end, signal.SIGINT, signal.SIGTERM), serving(config) as address:
        print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
        if config.host not in ("127.0.0.1", "localhost"):
            print("Whoever reaches this computer can open it: it asks for no password", flush=True)
        end.wait()
    print("The page is closed; uploads are removed", flush=True)


@contextmanager
def serving(config: AppConfig) -> Iterator[str]:
    """Serves the page within the block, from threads of its own; yields its address.

    Args:
        config: As in `app`.

    Raises:
        ValueError: As in `app`.
    """
    _check_packages()
    port = _free_port(config)
    models = load_offered(config.checkpoints, config.device)
    with _room_for_uploads():
        page = AppPage(models, config.limits).build()
        try:
            _, local, public = page.launch(**_options(config, port))
            yield public or local
        finally:
            page.close(verbose=False)


def _options(config: AppConfig, port: int) -> dict[str, Any]:
    """What Gradio is told; nothing is loaded from elsewhere, and no file is served but uploads."""
    import gradio as gr

    return {
        "server_name": config.host,
        "server_port": port,
        "share": config.share,
        "inbrowser": config.browser,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": True,  # of uploads that Gradio cuts off; what a request raises is caught
        "max_file_size": _CUT_OFF * config.max_upload_mib * 2**20,
        "state_session_capacity": _VISITORS,
        "ssr_mode": False,
        "mcp_server": False,
        "footer_links": [],
        "theme": gr.themes.Default(font=_FONTS, font_mono=_MONO),
        "css": STYLE,
        "js": ON_LOAD,
    }


def _check_packages() -> None:
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio; run pip install 'tokenlearner[app]'")
    check_matplotlib()


@cache
def _room() -> TemporaryDirectory[str]:
    """One folder for all pages of this process: Gradio remembers the first that it is told."""
    return TemporaryDirectory(prefix="tokenlearner-app-")


@contextmanager
def _room_for_uploads() -> Iterator[None]:
    """Sets Gradio's environment within the block; what was uploaded is removed at its end."""
    room = _room().name
    told = _SETTINGS | {"GRADIO_TEMP_DIR": room}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for path in Path(room).iterdir():
            shutil.rmtree(path, ignore_errors=True)


def _free_port(config: AppConfig) -> int:
    """The port that is asked for, or the first that is free.

    Raises:
        ValueError: There is none, or no such address.
    """
    asked = config.port is not None
    tried = [config.port or 0] if asked else range(FIRST_PORT, FIRST_PORT + _PORTS)
    reason = OSError("no port")
    for port in tried:
        try:
            with socket.create_server((config.host, port)):
                return port
        except OSError as error:
            reason = error
    where = str(tried[0]) if asked else f"{tried[0]} to {tried[-1]}"
    raise ValueError(
        f"{config.host} has no free port of {where} ({reason}); pass another port or host"
    ) from reason


@contextmanager
def _ended_by(end: threading.Event, *numbers: int) -> Iterator[None]:
    """Lets signals end the page; outside of the main thread they are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: end.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
