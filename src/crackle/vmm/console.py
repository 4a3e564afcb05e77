"""The guest's serial console, held by a program: what came out of it so far, and something to type into it.

Owns two pipes and the thread that empties one of them, so that a guest that writes much never waits for its reader.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time

from crackle.errors import CrackleError, StateError

_CHUNK = 1 << 16


class Console:
    """Output is kept from the start; `expect` goes on where the one before it found something.

    `guest_in` and `guest_out` are the machine's ends of the pipes.
    """

    def __init__(self) -> None:
        self.guest_in, self._input = os.pipe2(os.O_CLOEXEC)
        self._output, self.guest_out = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        self._buffer = bytearray()
        self._position = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._drain, name="console", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        while not self._closed:
            poll.poll()
            with self._changed:
                self._take()

    def _take(self) -> None:
        """Read what there is; the lock is held."""
        while not self._closed:
            try:
                data = os.read(self._output, _CHUNK)
            except BlockingIOError:
                return
            self._buffer += data
            self._closed = not data
            self._changed.notify_all()

    @property
    def output(self) -> bytes:
        """Everything the guest has written since it was started."""
        with self._changed:
            self._take()
            return bytes(self._buffer)

    @property
    def text(self) -> str:
        """`output` as text; bytes that are no UTF-8 are replaced."""
        return self.output.decode(errors="replace")

    def write(self, data: bytes | str) -> None:
        """Type `data` into the guest. Waits while more than a pipe's room is unread. StateError when it has ended."""
        view = memoryview(data.encode() if isinstance(data, str) else data)
        try:
            while view:
                view = view[os.write(self._input, view) :]
        except OSError:
            raise StateError("the guest's console is closed: the microVM has stopped") from None

    def expect(self, pattern: str | bytes, timeout: float = 30.0) -> re.Match[bytes]:
        """Wait until the regular expression matches what came after the last match, and return the match.

        CrackleError, with the last lines of output, after `timeout` seconds or when the console closes without one.
        """
        expression = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = time.monotonic() + timeout
        with self._changed:
            self._take()
            while True:
                found = expression.search(self._buffer, self._position)
                if found is not None:
                    self._position = found.end()
                    # A match of its own, not one that looks into the growing buffer.
                    match = expression.search(bytes(found.group()))
                    return match if match is not None else found
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    break
                self._changed.wait(left)
            tail = bytes(self._buffer[-2000:]).decode(errors="replace")
        why = "the guest ended" if self._closed else f"nothing in {timeout:g} s"
        raise CrackleError(f"the console did not show {pattern!r}: {why}. It ends with:\n{tail}")

    def close(self) -> None:
        """Close the pipes, after the machine is stopped; the output stays. Idempotent."""
        if self.guest_out < 0:
            return
        os.close(self.guest_out)
        self._thread.join()
        for fd in (self.guest_in, self._input, self._output):
            os.close(fd)
        self.guest_in = self.guest_out = self._input = self._output = -1
