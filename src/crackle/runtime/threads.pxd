"""Threads as the core uses them: one place that starts them, and one state machine for those that pause and stop."""

from libc.stdint cimport uint8_t, uint64_t
from posix.time cimport timespec

cdef extern from * nogil:
    """
    #ifndef CRACKLE_THREADS
    #define CRACKLE_THREADS
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <time.h>
    #include <unistd.h>

    static inline uint64_t now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
    }

    #define load_acquire(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define load_ordered(place) __atomic_load_n(place, __ATOMIC_SEQ_CST)
    #define store_ordered(place, value) __atomic_store_n(place, value, __ATOMIC_SEQ_CST)
    #define set_flag(place) __atomic_store_n(place, 1, __ATOMIC_RELEASE)
    #define clear_flag(place) __atomic_store_n(place, 0, __ATOMIC_SEQ_CST)
    #endif
    """
    ctypedef struct pthread_mutex_t:
        int _
    ctypedef struct pthread_cond_t:
        int _
    ctypedef unsigned long pthread_t
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)
    int pthread_cond_broadcast(pthread_cond_t *)
    pthread_t pthread_self()
    int pthread_equal(pthread_t, pthread_t)
    int pthread_kill(pthread_t, int)
    int pthread_join(pthread_t, void **)
    int pthread_detach(pthread_t)
    int sched_yield()
    uint64_t now_ns()
    int load_acquire(int *place)
    int load_ordered(int *place)
    void store_ordered(int *place, int value)
    void set_flag(uint8_t *place)       # release: who sees it sees what was stored before
    void clear_flag(uint8_t *place)

# A mutex, and what waits for something that it guards to change.
cdef struct thread_sync:
    pthread_mutex_t mutex
    pthread_cond_t changed
    int pid                 # of the process whose it is

cdef void init_sync(thread_sync *sync) noexcept nogil
cdef void destroy_sync(thread_sync *sync) noexcept nogil
# False in a forked child, which has a copy, and none of the threads that may have had the mutex.
cdef bint is_ours(thread_sync *sync) noexcept nogil
# Waits for a change until `until`, of `now_ns`, with the mutex held; nonzero when that came first.
cdef int wait_changed(thread_sync *sync, uint64_t until) noexcept nogil

# What others ask of a worker, and where it is.
cdef enum:
    ASK_RUN = 0
    ASK_PAUSE = 1
    ASK_STOP = 2

cdef enum:
    IS_NEW = 0
    IS_RUNNING = 1
    IS_PAUSED = 2
    IS_STOPPED = 3

# Makes a worker come to `rest` soon, wherever it is; called with the mutex held, again and again until it is there.
ctypedef void (*kicker)(void *owner) noexcept nogil

# A native thread that others pause, resume and stop: a vCPU's, an I/O loop's. `ask` and `state` are the machine, guarded
# by the mutex; the thread itself may look at `ask` without it. In a forked child it is not there: nothing is asked of it.
cdef struct worker:
    thread_sync sync
    pthread_t thread
    kicker kick
    void *owner
    int ask
    int state
    bint joined             # somebody has taken on to join it

cdef void init_worker(worker *w, kicker kick, void *owner) noexcept nogil
cdef void destroy_worker(worker *w) noexcept nogil
# Starts `entry(owner)` on a thread of `kind`; KvmError when that cannot be, and the worker is new again.
cdef int start_worker(worker *w, str kind, str name, void *(*entry)(void *) noexcept nogil, bint paused) except -1
# Asks, kicks, and returns at once. A worker that was asked to stop cannot be asked for anything else.
cdef void ask_worker(worker *w, int what) noexcept nogil
# Waits until it is paused or has ended, kicking it every now and then; False when `until`, of `now_ns`, came first.
cdef bint await_rest(worker *w, uint64_t until) noexcept nogil
# Asks it to stop and waits for its end, however many do so, but not itself.
cdef void join_worker(worker *w) noexcept nogil
# By the worker itself, where it may stand still: does so for as long as it is asked to; whether it is to end.
cdef bint rest(worker *w) noexcept nogil
# By the worker itself: the last that others see of it.
cdef void end_worker(worker *w) noexcept nogil
# Whether the caller is the worker; and StateError if it is, for whoever would wait.
cdef bint is_worker(worker *w) noexcept nogil
cdef int check_waiter(worker *w, str name) except -1
# The thread as threading.get_ident() names it, 0 without one.
cdef pthread_t worker_ident(worker *w) noexcept nogil
# Make a blocking system call of `thread` return EINTR.
cdef void kick_thread(pthread_t thread) noexcept nogil

# The worker as an object: what owns it subclasses this, says `init_worker(&self.worker, kick, <void *> self)` and `made` in
# its __cinit__, starts it, and stops it in its __dealloc__ before it gives back what the thread uses.
cdef class Worker:
    cdef worker worker
    cdef bint made          # the worker has been initialised
