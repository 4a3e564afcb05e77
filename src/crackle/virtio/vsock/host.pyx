"""The host's sockets of a vsock device: who connects, who is connected to, and what is written to them.

A host program connects to the socket at `path` and says `CONNECT <port>`; it hears `OK <its own port>` when the guest has
accepted. A guest that connects to a port of the host reaches the socket at `<path>_<port>`. All of it runs on the I/O
thread with the device's lock held. Owns the sockets, an epoll descriptor over them, and the timer of their deadlines.

Sockets are watched edge-triggered: what an event says is noted in the connection, and the socket is read when the guest
has both a receive buffer and credit. So nothing that one side leaves unread wakes the thread again.
"""

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memcpy, memset, strerror
from posix.time cimport itimerspec
from posix.unistd cimport close, read

from crackle.includes.events cimport *
from crackle.includes.io cimport iovec
from crackle.runtime.threads cimport now_ns
from crackle.includes.vsock cimport *
from crackle.virtio.vsock.table cimport *

import os

from crackle.errors import ConfigError

cdef enum:
    BACKLOG = 1024
    MAX_GREETING = 32
    BATCH = 64
    # Instead of a connection's index in what epoll gives back
    LISTENER = 0xffffffffU
    TIMER = 0xfffffffeU
    BOTH = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND

cdef uint64_t SECOND = 1_000_000_000
SHORT_NS = 2 * SECOND
# For a host program to say what port it wants (by hand, perhaps), or to read on what the guest has left for it.
cdef uint64_t LONG_NS = 60 * SECOND
# Until a full backlog, or a process out of descriptors, is tried again.
cdef uint64_t RETRY_NS = SECOND // 50


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


