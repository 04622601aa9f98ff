"""What the page's server answers: requests of its own page, each of a limited size.

Other sites can make a browser send requests here, under their name or under one that leads to this
computer (DNS rebinding). Host and Origin tell them apart, before a body is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .addresses import EVERY_ADDRESS, LOOPBACK
from .uploads import delete_upload

_ROOT = "/gradio_api/"
MAX_FILES, MAX_UPLOADS = 1000, 20  # that are kept, as many bytes as so many uploads of full size
_POSTS = ("upload", "queue/join", "reset", "cancel")  # what the page sends
_GETS = (
    *("info", "startup-events", "heartbeat", "queue", "upload_progress", "app_id", "theme.css"),
    *("user", "login_check"),
)
_EVENT_BYTES = 2**16  # of what an event sends, and of what comes around a file
_AT_ONCE = 4  # uploads that are received
_SECONDS = 120  # in which a body has to arrive


class Refusal(Exception):
    """A request that is not answered: its status, and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """ASGI middleware that passes on what the page itself asks for.

    An upload reaches the app, and so the disk, once all of it has arrived and its size is known.

    Args:
        app: What answers.
        folder: Of the uploads, and of what is drawn.
        max_upload_mib: Size of a file.
        hosts: At which the server listens, besides those of this computer only.
        names: Hosts that lead to it, of proxies; their pages are its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        folder: Path,
        max_upload_mib: int,
        hosts: Collection[str],
        names: Collection[str],
    ):
        self.app, self.folder, self.hosts, self.names = app, folder, hosts, names
        self._mib = max_upload_mib
        self._receiving, self._writing = asyncio.Semaphore(_AT_ONCE), asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or refuses."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        try:
            _check_source(Headers(scope=scope), self.hosts, self.names)
            _check_path(scope, self.folder)
            await self._answer(scope, receive, _unframed(send))
        except Refusal as refusal:
            content = {"detail": refusal.sentence, "error": refusal.sentence}
            headers = {"Connection": "close"}  # a body may be on its way
            await JSONResponse(content, refusal.status, headers)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self._mib * 2**20
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif not scope["path"].rstrip("/").endswith(f"{_ROOT}upload"):
            body = await self._receive(scope, receive, _EVENT_BYTES)
            _check_files(body, self.folder)
            await self.app(scope, _replay(body, receive), send)
            delete_oldest(self.folder, MAX_UPLOADS * most)
        else:
            async with self._receiving:
                body = await self._receive(scope, receive, most + _EVENT_BYTES)
                async with self._writing:
                    try:
                        await self.app(scope, _replay(body, receive), send)
                    finally:
                        _delete_unfinished(self.folder)
                        delete_oldest(self.folder, MAX_UPLOADS * most)

    async def _receive(self, scope: Scope, receive: Receive, limit: int) -> bytes:
        """Reads a body, as long as it is within a limit."""
        size = Headers(scope=scope).get("content-length", "0")
        if not size.isdecimal() or int(size) > limit:
            raise self._too_large()
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "The upload was broken off.")
                body.extend(message.get("body", b""))
                if len(body) > limit:
                    raise self._too_large()
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), _SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(408, f"It did not arrive within {_SECONDS} seconds.") from None
        return bytes(body)

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"It has more than the {self._mib} MiB that are the maximum allowed size."
        )


def delete_oldest(folder: Path, max_bytes: int) -> None:
    """Deletes the oldest files of uploads and drawings above `MAX_FILES` and above some bytes."""
    entries = []
    for path in folder.glob("*/*"):
        with suppress(OSError):  # deleted meanwhile
            found = path.stat()
            entries.append((found.st_ctime_ns, found.st_size, path))
    size = 0
    for number, (_, of_file, path) in enumerate(sorted(entries, reverse=True)):
        size += of_file
        if number >= MAX_FILES or size > max_bytes:
            delete_upload(path)


def _delete_unfinished(folder: Path) -> None:
    """Deletes what uploads left half written; finished ones are in folders of their own."""
    for path in folder.iterdir():
        if not path.is_dir():
            path.unlink(missing_ok=True)


def _check_source(headers: Headers, hosts: Collection[str], names: Collection[str]) -> None:
    """Checks the name under which the server is asked, and the site that asks."""
    asked = headers.getlist("host")
    if len(asked) != 1 or not _is_own(_host(asked[0]), {*hosts, *names}):
        raise Refusal(
            403,
            "The page does not answer under this name; open it at the address that was printed, "
            "or start it with --names and this one.",
        )
    sites = [urlsplit(origin).netloc.lower() for origin in headers.getlist("origin")]
    foreign = any(site != asked[0].lower() and _host(site) not in names for site in sites)
    is_link = headers.get("sec-fetch-mode") == "navigate" and not sites
    if foreign or (headers.get("sec-fetch-site") == "cross-site" and not is_link):
        raise Refusal(403, "The page does not answer other sites.")


def _is_own(host: str, hosts: Collection[str]) -> bool:
    """Returns whether the page may be opened under a host; an address cannot be pretended."""
    if host in (*LOOPBACK, *hosts):
        return host != EVERY_ADDRESS
    with suppress(ValueError):
        return EVERY_ADDRESS in hosts and bool(ipaddress.ip_address(host))
    return False


def _host(netloc: str) -> str:
    """Returns the host of `host:port`, nothing if it is none."""
    with suppress(ValueError):
        if not set("@/?#\\") & {*netloc}:
            return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    return ""


def _check_path(scope: Scope, folder: Path) -> None:
    """Checks that it is a request that the page makes; nothing is fetched for it from elsewhere."""
    _, is_api, path = scope["path"].partition(_ROOT)
    if scope["method"] == "POST":
        known = bool(is_api) and path.rstrip("/") in _POSTS
    elif scope["method"] not in ("GET", "HEAD"):
        known = False
    elif path.startswith("file="):
        known = _is_in(path.removeprefix("file="), folder)
    else:
        known = path.partition("/")[0] in _GETS if is_api else "monitoring" not in scope["path"]
    if not known:
        raise Refusal(404, "There is nothing here.")


def _check_files(body: bytes, folder: Path) -> None:
    """Checks that the files that an event names were uploaded, and are still there."""
    try:
        content = json.loads(body or b"null")
    except (ValueError, RecursionError):
        raise Refusal(400, "The request is no JSON.") from None
    for path in _paths(content):
        if not isinstance(path, str) or not _is_in(path, folder):
            raise Refusal(403, "Only files that were uploaded are looked at; upload it.")
        if not Path(path).is_file():
            raise Refusal(410, "The file is not kept any longer; upload it again.")


def _paths(content: Any) -> Iterator[Any]:
    """Yields the path of each file in what JSON holds."""
    if isinstance(content, list):
        for item in content:
            yield from _paths(item)
    elif isinstance(content, dict):
        if "path" in content:
            yield content["path"]
        for item in content.values():
            yield from _paths(item)


def _is_in(path: str, folder: Path) -> bool:
    """Returns whether a path is one of a file in a folder, whatever links lead there."""
    try:
        return Path(path).resolve().is_relative_to(folder.resolve()) and Path(path).is_absolute()
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, a loop
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns what gives a body that was read already, and after it what comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def _unframed(send: Send) -> Send:
    """Returns what sends an answer that no other site can frame."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = "frame-ancestors 'self'"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return sending
