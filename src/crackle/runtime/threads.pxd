"""POSIX threads as the core uses them: small stacks, and no signal but the kick that interrupts a vCPU."""

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

    /* The one signal this package uses: it does nothing but make a blocking system call return. */
    #define KICK_SIGNAL (SIGRTMIN + 1)

    struct thread_sync {
        pthread_mutex_t mutex;
        pthread_cond_t changed;
        pthread_t thread;
        pid_t pid;  /* of the process that made it: a forked child has a copy, and none of the threads */
    };

    static void kick_handler(int signal) { (void) signal; }

    static void install_kick_handler(void) {
        struct sigaction action = { .sa_handler = kick_handler };
        sigemptyset(&action.sa_mask);
        sigaction(KICK_SIGNAL, &action, NULL);
    }

    static void init_sync(struct thread_sync *sync) {
        pthread_condattr_t attributes;
        sync->pid = getpid();
        pthread_mutex_init(&sync->mutex, NULL);
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(&sync->changed, &attributes);
        pthread_condattr_destroy(&attributes);
    }

    static inline int is_ours(struct thread_sync *sync) { return sync->pid == getpid(); }

    /* In a forked child it would wait for threads that are not there. */
    static void destroy_sync(struct thread_sync *sync) {
        if (!is_ours(sync))
            return;
        pthread_cond_destroy(&sync->changed);
        pthread_mutex_destroy(&sync->mutex);
    }

    /* Every other signal stays blocked in the new thread, so that the process's signals reach its main thread; but not
       those that a fault raises in the thread itself, or whoever reports crashes would never hear of it. */
    static int start_thread(struct thread_sync *sync, void *(*entry)(void *), void *argument, const char *name) {
        pthread_attr_t attributes;
        sigset_t blocked, before;
        int error;
        sigfillset(&blocked);
        sigdelset(&blocked, KICK_SIGNAL);
        sigdelset(&blocked, SIGSEGV);
        sigdelset(&blocked, SIGBUS);
        sigdelset(&blocked, SIGILL);
        sigdelset(&blocked, SIGFPE);
        sigdelset(&blocked, SIGSYS);
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 512 << 10);
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
        error = pthread_create(&sync->thread, &attributes, entry, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (!error)
            pthread_setname_np(sync->thread, name);
        pthread_attr_destroy(&attributes);
        return error;
    }

    static inline uint64_t now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
    }

    /* Waits for a change for at most `ns` nanoseconds; the mutex is held. */
    static int wait_changed(struct thread_sync *sync, uint64_t ns) {
        uint64_t end = now_ns() + ns;
        struct timespec until = { .tv_sec = end / 1000000000u, .tv_nsec = end % 1000000000u };
        return pthread_cond_timedwait(&sync->changed, &sync->mutex, &until);
    }

    #define load_acquire(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define store_ordered(place, value) __atomic_store_n(place, value, __ATOMIC_SEQ_CST)
    #define clear_flag(place) __atomic_store_n(place, 0, __ATOMIC_SEQ_CST)
    #endif
    """
    ctypedef struct pthread_mutex_t:
        int _
    ctypedef struct pthread_cond_t:
        int _
    ctypedef unsigned long pthread_t
    struct thread_sync:
        pthread_mutex_t mutex
        pthread_cond_t changed
        pthread_t thread
    enum:
        KICK_SIGNAL
    void install_kick_handler()
    void init_sync(thread_sync *sync)
    void destroy_sync(thread_sync *sync)
    bint is_ours(thread_sync *sync)
    int start_thread(thread_sync *sync, void *(*entry)(void *) noexcept nogil, void *argument, const char *name)
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_kill(pthread_t, int)
    int pthread_join(pthread_t, void **)
    pthread_t pthread_self()
    int sched_yield()
    uint64_t now_ns()
    int wait_changed(thread_sync *sync, uint64_t ns)
    int load_acquire(int *place)
    void store_ordered(int *place, int value)
    void clear_flag(uint8_t *place)
