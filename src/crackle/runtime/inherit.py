"""What a process inherits from the one that starts it, for a child of the zygote: the launcher's child in all but name.

Arguments, environment, signal mask and descriptors come in the launcher's message (`src/crackle/launch/launch.c` has
its other half); the rest is read from the launcher's /proc, where the kernel vouches for it. What differs from what the
child has already is changed. What cannot be is a `RefusedError`, and the launcher executes the monitor itself.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import fcntl
import os
import resource
import select
import struct
import time

from crackle.runtime.system import close_from, copy_scheduling, join_namespace, set_no_new_privs, set_title
from crackle.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# The request: version, signal mask, numbers of arguments, variables and descriptors, the descriptors' numbers.
_FDS_MAX = 64
_FD_LIMIT = 1024
_MESSAGE_MAX = 128 << 10
_REQUEST = struct.Struct(f"=32sQ3I{_FDS_MAX}I4x")
# An answer: kind, reason, status of wait(2).
_ANSWER = struct.Struct("=c119si")
STARTS, REFUSES, WILL, ENDED = b"S", b"R", b"W", b"E"

# Seconds that a launcher has for its message.
_PATIENCE_S = 1.0

# Lines of /proc/PID/status that have to be the same; those missing are the same.
_SAME = (
    *(b"Uid", b"Gid", b"Groups", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb"),
    *(b"Seccomp", b"Seccomp_filters", b"Mems_allowed"),
)
# And whole files there: the personality, and what a security module calls the process.
_SAME_FILES = ("personality", "attr/current")
# Namespaces that a process can move to, the mount namespace last; and those that it is born in.
_MOVABLE = ("net", "uts", "ipc", "cgroup", "mnt")
_FIXED = ("user", "pid", "pid_for_children", "time", "time_for_children")

# Variables that the interpreter or the C library heed when they start, and not later.
_EARLY = (b"PYTHON", b"LD_", b"MALLOC_", b"GLIBC_TUNABLES")
_LOCALE = (b"LC_ALL", b"LC_CTYPE", b"LANG")

# Ignored by every interpreter, whatever its parent wanted.
_INTERPRETERS = (1 << _signal.SIGPIPE - 1) | (1 << _signal.SIGXFSZ - 1)
_SIGNALS = sorted(_signal.valid_signals())

_LIMITS = range(16)  # RLIMIT_*, <asm-generic/resource.h>


class RefusedError(Exception):
    """This child cannot become what the launcher wants; the message says why, in a few words."""


def answer(connection: _socket.socket, kind: bytes, reason: str = "", status: int = 0, fd: int = -1) -> None:
    """Tell the launcher. One that has gone, or reads nothing, is not waited for: OSError."""
    rights = [] if fd < 0 else [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", fd))]
    message = _ANSWER.pack(kind, reason.encode(errors="replace")[:118], status)
    connection.sendmsg([message], rights, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)


def status_of(message: bytes) -> int:
    """The status of wait(2) that an answer has; as of an end that nobody has seen where it is none."""
    return int(_ANSWER.unpack(message)[2]) if len(message) == _ANSWER.size else 0


class Home:
    """What the zygote is itself: whatever a launcher has alike needs no change in a child. Read once."""

    def __init__(self) -> None:
        self.status = _fields(_read("/proc/self/status"))
        self.files = [_read(f"/proc/self/{name}") for name in _SAME_FILES]
        self.namespaces = {name: _namespace("self", name) for name in (*_MOVABLE, *_FIXED)}
        self.environment = dict(os.environb)
        self.early = _early(self.environment)
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        # arg_start and env_end (proc(5), 48 and 51; the list begins with the third).
        self.title = int(fields[45]), int(fields[48]) - int(fields[45])


def alone(connection: _socket.socket) -> _socket.socket:
    """Close everything but the standard streams and `connection`, which is another object from now on."""
    number = 3
    if connection.fileno() == number:
        close_from(number + 1)
        return connection
    os.dup2(connection.detach(), number, inheritable=False)
    close_from(number + 1)
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, number)


def adopt(connection: _socket.socket, launcher: int, home: Home) -> tuple[_socket.socket, list[str]]:
    """Become what `launcher` asks for on `connection`, and tell it so; the connection, and the command's arguments.

    To be called in a forked child, with signals blocked. Afterwards they are as the launcher had them, and nothing is
    open but what it handed over and, above that, the connection: the lifeline, at whose other end's end the kernel
    kills this process. Raises RefusedError.
    """
    try:
        mask, strings, count, fds = _receive(connection)
        arguments, variables = strings[:count], strings[count:]
        theirs = f"/proc/{launcher}"
        status = _fields(_read(f"{theirs}/status"))
        environment = _environment(variables, home)
        _check(theirs, status, home)
        _join_cgroups(theirs)
        _copy_scheduling(launcher, theirs)
        _move(theirs, home)
        lifeline = _place(connection, fds)
        _copy_limits(launcher)
        os.umask(int(status[b"Umask"], 8))
        if status[b"NoNewPrivs"] != home.status[b"NoNewPrivs"]:
            set_no_new_privs()
        _ignore(int(status[b"SigIgn"], 16))
        _use_environment(environment, home)
        set_title(*home.title, b" ".join((b"crackle-vmm", *arguments[1:])), b"crackle-vmm")
        _begin(lifeline)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, list(_numbers(mask)))
    except (OSError, ValueError, KeyError) as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    return lifeline, [os.fsdecode(argument) for argument in arguments[1:]]


def _read(path: str) -> bytes:
    """A file of /proc; nothing where it may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _fields(status: bytes) -> dict[bytes, bytes]:
    return dict(line.split(b":\t", 1) for line in status.splitlines() if b":\t" in line)


