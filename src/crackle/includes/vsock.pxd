"""virtio-vsock structures and numbers (virtio 1.2, section 5.10), and Unix sockets, from the system's headers."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec

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

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_UNIX
        SOCK_STREAM
        SOCK_NONBLOCK
        SOCK_CLOEXEC
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_PEEK
        SHUT_RD
        SHUT_WR
        SHUT_RDWR
        SOL_SOCKET
        SO_SNDBUF
    struct sockaddr:
        pass
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    int socket(int domain, int type, int protocol)
    int bind(int fd, const sockaddr *address, unsigned int length)
    int listen(int fd, int backlog)
    int accept4(int fd, sockaddr *address, unsigned int *length, int flags)
    int connect(int fd, const sockaddr *address, unsigned int length)
    int shutdown(int fd, int how)
    int setsockopt(int fd, int level, int option, const void *value, unsigned int size)
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, int *value)

cdef extern from "<linux/sockios.h>" nogil:
    enum:
        SIOCOUTQ

cdef extern from "<sys/un.h>" nogil:
    struct sockaddr_un:
        unsigned short sun_family
        char sun_path[108]

cdef extern from "<poll.h>" nogil:
    enum:
        POLLHUP
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
