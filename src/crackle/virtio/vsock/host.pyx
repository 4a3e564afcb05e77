"""The host's sockets of a vsock device: who connects, who is connected to, and what is written to them.

A host program connects to the socket at `path` and says `CONNECT <port>`; it hears `OK <its own port>` when the guest has
accepted. A guest that connects to a port of the host reaches the socket at `<path>_<port>`. All of it runs on the I/O
thread with the device's lock held. Owns an epoll descriptor over all of them, and the timer of their deadlines; the
connections are `crackle.virtio.vsock.streams`'s, the socket at `path` is `crackle.virtio.vsock.listener`'s.

Sockets are watched edge-triggered: what an event says is noted in the connection, and the socket is read when the guest
has both a receive buffer and credit. So nothing that one side leaves unread wakes the thread again. The listening socket
is not looked at while nobody could be let in. Each look does a bounded amount of work, whatever has come meanwhile.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr, memset, strerror
from posix.time cimport itimerspec
from posix.unistd cimport close, read

from crackle.includes.events cimport *
from crackle.includes.io cimport iovec
from crackle.includes.socket cimport *
from crackle.includes.vsock cimport *
from crackle.runtime.clock cimport MachineClock
from crackle.runtime.descriptors cimport give_descriptor, has_descriptor, take_descriptor
from crackle.virtio.vsock.listener cimport NOBODY, Listener, parse_greeting
from crackle.virtio.vsock.streams cimport Streams
from crackle.virtio.vsock.table cimport *

from crackle.errors import ConfigError

cdef enum:
    MAX_GREETING = 32
    # Host programs that have not said yet what they want; a new one takes the place of one that takes its time.
    MAX_GREETINGS = 256
    # What one look does at most of each: events, and of those that the listener is ready, overdue connections.
    BATCH = 64
    # Instead of a connection's index in what epoll gives back
    LISTENER = 0xffffffffU
    TIMER = 0xfffffffeU

cdef uint64_t SECOND = 1_000_000_000
SHORT_NS = 2 * SECOND
# For a host program to say what port it wants (by hand, perhaps), or to read on what the guest has left for it.
cdef uint64_t LONG_NS = 60 * SECOND
# Until a full backlog is tried again, a batch of connections after the other.
cdef uint64_t RETRY_NS = SECOND // 50
cdef uint64_t RETRY_BATCH_NS = SECOND // 1000
# Until a listener is looked at again, that could not be served for want of something that nobody tells of.
cdef uint64_t REST_NS = SECOND // 10


cdef class HostSockets:
    """Sockets for `streams`: those of the host programs that come to `listener`, and of those that the guest calls.

    last_port: of the ports given to host programs so far, or 0. ConfigError when there are no descriptors.
    """

    def __cinit__(self, *args, **kwargs):
        self.epoll_fd = self.timer_fd = -1

    def __init__(self, Streams streams not None, Listener listener not None, uint32_t last_port=0):
        cdef epoll_event event
        if self.epoll_fd >= 0:
            raise ValueError("these sockets are set up already")
        self.streams, self.listener = streams, listener
        self.table = streams.table
        self.clock = MachineClock()
        self.last_port = last_port or FIRST_PORT - 1
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        event.events, event.data.u64 = EPOLLIN, TIMER
        if self.epoll_fd < 0 or self.timer_fd < 0 or epoll_ctl(
            self.epoll_fd, EPOLL_CTL_ADD, self.timer_fd, &event
        ) < 0:
            raise ConfigError(f"cannot make the vsock device's descriptors: {strerror(errno).decode()}")

    def __dealloc__(self):
        self.close_fds()

    def close(self):
        """Give the descriptors back; the I/O thread is stopped. Idempotent."""
        self.close_fds()

    cdef void close_fds(self) noexcept:
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
        if self.timer_fd >= 0:
            close(self.timer_fd)
        self.epoll_fd = self.timer_fd = -1

    # -- the device's life ---------------------------------------------------------------------------------------

    cdef uint64_t now(self) noexcept nogil:
        """Nanoseconds of the clock of all deadlines, which stands still while the machine is paused."""
        return self.clock.now()

    cdef bint start(self) noexcept nogil:
        """The guest's driver is there: let host programs in."""
        self.wanted = self.table.prepare()
        return self.wanted and self.listener.watch(self.epoll_fd, LISTENER)

    cdef void stop(self) noexcept nogil:
        """It has gone: nobody is let in. The connections are ended by then."""
        self.wanted = False
        self.listener.look_away(self.epoll_fd, 0)
        self.arm()

    # -- host programs that connect ------------------------------------------------------------------------------

    cdef uint64_t next_place(self) noexcept nogil:
        """When there is a place for one more: 0 for now, UINT64_MAX when somebody has to end first."""
        if self.table.count >= MAX_CONNECTIONS:
            return UINT64_MAX
        if self.streams.greetings < MAX_GREETINGS:
            return 0
        # The oldest of those that have said nothing gives way.
        return self.table.timers[GREET].first.deadline - LONG_NS + SHORT_NS

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
        cdef uint64_t now = self.now()
        cdef int fd
        for _ in range(BATCH):
            if self.next_place() > now:
                self.listener.look_away(self.epoll_fd, 0)
                return
            fd = self.listener.accept()
            if fd == NOBODY:
                return
            if fd < 0:
                self.muxer_fails += 1
                self.listener.look_away(self.epoll_fd, now + REST_NS)
                return
            if self.streams.greetings == MAX_GREETINGS:
                self.streams.release(self.table.timers[GREET].first)
            c = self.table.add()
            if c == NULL:
                close(fd)
                give_descriptor()
                continue
            c.fd, c.state = fd, GREETING
            self.streams.greetings += 1
            self.table.set_timer(c, GREET, now + LONG_NS)
            if not self.watch(c, EPOLL_CTL_ADD):
                self.streams.release(c)

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
            self.streams.release(c)
            return
        recv(c.fd, line, end - line + 1, 0)
        while True:
            self.last_port = FIRST_PORT | (self.last_port + 1) & (FIRST_PORT - 1)
            if self.table.find(self.last_port, port) == NULL:
                break
        self.table.set_timer(c, NO_TIMER, 0)
        self.streams.greetings -= 1
        self.streams.begin(c, self.last_port, port)
        c.state, c.todo = ASKED, SEND_REQUEST
        self.table.wait(c)

    cdef void established(self, connection *c) noexcept nogil:
        """The guest has accepted: tell the host program, and pass on what it has written meanwhile."""
        cdef char line[MAX_GREETING]
        cdef int size = snprintf(line, MAX_GREETING, "OK %u\n", c.host_port)
        if send(c.fd, line, size, MSG_NOSIGNAL) != size:
            self.streams.kill(c)
            return
        self.table.set_timer(c, NO_TIMER, 0)
        c.state = OPEN
        c.todo |= SEND_DATA
        self.streams.ready(c)

    # -- host programs that are connected to ---------------------------------------------------------------------

    cdef connection *dial(self, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        """A connection from the guest; NULL when there are too many."""
        cdef connection *c
        cdef int fd = -1
        if not take_descriptor():
            return NULL
        c = self.table.add()
        if c != NULL:
            fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd < 0:
            give_descriptor()
        if c == NULL:
            return NULL
        c.fd, c.state, c.gives_up = fd, DIALLING, self.now() + SHORT_NS
        self.streams.begin(c, host_port, guest_port)
        if fd < 0:
            self.muxer_fails += 1
            self.streams.finish(c)
        else:
            self.try_to_dial(c)
        return c

    cdef void try_to_dial(self, connection *c) noexcept nogil:
        cdef sockaddr_un address
        cdef uint64_t now
        if not self.listener.address_of_port(c.host_port, &address):
            self.streams.finish(c)
        elif connect(c.fd, <sockaddr *> &address, sizeof(address)) == 0:
            self.table.set_timer(c, NO_TIMER, 0)
            c.state, c.todo = OPEN, SEND_RESPONSE | SEND_DATA
            if self.watch(c, EPOLL_CTL_ADD):
                self.table.wait(c)
            else:
                self.streams.kill(c)
        elif errno == EAGAIN:
            # The backlog is full, and nothing tells when there is room again.
            now = self.now()
            if now < c.gives_up:
                self.table.set_timer(c, RETRY, now + RETRY_NS)
            else:
                self.streams.finish(c)
        else:
            self.streams.finish(c)

    # -- data for the host program -------------------------------------------------------------------------------

    cdef void write(self, connection *c, iovec *iov, int count, uint32_t size) noexcept nogil:
        """Pass `size` bytes on, and hold what the socket does not take."""
        cdef msghdr message
        cdef ssize_t n = 0
        if not self.streams.pool.may_hold(c, size):
            # More than it was given credit for.
            self.streams.kill(c)
            return
        if c.deaf:
            self.streams.passed_on(c, size)
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
            self.streams.passed_on(c, <uint32_t> n)
            if n == size:
                return
        if not self.streams.pool.hold(c, iov, count, n):
            # No memory.
            self.streams.kill(c)
        elif not c.want_out:
            c.want_out = True
            if not self.watch(c, EPOLL_CTL_MOD):
                self.streams.kill(c)

    cdef void flush(self, connection *c) noexcept nogil:
        cdef iovec parts[2]
        cdef msghdr message
        cdef ssize_t n
        memset(&message, 0, sizeof(message))
        message.msg_iov = parts
        while c.held:
            message.msg_iovlen = self.streams.pool.held_parts(c, parts)
            n = sendmsg(c.fd, &message, MSG_NOSIGNAL)
            if n < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    self.flush_fails += 1
                    self.write_failed(c)
                    return
                break
            self.streams.pool.let_go(c, <uint32_t> n)
            self.tx_bytes += n
            self.streams.passed_on(c, <uint32_t> n)
        if c.state == DRAINING:
            if c.held == 0:
                self.streams.finish(c)
            else:
                self.table.set_timer(c, LONG, self.now() + LONG_NS)
            return
        if c.held == 0:
            c.want_out = False
            self.watch(c, EPOLL_CTL_MOD)
            if c.guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND:
                shutdown(c.fd, SHUT_WR)

    cdef void write_failed(self, connection *c) noexcept nogil:
        """The host program takes nothing any more; what it has written may still be on its way to the guest."""
        if c.state == DRAINING:
            self.streams.kill(c)
            return
        c.deaf = True
        self.streams.passed_on(c, c.held)
        self.streams.pool.drop_ring(c)
        self.streams.tell(c, VIRTIO_VSOCK_SHUTDOWN_RCV)

    # -- events --------------------------------------------------------------------------------------------------

    cdef void end_of_stream(self, connection *c) noexcept nogil:
        """Everything that the host program has written has been read."""
        cdef pollfd state
        state.fd, state.events, state.revents = c.fd, 0, 0
        c.at_end = True
        c.todo &= ~SEND_DATA
        if poll(&state, 1, 0) == 1 and state.revents & POLLHUP:
            self.streams.tell(c, VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND)
        else:
            self.streams.tell(c, VIRTIO_VSOCK_SHUTDOWN_SEND)

    cdef void host_ready(self, connection *c, uint32_t events) noexcept nogil:
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            c.closing = True
        if c.state == GREETING:
            self.greet(c)
        elif c.state == ASKED:
            if events & EPOLLHUP:
                self.streams.kill(c)
        elif c.state == DRAINING:
            self.flush(c)
        elif c.state == OPEN:
            if c.want_out and events & EPOLLOUT:
                self.flush(c)
                if c.state != OPEN:
                    return
            if c.at_end or c.guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV:
                if events & EPOLLHUP:
                    self.streams.tell(c, VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND)
            elif events & ~EPOLLOUT:
                c.todo |= SEND_DATA
                self.streams.ready(c)

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
        """What is overdue, a batch of it; `arm` sees to the rest."""
        cdef uint64_t now = self.now()
        cdef connection *c
        cdef int kind, _
        for kind in range(TIMER_KINDS):
            if kind == RETRY and now < self.retry_after:
                continue
            for _ in range(BATCH):
                c = self.table.timers[kind].first
                if c == NULL or c.deadline > now:
                    break
                if kind == RETRY:
                    self.retry_after = now + RETRY_BATCH_NS
                    self.try_to_dial(c)
                elif kind == GREET:
                    self.streams.release(c)
                else:
                    self.streams.kill(c)

    cdef void arm(self) noexcept nogil:
        """Before the thread goes on: look at the listener if it can be served, and set the timer to the first deadline."""
        cdef uint64_t first = UINT64_MAX, due, now
        cdef connection *c
        cdef int kind
        if self.wanted and not self.listener.watched:
            now = self.now()
            first = max(self.listener.again, self.next_place())
            if first <= now and has_descriptor() and self.listener.watch(self.epoll_fd, LISTENER):
                first = UINT64_MAX
            elif first <= now:
                first = self.listener.again = now + REST_NS
        for kind in range(TIMER_KINDS):
            c = self.table.timers[kind].first
            if c != NULL:
                due = max(c.deadline, self.retry_after) if kind == RETRY else c.deadline
                first = min(first, due)
        self.set_alarm(first)

    cdef void set_alarm(self, uint64_t when) noexcept nogil:
        """UINT64_MAX for never: nobody waits for nothing. After a pause it rings too early, and is set again."""
        cdef itimerspec value
        cdef uint64_t now, left
        if when == self.armed:
            return
        self.armed = when
        memset(&value, 0, sizeof(value))
        if when != UINT64_MAX:
            now = self.now()
            left = when - now if when > now else 1
            value.it_value.tv_sec, value.it_value.tv_nsec = left // SECOND, left % SECOND
        timerfd_settime(self.timer_fd, 0, &value, NULL)
