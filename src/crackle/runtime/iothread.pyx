"""The I/O thread: one epoll loop, without the GIL, that runs the devices' handlers.

A device adds a descriptor (the ioeventfd of a queue, a TAP, a timer, the console's input) with a native handler, and may
remove it again. Owns the epoll descriptor, the wake-up eventfd and the thread; the descriptors added stay their devices'.
"""

from libc.errno cimport EINTR, EPERM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror
from posix.unistd cimport close, read, write

from crackle.includes.events cimport *
from crackle.runtime.clock cimport MachineClock
from crackle.runtime.threads cimport *

from crackle.errors import ConfigError, KvmError, StateError


cdef extern from * nogil:
    """
    /* On a single CPU a guest could not give more work while this thread looks out for it. */
    static int may_look_out(void) {
        cpu_set_t cpus;
        return sched_getaffinity(0, sizeof(cpus), &cpus) || CPU_COUNT(&cpus) > 1;
    }
    """
    bint may_look_out()

cdef enum:
    BATCH = 32
    # About what a notification and the sleep before it cost.
    LOOK_OUT_NS = 10_000


cdef void *thread_entry(void *argument) noexcept nogil:
    (<IoThread> argument).loop()
    return NULL


cdef void wake_thread(void *argument) noexcept nogil:
    (<IoThread> argument).wake()


