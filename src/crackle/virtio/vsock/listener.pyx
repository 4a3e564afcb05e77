"""The Unix socket of a vsock device, to which host programs connect, and what they say first. Owns it, and its file.

It is not watched while nobody could be let in: who waits there would wake the thread for ever.
"""

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset, strerror
from posix.unistd cimport close, getpid

from crackle.includes.events cimport *
from crackle.includes.socket cimport *
from crackle.includes.vsock cimport *
from crackle.runtime.descriptors cimport give_descriptor, take_descriptor

import os

from crackle.errors import ConfigError

cdef enum:
    BACKLOG = 1024

# Firecracker's words: clients look for them.
_PROBLEM = "Error binding to the host-side Unix socket"


cdef bint is_space(char x) noexcept nogil:
    return x == c' ' or x == c'\t' or x == c'\r'


cdef bint parse_greeting(const char *line, size_t size, uint32_t *port) noexcept nogil:
    """`CONNECT <port>`, in letters of either case."""
    cdef const char *word = b"connect"
    cdef uint64_t value = 0
    cdef size_t i = 0, start = 0
    while i < size and is_space(line[i]):
        i += 1
    while start < 7 and i < size and line[i] | 0x20 == word[start]:
        i += 1
        start += 1
    if start < 7 or i == size or not is_space(line[i]):
        return False
    while i < size and is_space(line[i]):
        i += 1
    start = i
    while i < size and c'0' <= line[i] <= c'9' and value <= UINT32_MAX:
        value = 10 * value + <uint64_t> (line[i] - c'0')
        i += 1
    port[0] = <uint32_t> value
    return i > start and value <= UINT32_MAX and (i == size or is_space(line[i]))


cdef class Listener:
    """Listens at `path`, where nothing may be; at no place when it is empty. ConfigError when it cannot."""

    def __cinit__(self, *args):
        self.fd = -1
        self.pid = getpid()

    def __init__(self, str path not None):
        if self.fd >= 0:
            raise ValueError("this listener is set up already")
        self.path = path
        self.set_address(os.fsencode(path))
        self.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if self.fd < 0:
            raise ConfigError(f"cannot make the vsock device's descriptors: {strerror(errno).decode()}")
        # Without a name the kernel gives it one, which nobody is told (unix(7), "Autobind").
        size = sizeof(self.address) if path else sizeof(self.address.sun_family)
        if bind(self.fd, <sockaddr *> &self.address, size) < 0:
            raise self.refused()
        if path:
            status = os.stat(path)
            self.identity = (status.st_dev, status.st_ino)
        if listen(self.fd, BACKLOG) < 0:
            raise self.refused()

    cdef refused(self):
        return ConfigError(f"{_PROBLEM}: {strerror(errno).decode()} (os error {errno}): {self.path}")

    cdef set_address(self, bytes path):
        memset(&self.address, 0, sizeof(self.address))
        if b"\0" in path:
            raise ConfigError(f"{_PROBLEM}: paths must not contain interior null bytes: {self.path!r}")
        if len(path) >= <Py_ssize_t> sizeof(self.address.sun_path):
            raise ConfigError(
                f"{_PROBLEM}: path must be shorter than SUN_LEN: it may have {sizeof(self.address.sun_path) - 1} bytes, "
                f"and has {len(path)}: {self.path}"
            )
        self.address.sun_family = AF_UNIX
        self.path_length = len(path)
        memcpy(self.address.sun_path, <const char *> path, self.path_length)

    cdef bint address_of_port(self, uint32_t port, sockaddr_un *found) noexcept nogil:
        """Where a program of the host listens on `port`: `<path>_<port>`; False when that is too long a path."""
        cdef size_t room = sizeof(found.sun_path) - self.path_length
        found[0] = self.address
        return <size_t> snprintf(found.sun_path + self.path_length, room, "_%u", port) < room

    cdef bint watch(self, int epoll_fd, uint64_t name) noexcept nogil:
        """Be told, as `name`, when somebody comes."""
        cdef epoll_event event
        event.events, event.data.u64 = EPOLLIN, name
        if not self.watched:
            self.watched = epoll_ctl(epoll_fd, EPOLL_CTL_ADD, self.fd, &event) == 0
        return self.watched

    cdef void look_away(self, int epoll_fd, uint64_t again) noexcept nogil:
        """Not to be told. again: when to look once more, at the earliest."""
        if self.watched:
            epoll_ctl(epoll_fd, EPOLL_CTL_DEL, self.fd, NULL)
            self.watched = False
        self.again = again

    cdef int accept(self) noexcept nogil:
        """The descriptor of one who has come, on a guest's account; NOBODY, or NO_DESCRIPTOR when there is none for it."""
        cdef int fd, error
        if not take_descriptor():
            return NO_DESCRIPTOR
        fd = accept4(self.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            error = errno
            give_descriptor()
            return NOBODY if error == EAGAIN or error == EINTR or error == ECONNABORTED else NO_DESCRIPTOR
        return fd

    def close(self):
        """Stop listening and remove the socket's file, if it is still this socket's and this process's. Idempotent."""
        identity, self.identity = self.identity, None
        if identity is not None and self.pid == getpid():
            try:
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == identity:
                    os.unlink(self.path)
            except OSError:
                pass
        if self.fd >= 0:
            close(self.fd)
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
