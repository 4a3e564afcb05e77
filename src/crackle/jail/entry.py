"""Entering a jail: the order of what is made, and that all of it is taken back when a step fails."""

from __future__ import annotations

import os
import time

from crackle.errors import step
from crackle.jail.folder import Folder
from crackle.jail.namespaces import (
    daemonize,
    enter_processes,
    enter_root,
    join_network,
    leave_mounts,
    mount_on_itself,
)
from crackle.jail.privileges import drop, open_proc, set_limits
from crackle.jail.undo import Undo
from crackle.runtime.mappings import kept_open
from crackle.runtime.system import close_from, load_unwinder, set_title, title_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.jail.options import Wanted


def enter(jail: Wanted, started_us: int, kept: Sequence[int] = ()) -> list[str]:
    """Be in the jail, forked if it is to be a daemon or process 1; the arguments of the monitor in it.

    started_us: when the jailer began, of the monotonic clock. kept: descriptors that stay open in this process itself,
    beside the standard streams. What is wanted later has to be imported before: there is no file of Python in a jail.
    Raises ConfigError, with nothing left behind.
    """
    undo = Undo()
    try:
        place = title_place()
        used = _enter(jail, undo)
    except BaseException:
        undo.run()
        raise
    undo.close()
    close_from(3, (*(() if jail.daemonize or jail.new_pid_ns else kept), *kept_open()))
    arguments = monitor_arguments(jail, started_us, _processor_time(), used)
    # In ps(1) and /proc, as the executable that Firecracker's jailer would have executed.
    line = " ".join((f"/{jail.exec_name}", *arguments))
    set_title(*place, os.fsencode(line), os.fsencode(jail.exec_name)[:15])
    return arguments


def monitor_arguments(
    jail: Wanted, started_us: int = 0, started_cpu_us: int = 0, used_us: int = 0
) -> list[str]:
    """What Firecracker's jailer adds to those that it is given for the monitor."""
    return [
        *("--id", jail.id),
        *("--start-time-us", str(started_us)),
        *("--start-time-cpu-us", str(started_cpu_us)),
        *("--parent-cpu-time-us", str(used_us)),
        *jail.extra,
    ]


def _enter(jail: Wanted, undo: Undo) -> int:
    """The microseconds of processor time that it has taken."""
    load_unwinder()
    leave_mounts()
    folder = Folder(jail, undo)
    if jail.netns is not None:
        join_network(jail.netns)
    if jail.cgroups is not None:
        jail.cgroups.join(undo)
    null = -1
    if jail.daemonize:
        with step("Failed to open /dev/null"):
            null = undo.hold(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
    proc = open_proc(undo)
    folder.furnish()
    folder.make_pid_file()
    enter_root(undo.hold(mount_on_itself(folder.root)))
    # As the files there are: those of the host's clock are not.
    time.tzset()
    folder.hand_over()
    set_limits(jail.file_size, jail.no_file)
    used = _processor_time()
    if jail.daemonize:
        daemonize(null)
    if jail.new_pid_ns:
        enter_processes(folder.write_pid)
    else:
        folder.write_pid(os.getpid())
    drop(jail.uid, jail.gid, proc)
    return used


def _processor_time() -> int:
    return time.process_time_ns() // 1000
