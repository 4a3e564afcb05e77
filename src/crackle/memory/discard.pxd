from libc.stdint cimport uint64_t

from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport region_t

# Gives the whole pages within [gpa, gpa + size), which lies in `r`, back to the host; False when that refuses. `freed` grows
# by the bytes that were given back.
cdef bint discard_in(const region_t *r, uint64_t gpa, uint64_t size, uint64_t *freed) noexcept nogil

# The same for a range in any regions; False when a part of it is in none, too: what lies before that is given back.
cdef bint discard(GuestMemory memory, uint64_t gpa, uint64_t size, uint64_t *freed) noexcept nogil
