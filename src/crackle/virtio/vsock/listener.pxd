from libc.stdint cimport uint32_t, uint64_t

from crackle.includes.socket cimport sockaddr_un

cdef bint parse_greeting(const char *line, size_t size, uint32_t *port) noexcept nogil

# Instead of a descriptor
cdef enum:
    NOBODY = -1
    NO_DESCRIPTOR = -2      # or no memory

cdef class Listener:
    cdef int fd
    cdef int pid                    # of the process whose it is: a forked child has copies
    cdef bint watched
    cdef uint64_t again
    cdef readonly str path
    cdef sockaddr_un address
    cdef size_t path_length
    cdef tuple identity             # device and inode of the socket's file

    cdef set_address(self, bytes path)
    cdef refused(self)
    cdef bint address_of_port(self, uint32_t port, sockaddr_un *found) noexcept nogil
    cdef bint watch(self, int epoll_fd, uint64_t name) noexcept nogil
    cdef void look_away(self, int epoll_fd, uint64_t again) noexcept nogil
    cdef int accept(self) noexcept nogil
