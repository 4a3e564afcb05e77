"""A 16550A UART at COM1: the guest's console (TI PC16550D data sheet, section 8).

Output goes to a descriptor byte by byte, from the vCPU thread, without the GIL. Input comes from a descriptor through the
I/O thread into the receive FIFO; while the FIFO is full the descriptor is not read. Interrupts are pulses on an irqfd, one
each time a cause appears, which is what the edge-triggered ISA line 4 wants.

The caller keeps the two descriptors open until the machine is stopped, and closes them.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport read, write

from crackle.runtime.iothread cimport IoThread, event_source
from crackle.includes.events cimport EPOLLIN, EPOLLONESHOT
from crackle.runtime.threads cimport *
from crackle.kvm.bus cimport BUS_CONTINUE, Bus

from crackle.devices.state import SerialState


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


cdef class Serial:
    """The UART. in_fd: console input, or -1; out_fd: console output, or -1; irq_fd: an eventfd bound to its line."""

    cdef pthread_mutex_t lock
    cdef int in_fd, out_fd, irq_fd
    cdef IoThread io
    cdef event_source *source
    cdef bint waiting       # for the FIFO to drain before more input is read
    cdef uint8_t ier, lcr, mcr, scratch, fifo_control
    cdef uint8_t divisor_low, divisor_high
    cdef bint thr_pending   # the transmitter is empty and the guest has not been told
    cdef uint8_t fifo[FIFO]
    cdef uint32_t head, used
    cdef readonly uint64_t read_count, write_count, missed_write_count, missed_read_count, flush_count, error_count

    def __cinit__(self, int in_fd=-1, int out_fd=-1, int irq_fd=-1):
        pthread_mutex_init(&self.lock, NULL)
        self.in_fd, self.out_fd, self.irq_fd = in_fd, out_fd, irq_fd
        self.lcr, self.divisor_low = LCR_8N1, DIVISOR_9600
        self.mcr = UART_MCR_OUT2

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    def attach(self, Bus bus not None, uint64_t port, IoThread io=None):
        """Answer at 8 ports of `bus` from `port` on, and take input through `io` when there is an input descriptor."""
        bus.attach(port, PORTS, serial_access, <void *> self, self)
        if io is not None and self.in_fd >= 0:
            self.io = io
            self.source = io.add(self.in_fd, EPOLLIN | EPOLLONESHOT, serial_input, <void *> self, self)
            if not self.source.live:
                # A regular file is always ready: read on demand.
                self.waiting = True
                with nogil:
                    pthread_mutex_lock(&self.lock)
                    self.want_input()
                    pthread_mutex_unlock(&self.lock)

    def feed(self, bytes data not None):
        """Put input into the receive FIFO as if it had arrived on the line; returns how many bytes fitted."""
        cdef const char *bytes_in = data
        cdef Py_ssize_t i, size = len(data)
        cdef uint32_t before, taken
        # The lock's holder may wait for a reader of the output that needs the GIL.
        with nogil:
            pthread_mutex_lock(&self.lock)
            before = self.used
            for i in range(size):
                if self.used == FIFO:
                    break
                self.fifo[(self.head + self.used) % FIFO] = bytes_in[i]
                self.used += 1
            self.received(before)
            taken = self.used - before
            pthread_mutex_unlock(&self.lock)
        return taken

    cdef int access(self, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        # The registers are one byte wide; a wider access, which no real guest makes, reaches the first only.
        if is_write:
            self.store(offset, data[0])
        else:
            memset(data, 0, size)
            data[0] = self.load(offset)
        pthread_mutex_unlock(&self.lock)
        return BUS_CONTINUE

    cdef void ready(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.fill()
        pthread_mutex_unlock(&self.lock)

    # -- with the lock held --------------------------------------------------------------------------------------

    cdef void interrupt(self) noexcept nogil:
        cdef uint64_t one = 1
        if self.irq_fd >= 0:
            write(self.irq_fd, &one, sizeof(one))

    cdef void received(self, uint32_t before) noexcept nogil:
        if self.used > before and self.ier & UART_IER_RDI:
            self.interrupt()

    cdef void want_input(self) noexcept nogil:
        """The FIFO has room and input was held back: go and get it."""
        self.waiting = False
        if self.source.live:
            self.io.modify(self.source, EPOLLIN | EPOLLONESHOT)
        else:
            self.fill()

    cdef void fill(self) noexcept nogil:
        cdef uint8_t buffer[FIFO]
        cdef uint32_t before = self.used
        cdef ssize_t n, i
        if self.used == FIFO:
            self.waiting = True
            return
        n = read(self.in_fd, buffer, FIFO - self.used)
        if n < 0 and (errno == EINTR or errno == EAGAIN):
            if self.source.live:
                self.io.modify(self.source, EPOLLIN | EPOLLONESHOT)
            return
        if n <= 0:
            # End of input: the source stays disarmed for good.
            if n < 0:
                self.missed_read_count += 1
            return
        for i in range(n):
            self.fifo[(self.head + self.used) % FIFO] = buffer[i]
            self.used += 1
        if self.used == FIFO or not self.source.live:
            self.waiting = True
        else:
            self.io.modify(self.source, EPOLLIN | EPOLLONESHOT)
        self.received(before)

    cdef void transmit(self, uint8_t byte) noexcept nogil:
        cdef ssize_t n
        if self.mcr & UART_MCR_LOOP:
            if self.used < FIFO:
                self.fifo[(self.head + self.used) % FIFO] = byte
                self.used += 1
                self.received(self.used - 1)
        elif self.out_fd >= 0:
            n = write(self.out_fd, &byte, 1)
            if n == 1:
                self.write_count += 1
                self.flush_count += 1
            else:
                # A full pipe, or a kick while waiting for one: the line does not wait, the byte is lost and counted.
                self.missed_write_count += 1
        self.thr_pending = True
        if self.ier & UART_IER_THRI:
            self.interrupt()

    cdef uint8_t receive(self) noexcept nogil:
        cdef uint8_t byte = 0
        if self.used:
            byte = self.fifo[self.head]
            self.head = (self.head + 1) % FIFO
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
            # Transmission takes no time, so the transmitter is always empty.
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
                self.thr_pending = True
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
            received=bytes([self.fifo[(self.head + i) % FIFO] for i in range(self.used)]),
        )

    def restore(self, state):
        """The reverse of `save`, before the vCPUs run."""
        self.ier, self.lcr, self.mcr = state.ier & IER_MASK, state.lcr, state.mcr & 0x1f
        self.scratch, self.fifo_control = state.scratch, state.fifo_control
        self.divisor_low, self.divisor_high = state.divisor & 0xff, state.divisor >> 8
        self.thr_pending = state.thr_pending
        self.head = self.used = 0
        self.feed(state.received)


cdef int serial_access(void *device, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
    return (<Serial> device).access(offset, data, size, is_write)


cdef void serial_input(void *context, uint32_t events) noexcept nogil:
    (<Serial> context).ready()
