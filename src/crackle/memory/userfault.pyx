"""Guest memory whose pages come from a handler of their faults: userfaultfd(2).

Who touches a page that is not there yet waits until the handler has put it there; KVM's own accesses too, so it needs a
userfaultfd for faults of the kernel. Whoever has the descriptor can be the handler, or take a range out again: then who
waits finds zeros.
"""

from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from posix.fcntl cimport O_NONBLOCK, O_RDWR, open
from posix.unistd cimport close, read

from crackle.includes.events cimport POLLERR, POLLIN, poll, pollfd
from crackle.includes.socket cimport MSG_DONTWAIT, recv
from crackle.includes.userfault cimport (
    FIONBIO,
    UFFD_API,
    UFFD_FEATURE_EVENT_REMOVE,
    UFFDIO_API,
    UFFDIO_REGISTER,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_UNREGISTER,
    USERFAULTFD_IOC_NEW,
    ioctl,
    make_userfault,
    uffd_msg,
    uffdio_api,
    uffdio_range,
    uffdio_register,
)
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport PAGE_SHIFT, Region
from crackle.runtime.threads cimport now_ns

import os


cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from * nogil:
    """
    #define exchange(place, value) __atomic_exchange_n(place, value, __ATOMIC_SEQ_CST)
    #define load(place) __atomic_load_n(place, __ATOMIC_SEQ_CST)
    static inline int replace(uint64_t *place, uint64_t before, uint64_t value) {
        return __atomic_compare_exchange_n(place, &before, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    #define look_at(place) ((void) *(const volatile unsigned char *) (place))
    #define add_progress(place) __atomic_add_fetch(place, 1, __ATOMIC_RELAXED)
    """
    uint64_t exchange(uint64_t *place, uint64_t value)
    uint64_t load(uint64_t *place)
    bint replace(uint64_t *place, uint64_t before, uint64_t value)
    void look_at(const uint8_t *place)
    void add_progress(uint64_t *place)


cdef enum:
    # What a watch has seen of the other end.
    OPEN = 0
    CLOSED = 1          # its connection has ended
    UNTAKEN = 2         # and what it was sent was not read

    # How long pages may still come once the connection has ended: a handler may close it and go on.
    CLOSED_NS = 1_000_000_000


cdef int checked(int result) except -1:
    if result < 0:
        raise OSError(errno, os.strerror(errno))
    return result


def open_userfault():
    """A userfaultfd that does not block, and tells of pages that are given back; OSError where this process gets none."""
    cdef uffdio_api api
    cdef int fd, device = open(b"/dev/userfaultfd", O_RDWR | O_CLOEXEC)
    if device >= 0:
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
        close(device)
    else:
        fd = make_userfault(O_CLOEXEC | O_NONBLOCK)
    checked(fd)
    api.api, api.features = UFFD_API, UFFD_FEATURE_EVENT_REMOVE
    try:
        checked(ioctl(fd, UFFDIO_API, &api))
    except BaseException:
        close(fd)
        raise
    return fd


def register_range(int fd, uint64_t address, uint64_t size):
    """Have the handler of `fd` give what is missing in [address, address + size); OSError."""
    cdef uffdio_register request
    request.range.start, request.range.len, request.mode = address, size, UFFDIO_REGISTER_MODE_MISSING
    checked(ioctl(fd, UFFDIO_REGISTER, &request))


def unregister_range(int fd, uint64_t address, uint64_t size):
    """Let what is missing there be zeros again, for who waits too; OSError."""
    cdef uffdio_range request
    request.start, request.len = address, size
    checked(ioctl(fd, UFFDIO_UNREGISTER, &request))


def hear_out(int fd):
    """Take what waits to be told, without an answer: who waits for it to be heard, as it gives pages back, goes on."""
    cdef uffd_msg messages[16]
    cdef pollfd ready
    cdef int now = 1, before = 0
    ready.fd, ready.events, ready.revents = fd, POLLIN, 0
    if poll(&ready, 1, 0) <= 0:
        return
    # The handler has the same descriptor, and may have made it one that waits: then poll says POLLERR.
    ioctl(fd, FIONBIO, &now)
    while read(fd, messages, sizeof(messages)) > 0:
        pass
    if ready.revents & POLLERR:
        ioctl(fd, FIONBIO, &before)


