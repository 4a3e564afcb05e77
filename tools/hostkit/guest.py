"""The files of the Linux guests: busybox and a few scripts, made into a disk image or an initial RAM disk.

The "tools" disk has some of this machine's programs besides, with the shared libraries they need, and those that are
compiled from guest/tools.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from . import cache, cpio, debian

ROOTFS = Path(__file__).resolve().parents[2] / "guest" / "rootfs"
PROGRAMS = ROOTFS.parent / "tools"
PAYLOAD_SIZE = 8 << 20
IMAGE_SIZE = 64 << 20
TOOLS_SIZE = 192 << 20
# Programs, and the packages that they come in.
TOOLS = {"curl": "curl", "ethtool": "ethtool", "fio": "fio", "iperf3": "iperf3", "mke2fs": "e2fsprogs"}
DIRECTORIES = (
    "bin",
    "sbin",
    "usr/bin",
    "usr/sbin",
    "dev",
    "etc",
    "proc",
    "sys",
    "tmp",
    "run",
    "mnt",
    "root",
    "data",
)
# What the kernel's own network configuration (ip= with name servers) found, in the format of resolv.conf.
LINKS = {"etc/resolv.conf": "/run/resolv.conf"}
# Fixed, so that images made of the same files differ in nothing a guest can tell.
UUID = "c4ac91e0-0000-4000-8000-000000000001"
TIME = "1700000000"


def busybox() -> Path:
    """Debian's statically linked busybox."""
    return debian.unpacked("busybox-static") / "bin" / "busybox"


def payload() -> bytes:
    """The file that the guest's demo job hashes: looks random, is always the same."""
    return hashlib.shake_256(b"crackle payload").digest(PAYLOAD_SIZE)


def _applets() -> list[str]:
    listed = subprocess.run([busybox(), "--list-full"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [name for name in listed.split() if name not in ("bin/busybox", "linuxrc")]


def base_files() -> dict[str, bytes]:
    """The files of every guest, by path. All are made executable: configuration does not mind."""
    return {
        "bin/busybox": busybox().read_bytes(),
        "bin/demo": (ROOTFS / "demo").read_bytes(),
        "sbin/power": _compiled(ROOTFS / "power.c").read_bytes(),
        "etc/init.d/rcS": (ROOTFS / "rcS").read_bytes(),
        "etc/init.d/job": (ROOTFS / "job").read_bytes(),
        "etc/init.d/shell": (ROOTFS / "shell").read_bytes(),
        "etc/inittab": (ROOTFS / "inittab").read_bytes(),
        "etc/passwd": b"root::0:0:root:/root:/bin/sh\n",
        "etc/group": b"root:x:0:\n",
        "etc/hosts": b"127.0.0.1 localhost\n",
        "etc/profile": b"export PATH=/bin:/sbin:/usr/bin:/usr/sbin PS1='\\w # '\n",
    }


def tree_key() -> str:
    """Changes when anything that goes into the images does."""
    here = Path(__file__)
    files = (part for item in base_files().items() for part in item)
    return cache.key(here, here.with_name("cpio.py"), *files)


def archive() -> cpio.Archive:
    """The tree as an unfinished cpio archive, to which more may be added. `/init` starts busybox's init."""
    made = cpio.Archive()
    for directory in DIRECTORIES:
        made.directory(directory)
    made.character_device("dev/console", 5, 1)
    for path, content in base_files().items():
        made.file(path, content, 0o755)
    for applet in _applets():
        made.symlink(applet, "/bin/busybox")
    for name, target in LINKS.items():
        made.symlink(name, target)
    return made


def initramfs() -> Path:
    """An uncompressed initial RAM disk that is the whole user space."""

    def make(path: Path) -> None:
        cache.progress("making the initramfs")
        made = archive()
        made.symlink("init", "/sbin/init")
        path.write_bytes(made.finish())

    return cache.made(cache.cache_dir() / "guest" / f"initramfs-{tree_key()}.cpio", make)


def payload_file() -> Path:
    """`/data/payload` of the disk image, as a file on the host."""
    path = cache.cache_dir() / "guest" / f"payload-{cache.key('payload', str(PAYLOAD_SIZE))}"
    return cache.made(path, lambda temporary: _fill(temporary, payload()))


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def ext4() -> Path:
    """A root disk: ext4 without partitions. Copy it before a guest writes to it."""
    return _disk("root", tree_key(), IMAGE_SIZE, {})


def tools() -> Path:
    """A larger root disk, with `TOOLS` and what is in guest/tools.

    Give it to guests read-only: it is too large to be copied for each.
    """
    debian.install(list(TOOLS.values()))
    files = _programs()
    stamps = (f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}" for name, path in files.items())
    return _disk("tools", cache.key(tree_key(), *stamps), TOOLS_SIZE, files)


def _programs() -> dict[str, Path]:
    """The tools and their libraries: what each is called in the guest, and where it is here."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    files = {}
    for name in TOOLS:
        program = shutil.which(name, path=path)
        if program is None:
            raise debian.DebianError(f"no program {name}")
        files[f"usr/bin/{name}"] = Path(program).resolve()
        listed = subprocess.run(["ldd", program], check=True, stdout=subprocess.PIPE, text=True).stdout
        for library in (word for word in listed.split() if word.startswith("/")):
            files[library.lstrip("/")] = Path(library).resolve()
    for source in sorted(PROGRAMS.glob("*.c")):
        files[f"usr/bin/{source.stem}"] = _compiled(source)
    return dict(sorted(files.items()))


def _compiled(source: Path) -> Path:
    """A program for guests, statically linked."""

    def make(path: Path) -> None:
        command = ["gcc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o", path, source]
        subprocess.run(command, check=True)

    return cache.made(cache.cache_dir() / "guest" / f"{source.stem}-{cache.key(source)}", make)


def _disk(name: str, key: str, size: int, programs: dict[str, Path]) -> Path:
    def make(path: Path) -> None:
        cache.progress(f"making the {name} disk")
        staging = path.with_name(path.name + ".tree")
        cache.remove(staging)
        try:
            _stage(staging, programs)
            _mke2fs(path, staging, size)
        finally:
            cache.remove(staging)

    return cache.made(cache.cache_dir() / "guest" / f"{name}-{key}.ext4", make)


def _stage(staging: Path, programs: dict[str, Path]) -> None:
    for directory in DIRECTORIES:
        (staging / directory).mkdir(parents=True, exist_ok=True)
    for name, content in base_files().items():
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    for applet in _applets():
        (staging / applet).symlink_to("/bin/busybox")
    for name, target in LINKS.items():
        (staging / name).symlink_to(target)
    for name, source in programs.items():
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        shutil.copyfile(source, path)
        path.chmod(0o755)
    (staging / "data" / "payload").write_bytes(payload())
    when = int(TIME)
    for path in [staging, *staging.rglob("*")]:
        os.utime(path, (when, when), follow_symlinks=False)


def _mke2fs(image: Path, staging: Path, size: int) -> None:
    options = f"hash_seed={UUID},root_owner=0:0,lazy_itable_init=0,nodiscard"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "crackle", "-U", UUID, "-E", options]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    environment = os.environ | {"E2FSPROGS_FAKE_TIME": TIME, "SOURCE_DATE_EPOCH": TIME, "PATH": path}
    subprocess.run(
        [*command, "-d", staging, image, str(size // 4096)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
