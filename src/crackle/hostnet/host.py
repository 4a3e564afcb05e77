"""What the host says of itself: its name servers, and what this process may do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from ipaddress import IPv4Address

from crackle.errors import ConfigError

NOT_ALLOWED = (
    "Changing the network needs CAP_NET_ADMIN: run as root, or in a network namespace of your own "
    "(unshare --user --map-root-user --net)."
)

_CAP_NET_ADMIN = 12
_CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
_RESOLVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
_RESOLVERS_SIZE = 65536


def may_change_networks() -> bool:
    """Whether this process has CAP_NET_ADMIN where it is."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    return ctypes.CDLL(None).capget(header, data) == 0 and bool(data[0] >> _CAP_NET_ADMIN & 1)


def refusal(what: str, code: int | None) -> ConfigError:
    """The error that says `what` could not be done, and why. Who lacks the permission to is told how to get it; who has
    it already, what was refused."""
    if code in (errno.EPERM, errno.EACCES) and not may_change_networks():
        return ConfigError(NOT_ALLOWED)
    return ConfigError(f"{what}: {os.strerror(code or 0)}.")


def check_tun() -> None:
    """ConfigError that names /dev/net/tun if TAP devices cannot be made through it."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise ConfigError(
            "There is no /dev/net/tun, through which TAP devices are made: load the tun module, or make the file "
            "(mknod /dev/net/tun c 10 200)."
        ) from None
    except OSError as error:
        advice = (
            "load the tun module"
            if error.errno in (errno.ENODEV, errno.ENXIO)
            else "give this user, or this container, the right to read and write it"
        )
        raise ConfigError(f"Cannot open /dev/net/tun: {os.strerror(error.errno or 0)}; {advice}.") from None


def name_servers() -> list[list[IPv4Address]]:
    """The IPv4 name servers in each of the host's files that name some: resolv.conf(5), and systemd-resolved's own."""
    return [found for path in _RESOLVERS if (found := _servers(_lines(path)))]


def guests_name_servers() -> list[str]:
    """The host's name servers that a guest can reach too: IPv4, and not on the host's loopback."""
    for servers in name_servers():
        found = [
            str(each)
            for each in servers
            if not (each.is_loopback or each.is_unspecified or each.is_multicast or each.is_reserved)
        ]
        if found:
            return found
    return []


def _lines(path: str) -> list[bytes]:
    # Whatever it is: a pipe that nobody writes to is not waited for.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        return os.read(fd, _RESOLVERS_SIZE).splitlines()
    except OSError:
        return []
    finally:
        os.close(fd)


def _servers(lines: list[bytes]) -> list[IPv4Address]:
    found = []
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == b"nameserver":
            with contextlib.suppress(ValueError):
                found.append(IPv4Address(words[1].decode("ascii")))
    return found
