"""What is it like on a GPU: learners, models, training steps, streams, calibrating?

One command prints all tables and writes them to a file as it goes, so that a run that is cut off
keeps what it has. Each table has a share of the time; what does not fit waits until all tables had
theirs, and is named if there is no time then. A row that fails is reported, and the run goes on.
On a CPU the sizes are those of a toy.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_bench import FULL, TOY, Bench
from gpu_tables import TABLES, Job, Row, Table
from measured import add_device, closing, machine, write_results
from printed import cell


class OutOfTime(BaseException):
    """A job took too long. Compilers go on after an `Exception`."""


class Results:
    """All tables so far; written to a file whenever a job ends, if there is one."""

    def __init__(self, bench: Bench, names: list[str], out: Path | None):
        self.found: dict[str, Any] = {
            "machine": machine(bench.device, packages=("timm",)),
            "rounds": bench.sizes.rounds,
            "toy": bench.sizes is TOY,
            "tables": {},
        }
        self.out = out
        for name in names:
            jobs = [job.name for job in TABLES[name].jobs(bench)]
            self.found["tables"][name] = {
                "rows": [],
                "failed": {},
                "left_out": jobs,
                "seconds": 0.0,
            }

    def run(self, name: str, job: Job, device: torch.device, limit: float) -> None:
        """Adds the rows of a job, or why there are none; prints and writes them."""
        table, new = self.found["tables"][name], []
        table["left_out"].remove(job.name)
        start = time.perf_counter()
        try:
            with time_limit(limit):
                for row in job.rows():
                    json.dumps(row, allow_nan=False)
                    new.append(row)
        except (Exception, OutOfTime) as error:  # the next job may work
            table["failed"][job.name] = f"{type(error).__name__}: {error}"[:2000]
            table.setdefault("tracebacks", {})[job.name] = traceback.format_exc()[-4000:]
        seconds = time.perf_counter() - start
        table["seconds"] += seconds
        table["rows"] += new
        print(f"\n{TABLES[name].title}: {job.name} ({seconds:.1f} s)\n", flush=True)
        print("\n".join(markdown(new)), flush=True)
        if job.name in table["failed"]:
            print(f"FAILED {table['failed'][job.name]}", flush=True)
        self.write()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        write_results(self.out, "gpu.py", self.found)


def run_all(results: Results, bench: Bench, total: float) -> None:
    """Runs all tables in their shares of the time, then what had to wait."""
    end = time.perf_counter() + total
    tables: dict[str, Table] = {name: TABLES[name] for name in results.found["tables"]}
    shares = sum(table.share for table in tables.values()) or 1.0
    waiting: list[tuple[str, Job]] = []
    later = 1.0  # the share of the tables behind one
    for name, table in tables.items():
        later -= table.share / shares
        for job in table.jobs(bench):
            rest = end - time.perf_counter()
            left = rest - total * later
            if job.seconds > left:
                waiting.append((name, job))
            else:
                results.run(name, job, bench.device, min(rest, max(left, 3 * job.seconds)))
    for name, job in waiting:
        rest = end - time.perf_counter()
        if job.seconds <= rest:
            results.run(name, job, bench.device, rest)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what takes longer, where signals can do that, until it has ended."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- Markdown ------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> Iterator[str]:
    """All tables of a file as Markdown, with what failed and what was left out."""
    for name, table in found["tables"].items():
        yield f"\n## {TABLES[name].title}\n"
        yield from markdown(table["rows"])
        for job, error in table["failed"].items():
            yield f"\nFailed: {job}: {error.splitlines()[0]}"
        if table["left_out"]:
            yield f"\nLeft out for time: {'; '.join(table['left_out'])}."
    setup = found["machine"]
    chip = f"{setup['accelerator']} in {setup['cpu']}" if setup["accelerator"] else setup["cpu"]
    yield f"\n```text\n{chip}, torch {setup['torch']}, {found['rounds']} rounds; command:"
    yield f"{found['command']}\n```"


def markdown(rows: list[Row]) -> Iterator[str]:
    """Rows as a table of all their columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if columns:
        words = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}
        yield f"| {' | '.join(columns)} |"
        yield f"| {' | '.join('---' if c in words else '--:' for c in columns)} |"
    for row in rows:
        yield f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |"


def main() -> None:
    options = parse()
    if options.markdown:
        found = json.loads(options.markdown.read_text(encoding="utf-8"))
        print("\n".join(report(found)))
        return
    toy = options.toy or options.device.type == "cpu"
    torch.set_float32_matmul_precision("high")
    bench = Bench(options.device, TOY if toy else FULL)
    results = Results(bench, options.tables, options.out)
    results.write()
    run_all(results, bench, options.time)
    tables = results.found["tables"].items()
    for name, table in tables:
        print(f"\n{name}: {len(table['rows'])} rows in {table['seconds']:.0f} s", end="")
        print(f"; left out for time: {'; '.join(table['left_out'])}" if table["left_out"] else "")
    print(closing("gpu.py", device=options.device, rounds=bench.sizes.rounds, packages=("timm",)))
    if any(table["failed"] for _, table in tables):
        sys.exit("some rows failed; see above")


def parse() -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--time", type=float, default=480, help="seconds for all tables together")
    parser.add_argument("--toy", action="store_true", help="sizes of a toy, as always on a CPU")
    parser.add_argument("--out", type=Path, help="file for all numbers, for programs")
    parser.add_argument("--markdown", type=Path, help="only print the tables of such a file")
    add_device(parser)
    parser.set_defaults(device="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
