"""Names of a package that are imported when they are first asked for (PEP 562).

So `captum-attn --help`, and the answer to a mistyped name, do not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ["on_demand"]


def on_demand(
    package: str, homes: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package (str): its name.
        homes (Mapping): a name -> the module of the package that has it.
        modules (sequence of str): modules of the package that are names, too.

    Returns:
        tuple: the two functions.

    Examples::

        >>> __getattr__, __dir__ = on_demand(__name__, {"evaluate": "run"})
    """

    def of_name(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(f"{package}.{homes[name]}")
        found = (
            getattr(home, name) if hasattr(home, name) else import_module(f"{home.__name__}.{name}")
        )
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *modules})

    return of_name, names
