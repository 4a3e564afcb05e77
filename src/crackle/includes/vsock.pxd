"""virtio-vsock structures and numbers (virtio 1.2, section 5.10), from the kernel's headers."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "<linux/virtio_ids.h>" nogil:
    enum:
        VIRTIO_ID_VSOCK

cdef extern from "<linux/virtio_vsock.h>" nogil:
    enum:
        VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        VIRTIO_VSOCK_TYPE_STREAM
        VIRTIO_VSOCK_OP_REQUEST
        VIRTIO_VSOCK_OP_RESPONSE
        VIRTIO_VSOCK_OP_RST
        VIRTIO_VSOCK_OP_SHUTDOWN
        VIRTIO_VSOCK_OP_RW
        VIRTIO_VSOCK_OP_CREDIT_UPDATE
        VIRTIO_VSOCK_OP_CREDIT_REQUEST
        VIRTIO_VSOCK_SHUTDOWN_RCV
        VIRTIO_VSOCK_SHUTDOWN_SEND

    struct virtio_vsock_config:
        uint64_t guest_cid

    struct virtio_vsock_hdr:
        uint64_t src_cid
        uint64_t dst_cid
        uint32_t src_port
        uint32_t dst_port
        uint32_t len
        uint16_t type
        uint16_t op
        uint32_t flags
        uint32_t buf_alloc
        uint32_t fwd_cnt

cdef extern from "<linux/vm_sockets.h>" nogil:
    enum:
        VMADDR_CID_HOST
