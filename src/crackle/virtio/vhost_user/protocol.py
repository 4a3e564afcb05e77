"""The vhost-user protocol, as the front end speaks it: another process serves a device's queues.

Specification: QEMU, docs/interop/vhost-user.rst. Only control goes through here, over a Unix socket: features, the
configuration space, where guest memory and the rings are. The data never do: the driver's notification and the
interrupt are eventfds that the back end holds itself. Every exchange has an end in time, every answer is checked, and a
connection on which something went wrong is shut down, because nobody knows any more which answer comes next.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from _thread import allocate_lock

import msgspec

from crackle.errors import ConfigError, os_reason
from crackle.runtime.channel import rights

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn, TypeVar

    from crackle.memory import Region

    T = TypeVar("T")

TIMEOUT = 5.0
"""Seconds that one operation, which may be several messages, waits for the back end."""

MAX_REGIONS = 8  # "Memory regions description": of one SET_MEM_TABLE
MAX_CONFIG = 256  # "Virtio device config space": payload

F_PROTOCOL_FEATURES = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, which takes the place of a virtio feature bit."""

# "Protocol features"
P_REPLY_ACK = 1 << 3
P_CONFIG = 1 << 9

# "Front-end message types"
REQUESTS = {
    "GET_FEATURES": 1,
    "SET_FEATURES": 2,
    "SET_OWNER": 3,
    "SET_MEM_TABLE": 5,
    "SET_VRING_NUM": 8,
    "SET_VRING_ADDR": 9,
    "SET_VRING_BASE": 10,
    "GET_VRING_BASE": 11,
    "SET_VRING_KICK": 12,
    "SET_VRING_CALL": 13,
    "GET_PROTOCOL_FEATURES": 15,
    "SET_PROTOCOL_FEATURES": 16,
    "SET_VRING_ENABLE": 18,
    "GET_CONFIG": 24,
}

# "Header": request, flags, bytes of payload, all in the host's byte order.
HEADER = struct.Struct("=III")
VERSION = 1
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # ring, value
VRING_ADDR = struct.Struct("=IIQQQQ")  # ring, flags, descriptors, used, available, log
REGION = struct.Struct("=QQQQ")  # guest address, size, front end's address, offset in the descriptor's file
CONFIG = struct.Struct("=III")  # offset, size, flags; then the bytes


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """One virtqueue for the back end: entries, this process's addresses of its three parts, where in the available ring
    to begin, and the two eventfds.
    """

    size: int
    desc: int
    avail: int
    used: int
    base: int
    kick: int
    call: int