cdef class IoThread(Worker):
    """An epoll loop on a thread of its own: of kind "io", or "python" where handlers run Python.

    clock: the machine's, for what its devices do after a time; by default one of its own.
    Paused, it stands still after the turn of whatever it serves; what is ready then is served afterwards.
    """

    def __cinit__(self, *args, **kwargs):
        self.epoll_fd = self.wake_fd = -1
        self.owners = {}
        init_worker(&self.worker, wake_thread, <void *> self)
        self.made = True
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll_fd < 0 or self.wake_fd < 0:
            raise KvmError(f"cannot make the I/O thread's descriptors: {strerror(errno).decode()}")
        cdef epoll_event event
        event.events, event.data.ptr = EPOLLIN, NULL
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.wake_fd, &event) < 0:
            raise KvmError(f"cannot watch the I/O thread's wake-up: {strerror(errno).decode()}")

    def __init__(self, str name="io", MachineClock clock=None):
        self.kind = name
        self.clock = MachineClock() if clock is None else clock

    def __dealloc__(self):
        cdef event_source *source
        if not self.made:
            return
        self.stop()
        while self.sources != NULL:
            source, self.sources = self.sources, self.sources.following
            free(source)
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
        if self.wake_fd >= 0:
            close(self.wake_fd)

    # -- what it watches -----------------------------------------------------------------------------------------

    cdef event_source *add(self, int fd, uint32_t events, event_handler handler, void *context, object owner) except NULL:
        """Call `handler(context, events)` when `fd` is ready; `owner` is kept alive until the source is removed.

        The source's `live` says whether it is watched: the kernel refuses regular files, which are always ready.
        """
        cdef epoll_event event
        cdef event_source *source
        self.bury()
        source = <event_source *> calloc(1, sizeof(event_source))
        if source == NULL:
            raise MemoryError
        source.fd, source.handler, source.context = fd, handler, context
        self.owners[<uint64_t> source] = owner
        source.following, self.sources = self.sources, source
        event.events, event.data.ptr = events, source
        # Before the thread can see it: a source that is `live` may be called at once.
        source.live = True
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
            source.live = False
            if errno != EPERM:
                reason = strerror(errno).decode()
                self.sources = source.following
                del self.owners[<uint64_t> source]
                free(source)
                raise ConfigError(f"cannot watch descriptor {fd}: {reason}")
        return source

    cdef int modify(self, event_source *source, uint32_t events) noexcept nogil:
        """Watch for other events, from any thread; 0 for none."""
        cdef epoll_event event
        event.events, event.data.ptr = events, source
        return epoll_ctl(self.epoll_fd, EPOLL_CTL_MOD, source.fd, &event)

    cdef void remove(self, event_source *source) noexcept nogil:
        """Never call its handler again. The descriptor is still open; nobody uses `source` afterwards.

        When this returns the handler is not running, unless it is itself that removes, on the I/O thread: then it is not
        called again, neither for what the present batch holds. Other threads wait for the end of that batch, and hold no
        lock that a handler takes.
        """
        if is_worker(&self.worker):
            self.take_out(source)
            return
        with gil:
            with nogil:
                self.take_out(source)
                pthread_mutex_lock(&self.worker.sync.mutex)
                if self.worker.state == IS_RUNNING:
                    self.wake()
                    while self.passed < source.ticket and self.worker.state == IS_RUNNING:
                        pthread_cond_wait(&self.worker.sync.changed, &self.worker.sync.mutex)
                pthread_mutex_unlock(&self.worker.sync.mutex)
                if load_acquire(&self.worker.state) != IS_RUNNING:
                    self.between_batches()
            self.bury()

    cdef void take_out(self, event_source *source) noexcept nogil:
        if source.live:
            epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, source.fd, NULL)
        pthread_mutex_lock(&self.worker.sync.mutex)
        store_ordered(&source.removed, True)
        self.removals += 1
        source.ticket = self.removals
        source.next, self.removed = self.removed, source
        pthread_mutex_unlock(&self.worker.sync.mutex)

    cdef void between_batches(self) noexcept nogil:
        """Nobody looks at what was removed before now."""
        cdef event_source *source
        pthread_mutex_lock(&self.worker.sync.mutex)
        if self.removed != NULL:
            while self.removed != NULL:
                source, self.removed = self.removed, self.removed.next
                source.next, self.gone = self.gone, source
            self.passed = self.removals
            pthread_cond_broadcast(&self.worker.sync.changed)
        pthread_mutex_unlock(&self.worker.sync.mutex)

    cdef void bury(self):
        """Free the memory of sources that nobody looks at, and let go of their owners."""
        cdef event_source *source
        cdef event_source *next
        cdef event_source **place
        pthread_mutex_lock(&self.worker.sync.mutex)
        source, self.gone = self.gone, NULL
        pthread_mutex_unlock(&self.worker.sync.mutex)
        owners = []
        while source != NULL:
            next = source.next
            place = &self.sources
            while place[0] != source:
                place = &place[0].following
            place[0] = source.following
            owners.append(self.owners.pop(<uint64_t> source, None))
            free(source)
            source = next
        # Last, for their end may run any code.
        del owners

    # -- on the thread -------------------------------------------------------------------------------------------

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
            elif not load_ordered(&source.removed):
                served += 1
                source.handler(source.context, events[i].events)
        return served

    cdef void loop(self) noexcept nogil:
        cdef bint settling
        cdef int served
        self.spin_ns = LOOK_OUT_NS if may_look_out() else 0
        while True:
            settling = load_acquire(&self.settling)
            served = self.look(0 if settling else -1)
            if served < 0:
                break
            self.wakeups += not settling
            self.between_batches()
            if settling and not served:
                pthread_mutex_lock(&self.worker.sync.mutex)
                store_ordered(&self.settling, False)
                pthread_cond_broadcast(&self.worker.sync.changed)
                pthread_mutex_unlock(&self.worker.sync.mutex)
            if load_acquire(&self.worker.ask) != ASK_RUN and rest(&self.worker):
                break
        self.between_batches()
        end_worker(&self.worker)

    # -- from other threads --------------------------------------------------------------------------------------

    cdef void wake(self) noexcept nogil:
        cdef uint64_t one = 1
        write(self.wake_fd, &one, sizeof(one))

    def start(self, bint paused=False):
        """Start the thread; paused: as after `pause`."""
        if load_acquire(&self.worker.state) != IS_NEW:
            raise StateError("the I/O thread has been started already")
        if self.epoll_fd < 0:
            raise StateError("the I/O thread is closed")
        start_worker(&self.worker, self.kind, self.kind, thread_entry, paused)

    @property
    def name(self):
        """In messages."""
        return f"the {self.kind} thread"

    # -- for tests -----------------------------------------------------------------------------------------------

    def settle(self):
        """Wait until a look has found nothing ready: all that was ready before has been served."""
        if load_acquire(&self.worker.state) != IS_RUNNING:
            return
        with nogil:
            pthread_mutex_lock(&self.worker.sync.mutex)
            store_ordered(&self.settling, True)
            self.wake()
            while self.settling and self.worker.state == IS_RUNNING:
                pthread_cond_wait(&self.worker.sync.changed, &self.worker.sync.mutex)
            pthread_mutex_unlock(&self.worker.sync.mutex)

    def step(self):
        """Serve what is ready once, on the calling thread instead of the I/O thread; how many handlers ran."""
        cdef int served
        if self.worker.state != IS_NEW or self.epoll_fd < 0:
            raise StateError("the I/O thread has been started already")
        # For as long, the caller is the thread.
        self.worker.thread, self.worker.state = pthread_self(), IS_RUNNING
        self.spin_ns = LOOK_OUT_NS if may_look_out() else 0
        with nogil:
            served = self.look(0)
            self.between_batches()
        self.worker.state = IS_NEW
        return served

    def watch(self, int fd, call):
        """Call `call()` under the GIL when `fd` is readable; the `Watch` is for its removal."""
        return Watch(self, fd, call)

    def close(self):
        """Stop, and give the descriptors back. Idempotent."""
        self.stop()
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
            close(self.wake_fd)
            self.epoll_fd = self.wake_fd = -1
        # Nobody is called any more.
        self.owners.clear()


cdef class Watch:
    """A descriptor that a loop watches for Python code."""

    cdef IoThread io
    cdef event_source *source
    cdef object call

    def __init__(self, IoThread io not None, int fd, call):
        self.io, self.call = io, call
        self.source = io.add(fd, EPOLLIN, watched, <void *> self, self)

    def remove(self):
        """IoThread.remove(). Idempotent."""
        cdef event_source *source = self.source
        self.source = NULL
        if source != NULL:
            with nogil:
                self.io.remove(source)


cdef void watched(void *context, uint32_t events) noexcept with gil:
    (<Watch> context).call()
