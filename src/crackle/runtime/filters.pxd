"""Programs that the kernel asks about each system call of a thread (seccomp(2)); `filters.pyx` says more."""

# What a thread of one kind gets: as many programs as there are, each of which has to allow a call. Never given back.
ctypedef struct filter_set:
    int count
    const void *programs[2]

# For a thread of that kind that is born now; NULL for none.
cdef const filter_set *filters_of(str kind)
# Said before a thread with filters is made, and, with -1, if it cannot be: `confine` waits until each has put them on.
cdef void expect_thread(const filter_set *filters, int count) noexcept nogil
# On the calling thread, for good; what does not go on ends the process. name: of the thread, in the log.
cdef void put_on(const filter_set *filters, const char *name) noexcept nogil
