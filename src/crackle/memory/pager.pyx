"""A page-fault handler: gives the pages of a microVM's memory out of its memory file, by userfaultfd(2).

Pages come in windows of 64 KiB: the guest mostly wants what is beside a page next. What is a hole in the file comes as
zeros without being read, and what the microVM has given back (UFFD_EVENT_REMOVE) as zeros ever after. Windows that are
known to be wanted are read ahead, in their order, while nobody waits. All of it runs without Python's lock, so that
handler and microVM may be one process.
"""

from libc.errno cimport EAGAIN, EEXIST, EINTR, ENOENT, ENXIO, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, mmap, munmap
from posix.unistd cimport lseek, read

from crackle.includes.events cimport POLLIN, poll, pollfd
from crackle.includes.socket cimport MSG_DONTWAIT, recv
from crackle.includes.userfault cimport (
    UFFD_EVENT_PAGEFAULT,
    UFFD_EVENT_REMOVE,
    UFFDIO_COPY,
    UFFDIO_WAKE,
    UFFDIO_ZEROPAGE,
    ioctl,
    uffd_msg,
    uffdio_copy,
    uffdio_range,
    uffdio_zeropage,
)
from crackle.runtime.threads cimport now_ns

import os


cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_DATA
        SEEK_HOLE

cdef extern from "<fcntl.h>" nogil:
    enum:
        POSIX_FADV_WILLNEED
    int posix_fadvise(int fd, long offset, long size, int advice)

cdef extern from * nogil:
    """
    #define load(place) __atomic_load_n(place, __ATOMIC_SEQ_CST)
    #define store(place, value) __atomic_store_n(place, value, __ATOMIC_SEQ_CST)
    """
    uint64_t load(uint64_t *place)
    void store(uint64_t *place, uint64_t value)

cdef enum:
    PAGE = 4096
    WINDOW_BYTES = 64 << 10
    MAX_RANGES = 16
    MESSAGES = 16
    # How often a window is tried again that what is being given back keeps away, before the faults' turn.
    RETRIES = 100

    DONE = 0
    LATER = 1
    GONE = 2

WINDOW = WINDOW_BYTES
"""Bytes of a window, unless pages are larger."""


cdef struct served_range:
    uint64_t address, size, offset


