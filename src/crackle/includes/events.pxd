"""What descriptors can wait for: poll(2), epoll(7), eventfd(2), timerfd_create(2)."""

from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport itimerspec

cdef extern from "<poll.h>" nogil:
    enum:
        POLLERR
        POLLHUP
        POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
        EPOLLERR
        EPOLLET
        EPOLLHUP
        EPOLLIN
        EPOLLONESHOT
        EPOLLOUT
        EPOLLRDHUP
    ctypedef union epoll_data_t:
        void *ptr
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK
    int eventfd(unsigned int initial, int flags)

cdef extern from "<sys/timerfd.h>" nogil:
    enum:
        CLOCK_MONOTONIC
        TFD_CLOEXEC
        TFD_NONBLOCK
        TFD_TIMER_ABSTIME
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)
