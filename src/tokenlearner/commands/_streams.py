"""Standard streams of a command: for terminals of any encoding, and pipes that nobody reads."""

from __future__ import annotations

import io
import sys

CLOSED_PIPE = 141  # exit code, 128 and the number of SIGPIPE


class _File(io.FileIO):
    """A stream's file; what cannot be written is dropped, and the first error kept."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes  # type: ignore[arg-type]


def replace_streams() -> _File | None:
    """Makes stdout and stderr write any character, as an escape where the encoding has none.

    Returns the file of stdout, whose `error` says whether it was written; None without one.
    """
    files = {}
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is None or old is not getattr(sys, f"__{name}__"):
            continue
        old.flush()
        files[name] = _File(old.fileno(), "w", closefd=False)
        new = io.TextIOWrapper(
            io.BufferedWriter(files[name]),
            encoding=old.encoding,
            errors="backslashreplace",
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        setattr(sys, name, new)
    return files.get("stdout")
