"""What `crackle run` boots: its options, or a configuration file and what they change, as one microVM.

Works in the child process that `crackle.cli.run` makes.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

import msgspec

from crackle.errors import ConfigError, os_reason
from crackle.schema.drive import Overlay
from crackle.telemetry.sink import Sink

if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Iterator, Sequence

    from crackle import MicroVM
    from crackle.runtime.loop import Loop
    from crackle.schema.config import VmConfig
    from crackle.schema.jail import Jail
    from crackle.schema.net import NetworkInterface
    from crackle.schema.vsock import Vsock

_SIZE = re.compile(r"([0-9]+)\s*(?:(M|G)(?:i?B)?)?", re.IGNORECASE)

# What a configuration file may say that goes to another place here, or that MicroVM has no word for.
_NOT_HERE = (
    "logger",
    "metrics",
    "memory_hotplug",
)


def parse_memory(text: str) -> int:
    """MiB of a size as a user writes it: 512, 512M, 1G."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise ConfigError(f"{text!r} is not an amount of memory like 512 (MiB), 512M or 2G.")
    return int(found[1]) * (1024 if (found[2] or "").upper() == "G" else 1)


class Wanted(msgspec.Struct, kw_only=True):
    """What the command line says; None and empty for what it does not."""

    kernel: str | None = None
    rootfs: str | None = None
    initrd: str | None = None
    drives: Sequence[str] = ()
    cpus: int | None = None
    memory: int | None = None
    boot_args: str | None = None
    append: Sequence[str] = ()
    read_only: bool = False
    overlay: str | None = None
    vsock: str | None = None
    balloon: int | None = None
    entropy: bool = False
    metadata: str | None = None
    config: str | None = None
    jail: str | None = None
    core_scheduling: bool = False
    cpu_template: str | None = None


def options(wanted: Wanted) -> dict[str, Any]:
    """The arguments of `MicroVM`. ConfigError for what cannot be."""
    from crackle.vmm.microvm import DEFAULT_BOOT_ARGS

    found: dict[str, Any] = {"memory": 256, "boot_args": DEFAULT_BOOT_ARGS}
    if wanted.config is not None:
        found |= _from_file(wanted.config)
    given = {
        "kernel": wanted.kernel,
        "initrd": wanted.initrd,
        "cpus": wanted.cpus,
        "memory": wanted.memory,
        "boot_args": wanted.boot_args,
        "vsock": wanted.vsock,
        "balloon": wanted.balloon,
        "entropy": wanted.entropy or None,
        "cpu_template": wanted.cpu_template,
    }
    found |= {name: value for name, value in given.items() if value is not None}
    if wanted.rootfs is not None:
        if any(not isinstance(drive, str) and drive.is_root_device for drive in found.get("drives", ())):
            raise ConfigError(
                f"The root disk {wanted.rootfs} is given, and {wanted.config} has one: leave out one."
            )
        found |= {"rootfs": wanted.rootfs, "read_only": wanted.read_only}
    if wanted.overlay is not None:
        if wanted.rootfs is None:
            raise ConfigError("--overlay takes the writes of the root disk: give one.")
        found["overlay"] = Overlay(memory=True) if wanted.overlay == "memory" else wanted.overlay
    found["drives"] = [*found.get("drives", ()), *wanted.drives]
    found["boot_args"] = " ".join([found["boot_args"], *wanted.append]).strip()
    if wanted.metadata is not None:
        found["metadata"] = _json(wanted.metadata)
    if wanted.jail is not None:
        found["jail"] = _jail(wanted.jail, found.get("vsock"))
    if wanted.core_scheduling:
        found["core_scheduling"] = True
    if "kernel" not in found:
        raise ConfigError("There is no kernel: give one, or a configuration file with --config.")
    return found


def _jail(text: str, vsock: Vsock | str | None) -> Jail:
    """Of a user and a group; it sees the folder of vsock's socket."""
    from crackle.schema.jail import Jail

    user, group = parse_user(text)
    path = vsock if vsock is None or isinstance(vsock, str) else vsock.uds_path
    paths = () if path is None else (os.path.dirname(os.path.abspath(path)),)
    return Jail(uid=user, gid=group, paths=paths)


