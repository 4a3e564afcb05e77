# With any lock held, on any thread: one more descriptor on a guest's account, if there is one; and one less.
cdef bint take_descriptor() noexcept nogil
cdef void give_descriptor() noexcept nogil
cdef bint has_descriptor() noexcept nogil
