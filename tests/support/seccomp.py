"""What a compiled filter does with system calls that a child really makes, without any of them having an effect."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import struct
from collections.abc import Sequence

from crackle.seccomp.policy import Line

ALLOWED, FORBIDDEN, FOREIGN = 1000, 1001, 1002
"""What a call fails with in the child in place of being made, of raising SIGSYS, and of killing the process."""

EVERYTHING = (1 << 64) - 1

# <linux/filter.h>, struct sock_filter; <linux/bpf_common.h>, BPF_RET | BPF_K; <linux/seccomp.h>, SECCOMP_RET_*.
_INSTRUCTION = struct.Struct("=HBBI")
_RETURN = 0x06
_KILL_PROCESS, _TRAP, _ERRNO, _ALLOW = 0x80000000, 0x00030000, 0x00050000, 0x7FFF0000
_INSTEAD = {_ALLOW: ALLOWED, _TRAP: FORBIDDEN, _KILL_PROCESS: FOREIGN}

# <linux/prctl.h>
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2

Call = tuple[int, tuple[int, ...]]
"""A number and six arguments."""


def harmless(program: bytes) -> bytes:
    """The same decisions, each told by a number of an error."""
    told = []
    for code, if_true, if_false, value in _INSTRUCTION.iter_unpack(program):
        if code == _RETURN and value in _INSTEAD:
            value = _ERRNO | _INSTEAD[value]
        told.append(_INSTRUCTION.pack(code, if_true, if_false, value))
    return b"".join(told)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def decisions(program: bytes, calls: Sequence[Call]) -> list[int]:
    """What the kernel decides about each of `calls`, all of which a child makes under the filter."""
    shared = mmap.mmap(-1, 8 * len(calls))
    child = os.fork()
    if not child:
        try:
            _try_all(harmless(program), calls, shared)
        finally:
            # It has no system call to end by.
            ctypes.string_at(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGSEGV, status
    with shared:
        return [value for (value,) in struct.iter_unpack("=q", shared)]


def _try_all(program: bytes, calls: Sequence[Call], shared: mmap.mmap) -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found = (ctypes.c_long * len(calls)).from_buffer(shared)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    prepared = [(ctypes.c_long(number), *map(ctypes.c_ulong, arguments)) for number, arguments in calls]
    for place in range(len(prepared)):  # whatever memory the loop needs, it has afterwards
        ctypes.set_errno(0)
        libc.getpid(*prepared[place])
        found[place] = -ctypes.get_errno()
    fprog = _Program(len(program) // _INSTRUCTION.size, program)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(fprog)) == 0
    for place in range(len(prepared)):
        ctypes.set_errno(0)
        libc.syscall(*prepared[place])
        found[place] = ctypes.get_errno()


def expected(lines: Sequence[Line], numbers: dict[str, int], call: Call) -> int:
    """The policy's own word on a call; numbers: of the calls it names."""
    number, arguments = call
    for line in lines:
        if numbers[line.call] == number and all(
            arguments[index] & mask == value for index, mask, value, _ in line.conditions
        ):
            return ALLOWED if line.error is None else int(getattr(errno, line.error))
    return FORBIDDEN


def calls_about(line: Line, number: int) -> list[Call]:
    """One that meets all the line's conditions, and those that miss one of them each."""
    fits = [0xA5A5A5A5 << 32] * 6
    for index, mask, value, _ in line.conditions:
        fits[index] = fits[index] & ~mask | value
    found = [(number, tuple(fits))]
    for index, mask, _, _ in line.conditions:
        misses = list(fits)
        misses[index] ^= mask & -mask
        found.append((number, tuple(misses)))
    return found
