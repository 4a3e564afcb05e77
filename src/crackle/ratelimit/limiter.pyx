"""Two token buckets, for bytes and for operations, and the timer that says when to try again.

A bucket holds `size` tokens and fills at a steady rate, from empty to full in `refill_time` milliseconds, each of them any
number of 64 bits; one of no tokens or no time limits nothing. A one-time burst is spent first and never comes back. A
request takes its tokens from both buckets or from none. One that is larger than the bucket passes when the bucket is full
and leaves a debt, so that the rate is kept whatever the sizes are.

Whoever uses a limiter holds the lock of its device; only the timer is the kernel's. Owns the timerfd.
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset, strerror
from posix.time cimport itimerspec
from posix.unistd cimport close, read

from crackle.includes.events cimport CLOCK_MONOTONIC, TFD_CLOEXEC, TFD_NONBLOCK, timerfd_create, timerfd_settime
from crackle.runtime.clock cimport MachineClock
from crackle.runtime.threads cimport now_ns

from math import gcd

from crackle.errors import ConfigError
from crackle.ratelimit.state import BucketState, LimiterState


cdef extern from * nogil:
    """
    typedef unsigned __int128 wide;
    /* a * b / c, at most `most`, without overflow in between. */
    static inline uint64_t scale(uint64_t a, uint64_t b, uint64_t c, int up, uint64_t most) {
        wide value = ((wide) a * b + (up ? c - 1 : 0)) / c;
        return value < most ? (uint64_t) value : most;
    }
    """
    uint64_t scale(uint64_t a, uint64_t b, uint64_t c, int up, uint64_t most)

cdef enum:
    NS_PER_MS = 1_000_000
    NS_PER_S = 1_000_000_000
    # Tokens of less time than this are waited for together: a fast limit would otherwise wake the thread for each.
    QUANTUM_NS = 1_000_000

# What makes sums of tokens and of nanoseconds fit 64 bits, with room to spare: 2^62 tokens, 146 years.
cdef uint64_t MOST = <uint64_t> 1 << 62


cdef void refill(bucket *b, uint64_t now) noexcept nogil:
    cdef uint64_t room = <uint64_t> (<int64_t> b.size - b.level), gained
    if room == 0 or now <= b.filled_at:
        b.filled_at = max(now, b.filled_at)
        return
    gained = scale(now - b.filled_at, b.rate_tokens, b.rate_ns, False, room)
    if gained == room:
        b.level, b.filled_at = <int64_t> b.size, now
    else:
        b.level += <int64_t> gained
        # The time of a part of a token stays to be counted.
        b.filled_at += scale(gained, b.rate_ns, b.rate_tokens, True, now - b.filled_at)


cdef uint64_t wait_for(bucket *b, uint64_t tokens, uint64_t now) noexcept nogil:
    """Nanoseconds until `tokens` may be taken; 0 for now."""
    cdef int64_t needed
    cdef uint64_t wait, full
    if b.size == 0 or tokens <= b.burst:
        return 0
    needed = <int64_t> min(tokens - b.burst, b.size)
    if needed <= b.level:
        return 0
    refill(b, now)
    if needed <= b.level:
        return 0
    wait = scale(<uint64_t> (needed - b.level), b.rate_ns, b.rate_tokens, True, MOST)
    full = scale(<uint64_t> (<int64_t> b.size - b.level), b.rate_ns, b.rate_tokens, True, MOST)
    return max(max(wait, min(<uint64_t> QUANTUM_NS, full)), <uint64_t> 1)


cdef void take(bucket *b, uint64_t tokens) noexcept nogil:
    cdef uint64_t given = min(tokens, b.burst)
    if b.size:
        b.burst -= given
        b.level -= <int64_t> min(tokens - given, MOST)


cdef bint spend(bucket *b, uint64_t tokens, uint64_t now) noexcept nogil:
    if wait_for(b, tokens, now):
        return False
    take(b, tokens)
    return True


cdef void give_back(bucket *b, uint64_t tokens) noexcept nogil:
    cdef uint64_t kept = <uint64_t> min(<int64_t> min(tokens, MOST), <int64_t> b.size - b.level)
    if b.size:
        b.level += <int64_t> kept
        b.burst += min(tokens - kept, b.burst_size - b.burst)


cdef configure_bucket(bucket *b, config, str name):
    """Fill `b` in, full; ConfigError for numbers beyond 64 bits."""
    memset(b, 0, sizeof(bucket))
    if config is None:
        return
    burst = config.one_time_burst or 0
    for what, value in ("size", config.size), ("refill_time", config.refill_time), ("one_time_burst", burst):
        if not 0 <= value < 1 << 64:
            raise ConfigError(f"The {name} bucket has a {what} of {value}; it must be from 0 to {(1 << 64) - 1}.")
    if config.size == 0 or config.refill_time == 0:
        return
    tokens, ns = config.size, config.refill_time * NS_PER_MS
    divisor = gcd(tokens, ns)
    tokens, ns = tokens // divisor, ns // divisor
    # What is left over of numbers this large makes no difference in anybody's lifetime.
    excess = max(0, max(tokens, ns).bit_length() - 62)
    b.rate_tokens, b.rate_ns = max(tokens >> excess, 1), max(ns >> excess, 1)
    b.given_size, b.refill_ms, b.burst_size, b.burst = config.size, config.refill_time, burst, burst
    b.size = min(b.given_size, MOST)
    b.level, b.filled_at = <int64_t> b.size, now_ns()


cdef save_bucket(bucket *b, uint64_t now):
    if b.size == 0:
        return None
    return BucketState(
        size=b.given_size,
        refill_time=b.refill_ms,
        one_time_burst=b.burst_size,
        burst_left=b.burst,
        level=b.level,
        age_ns=max(now, b.filled_at) - b.filled_at,
    )


cdef restore_bucket(bucket *b, state, uint64_t now, str name):
    configure_bucket(b, state, name)
    if b.size:
        if not -<int64_t> MOST <= state.level <= b.size or not 0 <= state.burst_left <= b.burst_size:
            raise ConfigError(f"The saved {name} bucket holds {state.level} tokens and {state.burst_left} more.")
        b.level, b.burst, b.filled_at = state.level, state.burst_left, now - min(state.age_ns, now)


cdef class RateLimiter:
    """The limits of a `schema.RateLimiter`; none where a bucket is absent or has size 0.

    ConfigError when a bucket's numbers have more than 64 bits.
    """

    def __cinit__(self, *args):
        self.timer_fd = -1

    def __init__(self, config=None):
        if config is not None:
            configure_bucket(&self.bandwidth, config.bandwidth, "bandwidth")
            configure_bucket(&self.operations, config.ops, "ops")
        if self.timer_fd < 0:
            self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
            if self.timer_fd < 0:
                raise ConfigError(f"cannot make a rate limiter's timer: {strerror(errno).decode()}")

    def __dealloc__(self):
        if self.timer_fd >= 0:
            close(self.timer_fd)

    def close(self):
        """Give the timer back. Idempotent."""
        if self.timer_fd >= 0:
            close(self.timer_fd)
            self.timer_fd = -1

    cdef bint consume(self, uint64_t size, uint64_t count) noexcept nogil:
        """Take tokens for `count` operations of `size` bytes in all, or refuse and set the timer."""
        cdef uint64_t now, wait
        if self.bandwidth.size == 0 and self.operations.size == 0:
            return True
        if not self.blocked:
            now = self.now()
            wait = max(wait_for(&self.bandwidth, size, now), wait_for(&self.operations, count, now))
            if wait == 0:
                take(&self.bandwidth, size)
                take(&self.operations, count)
                return True
            self.arm(wait)
        self.throttled += 1
        return False

    cdef void refund(self, uint64_t size, uint64_t count) noexcept nogil:
        """Give back what was taken for something that was not done after all."""
        give_back(&self.bandwidth, size)
        give_back(&self.operations, count)

    cdef void arm(self, uint64_t ns) noexcept nogil:
        cdef itimerspec when
        memset(&when, 0, sizeof(when))
        when.it_value.tv_sec, when.it_value.tv_nsec = ns // NS_PER_S, ns % NS_PER_S
        self.blocked = True
        timerfd_settime(self.timer_fd, 0, &when, NULL)

    cdef void acknowledge(self) noexcept nogil:
        """The timer has fired."""
        cdef uint64_t times
        read(self.timer_fd, &times, sizeof(times))
        self.blocked = False
        self.events += 1

    cdef void replace(self, bucket *bandwidth, bucket *operations) noexcept nogil:
        """Use these buckets from now on; NULL for one that stays."""
        if bandwidth != NULL:
            self.bandwidth = bandwidth[0]
            self.bandwidth.filled_at = self.now()
        if operations != NULL:
            self.operations = operations[0]
            self.operations.filled_at = self.now()
        if self.blocked:
            # Whoever waits tries again under the new limits.
            self.arm(1)

    cdef uint64_t now(self) noexcept nogil:
        return now_ns() if self.clock is None else self.clock.now()

    def use(self, MachineClock clock not None):
        """Go by the clock of a machine from now on, before anything is consumed: no bucket fills while that is paused."""
        self.clock = clock
        self.bandwidth.filled_at = self.operations.filled_at = clock.now()

    @property
    def limited(self):
        """Whether there is a limit at all."""
        return self.bandwidth.size != 0 or self.operations.size != 0

    def save(self):
        """LimiterState. The device is at rest."""
        now = self.now()
        return LimiterState(bandwidth=save_bucket(&self.bandwidth, now), ops=save_bucket(&self.operations, now))

    def restore(self, state):
        """The reverse of `save`, before the device is used; ConfigError when the state is not one."""
        cdef bucket bandwidth, operations
        now = self.now()
        restore_bucket(&bandwidth, state.bandwidth, now, "bandwidth")
        restore_bucket(&operations, state.ops, now, "ops")
        self.replace(NULL, NULL)
        self.bandwidth, self.operations = bandwidth, operations

    # -- the same operations for tests ---------------------------------------------------------------------------

    def try_consume(self, uint64_t size, uint64_t count):
        """consume()."""
        return self.consume(size, count)

    def give(self, uint64_t size, uint64_t count):
        """refund()."""
        self.refund(size, count)

    def fired(self):
        """acknowledge()."""
        self.acknowledge()
