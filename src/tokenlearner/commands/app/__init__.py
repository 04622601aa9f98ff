"""`tokenlearner app`: a web page that shows where learned tokens look."""

from collections.abc import Sequence


def app_command(arguments: Sequence[str]) -> None:
    """Serves the page until it is interrupted."""
    from .._arguments import read_config
    from . import server

    summary = "checkpoints, folders of `tokenlearner demo`, or names; none takes the demos here"
    checkpoints = {"type": str, "nargs": "*", "default": (), "help": summary}
    server.app(read_config("app", server.AppConfig, arguments, checkpoints=checkpoints))
