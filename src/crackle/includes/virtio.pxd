"""virtio structures and numbers from the kernel's headers (virtio 1.2, sections 2.7, 4.2 and 5.2)."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/virtio_ring.h>" nogil:
    enum:
        VRING_DESC_F_NEXT
        VRING_DESC_F_WRITE
        VRING_DESC_F_INDIRECT
        VRING_AVAIL_F_NO_INTERRUPT
        VRING_USED_F_NO_NOTIFY
        VIRTIO_RING_F_INDIRECT_DESC
        VIRTIO_RING_F_EVENT_IDX

    struct vring_desc:
        uint64_t addr
        uint32_t len
        uint16_t flags
        uint16_t next

    struct vring_used_elem:
        uint32_t id
        uint32_t len

cdef extern from "<linux/virtio_config.h>" nogil:
    enum:
        VIRTIO_CONFIG_S_ACKNOWLEDGE
        VIRTIO_CONFIG_S_DRIVER
        VIRTIO_CONFIG_S_DRIVER_OK
        VIRTIO_CONFIG_S_FEATURES_OK
        VIRTIO_CONFIG_S_NEEDS_RESET
        VIRTIO_CONFIG_S_FAILED
        VIRTIO_F_VERSION_1

cdef extern from "<linux/virtio_mmio.h>" nogil:
    enum:
        VIRTIO_MMIO_MAGIC_VALUE
        VIRTIO_MMIO_VERSION
        VIRTIO_MMIO_DEVICE_ID
        VIRTIO_MMIO_VENDOR_ID
        VIRTIO_MMIO_DEVICE_FEATURES
        VIRTIO_MMIO_DEVICE_FEATURES_SEL
        VIRTIO_MMIO_DRIVER_FEATURES
        VIRTIO_MMIO_DRIVER_FEATURES_SEL
        VIRTIO_MMIO_QUEUE_SEL
        VIRTIO_MMIO_QUEUE_NUM_MAX
        VIRTIO_MMIO_QUEUE_NUM
        VIRTIO_MMIO_QUEUE_READY
        VIRTIO_MMIO_QUEUE_NOTIFY
        VIRTIO_MMIO_INTERRUPT_STATUS
        VIRTIO_MMIO_INTERRUPT_ACK
        VIRTIO_MMIO_STATUS
        VIRTIO_MMIO_QUEUE_DESC_LOW
        VIRTIO_MMIO_QUEUE_DESC_HIGH
        VIRTIO_MMIO_QUEUE_AVAIL_LOW
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH
        VIRTIO_MMIO_QUEUE_USED_LOW
        VIRTIO_MMIO_QUEUE_USED_HIGH
        VIRTIO_MMIO_SHM_LEN_LOW
        VIRTIO_MMIO_SHM_BASE_HIGH
        VIRTIO_MMIO_CONFIG_GENERATION
        VIRTIO_MMIO_CONFIG
        VIRTIO_MMIO_INT_VRING
        VIRTIO_MMIO_INT_CONFIG

cdef extern from "<linux/virtio_ids.h>" nogil:
    enum:
        VIRTIO_ID_BLOCK
        VIRTIO_ID_RNG
        VIRTIO_ID_PMEM
        VIRTIO_ID_BALLOON
