"""`crackle.VirtioDevice`: the base of virtio devices written in Python.

Its methods run on a thread of their own, neither a vCPU's nor the one that serves the built-in devices: a slow device
slows nobody else down. An exception that leaves a method puts the device into DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

from crackle.errors import StateError
from crackle.virtio.custom.device import PythonDevice, RequestQueue


class VirtioDevice:
    """A virtio device (virtio 1.2, section 2), attached with ``MicroVM(..., devices=[MyDevice()])``.

    device_id: what it is (section 5): 4 is an entropy source, 3 a console. queue_sizes: entries of each queue, a power
    of two up to 256. features: the device's own feature bits, 0 to 23 and from 50 on; VERSION_1, EVENT_IDX and
    INDIRECT_DESC are always offered. feature_needs: for the number of a bit that makes sense only with others, those of
    which it needs one; a driver that accepts it without any is refused at FEATURES_OK. config: its configuration space,
    at most 256 bytes. writable_config: how many of them, from the start, the driver may write.
    """

    device_id: int = 0
    queue_sizes: tuple[int, ...] = (256,)
    features: int = 0
    feature_needs: dict[int, tuple[int, ...]] = {}  # noqa: RUF012 - never changed
    config: bytes = b""
    writable_config: int = 0

    _native: PythonDevice | None = None

    # -- what a device overrides ---------------------------------------------------------------------------------

    def handle_queue(self, index: int, queue: RequestQueue) -> None:
        """The driver has put something into queue `index`: ``for request in queue`` takes it out."""
        raise NotImplementedError(f"{type(self).__name__} has no handle_queue")

    def activated(self, features: int) -> None:
        """The driver is there and has accepted `features`; the queues are usable."""

    def reset(self) -> None:
        """The driver has reset the device; requests taken before can no longer be answered."""

    def config_written(self) -> None:
        """The driver has written into the configuration space: see `read_config`."""

    def save(self) -> bytes:
        """What a snapshot keeps of the device's own state, beside its queues. The machine is paused."""
        return b""

    def restore(self, state: bytes) -> None:
        """The reverse of `save`, before the guest goes on."""

    # -- what a device uses --------------------------------------------------------------------------------------

    @property
    def native(self) -> PythonDevice:
        """The device's queues and registers. StateError before a microVM has been started with it."""
        if self._native is None:
            raise StateError(f"{type(self).__name__} belongs to no running microVM")
        return self._native

    def queue(self, index: int) -> RequestQueue:
        """A queue, to take requests from it at another time than in `handle_queue`."""
        return self.native.request_queue(index)

    def read_config(self) -> bytes:
        """The configuration space as it is now."""
        return self.native.read_config()

    def write_config(self, offset: int, data: bytes) -> None:
        """Change the configuration space, and tell the driver."""
        self.native.write_config(offset, data)
