"""Which system calls a thread may make (seccomp(2)): puts compiled filters on, and says which call was forbidden.

A process says once which filters its threads have (`use_filters`); each thread that is born afterwards puts its own on
before it does anything else, and the main thread when the guest is about to run (`confine`). A filter stays for as long as
the thread lives, and a thread has its maker's too.

A forbidden call raises SIGSYS in the thread that made it, and the handler here ends the process at once, with
Firecracker's status and lines. It may have interrupted anything, so it makes use of nothing but what was made ready:
`set_last_words`.
"""

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strerror, strlen, strncmp
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport _exit, usleep, write

import os

from crackle.errors import KvmError

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <linux/filter.h>
    #include <linux/seccomp.h>
    #include <signal.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <ucontext.h>
    #include <unistd.h>

    #ifndef SYS_SECCOMP     /* <asm-generic/siginfo.h>: si_code of a call that a filter forbids */
    #define SYS_SECCOMP 1
    #endif

    /* Where a system call's first arguments are when its signal comes. */
    #if defined(__x86_64__)
    static const int registers[] = { REG_RDI, REG_RSI, REG_RDX };
    #define argument_of(context, i) ((uint64_t) ((const ucontext_t *) (context))->uc_mcontext.gregs[registers[i]])
    #elif defined(__aarch64__)
    #define argument_of(context, i) ((uint64_t) ((const ucontext_t *) (context))->uc_mcontext.regs[i])
    #endif

    static int install(const void *program) {
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
            return -1;
        return (int) syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, program);
    }

    #define load_acquire(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define add_to(place, count) __atomic_add_fetch(place, count, __ATOMIC_ACQ_REL)

    static __thread const char *thread_name = "main";

    #define STAMPED "{\\"utc_timestamp_ms\\":"

    #if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    #define SANITIZED 1
    #elif defined(__has_feature)    /* clang */
    #if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
    #define SANITIZED 1
    #endif
    #endif
    #ifndef SANITIZED
    #define SANITIZED 0
    #endif
    """
    enum:
        SANITIZED
        SIGSYS
        SYS_SECCOMP
        SA_SIGINFO
        SA_ONSTACK
    struct sock_filter:
        pass
    struct sock_fprog:
        unsigned short len
        sock_filter *filter
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        int si_code
        int si_syscall
    ctypedef void (*handler_t)(int) noexcept nogil
    ctypedef void (*action_t)(int, siginfo_t *, void *) noexcept nogil
    struct sigaction_t "sigaction":
        handler_t sa_handler
        action_t sa_sigaction
        sigset_t sa_mask
        int sa_flags
    handler_t SIG_IGN
    handler_t SIG_DFL
    int sigaction(int number, const sigaction_t *new, sigaction_t *old)
    int sigfillset(sigset_t *)
    int install(const void *program)
    uint64_t argument_of(void *context, int i)
    const char *thread_name
    int load_acquire(int *place)
    int add_to(int *place, int count)
    const char *STAMPED

cdef enum:
    PROGRAMS = 2
    # Firecracker's exit status.
    BAD_SYSCALL = 148
    ARGUMENTS = 3
    DAY_S = 86400
    BEFORE_MAX = 160
    AFTER_MAX = 256
    BIRTH_US = 20

# What is written when a call is forbidden, by whoever has made it.
cdef struct words:
    int log
    int metrics
    long utc_offset
    char before[BEFORE_MAX]
    char after[AFTER_MAX]
    char *line
    size_t size

cdef words last
last.log = last.metrics = -1

cdef sigaction_t sigsys_before

# By kind; what is here may be in use by a thread that is being born, so nothing is given back: a process asks once or twice.
cdef dict places = {}

# Threads that have been made and have no filter yet.
cdef int unborn = 0

# The main thread has its filter, in this process or in one that it was forked from.
cdef bint confined = False


def _in_child():
    """None of them is there."""
    global unborn
    unborn = 0


os.register_at_fork(after_in_child=_in_child)


# -- a forbidden call: nothing here may wait, or take a lock of the C library's ----------------------------------------

cdef char *put(char *at, const char *text) noexcept nogil:
    while text[0]:
        at[0] = text[0]
        at += 1
        text += 1
    return at


cdef char *put_number(char *at, uint64_t value, int base, int width) noexcept nogil:
    """With at least `width` digits."""
    cdef char reversed[24]
    cdef int count = 0
    while count < width or value:
        reversed[count] = b"0123456789abcdef"[value % base]
        value //= base
        count += 1
    while count:
        count -= 1
        at[0] = reversed[count]
        at += 1
    return at


cdef char *put_time(char *at, const timespec *now) noexcept nogil:
    """2026-01-31T12:00:00.123456789, as Logger writes it; the date from the day's number, in years that begin in March."""
    cdef uint64_t seconds = <uint64_t> (now.tv_sec + last.utc_offset)
    cdef uint64_t days = seconds // DAY_S + 719468      # since the first of March of the year 0
    cdef uint64_t of_era = days % 146097                # 400 years
    cdef uint64_t year = (of_era - of_era // 1460 + of_era // 36524 - of_era // 146096) // 365
    cdef uint64_t of_year = of_era - (365 * year + year // 4 - year // 100)
    cdef uint64_t month = (5 * of_year + 2) // 153
    cdef uint64_t day = of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    year += days // 146097 * 400 + (month <= 2)
    at = put(put_number(at, year, 10, 4), b"-")
    at = put(put_number(at, month, 10, 2), b"-")
    at = put(put_number(at, day, 10, 2), b"T")
    seconds %= DAY_S
    at = put(put_number(at, seconds // 3600, 10, 2), b":")
    at = put(put_number(at, seconds // 60 % 60, 10, 2), b":")
    at = put(put_number(at, seconds % 60, 10, 2), b".")
    return put_number(at, <uint64_t> now.tv_nsec, 10, 9)


cdef char *begin_line(char *at, const timespec *now) noexcept nogil:
    if not last.before[0]:
        return put(at, b"crackle: ")
    return put(put(put(put_time(at, now), last.before), thread_name), last.after)


cdef void tell(const char *lines, const char *end) noexcept nogil:
    if last.log >= 0:
        write(last.log, lines, end - lines)


cdef void say_last_words(int code, int call, void *context) noexcept nogil:
    cdef char lines[2048]
    cdef char *at = lines
    cdef timespec now
    cdef int i
    clock_gettime(CLOCK_REALTIME, &now)
    # The first two are Firecracker's.
    at = put(begin_line(at, &now), b"Shutting down VM after intercepting signal ")
    at = put(put_number(at, SIGSYS, 10, 1), b", code ")
    at = put(put_number(at, code, 10, 1), b".\n")
    at = put(begin_line(at, &now), b"Shutting down VM after intercepting a bad syscall (")
    at = put(put_number(at, call, 10, 1), b").\n")
    at = put(begin_line(at, &now), b"The filter of the thread '")
    at = put(put(at, thread_name), b"' has no line for system call ")
    at = put(put_number(at, call, 10, 1), b" with the first arguments")
    for i in range(ARGUMENTS):
        at = put_number(put(at, b" 0x"), argument_of(context, i), 16, 1)
    tell(lines, put(at, b".\n"))
    if last.metrics >= 0 and last.line != NULL:
        if strncmp(last.line, STAMPED, strlen(STAMPED)) == 0:
            # As many digits until the year 2286.
            put_number(last.line + strlen(STAMPED), <uint64_t> (now.tv_sec * 1000 + now.tv_nsec // 1000000), 10, 13)
        write(last.metrics, last.line, last.size)


cdef void on_sigsys(int number, siginfo_t *info, void *context) noexcept nogil:
    if info.si_code == SYS_SECCOMP:
        say_last_words(info.si_code, info.si_syscall, context)
        _exit(BAD_SYSCALL)
    # Somebody has sent it.
    if sigsys_before.sa_flags & SA_SIGINFO:
        sigsys_before.sa_sigaction(number, info, context)
    elif sigsys_before.sa_handler == SIG_DFL:
        _exit(BAD_SYSCALL)
    elif sigsys_before.sa_handler != SIG_IGN:
        sigsys_before.sa_handler(number)


cdef int handle_sigsys() except -1:
    """What is there already gets what somebody sends."""
    global sigsys_before
    cdef sigaction_t now
    cdef sigaction_t ours
    if sigaction(SIGSYS, NULL, &now):
        raise KvmError(f"cannot handle SIGSYS: {strerror(errno).decode()}")
    if now.sa_flags & SA_SIGINFO and now.sa_sigaction == on_sigsys:
        return 0
    sigsys_before = now
    ours.sa_sigaction = on_sigsys
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK
    sigfillset(&ours.sa_mask)
    sigaction(SIGSYS, &ours, NULL)
    return 0


# -- filters -----------------------------------------------------------------------------------------------------------

def use_filters(filters, bint ends=True):
    """Every thread of a kind that is in `filters`, born from now on, gets those programs; None: no thread gets any.

    ends: a forbidden call of theirs raises SIGSYS, which is handled from now on.
    """
    global thread_name
    cdef filter_set *found
    places.clear()
    thread_name = b"main"   # which has this thread's variable made
    if filters is None or SANITIZED:
        return
    for kind, programs in filters.items():
        if len(programs) > PROGRAMS:
            raise ValueError(f"a thread can have {PROGRAMS} filters, not {len(programs)}")
        found = <filter_set *> calloc(1, sizeof(filter_set))
        if found == NULL:
            raise MemoryError
        places[kind] = <size_t> found
        for code in programs:
            found.programs[found.count] = copied(code)
            found.count += 1
    if ends:
        handle_sigsys()


cdef sock_fprog *copied(bytes code) except NULL:
    cdef sock_fprog *program = <sock_fprog *> calloc(1, sizeof(sock_fprog) + len(code))
    if program == NULL:
        raise MemoryError
    program.len = <unsigned short> (len(code) // sizeof(sock_filter))
    program.filter = <sock_filter *> (program + 1)
    memcpy(program.filter, <const char *> code, len(code))
    return program


def possible():
    """Not in a build with a sanitizer, whose runtime calls whatever it likes."""
    return not SANITIZED


def filtered():
    """Whether threads that are born now get filters."""
    return bool(places)


cdef const filter_set *filters_of(str kind):
    return <const filter_set *> <size_t> places.get(kind, 0)


cdef void expect_thread(const filter_set *filters, int count) noexcept nogil:
    if filters != NULL:
        add_to(&unborn, count)


cdef void put_on(const filter_set *filters, const char *name) noexcept nogil:
    global thread_name
    cdef int i
    thread_name = name
    if filters == NULL:
        return
    for i in range(filters.count):
        if install(filters.programs[i]):
            fail(errno)
    add_to(&unborn, -1)


cdef void fail(int error) noexcept nogil:
    """No thread goes on without the filter that it should have."""
    cdef char lines[512]
    cdef char *at = lines
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    at = put(begin_line(at, &now), b"The kernel takes no seccomp filter for the thread '")
    at = put(put(at, thread_name), b"': error ")
    tell(lines, put(put_number(at, error, 10, 1), b".\n"))
    _exit(1)


def confine(str kind):
    """Have the calling thread, for good, make only the calls of that kind; False where nobody has said which those are.

    Afterwards every thread that has been made has its own filter. Once for a process and those that are forked from it:
    the filter is there already. KvmError when the kernel will not.
    """
    global confined
    cdef const filter_set *filters = filters_of(kind)
    cdef int i
    if filters == NULL:
        return False
    with nogil:
        while load_acquire(&unborn):
            usleep(BIRTH_US)
    if confined:
        return True
    for i in range(filters.count):
        if install(filters.programs[i]):
            raise KvmError(f"the kernel takes no seccomp filter for the thread {kind!r}: {strerror(errno).decode()}")
    confined = True
    return True


def set_last_words(
    int log=-1, bytes before=b"", bytes after=b"", long utc_offset=0, int metrics=-1, bytes line=b""
):
    """What is written before a forbidden call ends the process: three lines to `log`, and `line` to `metrics`.

    log, metrics: descriptors to which writing does not wait, -1 for none; they have to be told anew when they change.
    before, after: what a line of the log has on the left and right of the thread's name, behind the time; without the first,
    it has neither. utc_offset: seconds, of that time. line: of metrics, with the time in milliseconds first.
    To be called, too, when Python has put a handler of its own for SIGSYS there.
    """
    cdef char *copy = NULL
    cdef char *old = last.line
    before, after = before[:BEFORE_MAX - 1], after[:AFTER_MAX - 1]
    if line:
        copy = <char *> calloc(1, <size_t> len(line))
        if copy == NULL:
            raise MemoryError
        memcpy(copy, <const char *> line, len(line))
    # In this order: the filter may be broken on another thread.
    last.log = last.metrics = -1
    memcpy(last.before, <const char *> before, len(before) + 1)
    memcpy(last.after, <const char *> after, len(after) + 1)
    last.utc_offset = utc_offset
    last.line, last.size = copy, <size_t> len(line)
    last.log, last.metrics = log, metrics
    free(old)
    if places:
        handle_sigsys()
