"""virtio-block's Async engine: io_uring(7) through liburing.

A module of its own, so that only a process with such a drive loads liburing. What a guest has submitted goes to the kernel
in one io_uring_enter; what the page cache holds is done when that returns, the rest is announced by an eventfd. The ring is
restricted to the operations below on the registered files, which are the disk's.

Owns the ring, its requests and the eventfd. Guest memory must outlive what is in flight: `shut_down` waits for it.
"""

from libc.errno cimport EINTR
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strerror
from posix.unistd cimport close, getpid, read

from crackle.includes.events cimport POLLIN, poll, pollfd
from crackle.includes.io cimport iovec
from crackle.includes.uring cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.runtime.threads cimport now_ns
from crackle.virtio.block.engine cimport REQUEST_DONE, REQUEST_IN_FLIGHT, REQUEST_WAITS, Engine
from crackle.virtio.block.layers cimport MAX_FILES, MUST_WAIT, end_flush, stack, stage, write_staged
from crackle.virtio.block.request cimport DO_FLUSH, DO_READ, DO_WRITE, request
from crackle.virtio.device cimport new_eventfd
from crackle.virtio.queue cimport CHAIN_IOV, MAX_QUEUE_SIZE

from crackle.errors import ConfigError


cdef extern from * nogil:
    void full_barrier "__sync_synchronize" ()

cdef enum:
    # Requests in flight at most, as many as the queue has entries: its ring cannot overflow.
    DEPTH = MAX_QUEUE_SIZE
    # Bytes in flight, with the last to be taken on top: a pause waits for them.
    MAX_BYTES = 16 << 20

cdef int[6] OPERATIONS = [
    IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE
]


cdef restrict(io_uring *ring):
    """Whatever happens to this process, the ring does nothing else and on no other files."""
    cdef io_uring_restriction rules[8]
    cdef int i
    memset(rules, 0, sizeof(rules))
    for i in range(6):
        rules[i].opcode, rules[i].sqe_op = IORING_RESTRICTION_SQE_OP, OPERATIONS[i]
    rules[6].opcode, rules[6].sqe_flags = IORING_RESTRICTION_SQE_FLAGS_REQUIRED, IOSQE_FIXED_FILE
    rules[7].opcode, rules[7].register_op = IORING_RESTRICTION_REGISTER_OP, IORING_REGISTER_FILES_UPDATE
    check(io_uring_register(ring.ring_fd, IORING_REGISTER_RESTRICTIONS, rules, 8))


cdef check(int result):
    if result < 0:
        raise ConfigError(
            f"The Async io_engine needs io_uring of Linux 5.10.51 or newer, and this host does not let it be used: "
            f"{strerror(-result).decode()}. See sysctl kernel.io_uring_disabled, or use the Sync io_engine."
        )


def check_host():
    """ConfigError when the host has no io_uring for this process."""
    cdef io_uring ring
    cdef io_uring_params params
    memset(&params, 0, sizeof(params))
    check(io_uring_queue_init_params(1, &ring, &params))
    io_uring_queue_exit(&ring)


