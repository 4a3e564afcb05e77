"""For people: what a snapshot is of; what it names changed; and a differential one's memory merged into its base's."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from types import MappingProxyType

import msgspec

from crackle.errors import ConfigError, context, step
from crackle.memory.dump import copy_data
from crackle.schema.snapshot import DriveOverride, NetworkOverride, SnapshotLoad, VsockOverride
from crackle.snapshot import statefile
from crackle.snapshot.overrides import override
from crackle.snapshot.pair import read_state
from crackle.telemetry.logger import instance_id_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NOTHING: Mapping[str, str] = MappingProxyType({})


def describe(path: str) -> Iterator[tuple[str, str]]:
    """What is in a state file, line by line: (name, value). ConfigError when it is none."""
    try:
        data = read_state(path)
        snapshot = statefile.decode(data)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be shown: {error}") from None
    machine, config = snapshot.machine, snapshot.config
    assert config.machine_config is not None
    yield "format", statefile.version_text(statefile.describe(data))
    yield "written by", f"Crackle {snapshot.crackle}"
    yield "taken", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(snapshot.created_ms // 1000))
    yield "of", snapshot.instance_id
    yield "kind", "full" if snapshot.memory.whole else "differential"
    yield "id", snapshot.id
    yield "vCPUs", str(len(machine.vcpus))
    yield "memory", f"{snapshot.memory.size >> 20} MiB"
    for gpa, length in machine.memory:
        yield "  region", f"{gpa:#x} to {gpa + length - 1:#x}"
    yield "kernel", config.boot_source.kernel_image_path
    paths: dict[tuple[str, str], str | None] = {
        **{("block", drive.drive_id): drive.path_on_host for drive in config.drives},
        **{("net", card.iface_id): card.host_dev_name for card in config.network_interfaces},
        **{("pmem", pmem.id): pmem.path_on_host for pmem in config.pmem},
        ("vsock", "vsock"): None if config.vsock is None else config.vsock.uds_path,
    }
    for device in machine.devices:
        file = paths.get((device.kind, device.identifier))
        where = f"at {device.transport.address:#x}, interrupt {device.transport.gsi}"
        yield "device", f"{device.kind} {device.identifier} {where}" + (f", {file}" if file else "")


def rebase(base: str, diff: str) -> None:
    """Merge what is in `diff` into `base`, which is replaced whole or not at all. ConfigError leaves it."""
    with contextlib.ExitStack() as stack:
        fds = []
        for path in (base, diff):
            with step("cannot open the memory file", path):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                stack.callback(os.close, fd)
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(22, "It is no regular file")
                fds.append(fd)
        sizes = [os.fstat(fd).st_size for fd in fds]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"{diff} is no differential snapshot of {base}: it has {sizes[1]} bytes, the other {sizes[0]}"
            )
        if os.path.samefile(base, diff):
            raise ConfigError(f"{diff} and {base} are the same file")
        mode = stat.S_IMODE(os.fstat(fds[0]).st_mode)
        with step("cannot write the merged memory file", base), _replaced(base, mode) as out:
            os.ftruncate(out, sizes[0])
            for fd in fds:
                copy_data(fd, out, sizes[0])


def edit(
    path: str,
    *,
    drives: Mapping[str, str] = NOTHING,
    interfaces: Mapping[str, str] = NOTHING,
    vsock: str | None = None,
    instance_id: str | None = None,
) -> None:
    """Have a state file name other things of the host; it is replaced whole or not at all, and its memory file stays.

    drives, interfaces: files and TAP devices, by the identifiers that the snapshot has for them. vsock: the path of the
    Unix socket. instance_id: what it was taken of. ConfigError, and nothing has changed, for what it does not have.
    """
    with context(f"{path} cannot be changed"):
        if instance_id is not None and (problem := instance_id_problem(instance_id)) is not None:
            raise ConfigError(problem)
        snapshot = override(
            statefile.decode(read_state(path)),
            SnapshotLoad(
                path,
                drive_overrides=[DriveOverride(name, file) for name, file in drives.items()],
                network_overrides=[NetworkOverride(name, tap) for name, tap in interfaces.items()],
                vsock_override=None if vsock is None else VsockOverride(vsock),
            ),
        )
        if instance_id is not None:
            snapshot = msgspec.structs.replace(snapshot, instance_id=instance_id)
        with step("Cannot write the state file", path):
            mode = stat.S_IMODE(os.stat(path).st_mode)
            with _replaced(path, mode) as out, open(out, "wb", closefd=False) as file:
                file.write(statefile.encode(snapshot))


@contextlib.contextmanager
def _replaced(path: str, mode: int) -> Iterator[int]:
    """A new file, open, that takes the place of the one at `path` when it is written. OSError leaves that as it is."""
    target = os.path.realpath(path)
    # A name as `pair` takes away, should this be killed.
    temporary = f"{target}.{os.urandom(16).hex()}"
    out = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        yield out
        os.fsync(out)
        os.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(out)
