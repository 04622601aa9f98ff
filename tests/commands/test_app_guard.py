"""Which requests the page's server answers, and the folder of its uploads."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tokenlearner.commands.app.addresses import served_hosts
from tokenlearner.commands.app.folder import upload_folder

pytest.importorskip("gradio")
import httpx

from tokenlearner.commands.app import guard
from tokenlearner.commands.app.guard import Guard, delete_oldest

HERE = "http://127.0.0.1:7860"
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"


class App:
    """Stands for Gradio's: keeps the bodies that reach it, and writes a part as it would."""

    def __init__(self, folder: Path):
        self.folder, self.bodies = folder, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(message.get("body", b""))
        (self.folder / "tmp123").write_bytes(b"half")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})


def ask(
    app: App, method: str, url: str, host: str = "127.0.0.1", names: str = "", **options: Any
) -> httpx.Response:
    """Sends a request to a page that listens at a host."""
    guarded = Guard(app, app.folder, 1, served_hosts(host), {*names.split()})

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded)) as client:
            return await client.request(method, url, **options)

    return asyncio.run(send())


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)


# --- who is answered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listens", "names", "host", "answered"),
    [
        ("127.0.0.1", "", "127.0.0.1:7860", True),
        ("127.0.0.1", "", "localhost:7860", True),
        ("::1", "", "[::1]:7860", True),
        ("127.0.0.1", "", "evil.test", False),
        ("127.0.0.1", "", "evil.test:7860", False),
        ("127.0.0.1", "", "127.0.0.1.evil.test", False),
        ("127.0.0.1", "", "evil.test@127.0.0.1", False),
        ("127.0.0.1", "", "10.0.0.1", False),
        ("127.0.0.1", "", "", False),
        ("127.0.0.1", "", "evil.test.", False),
        ("127.0.0.1", "", "[::ffff:10.0.0.1]", False),
        ("127.0.0.1", "", "127.0.0.1, evil.test", False),
        ("0.0.0.0", "", "10.0.0.1:7860", True),
        ("::", "", "[2001:db8::1]", True),
        ("0.0.0.0", "", "evil.test", False),
        ("10.0.0.1", "", "10.0.0.1:7860", True),
        ("10.0.0.1", "", "10.0.0.2:7860", False),
        ("127.0.0.1", "maps.example.org", "maps.example.org", True),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_page_answers_under_its_own_names_only(
    listens: str, names: str, host: str, answered: bool, method: str, app: App
) -> None:
    url = HERE + (JOIN if method == "POST" else "/config")
    answer = ask(app, method, url, listens, names, headers={"Host": host}, content=b"{}")
    assert (answer.status_code, len(app.bodies)) == ((200, 1) if answered else (403, 0))


@pytest.mark.parametrize(
    ("headers", "answered"),
    [
        ({}, True),
        ({"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "http://127.0.0.1:9912"}, False),
        ({"Origin": "http://localhost:7860"}, False),
        ({"Origin": "http://evil.test"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, True),
        ({"Origin": "https://maps.example.org"}, True),
        ({"Origin": "http://127.0.0.1.:7860"}, False),
        ({"Origin": "http://[::1]:7860", "X-Forwarded-Host": "127.0.0.1:7860"}, False),
        ({"Origin": "http://evil.test", "X-HTTP-Method-Override": "GET"}, False),
    ],
)
def test_other_sites_are_not_answered(headers: dict[str, str], answered: bool, app: App) -> None:
    answer = ask(app, "POST", HERE + UPLOAD, names="maps.example.org", headers=headers)
    assert (answer.status_code, len(app.bodies)) == ((200, 1) if answered else (403, 0))


# --- what is answered ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", f"/gradio_api/{kind}=http://evil.test/a") for kind in ("proxy", "file")],
        *[("GET", f"/gradio_api/{path}") for path in ("file=/etc/passwd", "file=a", "deep_link")],
        *[("POST", f"/gradio_api/{path}") for path in ("run/look", "call/look", "vibe-edit")],
        *[("POST", "/"), ("PUT", UPLOAD), ("DELETE", "/"), ("GET", "/monitoring")],
    ],
)
def test_what_the_page_does_not_ask_for_is_not_there(method: str, path: str, app: App) -> None:
    assert ask(app, method, HERE + path).status_code == 404
    assert app.bodies == []


def test_only_files_that_were_uploaded_reach_the_page(app: App, tmp_path: Path) -> None:
    mine = tmp_path / "a" / "mine.png"
    mine.parent.mkdir()
    mine.touch()
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    meta = {"meta": {"_type": "gradio.FileData"}}
    paths = {
        str(mine): 200,
        str(tmp_path / "a" / "gone.png"): 410,
        str(tmp_path / "a" / "link"): 403,
        str(tmp_path / ".." / "x"): 403,
        **dict.fromkeys(("http://evil.test/a.png", "/etc/passwd", "mine.png", "\0", 3), 403),
    }
    for path, status in paths.items():
        for data in ([{"path": path} | meta], [{"a": [{"path": path}]}]):
            answer = ask(app, "POST", HERE + JOIN, json={"data": data})
            assert answer.status_code == status, path
    assert len(app.bodies) == 2
    assert ask(app, "GET", f"{HERE}/gradio_api/file={mine}").status_code == 200


@pytest.mark.parametrize("content", [b"no JSON", b"[" * 60_000, b" " * 70_000])
def test_an_event_that_is_no_small_json_is_refused(content: bytes, app: App) -> None:
    assert ask(app, "POST", HERE + JOIN, content=content).status_code in (400, 413)
    assert app.bodies == []


@pytest.mark.parametrize("declared", [True, False])
def test_an_upload_reaches_the_disk_once_it_is_known_to_be_small(
    declared: bool, app: App, tmp_path: Path
) -> None:
    sent = 0

    async def parts(count: int) -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(count):
            sent += 1
            yield bytes(2**18)

    large: Any = bytes(2**22) if declared else parts(1000)
    answer = ask(app, "POST", HERE + UPLOAD, content=large)
    assert (answer.status_code, app.bodies, sent < 10) == (413, [], True)
    assert "1 MiB" in answer.json()["detail"]
    small: Any = bytes(2**20) if declared else parts(4)
    assert ask(app, "POST", HERE + UPLOAD, content=small).status_code == 200
    assert [len(body) for body in app.bodies] == [2**20]
    assert [*tmp_path.iterdir()] == []  # nothing half written


def test_an_upload_that_does_not_arrive_is_given_up(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_SECONDS", 0.1)

    async def endless() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(60)

    assert ask(app, "POST", HERE + UPLOAD, content=endless()).status_code == 408
    assert app.bodies == []


# --- the folder ---------------------------------------------------------------------------------


def test_the_oldest_files_go_when_there_are_too_many_or_too_large_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_FILES", 3)
    for i in range(5):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "a.png").write_bytes(bytes(10))
    delete_oldest(tmp_path, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]
    delete_oldest(tmp_path, 29)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_uploads_of_a_server_that_was_killed_go_when_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "from tokenlearner.commands.app.folder import upload_folder as f\n"
    code += "import os\nwith f() as folder: (folder / 'a').touch(); os.kill(os.getpid(), 9)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with upload_folder() as first:
        subprocess.run([sys.executable, "-c", code], check=False, env=environment, timeout=60)
        assert len([*tmp_path.iterdir()]) == 2
        elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
        elsewhere.mkdir()
        (tmp_path / "tokenlearner-app-link").symlink_to(elsewhere)
        with upload_folder() as second:
            left = {path.name for path in tmp_path.iterdir()} - {"tokenlearner-app-link"}
            assert left == {first.parent.name, second.parent.name}
            assert first.parent.stat().st_mode & 0o077 == 0
        assert elsewhere.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenlearner-app-link"]
