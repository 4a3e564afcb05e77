"""virtio-block (virtio 1.2, section 5.2): a disk backed by a file or a block device.

One queue. The I/O thread takes chains out of it, checks them (`queue`), and submits them as requests to an engine
(`engine`, `uring`), which moves the data straight between the file and guest memory. Here are the device's
configuration, its backing file, whose descriptor it owns, and what it saves and counts.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close, getpid

from crackle.runtime.iothread cimport IoThread
from crackle.includes.block cimport *
from crackle.includes.events cimport EPOLLET, EPOLLIN
from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.block.engine cimport Engine
from crackle.virtio.block.queue cimport MAX_TRANSFER, QUEUE_SIZE, SECTOR_SHIFT, SEG_MAX, BlockQueue
from crackle.virtio.device cimport VirtioDevice

import os

from crackle.errors import ConfigError
from crackle.virtio.block.backing import open_backing
from crackle.virtio.state import BlockState


cdef uint64_t ALLOCATE_FEATURES = <uint64_t> 1 << VIRTIO_BLK_F_DISCARD | <uint64_t> 1 << VIRTIO_BLK_F_WRITE_ZEROES


cdef class Block(BlockQueue):
    """A disk.

    path: backing file or block device; its size in whole 512-byte sectors is the disk's, a remainder is out of reach.
    backing: it, where it is open already; duplicated, so that a start that fails leaves it open.
    read_only: the guest cannot write, and the file is opened for reading only.
    writeback: offer FLUSH and honour it with fdatasync; without it the guest is told that writes are stable when they
    are answered, and they are only as stable as the host's page cache (Firecracker's "Unsafe").
    engine: "Sync", a system call a request, or "Async", io_uring.
    limiter: the schema's, for bytes read and written and for requests of any kind.
    Raises ConfigError when the file or the engine cannot be used.
    """

    cdef readonly str path

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(
        self,
        GuestMemory memory,
        str path,
        *,
        bint read_only=False,
        bint writeback=False,
        str engine="Sync",
        limiter=None,
        backing=None,
    ):
        cdef uint64_t features = <uint64_t> 1 << VIRTIO_BLK_F_SEG_MAX
        self.read_only, self.writeback = read_only, writeback
        if read_only:
            features |= <uint64_t> 1 << VIRTIO_BLK_F_RO
        if writeback:
            features |= <uint64_t> 1 << VIRTIO_BLK_F_FLUSH
        self.set_up(VIRTIO_ID_BLOCK, features, (QUEUE_SIZE,))
        self.limiter = RateLimiter(limiter)
        self.add_limiter(self.limiter, 0)
        self.engine = new_engine(engine, memory)
        self.config_size = sizeof(virtio_blk_config)
        if self.use(path, backing).discards:
            self.device_features |= ALLOCATE_FEATURES

    def __dealloc__(self):
        if self.made and self.fd >= 0:
            close(self.fd)

    def close(self):
        """Wait for what is in flight and give the descriptors back; the I/O thread is stopped. Idempotent."""
        VirtioDevice.close(self)
        if self.engine is not None:
            if self.pid == getpid():
                with nogil:
                    pthread_mutex_lock(&self.lock)
                    self.engine.shut_down()
                    pthread_mutex_unlock(&self.lock)
            else:
                # In a forked child a thread that is not there may have the lock.
                self.engine.shut_down()
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def attach(self, IoThread io not None):
        """Serve the queue and the engine on `io`."""
        VirtioDevice.attach(self, io)
        if self.engine.event_fd >= 0:
            self.watch(self.engine.event_fd, EPOLLIN | EPOLLET, engine_ready, <void *> self)

    # -- the backing file ----------------------------------------------------------------------------------------

    cdef use(self, str path, opened):
        """Put `path` behind the disk; once the disk is the guest's, tell it. The Backing, whose descriptor is taken."""
        cdef int fd, old = self.fd
        cdef virtio_blk_config config
        cdef char identity[VIRTIO_BLK_ID_BYTES]
        backing = open_backing(path, self.read_only) if opened is None else opened.duplicate()
        fd = backing.fd
        memset(identity, 0, VIRTIO_BLK_ID_BYTES)
        memcpy(identity, <const char *> backing.identity, len(backing.identity))
        memset(&config, 0, sizeof(config))
        config.capacity = backing.size >> SECTOR_SHIFT
        config.seg_max = SEG_MAX
        # 5.2.4: in sectors; one range a request.
        config.max_discard_sectors = config.max_write_zeroes_sectors = MAX_TRANSFER >> SECTOR_SHIFT
        config.max_discard_seg = config.max_write_zeroes_seg = config.write_zeroes_may_unmap = 1
        config.discard_sector_alignment = max(backing.granularity >> SECTOR_SHIFT, 1)
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.on_drain()
            memcpy(self.serial, identity, VIRTIO_BLK_ID_BYTES)
            memcpy(self.config, &config, sizeof(config))
            self.sectors, self.fd = config.capacity, fd
            self.engine.use(fd)
            if old >= 0:
                self.config_changed()
            pthread_mutex_unlock(&self.lock)
        self.path = path
        if old >= 0:
            close(old)
        return backing

    def update(self, str path, backing=None):
        """Put another file behind the disk while the guest runs, and tell the guest. ConfigError leaves the old one.

        What is in flight goes to the old file, and is waited for.
        """
        try:
            self.use(path, backing)
        except ConfigError:
            self.update_fails += 1
            raise
        self.updates += 1

    @property
    def size(self):
        """Bytes that the guest sees."""
        return self.sectors << SECTOR_SHIFT

    def counters(self):
        """Firecracker's `block` metrics; read_agg and write_agg are microseconds that requests took."""
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "no_avail_buffer": self.empty_events,
            "event_fails": self.broken_queues,
            "execute_fails": self.execute_fails,
            "invalid_reqs_count": self.invalid_requests,
            "flush_count": self.flush_count,
            "discard_count": self.discard_count,
            "write_zeroes_count": self.write_zeroes_count,
            "queue_event_count": self.queue_events,
            "rate_limiter_event_count": self.limiter.events,
            "rate_limiter_throttled_events": self.throttled_events,
            "io_engine_throttled_events": self.engine_throttled_events,
            "remaining_reqs_count": self.remaining_requests,
            "update_count": self.updates,
            "update_fails": self.update_fails,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "read_count": self.read_count,
            "write_count": self.write_count,
            "read_agg": self.reads,
            "write_agg": self.writes,
        }

    # -- saved state ---------------------------------------------------------------------------------------------

    def save_own(self):
        """BlockState. What the guest has been told is written is on the disk when it is saved."""
        if self.fd >= 0 and not self.read_only:
            os.fdatasync(self.fd)
        return BlockState(limiter=self.limiter.save())

    def restore_own(self, state):
        """The reverse of `save_own`; ValueError when the state is no disk's."""
        if not isinstance(state, BlockState):
            raise ValueError(f"a saved {type(state).__name__} for a disk")
        self.limiter.restore(state.limiter)

    def accept_features(self, features):
        """A restored driver may discard whether or not this host's file system can: it is told so request by request."""
        self.device_features |= features & ALLOCATE_FEATURES


cdef Engine new_engine(str name, GuestMemory memory):
    if name == "Sync":
        return Engine(memory)
    if name == "Async":
        from crackle.virtio.block.uring import AsyncEngine
        return AsyncEngine(memory)
    raise ConfigError(f"there is no io_engine {name!r}; there are Sync and Async")


cdef void engine_ready(void *context, uint32_t events) noexcept nogil:
    (<Block> context).engine_event()
