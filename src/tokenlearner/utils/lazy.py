"""Names of a package that are imported on first use, so that importing the package is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
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
        fallback: Gives other names a value, or raises AttributeError.
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
