"""`tokenlearner report`: one HTML file about a run."""

import re
from collections.abc import Sequence


def report_command(arguments: Sequence[str]) -> None:
    """Writes the report and prints where it is."""
    from .._arguments import read_config
    from .._console import say
    from .render import ReportConfig, show_data_of_runs, write_report

    old = re.compile("^--pictures(?==|$)")  # of version 0.3
    arguments = [old.sub("--images", argument) for argument in arguments]
    config = read_config("report", ReportConfig, arguments)
    if config.images:
        show_data_of_runs(config.source)
    say(f"The report is {write_report(**vars(config))}")
