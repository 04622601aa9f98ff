"""`tokenlearner bench`: models measured side by side."""

from collections.abc import Sequence


def bench_command(arguments: Sequence[str]) -> None:
    """Measures models and prints the tables."""
    from .._arguments import read_config
    from .._console import console
    from .advise import advice_parts
    from .config import BenchConfig
    from .table import bench_tables

    summary = "a model's name, or a checkpoint; +insert(8,6) learns 8 tokens before block 6"
    models = {"type": str, "nargs": "+", "help": summary}
    config = read_config("bench", BenchConfig, arguments, models=models)
    parts = advice_parts if config.advise else bench_tables
    for part in parts(config, console(stderr=True).print):
        console().print(part)
