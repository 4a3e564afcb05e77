"""A launcher: what it asks for, and what the kernel says of it (proc(5)), compared with what this process is.

The core's half of `crackle.runtime.inherit`: what every child of a zygote does, with as little Python as can be, because
a child copies each page that it writes to, and whoever runs Python writes to many. Each function raises OSError.
"""

from libc.errno cimport ENOENT, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, strtoull
from libc.string cimport memchr, memcmp, memcpy, memset, strchr, strlen, strncmp
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.unistd cimport close, dup2, fchdir, getpid, read, write

import os

from crackle.runtime.system import close_from, title_place
from crackle.version import VERSION as _VERSION

cdef extern from "Python.h":
    str PyUnicode_DecodeFSDefault(const char *text)

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <poll.h>
    #include <signal.h>
    #include <stdio.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    enum { FDS_MAX = 64, FD_LIMIT = 1024, MESSAGE_MAX = 128 << 10 };

    /* As in src/crackle/launch/launch.c. */
    struct launch_request {
        char version[32];
        uint64_t signal_mask;
        uint32_t arguments, variables, fds;
        uint32_t fd_numbers[FDS_MAX];
    };
    struct launch_answer {
        char kind;
        char reason[119];
        int32_t status;
    };

    union rights {
        struct cmsghdr header;
        char room[CMSG_SPACE(FDS_MAX * sizeof(int))];
    };

    /* Bytes of the message, and the descriptors that came with it; -1 with errno, -2 for one that is cut off. */
    static ssize_t receive_request(int fd, char *message, int *fds, uint32_t *count) {
        union rights control;
        struct iovec part = { message, MESSAGE_MAX };
        struct msghdr header = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control
        };
        ssize_t size = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
        *count = 0;
        if (size < 0)
            return size;
        for (struct cmsghdr *each = CMSG_FIRSTHDR(&header); each; each = CMSG_NXTHDR(&header, each))
            if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == SCM_RIGHTS) {
                uint32_t more = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
                for (uint32_t i = 0; i < more && *count < FDS_MAX; i++)
                    memcpy(&fds[(*count)++], CMSG_DATA(each) + i * sizeof(int), sizeof(int));
            }
        return header.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -2 : size;
    }

    /* With a descriptor beside it. */
    static ssize_t send_answer(int to, char kind, int32_t status, int fd) {
        struct launch_answer answer = { .kind = kind, .status = status };
        union rights control = {
            .header = { .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS }
        };
        struct iovec part = { &answer, sizeof answer };
        struct msghdr header = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_SPACE(sizeof fd)
        };
        memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
        return sendmsg(to, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
    }

    static int wait_readable(int fd, int milliseconds) {
        struct pollfd one = { .fd = fd, .events = POLLIN };
        return poll(&one, 1, milliseconds);
    }

    static unsigned long inode_at(int directory, const char *name) {
        struct stat found;
        return fstatat(directory, name, &found, 0) ? 0 : found.st_ino;
    }

    /* Whether a descriptor is open on what is the root here. */
    static int is_root(int fd) {
        struct stat theirs, own;
        return !fstat(fd, &theirs) && !stat("/", &own) && theirs.st_dev == own.st_dev && theirs.st_ino == own.st_ino;
    }

    static uint64_t ignored_signals(void) {
        uint64_t found = 0;
        struct sigaction now;
        for (int number = 1; number <= 64; number++)
            if (!sigaction(number, NULL, &now) && now.sa_handler == SIG_IGN)
                found |= (uint64_t) 1 << (number - 1);
        return found;
    }

    static int set_signal_mask(uint64_t wanted) {
        sigset_t set;
        sigemptyset(&set);
        for (int number = 1; number <= 64; number++)
            if (wanted >> (number - 1) & 1)
                sigaddset(&set, number);
        return pthread_sigmask(SIG_SETMASK, &set, NULL);
    }

    static int copy_limit(int pid, int which) {
        struct rlimit theirs, own;
        if (prlimit(pid, which, NULL, &theirs) || prlimit(0, which, NULL, &own))
            return -1;
        return theirs.rlim_cur == own.rlim_cur && theirs.rlim_max == own.rlim_max ? 0 : prlimit(0, which, &theirs, NULL);
    }

    #define get_processors(pid, set, size) syscall(SYS_sched_getaffinity, pid, size, set)
    #define set_processors(set, size) syscall(SYS_sched_setaffinity, 0, size, set)
    #define open_pid(pid) syscall(SYS_pidfd_open, pid, 0)
    extern char **environ;
    """
    enum:
        FDS_MAX
        FD_LIMIT
        MESSAGE_MAX
        O_PATH
        O_DIRECTORY
        O_NONBLOCK
        O_ASYNC
        O_WRONLY
        F_DUPFD_CLOEXEC
        F_SETOWN
        F_SETSIG
        F_SETFL
        SIGKILL
        SIGPIPE
        SIGXFSZ
    struct launch_request:
        char version[32]
        uint64_t signal_mask
        uint32_t arguments, variables, fds
        uint32_t fd_numbers[64]
    int fcntl(int fd, int command, ...)
    unsigned int umask(unsigned int mask)
    int dup3(int old, int new, int flags)
    int openat(int directory, const char *name, int flags)
    int snprintf(char *text, size_t size, const char *form, ...)
    ssize_t receive_request(int fd, char *message, int *fds, uint32_t *count)
    ssize_t send_answer(int to, char kind, int32_t status, int fd)
    int wait_readable(int fd, int milliseconds)
    unsigned long inode_at(int directory, const char *name)
    bint is_root(int fd)
    uint64_t ignored_signals()
    int set_signal_mask(uint64_t wanted)
    int copy_limit(int pid, int which)
    long get_processors(int pid, uint8_t *set, size_t size)
    long set_processors(uint8_t *set, size_t size)
    long open_pid(int pid)
    char **environ

cdef enum:
    # Of a file of /proc that is read here.
    TEXT = 16 << 10
    LIMITS = 16             # RLIMIT_*, <asm-generic/resource.h>
    PROCESSORS = 1024       # bytes of a set of processors

# What of a launcher's is not as here, and has to be changed.
OTHER_CGROUPS, ELSEWHERE = 1, 2

# Namespaces that a process can move to, the mount namespace last; and those that it is born in.
MOVABLE = ("net", "uts", "ipc", "cgroup", "mnt")
FIXED = ("user", "pid", "pid_for_children", "time", "time_for_children")

# Lines of /proc/PID/status that have to be the same; those missing are the same.
cdef tuple SAME = (
    b"Uid:", b"Gid:", b"Groups:", b"CapInh:", b"CapPrm:", b"CapEff:", b"CapBnd:", b"CapAmb:",
    b"Seccomp:", b"Seccomp_filters:", b"Mems_allowed:",
)
# And whole files there: the personality, and what a security module calls the process.
cdef tuple SAME_FILES = (b"personality", b"attr/current")

# Variables that the interpreter or the C library heed when they start, and not later.
cdef tuple EARLY = (b"PYTHON", b"LD_", b"MALLOC_", b"GLIBC_TUNABLES")
cdef tuple LOCALE = (b"LC_ALL", b"LC_CTYPE", b"LANG")


class RefusedError(Exception):
    """This child cannot become what the launcher wants; the message says why, in a few words."""


cdef long checked(long result) except? -1:
    if result < 0:
        raise OSError(errno, os.strerror(errno))
    return result


# -- /proc -------------------------------------------------------------------------------------------------------------

cdef int directory_of(int pid) except -1:
    """A descriptor of /proc/PID; of this process's for 0."""
    cdef char path[32]
    if pid:
        snprintf(path, sizeof(path), "/proc/%d", pid)
    else:
        snprintf(path, sizeof(path), "/proc/self")
    return <int> checked(open(path, O_PATH | O_DIRECTORY | O_CLOEXEC))


