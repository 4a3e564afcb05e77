"""How long requests take, as Firecracker's metrics tell it (`min_us`, `max_us`, `sum_us`)."""

from libc.stdint cimport uint64_t

cdef struct latency:
    uint64_t min_us
    uint64_t max_us
    uint64_t sum_us

cdef inline void note_latency(latency *l, uint64_t us) noexcept nogil:
    if us < l.min_us or l.sum_us == 0:
        l.min_us = us
    l.max_us = max(l.max_us, us)
    l.sum_us += us
