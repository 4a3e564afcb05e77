"""The one place that starts threads, by kind, and what those that can be paused and stopped have in common.

A kind has a stack size, and a filter of system calls where the process has said so (`filters.pyx`). Every thread has all
signals blocked but the kick, so that the process's signals reach its main thread, and those that a fault raises in the
thread itself.

A *worker* is a native thread that others pause, resume and stop. It looks at `ask` where it can stand still, and `rest`s
there. How it is brought there is its owner's `kick`: a signal for a vCPU, an eventfd for an I/O loop.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset, strerror
from posix.unistd cimport getpid

from crackle.runtime.census cimport expect, is_born, is_none
from crackle.runtime.filters cimport expect_thread, filter_set, filters_of, put_on

from crackle.errors import KvmError, StateError


cdef extern from * nogil:
    """
    #include <string.h>
    #include <sys/mman.h>

    /* The one signal this package uses: it does nothing but make a blocking system call return. */
    #define KICK_SIGNAL (SIGRTMIN + 1)

    static void ignore_kick(int signal) { (void) signal; }

    static void install_kick_handler(void) {
        struct sigaction action = { .sa_handler = ignore_kick };
        sigemptyset(&action.sa_mask);
        sigaction(KICK_SIGNAL, &action, NULL);
    }

    static void init_changed(pthread_cond_t *changed) {
        pthread_condattr_t attributes;
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(changed, &attributes);
        pthread_condattr_destroy(&attributes);
    }

    /* Creates a thread whose signals are blocked from its first instruction on. */
    static int create_thread(pthread_t *thread, size_t stack, void *(*entry)(void *), void *argument) {
        static const int own[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGSYS };
        pthread_attr_t attributes;
        sigset_t blocked, before;
        int error;
        sigfillset(&blocked);
        sigdelset(&blocked, KICK_SIGNAL);
        for (unsigned i = 0; i < sizeof(own) / sizeof(*own); i++)
            sigdelset(&blocked, own[i]);
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, stack);
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
        error = pthread_create(thread, &attributes, entry, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        return error;
    }

    /* Pages of the calling thread's stack come one by one: a huge one would be held for a few frames. */
    static void keep_stack_small(void) {
        pthread_attr_t attributes;
        void *base;
        size_t size;
        if (pthread_getattr_np(pthread_self(), &attributes))
            return;
        if (!pthread_attr_getstack(&attributes, &base, &size))
            madvise(base, size, MADV_NOHUGEPAGE);
        pthread_attr_destroy(&attributes);
    }
    """
    enum:
        KICK_SIGNAL
    void install_kick_handler()
    void init_changed(pthread_cond_t *)
    int create_thread(pthread_t *, size_t stack, void *(*entry)(void *) noexcept nogil, void *argument)
    void keep_stack_small()
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_setname_np(pthread_t, const char *)

# Where Python may run, a recursion through C must end in RecursionError: what the interpreter's limit of a thousand frames
# takes of C's stack (tests/unit/test_threads.py has the ways), several times over. It is address space, not memory.
cdef enum:
    PYTHON_STACK = 8 << 20
    NATIVE_STACK = 512 << 10
    NAME_SIZE = 16
    KICK_AGAIN_NS = 20_000_000

STACK_SIZES = {
    "vcpu": PYTHON_STACK,       # its buses have devices written in Python
    "io": NATIVE_STACK,
    "python": PYTHON_STACK,     # an I/O loop too, for virtio devices written in Python
    "mmds": PYTHON_STACK,
    "shell": PYTHON_STACK,
    "console": PYTHON_STACK,
    "faults": PYTHON_STACK,     # waits for a page-fault handler, or for its end
    "reaper": PYTHON_STACK,     # ends what was dropped on a thread that cannot wait for it
}

install_kick_handler()


cdef struct beginning:
    void *(*entry)(void *) noexcept nogil
    void *argument
    const filter_set *filters
    int *place              # in the census
    char name[NAME_SIZE]


cdef void *begin(void *argument) noexcept nogil:
    """The first thing that every thread does."""
    cdef beginning given = (<beginning *> argument)[0]
    free(argument)
    is_born(given.place)
    pthread_setname_np(pthread_self(), given.name)
    keep_stack_small()
    put_on(given.filters, given.name)
    return given.entry(given.argument)


cdef int start_thread(pthread_t *thread, str kind, str name, void *(*entry)(void *) noexcept nogil, void *argument) except -1:
    cdef beginning *given
    cdef size_t stack = STACK_SIZES[kind]
    cdef bytes short_name = name.encode()[:NAME_SIZE - 1]
    cdef int error, i
    cdef int *place
    given = <beginning *> malloc(sizeof(beginning))
    if given == NULL:
        raise MemoryError
    memset(given, 0, sizeof(beginning))
    given.entry, given.argument, given.filters = entry, argument, filters_of(kind)
    for i in range(len(short_name)):
        given.name[i] = <char> short_name[i]
    expect_thread(given.filters, 1)
    given.place = place = expect()
    error = create_thread(thread, stack, begin, given)
    if error:
        expect_thread(given.filters, -1)
        is_none(place)
        free(given)
        raise KvmError(f"cannot start the thread {name!r}: {strerror(error).decode()}")
    return 0


# -- threads that run Python -------------------------------------------------------------------------------------------

cdef class Thread:
    """Runs `call()` on a thread of `kind`, called `name` (the kind, by default) where threads are listed.

    An exception that leaves it is reported as unraisable. Neither the process's end nor the object's waits for it.
    KvmError when the thread cannot be had.
    """

    cdef object call
    cdef pthread_t thread
    cdef int pid
    cdef bint started, joined

    def __init__(self, str kind, call, str name=None):
        if self.started:
            raise ValueError("this thread has been started already")
        self.call = call
        Py_INCREF(self)
        try:
            start_thread(&self.thread, kind, name or kind, run_python, <void *> self)
        except BaseException:
            Py_DECREF(self)
            raise
        self.started, self.pid = True, getpid()

    def __dealloc__(self):
        if self.started and not self.joined and self.pid == getpid():
            pthread_detach(self.thread)

    def join(self):
        """Wait for its end. Idempotent, but for one thread only; StateError from itself."""
        if self.joined or not self.is_ours:
            return
        if self.ident == <uint64_t> pthread_self():
            raise StateError("a thread cannot wait for itself")
        self.joined = True
        with nogil:
            pthread_join(self.thread, NULL)

    @property
    def is_ours(self):
        """False in a forked child, where it is not."""
        return self.started and self.pid == getpid()

    @property
    def ident(self):
        """As threading.get_ident() names it; 0 when it has been joined, and in a forked child."""
        return <uint64_t> self.thread if self.is_ours and not self.joined else 0


cdef void *run_python(void *argument) noexcept nogil:
    with gil:
        call_and_release(argument)
    return NULL


cdef void call_and_release(void *argument) noexcept:
    thread = <Thread> argument
    Py_DECREF(thread)       # the one that was taken for us; `thread` is another
    call, thread.call = thread.call, None
    call()


cdef void init_sync(thread_sync *sync) noexcept nogil:
    pthread_mutex_init(&sync.mutex, NULL)
    init_changed(&sync.changed)
    sync.pid = getpid()


cdef bint is_ours(thread_sync *sync) noexcept nogil:
    return sync.pid == getpid()


cdef void destroy_sync(thread_sync *sync) noexcept nogil:
    if not is_ours(sync):
        # It would wait for threads that are not there.
        return
    pthread_cond_destroy(&sync.changed)
    pthread_mutex_destroy(&sync.mutex)


cdef int wait_changed(thread_sync *sync, uint64_t until) noexcept nogil:
    cdef timespec when
    when.tv_sec, when.tv_nsec = until // 1_000_000_000, until % 1_000_000_000
    return pthread_cond_timedwait(&sync.changed, &sync.mutex, &when)


# -- workers -----------------------------------------------------------------------------------------------------------

cdef void init_worker(worker *w, kicker kick, void *owner) noexcept nogil:
    memset(w, 0, sizeof(worker))
    init_sync(&w.sync)
    w.kick, w.owner = kick, owner


cdef void destroy_worker(worker *w) noexcept nogil:
    destroy_sync(&w.sync)


cdef int start_worker(worker *w, str kind, str name, void *(*entry)(void *) noexcept nogil, bint paused) except -1:
    w.ask = ASK_PAUSE if paused else ASK_RUN
    w.state = IS_RUNNING
    try:
        start_thread(&w.thread, kind, name, entry, w.owner)
    except BaseException:
        w.state = IS_NEW
        raise
    return 0


cdef void ask_worker(worker *w, int what) noexcept nogil:
    if load_acquire(&w.state) == IS_NEW or not is_ours(&w.sync):
        return
    pthread_mutex_lock(&w.sync.mutex)
    if w.ask != ASK_STOP:
        store_ordered(&w.ask, what)
    if w.ask != ASK_PAUSE and w.state == IS_PAUSED:
        # Said here and not by the thread: a pause soon after must find it running, and wait for it to rest anew.
        store_ordered(&w.state, IS_RUNNING)
    if w.state == IS_RUNNING and w.ask != ASK_RUN:
        w.kick(w.owner)
    pthread_cond_broadcast(&w.sync.changed)
    pthread_mutex_unlock(&w.sync.mutex)


cdef bint await_rest(worker *w, uint64_t until) noexcept nogil:
    cdef uint64_t now
    cdef bint done
    if load_acquire(&w.state) == IS_NEW or not is_ours(&w.sync):
        return True
    pthread_mutex_lock(&w.sync.mutex)
    while True:
        # Somebody else may let it go on meanwhile; then there is nothing to wait for.
        done = w.state != IS_RUNNING or w.ask == ASK_RUN
        now = now_ns()
        if done or now >= until:
            break
        # A kick may have come just before the thread entered what it was to interrupt.
        if wait_changed(&w.sync, min(until, now + KICK_AGAIN_NS)) and w.state == IS_RUNNING and w.ask != ASK_RUN:
            w.kick(w.owner)
    pthread_mutex_unlock(&w.sync.mutex)
    return done


cdef void join_worker(worker *w) noexcept nogil:
    cdef bint first
    if load_acquire(&w.state) == IS_NEW or not is_ours(&w.sync):
        return
    ask_worker(w, ASK_STOP)
    pthread_mutex_lock(&w.sync.mutex)
    first, w.joined = not w.joined, True
    while w.state != IS_STOPPED:
        if wait_changed(&w.sync, now_ns() + KICK_AGAIN_NS) and w.state != IS_STOPPED:
            w.kick(w.owner)
    pthread_mutex_unlock(&w.sync.mutex)
    if first:
        pthread_join(w.thread, NULL)


cdef bint rest(worker *w) noexcept nogil:
    cdef bint stop
    pthread_mutex_lock(&w.sync.mutex)
    if w.ask == ASK_PAUSE:
        store_ordered(&w.state, IS_PAUSED)
        pthread_cond_broadcast(&w.sync.changed)
        while w.state == IS_PAUSED:
            pthread_cond_wait(&w.sync.changed, &w.sync.mutex)
    stop = w.ask == ASK_STOP
    pthread_mutex_unlock(&w.sync.mutex)
    return stop


cdef void end_worker(worker *w) noexcept nogil:
    pthread_mutex_lock(&w.sync.mutex)
    store_ordered(&w.state, IS_STOPPED)
    pthread_cond_broadcast(&w.sync.changed)
    pthread_mutex_unlock(&w.sync.mutex)


cdef bint is_worker(worker *w) noexcept nogil:
    return worker_ident(w) != 0 and pthread_equal(w.thread, pthread_self()) != 0


cdef int check_waiter(worker *w, str name) except -1:
    if is_worker(w):
        raise StateError(f"{name} cannot wait for itself")
    return 0


cdef pthread_t worker_ident(worker *w) noexcept nogil:
    return w.thread if load_acquire(&w.state) in (IS_RUNNING, IS_PAUSED) and is_ours(&w.sync) else 0


cdef void kick_thread(pthread_t thread) noexcept nogil:
    pthread_kill(thread, KICK_SIGNAL)


_STATES = ("new", "running", "paused", "stopped")


cdef class Worker:
    """A worker, as others see it: `pause`, `resume` and `stop` are for any other thread."""

    def __del__(self):
        # Before the collector takes anything away that the thread still uses; it may run on that very thread.
        if is_worker(&self.worker):
            Thread("reaper", self.stop)
        else:
            self.stop()

    def __dealloc__(self):
        if self.made:
            destroy_worker(&self.worker)

    @property
    def name(self):
        """In messages."""
        return "a worker"

    @property
    def ident(self):
        """The thread, as threading.get_ident() names it; 0 without one."""
        return <uint64_t> worker_ident(&self.worker)

    @property
    def status(self):
        """"new", "running", "paused" or "stopped"."""
        return _STATES[load_acquire(&self.worker.state)]

    def request_pause(self):
        """Ask the thread to stand still as soon as it can, and return at once; `wait_paused` waits."""
        with nogil:
            ask_worker(&self.worker, ASK_PAUSE)

    def wait_paused(self, double timeout=10.0):
        """Wait until it stands still or has ended. KvmError after `timeout` seconds: it is still asked to pause."""
        cdef uint64_t until = now_ns() + <uint64_t> (max(timeout, 0.0) * 1e9)
        cdef bint done
        check_waiter(&self.worker, self.name)
        with nogil:
            done = await_rest(&self.worker, until)
        if not done:
            raise KvmError(f"{self.name} did not come to rest within {timeout:.3g} s")

    def pause(self, double timeout=10.0):
        """Stand still, and wait for that. Idempotent."""
        self.request_pause()
        self.wait_paused(timeout)

    def resume(self):
        """Go on after `pause`, or one that was only asked for. Idempotent."""
        if load_acquire(&self.worker.ask) == ASK_PAUSE:
            with nogil:
                ask_worker(&self.worker, ASK_RUN)

    def request_stop(self):
        """Ask the thread to end and return at once; `stop` waits for it."""
        with nogil:
            ask_worker(&self.worker, ASK_STOP)

    def stop(self):
        """End the thread, wherever it is, and wait for it. Idempotent; StateError on the thread itself."""
        check_waiter(&self.worker, self.name)
        with nogil:
            join_worker(&self.worker)
