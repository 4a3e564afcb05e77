"""The balloon of a program's microVM: `MicroVM.balloon`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crackle.schema.balloon import (
    Balloon,
    BalloonHintingStart,
    BalloonHintingStatus,
    BalloonStats,
    BalloonStatsUpdate,
    BalloonUpdate,
)
from crackle.vmm.arguments import make

if TYPE_CHECKING:
    from collections.abc import Callable


class BalloonControl:
    """What can be asked of a microVM's balloon. ConfigError, with the API's words, where that cannot be had."""

    def __init__(self, order: Callable[..., Any]) -> None:
        self._order = order

    @property
    def config(self) -> Balloon:
        """As it is configured, the target that `resize` has set last among it."""
        found: Balloon = self._order("get_balloon")
        return found

    def resize(self, mib: int) -> None:
        """Have the guest give up so many MiB, 0 to all of its memory.

        Its driver, which has to be there, takes its time: `statistics` tells how far it is.
        """
        self._order("patch_balloon", make(BalloonUpdate, amount_mib=mib))

    def statistics(self) -> BalloonStats:
        """Sizes, and what the guest has said last of its memory, as often as it is asked (`poll`).

        None of the latter before its driver is there.
        """
        found: BalloonStats = self._order("get_balloon_statistics")
        return found

    def poll(self, seconds: int) -> None:
        """Ask the guest for statistics now, and every so many seconds, 1 to 65535, from now on."""
        self._order("patch_balloon_statistics", make(BalloonStatsUpdate, stats_polling_interval_s=seconds))

    def start_hinting(self, *, acknowledge_on_stop: bool = True) -> None:
        """Have the guest tell of its free pages, which the host gets.

        acknowledge_on_stop: the guest may use them again when it has told of all; else after `stop_hinting`.
        """
        self._order(
            "start_balloon_hinting", make(BalloonHintingStart, acknowledge_on_stop=acknowledge_on_stop)
        )

    def hinting_status(self) -> BalloonHintingStatus:
        """How far that is: the guest has told of all when its command is 0."""
        found: BalloonHintingStatus = self._order("get_balloon_hinting")
        return found

    def stop_hinting(self) -> None:
        """Let the guest use its free pages again."""
        self._order("stop_balloon_hinting")
