"""The I/O thread: one epoll loop, without the GIL, that runs the devices' handlers.

A device adds a descriptor (the ioeventfd of a queue, a TAP, a timer, the console's input) with a native handler. Owns the
epoll descriptor, the wake-up eventfd and the thread; the descriptors added stay their devices'.
"""

from libc.errno cimport EINTR, EPERM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport strerror
from posix.unistd cimport close, read, write

from crackle.includes.events cimport *
from crackle.runtime.threads cimport *

from _thread import start_new_thread

from crackle.errors import ConfigError, KvmError, StateError


cdef enum:
    ASK_RUN = 0
    ASK_PAUSE = 1
    ASK_STOP = 2
    IS_NEW = 0
    IS_RUNNING = 1
    IS_PAUSED = 2
    IS_STOPPED = 3
    BATCH = 32
    PAUSE_TIMEOUT_NS = 10_000_000_000


cdef void *thread_entry(void *argument) noexcept nogil:
    (<IoThread> argument).loop()
    return NULL


cdef class IoThread:
    """An epoll loop on a thread of its own, called `name`; `start`, `pause`, `resume`, `stop` from any other thread."""

    def __cinit__(self, *args):
        self.epoll_fd = self.wake_fd = -1
        self.owners = []
        self.sync = calloc(1, sizeof(thread_sync))
        if self.sync == NULL:
            raise MemoryError
        init_sync(<thread_sync *> self.sync)
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll_fd < 0 or self.wake_fd < 0:
            raise KvmError(f"cannot make the I/O thread's descriptors: {strerror(errno).decode()}")
        cdef epoll_event event
        event.events, event.data.ptr = EPOLLIN, NULL
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.wake_fd, &event) < 0:
            raise KvmError(f"cannot watch the I/O thread's wake-up: {strerror(errno).decode()}")

    def __init__(self, str name="io"):
        self.name = name.encode()

    def __del__(self):
        # Before the collector takes anything away that the thread still uses; it may run on that very thread.
        if self.is_current():
            start_new_thread(self.stop, ())
        else:
            self.stop()

    def __dealloc__(self):
        cdef int i
        if self.sync != NULL:
            self.stop()
        for i in range(self.count):
            free(self.sources[i])
        free(self.sources)
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
        if self.wake_fd >= 0:
            close(self.wake_fd)
        if self.sync != NULL:
            destroy_sync(<thread_sync *> self.sync)
            free(self.sync)

    cdef event_source *add(self, int fd, uint32_t events, event_handler handler, void *context, object owner) except NULL:
        """Call `handler(context, events)` when `fd` is ready; `owner` is kept alive with the thread.

        The source's `live` says whether it is watched: the kernel refuses regular files, which are always ready.
        """
        cdef epoll_event event
        cdef event_source *source
        cdef event_source **grown = <event_source **> realloc(
            self.sources, (self.count + 1) * sizeof(event_source *))
        if grown == NULL:
            raise MemoryError
        self.sources = grown
        source = <event_source *> calloc(1, sizeof(event_source))
        if source == NULL:
            raise MemoryError
        source.fd, source.handler, source.context = fd, handler, context
        self.sources[self.count] = source
        self.count += 1
        self.owners.append(owner)
        event.events, event.data.ptr = events, source
        source.live = epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0
        if not source.live and errno != EPERM:
            raise ConfigError(f"cannot watch descriptor {fd}: {strerror(errno).decode()}")
        return source

    cdef int modify(self, event_source *source, uint32_t events) noexcept nogil:
        """Watch for other events, from any thread; 0 for none."""
        cdef epoll_event event
        event.events, event.data.ptr = events, source
        return epoll_ctl(self.epoll_fd, EPOLL_CTL_MOD, source.fd, &event)

    cdef int look(self, int timeout) noexcept nogil:
        """Wait up to `timeout` milliseconds and serve what is ready; how many handlers ran, -1 when it cannot go on."""
        cdef epoll_event events[BATCH]
        cdef event_source *source
        cdef uint64_t ticks
        cdef int i, served = 0, n = epoll_wait(self.epoll_fd, events, BATCH, timeout)
        if n < 0:
            return 0 if errno == EINTR else -1
        for i in range(n):
            source = <event_source *> events[i].data.ptr
            if source == NULL:
                read(self.wake_fd, &ticks, sizeof(ticks))
            else:
                served += 1
                source.handler(source.context, events[i].events)
        return served

    cdef void loop(self) noexcept nogil:
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef bint resting
        cdef int served
        while True:
            # Who asks for a pause has stopped the guest. A look that begins after that and finds nothing ready says that
            # all that the guest submitted has been served.
            resting = load_acquire(&self.ask) == ASK_PAUSE
            served = self.look(0 if resting else -1)
            if served < 0:
                break
            self.wakeups += not resting
            if resting and not served:
                pthread_mutex_lock(&sync.mutex)
                if self.ask == ASK_PAUSE:
                    self.state = IS_PAUSED
                    pthread_cond_broadcast(&sync.changed)
                    # Who lets it go on sets the state: a pause soon after finds it running, and waits for it to be
                    # at rest anew.
                    while self.state == IS_PAUSED:
                        pthread_cond_wait(&sync.changed, &sync.mutex)
                pthread_mutex_unlock(&sync.mutex)
            if load_acquire(&self.ask) == ASK_STOP:
                break
        pthread_mutex_lock(&sync.mutex)
        self.state = IS_STOPPED
        pthread_cond_broadcast(&sync.changed)
        pthread_mutex_unlock(&sync.mutex)

    cdef bint is_current(self) noexcept nogil:
        return (self.state != IS_NEW and not self.joined and is_ours(<thread_sync *> self.sync)
                and (<thread_sync *> self.sync).thread == pthread_self())

    cdef int check_waiter(self) except -1:
        if self.is_current():
            raise StateError(f"the {self.name.decode()} thread cannot wait for itself")
        return 0

    @property
    def ident(self):
        """The thread, as threading.get_ident() names it; 0 without one."""
        return 0 if self.state == IS_NEW or self.joined else (<thread_sync *> self.sync).thread

    cdef wake(self, int ask):
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef uint64_t one = 1
        with nogil:
            pthread_mutex_lock(&sync.mutex)
            store_ordered(&self.ask, ask)
            if ask != ASK_PAUSE and self.state == IS_PAUSED:
                self.state = IS_RUNNING
            pthread_cond_broadcast(&sync.changed)
            pthread_mutex_unlock(&sync.mutex)
            write(self.wake_fd, &one, sizeof(one))

    def start(self):
        """Start the thread."""
        cdef int error
        if self.state != IS_NEW:
            raise StateError("the I/O thread has been started already")
        if self.epoll_fd < 0:
            raise StateError("the I/O thread is closed")
        self.state = IS_RUNNING
        error = start_thread(<thread_sync *> self.sync, thread_entry, <void *> self, self.name)
        if error:
            self.state = IS_NEW
            raise KvmError(f"cannot start the I/O thread: {strerror(error).decode()}")

    def pause(self):
        """Serve everything that is ready, then stand still. The vCPUs are paused first. Idempotent.

        StateError on the thread itself.
        """
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef uint64_t end
        cdef bint done
        if self.state == IS_NEW or self.joined or not is_ours(<thread_sync *> self.sync):
            return
        self.check_waiter()
        self.wake(ASK_PAUSE)
        with nogil:
            end = now_ns() + PAUSE_TIMEOUT_NS
            pthread_mutex_lock(&sync.mutex)
            while self.state == IS_RUNNING and now_ns() < end:
                wait_changed(sync, PAUSE_TIMEOUT_NS)
            done = self.state != IS_RUNNING
            pthread_mutex_unlock(&sync.mutex)
        if not done:
            raise KvmError("the I/O thread did not come to rest within 10 s")

    def resume(self):
        """Go on after `pause`. Idempotent."""
        if self.state != IS_NEW and not self.joined and self.ask == ASK_PAUSE and is_ours(<thread_sync *> self.sync):
            self.wake(ASK_RUN)

    def stop(self):
        """End the thread and wait for it. Idempotent; StateError on that thread itself."""
        cdef thread_sync *sync = <thread_sync *> self.sync
        cdef bint first = not self.joined
        if self.state == IS_NEW or not is_ours(<thread_sync *> self.sync):
            return
        self.check_waiter()
        self.joined = True
        self.wake(ASK_STOP)
        with nogil:
            if first:
                pthread_join(sync.thread, NULL)
            else:
                pthread_mutex_lock(&sync.mutex)
                while self.state != IS_STOPPED:
                    pthread_cond_wait(&sync.changed, &sync.mutex)
                pthread_mutex_unlock(&sync.mutex)

    def step(self):
        """For tests: serve what is ready once, on the calling thread instead of the I/O thread; how many handlers ran."""
        cdef int served
        if self.state != IS_NEW or self.epoll_fd < 0:
            raise StateError("the I/O thread has been started already")
        with nogil:
            served = self.look(0)
        return served

    def close(self):
        """Stop, and give the descriptors back. Idempotent."""
        self.stop()
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
            close(self.wake_fd)
            self.epoll_fd = self.wake_fd = -1
