"""A 16550A UART at COM1: the guest's console (TI PC16550D data sheet, section 8).

Output goes to a descriptor from the vCPU's thread, without the GIL. What its reader does not take at once is kept, in order,
and goes out from the I/O thread when it reads again. Then either output past BACKLOG is dropped and counted, or, with
`waits`, the vCPU that wrote waits until its byte is out; `pause` ends such a wait, and the byte stays here, as state.
What is beyond a limit is dropped as if nobody were connected, whether somebody waits or not, and counted apart.

Input comes from a descriptor through the I/O thread into the receive FIFO; while the FIFO is full the descriptor is not read.
Interrupts are pulses on an irqfd, one when a cause appears, which is what the edge-triggered ISA line 4 wants: a driver reads
until no cause is left.

The lock is never held in a system call that could wait. The descriptors are borrowed (`runtime/stream.py`): their mode,
which other processes may share, is not touched.
"""

from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport itimerspec
from posix.unistd cimport close, read, write

from crackle.runtime.iothread cimport IoThread, event_source
from crackle.runtime.stream cimport stream_put, stream_take
from crackle.includes.events cimport *
from crackle.runtime.threads cimport *
from crackle.kvm.bus cimport BUS_CONTINUE, Bus
from crackle.ratelimit.limiter cimport bucket, configure_bucket, spend

import os

from crackle.devices.state import SerialState
from crackle.errors import ConfigError
from crackle.runtime.stream import borrow


cdef extern from "<linux/serial_reg.h>" nogil:
    enum:
        UART_RX, UART_IER, UART_IIR, UART_LCR, UART_MCR, UART_LSR, UART_MSR, UART_SCR
        UART_IER_RDI, UART_IER_THRI
        UART_IIR_NO_INT, UART_IIR_THRI, UART_IIR_RDI
        UART_FCR_ENABLE_FIFO, UART_FCR_CLEAR_RCVR
        UART_LCR_DLAB
        UART_MCR_DTR, UART_MCR_RTS, UART_MCR_OUT1, UART_MCR_OUT2, UART_MCR_LOOP
        UART_LSR_DR, UART_LSR_THRE, UART_LSR_TEMT
        UART_MSR_CTS, UART_MSR_DSR, UART_MSR_RI, UART_MSR_DCD

cdef enum:
    FIFO = 64               # bytes of input held; a real 16550A has 16, guests only ask whether there is one more
    FIFO_ENABLED = 0xc0     # IIR bits 6 and 7
    IER_MASK = 0x0f
    LCR_8N1 = 0x03
    DIVISOR_9600 = 12
    PORTS = 8
    BACKLOG = 64 << 10      # bytes of output kept for a reader that is behind
    CHUNK = 4096            # bytes written at once
    TURN = 16               # chunks, after which who else wants to gets a turn
    RETRY_NS = 250_000_000  # until a terminal that another process group has is looked at again