cdef class Pager:
    """Serves one microVM until it is gone, or `end`.

    fault: its userfaultfd. peer: the connection that ends when it does. memory_fd: the memory file. All are the caller's.
    ranges: (address there, bytes, offset in the file) of each region. page_size: in bytes.
    wanted: numbers of windows of the file that are read ahead, in this order.
    """

    cdef pollfd fds[3]
    cdef int fault, file
    cdef served_range ranges[MAX_RANGES]
    cdef int count
    cdef uint64_t size, page_size, window, pages, windows
    cdef uint8_t *source
    cdef uint8_t *blank         # one huge page of zeros
    cdef uint8_t *given         # by window: it has been
    cdef uint8_t *removed       # by page: it is zeros from now on
    cdef uint32_t *order        # windows in the order in which they were asked for
    cdef uint64_t asked_count
    cdef uint32_t *ahead
    cdef uint64_t ahead_count, ahead_next
    cdef uint64_t began, waited, failed

    def __init__(self, int fault, int peer, int memory_fd, ranges, uint64_t page_size, wanted=()):
        cdef uint64_t i
        if self.source != NULL:
            raise ValueError("a pager serves one microVM")
        if not 0 < len(ranges) <= MAX_RANGES or page_size % PAGE or not page_size:
            raise ValueError(f"a pager serves 1 to {MAX_RANGES} ranges of whole pages, not {len(ranges)}")
        self.fault, self.file, self.page_size = fault, memory_fd, page_size
        self.window = max(<uint64_t> WINDOW_BYTES, page_size)
        for address, size, offset in ranges:
            self.ranges[self.count] = served_range(address, size, offset)
            self.count += 1
            self.size = max(self.size, <uint64_t> (offset + size))
        if os.fstat(memory_fd).st_size < self.size:
            raise ValueError(f"the memory file has {os.fstat(memory_fd).st_size} bytes, {self.size} are needed")
        self.fds[0].fd, self.fds[1].fd, self.fds[2].fd = fault, peer, os.eventfd(0, os.EFD_CLOEXEC)
        for i in range(3):
            self.fds[i].events = POLLIN
        self.pages = (self.size + page_size - 1) // page_size
        self.windows = (self.size + self.window - 1) // self.window
        self.given = <uint8_t *> calloc(self.windows, 1)
        self.removed = <uint8_t *> calloc(self.pages, 1)
        self.order = <uint32_t *> calloc(self.windows, sizeof(uint32_t))
        self.ahead = <uint32_t *> calloc(len(wanted) + 1, sizeof(uint32_t))
        if self.given == NULL or self.removed == NULL or self.order == NULL or self.ahead == NULL:
            raise MemoryError
        mapped = mmap(NULL, self.size, PROT_READ, MAP_PRIVATE, memory_fd, 0)
        if mapped == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.source = <uint8_t *> mapped
        if page_size != PAGE:
            mapped = mmap(NULL, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            if mapped == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))
            self.blank = <uint8_t *> mapped
        for number in wanted:
            if number < self.windows:
                self.ahead[self.ahead_count] = number
                self.ahead_count += 1

    def __dealloc__(self):
        if self.source != NULL:
            munmap(self.source, self.size)
        if self.blank != NULL:
            munmap(self.blank, self.page_size)
        free(self.given)
        free(self.removed)
        free(self.order)
        free(self.ahead)
        if self.fds[2].fd > 0:
            os.close(self.fds[2].fd)

    @property
    def faults(self):
        """Pages that somebody has waited for."""
        return load(&self.waited)

    @property
    def asked(self):
        """The windows that were asked for so far, in that order. `run` does not run."""
        return [self.order[i] for i in range(self.asked_count)]

    def begin(self):
        """Wait until `run` does, on another thread."""
        with nogil:
            while not load(&self.began):
                poll(NULL, 0, 1)

    def end(self):
        """Have `run` return. Who waits then waits on."""
        os.eventfd_write(self.fds[2].fd, 1)

    def run(self, double seconds=-1.0):
        """Serve, at most for so long, or without an end. Whether the microVM is gone, or `end` was called.

        OSError when a page cannot be given.
        """
        cdef uint64_t until = 0 if seconds < 0 else now_ns() + <uint64_t> (seconds * 1e9)
        cdef bint gone
        cdef uint64_t i
        with nogil:
            for i in range(self.ahead_next, self.ahead_count):
                posix_fadvise(self.file, <long> (self.ahead[i] * self.window), <long> self.window, POSIX_FADV_WILLNEED)
            gone = self._serve(until)
        if self.failed:
            raise OSError(<int> self.failed, os.strerror(<int> self.failed))
        return gone

    cdef bint _serve(self, uint64_t until) noexcept nogil:
        cdef char ignored[256]
        cdef ssize_t n
        cdef uint64_t now
        cdef int i, timeout, outcome
        store(&self.began, 1)
        while True:
            now = now_ns()
            if until and now >= until:
                return False
            timeout = <int> ((until - now) // 1_000_000 + 1) if until else -1
            if self.ahead_next < self.ahead_count:
                timeout = 0
            for i in range(3):
                self.fds[i].revents = 0
            if poll(self.fds, 3, timeout) < 0 and errno != EINTR:
                self.failed = errno
                return True
            if self.fds[2].revents:
                return True
            if self.fds[1].revents:
                n = recv(self.fds[1].fd, ignored, sizeof(ignored), MSG_DONTWAIT)
                if n == 0 or n < 0 and errno != EAGAIN and errno != EINTR:
                    return True
            if self.fds[0].revents:
                outcome = self._answer()
            elif self.ahead_next < self.ahead_count:
                outcome = self._give(self.ahead[self.ahead_next])
                if outcome == DONE:
                    self.ahead_next += 1
            else:
                outcome = DONE
            if outcome == GONE:
                return True

    cdef int _answer(self) noexcept nogil:
        """Do what the userfaultfd's messages want; what is given back first, which keeps everything else away."""
        cdef uffd_msg messages[MESSAGES]
        cdef ssize_t n = read(self.fault, messages, sizeof(messages))
        cdef int i, outcome, count
        if n < 0:
            return DONE if errno == EAGAIN or errno == EINTR else GONE
        count = <int> (n // <ssize_t> sizeof(uffd_msg))
        for i in range(count):
            if messages[i].event == UFFD_EVENT_REMOVE:
                self._note_removed(messages[i].arg.remove.start, messages[i].arg.remove.end)
        for i in range(count):
            if messages[i].event == UFFD_EVENT_PAGEFAULT:
                outcome = LATER
                for _ in range(RETRIES):
                    outcome = self._answer_fault(messages[i].arg.pagefault.address)
                    if outcome != LATER:
                        break
                    # Only reading on lets the kernel go on.
                    if self._read_removals() == GONE:
                        return GONE
                if outcome == GONE:
                    return GONE
                if outcome == LATER:
                    # It asks again, if it still waits.
                    self._wake(messages[i].arg.pagefault.address)
        return DONE

    cdef int _read_removals(self) noexcept nogil:
        """Whoever waits for a page that is asked for meanwhile asks again."""
        cdef uffd_msg message
        cdef ssize_t n
        while True:
            n = read(self.fault, &message, sizeof(message))
            if n < 0:
                return DONE if errno == EAGAIN or errno == EINTR else GONE
            if message.event == UFFD_EVENT_REMOVE:
                self._note_removed(message.arg.remove.start, message.arg.remove.end)
            elif message.event == UFFD_EVENT_PAGEFAULT:
                self._wake(message.arg.pagefault.address)

    cdef void _wake(self, uint64_t address) noexcept nogil:
        cdef uffdio_range request
        request.start, request.len = address & ~(self.page_size - 1), self.page_size
        ioctl(self.fault, UFFDIO_WAKE, &request)

    cdef void _note_removed(self, uint64_t start, uint64_t end) noexcept nogil:
        cdef uint64_t at = start, place
        while at < end:
            if self._place(at, &place):
                self.removed[place // self.page_size] = 1
            at += self.page_size

    cdef bint _place(self, uint64_t address, uint64_t *place) noexcept nogil:
        """Where in the memory file what is at this address there is."""
        cdef int i
        for i in range(self.count):
            if address >= self.ranges[i].address and address - self.ranges[i].address < self.ranges[i].size:
                place[0] = self.ranges[i].offset + (address - self.ranges[i].address)
                return True
        return False

    cdef int _answer_fault(self, uint64_t address) noexcept nogil:
        cdef uint64_t place, number
        if not self._place(address, &place):
            self._wake(address)
            return DONE
        number = place // self.window
        store(&self.waited, self.waited + 1)
        if not self.given[number]:
            if self.asked_count < self.windows:
                self.order[self.asked_count] = <uint32_t> number
                self.asked_count += 1
            return self._give(number)
        # It has come already, or was given back since then.
        place -= place % self.page_size
        return self._give_part(place, place + self.page_size)

    cdef int _give(self, uint64_t number) noexcept nogil:
        cdef uint64_t place = number * self.window
        cdef int outcome
        if self.given[number]:
            return DONE
        outcome = self._give_part(place, min(place + self.window, self.size))
        if outcome == DONE:
            self.given[number] = 1
        return outcome

    cdef int _give_part(self, uint64_t place, uint64_t end) noexcept nogil:
        """What is in [place, end) of the memory file, wherever that belongs."""
        cdef uint64_t at, stop, size
        cdef int i, outcome
        for i in range(self.count):
            at, stop = max(place, self.ranges[i].offset), min(end, self.ranges[i].offset + self.ranges[i].size)
            while at < stop:
                size = self._alike(at, stop)
                outcome = self._put(self.ranges[i].address + (at - self.ranges[i].offset), at, size)
                if outcome != DONE:
                    return outcome
                at += size
        return DONE

    cdef bint _is_zero(self, uint64_t at, uint64_t *until) noexcept nogil:
        """Whether the page at `at` comes as zeros; `until`: what of the file is certainly the same kind from there on."""
        cdef long data
        until[0] = at + self.page_size
        if self.removed[at // self.page_size]:
            return True
        if self.page_size != PAGE:
            return False
        data = lseek(self.file, <long> at, SEEK_DATA)
        if data < 0:
            # Nothing but a hole from here on; a file system that cannot tell has no holes.
            return errno == ENXIO
        if <uint64_t> data >= at + PAGE:
            return True
        data = lseek(self.file, <long> at, SEEK_HOLE)
        if data > 0:
            until[0] = max(until[0], <uint64_t> data & ~(<uint64_t> PAGE - 1))
        return False

    cdef uint64_t _alike(self, uint64_t at, uint64_t stop) noexcept nogil:
        """How many bytes from `at` on come in the same way, all zeros or all from the file."""
        cdef uint64_t begin = at, until, ignored
        cdef bint zero = self._is_zero(at, &until)
        cdef uint64_t i
        if not zero:
            # As far as data goes, but for pages that were given back.
            for i in range(at // self.page_size + 1, (min(until, stop) + self.page_size - 1) // self.page_size):
                if self.removed[i]:
                    return i * self.page_size - begin
            return min(until, stop) - begin
        at += self.page_size
        while at < stop and self._is_zero(at, &ignored):
            at += self.page_size
        return min(at, stop) - begin

    cdef int _put(self, uint64_t address, uint64_t at, uint64_t size) noexcept nogil:
        """Have these bytes there that are not yet."""
        cdef uffdio_copy copy
        cdef uffdio_zeropage zero
        cdef uint64_t done = 0, ignored
        cdef int64_t result
        cdef bint zeros = self._is_zero(at, &ignored)
        while done < size:
            if zeros and self.page_size == PAGE:
                zero.range.start, zero.range.len, zero.mode, zero.zeropage = address + done, size - done, 0, 0
                if ioctl(self.fault, UFFDIO_ZEROPAGE, &zero) == 0:
                    return DONE
                result = zero.zeropage
            else:
                copy.dst, copy.src, copy.len = address + done, <uint64_t> self.source + at + done, size - done
                copy.mode, copy.copy = 0, 0
                if zeros:
                    # Of reserved huge pages there are none of zeros.
                    copy.src, copy.len = <uint64_t> self.blank, self.page_size
                if ioctl(self.fault, UFFDIO_COPY, &copy) == 0:
                    done += copy.len
                    continue
                result = copy.copy
            if result > 0:
                done += <uint64_t> result
            elif result == -EEXIST:
                # Somebody waits for it no longer.
                self._wake(address + done)
                done += self.page_size
            elif result == -EAGAIN or result == 0 and errno == EAGAIN:
                return LATER
            else:
                result = -result if result < 0 else errno
                # Its process is gone, or has taken its memory back.
                if result != ESRCH and result != ENOENT:
                    self.failed = <uint64_t> result
                return GONE
        return DONE
