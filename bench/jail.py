"""jail.*: microVMs started by the jailer, beside the other monitor by its own; what jail and filters cost a guest."""

from __future__ import annotations

import importlib
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.launch import CROWD_MIB, SETTLED_S, first_output, launcher, zygote
from bench.memory import overhead_kib
from bench.monitor import JAILER, Monitor, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CROWD = 20
# What a guest does that goes through system calls of the monitor's, and what does not.
DATA_PATH = {
    "exits": ("exit.pio.reference", "exit.mmio.reference"),
    "block": ("block.sync.randread_4k_qd1", "block.sync.randwrite_4k_qd32", "block.async.randread_4k_qd32"),
    "net": ("net.tx_64", "net.rx_1400"),
}


def rows(bench: Bench) -> Iterator[Row]:
    """Wall time from the spawn, without a zygote and with one; memory; a guest's speed, with and without both."""
    ours = [str(Path(sys.executable).with_name("crackle-jailer")), bench.ours[0]]
    launched = [str(Path(sys.executable).with_name("crackle-launch-jailer")), bench.ours[0]]
    contestants: dict[str, Sequence[str]] = {"ours": ours}
    if bench.reference is not None and (jailer := Path(bench.reference[0]).with_name(JAILER)).exists():
        contestants["reference"] = [str(jailer), bench.reference[0]]
    against = f"{bench.reference_name}, jailed"
    for name, command in (("jail.cold", ours), ("jail", launched)):
        ready: dict[str, list[float]] = defaultdict(list)
        output: dict[str, list[float]] = defaultdict(list)
        with zygote(bench.scratch):
            for who, each in alternate({**contestants, "ours": command}, bench.times(50)):
                with Monitor(each, bench.scratch) as monitor:
                    ready[who].append(monitor.ready_after * 1000)
                    output[who].append(first_output(monitor) * 1000)
        goal = None if name == "jail.cold" else "<= 2.0"
        yield paired(f"{name}.api_socket", "ms", ready["ours"], ready["reference"], against, goal)
        yield paired(f"{name}.first_output", "ms", output["ours"], output["reference"], against)
    pss: dict[str, list[float]] = defaultdict(list)
    for who, each in alternate({"ours": launched, "reference": [launcher()]}, 3):
        with zygote(bench.scratch) as pid:
            pss[who].append(_crowd(each, bench.scratch, pid))
    yield paired(
        "jail.pss", f"KiB each of {CROWD}", pss["ours"], pss["reference"], "without a jail", "<= 1.1"
    )
    bare = bench._replace(ours=ours, reference=[*bench.ours, "--no-seccomp"], reference_name="neither")
    for area, wanted in DATA_PATH.items():
        for row in importlib.import_module(f"bench.{area}").rows(bare):
            if row.name in wanted:
                yield row._replace(name=f"jail.{row.name.removesuffix('.reference')}", goal=None, met=None)


def _crowd(command: Sequence[str], scratch: Path, zygote_pid: int) -> float:
    """KiB (PSS) that each of several costs."""
    monitors: list[Monitor] = []
    try:
        for _ in range(CROWD):
            monitors.append(Monitor(command, scratch))
            first_output(monitors[-1])
        time.sleep(SETTLED_S)
        children = Path(f"/proc/{zygote_pid}/task/{zygote_pid}/children").read_text()
        pids = [monitor.pid for monitor in monitors] + [int(pid) for pid in children.split()]
        return sum(overhead_kib(pid, CROWD_MIB)[0] for pid in pids) / CROWD
    finally:
        for monitor in monitors:
            monitor.close()