def _namespace(pid: str, name: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/{name}").st_ino
    except FileNotFoundError:
        return 0


def _early(environment: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {name: value for name, value in environment.items() if name.startswith(_EARLY)}


def _numbers(mask: int) -> Iterator[int]:
    return (number for number in _SIGNALS if mask >> number - 1 & 1)


# -- the request -------------------------------------------------------------------------------------------------------


def _receive(connection: _socket.socket) -> tuple[int, list[bytes], int, dict[int, int]]:
    """Signal mask, arguments and variables, the number of the former, and received descriptors by their numbers."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if not poll.poll(_PATIENCE_S * 1000):
        raise RefusedError("the launcher has sent nothing")
    space = _socket.CMSG_SPACE(_FDS_MAX * 4)
    message, control, flags, _ = connection.recvmsg(_MESSAGE_MAX, space, _socket.MSG_CMSG_CLOEXEC)
    if len(message) < _REQUEST.size or flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
        raise RefusedError("the request is too short or too long")
    version, mask, arguments, variables, count, *numbers = _REQUEST.unpack_from(message)
    if version.rstrip(b"\0") != VERSION.encode():
        raise RefusedError(f"the launcher is of another version than the zygote, {VERSION}")
    received = [
        fd
        for level, kind, data in control
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("=i", data[: len(data) & ~3])
    ]
    *strings, rest = message[_REQUEST.size :].split(b"\0")
    numbers = numbers[:count]
    if rest or len(strings) != arguments + variables or not arguments:
        raise RefusedError("the request's strings are not as many as it says")
    if not 3 <= count == len(received) == len(set(numbers)) or max(numbers) >= _FD_LIMIT:
        raise RefusedError("the request's descriptors are not those that it names")
    return mask, strings, arguments, dict(zip(numbers, received, strict=True))


def _environment(variables: list[bytes], home: Home) -> dict[bytes, bytes]:
    environment: dict[bytes, bytes] = {}
    for variable in variables:
        name, equals, value = variable.partition(b"=")
        if name and equals:
            environment.setdefault(name, value)
    if _early(environment) != home.early:
        raise RefusedError("a variable like PYTHON... or LD_... is not as the zygote has it")
    locale = next(filter(None, map(environment.get, _LOCALE)), b"C")
    if locale not in (b"C", b"POSIX") and b"utf8" not in locale.lower().replace(b"-", b""):
        raise RefusedError("the locale's characters are not UTF-8")
    return environment


def _check(theirs: str, status: dict[bytes, bytes], home: Home) -> None:
    """That the launcher is of a kind with the zygote, in what cannot be changed."""
    for field in _SAME:
        if status.get(field) != home.status.get(field):
            raise RefusedError(f"{field.decode()} in /proc/PID/status differs")
    if status[b"NoNewPrivs"] < home.status[b"NoNewPrivs"]:
        raise RefusedError("the zygote may gain no privileges, the launcher may")
    for name, own in zip(_SAME_FILES, home.files, strict=True):
        if _read(f"{theirs}/{name}") != own:
            raise RefusedError(f"/proc/PID/{name} differs")
    for name in _FIXED:
        if _namespace(theirs[6:], name) != home.namespaces[name]:
            raise RefusedError(f"it is in another {name} namespace")


# -- where it lives ----------------------------------------------------------------------------------------------------


def _join_cgroups(theirs: str) -> None:
    """Be in the launcher's cgroups before anything of weight is charged to others (cgroups(7), both versions)."""
    before, after = _read("/proc/self/cgroup"), _read(f"{theirs}/cgroup")
    if before == after:
        return
    own = set(before.splitlines())
    for line in after.splitlines():
        if line in own:
            continue
        _, hierarchy, path = line.split(b":", 2)
        fd = os.open(_cgroup_directory(hierarchy, path) + b"/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def _cgroup_directory(hierarchy: bytes, path: bytes) -> bytes:
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(b" - ")
        root, place = left.split()[3:5]
        kind, _, options = right.split(b" ", 2)
        mounted = (
            kind == b"cgroup2"
            if not hierarchy
            else (kind == b"cgroup" and set(hierarchy.split(b",")) <= set(options.split(b",")))
        )
        if mounted and (root == b"/" or path == root or path.startswith(root + b"/")):
            return place + (path if root == b"/" else path[len(root) :])
    raise RefusedError("its cgroup is not mounted here")


def _copy_scheduling(launcher: int, theirs: str) -> None:
    """Processors, policy and priorities, and how soon the kernel ends it for want of memory."""
    processors = os.sched_getaffinity(launcher)
    if processors != os.sched_getaffinity(0):
        os.sched_setaffinity(0, processors)
    copy_scheduling(launcher)
    score = _read(f"{theirs}/oom_score_adj")
    if score != _read("/proc/self/oom_score_adj"):
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(score)


def _move(theirs: str, home: Home) -> None:
    """To the launcher's namespaces, root and directory."""
    flags = os.O_PATH | os.O_CLOEXEC
    directory = os.open(f"{theirs}/cwd", flags)
    others = [name for name in _MOVABLE if _namespace(theirs[6:], name) != home.namespaces[name]]
    root = os.open(f"{theirs}/root", flags)
    # All are opened before the mount namespace, and with it /proc, is another.
    for fd in [os.open(f"{theirs}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in others]:
        join_namespace(fd)
    if not os.path.samestat(os.fstat(root), os.stat("/")):
        os.fchdir(root)
        os.chroot(".")
    os.fchdir(directory)


# -- what it has -------------------------------------------------------------------------------------------------------


def _place(connection: _socket.socket, fds: dict[int, int]) -> _socket.socket:
    """Give each descriptor its number, and the connection the one above the highest; close all others."""
    base = max(fds) + 1
    # Out of each other's way first.
    moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base) for number, fd in fds.items()}
    line = fcntl.fcntl(connection.detach(), fcntl.F_DUPFD_CLOEXEC, base + 1)
    for number, fd in moved.items():
        os.dup2(fd, number)
    os.dup2(line, base, inheritable=False)
    for number in set(range(base)) - fds.keys():
        with contextlib.suppress(OSError):
            os.close(number)
    close_from(base + 1)
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, base)


def _copy_limits(launcher: int) -> None:
    for limit in _LIMITS:
        wanted = resource.prlimit(launcher, limit)
        if resource.getrlimit(limit) != wanted:
            resource.setrlimit(limit, wanted)


def _ignore(wanted: int) -> None:
    """Ignore the signals that the launcher was started to ignore, and no others, as exec(2) leaves it."""
    now = int(_fields(_read("/proc/self/status"))[b"SigIgn"], 16)
    for number in _numbers((wanted ^ now) & ~_INTERPRETERS):
        if _signal.getsignal(number) is not None:  # one that the core handles stays with it
            _signal.signal(number, _signal.SIG_IGN if wanted >> number - 1 & 1 else _signal.SIG_DFL)


def _use_environment(environment: dict[bytes, bytes], home: Home) -> None:
    if environment == home.environment:
        return
    zone = os.environb.get(b"TZ")
    for name in os.environb.keys() - environment.keys():
        del os.environb[name]
    for name, value in environment.items():
        if os.environb.get(name) != value:
            os.environb[name] = value
    if environment.get(b"TZ") != zone:
        time.tzset()


def _begin(lifeline: _socket.socket) -> None:
    """Tell the launcher that it has its monitor; from now on it is this process's life."""
    fd = lifeline.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, _signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    own = os.pidfd_open(os.getpid())
    answer(lifeline, STARTS, status=os.getpid(), fd=own)
    os.close(own)
