"""Reading and writing files and sockets, at a place and into several buffers: readv(2), pread(2)."""

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec *iov, int count)
    ssize_t writev(int fd, const iovec *iov, int count)
    ssize_t preadv(int fd, const iovec *iov, int count, long offset)
    ssize_t pwritev(int fd, const iovec *iov, int count, long offset)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t size, long offset)
    ssize_t pwrite(int fd, const void *buffer, size_t size, long offset)
