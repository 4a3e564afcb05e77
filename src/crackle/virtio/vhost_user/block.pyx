"""virtio-block (virtio 1.2, section 5.2) whose queue another process serves: vhost-user-block.

The back end has guest memory, the queue's notification and the interrupt: requests never come through this process. What
is left here is the transport, and the moments when the driver turns the device on and off, which are told to the back end
over its socket on the vCPU's thread. Owns the connection.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport nanosleep, timespec

from crackle.runtime.iothread cimport IoThread
from crackle.includes.block cimport VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX
from crackle.includes.events cimport EPOLLONESHOT, EPOLLRDHUP
from crackle.runtime.threads cimport *
from crackle.includes.vhost_user cimport *
from crackle.includes.virtio cimport (
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport Region
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.queue cimport RING_IDX, Virtqueue

import msgspec

from crackle.errors import ConfigError, CrackleError, StateError
from crackle.virtio.vhost_user.protocol import Ring, VhostUser


cdef extern from * nogil:
    uint16_t load_idx "__atomic_load_n" (uint16_t *place, int order)
    enum:
        __ATOMIC_ACQUIRE

cdef enum:
    QUEUE_SIZE = 256
    # How long a pause, or a driver that turns the device off, waits for the back end to do what the driver submitted.
    PAUSE_PATIENCE_NS = 1_000_000_000
    RESET_PATIENCE_NS = 500_000_000
    POLL_NS = 500_000
    # The configuration space as virtio 1.2 has it, which back ends before and after it know.
    CONFIG_SIZE = 60


cdef uint64_t bit(int number):
    return <uint64_t> 1 << number


# What describes the disk is the back end's to say; one queue, and no switch for its cache.
NEEDED = bit(VIRTIO_F_VERSION_1)
WANTED = (
    NEEDED
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_RING_F_INDIRECT_DESC)
    | bit(VIRTIO_BLK_F_SIZE_MAX)
    | bit(VIRTIO_BLK_F_SEG_MAX)
    | bit(VIRTIO_BLK_F_GEOMETRY)
    | bit(VIRTIO_BLK_F_BLK_SIZE)
    | bit(VIRTIO_BLK_F_TOPOLOGY)
    | bit(VIRTIO_BLK_F_RO)
    | bit(VIRTIO_BLK_F_DISCARD)
    | bit(VIRTIO_BLK_F_WRITE_ZEROES)
)


def connect(str path, *, bint writeback=False):
    """A connection to the back end at `path` for a disk; writeback: let the guest flush. ConfigError when it is no use."""
    return VhostUser(path, wanted=WANTED | (bit(VIRTIO_BLK_F_FLUSH) if writeback else 0), needed=NEEDED)


class VhostUserBlockState(msgspec.Struct, frozen=True, kw_only=True, tag="vhost_user_block"):
    """What a disk served by another process adds: the configuration space that the driver knows."""

    config: bytes


cdef class VhostUserBlock(VirtioDevice):
    """A disk that the vhost-user back end behind `backend` serves: its socket's path, or a connection that `connect` made.

    writeback: with a path, offer FLUSH where the back end has it. Guest memory must be a memfd (or another shared
    mapping). Whether the disk is read-only is the back end's to say. Raises ConfigError when the back end is no use.
    """

    own_state = VhostUserBlockState

    cdef readonly object backend
    cdef readonly str failure           # why the back end serves no more, or None
    cdef readonly bint started          # the back end has the ring
    cdef readonly bint lost             # the connection has ended
    cdef readonly uint64_t init_time_us, activate_time_us, config_change_time_us

    def __init__(self, GuestMemory memory, backend, *, bint writeback=False):
        cdef uint64_t begin = now_ns()
        self.set_up(VIRTIO_ID_BLOCK, 0, (QUEUE_SIZE,))
        self.backend = connect(backend, writeback=writeback) if isinstance(backend, str) else backend
        self.device_features = self.backend.features
        self.config_size = CONFIG_SIZE
        try:
            self.read_config()
        except BaseException:
            self.close()
            raise
        self.init_time_us = (now_ns() - begin) // 1000

    def close(self):
        """Hang up and give the descriptors back; the I/O thread is stopped. Idempotent."""
        VirtioDevice.close(self)
        if self.backend is not None:
            self.backend.close()

    def attach(self, IoThread io not None):
        """Let `io` look out for the end of the connection. The queue is none of its business."""
        # Once is enough: a connection that has ended stays so.
        self.io = io
        self.watch(self.backend.fileno(), EPOLLRDHUP | EPOLLONESHOT, hung_up, <void *> self)

    @property
    def read_only(self):
        """Whether the back end lets nobody write."""
        return bool(self.device_features & bit(VIRTIO_BLK_F_RO))

    @property
    def size(self):
        """Bytes that the guest sees."""
        return (<virtio_blk_config *> self.config).capacity << 9

    @property
    def fault(self):
        """Why the device serves no more, or None."""
        return self.failure

    cdef read_config(self):
        data = self.backend.get_config(CONFIG_SIZE)
        cdef const char *bytes_read = data
        with nogil:
            pthread_mutex_lock(&self.lock)
            memcpy(self.config, bytes_read, CONFIG_SIZE)
            (<virtio_blk_config *> self.config).num_queues = 1
            self.config_changed()
            pthread_mutex_unlock(&self.lock)

    def update(self):
        """Ask the back end for its configuration space again, and tell the guest: its disk may have another size.

        ConfigError when the back end does not answer; the guest is told nothing then.
        """
        cdef uint64_t begin = now_ns()
        try:
            self.read_config()
        except CrackleError:
            self.cfg_fails += 1
            raise
        self.config_change_time_us = (now_ns() - begin) // 1000

    def counters(self):
        """This device's metrics, under Firecracker's names."""
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "init_time_us": self.init_time_us,
            "activate_time_us": self.activate_time_us,
            "config_change_time_us": self.config_change_time_us,
        }

    # -- saved state ---------------------------------------------------------------------------------------------

    def save_own(self):
        """The configuration space. The machine is paused: StateError when the back end has not finished."""
        cdef Virtqueue queue = <Virtqueue> self.table[0]
        if self.started and (not self.settled(queue) or queue.next_used != load_idx(&queue.used[RING_IDX], __ATOMIC_ACQUIRE)):
            raise StateError(f"the vhost-user back end at {self.backend.path} has not done what the guest asked for")
        return VhostUserBlockState(config=(<const char *> self.config)[:CONFIG_SIZE])

    def restore_own(self, state):
        """The reverse of `save_own`: the back end, which need not be the same process, goes on with the ring.

        Guest memory must be shared again. ConfigError when the back end does not take the ring. The driver is told when
        the configuration space has changed meanwhile.
        """
        cdef bint taken = True
        if self.running():
            with nogil:
                pthread_mutex_lock(&self.lock)
                taken = self.on_activate()
                pthread_mutex_unlock(&self.lock)
            if not taken:
                raise ConfigError(self.failure)
            # One that was on its way has left no trace.
            self.signal_queue(0)
        if state.config != (<const char *> self.config)[:CONFIG_SIZE]:
            self.config_changed()

    cdef bint settled(self, Virtqueue queue) noexcept nogil:
        """Whether the back end has used every chain that the driver made available."""
        return load_idx(&queue.used[RING_IDX], __ATOMIC_ACQUIRE) == load_idx(&queue.avail[RING_IDX], __ATOMIC_ACQUIRE)

    cdef bint settle(self, Virtqueue queue, uint64_t patience_ns) noexcept nogil:
        """Wait for the back end to finish what was submitted, for so long at most; whether it has."""
        cdef uint64_t end = now_ns() + patience_ns
        cdef timespec pause
        pause.tv_sec, pause.tv_nsec = 0, POLL_NS
        while not self.settled(queue):
            if self.lost or now_ns() > end:
                return False
            nanosleep(&pause, NULL)
        return True

    cdef bint on_drain(self, uint64_t until) noexcept nogil:
        # The guest stands still, so the ring has nothing in flight once all of it is used; the back end may keep it.
        cdef uint64_t now = now_ns()
        cdef uint64_t patience = min(<uint64_t> PAUSE_PATIENCE_NS, until - now if until > now else 0)
        if self.started and self.settle(<Virtqueue> self.table[0], patience):
            self.catch_up(<Virtqueue> self.table[0])
        # A pause is not up to the guest, who may have asked for what no back end can do: who saves is told, by `save_own`.
        return True

    cdef void catch_up(self, Virtqueue queue) noexcept nogil:
        queue.next_avail = queue.cached_avail = queue.next_used = load_idx(&queue.used[RING_IDX], __ATOMIC_ACQUIRE)

    # -- on a vCPU thread, with the lock held --------------------------------------------------------------------
    #
    # Here the lock's holder waits for the GIL, and for the back end. That is no deadlock, because nobody waits for a
    # device's lock with the GIL in hand; and no delay for others, because the I/O thread has no queue of this device.

    cdef bint on_activate(self) noexcept nogil:
        with gil:
            return self.start_backend()

    cdef void on_reset(self) noexcept nogil:
        if self.started:
            # A back end may take badly to being stopped with requests in flight.
            self.settle(<Virtqueue> self.table[0], RESET_PATIENCE_NS)
            with gil:
                self.stop_backend()

    cdef bint start_backend(self) noexcept:
        cdef Virtqueue queue = <Virtqueue> self.table[0]
        cdef uint64_t begin = now_ns()
        if not queue.ready:
            # A driver that uses no queue needs no back end.
            return True
        try:
            ring = Ring(
                size=queue.size,
                desc=<uint64_t> queue.desc,
                avail=<uint64_t> queue.avail,
                used=<uint64_t> queue.used,
                base=queue.next_avail,
                kick=self.sources[0].fd,
                call=self.call_fd(0),
            )
            self.backend.start(self.driver_features, self.memory.regions, (ring,))
        except BaseException as error:
            self.failure = str(error)
            return False
        self.started = True
        self.activate_time_us = (now_ns() - begin) // 1000
        return True

    cdef void stop_backend(self) noexcept:
        self.started = False
        try:
            self.backend.stop(1)
        except BaseException as error:
            self.failure = str(error)

    # -- guest memory that comes and goes ------------------------------------------------------------------------

    def region_added(self, Region region not None):
        """Let the back end have it too. ConfigError when it cannot."""
        cdef bint told
        self.backend.check_memory(self.memory.regions)
        with nogil:
            pthread_mutex_lock(&self.lock)
            told = self.share_memory()
            pthread_mutex_unlock(&self.lock)
        if not told:
            raise ConfigError(self.failure)

    cdef void let_go(self, uint64_t gpa, uint64_t size) noexcept nogil:
        if self.started:
            self.settle(<Virtqueue> self.table[0], RESET_PATIENCE_NS)
        if not (<Virtqueue> self.table[0]).let_go(gpa, size):
            self.share_memory()
            return
        if self.started:
            with gil:
                self.stop_backend()
        if self.running():
            self.need_reset()

    cdef bint share_memory(self) noexcept nogil:
        """Tell the back end, if it has the ring, what guest memory is now; whether it knows. Otherwise it is of no use."""
        cdef bint told = True
        if self.started:
            with gil:
                told = self.send_memory()
            if not told and self.running():
                self.need_reset()
        return told

    cdef bint send_memory(self) noexcept:
        try:
            self.backend.set_memory(self.memory.regions)
        except BaseException as error:
            self.failure = str(error)
            return False
        return True

    # -- on the I/O thread ---------------------------------------------------------------------------------------

    cdef void lose_backend(self) noexcept nogil:
        # First, so that who waits for the back end with the lock held gives up.
        self.lost = True
        pthread_mutex_lock(&self.lock)
        if self.running():
            self.need_reset()
        pthread_mutex_unlock(&self.lock)


cdef void hung_up(void *context, uint32_t events) noexcept nogil:
    (<VhostUserBlock> context).lose_backend()
