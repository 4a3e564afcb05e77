"""Pages that do not come: a range of memory under userfaultfd(2) whose handler is dead."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from types import TracebackType

SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
UFFD_USER_MODE_ONLY = 1
# linux/userfaultfd.h
UFFD_API = 0xAA
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0x8010AA02
MISSING = 1
MADV_DONTNEED = 4


class MissingPages:
    """Who touches one of the pages from `address` on, process or kernel, waits until the end of the context."""

    def __init__(self, address: int, size: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._range = address, size
        self._fd = -1

    def __enter__(self) -> MissingPages:
        address, size = self._range
        self._fd = self._libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self._fd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, 0, 0))
        if self._libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
        fcntl.ioctl(self._fd, UFFDIO_REGISTER, struct.pack("<QQQQ", address, size, MISSING, 0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Zeros come for who waits, as for any page.
        fcntl.ioctl(self._fd, UFFDIO_UNREGISTER, struct.pack("<QQ", *self._range))
        os.close(self._fd)
