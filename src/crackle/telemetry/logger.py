"""The log: one line an event, ``2026-01-31T12:00:00.123456789 [instance:thread:LEVEL:file:line] message``.

Standard output takes the lines until a file or named pipe is configured. Nothing here waits: a line that
does not fit is dropped and counted in ``lost``. Lines that a guest can cause as often as it likes go through a
:class:`Throttle`, one for each kind of line.
"""

from __future__ import annotations

import sys
import time

from crackle.errors import ConfigError
from crackle.telemetry.sink import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_INSTANCE_ID = "anonymous-instance"

OFF, ERROR, WARNING, INFO, DEBUG, TRACE = range(6)
_LEVELS = {
    "off": OFF,
    "error": ERROR,
    "warn": WARNING,
    "warning": WARNING,
    "info": INFO,
    "debug": DEBUG,
    "trace": TRACE,
}
_SHOWN = ("", "ERROR", "WARN", "INFO", "DEBUG", "TRACE")


def parse_level(text: str) -> int:
    """The level called ``text``, in any case; raises ConfigError."""
    level = _LEVELS.get(text.lower())
    if level is None:
        raise ConfigError(f"{text!r} is not a log level: use Off, Error, Warning, Info, Debug or Trace.")
    return level


def instance_id_problem(instance_id: str) -> str | None:
    """Why this cannot be the name of a microVM, or None."""
    if not 1 <= len(instance_id) <= 64:
        return f"Invalid instance ID: it has {len(instance_id)} characters, from 1 to 64 are allowed."
    for position, character in enumerate(instance_id):
        if character != "-" and not character.isalnum():
            return f"Invalid instance ID: invalid character ({character}) at position {position}."
    return None


def _nothing() -> None:
    """Nobody wants to know."""


class Throttle:
    """Lets ten through at once, and later two a second: Firecracker's figures for what a guest can cause."""

    __slots__ = ("_room", "_since", "held")

    BURST = 10
    REFILL_S = 5.0

    def __init__(self) -> None:
        self._room = float(self.BURST)
        self._since = time.monotonic()
        # How many were held back since the last that was let through.
        self.held = 0

    def allows(self) -> bool:
        """Whether one more may pass now."""
        now = time.monotonic()
        self._room = min(self._room + (now - self._since) * self.BURST / self.REFILL_S, self.BURST)
        self._since = now
        if self._room < 1:
            self.held += 1
            return False
        self._room -= 1
        return True


class Logger:
    """Writes the lines of one microVM. ``level`` is the least severe level that is written."""

    __slots__ = (
        "_module",
        "_second",
        "_show_level",
        "_show_origin",
        "_sink",
        "_stamp",
        "instance_id",
        "level",
        "lost",
        "on_change",
        "throttled",
    )

    def __init__(self, instance_id: str = DEFAULT_INSTANCE_ID, *, level: int = INFO, fd: int = 1) -> None:
        self.instance_id = instance_id
        self.level = level
        self.lost = 0
        # Lines that a throttle held back.
        self.throttled = 0
        # Called when lines look otherwise, or go elsewhere.
        self.on_change: Callable[[], None] = _nothing
        self._sink = Sink(fd)
        self._module: str | None = None
        self._show_level = False
        self._show_origin = False
        self._second = -1
        self._stamp = ""

    def set(
        self,
        log_path: str | None = None,
        level: str | None = None,
        show_level: bool | None = None,
        show_log_origin: bool | None = None,
        module: str | None = None,
    ) -> None:
        """Change what is given; the rest stays, but the level returns to Info.

        Raises ConfigError.
        """
        severity = INFO if level is None else parse_level(level)
        if log_path is not None:
            self.move(log_path)
        self.level = severity
        if show_level is not None:
            self._show_level = show_level
        if show_log_origin is not None:
            self._show_origin = show_log_origin
        if module is not None:
            self._module = module
        self.on_change()

    def error(self, message: str) -> None:
        """Something failed."""
        if self.level >= ERROR:
            self._write(ERROR, message)

    def warning(self, message: str) -> None:
        """Something is not as it should be, and work goes on."""
        if self.level >= WARNING:
            self._write(WARNING, message)

    def info(self, message: str) -> None:
        """Something happened."""
        if self.level >= INFO:
            self._write(INFO, message)

    def debug(self, message: str) -> None:
        """Something for whoever looks for a fault."""
        if self.level >= DEBUG:
            self._write(DEBUG, message)

    def trace(self, message: str) -> None:
        """Everything."""
        if self.level >= TRACE:
            self._write(TRACE, message)

    def throttled_info(self, throttle: Throttle, message: str) -> None:
        """Something happened because the guest wanted it to: at most as often as ``throttle`` lets it be told."""
        if self.level < INFO:
            return
        if not throttle.allows():
            self.throttled += 1
            return
        if throttle.held:
            self._write(WARNING, f"{throttle.held} messages were suppressed due to rate limiting")
            throttle.held = 0
        self._write(INFO, message)

    def _write(self, level: int, message: str) -> None:
        origin = ""
        if self._show_origin or self._module is not None:
            frame = sys._getframe(2)
            module = frame.f_globals.get("__name__", "")
            if self._module is not None and not module.startswith(self._module):
                return
            if self._show_origin:
                origin = f":{frame.f_code.co_filename}:{frame.f_lineno}"
        now = time.time_ns()
        second = now // 1_000_000_000
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(second))
        shown = f":{_SHOWN[level]}" if self._show_level else ""
        line = f"{self._stamp}.{now % 1_000_000_000:09} [{self.instance_id}:main{shown}{origin}] {message}\n"
        if not self._sink.write(line.encode(errors="backslashreplace")):
            self.lost += 1

    def last_words(self) -> tuple[int, bytes, bytes, int]:
        """How a line about a failure is written without any of this.

        Its destination, -1 for none; what is on the left and on the right of the thread's name, behind the time; and
        that time's offset from UTC in seconds.
        """
        shown = f":{_SHOWN[ERROR]}" if self._show_level else ""
        origin = f":{__file__}:1" if self._show_origin else ""
        return (
            self._sink.unwaiting if self.level >= ERROR else -1,
            f" [{self.instance_id}:".encode(),
            f"{shown}{origin}] ".encode(errors="backslashreplace"),
            time.localtime().tm_gmtoff,
        )

    @property
    def file(self) -> int:
        """The descriptor of the file or pipe that was configured; -1 without one."""
        return self._sink.file

    def move(self, log_path: str) -> None:
        """Write there from now on, at the same level. Raises ConfigError."""
        sink = Sink.open(log_path, "Failed to open target file")
        self._sink.close()
        self._sink = sink

    def rename(self, instance_id: str) -> None:
        """In a forked process: be that microVM's, and write to the same file or pipe, or to standard output."""
        self.instance_id = instance_id
        self.lost = self.throttled = 0
        self._sink = self._sink.inherited()

    def close(self) -> None:
        """Close the configured file; idempotent."""
        self._sink.close()
