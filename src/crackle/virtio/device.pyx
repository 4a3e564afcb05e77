"""What all virtio devices share (virtio 1.2, sections 2.1 to 2.4 and 3.1): status, features, queues, signals.

A device subclasses `VirtioDevice`, fills in its id, features and configuration space, and overrides `handle_queue`. A
transport (`crackle.virtio.transport`) turns the driver's accesses into calls on it, and what the device says with
`signal_queue` and `signal_config` into interrupts. Owns an eventfd for each queue, which KVM writes when it is notified.

`lock` covers everything: the I/O thread holds it while it serves a queue, which may take as long as a disk does.
"""

from libc.errno cimport errno
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memset, strerror
from posix.unistd cimport close, getpid, write

from crackle.runtime.iothread cimport IoThread, event_handler
from crackle.includes.events cimport EFD_CLOEXEC, EFD_NONBLOCK, EPOLLET, EPOLLIN, eventfd
from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport Region
from crackle.ratelimit.limiter cimport RateLimiter, bucket, configure_bucket
from crackle.virtio.queue cimport Virtqueue

import msgspec

from crackle.errors import ConfigError
from crackle.virtio.state import DeviceState


cdef uint64_t VERSION_1 = <uint64_t> 1 << VIRTIO_F_VERSION_1
cdef uint64_t EVENT_IDX = <uint64_t> 1 << VIRTIO_RING_F_EVENT_IDX
cdef uint64_t INDIRECT = <uint64_t> 1 << VIRTIO_RING_F_INDIRECT_DESC


cdef int new_eventfd() except -1:
    cdef int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if fd < 0:
        raise ConfigError(f"cannot make an eventfd: {strerror(errno).decode()}")
    return fd


