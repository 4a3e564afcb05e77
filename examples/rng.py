"""A virtio device written in Python: an entropy source (virtio 1.2, section 5.4), with a limit of its own.

    python examples/rng.py KERNEL ROOTFS

The guest's driver offers buffers on the one queue and waits for them to come back full of random bytes.
"""

from __future__ import annotations

import os
import sys

import crackle


class Rng(crackle.VirtioDevice):
    """Gives at most `budget` bytes, and then nothing, as a source that has run dry."""

    device_id = 4
    queue_sizes = (8,)

    def __init__(self, budget: int = 1 << 20) -> None:
        self.budget = budget

    def handle_queue(self, index, queue):
        for request in queue:
            data = os.urandom(min(request.writable, self.budget, 4096))
            self.budget -= len(data)
            request.write(data)
            request.complete()

    def save(self) -> bytes:
        return self.budget.to_bytes(8, "little")

    def restore(self, state: bytes) -> None:
        self.budget = int.from_bytes(state, "little")


if __name__ == "__main__":
    rng = Rng()
    with crackle.MicroVM(sys.argv[1], sys.argv[2], devices=[rng]) as vm:
        vm.console.expect(" # ", 60)
        vm.console.write("cat /sys/class/misc/hw_random/rng_current; head -c 32 /dev/hwrng | od -An -tx1\n")
        print(vm.console.expect(" # ", 60).before.decode())
    print(f"{(1 << 20) - rng.budget} bytes given")
