"""virtio-block (virtio 1.2, section 5.2): a disk backed by a file or a block device.

One queue. The I/O thread takes chains out of it, has them checked (`request`), and submits them to an engine (`engine`,
`uring`), which moves the data straight between the file and guest memory. Here are the turns of the queue, the device's
configuration, its backing file, whose descriptor it owns, and what it saves and counts.

A request that is only begun, when the machine is paused, the file changed, or guest memory taken away, is state of the
queue: its chain is kept there and begun anew afterwards. Reading and writing twice does no harm: until it is answered the
driver may expect nothing of either.
"""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset, strerror
from posix.unistd cimport close, getpid

from crackle.runtime.iothread cimport IoThread
from crackle.includes.block cimport *
from crackle.includes.events cimport EPOLLET, EPOLLIN
from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.block.engine cimport REQUEST_DONE, REQUEST_IN_FLIGHT, REQUEST_WAITS, Engine
from crackle.virtio.block.layers cimport BLOCK, Layers, stack, sync
from crackle.virtio.block.request cimport (
    DO_ALLOCATE, DO_NOTHING, DO_READ, DO_WRITE, MAX_TRANSFER, QUEUE_SIZE, SECTOR_SHIFT, SEG_MAX, charge, disk, parse, request
)
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.latency cimport latency, note_latency
from crackle.virtio.lookout cimport begin_turn, in_vain, lookout
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_CHAIN, QUEUE_EMPTY, Virtqueue, chain

import os

import msgspec

from crackle.errors import ConfigError
from crackle.virtio.block.backing import open_backing
from crackle.ratelimit.state import LimiterState


cdef enum:
    MAX_BATCH = 4 * QUEUE_SIZE

# What `take_all` left off for, beside what `pop` says.
cdef enum:
    QUEUE_HELD = 2      # the limiter or the engine takes no more: one of them says when it does
    QUEUE_TIRED = 3     # enough for one turn

cdef uint64_t ALLOCATE_FEATURES = <uint64_t> 1 << VIRTIO_BLK_F_DISCARD | <uint64_t> 1 << VIRTIO_BLK_F_WRITE_ZEROES
# How long a change of the file waits for what is in flight.
cdef uint64_t UPDATE_PATIENCE_NS = 2_000_000_000


class BlockState(msgspec.Struct, frozen=True, kw_only=True, tag="block"):
    """What a disk adds to its DeviceState. overlay: the id of the contents of its overlay, if it has one."""

    limiter: LimiterState
    overlay: str | None = None


