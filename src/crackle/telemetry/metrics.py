"""Metrics: one JSON object a line, with every name there is and the growth of each counter since the last.

Whoever counts keeps absolute numbers: the control plane in :attr:`Metrics.counters`, devices in a source, a
callable that returns ``{section: {name: value}}``. The difference is taken here, so a line that could not
be written loses nothing: the next one holds its counts too.
"""

from __future__ import annotations

import time

import msgspec

from crackle.errors import ConfigError, CrackleError
from crackle.telemetry.names import SECTIONS, STORED_NAMES, STORED_SECTIONS, SUMMED
from crackle.telemetry.sink import BAD_INPUT, Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Section = dict[str, Any]
    Tree = dict[str, Section]
    Source = Callable[[], Mapping[str, Mapping[str, Any]]]

# Seconds between two lines of a running microVM.
FLUSH_PERIOD_S = 60.0


def empty_section(name: str) -> Section:
    """The section ``name`` with every metric at zero."""
    return {
        metric: {"min_us": 0, "max_us": 0, "sum_us": 0} if metric.endswith("_agg") else 0
        for metric in SECTIONS[name].split()
    }


class Metrics:
    """The metrics of one microVM, and the file or pipe that takes them once it is configured."""

    def __init__(self, *, own: bool = False) -> None:
        """own: write what only Crackle counts, too. Strict readers of Firecracker's metrics refuse such names."""
        self._own = own
        self.counters: dict[str, dict[str, int]] = {
            name: empty_section(name)
            for name in (
                "api_server",
                "deprecated_api",
                "get_api_requests",
                "latencies_us",
                "logger",
                "patch_api_requests",
                "put_api_requests",
                "seccomp",
                "signals",
                "vmm",
            )
        }
        self.sources: list[Source] = []
        self._sink: Sink | None = None
        self._extra: dict[str, Any] = {}
        self._written: Tree = {}

    def configure(self, path: str, extra: Mapping[str, Any]) -> None:
        """Open the destination, which can be done once; raises ConfigError. `extra` is in every line."""
        sink = Sink.open(path, BAD_INPUT)
        if self._sink is not None:
            sink.close()
            raise ConfigError(f"{BAD_INPUT}: Reinitialization of metrics not allowed.")
        self._sink = sink
        self._extra.update(extra)

    def attach(self, sink: Sink) -> None:
        """Write to ``sink``, which is taken over."""
        self._sink = sink

    def collect(self) -> Tree:
        """Every metric there is, as an absolute number."""
        tree: Tree = {name: empty_section(name) for name in SECTIONS}
        for name, section in self.counters.items():
            tree[name].update(section)
        for source in self.sources:
            for name, given in source().items():
                kind = _kind_of(name)
                if name not in tree and kind is not None:
                    tree[name] = empty_section(kind)
                _merge(tree.setdefault(name, {}), given)
                if kind is not None and name != kind:
                    _merge(tree[kind], given)
        return tree

    def flush(self) -> bool:
        """Write one line.

        False if there is no destination; raises CrackleError if it did not take the line.
        """
        if self._sink is None:
            return False
        tree = self._tree()
        if not self._sink.write(self._line(tree, self._written)):
            self.counters["logger"]["missed_metrics_count"] += 1
            raise CrackleError("Failed to write metrics: the reader of the metrics file or pipe is behind.")
        self._written = tree
        return True

    def _tree(self) -> Tree:
        return self.collect() if self._own else _firecrackers(self.collect())

    def _line(self, tree: Tree, before: Tree) -> bytes:
        line = {"utc_timestamp_ms": time.time_ns() // 1_000_000, **self._extra}
        for name, section in tree.items():
            line[name] = section if name in STORED_SECTIONS else _growth(section, before.get(name, {}))
        return msgspec.json.encode(line) + b"\n"

    def last_line(self) -> tuple[int, bytes]:
        """The destination, -1 for none, and what to write there when a forbidden system call ends the process.

        That is a line that counts this and nothing else.
        """
        if self._sink is None:
            return -1, b""
        before = self._written or self._tree()
        faults = {name: count + 1 for name, count in before["seccomp"].items()}
        return self._sink.unwaiting, self._line({**before, "seccomp": faults}, before)

    def close(self) -> None:
        """Close the destination; idempotent."""
        if self._sink is not None:
            self._sink.close()


def _firecrackers(tree: Tree) -> Tree:
    """What of it Firecracker counts too."""
    kinds = {name: name if name in SECTIONS else _kind_of(name) for name in tree}
    return {
        name: {metric: section[metric] for metric in SECTIONS[kind].split() if metric in section}
        for name, section in tree.items()
        if (kind := kinds[name]) is not None
    }


def _kind_of(name: str) -> str | None:
    return next((kind for kind in SUMMED if name.startswith(f"{kind}_")), None)


def _merge(into: Section, given: Mapping[str, Any]) -> None:
    """Add ``given`` to ``into``: counts and sums add up.

    The least non-zero minimum and the greatest maximum stay.
    """
    for name, value in given.items():
        if isinstance(value, int):
            before = into.get(name, 0)
            if name == "max_us":
                into[name] = max(before, value)
            elif name == "min_us":
                into[name] = min(before or value, value or before)
            else:
                into[name] = before + value
        else:
            _merge(into.setdefault(name, {}), value)


def _growth(now: Section, before: Section) -> Section:
    return {
        name: _growth(value, before.get(name, {}))
        if isinstance(value, dict)
        else value
        if name in STORED_NAMES
        else value - before.get(name, 0)
        for name, value in now.items()
    }
