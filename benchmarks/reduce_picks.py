"""Does `reduce`, in minutes, pick what is closest when every candidate is trained to the end?

Takes the options of insertion.py and what its runs found, here in `--out` or as `--known`.
"""

from __future__ import annotations

from argparse import Namespace
from statistics import median
from typing import Any

import torch
from insertion import build_parser, finished
from insertion_sets import load_setting
from measured import closing, write_results
from printed import picks_table, ranked

from tokenlearner import reduce
from tokenlearner.training.candidates import find_candidates


def full_errors(options: Namespace, budget: float) -> dict[str, float]:
    """What candidates leave open when they are trained to the end, the least first."""
    runs = ranked(finished(options), budget)
    return {
        name: median(row["error"] for row in rows)
        for name, rows in runs.items()
        if rows[0]["candidate"]
    }


def pick(options: Namespace, budget: float) -> dict[str, Any]:
    """Has `reduce` choose, and looks its choice up in the table of full runs.

    Raises:
        ValueError: A candidate has no full run.
    """
    setting, errors = load_setting(options), full_errors(options, budget)
    host = setting.host.to(options.device, getattr(torch, options.dtype)).eval()
    images = setting.normalized(setting.train.images.to(options.device)).to(next(host.parameters()))
    names = [candidate.name for candidate, _ in find_candidates(host, images[:1], budget)[1:]]
    if missing := sorted({*names} - {*errors}):
        raise ValueError(f"no full run of {'; '.join(missing)} yet; run insertion.py with them")
    done = reduce(
        host,
        images,
        budget,
        seconds=60 * options.minutes,
        views=options.views,
        batch_size=options.batch_size,
        latency_batches=[1],
        train_best=False,
    )
    brief = {row.name: row.errors for row in done.rows[1:]}
    among = [name for name in errors if name in brief]
    found: dict[str, Any] = {"budget": budget, "picked": done.best.name, "brief_errors": brief}
    found |= {"rank": among.index(done.best.name) + 1, "candidates": len(among)}
    found |= {"full_errors": {name: errors[name] for name in among}, "seconds": done.seconds}
    return found


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="that reduce may take")
    options = parser.parse_args()
    found = [pick(options, budget) for budget in options.budgets]
    print(picks_table(options.set, found))
    write_results(options.out / "reduce_picks.json", "reduce_picks.py", {"rows": found})
    print(closing("reduce_picks.py", device=options.device))


if __name__ == "__main__":
    main()
