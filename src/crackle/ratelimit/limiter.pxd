from libc.stdint cimport int64_t, uint64_t

from crackle.runtime.clock cimport MachineClock

cdef struct bucket:
    uint64_t size           # tokens that it holds; 0 for no limit
    uint64_t rate_tokens    # it gets so many tokens
    uint64_t rate_ns        # in so many nanoseconds
    uint64_t burst_size
    uint64_t burst          # tokens left that are given once
    int64_t level           # tokens; below zero after a request larger than the bucket
    uint64_t filled_at      # when the level was right, by the clock
    uint64_t given_size     # as it was configured
    uint64_t refill_ms

cdef class RateLimiter:
    cdef bucket bandwidth
    cdef bucket operations
    cdef readonly int timer_fd
    cdef MachineClock clock     # of the machine, None for the host's
    # Refused until the timer fires: whoever serves a queue leaves what is in it there.
    cdef readonly bint blocked
    cdef readonly uint64_t events       # times that the timer fired
    cdef readonly uint64_t throttled    # requests refused
    cdef bint consume(self, uint64_t size, uint64_t count) noexcept nogil
    cdef void refund(self, uint64_t size, uint64_t count) noexcept nogil
    cdef uint64_t now(self) noexcept nogil
    cdef void arm(self, uint64_t ns) noexcept nogil
    cdef void acknowledge(self) noexcept nogil
    cdef void replace(self, bucket *bandwidth, bucket *operations) noexcept nogil

# Take `tokens` if they are there, without a timer for when they are not. `now` is runtime.threads.now_ns.
cdef bint spend(bucket *b, uint64_t tokens, uint64_t now) noexcept nogil

# Fill `b` in from a schema.TokenBucket or None, full; ConfigError for numbers beyond 64 bits.
cdef configure_bucket(bucket *b, config, str name)