cdef class AsyncEngine(Engine):
    """ConfigError when the host has no io_uring for this process."""

    cdef io_uring ring
    cdef bint made              # there is a ring
    cdef int pid                # of the process whose it is
    cdef request *requests      # DEPTH of them,
    cdef iovec *tables          # with room for as many buffers each,
    cdef request **idle         # and those that are not in flight, the one used last on top
    cdef uint32_t idle_count
    cdef uint32_t queued        # in the ring's memory, not handed over yet
    cdef uint32_t in_flight     # handed over, or queued, or held
    cdef uint64_t bytes         # of the pieces of those
    cdef uint64_t number        # of writes so far
    cdef request *held[DEPTH]   # flushes that wait for writes submitted before them
    cdef uint32_t held_count

    def __init__(self, GuestMemory memory):
        cdef io_uring_params params
        cdef int nothing[MAX_FILES]
        cdef int i
        if self.made:
            raise ValueError("this engine is set up already")
        self.pid = getpid()
        memset(&params, 0, sizeof(params))
        # The I/O thread comes by anyway: no interrupt to have it run what completes (Linux 5.19).
        params.flags = IORING_SETUP_R_DISABLED | IORING_SETUP_COOP_TASKRUN
        result = io_uring_queue_init_params(DEPTH, &self.ring, &params)
        if result < 0:
            memset(&params, 0, sizeof(params))
            params.flags = IORING_SETUP_R_DISABLED
            check(io_uring_queue_init_params(DEPTH, &self.ring, &params))
        self.made = True
        self.event_fd = new_eventfd()
        memset(nothing, 0xFF, sizeof(nothing))
        check(io_uring_register_files(&self.ring, nothing, MAX_FILES))
        check(io_uring_register_eventfd(&self.ring, self.event_fd))
        restrict(&self.ring)
        check(io_uring_register(self.ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0))
        io_uring_cq_eventfd_toggle(&self.ring, False)
        # Pages that are never touched cost nothing, and the request that was given back last is the next to be taken.
        self.requests = <request *> calloc(DEPTH, sizeof(request))
        self.tables = <iovec *> calloc(DEPTH * CHAIN_IOV, sizeof(iovec))
        self.idle = <request **> calloc(DEPTH, sizeof(request *))
        if self.requests == NULL or self.tables == NULL or self.idle == NULL:
            raise MemoryError
        for i in range(DEPTH):
            self.idle[i] = &self.requests[DEPTH - 1 - i]
        self.idle_count = DEPTH

    def __dealloc__(self):
        self.shut_down()
        free(self.requests)
        free(self.tables)
        free(self.idle)

    cdef void shut_down(self) noexcept nogil:
        if not self.made:
            return
        # A forked child shares the ring, and what is in flight there is not its own.
        self.winding_down = True
        while self.pid == getpid() and self.wait(UINT64_MAX) > 0:
            while self.completed() != NULL:
                pass
        io_uring_queue_exit(&self.ring)
        self.made = False
        if self.event_fd >= 0:
            close(self.event_fd)
            self.event_fd = -1

    cdef int use(self, int fd, stack *layers) noexcept nogil:
        cdef int before[MAX_FILES]
        cdef int result, i, used = 1
        cdef stack *old = self.layers
        memcpy(before, self.fds, sizeof(before))
        Engine.use(self, fd, layers)
        if layers != NULL:
            used = layers.count
        for i in range(used, MAX_FILES):
            self.fds[i] = -1
        result = io_uring_register_files_update(&self.ring, 0, self.fds, MAX_FILES)
        if result >= 0:
            return 0
        self.layers = old
        memcpy(self.fds, before, sizeof(before))
        if self.fds[0] >= 0:
            # The kernel has let go of the old files before it looked at the new ones.
            io_uring_register_files_update(&self.ring, 0, self.fds, MAX_FILES)
        return -result

    cdef request *take(self) noexcept nogil:
        return self.idle[self.idle_count - 1] if self.idle_count and self.bytes < MAX_BYTES else NULL

    cdef void release(self, request *r) noexcept nogil:
        r.waiting = False
        self.idle[self.idle_count] = r
        self.idle_count += 1

    # -- to the kernel -------------------------------------------------------------------------------------------

    cdef int submit(self, request *r) noexcept nogil:
        cdef iovec *table
        cdef int result
        r.claim = 0
        if self.layers != NULL:
            result = self.prepare_layers(r)
            if result == MUST_WAIT:
                if not r.waiting:
                    self.idle_count -= 1
                    r.waiting = True
                return REQUEST_WAITS
            if result:
                if r.waiting:
                    self.release(r)
                return REQUEST_DONE
            self.layers.claimed += r.claim
        if not r.waiting:
            self.idle_count -= 1
        r.waiting = False
        # The chain that it came in is used for the next.
        if r.count == 1:
            r.one = r.iov[0]
            r.iov = &r.one
        elif r.count:
            table = &self.tables[(r - self.requests) * CHAIN_IOV]
            memcpy(table, r.iov, r.count * sizeof(iovec))
            r.iov = table
        self.in_flight += 1
        r.number = self.number
        if r.what == DO_FLUSH:
            # What was written before must be on the disk when it is answered; what comes after does not wait for it, as
            # it would with IOSQE_IO_DRAIN.
            r.waits_for, r.twice = self.writing, False
            if r.waits_for or self.layers != NULL and self.layers.flushing:
                self.held[self.held_count] = r
                self.held_count += 1
                return REQUEST_IN_FLIGHT
        elif r.what != DO_READ:
            self.number += 1
            self.writing += 1
        self.put(r)
        return REQUEST_IN_FLIGHT

    cdef void put(self, request *r) noexcept nogil:
        # Never NULL: the ring has an entry for each request.
        cdef io_uring_sqe *sqe = io_uring_get_sqe(&self.ring)
        self.cut_piece(r)
        if r.what == DO_FLUSH and self.layers != NULL and not self.layers.flushing:
            # If there is no memory for it the map stays as it is, and `flush_layers` says so.
            r.error = stage(self.layers)
        if r.what == DO_READ or r.what == DO_WRITE:
            self.bytes += r.piece
        if r.what == DO_READ:
            if r.piece_count == 1:
                io_uring_prep_read(sqe, r.file, r.iov.iov_base, r.iov.iov_len, r.at)
            else:
                io_uring_prep_readv(sqe, r.file, r.iov, r.piece_count, r.at)
        elif r.what == DO_WRITE:
            if r.piece_count == 1:
                io_uring_prep_write(sqe, r.file, r.iov.iov_base, r.iov.iov_len, r.at)
            else:
                io_uring_prep_writev(sqe, r.file, r.iov, r.piece_count, r.at)
        elif r.what == DO_FLUSH:
            io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC)
        else:
            io_uring_prep_fallocate(sqe, 0, r.mode, r.at, r.piece)
        io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE)
        sqe.user_data = <uint64_t> r
        self.queued += 1

    cdef bint kick(self) noexcept nogil:
        cdef int taken
        if self.queued == 0:
            return False
        taken = io_uring_submit(&self.ring)
        if taken > 0:
            self.queued -= <uint32_t> taken
        return True

    cdef int wait(self, uint64_t until) noexcept nogil:
        cdef pollfd waiting
        cdef uint64_t ticks, now
        cdef int result = 1
        # Those that are held wait for one that is in flight, or for one that will never be again.
        if self.in_flight == self.held_count:
            return 0
        waiting.fd, waiting.events = self.event_fd, POLLIN
        while True:
            # The eventfd is for the I/O thread too, which asks the ring whatever it is woken for.
            read(self.event_fd, &ticks, sizeof(ticks))
            self.kick()
            self.announce(True)
            if self.ready():
                break
            now = now_ns()
            if now >= until:
                result = -1
                break
            poll(&waiting, 1, <int> min((until - now) // 1_000_000 + 1, <uint64_t> 1000))
        self.announce(False)
        return result

    # -- and back ------------------------------------------------------------------------------------------------

    cdef request *completed(self) noexcept nogil:
        cdef io_uring_cqe *cqe
        cdef request *r
        cdef ssize_t result
        while True:
            cqe = next_completion(&self.ring)
            if cqe == NULL:
                break
            r, result = <request *> cqe.user_data, cqe.res
            io_uring_cq_advance(&self.ring, 1)
            if r.what == DO_READ or r.what == DO_WRITE:
                self.bytes -= r.piece
            if r.what == DO_FLUSH and self.layers != NULL:
                result = self.flush_layers(r, result)
            r.unfinished = not self.advance(r, result)
            # A flush that has come so far is done sooner than one that is begun anew.
            if r.unfinished and (not self.winding_down or r.what == DO_FLUSH and r.twice):
                self.put(r)
                continue
            self.in_flight -= 1
            if self.layers != NULL:
                self.layers.claimed -= r.claim
            if r.what == DO_FLUSH:
                if self.layers != NULL:
                    self.flushed()
            elif r.what != DO_READ:
                self.written(r)
            return r
        if self.winding_down and self.held_count and self.in_flight == self.held_count:
            # The writes before it have not been done.
            self.held_count -= 1
            self.in_flight -= 1
            r = self.held[self.held_count]
            r.unfinished = True
            return r
        return NULL

    cdef void written(self, request *r) noexcept nogil:
        """One write less: let the flushes go that waited for it."""
        cdef uint32_t i, kept = 0
        cdef request *flush
        self.writing -= 1
        for i in range(self.held_count):
            flush = self.held[i]
            # One that has to wait for a write that is not done waits for good.
            if flush.number > r.number and not r.unfinished:
                flush.waits_for -= 1
            if flush.waits_for or self.layers != NULL and self.layers.flushing:
                self.held[kept] = flush
                kept += 1
            else:
                self.put(flush)
        self.held_count = kept

    cdef int flush_layers(self, request *r, int result) noexcept nogil:
        """An fdatasync of a flush gave `result`; what `advance` is to be told: -EINTR for once more, after the map."""
        if result == -EINTR:
            return result
        if r.error:
            result = -r.error
        elif result == 0 and self.layers.staged_count and not r.twice:
            result = -write_staged(self.layers)
            if result == 0:
                r.twice = True
                return -EINTR
        end_flush(self.layers, result == 0)
        return result

    cdef void flushed(self) noexcept nogil:
        """One flush less: let the next go, one at a time."""
        cdef uint32_t i
        cdef request *flush
        if self.layers.flushing:
            # It is given back unfinished: what it would have written is still to be.
            end_flush(self.layers, False)
        if self.winding_down:
            return
        for i in range(self.held_count):
            flush = self.held[i]
            if flush.waits_for == 0:
                self.held_count -= 1
                self.held[i] = self.held[self.held_count]
                self.put(flush)
                return

    cdef bint ready(self) noexcept nogil:
        return io_uring_cq_ready(&self.ring) != 0

    cdef bint announce(self, bint on) noexcept nogil:
        io_uring_cq_eventfd_toggle(&self.ring, on)
        if on:
            full_barrier()
        return self.queued != 0 or self.ready()
