"""Names of a package that are imported when first used."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def finder(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` (PEP 562) of a package, for names and the modules that have them.

    A name may be another one there: "module:name".
    """

    def find(name: str) -> object:
        module, _, other = modules.get(name, "").partition(":")
        if not module:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = other or name
        value = getattr(__import__(module, fromlist=(found,)), found)
        setattr(sys.modules[package], name, value)
        return value

    return find
