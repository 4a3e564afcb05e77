"""What stands between a device written in Python (`crackle.virtio.custom.base`) and its driver.

The lock of a device is never held while the device's Python code runs. Each operation takes it for itself, so that a vCPU
at the registers waits for no Python. Whoever takes it with the GIL held releases the GIL first (docs/architecture.md,
Threads); a thread that holds it may wait for the GIL, because nobody waits for a lock with the GIL in hand.

The device's own threads know nothing of a pause. What they do meanwhile is *postponed*: neither guest memory nor the queues
change until the machine goes on, so that what is saved is whole; a request that was completed meanwhile is saved as one that
the device has, and a restored device gets it again.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport getpid, read

from crackle.runtime.threads cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.device cimport CONFIG_SPACE, VirtioDevice
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_CHAIN, Virtqueue, chain

import msgspec

from crackle.errors import ConfigError, StateError
from crackle.telemetry.logger import Throttle


cdef enum:
    # What the driver did since the device's code last ran
    ACTIVATED = 1
    RESET = 2
    CONFIG = 4
    # Requests that one round of a queue takes, so that a driver that never stops lets others have their turn
    MAX_ROUND = 1024
    # Bytes that read() gives without being told how many: a chain may name the same memory many times over
    MAX_READ = 1 << 24


cdef void report(error) noexcept:
    """As an exception that ends a thread is reported."""
    import threading

    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))


class CustomState(msgspec.Struct, frozen=True, kw_only=True, tag="custom"):
    """What a device written in Python gave to be kept."""

    data: bytes


cdef class PythonDevice(VirtioDevice):
    """The registers and queues of `device`, a `VirtioDevice` of `custom.base`. ConfigError when it is no such thing."""

    own_state = CustomState

    cdef object device
    cdef tuple request_queues
    cdef int pending
    cdef uint64_t generation            # grows with every reset
    cdef uint32_t writable_config
    cdef object throttle                # of their reports: the guest may cause them at will
    cdef bint held                      # the machine is paused
    cdef list postponed                 # meanwhile: (request, bytes it writes, or None where it was completed)
    cdef bint config_postponed          # its configuration space has changed meanwhile
    cdef readonly uint64_t failures     # exceptions that left the device's methods

    def __init__(self, GuestMemory memory, device):
        self.throttle = Throttle()
        self.postponed = []
        name = type(device).__name__
        if device._native is not None:
            raise ConfigError(f"this {name} belongs to another microVM; make one for each")
        if not 0 < device.device_id < 1 << 32:
            raise ConfigError(f"{name}.device_id is {device.device_id}; give the number of virtio 1.2, section 5")
        if not 0 < len(device.queue_sizes) <= 8:
            raise ConfigError(f"{name}.queue_sizes names {len(device.queue_sizes)} queues; give 1 to 8")
        if len(device.config) > CONFIG_SPACE or not 0 <= device.writable_config <= len(device.config):
            raise ConfigError(
                f"{name} has {len(device.config)} bytes of configuration space, {device.writable_config} of them "
                f"writable; {CONFIG_SPACE} is the most"
            )
        try:
            self.set_up(device.device_id, device.features, device.queue_sizes, tuple(device.feature_needs.items()))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise ConfigError(f"{name} cannot be a device: {error}") from None
        self.write(0, device.config)
        self.config_size = len(device.config)
        self.writable_config = device.writable_config
        self.device = device
        self.request_queues = tuple(RequestQueue(self, index) for index in range(self.queue_count))
        device._native = self

    def close(self):
        """Give the descriptors back; the device can be attached again. Idempotent."""
        VirtioDevice.close(self)
        if self.pid == getpid():
            # In a forked child a thread that is not there may have the lock.
            with nogil:
                pthread_mutex_lock(&self.lock)
                self.generation += 1
                pthread_mutex_unlock(&self.lock)
        self.postponed = []
        if self.device is not None:
            self.device._native = None

    def drain(self, double timeout=10.0):
        """Postpone what the device's own threads do from here on, until `kick`. Always True."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.held = True
            pthread_mutex_unlock(&self.lock)
        return True

    def kick(self):
        """Do what was postponed, in its order, and serve every queue once."""
        with nogil:
            pthread_mutex_lock(&self.lock)
        try:
            self.held = False
            postponed, self.postponed = self.postponed, []
            for request, data in postponed:
                self.catch_up(request, data)
            if self.config_postponed:
                self.config_postponed = False
                self.config_changed()
        finally:
            pthread_mutex_unlock(&self.lock)
        VirtioDevice.kick(self)

    cdef void catch_up(self, Request request, data) noexcept:
        try:
            if data is None:
                request.give()
            else:
                request.put(data)
        except Exception as error:
            # Guest memory that was there when the request was made has gone.
            self.failures += 1
            report(error)
            self.need_reset()

    def counters(self):
        """Notifications, and exceptions that left the device's methods."""
        return {"queue_event_count": self.queue_events, "failures": self.failures}

    def request_queue(self, int index):
        """The queue for Python code; IndexError when there is none."""
        return self.request_queues[index]

    def read_config(self):
        """The configuration space."""
        with nogil:
            pthread_mutex_lock(&self.lock)
        data = self.config[:self.config_size]
        pthread_mutex_unlock(&self.lock)
        return data

    def write_config(self, uint32_t offset, bytes data not None):
        """Change the configuration space and tell the driver; ValueError beyond its end."""
        if offset + <uint64_t> len(data) > self.config_size:
            raise ValueError(f"{len(data)} bytes at {offset} are not inside {self.config_size} bytes of configuration space")
        self.write(offset, data)

    cdef write(self, uint32_t offset, bytes data):
        cdef const uint8_t *source = data
        cdef size_t size = len(data)
        with nogil:
            pthread_mutex_lock(&self.lock)
            memcpy(&self.config[offset], source, size)
            if self.held:
                self.config_postponed = True
            else:
                self.config_changed()
            pthread_mutex_unlock(&self.lock)

    def save_own(self):
        """CustomState with what the device's `save` gives."""
        return CustomState(data=self.device.save())

    def restore_own(self, state):
        """Hand the saved bytes to the device's `restore`; ValueError when they are another kind of device's."""
        self.device.restore(state.data)

    # -- with the lock held, on a vCPU thread --------------------------------------------------------------------

    cdef void tell(self, int what) noexcept nogil:
        self.pending |= what
        self.notify_again(0)

    cdef bint on_activate(self) noexcept nogil:
        self.tell(ACTIVATED)
        return True

    cdef void on_reset(self) noexcept nogil:
        self.generation += 1
        self.tell(RESET)

    cdef void on_config_write(self, uint32_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        if offset + size > self.writable_config:
            self.cfg_fails += 1
            return
        memcpy(&self.config[offset], data, size)
        self.tell(CONFIG)

    # -- on the thread of the Python devices ---------------------------------------------------------------------

    cdef void notified(self, int index) noexcept nogil:
        cdef uint64_t ticks
        cdef bint running
        cdef int told
        read(self.sources[index].fd, &ticks, sizeof(ticks))
        pthread_mutex_lock(&self.lock)
        self.queue_events += 1
        running, told = self.running(), self.pending
        self.pending = 0
        pthread_mutex_unlock(&self.lock)
        with gil:
            self.call(index, running, told)

    cdef void call(self, int index, bint running, int told) noexcept:
        device = self.device
        try:
            if told & RESET:
                device.reset()
            if running:
                if told & ACTIVATED:
                    device.activated(self.driver_features)
                if told & CONFIG:
                    device.config_written()
                if (<Virtqueue> self.table[index]).ready:
                    device.handle_queue(index, self.request_queues[index])
        except BaseException as error:
            self.failures += 1
            if self.throttle.allows():
                report(error)
            with nogil:
                pthread_mutex_lock(&self.lock)
                self.need_reset()
                pthread_mutex_unlock(&self.lock)

    # -- for RequestQueue and Request ----------------------------------------------------------------------------

    cdef int take(self, int index, Virtqueue queue, chain *c, uint64_t *generation) noexcept nogil:
        """The next chain, QUEUE_EMPTY when there is none and the driver will notify of the next."""
        cdef int found = 0
        pthread_mutex_lock(&self.lock)
        generation[0] = self.generation
        # While the machine is paused there is none; when it goes on the queue is served.
        if self.running() and queue.ready and self.sources[index].fd >= 0 and not self.held:
            while True:
                found = queue.pop_to_keep(c)
                if found != 0 or queue.rearm():
                    break
            if found == QUEUE_BROKEN:
                self.need_reset()
        pthread_mutex_unlock(&self.lock)
        return found

    cdef bint give(self, int index, Virtqueue queue, uint16_t head, uint32_t length, uint64_t generation) noexcept nogil:
        """Return a chain, with the lock held; False when the driver has reset the device since it was taken."""
        if generation != self.generation or not self.running():
            return False
        queue.push_kept(head, length)
        queue.publish()
        if queue.wants_interrupt():
            self.signal_queue(index)
        return True


cdef class RequestQueue:
    """A queue, as an iterator over the requests in it; iterating ends when it is empty."""

    cdef PythonDevice owner
    cdef Virtqueue queue
    cdef readonly int index

    def __cinit__(self, PythonDevice owner not None, int index):
        self.owner, self.queue = owner, owner.queues[index]
        self.index = index

    def take(self):
        """The next `Request`, or None. The driver notifies of the next one after None only."""
        cdef chain c
        cdef uint64_t generation
        cdef int found
        with nogil:
            found = self.owner.take(self.index, self.queue, &c, &generation)
        return make_request(self, &c, generation) if found == QUEUE_CHAIN else None

    def __iter__(self):
        for _ in range(MAX_ROUND):
            request = self.take()
            if request is None:
                return
            yield request
        self.owner.notify_again(self.index)


cdef class Request:
    """A chain of buffers (virtio 1.2, section 2.7): what the driver sent, and room for what it wants to have.

    readable: bytes that the driver sent. writable: bytes of room for the answer. A request may be kept and completed
    later, from any thread. While the machine is paused nothing waits: the driver has it when the machine goes on.
    """

    cdef PythonDevice owner
    cdef GuestMemory memory
    cdef RequestQueue queue
    cdef uint16_t head
    cdef uint64_t generation
    cdef list sources           # (gpa, size) of the buffers to read ...
    cdef list targets           # ... and to write
    cdef readonly uint64_t readable, writable
    cdef uint64_t done_reading, written
    cdef uint64_t put_bytes     # of `written`, those that guest memory has
    cdef bint completed

    def __init__(self, *args, **kwargs):
        raise TypeError("requests come out of a queue")

    def read(self, size=None):
        """The next `size` bytes that the driver sent, fewer at the end; by default all that are left.

        ValueError when that is more than 16 MiB, StateError after the driver has reset the device.
        """
        left = self.readable - self.done_reading
        if size is None:
            size = left
            if size > MAX_READ:
                raise ValueError(f"the driver sent {size} bytes: say how many to read")
        size = min(size, left)
        data = b"".join(self.memory.read(gpa, n) for gpa, n in pieces(self.sources, self.done_reading, size))
        self.check()
        self.done_reading += size
        return data

    def write(self, data):
        """Put `data` after what was written before. ValueError when there is no room for all of it."""
        cdef uint64_t size
        view = memoryview(data).cast("B")
        size = len(view)
        if size > self.writable - self.written:
            raise ValueError(f"{size} bytes do not fit into the {self.writable - self.written} that are left")
        with nogil:
            pthread_mutex_lock(&self.owner.lock)
        try:
            # A reset waits for the lock: after it nothing is written any more.
            self.check()
            if self.owner.held:
                self.owner.postponed.append((self, bytes(view)))
            else:
                self.put(view)
            self.written += size
        finally:
            pthread_mutex_unlock(&self.owner.lock)

    cdef put(self, view):
        """Into guest memory, after what is there already; with the lock held."""
        cdef uint64_t done = 0
        for gpa, n in pieces(self.targets, self.put_bytes, len(view)):
            self.memory.write(gpa, view[done:done + n])
            done += n
        self.put_bytes += done

    def complete(self):
        """Return the request to the driver, and interrupt it if it wants that. StateError after a reset, or done twice."""
        cdef bint valid = True
        if self.completed:
            raise StateError("the request has been completed already")
        self.completed = True
        with nogil:
            pthread_mutex_lock(&self.owner.lock)
        try:
            if self.owner.held:
                valid = self.generation == self.owner.generation
                self.owner.postponed.append((self, None))
            else:
                valid = self.give()
        finally:
            pthread_mutex_unlock(&self.owner.lock)
        if not valid:
            raise StateError("the driver has reset the device since it made this request")

    cdef bint give(self) noexcept:
        """Return it to the driver, with the lock held; False after a reset."""
        cdef uint32_t length = <uint32_t> min(self.written, <uint64_t> 0xffffffff)
        return self.owner.give(self.queue.index, self.queue.queue, self.head, length, self.generation)

    cdef check(self):
        if self.completed:
            raise StateError("the request has been completed already")
        if self.generation != self.owner.generation:
            raise StateError("the driver has reset the device since it made this request")


cdef Request make_request(RequestQueue queue, chain *c, uint64_t generation):
    cdef Request request = Request.__new__(Request)
    buffers = [(c.gpa[i], c.iov[i].iov_len) for i in range(c.readable + c.writable)]
    request.owner, request.queue, request.memory = queue.owner, queue, queue.owner.memory
    request.head, request.generation = c.head, generation
    request.sources, request.targets = buffers[:c.readable], buffers[c.readable:]
    request.readable, request.writable = c.readable_bytes, c.writable_bytes
    return request


cdef list pieces(list buffers, uint64_t offset, uint64_t size):
    """(gpa, size) of the parts of `buffers` that hold `size` bytes from `offset` on."""
    found = []
    for gpa, length in buffers:
        if size == 0:
            break
        if offset >= length:
            offset -= length
            continue
        n = min(length - offset, size)
        found.append((gpa + offset, n))
        offset = 0
        size -= n
    return found
