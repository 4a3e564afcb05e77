"""Every program that this project calls on the host, and the Debian package it comes from: the one list of them.

`tools/setup-host` installs these packages, and `tests/unit/test_setup.py` compares the list with what sources, tests
and documents call, and with what is installed.
"""

from __future__ import annotations

from typing import NamedTuple


class Package(NamedTuple):
    """A package: what for, and which of its programs are called."""

    why: str
    programs: tuple[str, ...] = ()


NEEDED = {
    "liburing-dev": Package("io_uring, for drives with the Async engine: the core is compiled with it"),
    "libseccomp-dev": Package("filters of system calls: compiles the policy, and those of users"),
    "strace": Package("which system calls are made, for the test of the seccomp policy", ("strace",)),
    "qemu-system-x86": Package("the emulated host", ("qemu-system-x86_64",)),
    "qemu-system-common": Package("serves disks by vhost-user", ("qemu-storage-daemon",)),
    "acpica-tools": Package("the tests read the ACPI tables with it", ("iasl",)),
    "containernetworking-plugins": Package("networks that `crackle cni` is chained after"),
    "curl": Package("a client of the API, of guests, and in guests", ("curl",)),
    "e2fsprogs": Package("disk images", ("mke2fs", "debugfs", "e2fsck")),
    "ethtool": Package("offloads of interfaces, in guests", ("ethtool",)),
    "fio": Package("the yardstick of the block benchmarks, and a tester of disks in guests", ("fio",)),
    "iperf3": Package("streams of data between guests and host", ("iperf3",)),
    "iproute2": Package("tap devices and network namespaces", ("ip", "ss", "tc")),
    "iputils-ping": Package("in the tests' network namespaces", ("ping",)),
    "nftables": Package("the rules of `crackle net`", ("nft",)),
    "xfsprogs": Package("a file system that shares blocks, for the tests of overlays", ("mkfs.xfs",)),
    "btrfs-progs": Package("the other one that does", ("mkfs.btrfs",)),
    "tshark": Package("a judge of the frames that guests send", ("tshark", "dumpcap")),
}

FUZZ = {
    "clang": Package("the compiler that puts the fuzzer's counters into the core", ("clang",)),
    "llvm": Package("names in reports", ("llvm-symbolizer",)),
}
"""Only for `make fuzz`, which asks for them."""

KERNEL = {
    "gcc": Package("a compiler", ("gcc",)),
    "make": Package("runs the build", ("make",)),
    "flex": Package("the kernel's configuration language", ("flex",)),
    "bison": Package("the kernel's configuration language", ("bison",)),
    "bc": Package("a constant of the kernel's clock", ("bc",)),
    "libelf-dev": Package("objtool, a part of the kernel's build"),
    "libssl-dev": Package("a part of the kernel's build"),
    "lz4": Package("packs the bzImage", ("lz4",)),
    "xz-utils": Package("unpacks the source", ("xz",)),
}
"""Only for `guest/kernel/build`."""

FRESH = {
    "debootstrap": Package("makes a minimal Debian", ("debootstrap",)),
    "git": Package("lists the files of the checkout", ("git",)),
}
"""Only for `tools/fresh-debian`, which says so when they are missing."""

# fmt: off
BASE = frozenset((
    "apt-cache", "apt-config", "apt-get", "bash", "cat", "chroot", "cp", "dd",
    "dpkg", "dpkg-query", "gzip", "id", "ldd", "ls", "mkdir", "mknod",
    "mount", "nsenter", "python3", "rm", "script", "setpriv", "sh", "sleep",
    "sync", "tar", "taskset", "tr", "true", "umount", "unshare",
))
# fmt: on
"""Programs of a minimal Debian with Python: of its required packages (apt, bash, bsdutils, coreutils, dash, dpkg, gzip,
libc-bin, mount, tar, util-linux)."""


def programs() -> dict[str, str]:
    """The package of each program but those in BASE."""
    listed = {**NEEDED, **FUZZ, **KERNEL, **FRESH}
    return {program: name for name, package in listed.items() for program in package.programs}