cdef class Serial:
    """The UART. in_fd: console input, or -1; out_fd: console output, or -1; irq_fd: an eventfd bound to its line.

    waits: a vCPU waits for the reader of the output rather than that a byte is lost. limit: a schema.TokenBucket of bytes
    of output, or None. Raises ConfigError.
    """

    # The mutex guards everything below; `changed` tells of `sent` and `hurried`. The thread in it is not used.
    cdef thread_sync sync
    cdef int in_fd, out_fd, irq_fd, timer_fd
    cdef int in_how, out_how
    cdef bint waits, hurried
    cdef IoThread io
    cdef event_source *input
    cdef event_source *output
    cdef bint waiting       # for the FIFO to drain before more input is read
    cdef bint filling       # input is being read, without the lock
    cdef uint8_t ier, lcr, mcr, scratch, fifo_control
    cdef uint8_t divisor_low, divisor_high
    cdef bint thr_pending   # the transmitter is empty, and the guest has not read so in IIR
    cdef bint told          # of that by a pulse, and it has looked at neither IIR nor LSR since
    # Loopback may fill what was free when the reading of input began.
    cdef uint8_t fifo[2 * FIFO]
    cdef uint32_t head, used
    cdef uint8_t *kept      # output that is not out yet: `queued` bytes from `first` on, in room for `size`
    cdef size_t size, first, queued
    cdef uint64_t accepted, sent    # bytes that went into `kept`, and that left it, whatever became of them
    cdef bint sending       # output is being written, without the lock
    cdef bint armed         # the I/O thread is told when the output takes more
    cdef bucket limit       # of bytes of output
    cdef readonly uint64_t read_count, write_count, missed_write_count, missed_read_count, flush_count, error_count
    cdef readonly uint64_t rate_limiter_dropped_bytes

    def __cinit__(self, int in_fd=-1, int out_fd=-1, int irq_fd=-1, bint waits=False, limit=None):
        init_sync(&self.sync)
        self.in_fd = self.out_fd = self.timer_fd = -1
        self.irq_fd, self.waits = irq_fd, waits
        self.lcr, self.divisor_low = LCR_8N1, DIVISOR_9600
        self.mcr = UART_MCR_OUT2
        configure_bucket(&self.limit, limit, "serial")
        # Twice as much, so that what is kept is moved to the front once in BACKLOG bytes. Untouched, it costs nothing.
        self.size = 2 * BACKLOG
        self.kept = <uint8_t *> malloc(self.size)
        if self.kept == NULL:
            raise MemoryError
        if in_fd >= 0:
            self.in_fd, self.in_how = borrowed(in_fd, os.O_RDONLY, "input")
        if out_fd >= 0:
            self.out_fd, self.out_how = borrowed(out_fd, os.O_WRONLY, "output")

    def __dealloc__(self):
        self.give_back()
        free(self.kept)
        destroy_sync(&self.sync)

    def attach(self, Bus bus not None, uint64_t port, IoThread io=None):
        """Answer at 8 ports of `bus` from `port` on; take input, and send what is kept, through `io`."""
        bus.attach(port, PORTS, serial_access, <void *> self, self)
        if io is not None:
            self.io = io
            if self.out_fd >= 0:
                self.output = io.add(self.out_fd, EPOLLONESHOT, serial_output, <void *> self, self)
            if self.in_fd >= 0:
                self.take_input()
        # Where nobody would tell that the output takes more, there is nothing to wait for.
        self.waits = self.waits and self.output != NULL and self.output.live

    cdef take_input(self):
        if os.isatty(self.in_fd):
            self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
            if self.timer_fd >= 0:
                self.io.add(self.timer_fd, EPOLLIN, serial_retry, <void *> self, self)
        self.input = self.io.add(self.in_fd, EPOLLIN | EPOLLONESHOT, serial_input, <void *> self, self)
        if not self.input.live:
            # A regular file is always ready: read on demand.
            with nogil:
                pthread_mutex_lock(&self.sync.mutex)
                self.fill(0)
                pthread_mutex_unlock(&self.sync.mutex)

    def feed(self, bytes data not None):
        """Put input into the receive FIFO as if it had arrived on the line; returns how many bytes fitted."""
        cdef const uint8_t *bytes_in = data
        cdef uint32_t taken, size = len(data)
        with nogil:
            pthread_mutex_lock(&self.sync.mutex)
            taken = min(size, FIFO - min(self.used, <uint32_t> FIFO))
            self.received(bytes_in, taken)
            pthread_mutex_unlock(&self.sync.mutex)
        return taken

    def pause(self):
        """Let no vCPU wait in here from now on, and none that does: before the vCPUs are paused or stopped. Idempotent."""
        self.hurry(True)

    def resume(self):
        """The reverse of `pause`: output may be waited for again. Idempotent."""
        self.hurry(False)

    cdef hurry(self, bint hurried):
        with nogil:
            pthread_mutex_lock(&self.sync.mutex)
            self.hurried = hurried
            pthread_cond_broadcast(&self.sync.changed)
            pthread_mutex_unlock(&self.sync.mutex)

    def close(self):
        """Write what the output takes without waiting, and give the descriptors back. Idempotent.

        Nothing else uses the port any more: vCPUs and I/O thread have ended. In a forked child, the copies only.
        """
        if is_ours(&self.sync):
            with nogil:
                pthread_mutex_lock(&self.sync.mutex)
                self.output = self.input = NULL
                self.armed = False
                self.send()
                self.drop()
                pthread_mutex_unlock(&self.sync.mutex)
        self.give_back()

    cdef void give_back(self) noexcept:
        if self.in_fd >= 0:
            close(self.in_fd)
        if self.out_fd >= 0:
            close(self.out_fd)
        if self.timer_fd >= 0:
            close(self.timer_fd)
        self.in_fd = self.out_fd = self.timer_fd = -1

    cdef int access(self, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
        pthread_mutex_lock(&self.sync.mutex)
        # The registers are one byte wide; a wider access, which no real guest makes, reaches the first only.
        if is_write:
            self.store(offset, data[0])
        else:
            memset(data, 0, size)
            data[0] = self.load(offset)
        pthread_mutex_unlock(&self.sync.mutex)
        return BUS_CONTINUE

    cdef void input_ready(self, uint32_t events) noexcept nogil:
        pthread_mutex_lock(&self.sync.mutex)
        self.fill(events)
        pthread_mutex_unlock(&self.sync.mutex)

    cdef void output_ready(self) noexcept nogil:
        pthread_mutex_lock(&self.sync.mutex)
        self.armed = False
        self.send()
        pthread_mutex_unlock(&self.sync.mutex)

    cdef void retry(self) noexcept nogil:
        cdef uint64_t ticks
        read(self.timer_fd, &ticks, sizeof(ticks))
        self.io.modify(self.input, EPOLLIN | EPOLLONESHOT)

    # -- with the lock held --------------------------------------------------------------------------------------

    cdef void interrupt(self) noexcept nogil:
        cdef uint64_t one = 1
        if self.irq_fd >= 0:
            write(self.irq_fd, &one, sizeof(one))

    cdef void received(self, const uint8_t *data, uint32_t count) noexcept nogil:
        """Input has arrived. A guest that has been told of the byte before it reads on without being told again."""
        cdef bint told = self.used > 0
        cdef uint32_t i
        for i in range(count):
            self.fifo[(self.head + self.used) % (2 * FIFO)] = data[i]
            self.used += 1
        if count and not told and self.ier & UART_IER_RDI:
            self.interrupt()

    cdef void want_input(self) noexcept nogil:
        """The FIFO has room and input was held back: go and get it."""
        self.waiting = False
        if self.input == NULL:
            return
        if self.input.live:
            self.io.modify(self.input, EPOLLIN | EPOLLONESHOT)
        else:
            self.fill(0)

    cdef void fill(self, uint32_t events) noexcept nogil:
        """Read input, without the lock meanwhile: a file waits for its disk."""
        cdef uint8_t buffer[FIFO]
        cdef ssize_t n
        cdef int error
        if self.filling:
            return
        if self.used >= FIFO:
            self.waiting = True
            return
        cdef uint32_t room = FIFO - self.used
        self.filling = True
        pthread_mutex_unlock(&self.sync.mutex)
        n = stream_take(self.in_fd, self.in_how, buffer, room)
        error = errno
        pthread_mutex_lock(&self.sync.mutex)
        self.filling = False
        if n > 0:
            self.received(buffer, <uint32_t> n)
            if self.used >= FIFO or not self.input.live:
                self.waiting = True
            else:
                self.io.modify(self.input, EPOLLIN | EPOLLONESHOT)
        elif n < 0 and (error == EINTR or error == EAGAIN):
            if self.input.live:
                self.io.modify(self.input, EPOLLIN | EPOLLONESHOT)
        elif n < 0 and error == EIO and self.timer_fd >= 0 and not events & EPOLLHUP:
            # The terminal is another process group's for now (termios(3), tty_ioctl(4)): nobody tells when it is not.
            self.look_again()
        elif n < 0:
            self.missed_read_count += 1
        # Otherwise the end of input: the source stays disarmed for good.

    cdef void look_again(self) noexcept nogil:
        cdef itimerspec when
        memset(&when, 0, sizeof(when))
        when.it_value.tv_nsec = RETRY_NS
        timerfd_settime(self.timer_fd, 0, &when, NULL)

    cdef void transmit(self, uint8_t byte) noexcept nogil:
        cdef uint64_t ticket
        if self.mcr & UART_MCR_LOOP:
            if self.used < FIFO:
                self.received(&byte, 1)
        elif self.out_fd < 0:
            pass
        elif self.limit.size and not spend(&self.limit, 1, now_ns()):
            self.rate_limiter_dropped_bytes += 1
        else:
            self.keep(&byte, 1)
            self.send()
        self.thr_pending = True
        if self.ier & UART_IER_THRI and not self.told:
            self.told = True
            self.interrupt()
        if self.waits:
            ticket = self.accepted
            while self.sent < ticket and not self.hurried and (self.armed or self.sending):
                pthread_cond_wait(&self.sync.changed, &self.sync.mutex)

    cdef void keep(self, const uint8_t *data, size_t count) noexcept nogil:
        """Put output behind what is kept already; what finds no room is lost and counted."""
        cdef uint8_t *grown
        # A vCPU that waits for each byte goes on only when it is to pause: then all that it writes until it does is kept.
        if self.queued + count > BACKLOG and not self.waits:
            self.missed_write_count += count
            return
        if self.first + self.queued + count > self.size:
            memmove(self.kept, self.kept + self.first, self.queued)
            self.first = 0
            if self.queued + count > self.size // 2:
                grown = <uint8_t *> realloc(self.kept, 2 * (self.queued + count))
                if grown == NULL:
                    self.missed_write_count += count
                    return
                self.kept, self.size = grown, 2 * (self.queued + count)
        memcpy(self.kept + self.first + self.queued, data, count)
        self.queued += count
        self.accepted += count

    cdef void left(self, size_t count) noexcept nogil:
        """So many bytes of what was kept are gone."""
        self.queued -= count
        self.first = self.first + count if self.queued else 0
        self.sent += count

    cdef void drop(self) noexcept nogil:
        """The output takes nothing any more."""
        self.missed_write_count += self.queued
        self.left(self.queued)

    cdef void send(self) noexcept nogil:
        """Write what is kept, one thread at a time, without the lock meanwhile: a file waits for its disk."""
        cdef uint8_t chunk[CHUNK]
        cdef size_t size
        cdef ssize_t n
        cdef int error, turn = 0
        if self.sending or self.armed:
            return
        self.sending = True
        while self.queued:
            if turn == TURN and self.arm():
                break
            turn += 1
            size = min(self.queued, <size_t> CHUNK)
            memcpy(chunk, self.kept + self.first, size)
            pthread_mutex_unlock(&self.sync.mutex)
            n = stream_put(self.out_fd, self.out_how, chunk, size)
            error = errno
            pthread_mutex_lock(&self.sync.mutex)
            if n > 0:
                self.write_count += n
                self.flush_count += 1
                self.left(n)
            elif n < 0 and error == EINTR:
                continue
            elif n < 0 and error == EAGAIN:
                self.arm()
                break
            else:
                self.drop()
        self.sending = False
        pthread_cond_broadcast(&self.sync.changed)

    cdef bint arm(self) noexcept nogil:
        """Have the I/O thread go on when the output takes more. False when there is none that would be told."""
        if self.output == NULL or not self.output.live:
            return False
        self.armed = self.io.modify(self.output, EPOLLOUT | EPOLLONESHOT) == 0
        return self.armed

    cdef uint8_t receive(self) noexcept nogil:
        cdef uint8_t byte = 0
        if self.used:
            byte = self.fifo[self.head]
            self.head = (self.head + 1) % (2 * FIFO)
            self.used -= 1
            self.read_count += 1
            if self.used == 0 and self.waiting:
                self.want_input()
        return byte

    cdef uint8_t load(self, uint64_t offset) noexcept nogil:
        cdef uint8_t value
        if offset == UART_RX:
            return self.divisor_low if self.lcr & UART_LCR_DLAB else self.receive()
        if offset == UART_IER:
            return self.divisor_high if self.lcr & UART_LCR_DLAB else self.ier
        if offset == UART_IIR:
            # Received data has priority; reading the register takes back the transmitter's cause (8.6).
            self.told = False
            if self.used and self.ier & UART_IER_RDI:
                value = UART_IIR_RDI
            elif self.thr_pending and self.ier & UART_IER_THRI:
                value = UART_IIR_THRI
                self.thr_pending = False
            else:
                value = UART_IIR_NO_INT
            return value | (FIFO_ENABLED if self.fifo_control & UART_FCR_ENABLE_FIFO else 0)
        if offset == UART_LCR:
            return self.lcr
        if offset == UART_MCR:
            return self.mcr
        if offset == UART_LSR:
            # Transmission takes no time, so the transmitter is always empty. Some drivers never look at IIR.
            self.told = False
            return UART_LSR_THRE | UART_LSR_TEMT | (UART_LSR_DR if self.used else 0)
        if offset == UART_MSR:
            if self.mcr & UART_MCR_LOOP:
                value = 0
                if self.mcr & UART_MCR_RTS:
                    value |= UART_MSR_CTS
                if self.mcr & UART_MCR_DTR:
                    value |= UART_MSR_DSR
                if self.mcr & UART_MCR_OUT1:
                    value |= UART_MSR_RI
                if self.mcr & UART_MCR_OUT2:
                    value |= UART_MSR_DCD
                return value
            return UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD
        return self.scratch

    cdef void store(self, uint64_t offset, uint8_t value) noexcept nogil:
        cdef uint8_t enabled
        if offset == UART_RX:
            if self.lcr & UART_LCR_DLAB:
                self.divisor_low = value
            else:
                self.transmit(value)
        elif offset == UART_IER:
            if self.lcr & UART_LCR_DLAB:
                self.divisor_high = value
                return
            enabled = value & ~self.ier
            self.ier = value & IER_MASK
            # Enabling a cause that holds already raises it: the transmitter is empty at any time.
            if enabled & UART_IER_THRI:
                self.thr_pending = self.told = True
            if enabled & UART_IER_THRI or (enabled & UART_IER_RDI and self.used):
                self.interrupt()
        elif offset == UART_IIR:
            self.fifo_control = value
            if value & UART_FCR_CLEAR_RCVR:
                self.head = self.used = 0
                if self.waiting:
                    self.want_input()
        elif offset == UART_LCR:
            self.lcr = value
        elif offset == UART_MCR:
            self.mcr = value & 0x1f
        elif offset == UART_SCR:
            self.scratch = value

    # -- saved state ---------------------------------------------------------------------------------------------

    def save(self):
        """SerialState. The machine is paused."""
        return SerialState(
            ier=self.ier,
            lcr=self.lcr,
            mcr=self.mcr,
            scratch=self.scratch,
            fifo_control=self.fifo_control,
            divisor=self.divisor_low | self.divisor_high << 8,
            thr_pending=self.thr_pending,
            received=bytes([self.fifo[(self.head + i) % (2 * FIFO)] for i in range(self.used)]),
            unsent=(<char *> self.kept + self.first)[:self.queued],
        )

    def restore(self, state):
        """The reverse of `save`, before the vCPUs run; after `attach`."""
        cdef bytes received = state.received, unsent = state.unsent
        self.ier, self.lcr, self.mcr = state.ier & IER_MASK, state.lcr, state.mcr & 0x1f
        self.scratch, self.fifo_control = state.scratch, state.fifo_control
        self.divisor_low, self.divisor_high = state.divisor & 0xff, state.divisor >> 8
        self.thr_pending = state.thr_pending
        self.head = self.used = 0
        self.received(received, min(len(received), 2 * FIFO))
        if self.thr_pending and self.ier & UART_IER_THRI:
            self.interrupt()
        if self.out_fd >= 0:
            self.keep(unsent, len(unsent))
            self.arm()


cdef tuple borrowed(int fd, int flags, str what):
    try:
        return borrow(fd, flags)
    except OSError as error:
        raise ConfigError(f"cannot use descriptor {fd} as the console's {what}: {error.strerror}") from None


cdef int serial_access(void *device, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
    return (<Serial> device).access(offset, data, size, is_write)


cdef void serial_input(void *context, uint32_t events) noexcept nogil:
    (<Serial> context).input_ready(events)


cdef void serial_output(void *context, uint32_t events) noexcept nogil:
    (<Serial> context).output_ready()


cdef void serial_retry(void *context, uint32_t events) noexcept nogil:
    (<Serial> context).retry()
