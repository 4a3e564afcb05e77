"""virtio-rng (virtio 1.2, section 5.4): an entropy source, which is the host's getrandom(2).

One queue. Each chain is a buffer of the driver's that is filled in place, as far as `MAX_REQUEST`: the driver is told how
much it got, and asks again. Here are the turns of the queue, and what the device saves and counts.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.includes.virtio cimport VIRTIO_ID_RNG
from crackle.memory.guest cimport GuestMemory
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.runtime.threads cimport now_ns
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.queue cimport MAX_QUEUE_SIZE, QUEUE_BROKEN, QUEUE_EMPTY, Virtqueue, chain

import msgspec

from crackle.ratelimit.state import LimiterState


cdef extern from "<sys/random.h>" nogil:
    enum:
        GRND_NONBLOCK
    ssize_t getrandom(void *buffer, size_t size, unsigned int flags)

cdef enum:
    # Bytes that a request gets at most: what a chain names, the same page many times over, says nothing of what is there.
    MAX_REQUEST = 64 << 10


class RngState(msgspec.Struct, frozen=True, kw_only=True, tag="entropy"):
    """What an entropy device adds to its DeviceState."""

    limiter: LimiterState


cdef class Rng(VirtioDevice):
    """An entropy source.

    limiter: the schema's, for the bytes that are given and for requests. ConfigError when its numbers mean nothing.
    """

    own_state = RngState

    cdef readonly RateLimiter limiter
    cdef chain chain
    cdef readonly uint64_t requests, given_bytes, fails, host_fails, throttled

    def __init__(self, GuestMemory memory, *, limiter=None):
        self.set_up(VIRTIO_ID_RNG, 0, (MAX_QUEUE_SIZE,))
        self.limiter = RateLimiter(limiter)
        self.add_limiter(self.limiter, 0)

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
            if not self.answer(queue):
                # It stays in the ring: the limiter's timer comes back for it.
                queue.put_back(1)
                break
            if now_ns() - begin >= TURN_NS:
                self.notify_again(0)
                break
        if queue.show(True):
            self.signal_queue(0)

    cdef bint answer(self, Virtqueue queue) noexcept nogil:
        """Fill the chain's buffers; False when the limiter wants it to wait."""
        cdef uint64_t wanted = min(self.chain.writable_bytes, <uint64_t> MAX_REQUEST), given = 0
        if self.chain.readable:
            # 5.4.6.1: only buffers to be written belong into this queue.
            self.fails += 1
        elif not self.limiter.consume(wanted, 1):
            return False
        else:
            given = self.fill(wanted)
            self.fails += given < wanted
        self.requests += 1
        self.given_bytes += given
        queue.push(self.chain.head, <uint32_t> given)
        return True

    cdef uint64_t fill(self, uint64_t wanted) noexcept nogil:
        """Random bytes into the first `wanted` of the chain; how many came."""
        cdef uint64_t done = 0, part, at
        cdef uint8_t *place
        cdef ssize_t n
        cdef int i
        for i in range(self.chain.writable):
            place, at = <uint8_t *> self.chain.iov[i].iov_base, 0
            part = min(<uint64_t> self.chain.iov[i].iov_len, wanted - done)
            while at < part:
                # A host whose own pool is not ready yet has none to give; the driver asks again.
                n = getrandom(place + at, part - at, GRND_NONBLOCK)
                if n < 0 and errno == EINTR:
                    continue
                if n <= 0:
                    self.host_fails += 1
                    break
                at += <uint64_t> n
            self.memory.mark_dirty(self.chain.gpa[i], at)
            done += at
            if at < part or done == wanted:
                break
        return done

    def counters(self):
        """Firecracker's metrics of an entropy device, since the start."""
        return {
            "activate_fails": self.activate_fails,
            "entropy_event_fails": self.fails + self.broken_queues + self.irq_fails,
            "entropy_event_count": self.requests,
            "entropy_bytes": self.given_bytes,
            "host_rng_fails": self.host_fails,
            "entropy_rate_limiter_throttled": self.limiter.throttled + self.throttled,
            "rate_limiter_event_count": self.limiter.events,
        }

    def save_own(self):
        """RngState. The machine is paused and drained."""
        return RngState(limiter=self.limiter.save())

    def restore_own(self, state):
        """The reverse of `save_own`; ConfigError when its limiter is none."""
        self.limiter.restore(state.limiter)
