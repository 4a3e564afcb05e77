"""exit.*: what a handled exit costs, beside a KVM_RUN round trip that does nothing with it and the reference.

The guest counts time stamp cycles per exit. The floor is the same guest in the same exits under a loop that
calls KVM_RUN and nothing else.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import alternate, run_guest
from bench.rows import GUESTS, Bench, Row, paired
from crackle import arch
from crackle.kvm import Kvm
from crackle.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

# The best of many slices, each shorter than what a busy host lets a thread run undisturbed.
SLICES = 60
EXITS = 50
KINDS = {"pio": "in", "mmio": "mmio"}
MEMORY = 64 << 20


def bare_round_trip(kind: str) -> tuple[float, int]:
    """(nanoseconds of one KVM_RUN whose exit is not handled, frequency of the guest's TSC in kHz).

    kind: as the `exits` guest names it.
    """
    with Kvm() as kvm, GuestMemory(arch.memory_layout(MEMORY)) as memory, kvm.create_vm() as vm:
        vm.set_tss_addr(arch.layout.KVM_TSS_ADDRESS)
        vm.create_irqchip()
        for slot, region in enumerate(memory.regions):
            vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
        vcpu = vm.create_vcpu(0)
        try:
            image = os.open(GUESTS / "exits.elf", os.O_RDONLY)
            try:
                kernel = arch.load_kernel(memory, image)
            finally:
                os.close(image)
            arch.configure_system(
                memory, kernel=kernel, cmdline=f"spin={kind}".encode(), initrd=None, vcpu_count=1, devices=()
            )
            cpuid = kvm.supported_cpuid()
            arch.configure_vcpu(vcpu, index=0, count=1, smt=False, supported_cpuid=cpuid, kernel=kernel)
            printed = b""
            while not printed.endswith(b"\n"):
                reason, details = vcpu.run_once()
                if reason != "io" or not isinstance(details, tuple):
                    raise RuntimeError(f"the guest printed {printed!r} and ended with {reason} {details}")
                printed += details[3]
            return min(vcpu.time_exits(EXITS) for _ in range(SLICES)) / EXITS, vcpu.tsc_khz
        finally:
            vcpu.close()


def rows(bench: Bench) -> Iterator[Row]:
    """Exit costs in microseconds, in rounds of floor, ours, theirs."""
    drive = bench.scratch / "exits.img"
    drive.write_bytes(bytes(1 << 20))  # its virtio-mmio window is what the MMIO exits read
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, command in alternate(bench.contestants, bench.times(15)):
        khz = 0
        if name == "ours":
            for kind, guests_name in KINDS.items():
                nanoseconds, khz = bare_round_trip(guests_name)
                costs["floor", kind].append(nanoseconds / 1000)
        options = f"kinds={','.join(KINDS.values())} n={EXITS} slices={SLICES} khz={khz}"
        printed = run_guest(command, bench.scratch, "exits", options, drives=[drive])
        khz = int(re.findall(r"khz (\d+)", printed)[0])
        for kind, guests_name in KINDS.items():
            cycles = int(re.findall(rf"exits {guests_name} n=\d+ cycles=(\d+)", printed)[0])
            costs[name, kind].append(cycles / khz * 1000)
    for kind in KINDS:
        ours = costs["ours", kind]
        yield paired(f"exit.{kind}", "us", ours, costs["floor", kind], "a bare KVM_RUN round trip", "<= 1.2")
        theirs = costs["reference", kind]
        yield paired(f"exit.{kind}.reference", "us", ours, theirs, bench.reference_name, "<= 1.0")