cdef size_t read_at(int directory, const char *name, char *text) noexcept nogil:
    """A file's content and a NUL; nothing where it may not be read. text: TEXT bytes."""
    cdef int fd = openat(directory, name, O_RDONLY | O_CLOEXEC)
    cdef ssize_t size = 0
    if fd >= 0:
        size = max(read(fd, text, TEXT - 1), <ssize_t> 0)
        close(fd)
    text[size] = 0
    return <size_t> size


cdef const char *field(const char *status, const char *name) noexcept nogil:
    """Where a line of /proc/PID/status goes on behind its name; NULL where there is none."""
    cdef size_t size = strlen(name)
    while status != NULL:
        if not strncmp(status, name, size):
            return status + size
        status = strchr(status, c'\n')
        if status != NULL:
            status += 1
    return NULL


cdef size_t line_size(const char *text) noexcept nogil:
    cdef const char *end = strchr(text, c'\n')
    return strlen(text) if end == NULL else end - text


cdef bint has_same(const char *own, const char *theirs, const char *name) noexcept nogil:
    cdef const char *a = field(own, name)
    cdef const char *b = field(theirs, name)
    if a == NULL or b == NULL:
        return a == b
    return line_size(a) == line_size(b) and not memcmp(a, b, line_size(a))


cdef uint64_t number_of(const char *status, const char *name, int base) noexcept nogil:
    cdef const char *value = field(status, name)
    return 0 if value == NULL else strtoull(value, NULL, base)


