"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2.2): a page of registers in front of a device.

Register accesses run on a vCPU thread without the GIL. Queue notifications do not come here at all: KVM turns the write
to QueueNotify into a write to the queue's eventfd (`notify_address`).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.kvm.bus cimport BUS_CONTINUE, Bus
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.queue cimport Virtqueue

from crackle.virtio.state import DeviceState


cdef extern from * nogil:
    int atomic_or "__sync_fetch_and_or" (int *place, int bits)
    int atomic_and "__sync_fetch_and_and" (int *place, int bits)

cdef enum:
    MAGIC = 0x74726976      # "virt"
    VERSION = 2
    VENDOR = 0

SIZE = 0x1000


cdef void set_low(uint64_t *field, uint32_t value) noexcept nogil:
    field[0] = field[0] >> 32 << 32 | value


cdef void set_high(uint64_t *field, uint32_t value) noexcept nogil:
    field[0] = <uint64_t> value << 32 | <uint32_t> field[0]


cdef class MmioTransport:
    """The registers of `device`. Holds the three selectors; everything else is the device's."""

    cdef readonly VirtioDevice device
    cdef readonly uint64_t address
    cdef readonly uint32_t gsi
    cdef uint32_t device_features_select, driver_features_select, queue_select

    def __cinit__(self, VirtioDevice device not None, uint64_t address, uint32_t gsi):
        self.device = device
        self.address = address
        self.gsi = gsi

    def attach(self, Bus bus not None):
        """Answer at `address` on the MMIO bus."""
        bus.attach(self.address, SIZE, mmio_access, <void *> self, self)

    @property
    def notify_address(self):
        """Where an ioeventfd belongs, 32 bits wide, with the queue's index as the value to match (4.2.2, QueueNotify)."""
        return self.address + VIRTIO_MMIO_QUEUE_NOTIFY

    # -- on a vCPU thread ----------------------------------------------------------------------------------------

    cdef int access(self, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
        cdef uint32_t value = 0
        # Interrupts are acknowledged without waiting for a queue that is being served.
        if offset == VIRTIO_MMIO_INTERRUPT_STATUS and not is_write:
            value = atomic_or(&self.device.interrupt_status, 0)
            # Whoever else raises interrupts cannot set the bit: each may be one of a queue.
            if self.device.foreign:
                value |= VIRTIO_MMIO_INT_VRING
        elif offset == VIRTIO_MMIO_INTERRUPT_ACK and is_write and size == 4:
            memcpy(&value, data, 4)
            atomic_and(&self.device.interrupt_status, ~value)
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
        if not status & VIRTIO_CONFIG_S_FEATURES_OK or status & VIRTIO_CONFIG_S_DRIVER_OK:
            self.device.cfg_fails += 1
        elif offset == VIRTIO_MMIO_QUEUE_READY:
            if not value:
                queue.ready = False
            elif not queue.enable():
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
        """DeviceState of the device and these registers. The machine is paused."""
        cdef VirtioDevice device = self.device
        return DeviceState(
            driver_features=device.driver_features,
            status=device.status,
            interrupt_status=device.interrupt_status,
            config_generation=device.config_generation,
            device_features_select=self.device_features_select,
            driver_features_select=self.driver_features_select,
            queue_select=self.queue_select,
            queues=tuple(queue.save() for queue in device.queues),
            own=device.save_own(),
        )

    def restore(self, state):
        """The reverse of `save`, before the vCPUs run; ValueError when the state is not this device's."""
        cdef VirtioDevice device = self.device
        device.accept_features(state.driver_features)
        if state.driver_features & ~device.device_features:
            raise ValueError(f"saved features {state.driver_features:#x} go beyond {device.device_features:#x}")
        if len(state.queues) != len(device.queues):
            raise ValueError(f"{len(state.queues)} saved queues, this device has {len(device.queues)}")
        for queue, saved in zip(device.queues, state.queues):
            queue.restore(
                saved,
                event_idx=bool(state.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1),
                indirect=bool(state.driver_features >> VIRTIO_RING_F_INDIRECT_DESC & 1),
            )
        device.driver_features, device.status = state.driver_features, state.status
        device.interrupt_status, device.config_generation = state.interrupt_status, state.config_generation
        self.device_features_select = state.device_features_select
        self.driver_features_select = state.driver_features_select
        self.queue_select = state.queue_select
        device.restore_own(state.own)
        # What was submitted and not served yet, and an interrupt that was on its way, come again.
        device.kick()
        if device.interrupt_status:
            device.interrupt(0)


cdef int mmio_access(void *context, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
    return (<MmioTransport> context).access(offset, data, size, is_write)
