"""Lazy imports: the names of a package are imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time
if TYPE_CHECKING:
    from typing import Any


def lazy_exports(
    package: str,
    modules: Mapping[str, Sequence[str]],
    fallback: Callable[[str], Any] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: The package's `__name__`.
        modules: Modules of the package, and the names that each of them exports.
        fallback: Returns the value of another name, or raises AttributeError.
    """
    owners = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in owners:
            value = getattr(import_module(f"{package}.{owners[name]}"), name)
        elif name in modules:
            value = import_module(f"{package}.{name}")
        elif fallback is not None and not name.startswith("__"):
            return fallback(name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *owners, *modules})

    return get, names, sorted(owners)
