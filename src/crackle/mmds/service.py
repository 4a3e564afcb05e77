"""The thread that answers the guest's requests for metadata.

A network device and the service share a *wire*, a pair of SOCK_SEQPACKET sockets: every message is a frame as a TAP
device gives and takes it, with its struct virtio_net_hdr_v1. One thread serves all wires of a microVM. It waits in
poll, with a timeout only while a connection waits for something, so it costs nothing when nobody asks.
"""

from __future__ import annotations

import os
import select

# The C module itself: the socket module drags in selectors and enum.
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_SEQPACKET, socketpair

from crackle.mmds.http import Responder
from crackle.mmds.packet import MAX_MESSAGE_SIZE, VNET_HEADER_SIZE
from crackle.mmds.stack import COUNTERS, Stack
from crackle.mmds.state import MmdsState
from crackle.runtime.clock import MachineClock
from crackle.runtime.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.mmds.store import Store
    from crackle.schema.mmds import MmdsConfig

# Messages taken from one wire, and given to it, before the others have their turn.
_BATCH = 64


class _Wire:
    """One interface's link. Owns its end of it."""

    def __init__(self, fd: int, stack: Stack) -> None:
        self.fd = fd
        self.stack = stack
        # What the link did not take: no more is made until it does.
        self.unsent: bytes | None = None

    @property
    def events(self) -> int:
        return select.POLLIN | (0 if self.unsent is None else select.POLLOUT)

    def receive(self, now: float) -> bool:
        """Take what waits. False when the other end is gone."""
        for _ in range(_BATCH):
            try:
                message = os.read(self.fd, MAX_MESSAGE_SIZE)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False
            if not message:
                return False
            try:
                self.stack.receive(message, now)
            except Exception:
                # No message is known to come here; should one be found, the service outlives it.
                self.stack.counters["rx_accepted_err"] += 1
        return True

    def serve(self, now: float) -> bool:
        """Do what time asks for, and send what there is. True if there is more, and the link would take it."""
        try:
            self.stack.expire(now)
            return self._send(now)
        except Exception:
            # As above; but what would raise again must go.
            self.stack.forget()
            self.stack.counters["tx_errors"] += 1
            return False

    def _send(self, now: float) -> bool:
        """Send what there is, as far as the link takes it. True if there is more, and it would take it."""
        counters = self.stack.counters
        for _ in range(_BATCH):
            message = self.unsent or self.stack.transmit(now)
            if message is None:
                return False
            try:
                os.write(self.fd, message)
            except (BlockingIOError, InterruptedError):
                self.unsent = message
                return False
            except OSError:
                counters["tx_errors"] += 1
            else:
                counters["tx_count"] += 1
                counters["tx_frames"] += 1
                counters["tx_bytes"] += len(message) - VNET_HEADER_SIZE
            self.unsent = None
        return True


class Mmds:
    """The metadata service of one microVM.

    config: version, address and formats. store: the document, which whoever writes it keeps. `connect` once for each
    interface, then `start` once; `stop` ends it and may be called again. clock: the machine's.
    """

    def __init__(self, config: MmdsConfig, store: Store, clock: MachineClock | None = None) -> None:
        assert config.ipv4_address is not None, "filled in by whoever takes the configuration"
        self.address = bytes(int(part) for part in config.ipv4_address.split("."))
        self._config = config
        self._responder = Responder(config, store)
        self._wires: list[_Wire] = []
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._clock = MachineClock() if clock is None else clock
        self._thread: Thread | None = None

    def connect(self) -> int:
        """Make a wire: the result is the device's end of it, which is the caller's and never waits."""
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK)
        self.take(ours.detach())
        return theirs.detach()

    def take(self, fd: int) -> None:
        """Serve whoever is behind `fd`, a wire's end or a TAP device that does not wait. Closed by `stop`."""
        self._wires.append(_Wire(fd, Stack(self.address, self._responder.take)))

    def start(self) -> None:
        """Begin to answer."""
        self._thread = Thread("mmds", self._run)

    def resume(self) -> None:
        """The clock goes on: look again what there is to do, and when."""
        os.eventfd_write(self._wake_fd, 1)

    @property
    def ident(self) -> int:
        """The thread, as threading.get_ident() names it; 0 without one."""
        return 0 if self._thread is None else self._thread.ident

    def stop(self) -> None:
        """End the thread and close everything; in a forked child, the copies. Idempotent."""
        if self._stopping:
            return
        self._stopping = True
        if self._thread is not None and self._thread.is_ours:
            # Otherwise in a forked child, where there is no thread, and the wake-up is the parent's.
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
        os.close(self._wake_fd)
        for wire in self._wires:
            os.close(wire.fd)

    def counters(self) -> dict[str, int]:
        """The section "mmds" of the metrics."""
        return {
            **{name: sum(wire.stack.counters[name] for wire in self._wires) for name in COUNTERS},
            "rx_no_token": self._responder.rx_no_token,
            "rx_invalid_token": self._responder.rx_invalid_token,
        }

    def save(self) -> MmdsState:
        """What a restored microVM needs to set the service up again."""
        config = self._config
        assert config.ipv4_address is not None
        return MmdsState(
            version=config.version,
            ipv4_address=config.ipv4_address,
            network_interfaces=tuple(config.network_interfaces),
            imds_compat=config.imds_compat,
        )

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        live = {wire.fd: wire for wire in self._wires}
        for wire in self._wires:
            poll.register(wire.fd, wire.events)
        busy = False
        while True:
            ready = poll.poll(0 if busy else self._timeout_ms(live))
            if self._stopping:
                return
            now = self._now()
            for fd, events in ready:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                elif events & ~select.POLLOUT and not live[fd].receive(now):
                    # The device is gone; so are its connections.
                    poll.unregister(fd)
                    del live[fd]
            busy = False
            for fd, wire in live.items():
                before = wire.events
                busy |= wire.serve(now)
                if wire.events != before:
                    poll.modify(fd, wire.events)

    def _now(self) -> float:
        """Seconds. The clock stands still while the microVM does: a guest that is paused can acknowledge nothing."""
        return self._clock.now_ns / 1e9

    def _timeout_ms(self, live: dict[int, _Wire]) -> int | None:
        """How long to wait at most; None while nothing depends on time."""
        deadlines = [at for wire in live.values() if (at := wire.stack.deadline()) is not None]
        if not deadlines or self._clock.paused:
            return None
        # Rounded up: a moment early would only be asked again.
        return max(0, int((min(deadlines) - self._now()) * 1000) + 1)
