"""The serial console's output (``/serial``)."""

from __future__ import annotations

from crackle.schema._base import Resource
from crackle.schema.rate_limiter import TokenBucket


class Serial(Resource):
    """The file or named pipe that takes the guest's console output; standard output when there is none."""

    serial_out_path: str | None = None
    rate_limiter: TokenBucket | None = None