cdef class VirtioDevice:
    """A virtio device over `memory` with queues of the given sizes. Subclasses say what it is."""

    # The Struct, with a tag, of what `save_own` gives; a subclass that saves something has its own.
    own_state = None

    def __cinit__(self, GuestMemory memory not None, *args, **kwargs):
        pthread_mutex_init(&self.lock, NULL)
        self.memory = memory
        self.pid = getpid()
        self.made = True
        self.queues = self.notify_fds = self.limiters = ()

    cdef set_up(self, uint32_t device_id, uint64_t features, queue_sizes, needs=()):
        """Called by the subclass once. VERSION_1, EVENT_IDX and INDIRECT are offered by every device.

        needs: of the features that make sense only with others, pairs of a bit's number and those of which it needs one.
        """
        if self.device_features:
            raise ValueError("this device is set up already")
        if len(queue_sizes) > MAX_QUEUES:
            raise ValueError(f"{len(queue_sizes)} queues, at most {MAX_QUEUES}")
        if len(needs) > MAX_NEEDS:
            raise ValueError(f"{len(needs)} features need others, at most {MAX_NEEDS}")
        for feature, others in needs:
            self.needs[self.need_count].feature = 1 << feature
            for other in others:
                self.needs[self.need_count].needed |= 1 << other
            self.need_count += 1
        self.memory.add_listener(self)
        self.device_id = device_id
        self.device_features = features | VERSION_1 | EVENT_IDX | INDIRECT
        for index, size in enumerate(queue_sizes):
            queue = Virtqueue(self.memory, size)
            self.queues += (queue,)
            fd = new_eventfd()
            self.table[index] = <void *> queue
            self.sources[index].device, self.sources[index].index, self.sources[index].fd = <void *> self, index, fd
            self.queue_count += 1
            self.notify_fds += (fd,)

    cdef add_limiter(self, RateLimiter limiter, int queue):
        """Serve `queue` again when `limiter`, which is the device's from now on, has tokens again."""
        cdef int index = len(self.limiters)
        if index == MAX_LIMITERS:
            raise ValueError(f"a device has at most {MAX_LIMITERS} limiters")
        self.limiters += (limiter,)
        self.limiter_sources[index].device, self.limiter_sources[index].limiter = <void *> self, <void *> limiter
        self.limiter_sources[index].queue = queue

    def __dealloc__(self):
        if self.made:
            self.close_fds()
            pthread_mutex_destroy(&self.lock)

    cdef void close_fds(self) noexcept:
        cdef int i
        for i in range(self.queue_count):
            if self.sources[i].fd >= 0:
                close(self.sources[i].fd)
                # A number that another descriptor may get must not be written to.
                self.sources[i].fd = -1

    def close(self):
        """Give the descriptors back; the I/O thread is stopped. Idempotent."""
        self.memory.remove_listener(self)
        self.close_fds()
        self.notify_fds = ()
        for limiter in self.limiters:
            limiter.close()

    def attach(self, IoThread io not None):
        """Serve the queues on `io` when they are notified, and when a limiter lets them go on. Until `detach`."""
        cdef int index
        if self.io is not None:
            raise ValueError("this device is attached already")
        self.io = io
        for index in range(self.queue_count):
            # Each notification is an edge: the eventfd need not be read, which would be a system call for each.
            self.watch(self.sources[index].fd, EPOLLIN | EPOLLET, queue_notified, &self.sources[index])
        for index, limiter in enumerate(self.limiters):
            limiter.use(io.clock)
            self.watch(limiter.timer_fd, EPOLLIN, limiter_ready, &self.limiter_sources[index])

    cdef watch(self, int fd, uint32_t events, event_handler handler, void *context):
        """Have `handler(context, events)` called on the I/O thread that the device is attached to."""
        if self.watched_count == MAX_WATCHED:
            raise ValueError(f"a device watches at most {MAX_WATCHED} descriptors")
        self.watched[self.watched_count] = self.io.add(fd, events, handler, context, self)
        self.watched_count += 1

    def detach(self):
        """The reverse of `attach`: when it returns nothing of the device runs on the I/O thread any more. Idempotent.

        Whoever calls holds no lock of the device's; the I/O thread may run.
        """
        while self.watched_count:
            self.watched_count -= 1
            self.io.remove(self.watched[self.watched_count])
        self.io = None

    # -- the driver's life (3.1.1) -------------------------------------------------------------------------------

    cdef bint running(self) noexcept nogil:
        return self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK

    cdef bint acceptable(self, uint64_t features) noexcept nogil:
        """Whether a driver may have these: all offered, not a legacy driver's, and what each needs among them (2.2.2)."""
        cdef int i
        for i in range(self.need_count):
            if features & self.needs[i].feature and not features & self.needs[i].needed:
                return False
        return not features & ~self.device_features and features & VERSION_1 != 0

    cdef void set_status(self, uint32_t value) noexcept nogil:
        cdef uint32_t added = value & ~self.status
        if value == 0:
            self.reset()
            return
        # Bits are only ever added; NEEDS_RESET is the device's own (2.1.1, 2.1.2).
        if value & self.status & ~VIRTIO_CONFIG_S_NEEDS_RESET != self.status & ~VIRTIO_CONFIG_S_NEEDS_RESET:
            self.cfg_fails += 1
            return
        added &= ~VIRTIO_CONFIG_S_NEEDS_RESET
        if added & VIRTIO_CONFIG_S_FEATURES_OK and not self.acceptable(self.driver_features):
            # The driver reads the bit back, finds it missing and gives up (3.1.1, step 6).
            added &= ~VIRTIO_CONFIG_S_FEATURES_OK
            self.cfg_fails += 1
        if added & VIRTIO_CONFIG_S_DRIVER_OK and not (self.status | added) & VIRTIO_CONFIG_S_FEATURES_OK:
            added &= ~VIRTIO_CONFIG_S_DRIVER_OK
            self.cfg_fails += 1
        self.status |= added
        if added & VIRTIO_CONFIG_S_DRIVER_OK:
            self.activate()

    cdef void activate(self) noexcept nogil:
        cdef int i
        for i in range(self.queue_count):
            (<Virtqueue> self.table[i]).event_idx = self.driver_features & EVENT_IDX != 0
            (<Virtqueue> self.table[i]).indirect = self.driver_features & INDIRECT != 0
        if not self.on_activate():
            self.activate_fails += 1
            self.need_reset()
            return
        # The driver may have filled a queue before DRIVER_OK and notified it in vain.
        for i in range(self.queue_count):
            self.notify_again(i)

    cdef void notify_again(self, int index) noexcept nogil:
        cdef uint64_t one = 1
        write(self.sources[index].fd, &one, sizeof(one))

    def kick(self):
        """Serve every queue once, notified or not: after a restore, when what was submitted before is still to be done."""
        cdef int i
        for i in range(self.queue_count):
            self.notify_again(i)

    cdef void reset(self) noexcept nogil:
        cdef int i
        self.on_reset()
        self.status = 0
        self.driver_features = 0
        for i in range(self.queue_count):
            (<Virtqueue> self.table[i]).reset()

    cdef void need_reset(self) noexcept nogil:
        """The guest broke the rules: stop, say so, and wait for the driver to reset the device (2.1.1)."""
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET
        self.broken_queues += 1
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK:
            self.signal_config()

    # -- signals to the driver, and its notifications ------------------------------------------------------------

    cdef connect(self, const driver_link *link):
        """Signal the driver through `link` from now on. ValueError when another transport has the device."""
        if self.driver.transport != NULL:
            raise ValueError("this device has a transport already")
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.driver = link[0]
            pthread_mutex_unlock(&self.lock)

    cdef void disconnect(self) noexcept:
        """Signal nobody any more: the transport goes."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            memset(&self.driver, 0, sizeof(self.driver))
            pthread_mutex_unlock(&self.lock)

    cdef void signal_queue(self, int index) noexcept nogil:
        """Chains of queue `index` are used: tell the driver, who wants to know (`wants_interrupt`)."""
        self.signal_queues(<uint32_t> 1 << index)

    cdef void signal_queues(self, uint32_t queues) noexcept nogil:
        """The same for several, a bit for each: where they share an interrupt, it is raised once."""
        if self.driver.transport != NULL and not self.driver.queues_used(self.driver.transport, queues):
            self.irq_fails += 1

    cdef void signal_config(self) noexcept nogil:
        if self.driver.transport != NULL and not self.driver.config_changed(self.driver.transport):
            self.irq_fails += 1

    cdef int call_fd(self, int index) noexcept nogil:
        """For who serves queue `index` in this device's place: the descriptor to write to instead of `signal_queue`."""
        return -1 if self.driver.transport == NULL else self.driver.call_fd(self.driver.transport, index)

    cdef void notified(self, int index) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.queue_events += 1
        if self.running():
            self.handle_queue(index, <Virtqueue> self.table[index])
        pthread_mutex_unlock(&self.lock)

    cdef void limiter_fired(self, RateLimiter limiter, int queue) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        limiter.acknowledge()
        if self.running():
            self.handle_queue(queue, <Virtqueue> self.table[queue])
        pthread_mutex_unlock(&self.lock)

    cdef void config_changed(self) noexcept nogil:
        """The configuration space has just changed, with the lock held since before: tell the driver (2.5)."""
        self.config_generation += 1
        if self.running():
            self.signal_config()

    # -- guest memory that comes and goes (crackle.memory.guest), on the thread that adds and removes it -------------

    def region_added(self, Region region not None):
        """Whoever serves a queue holds the lock: none of them uses the table any more in which `region` was not."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            pthread_mutex_unlock(&self.lock)

    def region_removed(self, Region region not None):
        """Finish what is in flight, some of which may lie in `region`; a queue whose rings do waits for a reset."""
        cdef uint64_t gpa = region.r.gpa, size = region.r.size
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.let_go(gpa, size)
            pthread_mutex_unlock(&self.lock)

    cdef void let_go(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef bint lost = False
        cdef int i
        # Memory that somebody is still to write to cannot go.
        self.on_drain(UINT64_MAX)
        for i in range(self.queue_count):
            lost |= (<Virtqueue> self.table[i]).let_go(gpa, size)
        if not self.running():
            return
        if lost:
            self.need_reset()
            return
        # What was taken from the queues ahead is in them again.
        for i in range(self.queue_count):
            self.notify_again(i)

    # -- the device's own part -----------------------------------------------------------------------------------

    cdef bint on_activate(self) noexcept nogil:
        return True

    cdef void on_reset(self) noexcept nogil:
        pass

    cdef bint on_drain(self, uint64_t until) noexcept nogil:
        """Finish what is in flight; False when `until`, of `now_ns`, came first, and nothing has changed."""
        return True

    cdef void on_config_write(self, uint32_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        self.cfg_fails += 1

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        pass

    # -- control: from the main thread ---------------------------------------------------------------------------

    def update_limiter(self, int index, config):
        """Change a limiter while the guest runs: each bucket that `config`, a schema.RateLimiter, gives replaces the old.

        One of size 0 takes the limit away. ConfigError changes nothing.
        """
        cdef RateLimiter limiter = self.limiters[index]
        cdef bucket bandwidth, operations
        cdef bucket *new_bandwidth = NULL
        cdef bucket *new_operations = NULL
        if config.bandwidth is not None:
            configure_bucket(&bandwidth, config.bandwidth, "bandwidth")
            new_bandwidth = &bandwidth
        if config.ops is not None:
            configure_bucket(&operations, config.ops, "ops")
            new_operations = &operations
        with nogil:
            pthread_mutex_lock(&self.lock)
            limiter.replace(new_bandwidth, new_operations)
            pthread_mutex_unlock(&self.lock)

    def drain(self, double timeout=10.0):
        """Finish what is in flight; the vCPUs and the I/O thread are at rest. False when that takes longer than `timeout`.

        What has not been taken from the queues stays in them, and so does what has only been begun. timeout: in seconds.
        """
        cdef uint64_t until = now_ns() + <uint64_t> (max(timeout, 0.0) * 1e9)
        cdef bint done
        with nogil:
            pthread_mutex_lock(&self.lock)
            done = self.on_drain(until)
            pthread_mutex_unlock(&self.lock)
        return done

    def counters(self):
        """What the device has counted since it was made, under the names of Firecracker's metrics."""
        return {}

    # -- saved state, and what tests look at ---------------------------------------------------------------------

    def save(self):
        """DeviceState. The machine is paused and drained; the transport saves this with its own registers."""
        return DeviceState(
            driver_features=self.driver_features,
            status=self.status,
            config_generation=self.config_generation,
            queues=tuple(queue.save() for queue in self.queues),
            own=self.save_own(),
        )

    def restore(self, state):
        """The reverse of `save`, before the vCPUs run; ValueError when the state is not this device's.

        What was submitted and not served yet is served as soon as the I/O thread runs.
        """
        self.accept_features(state.driver_features)
        # Until FEATURES_OK they are what the driver has written so far, whatever that is.
        if state.status & VIRTIO_CONFIG_S_FEATURES_OK and not self.acceptable(state.driver_features):
            raise ValueError(
                f"saved features {state.driver_features:#x} are none that this device offers ({self.device_features:#x})"
            )
        if len(state.queues) != len(self.queues):
            raise ValueError(f"{len(state.queues)} saved queues, this device has {len(self.queues)}")
        for queue, saved in zip(self.queues, state.queues):
            queue.restore(
                saved,
                event_idx=bool(state.driver_features & EVENT_IDX),
                indirect=bool(state.driver_features & INDIRECT),
            )
        self.driver_features, self.status = state.driver_features, state.status
        self.config_generation = state.config_generation
        self.restore_own(self.own_of(state.own))
        self.kick()

    @property
    def own_memory(self):
        """What it brings with it that is no RAM: host address, bytes, whether the guest may only read it. None of most."""
        return None

    def place(self, gpa):
        """The guest is to find that at this guest physical address."""

    def make_durable(self):
        """Have on the host's disks what the guest has been told is there. OSError or ConfigError when that cannot be."""

    def save_own(self):
        """What the device itself adds to DeviceState: an `own_state`, or None."""
        return None

    def restore_own(self, state):
        """The reverse of `save_own`, before the vCPUs run; ValueError when what was saved does not fit this device."""

    cdef own_of(self, saved):
        kind = type(self).own_state
        if type(saved) is kind or (saved is None and kind is None):
            return saved
        try:
            if kind is not None:
                return msgspec.convert(saved, kind)
            reason = "it saves nothing of its own"
        except msgspec.ValidationError as error:
            reason = str(error)
        raise ValueError(f"what was saved is not of a {type(self).__name__}: {reason}")

    def accept_features(self, features):
        """Before a restore: offer what the saved driver has negotiated, where that depends on the host only."""

    @property
    def device_status(self):
        """The status register (2.1)."""
        return self.status

    @property
    def fault(self):
        """Why a queue broke, or None."""
        for queue in self.queues:
            if (<Virtqueue> queue).fault != NULL:
                return (<Virtqueue> queue).fault.decode()
        return None


cdef void queue_notified(void *context, uint32_t events) noexcept nogil:
    cdef queue_source *source = <queue_source *> context
    (<VirtioDevice> source.device).notified(source.index)


cdef void limiter_ready(void *context, uint32_t events) noexcept nogil:
    cdef limiter_source *source = <limiter_source *> context
    (<VirtioDevice> source.device).limiter_fired(<RateLimiter> source.limiter, source.queue)
