"""How long a device looks out for more before it asks to be notified of it.

A notification costs the guest an exit and the I/O thread a wake-up; looking out costs a processor, which others may
want. So it is done for as long as it pays: the time is halved when nothing came, and whole again when something came so
soon afterwards that it would have been met. A thread that comes back late from looking has been kept from its
processor: then it is not done at all.
"""

from libc.stdint cimport uint64_t

cdef enum:
    # A notification takes this many times as long as looking out before one.
    SOON = 4

cdef struct lookout:
    uint64_t patience_ns        # for this time at most; 0: not at all
    uint64_t gave_up            # when it was last in vain, of now_ns()


cdef inline void begin_turn(lookout *self, uint64_t now, uint64_t whole_ns) noexcept nogil:
    """The device is served because something came; `whole_ns` is the most that its thread allows (`IoThread.spin_ns`)."""
    if now - self.gave_up < SOON * whole_ns:
        self.patience_ns = whole_ns


cdef inline void in_vain(lookout *self, uint64_t now, uint64_t until) noexcept nogil:
    """Nothing came before `until`, and it is `now`."""
    self.patience_ns = 0 if now > until + self.patience_ns else self.patience_ns // 2
    self.gave_up = now
