"""The threads of this process that are there, as far as it has started them (`threads.pyx`).

A thread that has said all that it had to say still writes to the heap: the C library puts its things away. So it is there
for as long as the kernel has it, which is asked by its number (tgkill(2)): in a jail there is no /proc that lists them. Its
list has the kernel's own, too, of io_uring and KVM, which run none of our code.
"""

from libc.errno cimport ESRCH, errno
from libc.string cimport memset
from posix.unistd cimport getpid

cdef extern from * nogil:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    #define own_number() ((int) syscall(SYS_gettid))
    /* No signal is sent. */
    #define ask_for(thread) syscall(SYS_tgkill, getpid(), thread, 0)
    #define store_number(place, number) __atomic_store_n(place, number, __ATOMIC_SEQ_CST)
    #define load_number(place) __atomic_load_n(place, __ATOMIC_SEQ_CST)
    """
    int own_number()
    long ask_for(int thread)
    void store_number(int *place, int number)
    int load_number(int *place)

cdef enum:
    PLACES = 128            # more than a microVM has vCPUs and whatever else
    NONE = 0
    UNBORN = -1             # asked for, and without a number yet

# Numbers of threads (gettid(2)) whose end nobody has seen, of the process `parent`.
cdef int[PLACES] places
cdef int parent = 0
cdef bint too_many = False


cdef int *expect() noexcept:
    global parent, too_many
    cdef int i
    if parent != getpid():
        # Those of the process that this one was forked from.
        memset(places, 0, sizeof(places))
        parent, too_many = getpid(), False
    if not too_many:
        for i in range(PLACES):
            if load_number(&places[i]) == NONE:
                store_number(&places[i], UNBORN)
                return &places[i]
    # A program with many microVMs, which has no need to know.
    too_many = True
    return NULL


cdef void is_born(int *place) noexcept nogil:
    if place != NULL:
        store_number(place, own_number())


cdef void is_none(int *place) noexcept nogil:
    if place != NULL:
        store_number(place, NONE)


def living():
    """How many there are beside the main thread; more than there can be when there were too many to know."""
    cdef int i, number, found = 0
    if parent != getpid():
        return 0
    for i in range(PLACES):
        number = load_number(&places[i])
        if number == NONE:
            continue
        if number != UNBORN and ask_for(number) and errno == ESRCH:
            store_number(&places[i], NONE)
        else:
            found += 1
    return PLACES + 1 if too_many else found
