"""How many of the process's descriptors guests may have: all below its limit but a reserve, whoever of them comes first.

What a guest can open without end (vsock connections) is counted here, for all microVMs of the process together. The
reserve is for who must go on: the API's clients, files that are opened later, whatever else the process does.
"""

from libc.stdint cimport INT32_MAX
from posix.unistd cimport close, dup

import os

cdef extern from * nogil:
    int atomic_add "__sync_fetch_and_add" (int *place, int value)

cdef extern from "<sys/resource.h>" nogil:
    enum:
        RLIMIT_NOFILE
    struct rlimit:
        unsigned long rlim_cur
    int getrlimit(int resource, rlimit *limit)

cdef enum:
    RESERVE = 128       # or half of what is left, where that is less

cdef int allowed = 0
cdef int taken = 0


cdef bint has_descriptor() noexcept nogil:
    return atomic_add(&taken, 0) < atomic_add(&allowed, 0)


cdef bint take_descriptor() noexcept nogil:
    if atomic_add(&taken, 1) < atomic_add(&allowed, 0):
        return True
    give_descriptor()
    return False


cdef void give_descriptor() noexcept nogil:
    atomic_add(&taken, -1)


cdef int in_use() except -1:
    """Descriptors that the process has open."""
    cdef int fd
    try:
        # The listing has one of its own.
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        # Numbers are given out from the lowest on.
        fd = dup(2)
        if fd < 0:
            return INT32_MAX
        close(fd)
        return fd


def measure_descriptors():
    """Find out how many guests may have from now on, when a device that gives them some is made; that number."""
    global allowed
    cdef rlimit limit
    cdef long long left
    if getrlimit(RLIMIT_NOFILE, &limit) < 0:
        limit.rlim_cur = 0
    left = <long long> min(limit.rlim_cur, <unsigned long> INT32_MAX) - (in_use() - taken)
    left = max(left, 0)
    allowed = <int> (left - min(left // 2, RESERVE))
    return allowed