class VhostUser:
    """A connection to the back end that listens at `path`, with features negotiated.

    wanted: the virtio features that the device could use; `features` are those of them that the back end has too.
    needed: the features without which there is no use in it. ConfigError says what is wrong with the back end, here
    and in every later call. Several threads may use it; one at a time speaks.
    """

    def __init__(self, path: str, *, wanted: int, needed: int = 0, timeout: float = TIMEOUT) -> None:
        self.path = path
        self.failure: str | None = None
        self._timeout = timeout
        self._deadline = 0.0
        self._acknowledges = False
        self._lock = allocate_lock()
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot make a socket for the vhost-user back end: {error.strerror}") from None
        try:
            self._connect()
            self.features = self._operate(lambda: self._negotiate(wanted, needed))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The socket; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()

    def get_config(self, size: int) -> bytes:
        """The first `size` bytes (up to 256) of the device's configuration space."""

        def ask() -> bytes:
            request = CONFIG.pack(0, size, 0) + bytes(size)
            reply = self._ask("GET_CONFIG", request, (len(request), 0))
            if not reply:
                self._fail(f"has no configuration space of {size} bytes")
            offset, given, _ = CONFIG.unpack_from(reply)
            if (offset, given) != (0, size):
                self._fail(f"answered GET_CONFIG for 0+{size} with bytes {offset}+{given}")
            return reply[CONFIG.size :]

        return self._operate(ask)

    def start(self, features: int, regions: Sequence[Region], rings: Sequence[Ring]) -> None:
        """Let the back end serve `rings` in the guest memory `regions`, with the features that the driver accepted."""

        def tell() -> None:
            self._tell("SET_FEATURES", U64.pack(features | F_PROTOCOL_FEATURES))
            self._set_memory(regions)
            for index, ring in enumerate(rings):
                self._tell("SET_VRING_NUM", VRING_STATE.pack(index, ring.size))
            for index, ring in enumerate(rings):
                self._tell("SET_VRING_ADDR", VRING_ADDR.pack(index, 0, ring.desc, ring.used, ring.avail, 0))
                self._tell("SET_VRING_BASE", VRING_STATE.pack(index, ring.base))
                self._tell("SET_VRING_CALL", U64.pack(index), (ring.call,))
                self._tell("SET_VRING_KICK", U64.pack(index), (ring.kick,))
                self._tell("SET_VRING_ENABLE", VRING_STATE.pack(index, 1))
            self._await_heard()

        self._operate(tell)

    def check_memory(self, regions: Sequence[Region]) -> None:
        """ConfigError when the back end cannot be given these regions; nothing is said to it."""
        if len(regions) > MAX_REGIONS:
            self._fail(f"takes {MAX_REGIONS} regions of guest memory at most, not {len(regions)}")
        if any(region.fd < 0 for region in regions):
            self._fail("cannot be given guest memory that is not shared")

    def set_memory(self, regions: Sequence[Region]) -> None:
        """Tell the back end, which is started, what guest memory is from now on, and wait until it knows."""

        def tell() -> None:
            self._set_memory(regions)
            self._await_heard()

        self._operate(tell)

    def stop(self, count: int) -> list[int]:
        """Stop the first `count` rings; how far in its available ring each had come."""

        def tell() -> list[int]:
            bases = []
            for index in range(count):
                reply = self._ask("GET_VRING_BASE", VRING_STATE.pack(index, 0), (VRING_STATE.size,))
                ring, base = VRING_STATE.unpack(reply)
                if ring != index or base > 0xFFFF:
                    self._fail(f"answered GET_VRING_BASE of ring {index} with {base} of ring {ring}")
                bases.append(base)
            return bases

        return self._operate(tell)

    # -- negotiation ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._socket.settimeout(self._timeout)
        try:
            if not self.path:
                raise ValueError("the path is empty")
            if "\0" in self.path:
                raise ValueError("paths must not contain interior null bytes")
            self._socket.connect(self.path)
        except (OSError, ValueError) as error:
            # A time limit of our own, and a path that is too long, have no number.
            reason = os_reason(error) if isinstance(error, OSError) and error.errno else error
            raise ConfigError(
                f"Vhost-user error: Failed to connect to UDS Unix stream: {reason}: "
                f"cannot connect to the vhost-user back end at {self.path!r}"
            ) from None

    def _negotiate(self, wanted: int, needed: int) -> int:
        self._tell("SET_OWNER", b"")
        offered = self._ask_u64("GET_FEATURES")
        if not offered & F_PROTOCOL_FEATURES:
            self._fail("cannot negotiate protocol features, so it cannot tell its configuration space")
        protocol = self._ask_u64("GET_PROTOCOL_FEATURES")
        if not protocol & P_CONFIG:
            self._fail("lacks the protocol feature CONFIG, so it cannot tell its configuration space")
        if missing := needed & ~offered:
            self._fail(f"lacks the virtio features {missing:#x} that the device needs")
        self._tell("SET_PROTOCOL_FEATURES", U64.pack(protocol & (P_CONFIG | P_REPLY_ACK)))
        self._acknowledges = bool(protocol & P_REPLY_ACK)
        return offered & wanted

    def _set_memory(self, regions: Sequence[Region]) -> None:
        self.check_memory(regions)
        table = b"".join(REGION.pack(r.gpa, r.size, r.hva, r.offset) for r in regions)
        self._tell("SET_MEM_TABLE", struct.pack("=II", len(regions), 0) + table, [r.fd for r in regions])

    def _await_heard(self) -> None:
        # Without acknowledgements, what was said has been heard when a later question is answered.
        if not self._acknowledges:
            self._ask("GET_FEATURES", b"", (U64.size,))

    # -- messages ------------------------------------------------------------------------------------------------

    def _operate(self, what: Callable[[], T]) -> T:
        """Do `what`, all of whose messages share one time limit; after a failure the connection is of no use."""
        with self._lock:
            if self.failure is not None:
                raise ConfigError(self.failure)
            self._deadline = time.monotonic() + self._timeout
            try:
                return what()
            except ConfigError as error:
                self.failure = str(error)
                self._shut_down()
                raise
            except BaseException:
                self.failure = f"the connection to the vhost-user back end at {self.path} was given up"
                self._shut_down()
                raise

    def _shut_down(self) -> None:
        # The descriptor stays until close(): somebody may be watching it.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _fail(self, what: str) -> NoReturn:
        raise ConfigError(f"the vhost-user back end at {self.path} {what}")

    def _tell(self, name: str, payload: bytes, fds: Sequence[int] = ()) -> None:
        """A message that has no answer of its own; where the back end acknowledges, it must have done it."""
        self._send(name, payload, NEED_REPLY if self._acknowledges else 0, fds)
        if self._acknowledges:
            (error,) = U64.unpack(self._receive(name, (U64.size,)))
            if error:
                self._fail(f"refused {name} (error {error})")

    def _ask(self, name: str, payload: bytes, sizes: tuple[int, ...]) -> bytes:
        """The answer to a message, which has one of those sizes."""
        self._send(name, payload, 0)
        return self._receive(name, sizes)

    def _ask_u64(self, name: str) -> int:
        value: int = U64.unpack(self._ask(name, b"", (U64.size,)))[0]
        return value

    def _send(self, name: str, payload: bytes, flags: int, fds: Sequence[int] = ()) -> None:
        message = HEADER.pack(REQUESTS[name], VERSION | flags, len(payload)) + payload
        try:
            self._limit()
            sent = self._socket.sendmsg([message], rights(fds), socket.MSG_NOSIGNAL)
            if sent < len(message):
                self._socket.sendall(message[sent:], socket.MSG_NOSIGNAL)
        except OSError as error:
            self._explain(name, error)

    def _receive(self, name: str, sizes: tuple[int, ...]) -> bytes:
        request, flags, size = HEADER.unpack(self._read(name, HEADER.size))
        if request != REQUESTS[name] or flags & VERSION_MASK != VERSION or not flags & REPLY:
            self._fail(f"answered {name} with message {request}, flags {flags:#x}")
        if size not in sizes:
            self._fail(f"answered {name} with {size} bytes instead of {sizes[0]}")
        return self._read(name, size)

    def _read(self, name: str, size: int) -> bytes:
        # Descriptors that come along are dropped by the kernel: there is no room for them.
        data = bytearray()
        while len(data) < size:
            try:
                self._limit()
                part = self._socket.recv(size - len(data))
            except OSError as error:
                self._explain(name, error)
            if not part:
                self._fail(f"hung up at {name}")
            data += part
        return bytes(data)

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _explain(self, name: str, error: OSError) -> NoReturn:
        if isinstance(error, TimeoutError):
            self._fail(f"did not answer {name} within {self._timeout:g} s")
        if isinstance(error, BrokenPipeError | ConnectionResetError):
            self._fail(f"hung up at {name}")
        self._fail(f"cannot be asked for {name}: {error.strerror or error}")
