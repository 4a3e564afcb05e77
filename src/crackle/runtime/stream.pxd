"""Reading and writing, without waiting, what `stream.borrow` gave: see there. read(2), send(2), preadv2(2), poll(2)."""

cdef extern from * nogil:
    """
    #ifndef CRACKLE_STREAM
    #define CRACKLE_STREAM
    #include <errno.h>
    #include <poll.h>
    #include <sys/socket.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <unistd.h>

    enum { STREAM_OWN, STREAM_SOCKET, STREAM_SHARED };

    /* Whether the file cannot be asked not to wait, and nothing was done. */
    static inline int cannot_ask(ssize_t n) {
        return n < 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL);
    }

    static inline int polls_ready(int fd, short events) {
        struct pollfd p = { .fd = fd, .events = events };
        if (poll(&p, 1, 0) > 0)
            return 1;
        errno = EAGAIN;
        return 0;
    }

    static inline ssize_t stream_take(int fd, int how, void *data, size_t size) {
        struct iovec part = { .iov_base = data, .iov_len = size };
        ssize_t n;
        if (how == STREAM_OWN)
            return read(fd, data, size);
        if (how == STREAM_SOCKET)
            return recv(fd, data, size, MSG_DONTWAIT);
        n = preadv2(fd, &part, 1, -1, RWF_NOWAIT);
        if (!cannot_ask(n))
            return n;
        return polls_ready(fd, POLLIN) ? read(fd, data, size) : -1;
    }

    static inline ssize_t stream_put(int fd, int how, const void *data, size_t size) {
        struct iovec part = { .iov_base = (void *) data, .iov_len = size };
        ssize_t n;
        if (how == STREAM_OWN)
            return write(fd, data, size);
        if (how == STREAM_SOCKET)
            return send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        n = pwritev2(fd, &part, 1, -1, RWF_NOWAIT);
        if (!cannot_ask(n))
            return n;
        /* Ready for a byte is not ready for more. */
        return polls_ready(fd, POLLOUT) ? write(fd, data, 1) : -1;
    }
    #endif
    """
    ssize_t stream_take(int fd, int how, void *data, size_t size)
    ssize_t stream_put(int fd, int how, const void *data, size_t size)