def parse_user(text: str) -> tuple[int, int]:
    """The numbers of a user and a group, which is the user's if none is given, as --jail has them."""
    user, colon, group = text.partition(":")
    ids = [user, group if colon else user]
    if not all(each.isascii() and each.isdecimal() for each in ids):
        raise ConfigError(
            f"{text!r} is no user that --jail knows: give its number, as in 20000 or 20000:20000."
        )
    return int(ids[0]), int(ids[1])


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {os_reason(error)}.") from None


def _json(path: str) -> Any:
    try:
        return msgspec.json.decode(_read(path))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None


def _from_file(path: str) -> dict[str, Any]:
    """Arguments of `MicroVM` that say the same as a configuration file of crackle-vmm."""
    from crackle.schema.codec import decode, explain
    from crackle.schema.config import VmConfig

    text = _read(path)
    try:
        config = decode(text, VmConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {explain(error, VmConfig, text)}") from None
    for name in _NOT_HERE:
        if getattr(config, name):
            section = name.replace("_", "-")
            raise ConfigError(
                f"{path}: crackle run has no use for the section {section!r}: leave it out, or use crackle-vmm."
            )
    return _arguments(config)


def _arguments(config: VmConfig) -> dict[str, Any]:
    source, machine = config.boot_source, config.machine_config
    found: dict[str, Any] = {
        "kernel": source.kernel_image_path,
        "initrd": source.initrd_path,
        "drives": config.drives,
        "interfaces": config.network_interfaces,
        "vsock": config.vsock,
        "balloon": config.balloon,
        "entropy": config.entropy or False,
        "pmem": config.pmem,
        "mmds": config.mmds_config,
    }
    if source.boot_args is not None:
        found["boot_args"] = source.boot_args
    if machine is not None:
        found |= {
            "cpus": machine.vcpu_count,
            "memory": machine.mem_size_mib,
            "smt": machine.smt,
            "huge_pages": machine.huge_pages,
            "cpu_template": machine.cpu_template or None,
            "track_dirty_pages": machine.track_dirty_pages,
        }
    if config.cpu_config is not None:
        found["cpu_template"] = config.cpu_config
    return found


def make(
    arguments: dict[str, Any], interfaces: Sequence[NetworkInterface], console: tuple[int, int]
) -> MicroVM:
    """The microVM, not started yet. Raises CrackleError."""
    from crackle import MicroVM

    if "jail" not in arguments and arguments.get("core_scheduling"):
        # This process is the microVM's.
        from crackle.runtime.cores import share_no_core

        share_no_core()
        arguments = {name: value for name, value in arguments.items() if name != "core_scheduling"}
    interfaces = [*arguments.get("interfaces", ()), *interfaces]
    return MicroVM(**arguments | {"interfaces": interfaces}, console=console)


@contextlib.contextmanager
def attending(listener: socket | None, vm: MicroVM, loop: Loop) -> Iterator[None]:
    """While the guest runs: the API on `listener`, if there is one, and an ear for silence that has a reason."""
    server = None
    if listener is not None:
        from crackle.api.server import DEFAULT_PAYLOAD_LIMIT, ApiServer
        from crackle.vmm.controller import Controller

        assert isinstance(vm._controller, Controller), "it is in this process"
        server = ApiServer(loop, listener, vm._controller, DEFAULT_PAYLOAD_LIMIT)

    vm.silence(_tell).watch(loop)
    try:
        yield
    finally:
        if server is not None:
            server.close()


def _tell(sentence: str) -> None:
    # The terminal is raw.
    text = f"\r\ncrackle: {sentence[0].lower()}{sentence[1:]}\r\n"
    messages = Sink(2)
    messages.write(text.encode(errors="backslashreplace"))
    messages.close()


@contextlib.contextmanager
def listening(path: str | None) -> Iterator[socket | None]:
    """A listening Unix socket for the API at `path`, removed at the end; None for none."""
    if path is None:
        yield None
        return
    import _socket

    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        try:
            listener.bind(path)
            listener.listen(128)
        except OSError as error:
            raise ConfigError(f"Cannot listen on the API socket {path}: {os_reason(error)}.") from None
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        listener.close()
