"""virtio-pmem (virtio 1.2, section 5.19): a file of the host's that the guest has in its address space, and needs no copy of.

The file is mapped, shared, and the guest reads and writes the mapping: no request is made for that. One queue has the only
request that there is, which is to have everything on the disk (5.19.6). What follows the end of the file, up to a whole
number of 2 MiB as guests want it, is memory that nobody keeps.

Owns the mapping. No other device reads or writes it: its addresses are not guest memory, as far as they are concerned.
"""

from libc.errno cimport errno
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, strerror
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MS_SYNC, PROT_READ, PROT_WRITE, mmap, msync,
    munmap,
)
from posix.unistd cimport getpid

from crackle.includes.virtio cimport VIRTIO_ID_PMEM
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport HUGE_PAGE_SIZE
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.runtime.threads cimport now_ns
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_EMPTY, Virtqueue, chain, copy_buffers

import msgspec

from crackle.errors import ConfigError
from crackle.ratelimit.state import LimiterState


cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t size, int advice)
    enum:
        MADV_DONTFORK

cdef extern from "<linux/virtio_pmem.h>" nogil:
    struct virtio_pmem_config:
        uint64_t start, size

cdef enum:
    QUEUE_SIZE = 64
    # 5.19.6: the one request, and its answers
    FLUSH = 0
    DONE = 0
    FAILED = -1


class PmemState(msgspec.Struct, frozen=True, kw_only=True, tag="pmem"):
    """What a pmem device adds to its DeviceState. start: where the guest has it, a guest physical address; size: in bytes."""

    start: int
    size: int
    limiter: LimiterState


cdef class Pmem(VirtioDevice):
    """The file behind `fd`, of `length` bytes, for a guest that may write to it unless it is `read_only`.

    limiter: the schema's, for flushes: each is one operation of as many bytes as the file has. ConfigError when it cannot
    be mapped, or the limiter's numbers mean nothing. The descriptor stays the caller's, and is not wanted any more.
    """

    own_state = PmemState

    cdef readonly RateLimiter limiter
    cdef readonly bint read_only
    cdef readonly uint64_t length       # of the file
    cdef readonly uint64_t size         # of what the guest has
    cdef readonly uintptr_t hva
    cdef readonly uint64_t gpa
    cdef chain chain
    cdef readonly uint64_t flushes, fails, throttled

    def __init__(self, GuestMemory memory, int fd, uint64_t length, *, bint read_only=False, limiter=None):
        if length == 0:
            raise ConfigError("Error backing file size is 0")
        self.read_only, self.length = read_only, length
        self.size = (length + HUGE_PAGE_SIZE - 1) // HUGE_PAGE_SIZE * HUGE_PAGE_SIZE
        self.set_up(VIRTIO_ID_PMEM, 0, (QUEUE_SIZE,))
        self.config_size = sizeof(virtio_pmem_config)
        self.limiter = RateLimiter(limiter)
        self.add_limiter(self.limiter, 0)
        self.map(fd)

    cdef map(self, int fd):
        cdef int access = PROT_READ if self.read_only else PROT_READ | PROT_WRITE
        cdef void *place = mmap(NULL, self.size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if place == MAP_FAILED:
            raise ConfigError(f"Error accessing backing file: {strerror(errno).decode()}")
        self.hva = <uintptr_t> place
        if mmap(place, self.length, access, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) == MAP_FAILED:
            raise ConfigError(f"Error accessing backing file: {strerror(errno).decode()}")
        # A forked process maps what its guest has itself.
        madvise(place, self.size, MADV_DONTFORK)

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self) noexcept:
        if self.hva and self.pid == getpid():
            munmap(<void *> self.hva, self.size)
        self.hva = 0

    def close(self):
        """Unmap the file too, of which the guest has nothing any more. Idempotent."""
        VirtioDevice.close(self)
        self.unmap()

    @property
    def own_memory(self):
        """The mapping."""
        return self.hva, self.size, self.read_only

    def place(self, uint64_t gpa):
        """Tell the driver where that is."""
        cdef virtio_pmem_config config
        self.gpa = config.start = gpa
        config.size = self.size
        memcpy(self.config, &config, sizeof(config))

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        cdef uint64_t begin = now_ns()
        cdef int found
        if not queue.ready:
            return
        if self.limiter.blocked:
            self.throttled += 1
            return
        while True:
            found = queue.pop(&self.chain)
            if found == QUEUE_BROKEN:
                self.need_reset()
                break
            if found == QUEUE_EMPTY:
                if queue.rearm():
                    break
                continue
            if not self.limiter.consume(self.length, 1):
                # It stays in the ring: the limiter's timer comes back for it.
                queue.put_back(1)
                break
            queue.push(self.chain.head, self.answer())
            if now_ns() - begin >= TURN_NS:
                self.notify_again(0)
                break
        if queue.show(True):
            self.signal_queue(0)

    cdef uint32_t answer(self) noexcept nogil:
        """Do what the chain asks for and say how that went; how many bytes that is, 0 where there is no place for it."""
        cdef uint32_t request = FLUSH
        cdef int32_t outcome = FAILED
        cdef chain *c = &self.chain
        if c.readable_bytes != sizeof(request) or c.writable_bytes != sizeof(outcome):
            self.fails += 1
            return 0
        copy_buffers(c.iov, c.readable, 0, &request, sizeof(request), False)
        if request == FLUSH and msync(<void *> self.hva, self.length, MS_SYNC) == 0:
            outcome = DONE
            self.flushes += 1
        else:
            self.fails += 1
        copy_buffers(c.iov + c.readable, c.writable, 0, &outcome, sizeof(outcome), True)
        for i in range(c.readable, c.readable + c.writable):
            self.memory.mark_dirty(c.gpa[i], c.iov[i].iov_len)
        return sizeof(outcome)

    def counters(self):
        """Firecracker's metrics of a pmem device, since the start."""
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "event_fails": self.fails + self.broken_queues + self.irq_fails,
            "queue_event_count": self.queue_events,
            "rate_limiter_throttled_events": self.limiter.throttled + self.throttled,
            "rate_limiter_event_count": self.limiter.events,
        }

    def make_durable(self):
        """Have what the guest has written on the disk. ConfigError."""
        cdef int done
        with nogil:
            done = msync(<void *> self.hva, self.length, MS_SYNC)
        if done:
            raise ConfigError(f"cannot write persistent memory to the disk: {strerror(errno).decode()}")

    def save_own(self):
        """PmemState. The machine is paused and drained."""
        return PmemState(start=self.gpa, size=self.size, limiter=self.limiter.save())

    def restore_own(self, state):
        """The reverse of `save_own`; ConfigError when it was another file's, or its limiter is none."""
        if state.size != self.size:
            raise ConfigError(
                f"Restored pmem size {state.size} does not match backing file mapping size {self.size}"
            )
        self.limiter.restore(state.limiter)
