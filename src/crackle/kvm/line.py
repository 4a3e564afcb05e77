"""An interrupt line of the in-kernel IOAPIC, and the eventfd behind it (Documentation/virt/kvm/api.rst, 4.75).

A line that several devices share is edge-triggered, as one that is not: all of them write the same eventfd, so that KVM
pulses the line once more after each write, and never holds it while another device's edge comes, which would be lost.
After the edge the driver looks at every device on the line (virtio 1.2, 4.2.3.4: the reason is in InterruptStatus;
Linux asks for IRQF_SHARED).
"""

from __future__ import annotations

import os

from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.kvm import Vm


class Line:
    """Interrupt line `gsi` of several `devices`, and the eventfd `fd` that raises it."""

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi
        self.devices = 0
        self._connected = 0
        self.fd = -1
        try:
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"cannot make an eventfd: {error.strerror}") from None

    def connect(self, vm: Vm) -> None:
        """Have KVM raise the line when the eventfd is written, for one device more."""
        if not self._connected:
            vm.irqfd(self.fd, self.gsi)
        self._connected += 1

    def disconnect(self, vm: Vm) -> None:
        """The reverse, for one device."""
        self._connected -= 1
        if not self._connected:
            vm.irqfd(self.fd, self.gsi, assign=False)

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    __del__ = close
