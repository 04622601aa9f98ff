"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenlearner.utils.io import (
    LOCK,
    WriteError,
    atomic_write,
    check_output_file,
    check_output_folder,
    lock_folder,
    unique_path,
    without_folders,
    write_json,
)


@pytest.mark.parametrize("old", ["old", None])
def test_the_file_appears_or_is_replaced_only_when_the_block_ends(
    old: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "some" / "folder" / "a.png"
    if old:
        path.parent.mkdir(parents=True)
        path.write_text(old)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.exists() == bool(old)
        assert (temporary.parent, temporary.suffix) == (path.parent, ".png")
        assert not old or path.read_text() == old
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_midway_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def stop() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        stop()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert path.read_text() == "old"


def test_json_reads_back_as_it_was(tmp_path: Path) -> None:
    value = {"name": "größer", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "größer" in text
    assert text.endswith("}\n")
    write_json(tmp_path / "a.json", {"root": "bird\udcff"})  # no UTF-8
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"root": "bird\udcff"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}], ids=str)
def test_what_json_has_no_form_for_is_refused_and_keeps_the_old_file(
    tmp_path: Path, value: Any
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"loss": value})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("existing", "free"),
    [
        ([], "run"),
        (["run"], "run-2"),
        (["run", "run-2"], "run-3"),
        (["run", "run-3"], "run-2"),
        (["run-2"], "run"),
    ],
    ids=str,
)
def test_a_free_folder_is_the_first_that_does_not_exist(
    tmp_path: Path, existing: list[str], free: str
) -> None:
    for name, make in zip(existing, (Path.mkdir, Path.touch), strict=False):
        make(tmp_path / name)
    assert unique_path(tmp_path / "run") == tmp_path / free
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(existing)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json("~/a/b.json", 1)
    assert (tmp_path / "a" / "b.json").read_text() == "1\n"
    assert unique_path("~/a") == tmp_path / "a-2"


HOLD = """
import os, sys, time
from tokenlearner.utils.io import lock_folder
with lock_folder(sys.argv[1]):
    if os.fork() == 0:  # as a worker that outlives its reader
        print(flush=True)
        time.sleep(60)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        owner = int(b"".join(holder.stdout.readline() for _ in range(2)))  # of both, in any order
        with pytest.raises(ValueError, match=rf"run is in use by process {owner} "):
            lock_folder(folder).__enter__()
        holder.kill()
        holder.wait()
        with lock_folder(folder):
            assert str(os.getpid()) in (folder / LOCK).read_text()
        assert (folder / LOCK).read_text() == ""
        holder.stdout.close()


def test_a_process_that_opened_the_lock_of_another_does_not_hold_beside_a_third(
    tmp_path: Path,
) -> None:
    with lock_folder(tmp_path):
        waiting = (tmp_path / LOCK).open("r+")
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="in use by another process"):
            lock_folder(tmp_path).__enter__()


# --- places -------------------------------------------------------------------------------------


def test_a_place_is_checked_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for check in (check_output_folder, check_output_file):
        assert check(tmp_path / "new" / "place") == tmp_path / "new" / "place"
        with pytest.raises(ValueError, match="file is no folder"):
            check(tmp_path / "file" / "place")
        with pytest.raises(ValueError, match=r"MiB are to be written .* are free"):
            check(tmp_path / "new", size=shutil.disk_usage(tmp_path).total + 1)
    with pytest.raises(ValueError, match="which is a folder"):
        check_output_file(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output_folder("~/new") == tmp_path / "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place that nobody can write")
def test_a_place_that_cannot_be_written_to_is_refused() -> None:
    with pytest.raises(ValueError, match="proc cannot be written to"):
        check_output_folder("/proc/new")


def refuse_disk(error: Exception, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: full (os error 28)")],
    ids=["of Python", "of safetensors"],
)
def test_a_full_disk_names_the_file_and_keeps_the_old_one(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(WriteError, match=r"a\.txt cannot be written") as info:
        refuse_disk(error, path)
    assert info.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/my data", "…/my data"),
        ("~/data/a.png is no image", "…/a.png is no image"),
        ("there is no '/home/me/x', and no x/y", "there is no '…/x', and no x/y"),
        ("/data/of/me/runs/a.json cannot be read (1/2)", "runs/a.json cannot be read (1/2)"),
        ("12 images/s from https://a.org/b/c", "12 images/s from https://a.org/b/c"),
        ({"a": ["/b/c", 1, None]}, {"a": ["…/c", 1, None]}),
    ],
)
def test_what_is_shared_has_no_folders(text: Any, expected: Any) -> None:
    assert without_folders(text, "/data/of/me") == expected


def test_json_holds_names_that_are_no_utf_8(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"root": "bird\udcff"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"root": "bird\udcff"}
