from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.runtime.iothread cimport IoThread, event_handler, event_source
from crackle.runtime.threads cimport pthread_mutex_t
from crackle.memory.guest cimport GuestMemory
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.queue cimport Virtqueue

cdef enum:
    MAX_QUEUES = 8
    MAX_LIMITERS = 2
    MAX_NEEDS = 16
    MAX_WATCHED = MAX_QUEUES + MAX_LIMITERS + 4
    CONFIG_SPACE = 256
    # A device's turn: a driver that never stops submitting must not keep the I/O thread from other devices, and from
    # who wants to stop it. What is left is served in the next turn (`notify_again`).
    TURN_NS = 2_000_000

cdef struct queue_source:
    void *device
    int index
    int fd

# Feature bits that a driver may accept only with (one of) these others.
cdef struct feature_need:
    uint64_t feature
    uint64_t needed

# A limiter that holds a queue back, and the queue to serve when it lets go.
cdef struct limiter_source:
    void *device
    void *limiter
    int queue

# How a device reaches its driver: the transport fills it in (`connect`), and outlives it. Called with the device's lock held.
# A device without a transport has none of this, and signals nobody.
cdef struct driver_link:
    void *transport
    # Chains of these queues (a bit for each) are used, the configuration space is another: False when the driver could not be
    # told.
    bint (*queues_used)(void *transport, uint32_t queues) noexcept nogil
    bint (*config_changed)(void *transport) noexcept nogil
    # What another process writes to, to say that chains of this queue are used; -1 when there is none.
    int (*call_fd)(void *transport, int index) noexcept nogil

# One that does not block, for its owner to close; ConfigError when the process is out of descriptors.
cdef int new_eventfd() except -1

cdef class VirtioDevice:
    cdef object __weakref__
    cdef pthread_mutex_t lock
    cdef bint made                  # __cinit__ has run, and the descriptors below are ours
    cdef int pid                    # of the process whose it is: a forked child has copies
    cdef readonly uint32_t device_id
    cdef readonly GuestMemory memory
    cdef readonly uint64_t device_features
    cdef readonly uint64_t driver_features
    cdef feature_need needs[MAX_NEEDS]
    cdef int need_count
    cdef uint32_t status
    cdef readonly uint32_t config_generation
    cdef driver_link driver
    cdef readonly tuple queues
    cdef readonly tuple notify_fds
    cdef int queue_count
    cdef void *table[MAX_QUEUES]     # `queues`, borrowed, for code without the GIL
    cdef queue_source sources[MAX_QUEUES]
    cdef IoThread io                # that serves it, while it is attached
    cdef event_source *watched[MAX_WATCHED]
    cdef int watched_count
    cdef readonly tuple limiters
    cdef limiter_source limiter_sources[MAX_LIMITERS]
    cdef uint8_t config[CONFIG_SPACE]
    cdef uint32_t config_size
    cdef readonly uint64_t queue_events, broken_queues, activate_fails, cfg_fails, irq_fails

    cdef own_of(self, saved)
    cdef set_up(self, uint32_t device_id, uint64_t features, queue_sizes, needs=*)
    cdef bint acceptable(self, uint64_t features) noexcept nogil
    cdef add_limiter(self, RateLimiter limiter, int queue)
    cdef watch(self, int fd, uint32_t events, event_handler handler, void *context)
    cdef connect(self, const driver_link *link)
    cdef void disconnect(self) noexcept
    cdef void close_fds(self) noexcept
    cdef void activate(self) noexcept nogil
    cdef void notify_again(self, int index) noexcept nogil
    cdef void set_status(self, uint32_t value) noexcept nogil
    cdef void reset(self) noexcept nogil
    cdef void need_reset(self) noexcept nogil
    cdef bint running(self) noexcept nogil
    cdef void signal_queue(self, int index) noexcept nogil
    cdef void signal_queues(self, uint32_t queues) noexcept nogil
    cdef void signal_config(self) noexcept nogil
    cdef int call_fd(self, int index) noexcept nogil
    cdef void notified(self, int index) noexcept nogil
    cdef void limiter_fired(self, RateLimiter limiter, int queue) noexcept nogil
    cdef void config_changed(self) noexcept nogil
    cdef void let_go(self, uint64_t gpa, uint64_t size) noexcept nogil
    # A device's own part; each runs with the lock held, without the GIL.
    cdef bint on_activate(self) noexcept nogil
    cdef void on_reset(self) noexcept nogil
    cdef bint on_drain(self, uint64_t until) noexcept nogil
    cdef void on_config_write(self, uint32_t offset, const uint8_t *data, uint32_t size) noexcept nogil
    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil
