"""The clock of a machine, which stands still while the machine is paused.

Whatever a device does after a time (a connection's deadline, a limiter's tokens, metadata sent again) goes by it, so that a
guest that was paused for an hour finds nothing expired. It shows CLOCK_MONOTONIC less the time spent paused. The kernel's
timers know nothing of it: who is woken by one compares with `now`, and sets it again for what is left.
"""

from libc.stdint cimport uint64_t

from crackle.runtime.threads cimport now_ns


cdef extern from * nogil:
    """
    #define load_word(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define store_word(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)
    """
    uint64_t load_word(uint64_t *place)
    void store_word(uint64_t *place, uint64_t value)

cdef uint64_t STANDS = <uint64_t> 1 << 63


cdef class MachineClock:
    """Runs from the start. `pause` and `resume` are for the one thread that gives the machine its orders."""

    cdef uint64_t now(self) noexcept nogil:
        """Nanoseconds, from any thread."""
        cdef uint64_t word = load_word(&self.word)
        return word & ~STANDS if word & STANDS else now_ns() - word

    cdef bint stands(self) noexcept nogil:
        return load_word(&self.word) & STANDS != 0

    def pause(self):
        """Stand still. Idempotent."""
        if not self.stands():
            store_word(&self.word, STANDS | self.now())

    def resume(self):
        """Go on from there. Idempotent."""
        if self.stands():
            store_word(&self.word, now_ns() - self.now())

    @property
    def now_ns(self):
        """What it shows, in nanoseconds."""
        return self.now()

    @property
    def paused(self):
        """Whether it stands still."""
        return self.stands()
