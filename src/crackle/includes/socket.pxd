"""Sockets, and Unix sockets in particular: socket(2), recv(2), unix(7)."""

from crackle.includes.io cimport iovec

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
