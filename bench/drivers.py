"""drivers.*: virtio-net for drivers that use less of it, and on hosts that do something else as well.

Each driver is the `net` guest with features off in turn; "plain" has neither event index nor merged receive buffers, as
drivers of small kernels have it, and transmits chains of two descriptors; "told" is that and leaves interrupts on,
though it polls. The sender has no room to be polite: it goes past the queueing discipline, so that guest, monitor and
sender want two processors between them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from bench.hosts import HOSTS
from bench.monitor import alternate
from bench.net import Network, Speed, Test, build_tool, measure
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVERS = {
    "all": "large buffer=4096",
    "noevent": "large buffer=4096 noevent",
    "nomerge": "large buffer=65568 nomerge",
    "plain": "large buffer=65568 nomerge noevent split group=32",
    "told": "large buffer=65568 nomerge noevent split group=32 told",
}

TESTS = (("tx", 64, 0), ("tx", 65000, 0), ("rx", 1400, 64), ("rx", 65000, 8))


class Case(NamedTuple):
    """A driver on a host."""

    driver: str
    host: str


CASES = (
    *(Case(driver, "quiet") for driver in DRIVERS),
    *(Case(driver, host) for driver in ("all", "plain", "told") for host in ("third", "quota")),
)


def test_of(case: Case, operation: str, size: int, group: int) -> Test:
    """What the `net` guest and the sender are told."""
    name = f"drivers.{case.driver}.{case.host}.{operation}_{'64k' if size == 65000 else size}"
    return Test(name, operation, size, DRIVERS[case.driver], group, "burst")


def rows(bench: Bench) -> Iterator[Row]:
    """Frames a second, and CPU seconds a GiB."""
    tool = build_tool()
    with Network(queue=500) as network:
        for case in CASES:
            tests = [test_of(case, *test) for test in TESTS]
            found: dict[tuple[str, str], list[Speed]] = defaultdict(list)
            for name, command in alternate(bench.contestants, bench.times(9)):
                for test in tests:
                    with HOSTS[case.host]():
                        found[name, test.name].append(measure(network, command, bench, tool, test))
            for test in tests:
                ours, reference = found["ours", test.name], found["reference", test.name]
                yield paired(
                    test.name,
                    "frames/s",
                    [one.frames for one in ours],
                    [one.frames for one in reference],
                    bench.reference_name,
                    ">= 1.0",
                )
                yield paired(
                    f"{test.name}.cpu",
                    "s/GiB",
                    [one.cpu_per_gib for one in ours],
                    [one.cpu_per_gib for one in reference],
                    bench.reference_name,
                    "<= 1.0",
                )
