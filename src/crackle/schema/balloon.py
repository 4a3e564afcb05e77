"""The memory balloon (``/balloon``, ``/balloon/statistics``, ``/balloon/hinting``)."""

from __future__ import annotations

import msgspec

from crackle.schema._base import U16, U32, U64, Resource


class Balloon(Resource):
    """A balloon that holds ``amount_mib`` MiB of the guest's memory.

    Statistics are asked for every ``stats_polling_interval_s`` seconds, never when it is 0.
    """

    amount_mib: U32
    deflate_on_oom: bool
    stats_polling_interval_s: U16 = 0
    free_page_hinting: bool = False
    free_page_reporting: bool = False


class BalloonUpdate(Resource):
    """A new target size in MiB."""

    amount_mib: U32


class BalloonStatsUpdate(Resource):
    """A new polling interval in seconds."""

    stats_polling_interval_s: U16


class BalloonHintingStart(msgspec.Struct):
    """Start of a free page hinting run."""

    acknowledge_on_stop: bool = True


class BalloonHintingStatus(msgspec.Struct):
    """The command the host gave last and the one the guest works on."""

    host_cmd: U32
    guest_cmd: U32 | None = None


class BalloonStats(msgspec.Struct, omit_defaults=True):
    """Sizes of the balloon, and what the guest says of its memory (pages of 4 KiB, sizes in bytes)."""

    target_pages: U32
    actual_pages: U32
    target_mib: U32
    actual_mib: U32
    swap_in: U64 | None = None
    swap_out: U64 | None = None
    major_faults: U64 | None = None
    minor_faults: U64 | None = None
    free_memory: U64 | None = None
    total_memory: U64 | None = None
    available_memory: U64 | None = None
    disk_caches: U64 | None = None
    hugetlb_allocations: U64 | None = None
    hugetlb_failures: U64 | None = None
    oom_kill: U64 | None = None
    alloc_stall: U64 | None = None
    async_scan: U64 | None = None
    direct_scan: U64 | None = None
    async_reclaim: U64 | None = None
    direct_reclaim: U64 | None = None
