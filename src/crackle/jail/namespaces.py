"""Where a process is: its mounts and root, its network, its session and its process namespace (namespaces(7))."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import contextlib
import os

from crackle.errors import ConfigError, step
from crackle.runtime.system import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    attach_tree,
    clone_tree,
    detach_old_root,
    follow_host_mounts,
    join_namespace,
    pivot_root,
    unshare,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def leave_mounts() -> None:
    """Have a mount namespace of one's own, of which the host's sees nothing. Raises ConfigError."""
    try:
        unshare(CLONE_NEWNS)
    except PermissionError:
        raise ConfigError(
            "Failed to unshare into new mount namespace: run the jailer as root, "
            f"user {os.geteuid()} may not (os error 1)"
        ) from None
    with step("Failed to change the propagation type to slave"):
        follow_host_mounts()


def join_network(path: str) -> None:
    """Raises ConfigError."""
    with step(f"Failed to open file {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with step("Failed to join network namespace: netns"):
            join_namespace(fd, CLONE_NEWNET)
    finally:
        os.close(fd)


def mount_on_itself(folder: int) -> int:
    """The folder, with what is mounted in it, as a mount of its own: a descriptor of that. Raises ConfigError."""
    with step("Failed to bind mount the jail root directory"):
        tree = clone_tree(folder)
        try:
            attach_tree(tree, folder)
        except BaseException:
            os.close(tree)
            raise
    return tree


def enter_root(mount: int) -> None:
    """Have a mount, of which this is a descriptor, as root and working directory, and no other. Raises ConfigError."""
    with step("Failed to pivot root"):
        os.fchdir(mount)
        # Onto itself: the old root is above it then, and needs no folder.
        pivot_root()
    with step("Failed to unmount the old jail root"):
        own = os.fstat(mount)
        # What is mounted above the root is where its `..` leads.
        while not os.path.samestat(os.stat("/.."), own):
            detach_old_root()
        os.chdir("/")


def daemonize(null: int) -> None:
    """Go on in a grandchild, in a session without terminal, its streams `null`; the others end with status 0.

    Raises ConfigError.
    """
    for leads in (True, False):
        with step("Failed to daemonize"):
            if os.fork():
                os._exit(0)
            if leads:
                os.setsid()
    for fd in range(3):
        os.dup2(null, fd)


@contextlib.contextmanager
def new_processes() -> Iterator[None]:
    """What is forked meanwhile is process 1 of a namespace of its own, and the forker's child. Raises ConfigError."""
    with step("Failed to make a process namespace"):
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            unshare(CLONE_NEWPID)
        except BaseException:
            os.close(own)
            raise
    try:
        yield
    finally:
        join_namespace(own, CLONE_NEWPID)
        os.close(own)


def enter_processes(write_pid: Callable[[int], object]) -> None:
    """Go on as process 1 of a new namespace, once `write_pid` was told its number outside; there it ends, status 0.

    Raises ConfigError, in either.
    """
    # Without a session of its own it would be hung up when the one that leads it ends.
    leads = os.getsid(0) == os.getpid()
    waits, told = os.pipe()
    with step("Failed cloning into a new child process"):
        unshare(CLONE_NEWPID)
        pid = os.fork()
    if pid:
        try:
            write_pid(pid)
        except BaseException:
            os.kill(pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        os.write(told, b"\0")
        os._exit(0)
    os.close(told)
    if not os.read(waits, 1):
        os._exit(1)
    os.close(waits)
    if leads:
        with step("Failed to daemonize: setsid"):
            os.setsid()