cdef class Touch:
    """Has pages of `memory` come, by looking at each: `run` waits for them, `progress` says how many have come."""

    cdef GuestMemory memory
    cdef uint64_t done

    def __init__(self, GuestMemory memory not None):
        self.memory = memory

    @property
    def progress(self):
        """Pages looked at so far."""
        return load(&self.done)

    def run(self, int index, uint64_t first, uint64_t count):
        """Look at `count` pages of region `index`, from its page `first` on; ValueError when there are not so many."""
        cdef Region region = self.memory.regions[index]
        cdef uint64_t i
        if first + count > region.r.size >> PAGE_SHIFT:
            raise ValueError(f"{region!r} has no {count} pages from {first} on")
        with nogil:
            for i in range(first, first + count):
                look_at(region.r.hva + (i << PAGE_SHIFT))
                add_progress(&self.done)


cdef class Watch:
    """Sees the handler's end of the connection `peer` go, and frees who waits for a page beyond a limit of time.

    Who waits may have Python's lock, so nothing here needs it. fault: the userfaultfd. wake: an eventfd. All are the
    caller's. seconds: from now on until `unlimit`; then, for all that is missing, zeros come.
    """

    cdef GuestMemory memory
    cdef int fault
    cdef pollfd fds[2]
    cdef uint64_t deadline      # of now_ns(), 0 for none
    cdef uint64_t seen
    cdef uint64_t began, ending

    def __init__(self, GuestMemory memory not None, int fault, int peer, int wake, double seconds):
        self.memory, self.fault = memory, fault
        self.deadline = now_ns() + <uint64_t> (seconds * 1e9)
        self.fds[0].fd, self.fds[1].fd = wake, peer
        self.fds[0].events = self.fds[1].events = POLLIN

    @property
    def closed(self):
        """Whether the handler has closed its end."""
        return load(&self.seen) != OPEN

    @property
    def untaken(self):
        """Whether it did so before it had read what it was sent."""
        return load(&self.seen) == UNTAKEN

    def begin(self):
        """Wait until `run` does, on another thread; whoever waits for a page later may keep that from having begun."""
        with nogil:
            while not load(&self.began):
                poll(NULL, 0, 1)

    def unlimit(self):
        """The end of the limit; whether nobody had to wait for longer."""
        return exchange(&self.deadline, 0) != 0

    def end(self):
        """Have `run` return."""
        exchange(&self.ending, 1)
        os.eventfd_write(self.fds[0].fd, 1)

    def run(self):
        """Until `end`, or until the connection ends while there is no limit; whether it did."""
        cdef bint told
        with nogil:
            told = self._run()
        return told

    cdef bint _run(self) noexcept nogil:
        cdef uint64_t deadline, now, ignored
        cdef int timeout
        exchange(&self.began, 1)
        while not load(&self.ending):
            deadline, now, timeout = load(&self.deadline), now_ns(), -1
            if deadline:
                if now >= deadline:
                    if replace(&self.deadline, deadline, 0):
                        self._release()
                    continue
                timeout = <int> ((deadline - now) // 1_000_000 + 1)
            self.fds[0].revents = self.fds[1].revents = 0
            if poll(self.fds, 2, timeout) <= 0:
                continue
            if self.fds[0].revents:
                read(self.fds[0].fd, &ignored, 8)
            if self.fds[1].revents and self._has_closed():
                self.fds[1].fd = -1
                now, deadline = now_ns(), load(&self.deadline)
                if not deadline:
                    return True
                # Cleared meanwhile: then all that was wanted has come.
                replace(&self.deadline, deadline, now if load(&self.seen) == UNTAKEN else min(deadline, now + CLOSED_NS))
        return False

    cdef bint _has_closed(self) noexcept nogil:
        cdef char data[256]
        cdef ssize_t n = recv(self.fds[1].fd, data, sizeof(data), MSG_DONTWAIT)
        # What it says nobody has asked for.
        if n > 0 or n < 0 and (errno == EAGAIN or errno == EINTR):
            return False
        exchange(&self.seen, UNTAKEN if n < 0 and errno == ECONNRESET else CLOSED)
        return True

    cdef void _release(self) noexcept nogil:
        cdef uffdio_range request
        cdef int i
        for i in range(self.memory.table.count):
            request.start, request.len = <uint64_t> self.memory.table.regions[i].hva, self.memory.table.regions[i].size
            ioctl(self.fault, UFFDIO_UNREGISTER, &request)