cdef class Block(VirtioDevice):
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

    own_state = BlockState

    cdef readonly str path
    cdef int fd
    cdef Layers layers          # None for a file alone
    cdef disk disk
    cdef chain chain
    cdef Engine engine
    cdef request *current       # the one that is begun, with its chain in `chain`
    cdef readonly RateLimiter limiter
    cdef uint64_t begun         # when this turn began, ns
    cdef lookout looking
    cdef uint64_t clock         # when the thread last looked at it, ns
    cdef uint32_t taken         # chains taken in this turn,
    cdef uint32_t answered      # and answered
    cdef bint held              # there may be chains in the queue that no notification will tell of
    cdef readonly uint64_t read_bytes, write_bytes
    cdef readonly uint64_t execute_fails, invalid_requests, empty_events, updates, update_fails
    cdef readonly uint64_t throttled_events, engine_throttled_events, remaining_requests
    cdef latency reads, writes

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
        self.disk.read_only, self.disk.writeback = read_only, writeback
        if read_only:
            features |= <uint64_t> 1 << VIRTIO_BLK_F_RO
        if writeback:
            features |= <uint64_t> 1 << VIRTIO_BLK_F_FLUSH
        self.set_up(VIRTIO_ID_BLOCK, features, (QUEUE_SIZE,))
        self.limiter = RateLimiter(limiter)
        self.add_limiter(self.limiter, 0)
        self.engine = new_engine(engine, memory)
        self.config_size = sizeof(virtio_blk_config)
        if self.use(path, backing).written.discards:
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
        if self.layers is not None:
            if self.pid == getpid() and self.disk.writeback and not self.disk.read_only:
                # What has not been flushed is as good as on a plain disk, if nothing happens to the host.
                self.layers.settle()
            self.layers.close()
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def attach(self, IoThread io not None):
        """Serve the queue and the engine on `io`."""
        VirtioDevice.attach(self, io)
        if self.engine.event_fd >= 0:
            self.watch(self.engine.event_fd, EPOLLIN | EPOLLET, engine_ready, <void *> self)

    # -- turns: on the I/O thread, or while it rests, with the lock held -------------------------------------------

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        if self.limiter.blocked:
            self.throttled_events += 1
        self.serve(queue)
        if self.answered == 0 and self.taken == 0:
            self.empty_events += 1

    cdef void engine_event(self) noexcept nogil:
        """Something in flight is done."""
        pthread_mutex_lock(&self.lock)
        if self.running():
            self.serve(<Virtqueue> self.table[0])
        pthread_mutex_unlock(&self.lock)

    cdef void serve(self, Virtqueue queue) noexcept nogil:
        """One turn: take what is in the queue, answer what is done, until neither gives more."""
        cdef uint32_t told = 0
        cdef int found
        self.begun = self.clock = now_ns()
        begin_turn(&self.looking, self.begun, self.io.spin_ns)
        self.taken = self.answered = 0
        self.held = False
        if not queue.ready:
            return
        self.engine.announce(False)
        while True:
            self.reap(queue)
            found = self.take_all(queue)
            if self.engine.kick():
                self.reap(queue)
            if found == QUEUE_BROKEN:
                self.need_reset()
                break
            if found == QUEUE_TIRED or self.clock - self.begun >= TURN_NS:
                self.notify_again(0)
                break
            if found == QUEUE_HELD and self.goes_on():
                continue
            if self.answered != told:
                told = self.answered
                if queue.wants_interrupt():
                    self.signal_queue(0)
                if self.look_out(queue, found == QUEUE_EMPTY):
                    continue
            self.held = found == QUEUE_HELD
            if (self.held or queue.rearm()) and not self.engine.announce(True):
                return
            self.clock = now_ns()
        self.engine.announce(True)
        if self.answered != told and queue.wants_interrupt():
            self.signal_queue(0)

    cdef bint goes_on(self) noexcept nogil:
        """Whether what held the queue does so no more."""
        if self.current != NULL:
            return self.engine.writing == 0
        return not self.limiter.blocked and self.engine.take() != NULL

    cdef bint look_out(self, Virtqueue queue, bint for_more) noexcept nogil:
        """A driver that waits for its answer asks again at once: look out for it, and for what is in flight. Until rearm()
        it need not send a notification.
        """
        cdef uint64_t now = now_ns(), until = now + self.looking.patience_ns
        while now < until:
            if (for_more and queue.has_more()) or self.engine.ready():
                return True
            if self.engine.writing:
                # By a thread of the kernel, as most file systems have it, which each completion would take the CPU
                # from if this one slept: let it do several.
                sched_yield()
            now = now_ns()
        in_vain(&self.looking, now, until)
        return False

    cdef int take_all(self, Virtqueue queue) noexcept nogil:
        """Submit what is in the queue; what pop() found at last, QUEUE_HELD or QUEUE_TIRED."""
        cdef request *r
        cdef int found, state
        while self.taken < MAX_BATCH:
            r = self.current
            if r == NULL:
                found = self.take_one(queue)
                if found != QUEUE_CHAIN:
                    return found
                r = self.current
            state = REQUEST_DONE if r.what == DO_NOTHING else self.engine.submit(r)
            if state == REQUEST_IN_FLIGHT:
                self.current = NULL
                continue
            if state == REQUEST_WAITS:
                return QUEUE_HELD
            self.clock = now_ns()
            if state == REQUEST_DONE:
                self.current = NULL
                self.finish(r, queue)
                queue.publish()
            if self.clock - self.begun >= TURN_NS:
                break
        return QUEUE_TIRED

    cdef int take_one(self, Virtqueue queue) noexcept nogil:
        """Make the next chain the current request; what pop() found, or QUEUE_HELD."""
        cdef request *r
        cdef bint again = queue.in_hand < queue.kept_count
        cdef int found
        if self.limiter.blocked:
            return QUEUE_HELD
        r = self.engine.take()
        if r == NULL:
            self.engine_throttled_events += 1
            return QUEUE_HELD
        found = queue.pop_to_keep(&self.chain) if again else queue.pop(&self.chain)
        if found != QUEUE_CHAIN:
            return found
        self.disk.features = self.driver_features
        parse(&self.chain, r, &self.disk)
        if not r.invalid and not self.limiter.consume(charge(r), 1):
            if again:
                queue.in_hand -= 1
            else:
                queue.put_back(1)
            self.throttled_events += 1
            return QUEUE_HELD
        if again and queue.in_hand == queue.kept_count:
            # From here on they are like any others.
            queue.in_hand = queue.kept_count = 0
        self.taken += 1
        self.remaining_requests += <uint16_t> (queue.cached_avail - queue.next_avail)
        r.started = self.clock
        self.current = r
        return QUEUE_CHAIN

    cdef void reap(self, Virtqueue queue) noexcept nogil:
        """Answer what is done of what was in flight; what is only begun is put back."""
        cdef request *r = self.engine.completed()
        if r == NULL:
            return
        self.clock = now_ns()
        while r != NULL:
            if r.unfinished:
                self.keep(r, queue)
            else:
                self.finish(r, queue)
            self.engine.release(r)
            r = self.engine.completed()
        queue.publish()

    cdef void keep(self, request *r, Virtqueue queue) noexcept nogil:
        """Let the queue have the chain of a request that is to be begun anew."""
        self.limiter.refund(charge(r), 1)
        # Those that were not even begun again come after those that were in flight.
        if queue.in_hand < queue.kept_count:
            memmove(
                &queue.kept[queue.in_hand + 1], &queue.kept[queue.in_hand],
                (queue.kept_count - queue.in_hand) * sizeof(queue.kept[0]),
            )
        queue.kept[queue.in_hand] = r.head
        queue.in_hand += 1
        queue.kept_count += 1

    cdef bint on_drain(self, uint64_t until) noexcept nogil:
        return self.wind_down(<Virtqueue> self.table[0], until)

    cdef bint wind_down(self, Virtqueue queue, uint64_t until) noexcept nogil:
        """Wait until nothing is in flight, and put back what is only begun; False when `until` came first."""
        cdef uint32_t before = self.answered
        cdef bint live = self.running() and queue.ready
        cdef int waited
        self.engine.winding_down = True
        if live:
            # Of chains that were kept before, those that have been begun anew since are to be kept as the others.
            queue.kept_count -= queue.in_hand
            memmove(queue.kept, &queue.kept[queue.in_hand], queue.kept_count * sizeof(queue.kept[0]))
            queue.in_hand = 0
        while True:
            waited = self.engine.wait(until)
            if waited < 0:
                break
            if live:
                self.reap(queue)
            else:
                # The rings are no longer ours.
                self.forget_done()
            if waited == 0:
                break
        self.engine.winding_down = False
        if self.current != NULL:
            if live:
                self.keep(self.current, queue)
            self.engine.release(self.current)
            self.current = NULL
        if live:
            # All of them, in their order, before any other.
            queue.in_hand = 0
            if self.answered != before and queue.wants_interrupt():
                self.signal_queue(0)
            if queue.kept_count or self.held and not self.limiter.blocked:
                # No notification will tell of them.
                self.notify_again(0)
        return waited == 0

    cdef void forget_done(self) noexcept nogil:
        cdef request *r = self.engine.completed()
        while r != NULL:
            self.engine.release(r)
            r = self.engine.completed()

    cdef void on_reset(self) noexcept nogil:
        # Guest memory is the driver's again when the reset is done (2.4.1).
        self.status = 0
        self.wind_down(<Virtqueue> self.table[0], UINT64_MAX)
        self.held = False

    cdef void finish(self, request *r, Virtqueue queue) noexcept nogil:
        """Answer a request; `publish` shows it to the driver."""
        cdef uint32_t written = 0
        cdef uint64_t us = (self.clock - r.started) // 1000
        cdef int i
        if r.error:
            r.answer = VIRTIO_BLK_S_IOERR
            if r.error == EOPNOTSUPP and r.what == DO_ALLOCATE:
                r.answer = VIRTIO_BLK_S_UNSUPP
        self.execute_fails += r.answer == VIRTIO_BLK_S_IOERR
        self.invalid_requests += r.invalid or r.answer == VIRTIO_BLK_S_UNSUPP
        if r.status != NULL:
            written = 1
            if r.answer == VIRTIO_BLK_S_OK:
                if r.counted != NULL:
                    r.counted[0] += 1
                if r.what == DO_READ:
                    self.read_bytes += r.length
                    note_latency(&self.reads, us)
                elif r.what == DO_WRITE:
                    self.write_bytes += r.length
                    note_latency(&self.writes, us)
                if r.what == DO_READ or r.what == DO_NOTHING:
                    written += <uint32_t> r.length
            if r.what == DO_NOTHING:
                for i in range(r.count):
                    self.engine.mark_written(r.iov[i].iov_base, r.iov[i].iov_len)
            r.status[0] = r.answer
            self.engine.mark_written(r.status, 1)
        queue.push(r.head, written)
        self.answered += 1

    # -- the backing file ----------------------------------------------------------------------------------------

    cdef use(self, str path, opened):
        """Put `path` behind the disk; once the disk is the guest's, tell it. The Backing, whose descriptor is taken."""
        cdef int fd, old = self.fd
        cdef Layers layers = None
        cdef virtio_blk_config config
        cdef char identity[VIRTIO_BLK_ID_BYTES]
        backing = open_backing(path, self.disk.read_only) if opened is None else opened.duplicate()
        fd = backing.fd
        memset(identity, 0, VIRTIO_BLK_ID_BYTES)
        memcpy(identity, <const char *> backing.identity, len(backing.identity))
        memset(&config, 0, sizeof(config))
        config.capacity = backing.size >> SECTOR_SHIFT
        config.seg_max = SEG_MAX
        # 5.2.4: in sectors; one range a request.
        config.max_discard_sectors = config.max_write_zeroes_sectors = MAX_TRANSFER >> SECTOR_SHIFT
        config.max_discard_seg = config.max_write_zeroes_seg = config.write_zeroes_may_unmap = 1
        config.discard_sector_alignment = max(backing.written.granularity >> SECTOR_SHIFT, 1)
        if backing.layers:
            config.discard_sector_alignment = max(config.discard_sector_alignment, BLOCK >> SECTOR_SHIFT)
        try:
            if backing.layers:
                layers = Layers(backing, writable=not self.disk.read_only, ordered=self.disk.writeback)
            self.exchange(fd, layers, &config, identity)
        except BaseException:
            if layers is not None:
                layers.close()
            backing.close()
            raise
        if self.layers is not None:
            self.layers.close()
        self.layers, self.path = layers, path
        if old >= 0 and layers is not None:
            layers.confirm(backing)
        if old >= 0:
            close(old)
        return backing

    cdef int exchange(self, int fd, Layers layers, virtio_blk_config *config, const char *identity) except -1:
        cdef uint64_t until = now_ns() + UPDATE_PATIENCE_NS
        cdef stack *before = NULL if self.layers is None else &self.layers.own
        cdef stack *wanted = NULL if layers is None else &layers.own
        cdef bint first = self.fd < 0
        cdef int error = 0
        cdef bint done
        with nogil:
            pthread_mutex_lock(&self.lock)
            done = self.on_drain(until)
            if done and wanted != NULL and not first and self.disk.writeback:
                # A flush will be for the new layer alone, which finds in the files below all that this process knows.
                error = sync(before) if before != NULL else -fdatasync(self.fd)
            if done and not error:
                error = self.engine.use(fd, wanted)
            if done and not error:
                memcpy(self.disk.serial, identity, VIRTIO_BLK_ID_BYTES)
                memcpy(self.config, config, sizeof(virtio_blk_config))
                self.disk.sectors, self.fd = config.capacity, fd
                if not first:
                    self.config_changed()
            pthread_mutex_unlock(&self.lock)
        if not done:
            raise ConfigError(f"what is in flight to {self.path} is not done within {UPDATE_PATIENCE_NS // 1_000_000_000} s")
        if error:
            raise ConfigError(f"io_uring does not take the new file: {strerror(error).decode()}")
        return 0

    def update(self, str path, backing=None):
        """Put another file behind the disk while the guest runs, and tell the guest. ConfigError leaves the old one.

        What is in flight goes to the old file, and is waited for; what is only begun begins anew on the new one.
        """
        try:
            self.use(path, backing)
        except ConfigError:
            self.update_fails += 1
            raise
        self.updates += 1

    def below(self):
        """Where the disk's overlay holds nothing yet, path and id of the overlay under it, None twice for the base.

        None where it holds something, or there is no overlay that could.
        """
        if self.layers is None or self.disk.read_only or self.layers.held_by(0):
            return None
        return self.layers.below()

    @property
    def size(self):
        """Bytes that the guest sees."""
        return self.disk.sectors << SECTOR_SHIFT

    @property
    def read_only(self):
        """Whether the guest cannot write."""
        return self.disk.read_only

    @property
    def writeback(self):
        """Whether the guest has its writes made stable by FLUSH."""
        return self.disk.writeback

    def counters(self):
        """Firecracker's `block` metrics; read_agg and write_agg are microseconds that requests took."""
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "no_avail_buffer": self.empty_events,
            "event_fails": self.broken_queues,
            "execute_fails": self.execute_fails,
            "invalid_reqs_count": self.invalid_requests,
            "flush_count": self.disk.counts.flushes,
            "discard_count": self.disk.counts.discards,
            "write_zeroes_count": self.disk.counts.write_zeroes,
            "queue_event_count": self.queue_events,
            "rate_limiter_event_count": self.limiter.events,
            "rate_limiter_throttled_events": self.throttled_events,
            "io_engine_throttled_events": self.engine_throttled_events,
            "remaining_reqs_count": self.remaining_requests,
            "update_count": self.updates,
            "update_fails": self.update_fails,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "read_count": self.disk.counts.reads,
            "write_count": self.disk.counts.writes,
            "read_agg": self.reads,
            "write_agg": self.writes,
        }

    # -- saved state ---------------------------------------------------------------------------------------------

    def make_durable(self):
        """Have on the disk what the guest has been told is written. OSError or ConfigError when that cannot be."""
        if self.disk.read_only:
            return
        if self.layers is not None:
            self.layers.sync()
        elif self.fd >= 0:
            os.fdatasync(self.fd)

    def copy_overlay(self, str path):
        """A copy of the overlay, as it is now, in a new file. The machine is paused. ConfigError without one."""
        from crackle.disk.chain import copy_layer

        copy_layer(self.layers.parts[0], path)

    def save_own(self):
        """BlockState."""
        overlay = None if self.layers is None else self.layers.told()
        return BlockState(limiter=self.limiter.save(), overlay=overlay)

    def restore_own(self, state):
        """The reverse of `save_own`; ValueError when the state is no disk's, or the overlay's contents are not its."""
        if self.layers is None and state.overlay is not None or not (self.layers is None or self.layers.shows(state.overlay)):
            raise ValueError(
                f"the overlay over {self.path} has been written to since the snapshot was taken, or is another one: "
                "give the drive an overlay of its own, one that is not there yet, and keep the one that was saved"
            )
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
