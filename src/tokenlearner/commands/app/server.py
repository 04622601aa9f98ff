"""The web page that `tokenlearner app` serves: drop an image, see where learned tokens look."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ...utils.imports import require_package
from ...utils.validation import check_count, require
from .._console import say
from .addresses import EVERYBODY, check_address, reachable, served_hosts
from .folder import upload_folder
from .models import load_offered
from .uploads import UploadLimits

_VISITORS = 20  # whose last image is remembered
_ENVIRONMENT = {  # read by Gradio when it is imported or started
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]
_CONTRAST = {"body_text_color_subdued": "*neutral_500"}  # of lesser texts, 4.5 to 1


@dataclass(frozen=True)
class AppConfig(UploadLimits):
    """Serves a web page on which images and clips are looked at.

    Args:
        checkpoints: Checkpoints, folders of `tokenlearner demo`, or names of models (random
            weights); none takes the demos of the working folder.
        host: Address to listen at; 127.0.0.1 is this computer only, 0.0.0.0 everybody.
        port: Where to listen; None is 7860, or the next that is free.
        names: Names under which it can be opened besides, separated by commas; such as
            maps.example.org, from which a proxy leads here.
        share: Ask Gradio's server for a public link that leads here.
        browser: Open the page in the browser.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range.
    """

    checkpoints: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    names: str = ""
    share: bool = False
    browser: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port is not None:
            check_count("port", self.port)
            require(self.port < 2**16, f"port is {self.port}, expected 1 to {2**16 - 1}")


def app(config: AppConfig) -> None:
    """Serves the page until Ctrl-C or SIGTERM, and removes what was uploaded.

    Args:
        config: What is offered, and where.

    Raises:
        ValueError: A package or a checkpoint is missing, or the port is taken.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    try:
        with serving(config) as address:
            say(f"The page is at {address} (Ctrl-C ends it)")
            if config.host in EVERYBODY and not config.share:
                port = urlsplit(address).port
                say(f"On this computer it is at http://localhost:{port}/")
            if config.host not in ("127.0.0.1", "localhost"):
                print("Everyone who reaches this computer can open it, without a password")
            threading.Event().wait()
    except KeyboardInterrupt:
        print("The page is closed; uploads are removed", flush=True)


@contextmanager
def serving(config: AppConfig) -> Iterator[str]:
    """Serves the page within the block, from threads of its own; yields its address.

    Nothing is loaded from elsewhere, and no file is served but uploads and what is drawn of them.

    Args:
        config: As in `app`.

    Raises:
        ValueError: As in `app`.
    """
    check_address(config.host, config.port)
    require_package("matplotlib", "app", "the page")
    with upload_folder() as folder:
        os.environ.update(_ENVIRONMENT | {"GRADIO_TEMP_DIR": str(folder)})
        gr = require_package("gradio", "app", "the page")
        from starlette.middleware import Middleware

        from .guard import Guard
        from .page import ON_LOAD, AppPage

        page = AppPage(load_offered(config.checkpoints, config.device), config).blocks
        names = {name.strip().lower() for name in config.names.split(",")} - {""}
        limits = {"folder": folder, "max_upload_mib": config.max_upload_mib}
        guard: Any = Middleware(Guard, **limits, hosts=served_hosts(config.host), names=names)
        try:
            *_, public = page.launch(
                server_name=config.host,
                server_port=config.port,
                share=config.share,
                inbrowser=config.browser,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,  # of uploads that are too large; what a request raises is caught
                max_file_size=config.max_upload_mib * 2**20,
                app_kwargs={"middleware": [guard]},
                state_session_capacity=_VISITORS,
                ssr_mode=False,
                mcp_server=False,
                footer_links=[],
                theme=gr.themes.Default(font=_FONTS, font_mono=_MONO).set(**_CONTRAST),
                js=ON_LOAD,
            )
            page.app.user_middleware.reverse()  # in front of Gradio's, which answers preflights
            page.app.middleware_stack = page.app.build_middleware_stack()
            names |= {urlsplit(public).hostname or ""} - {""} if public else set()
            yield public or f"http://{reachable(config.host)}:{page.server_port}/"
        finally:
            page.close(verbose=False)
