"""A guest that says nothing, for ever, on a host whose KVM cannot run Linux: whoever waits for it is told why."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from crackle.runtime.loop import Loop

    T = TypeVar("T")


class Silence:
    """Tells once, where the host is to blame, that the guest has said nothing for PERIOD_S seconds.

    said() is how many bytes it has written to its console so far.
    """

    PERIOD_S = 10.0
    LOOKS = 12

    def __init__(self, said: Callable[[], int], tell: Callable[[str], None]) -> None:
        self._said = said
        self._tell = tell
        self._seen = 0
        self._left = self.LOOKS

    def look(self) -> bool:
        """Compare with the last look, or the start; whether to look again PERIOD_S seconds later."""
        seen, self._seen = self._seen, self._said()
        self._left -= 1
        if self._seen != seen:
            return self._left > 0
        from crackle.vmm.probe import why_no_linux

        if (reason := why_no_linux()) is not None:
            self._tell(f"The guest has said nothing for {self.PERIOD_S:g} s. {reason}")
        return False

    def watch(self, loop: Loop) -> None:
        """Look from `loop`, for as long as there is something to look for."""

        def look() -> None:
            if self.look():
                loop.call_later(self.PERIOD_S, look)

        loop.call_later(self.PERIOD_S, look)

    def wait(self, wait: Callable[[float | None], T | None], timeout: float | None) -> T | None:
        """What wait(seconds) gives within `timeout` seconds, or None; looking meanwhile."""
        end = None if timeout is None else time.monotonic() + timeout
        looking = True
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            looking = looking and (left is None or left > self.PERIOD_S)
            found = wait(self.PERIOD_S if looking else left)
            if found is not None or not looking:
                return found
            looking = self.look()
