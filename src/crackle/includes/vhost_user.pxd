"""What the vhost-user devices need of the kernel's headers (virtio 1.2, section 5.2.3 and 5.2.4)."""

from libc.stdint cimport uint16_t, uint64_t

cdef extern from "<linux/virtio_blk.h>" nogil:
    enum:
        VIRTIO_BLK_F_SIZE_MAX
        VIRTIO_BLK_F_GEOMETRY
        VIRTIO_BLK_F_BLK_SIZE
        VIRTIO_BLK_F_TOPOLOGY
        VIRTIO_BLK_F_DISCARD
        VIRTIO_BLK_F_WRITE_ZEROES

    struct virtio_blk_config:
        uint64_t capacity
        uint16_t num_queues