cdef int namespace(int directory, str name, unsigned long *inode) except -1:
    cdef bytes path = b"ns/" + name.encode()
    inode[0] = inode_at(directory, path)
    if not inode[0] and errno != ENOENT:
        raise OSError(errno, os.strerror(errno))
    return 0


cdef class Home:
    """What the zygote is itself: whatever a launcher has alike needs no change in a child. Read once.

    title: where the kernel finds this process's arguments and environment, address and size.
    """

    cdef bytes status
    cdef list files
    cdef readonly dict namespaces, environment
    cdef dict early
    cdef readonly tuple title

    def __cinit__(self):
        cdef char text[TEXT]
        cdef unsigned long inode
        cdef int directory = directory_of(0)
        try:
            self.status = text[:read_at(directory, "status", text)]
            self.files = [text[:read_at(directory, name, text)] for name in SAME_FILES]
            self.namespaces = {}
            for name in (*MOVABLE, *FIXED):
                namespace(directory, name, &inode)
                self.namespaces[name] = inode
        finally:
            close(directory)
        self.title = title_place()
        self.environment = dict(os.environb)
        self.early = {name: value for name, value in self.environment.items() if name.startswith(EARLY)}


# -- the launcher ------------------------------------------------------------------------------------------------------

cdef class Launcher:
    """The process `pid` at the other end of the connection `fd`, whose request is read here. Raises RefusedError."""

    cdef int pid, fd
    cdef bytes message              # the strings, each with its NUL
    cdef launch_request request
    cdef int[64] fds                # as they were received
    cdef size_t arguments_size      # bytes of the strings that are arguments
    cdef dict environment
    cdef uint64_t ignored
    cdef uint32_t mask
    cdef bint gains_nothing

    def __init__(self, int fd, int pid, int patience_ms):
        cdef char text[MESSAGE_MAX]
        cdef ssize_t size
        cdef uint32_t received
        self.fd, self.pid = fd, pid
        if wait_readable(fd, patience_ms) <= 0:
            raise RefusedError("the launcher has sent nothing")
        size = receive_request(fd, text, self.fds, &received)
        if size < <ssize_t> sizeof(launch_request):
            if size == -1:
                checked(size)
            raise RefusedError("the request is too short or too long")
        memcpy(&self.request, text, sizeof(launch_request))
        self.message = text[sizeof(launch_request):size]
        version = (<char *> self.request.version)[:sizeof(self.request.version)].rstrip(b"\0")
        if version != _VERSION.encode():
            raise RefusedError(f"the launcher is of another version than the zygote, {_VERSION}")
        self.measure()
        self.check_descriptors(received)

    cdef int measure(self) except -1:
        """Count the strings."""
        cdef const char *text = self.message
        cdef size_t size = <size_t> len(self.message), at = 0
        cdef uint64_t count = 0, wanted = <uint64_t> self.request.arguments + self.request.variables
        while at < size and count < wanted:
            at += strlen(text + at) + 1     # a bytes object ends with a NUL
            count += 1
            if count == self.request.arguments:
                self.arguments_size = at
        if at != size or count != wanted or not self.request.arguments:
            raise RefusedError("the request's strings are not as many as it says")
        return 0

    cdef int check_descriptors(self, uint32_t received) except -1:
        cdef uint8_t[FD_LIMIT] seen
        cdef uint32_t i, count = self.request.fds
        cdef bint good = 3 <= count == received
        memset(seen, 0, sizeof(seen))
        for i in range(count if good else 0):
            good &= self.request.fd_numbers[i] < FD_LIMIT and not seen[self.request.fd_numbers[i] & (FD_LIMIT - 1)]
            seen[self.request.fd_numbers[i] & (FD_LIMIT - 1)] = 1
        if not good:
            raise RefusedError("the request's descriptors are not those that it names")
        return 0

    def arguments(self):
        """The command's, its name the first, and as one line."""
        cdef const char *text = self.message
        cdef const char *end = text + self.arguments_size
        cdef list found = []
        line = text[:end - text - 1].replace(b"\0", b" ")
        while text < end:
            found.append(PyUnicode_DecodeFSDefault(text))
            text += strlen(text) + 1
        return found, line

    # -- compared ------------------------------------------------------------------------------------------------

    def compare(self, Home home not None):
        """That the launcher is of a kind with the zygote, in what cannot be changed; what else differs (a set of bits)."""
        cdef char text[TEXT]
        cdef char own[TEXT]
        cdef unsigned long inode
        cdef int directory = directory_of(self.pid), self_directory = -1, root, differs = 0
        self.take_environment(home)
        try:
            read_at(directory, "status", text)
            for name in SAME:
                if not has_same(home.status, text, name):
                    raise RefusedError(f"{name.rstrip(b':').decode()} in /proc/PID/status differs")
            self.mask = <uint32_t> number_of(text, "Umask:", 8)
            self.ignored = number_of(text, "SigIgn:", 16)
            self.gains_nothing = number_of(text, "NoNewPrivs:", 10) > number_of(home.status, "NoNewPrivs:", 10)
            if number_of(text, "NoNewPrivs:", 10) < number_of(home.status, "NoNewPrivs:", 10):
                raise RefusedError("the zygote may gain no privileges, the launcher may")
            for name, content in zip(SAME_FILES, home.files):
                if text[:read_at(directory, name, text)] != content:
                    raise RefusedError(f"/proc/PID/{name.decode()} differs")
            for name in FIXED:
                namespace(directory, name, &inode)
                if inode != home.namespaces[name]:
                    raise RefusedError(f"it is in another {name} namespace")
            for name in MOVABLE:
                namespace(directory, name, &inode)
                if inode != home.namespaces[name]:
                    differs |= ELSEWHERE
            root = <int> checked(openat(directory, "root", O_PATH | O_CLOEXEC))
            if not is_root(root):
                differs |= ELSEWHERE
            close(root)
            self_directory = directory_of(0)
            read_at(self_directory, "cgroup", own)
            read_at(directory, "cgroup", text)
            if strlen(own) != strlen(text) or memcmp(own, text, strlen(own)):
                differs |= OTHER_CGROUPS
        finally:
            close(directory)
            if self_directory >= 0:
                close(self_directory)
        return differs

    cdef int take_environment(self, Home home) except -1:
        """The variables; of two with the same name the first."""
        cdef const char *at = <const char *> self.message + self.arguments_size
        cdef const char *end = <const char *> self.message + len(self.message)
        cdef const char *equals
        cdef size_t size
        self.environment, early = {}, {}
        while at < end:
            size = strlen(at)
            equals = <const char *> memchr(at, c'=', size)
            if equals != NULL and equals > at:
                name = at[:equals - at]
                if name not in self.environment:
                    self.environment[name] = value = (equals + 1)[:at + size - equals - 1]
                    if name.startswith(EARLY):
                        early[name] = value
            at += size + 1
        if early != home.early:
            raise RefusedError("a variable like PYTHON... or LD_... is not as the zygote has it")
        for name in LOCALE:
            locale = self.environment.get(name)
            if locale:
                if locale not in (b"C", b"POSIX") and b"utf8" not in locale.lower().replace(b"-", b""):
                    raise RefusedError("the locale's characters are not UTF-8")
                break
        return 0

    # -- become --------------------------------------------------------------------------------------------------

    def follow_processors(self):
        """Run where the launcher may, and be ended as soon as it for want of memory."""
        cdef uint8_t theirs[PROCESSORS]
        cdef uint8_t own[PROCESSORS]
        cdef char score[TEXT]
        cdef char before[TEXT]
        cdef size_t size
        cdef int directory = directory_of(self.pid), self_directory = -1, fd
        try:
            memset(theirs, 0, sizeof(theirs))
            memset(own, 0, sizeof(own))
            checked(get_processors(self.pid, theirs, sizeof(theirs)))
            checked(get_processors(0, own, sizeof(own)))
            if memcmp(theirs, own, sizeof(own)):
                checked(set_processors(theirs, sizeof(theirs)))
            self_directory = directory_of(0)
            size = read_at(directory, "oom_score_adj", score)
            if size != read_at(self_directory, "oom_score_adj", before) or memcmp(score, before, size):
                fd = <int> checked(openat(self_directory, "oom_score_adj", O_WRONLY | O_CLOEXEC))
                written = write(fd, score, size)
                close(fd)
                checked(written)
        finally:
            close(directory)
            if self_directory >= 0:
                close(self_directory)

    def follow_directory(self):
        """Be in the launcher's working directory, whose root is this process's."""
        cdef int directory = directory_of(self.pid), fd
        try:
            fd = <int> checked(openat(directory, "cwd", O_PATH | O_CLOEXEC))
        finally:
            close(directory)
        result = fchdir(fd)
        close(fd)
        checked(result)

    def asks_for(self, numbers):
        """Whether a descriptor is to have one of these numbers."""
        cdef uint32_t i
        return any([self.request.fd_numbers[i] in numbers for i in range(self.request.fds)])

    def place(self, kept=()):
        """Give each descriptor its number, and the connection one above the highest, the result; close others but `kept`."""
        cdef int[64] moved
        cdef uint8_t[FD_LIMIT] wanted
        cdef uint32_t i
        cdef int base = 0, line, fd
        memset(wanted, 0, sizeof(wanted))
        for i in range(self.request.fds):
            wanted[self.request.fd_numbers[i]] = 1
            base = max(base, <int> self.request.fd_numbers[i] + 1)
        while base in kept:
            base += 1
        # Out of each other's way first.
        for i in range(self.request.fds):
            moved[i] = <int> checked(fcntl(self.fds[i], F_DUPFD_CLOEXEC, base))
        line = <int> checked(fcntl(self.fd, F_DUPFD_CLOEXEC, base + 1))
        for i in range(self.request.fds):
            checked(dup2(moved[i], <int> self.request.fd_numbers[i]))
        checked(dup3(line, base, O_CLOEXEC))
        for fd in range(base):
            if not wanted[fd] and fd not in kept:
                close(fd)
        close_from(base + 1, kept)
        self.fd = base
        return base

    def follow_limits(self):
        """Have the launcher's resource limits and file mode mask."""
        cdef int which
        for which in range(LIMITS):
            checked(copy_limit(self.pid, which))
        umask(self.mask)

    def unlike_ignored(self):
        """Signals that the launcher was started to ignore and this process does not, or the reverse, with which it is.

        Those that every interpreter ignores, whatever its parent wanted, are not among them.
        """
        cdef uint64_t interpreters = (<uint64_t> 1 << (SIGPIPE - 1)) | (<uint64_t> 1 << (SIGXFSZ - 1))
        cdef uint64_t unlike = (self.ignored ^ ignored_signals()) & ~interpreters
        cdef int number
        if not unlike:
            return ()
        return [(number, bool(self.ignored >> (number - 1) & 1)) for number in range(1, 65) if unlike >> (number - 1) & 1]

    @property
    def gains_no_privileges(self):
        """Whether it has given up to gain any, and this process has not."""
        return self.gains_nothing

    def use_environment(self, Home home not None):
        """Have the launcher's environment, for Python and for C; whether the time zone is another."""
        global environ
        cdef char **variables
        cdef const char *at
        cdef const char *end
        cdef size_t count = 0
        if self.environment == home.environment:
            return False
        variables = <char **> calloc(self.request.variables + 1, sizeof(char *))
        if variables == NULL:
            raise MemoryError
        at = <const char *> self.message + self.arguments_size
        end = <const char *> self.message + len(self.message)
        while at < end:
            if strchr(at, c'=') > at:
                variables[count] = <char *> at
                count += 1
            at += strlen(at) + 1
        kept.append(self.message)
        environ = variables
        data = os.environb._data
        data.clear()
        data.update(self.environment)
        return self.environment.get(b"TZ") != home.environment.get(b"TZ")

    def begin(self, char kind):
        """Tell the launcher that it has its monitor; from now on the connection is this process's life."""
        cdef int own
        cdef ssize_t sent
        checked(fcntl(self.fd, F_SETOWN, getpid()))
        checked(fcntl(self.fd, F_SETSIG, SIGKILL))
        checked(fcntl(self.fd, F_SETFL, O_NONBLOCK | O_ASYNC))
        own = <int> checked(open_pid(getpid()))
        sent = send_answer(self.fd, kind, getpid(), own)
        close(own)
        checked(sent)

    def take_signals(self):
        """Have the launcher's signals blocked, and no others."""
        set_signal_mask(self.request.signal_mask)


# What `environ` points into.
cdef list kept = []
