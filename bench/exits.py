"""exit.*: what a handled exit costs, beside a KVM_RUN round trip that does nothing with it and the reference.

The guest counts time stamp cycles per exit. The floor is the same guest in the same exits under a loop that
calls KVM_RUN and nothing else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import alternate, run_guest
from bench.rows import GUESTS, Bench, Row, paired
from crackle.schema.boot import BootSource
from crackle.schema.config import VmConfig
from crackle.schema.drive import Drive
from crackle.schema.machine import default_machine_config
from crackle.vmm.builder import build
from crackle.vmm.machine import BuildOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The best of many slices, each shorter than what a busy host lets a thread run undisturbed.
SLICES = 60
EXITS = 50
KINDS = {"pio": "in", "mmio": "mmio"}
# From CPL 3 and from CPL 0: on a host that interprets CPL 0 an exit from there takes no switch of worlds.
LEVELS = {"": "", "_cpl0": " kernel"}


def bare_round_trip(options: str, drive: Path) -> tuple[float, int]:
    """(nanoseconds of one KVM_RUN whose exit is not handled, frequency of the guest's TSC in kHz).

    The machine is built as any other, but nobody is behind its vCPU. options: of the `exits` guest.
    """
    source = BootSource(kernel_image_path=str(GUESTS / "exits.elf"), boot_args=options)
    drives = [Drive(drive_id="drive0", is_root_device=False, path_on_host=str(drive))]
    config = VmConfig(boot_source=source, drives=drives, machine_config=default_machine_config())
    machine = build(config, None, BuildOptions(console_in=-1, console_out=-1))
    try:
        vcpu = machine.vcpus[0]
        printed = b""
        while not printed.endswith(b"\n"):
            reason, details = vcpu.run_once()
            if reason != "io" or not isinstance(details, tuple):
                raise RuntimeError(f"the guest printed {printed!r} and ended with {reason} {details}")
            printed += details[3]
        return min(vcpu.time_exits(EXITS) for _ in range(SLICES)) / EXITS, vcpu.tsc_khz
    finally:
        machine.stop()


def rows(bench: Bench) -> Iterator[Row]:
    """Exit costs in microseconds, in rounds of floor, ours, theirs."""
    drive = bench.scratch / "exits.img"
    drive.write_bytes(bytes(1 << 20))  # its virtio-mmio window is what the MMIO exits read
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    khz = 0
    for name, command in alternate(bench.contestants, bench.times(15)):
        for level, option in LEVELS.items():
            if name == "ours":
                for kind, guests_name in KINDS.items():
                    nanoseconds, khz = bare_round_trip(f"spin={guests_name}{option}", drive)
                    costs["floor", kind + level].append(nanoseconds / 1000)
            options = f"kinds={','.join(KINDS.values())} n={EXITS} slices={SLICES} khz={khz}{option}"
            printed = run_guest(command, bench.scratch, "exits", options, drives=[drive])
            for kind, guests_name in KINDS.items():
                cycles = int(re.findall(rf"exits {guests_name} n=\d+ cycles=(\d+)", printed)[0])
                costs[name, kind + level].append(cycles / khz * 1000)
    for exit_ in (kind + level for level in LEVELS for kind in KINDS):
        ours = costs["ours", exit_]
        yield paired(
            f"exit.{exit_}", "us", ours, costs["floor", exit_], "a bare KVM_RUN round trip", "<= 1.2"
        )
        theirs = costs["reference", exit_]
        yield paired(f"exit.{exit_}.reference", "us", ours, theirs, bench.reference_name, "<= 1.0")
