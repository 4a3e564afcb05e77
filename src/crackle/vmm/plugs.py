"""The virtio devices of a machine: each behind a transport, in a window of its own, with an interrupt line.

One that brings memory with it, which is no RAM, gets a place in the guest's address space for that too.
"""

from __future__ import annotations

from contextlib import ExitStack

from crackle.arch import DeviceInfo
from crackle.virtio.transport.mmio import SIZE as MMIO_SIZE
from crackle.virtio.transport.mmio import MmioTransport
from crackle.vmm.places import Places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.kvm import Bus, Vm
    from crackle.runtime.iothread import IoThread
    from crackle.virtio.device import VirtioDevice
    from crackle.virtio.state import MmioState
    from crackle.vmm.slots import MemorySlots

    # Kind and identifier of a device.
    Key = tuple[str, str]


class Plugs:
    """Owns devices and transports until `close`, or until they are unplugged."""

    def __init__(self, mmio: Bus, vm: Vm, slots: MemorySlots | None) -> None:
        self._mmio = mmio
        self._vm = vm
        self._slots = slots
        self._places = Places()
        self.transports: dict[Key, MmioTransport] = {}
        # Where the guest has the memory of a device.
        self._memory: dict[VirtioDevice, int] = {}

    def plug(self, key: Key, device: VirtioDevice, io: IoThread, saved: MmioState | None = None) -> None:
        """Give a device its window, its interrupt, and its place on `io`. It is closed when that cannot be.

        saved: what it was before; window and interrupt are the same. ConfigError when they are another's.
        """
        with ExitStack() as undo:
            undo.callback(device.close)
            self._give_memory(device, saved)
            undo.callback(self._take_memory, device)
            transport = self._transport(device, saved)
            undo.callback(self._take_back, transport)
            transport.plug(self._mmio, io, self._vm)
            undo.pop_all()
        self.transports[key] = transport

    def unplug(self, key: Key) -> None:
        """Take a device away, and let others have its window and its interrupt. The guest is not asked.

        KeyError when there is none.
        """
        transport = self.transports.pop(key)
        transport.unplug()
        self._take_memory(transport.device)
        transport.device.close()
        self._take_back(transport)

    def _give_memory(self, device: VirtioDevice, saved: MmioState | None) -> None:
        """Let the guest have what it brings with it, where that was before if it was."""
        if device.own_memory is None:
            return
        assert self._slots is not None, "a machine that devices are added to has memory"
        hva, size, read_only = device.own_memory
        places = self._places.memory
        gpa = places.take(size) if saved is None else places.claim(_start_of(saved), size)
        try:
            self._slots.add(gpa, size, hva, read_only=read_only)
        except BaseException:
            places.release(gpa)
            raise
        self._memory[device] = gpa
        device.place(gpa)

    def _take_memory(self, device: VirtioDevice) -> None:
        gpa = self._memory.pop(device, None)
        if gpa is not None:
            assert self._slots is not None
            self._slots.remove(gpa)
            self._places.memory.release(gpa)

    def _transport(self, device: VirtioDevice, saved: MmioState | None) -> MmioTransport:
        lines, windows = self._places.lines, self._places.windows
        line = lines.take() if saved is None else lines.claim(saved.gsi)
        try:
            address = windows.take() if saved is None else windows.claim(saved.address)
            try:
                return MmioTransport(device, address, line)
            except BaseException:
                windows.release(address)
                raise
        except BaseException:
            lines.release(line)
            raise

    def _take_back(self, transport: MmioTransport) -> None:
        transport.close()
        self._places.windows.release(transport.address)
        self._places.lines.release(transport.line)

    def info(self, key: Key) -> DeviceInfo:
        """Where the guest finds a device. KeyError when there is none."""
        transport = self.transports[key]
        return DeviceInfo(transport.address, MMIO_SIZE, transport.gsi)

    @property
    def devices(self) -> dict[Key, VirtioDevice]:
        """By kind and identifier, in the order in which the guest numbers them."""
        return {key: transport.device for key, transport in self.transports.items()}

    @property
    def infos(self) -> list[DeviceInfo]:
        """Where the guest finds them, in the same order."""
        return [self.info(key) for key in self.transports]

    def close(self) -> None:
        """Give everything back; neither vCPUs nor I/O threads run any more. Idempotent."""
        for transport in self.transports.values():
            transport.device.close()
            transport.close()
        self._places.lines.close()


def _start_of(saved: MmioState) -> int:
    """Where the guest had the memory of a device that was saved."""
    own: Any = saved.device.own
    # Out of a file it is a dict.
    start: int = own["start"] if isinstance(own, dict) else own.start
    return start
