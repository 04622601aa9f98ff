"""The folder of the page's uploads, which goes with its server, however that ends."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ...utils.io import lock_folder

_PREFIX = "tokenlearner-app-"


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Yields a new folder for uploads, and deletes it afterwards.

    Those of servers that were killed are deleted first: nobody holds their locks.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError, ValueError):  # in use
            _delete_left(left)
    with ExitStack() as stack:
        root = _lock_new(stack)
        folder = root / "files"
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _lock_new(stack: ExitStack) -> Path:
    """Makes a folder and holds it; another server that starts may take it for one that is left."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(ValueError):
            stack.enter_context(lock_folder(root))
            return root


def _delete_left(root: Path) -> None:
    found = root.lstat()
    is_mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if stat.S_ISDIR(found.st_mode) and is_mine:
        with lock_folder(root):
            shutil.rmtree(root)
