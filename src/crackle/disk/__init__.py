"""Overlays: files that take the writes of a disk in place of its base, which is never written.

`overlay` is the format of one, `chain` finds the layers that a disk is made of and opens them for a drive, `tools` does
what people and snapshots want of them. What a guest reads and writes goes through the core (`virtio/block/layers`).

For programs: `make` a new overlay over a file or over another overlay, `clone` a disk, `commit`, `rebase`, `describe`.
"""

from __future__ import annotations

from crackle.lazy import finder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.disk.overlay import make as make
    from crackle.disk.tools import clone as clone
    from crackle.disk.tools import commit as commit
    from crackle.disk.tools import describe as describe
    from crackle.disk.tools import rebase as rebase

_MODULE_OF = {
    "clone": "crackle.disk.tools",
    "commit": "crackle.disk.tools",
    "describe": "crackle.disk.tools",
    "make": "crackle.disk.overlay",
    "rebase": "crackle.disk.tools",
}

__all__ = [  # noqa: PLE0604  (the names are resolved by __getattr__)
    *_MODULE_OF
]

__getattr__ = finder("crackle.disk", _MODULE_OF)
