"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2.2): a page of registers in front of a device.

Register accesses run on a vCPU thread without the GIL. Queue notifications do not come here at all: KVM turns the write
to QueueNotify into a write to the queue's eventfd (`notify_address`). All queues, and the configuration space, share one
interrupt (4.2.3.4); `interrupt_status` says why, and lies outside the device's lock: a vCPU that only acknowledges an
interrupt must not wait for a queue that is being served. """

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close, read, write

from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.includes.events cimport *
from crackle.runtime.iothread cimport IoThread, event_source
from crackle.kvm.bus cimport BUS_CONTINUE, Bus
from crackle.virtio.device cimport VirtioDevice, driver_link
from crackle.virtio.queue cimport Virtqueue

from crackle.errors import ConfigError
from crackle.virtio.state import MmioState


cdef extern from * nogil:
    int atomic_or "__sync_fetch_and_or" (int *place, int bits)
    int atomic_and "__sync_fetch_and_and" (int *place, int bits)

cdef enum:
    MAGIC = 0x74726976      # "virt"
    VERSION = 2
    VENDOR = 0
    # While the driver has not acknowledged one interrupt, the next for the same reason is raised this much later.
    AGAIN_NS = 250_000

SIZE = 0x1000


cdef void set_low(uint64_t *field, uint32_t value) noexcept nogil:
    field[0] = field[0] >> 32 << 32 | value


cdef void set_high(uint64_t *field, uint32_t value) noexcept nogil:
    field[0] = <uint64_t> value << 32 | <uint32_t> field[0]


cdef class MmioTransport:
    """The registers of `device`, at guest physical `address`; it interrupts at `line`, a `crackle.kvm.line.Line`.

    Until `close` the device is this transport's alone; the line may be others' too. `plug` makes them reachable.
    """

    def __cinit__(self, VirtioDevice device not None, uint64_t address, line not None):
        cdef driver_link link
        self.irq_fd = self.timer_fd = -1
        self.address = address
        self.line = line
        self.steps = []
        link.transport = <void *> self
        link.queues_used, link.config_changed, link.call_fd = queues_used, config_changed, call_fd
        device.connect(&link)
        self.device = device
        self.irq_fd = line.fd

    def __del__(self):
        self.close()

    def plug(self, Bus bus not None, IoThread io not None, vm=None):
        """Let the guest have the device: its registers on the MMIO `bus`, its queues served on `io`.

        vm: the crackle.kvm.Vm, for notifications and interrupts; without one whoever tests writes and reads their eventfds.
        On an error nothing is plugged.
        """
        if self.steps:
            raise ValueError("this device is plugged already")
        device = self.device
        try:
            self.steps.append((device.detach, {}))
            device.attach(io)
            self.steps.append((self.stop_timer, {"io": io}))
            self.start_timer(io)
            if vm is not None:
                self.line.connect(vm)
                self.steps.append((self.line.disconnect, {"vm": vm}))
                for queue, fd in enumerate(device.notify_fds):
                    match = {"fd": fd, "address": self.notify_address, "length": 4, "datamatch": queue}
                    vm.ioeventfd(**match)
                    self.steps.append((vm.ioeventfd, {**match, "assign": False}))
            # Last, and so the first to go: before it nobody can reach the device.
            bus.attach(self.address, SIZE, mmio_access, <void *> self, self)
            self.steps.append((bus.detach, {"base": self.address}))
        except BaseException:
            self.unplug()
            raise

    def unplug(self):
        """The reverse: when it returns, neither a vCPU nor the I/O thread is in the device any more. Idempotent.

        Whoever calls holds no lock of the device's. The driver is not asked.
        """
        while self.steps:
            step, arguments = self.steps.pop()
            step(**arguments)

    cdef start_timer(self, IoThread io):
        self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.timer_fd < 0:
            raise ConfigError("cannot make a timer for a device's interrupt: no descriptor is left")
        self.timer = io.add(self.timer_fd, EPOLLIN, timer_fired, <void *> self, self)

    def stop_timer(self, IoThread io):
        """The reverse of `start_timer`, for `unplug`. Idempotent."""
        cdef event_source *timer = self.timer
        self.timer = NULL
        if timer != NULL:
            with nogil:
                io.remove(timer)
        self.close_timer()

    cdef void close_timer(self) noexcept:
        cdef int fd = self.timer_fd
        self.timer_fd = -1
        if fd >= 0:
            close(fd)

    def close(self):
        """Let go of the device and of the line: nobody accesses the registers any more. Idempotent."""
        if self.irq_fd < 0:
            return
        self.device.disconnect()
        self.irq_fd = -1
        self.close_timer()
        # What was plugged and is not taken back goes as a whole, with the machine.
        self.steps.clear()

    @property
    def gsi(self):
        """The number of the interrupt line."""
        return self.line.gsi

    @property
    def notify_address(self):
        """Where an ioeventfd belongs, 32 bits wide, with the queue's index as the value to match (4.2.2, QueueNotify)."""
        return self.address + VIRTIO_MMIO_QUEUE_NOTIFY

    cdef bint interrupt(self, int cause) noexcept nogil:
        """Raise the line, or raise it again.

        As of a line with a level (4.2.2, InterruptStatus), nothing new comes of it before the driver has acknowledged what
        it was told: one that polls, and leaves interrupts on, is not taken out of the guest for each. It acknowledges first
        and looks at its queues then, or after the next interrupt, as it must where the line does have a level. One that
        sleeps without having acknowledged has the interrupt a little later: none is lost.
        """
        cdef uint64_t now = now_ns()
        cdef itimerspec when
        if not atomic_or(&self.interrupt_status, cause) & cause or now - self.raised_ns >= AGAIN_NS or self.timer_fd < 0:
            return self.raise_line(now)
        if not self.owed:
            self.owed = True
            memset(&when, 0, sizeof(when))
            when.it_value.tv_nsec = <long> (AGAIN_NS - (now - self.raised_ns))
            timerfd_settime(self.timer_fd, 0, &when, NULL)
        return True

    cdef bint raise_line(self, uint64_t now) noexcept nogil:
        cdef uint64_t one = 1
        self.raised_ns = now
        self.owed = False  # this one tells of that too
        return write(self.irq_fd, &one, sizeof(one)) == sizeof(one)

    cdef void raise_owed(self) noexcept nogil:
        """On the I/O thread: what was put off, unless the driver has acknowledged meanwhile, and looked then."""
        cdef uint64_t ticks
        pthread_mutex_lock(&self.device.lock)
        # Nothing to read: it has been set anew meanwhile.
        if read(self.timer_fd, &ticks, sizeof(ticks)) == sizeof(ticks) and self.owed:
            self.owed = False
            if atomic_or(&self.interrupt_status, 0):
                self.raise_line(now_ns())
        pthread_mutex_unlock(&self.device.lock)

    # -- on a vCPU thread ----------------------------------------------------------------------------------------

    cdef int access(self, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
        cdef uint32_t value = 0
        # Interrupts are acknowledged without waiting for a queue that is being served.
        if offset == VIRTIO_MMIO_INTERRUPT_STATUS and not is_write:
            value = atomic_or(&self.interrupt_status, 0)
            # Each may be one that another process has raised for a queue.
            if self.lent:
                value |= VIRTIO_MMIO_INT_VRING
        elif offset == VIRTIO_MMIO_INTERRUPT_ACK and is_write and size == 4:
            memcpy(&value, data, 4)
            atomic_and(&self.interrupt_status, ~value)
            return BUS_CONTINUE
        else:
            pthread_mutex_lock(&self.device.lock)
            if offset >= VIRTIO_MMIO_CONFIG:
                self.config(self.device, offset - VIRTIO_MMIO_CONFIG, data, size, is_write)
            elif size == 4 and not offset & 3:
                # 4.2.2.2: the driver uses aligned 32-bit accesses outside the configuration space.
                if is_write:
                    memcpy(&value, data, 4)
                    self.store(self.device, offset, value)
                else:
                    value = self.load(self.device, offset)
            else:
                self.device.cfg_fails += 1
            pthread_mutex_unlock(&self.device.lock)
            if offset >= VIRTIO_MMIO_CONFIG:
                return BUS_CONTINUE
        if not is_write:
            memset(data, 0, size)
            memcpy(data, &value, min(size, 4))
        return BUS_CONTINUE

    cdef void config(self, VirtioDevice device, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
        if is_write:
            if offset + size <= device.config_size:
                device.on_config_write(offset, data, size)
            else:
                device.cfg_fails += 1
            return
        memset(data, 0, size)
        if offset + size <= device.config_size:
            memcpy(data, &device.config[offset], size)

    cdef uint32_t load(self, VirtioDevice device, uint64_t offset) noexcept nogil:
        if offset == VIRTIO_MMIO_MAGIC_VALUE:
            return MAGIC
        if offset == VIRTIO_MMIO_VERSION:
            return VERSION
        if offset == VIRTIO_MMIO_DEVICE_ID:
            return device.device_id
        if offset == VIRTIO_MMIO_VENDOR_ID:
            return VENDOR
        if offset == VIRTIO_MMIO_DEVICE_FEATURES:
            if self.device_features_select > 1:
                return 0
            return <uint32_t> (device.device_features >> (32 * self.device_features_select))
        if offset == VIRTIO_MMIO_QUEUE_NUM_MAX and self.queue_select < <uint32_t> device.queue_count:
            return (<Virtqueue> device.table[self.queue_select]).max_size
        if offset == VIRTIO_MMIO_QUEUE_READY and self.queue_select < <uint32_t> device.queue_count:
            return (<Virtqueue> device.table[self.queue_select]).ready
        if offset == VIRTIO_MMIO_STATUS:
            return device.status
        if offset == VIRTIO_MMIO_CONFIG_GENERATION:
            return device.config_generation
        if VIRTIO_MMIO_SHM_LEN_LOW <= offset <= VIRTIO_MMIO_SHM_BASE_HIGH:
            # No shared memory regions: length and base read all ones (4.2.2, SHMLen).
            return <uint32_t> -1
        return 0

    cdef void store(self, VirtioDevice device, uint64_t offset, uint32_t value) noexcept nogil:
        if offset == VIRTIO_MMIO_DEVICE_FEATURES_SEL:
            self.device_features_select = value
        elif offset == VIRTIO_MMIO_DRIVER_FEATURES_SEL:
            self.driver_features_select = value
        elif offset == VIRTIO_MMIO_DRIVER_FEATURES:
            # 3.1.1: only between DRIVER and FEATURES_OK.
            if device.status & VIRTIO_CONFIG_S_FEATURES_OK or not device.status & VIRTIO_CONFIG_S_DRIVER:
                device.cfg_fails += 1
            elif self.driver_features_select == 0:
                set_low(&device.driver_features, value)
            elif self.driver_features_select == 1:
                set_high(&device.driver_features, value)
        elif offset == VIRTIO_MMIO_QUEUE_SEL:
            self.queue_select = value
        elif offset == VIRTIO_MMIO_QUEUE_NOTIFY:
            # Only a notification that KVM did not take, by its value: it names no queue of ours.
            device.cfg_fails += 1
        elif offset == VIRTIO_MMIO_STATUS:
            device.set_status(value)
            if value == 0:
                atomic_and(&self.interrupt_status, 0)
                self.device_features_select = self.driver_features_select = self.queue_select = 0
        elif VIRTIO_MMIO_QUEUE_NUM <= offset <= VIRTIO_MMIO_QUEUE_USED_HIGH:
            if self.queue_select < <uint32_t> device.queue_count:
                self.store_queue(<Virtqueue> device.table[self.queue_select], offset, value)
            else:
                device.cfg_fails += 1
        else:
            device.cfg_fails += 1

    cdef void store_queue(self, Virtqueue queue, uint64_t offset, uint32_t value) noexcept nogil:
        cdef uint32_t status = self.device.status
        # 3.1.1: queues are set up between FEATURES_OK and DRIVER_OK; a queue that is ready keeps its addresses.
        if not status & VIRTIO_CONFIG_S_FEATURES_OK:
            self.device.cfg_fails += 1
        elif offset == VIRTIO_MMIO_QUEUE_READY and not value:
            # 4.2.3.2: a driver may stop using a queue at any time, and has it back with a reset.
            queue.ready = False
        elif status & VIRTIO_CONFIG_S_DRIVER_OK:
            self.device.cfg_fails += 1
        elif offset == VIRTIO_MMIO_QUEUE_READY:
            if not queue.enable():
                self.device.need_reset()
        elif queue.ready:
            self.device.cfg_fails += 1
        elif offset == VIRTIO_MMIO_QUEUE_NUM:
            # A size that is no power of two or too large is refused when the queue is enabled.
            queue.size = min(value, 0xffff)
        elif offset == VIRTIO_MMIO_QUEUE_DESC_LOW:
            set_low(&queue.desc_gpa, value)
        elif offset == VIRTIO_MMIO_QUEUE_DESC_HIGH:
            set_high(&queue.desc_gpa, value)
        elif offset == VIRTIO_MMIO_QUEUE_AVAIL_LOW:
            set_low(&queue.avail_gpa, value)
        elif offset == VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
            set_high(&queue.avail_gpa, value)
        elif offset == VIRTIO_MMIO_QUEUE_USED_LOW:
            set_low(&queue.used_gpa, value)
        elif offset == VIRTIO_MMIO_QUEUE_USED_HIGH:
            set_high(&queue.used_gpa, value)
        else:
            self.device.cfg_fails += 1

    # -- saved state ---------------------------------------------------------------------------------------------

    def save(self):
        """MmioState of these registers and the device behind them. The machine is paused."""
        return MmioState(
            address=self.address,
            gsi=self.gsi,
            interrupt_status=self.interrupt_status,
            device_features_select=self.device_features_select,
            driver_features_select=self.driver_features_select,
            queue_select=self.queue_select,
            device=self.device.save(),
        )

    def restore(self, state):
        """The reverse of `save`, before the vCPUs run; ValueError when the state is another device's or place's."""
        if (state.address, state.gsi) != (self.address, self.gsi):
            raise ValueError(
                f"saved registers at {state.address:#x} with interrupt {state.gsi}, these are at {self.address:#x} with "
                f"{self.gsi}"
            )
        self.device.restore(state.device)
        # Beside what the device has signalled already, so that it reaches a driver that has not seen it.
        atomic_or(&self.interrupt_status, state.interrupt_status)
        self.device_features_select = state.device_features_select
        self.driver_features_select = state.driver_features_select
        self.queue_select = state.queue_select
        # An interrupt that was on its way comes again.
        if self.interrupt_status:
            self.interrupt(0)


cdef int mmio_access(void *context, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
    return (<MmioTransport> context).access(offset, data, size, is_write)


cdef bint queues_used(void *transport, uint32_t queues) noexcept nogil:
    return (<MmioTransport> transport).interrupt(VIRTIO_MMIO_INT_VRING)


cdef bint config_changed(void *transport) noexcept nogil:
    return (<MmioTransport> transport).interrupt(VIRTIO_MMIO_INT_CONFIG)


cdef int call_fd(void *transport, int index) noexcept nogil:
    (<MmioTransport> transport).lent = True
    return (<MmioTransport> transport).irq_fd


cdef void timer_fired(void *context, uint32_t events) noexcept nogil:
    (<MmioTransport> context).raise_owed()
