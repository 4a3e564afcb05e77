"""Where log lines and metrics go (``/logger``, ``/metrics``)."""

from __future__ import annotations

import msgspec

from crackle.errors import ConfigError
from crackle.schema._base import Resource


class LoggerConfig(Resource):
    """A file or named pipe, the least severe level written, and what each line shows.

    ``level`` is Off, Error, Warning (or Warn), Info, Debug or Trace in any case; ``module`` is the prefix of
    the module names whose lines are kept.
    """

    log_path: str | None = None
    level: str | None = None
    show_level: bool | None = None
    show_log_origin: bool | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        from crackle.telemetry.logger import parse_level

        if self.level is not None:
            try:
                parse_level(self.level)
            except ConfigError as error:
                raise ValueError(f"Invalid LevelFilter: {error}") from None


class MetricsConfig(msgspec.Struct):
    """A file or named pipe. ``emit_id`` and ``properties`` add the instance id and fixed pairs to lines."""

    metrics_path: str
    emit_id: bool = False
    properties: dict[str, str] | None = None