cdef class HostSockets:
    """Listens at `path`. ConfigError when it cannot. last_port: of those given to host programs so far."""

    def __cinit__(self, *args, **kwargs):
        self.epoll_fd = self.listen_fd = self.timer_fd = -1
        self.last_port = FIRST_PORT - 1
        self.table = Table()

    cdef listen_at(self, str path):
        cdef epoll_event event
        self.path = path
        self.set_address(os.fsencode(path))
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        self.listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        event.events, event.data.u64 = EPOLLIN, TIMER
        if self.epoll_fd < 0 or self.timer_fd < 0 or self.listen_fd < 0 or epoll_ctl(
            self.epoll_fd, EPOLL_CTL_ADD, self.timer_fd, &event
        ) < 0:
            raise ConfigError(f"cannot make the vsock device's descriptors: {strerror(errno).decode()}")
        if bind(self.listen_fd, <sockaddr *> &self.address, sizeof(self.address)) < 0:
            raise ConfigError(f"cannot listen on the Unix socket {path}: {strerror(errno).decode()}")
        status = os.stat(path)
        self.identity = (status.st_dev, status.st_ino)
        if listen(self.listen_fd, BACKLOG) < 0:
            raise ConfigError(f"cannot listen on the Unix socket {path}: {strerror(errno).decode()}")

    cdef set_address(self, bytes path):
        memset(&self.address, 0, sizeof(self.address))
        if not 0 < len(path) < <Py_ssize_t> sizeof(self.address.sun_path):
            raise ConfigError(
                f"the path of a Unix socket has 1 to {sizeof(self.address.sun_path) - 1} bytes, "
                f"this one has {len(path)}: {self.path}"
            )
        if b"\0" in path:
            raise ConfigError(f"the path of a Unix socket holds no NUL character: {self.path!r}")
        self.address.sun_family = AF_UNIX
        self.path_length = len(path)
        memcpy(self.address.sun_path, <const char *> path, self.path_length)

    def close(self):
        """End every connection and remove the socket's file; the I/O thread is stopped. Idempotent."""
        identity, self.identity = self.identity, None
        if identity is not None:
            try:
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == identity:
                    os.unlink(self.path)
            except OSError:
                pass
        self.close_fds()

    def __dealloc__(self):
        self.close_fds()

    cdef void close_fds(self) noexcept:
        if self.epoll_fd >= 0:
            self.stop()
            close(self.epoll_fd)
        if self.listen_fd >= 0:
            close(self.listen_fd)
        if self.timer_fd >= 0:
            close(self.timer_fd)
        self.epoll_fd = self.listen_fd = self.timer_fd = -1

    # -- the device's life ---------------------------------------------------------------------------------------

    cdef bint start(self) noexcept nogil:
        """The guest's driver is there: let host programs in."""
        return self.table.prepare() and self.listen_for_more()

    cdef bint listen_for_more(self) noexcept nogil:
        cdef epoll_event event
        event.events, event.data.u64 = EPOLLIN, LISTENER
        if not self.listening:
            self.listening = epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, self.listen_fd, &event) == 0
        return self.listening

    cdef void stop(self) noexcept nogil:
        """It has gone: so do all connections."""
        cdef uint32_t i
        if self.listening:
            epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, self.listen_fd, NULL)
            self.listening = False
        for i in range(self.table.made):
            if self.table.slots[i].state:
                self.release(self.table.slots[i])
        self.listen_again = 0
        self.arm()

    # -- what a connection has for the guest ---------------------------------------------------------------------

    cdef uint32_t credit(self, connection *c) noexcept nogil:
        """Bytes that the guest has room for (5.10.6.3)."""
        cdef uint32_t on_its_way = c.sent - c.guest_forwarded
        return c.guest_room - on_its_way if on_its_way < c.guest_room else 0

    cdef bint sendable(self, connection *c) noexcept nogil:
        if c.todo & SEND_DATA and c.state == OPEN and (not c.short_of_credit or self.credit(c)):
            return True
        return c.todo & ~SEND_DATA != 0

    cdef void ready(self, connection *c) noexcept nogil:
        if self.sendable(c):
            self.table.wait(c)

    cdef void tell(self, connection *c, uint32_t flags) noexcept nogil:
        """Tell the guest that the host program will receive or send no more."""
        if flags & ~c.told:
            c.told |= flags
            c.todo |= SEND_SHUTDOWN
            self.table.wait(c)
        if c.told == BOTH and c.state == OPEN:
            c.state = FINISHED
            c.todo &= ~(SEND_DATA | SEND_CREDIT)
            self.hang_up(c)

    # -- ends ----------------------------------------------------------------------------------------------------

    cdef void hang_up(self, connection *c) noexcept nogil:
        if c.fd >= 0:
            close(c.fd)
            c.fd = -1
        self.table.drop_ring(c)

    cdef void finish(self, connection *c) noexcept nogil:
        """Close it, and send the guest a reset where that still knows the connection."""
        self.hang_up(c)
        if not c.mapped:
            self.release(c)
            return
        self.table.set_timer(c, NO_TIMER, 0)
        c.state, c.todo = DEAD, SEND_RST
        self.table.wait(c)

    cdef void kill(self, connection *c) noexcept nogil:
        self.killed += 1
        self.finish(c)

    cdef void release(self, connection *c) noexcept nogil:
        self.hang_up(c)
        self.removed += c.mapped
        self.table.remove(c)

    # -- host programs that connect ------------------------------------------------------------------------------

    cdef bint watch(self, connection *c, int operation) noexcept nogil:
        cdef epoll_event event
        event.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (EPOLLOUT if c.want_out else 0)
        event.data.u64 = <uint64_t> c.generation << 32 | c.index
        if epoll_ctl(self.epoll_fd, operation, c.fd, &event) == 0:
            return True
        self.muxer_fails += 1
        return False

    cdef void accept_some(self) noexcept nogil:
        cdef connection *c
        cdef int fd
        for _ in range(BATCH):
            fd = accept4(self.listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                if errno == EAGAIN or errno == EINTR or errno == ECONNABORTED:
                    return
                # No descriptors or no memory: who waits would wake the thread for ever.
                self.muxer_fails += 1
                epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, self.listen_fd, NULL)
                self.listening = False
                self.listen_again = now_ns() + RETRY_NS
                return
            c = self.table.add()
            if c == NULL:
                close(fd)
                continue
            c.fd, c.state = fd, GREETING
            self.table.set_timer(c, LONG, now_ns() + LONG_NS)
            if not self.watch(c, EPOLL_CTL_ADD):
                self.release(c)

    cdef void greet(self, connection *c) noexcept nogil:
        """Read the CONNECT line, once it is complete, and not a byte of what follows."""
        cdef char line[MAX_GREETING]
        cdef ssize_t n = recv(c.fd, line, MAX_GREETING, MSG_PEEK)
        cdef char *end
        cdef uint32_t port
        if n < 0 and (errno == EAGAIN or errno == EINTR):
            return
        end = <char *> memchr(line, c'\n', n) if n > 0 else NULL
        if end == NULL and 0 < n < MAX_GREETING and not c.closing:
            return
        if end == NULL or not parse_greeting(line, end - line, &port):
            self.event_fails += 1
            self.release(c)
            return
        recv(c.fd, line, end - line + 1, 0)
        while True:
            self.last_port = FIRST_PORT | (self.last_port + 1) & (FIRST_PORT - 1)
            if self.table.find(self.last_port, port) == NULL:
                break
        self.table.map(c, self.last_port, port)
        self.table.set_timer(c, NO_TIMER, 0)
        self.added += 1
        c.state, c.todo = ASKED, SEND_REQUEST
        self.table.wait(c)

    cdef void established(self, connection *c) noexcept nogil:
        """The guest has accepted: tell the host program, and pass on what it has written meanwhile."""
        cdef char line[MAX_GREETING]
        cdef int size = snprintf(line, MAX_GREETING, "OK %u\n", c.host_port)
        if send(c.fd, line, size, MSG_NOSIGNAL) != size:
            self.kill(c)
            return
        self.table.set_timer(c, NO_TIMER, 0)
        c.state = OPEN
        c.todo |= SEND_DATA
        self.ready(c)

    # -- host programs that are connected to ---------------------------------------------------------------------

    cdef connection *dial(self, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        """A connection from the guest; NULL when there are too many."""
        cdef connection *c = self.table.add()
        if c == NULL:
            return NULL
        self.table.map(c, host_port, guest_port)
        self.added += 1
        c.state, c.gives_up = DIALLING, now_ns() + SHORT_NS
        c.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if c.fd < 0:
            self.muxer_fails += 1
            self.finish(c)
        else:
            self.try_to_dial(c)
        return c

    cdef void try_to_dial(self, connection *c) noexcept nogil:
        cdef sockaddr_un address = self.address
        cdef size_t room = sizeof(address.sun_path) - self.path_length
        cdef uint64_t now
        if <size_t> snprintf(address.sun_path + self.path_length, room, "_%u", c.host_port) >= room:
            self.finish(c)
        elif connect(c.fd, <sockaddr *> &address, sizeof(address)) == 0:
            self.table.set_timer(c, NO_TIMER, 0)
            c.state, c.todo = OPEN, SEND_RESPONSE | SEND_DATA
            if self.watch(c, EPOLL_CTL_ADD):
                self.table.wait(c)
            else:
                self.kill(c)
        elif errno == EAGAIN:
            # The backlog is full, and nothing tells when there is room again.
            now = now_ns()
            if now < c.gives_up:
                self.table.set_timer(c, RETRY, now + RETRY_NS)
            else:
                self.finish(c)
        else:
            self.finish(c)

    # -- data for the host program -------------------------------------------------------------------------------

    cdef void write(self, connection *c, iovec *iov, int count, uint32_t size) noexcept nogil:
        """Pass `size` bytes on, and hold what the socket does not take."""
        cdef msghdr message
        cdef ssize_t n = 0
        if c.deaf:
            self.passed_on(c, size)
            return
        if c.held == 0:
            memset(&message, 0, sizeof(message))
            message.msg_iov, message.msg_iovlen = iov, count
            n = sendmsg(c.fd, &message, MSG_NOSIGNAL)
            if n < 0 and errno != EAGAIN and errno != EINTR:
                self.write_fails += 1
                self.write_failed(c)
                return
            n = max(n, 0)
            self.tx_bytes += n
            self.passed_on(c, <uint32_t> n)
            if n == size:
                return
        if not self.table.hold(c, iov, count, n):
            # More than it was given credit for.
            self.kill(c)
        elif not c.want_out:
            c.want_out = True
            if not self.watch(c, EPOLL_CTL_MOD):
                self.kill(c)

    cdef void flush(self, connection *c) noexcept nogil:
        cdef iovec parts[2]
        cdef msghdr message
        cdef ssize_t n
        memset(&message, 0, sizeof(message))
        message.msg_iov = parts
        while c.held:
            message.msg_iovlen = self.table.held_parts(c, parts)
            n = sendmsg(c.fd, &message, MSG_NOSIGNAL)
            if n < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    self.flush_fails += 1
                    self.write_failed(c)
                    return
                break
            self.table.let_go(c, <uint32_t> n)
            self.tx_bytes += n
            self.passed_on(c, <uint32_t> n)
        if c.state == DRAINING:
            if c.held == 0:
                self.finish(c)
            else:
                self.table.set_timer(c, LONG, now_ns() + LONG_NS)
            return
        if c.held == 0:
            c.want_out = False
            self.watch(c, EPOLL_CTL_MOD)
            if c.guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND:
                shutdown(c.fd, SHUT_WR)

    cdef void passed_on(self, connection *c, uint32_t size) noexcept nogil:
        c.forwarded += size
        # Half of its credit is unknown to the guest: it never stops for want of news.
        if c.forwarded - c.told_forwarded >= c.room // 2 and c.state == OPEN:
            c.todo |= SEND_CREDIT
            self.table.wait(c)

    cdef void write_failed(self, connection *c) noexcept nogil:
        """The host program takes nothing any more; what it has written may still be on its way to the guest."""
        if c.state == DRAINING:
            self.kill(c)
            return
        c.deaf = True
        self.passed_on(c, c.held)
        self.table.drop_ring(c)
        self.tell(c, VIRTIO_VSOCK_SHUTDOWN_RCV)

    # -- events --------------------------------------------------------------------------------------------------

    cdef void end_of_stream(self, connection *c) noexcept nogil:
        """Everything that the host program has written has been read."""
        cdef pollfd state
        state.fd, state.events, state.revents = c.fd, 0, 0
        c.at_end = True
        c.todo &= ~SEND_DATA
        if poll(&state, 1, 0) == 1 and state.revents & POLLHUP:
            self.tell(c, BOTH)
        else:
            self.tell(c, VIRTIO_VSOCK_SHUTDOWN_SEND)

    cdef void host_ready(self, connection *c, uint32_t events) noexcept nogil:
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            c.closing = True
        if c.state == GREETING:
            self.greet(c)
        elif c.state == ASKED:
            if events & EPOLLHUP:
                self.kill(c)
        elif c.state == DRAINING:
            self.flush(c)
        elif c.state == OPEN:
            if c.want_out and events & EPOLLOUT:
                self.flush(c)
                if c.state != OPEN:
                    return
            if c.at_end or c.guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV:
                if events & EPOLLHUP:
                    self.tell(c, BOTH)
            elif events & ~EPOLLOUT:
                c.todo |= SEND_DATA
                self.ready(c)

    cdef void host_events(self) noexcept nogil:
        """Note what has happened on the sockets, and what is overdue."""
        cdef epoll_event events[BATCH]
        cdef connection *c
        cdef uint32_t index
        cdef uint64_t ticks
        cdef int i, n = epoll_wait(self.epoll_fd, events, BATCH, 0)
        if n < 0 and errno != EINTR:
            self.muxer_fails += 1
        for i in range(n):
            index = <uint32_t> events[i].data.u64
            if index == LISTENER:
                self.accept_some()
            elif index == TIMER:
                read(self.timer_fd, &ticks, sizeof(ticks))
                self.armed = 0
                self.expire()
            else:
                c = self.table.at(index, events[i].data.u64 >> 32)
                if c != NULL:
                    self.host_ready(c, events[i].events)

    # -- deadlines -----------------------------------------------------------------------------------------------

    cdef void expire(self) noexcept nogil:
        cdef uint64_t now = now_ns()
        cdef connection *c
        cdef int kind
        for kind in range(TIMER_KINDS):
            while True:
                c = self.table.timers[kind].first
                if c == NULL or c.deadline > now:
                    break
                if kind == RETRY:
                    self.try_to_dial(c)
                elif c.state == GREETING:
                    self.release(c)
                else:
                    self.kill(c)
        if self.listen_again and self.listen_again <= now:
            self.listen_again = 0
            if not self.listen_for_more():
                self.listen_again = now + RETRY_NS

    cdef void arm(self) noexcept nogil:
        """Set the timer to the first deadline, and stop it when there is none: nobody waits for nothing."""
        cdef uint64_t first = self.listen_again
        cdef connection *c
        cdef itimerspec when
        cdef int kind
        for kind in range(TIMER_KINDS):
            c = self.table.timers[kind].first
            if c != NULL and (first == 0 or c.deadline < first):
                first = c.deadline
        if first == self.armed:
            return
        self.armed = first
        memset(&when, 0, sizeof(when))
        when.it_value.tv_sec, when.it_value.tv_nsec = first // SECOND, first % SECOND
        timerfd_settime(self.timer_fd, TFD_TIMER_ABSTIME, &when, NULL)
