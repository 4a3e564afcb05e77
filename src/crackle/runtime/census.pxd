"""The threads of this process that are there, as far as it has started them."""

# A place for one that is to be started, with the GIL; what it says first in it, and whoever cannot start it. NULL: no place.
cdef int *expect() noexcept
cdef void is_born(int *place) noexcept nogil
cdef void is_none(int *place) noexcept nogil
