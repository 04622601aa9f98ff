"""Optional packages, imported where they are used."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time
if TYPE_CHECKING:
    from typing import Any


def require_package(name: str, extra: str, purpose: str = "this") -> Any:
    """Imports an optional package and returns it.

    Args:
        name: A module, such as `"torchao.quantization"`.
        extra: The extra of `tokenlearner` that installs it.
        purpose: The feature that needs it, for the message.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(
            f"{purpose} needs {package}; run pip install '.[{extra}]' in the folder of "
            "tokenlearner's repository"
        ) from error
