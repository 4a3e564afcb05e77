"""The virtio devices of a machine: each behind a transport, in a window of its own, with an interrupt line."""

from __future__ import annotations

from crackle.arch import DeviceInfo
from crackle.virtio.transport.mmio import SIZE as MMIO_SIZE
from crackle.virtio.transport.mmio import MmioTransport
from crackle.vmm.places import Places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.kvm import Bus, Vm
    from crackle.runtime.iothread import IoThread
    from crackle.virtio.device import VirtioDevice
    from crackle.virtio.state import MmioState

    # Kind and identifier of a device.
    Key = tuple[str, str]


class Plugs:
    """Owns devices and transports until `close`, or until they are unplugged."""

    def __init__(self, mmio: Bus, vm: Vm) -> None:
        self._mmio = mmio
        self._vm = vm
        self._places = Places()
        self.transports: dict[Key, MmioTransport] = {}

    def plug(self, key: Key, device: VirtioDevice, io: IoThread, saved: MmioState | None = None) -> None:
        """Give a device its window, its interrupt, and its place on `io`. It is closed when that cannot be.

        saved: what it was before; window and interrupt are the same. ConfigError when they are another's.
        """
        try:
            transport = self._transport(device, saved)
            try:
                transport.plug(self._mmio, io, self._vm)
            except BaseException:
                self._take_back(transport)
                raise
        except BaseException:
            device.close()
            raise
        self.transports[key] = transport

    def unplug(self, key: Key) -> None:
        """Take a device away, and let others have its window and its interrupt. The guest is not asked.

        KeyError when there is none.
        """
        transport = self.transports.pop(key)
        transport.unplug()
        transport.device.close()
        self._take_back(transport)

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
