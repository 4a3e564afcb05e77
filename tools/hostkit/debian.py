"""Debian packages: installed on this machine, or only downloaded and unpacked into the cache."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import cache

# Downloads go to the user's cache, which apt's own unprivileged user cannot enter.
_APT = (
    "apt-get",
    "-q",
    "-o",
    "APT::Sandbox::User=root",
    "-o",
    "DPkg::Lock::Timeout=300",
    "-o",
    "Acquire::Retries=3",
)


class DebianError(Exception):
    """A package could not be found, downloaded, unpacked or installed."""


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if result.returncode:
        tail = "\n".join(result.stdout.decode(errors="replace").splitlines()[-8:])
        raise DebianError(f"`{' '.join(command)}` failed with status {result.returncode}:\n{tail}")


def _run_after_update(command: Sequence[str], cwd: Path | None = None) -> None:
    """Run an apt command; if it fails, once more after refreshing the lists, which may be absent or stale."""
    try:
        _run(command, cwd)
    except DebianError:
        cache.progress("refreshing the package lists")
        _run([*_APT, "update"])
        _run(command, cwd)


def missing(packages: Sequence[str]) -> list[str]:
    """Those of `packages` that are not installed."""
    command = ["dpkg-query", "--show", "--showformat=${binary:Package} ${db:Status-Status}\\n", *packages]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    present = {line.split()[0].split(":")[0] for line in output.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in present]


def install(packages: Sequence[str]) -> None:
    """Install those of `packages` that are missing. Needs root only if there are any."""
    wanted = missing(packages)
    if not wanted:
        return
    if os.geteuid() != 0:
        raise DebianError(f"these packages are missing and only root can install them: {' '.join(wanted)}")
    cache.progress(f"installing {' '.join(wanted)}")
    _run_after_update([*_APT, "install", "--yes", "--no-install-recommends", *wanted])


def _dependency(package: str) -> str:
    """The first package that the metapackage `package` depends on."""
    command = ["apt-cache", "depends", "--important", package]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    for line in output.splitlines():
        if line.strip().startswith("Depends: "):
            return line.split()[-1]
    raise DebianError(f"package {package} is unknown or depends on nothing")


def unpacked(package: str, *, meta: bool = False) -> Path:
    """The directory in the cache that holds the files of `package`; downloaded and unpacked the first time.

    With `meta`, the package that the metapackage `package` depends on is meant. A package in the cache is
    used without asking whether there is a newer one.
    """
    link = cache.cache_dir() / "packages" / package
    if link.exists():
        return link.resolve()
    link.parent.mkdir(exist_ok=True)
    with cache.locked(f"package-{package}"):
        if link.exists():
            return link.resolve()
        name = package
        if meta:
            try:
                name = _dependency(package)
            except DebianError:
                _run([*_APT, "update"])
                name = _dependency(package)
        target = _download_and_unpack(name, link.parent)
        cache.point(link, target)
    return target


def _download_and_unpack(package: str, directory: Path) -> Path:
    cache.progress(f"downloading the Debian package {package}")
    downloads = directory / f".{package}.{os.getpid()}"
    cache.remove(downloads)
    downloads.mkdir()
    try:
        _run_after_update([*_APT, "download", package], downloads)
        archive = next(downloads.glob("*.deb"))
        target = directory / archive.stem.replace("%3a", ".").replace(":", ".")
        _run(["dpkg", "-x", str(archive), str(downloads / "files")])
        cache.remove(target)
        (downloads / "files").rename(target)
    finally:
        cache.remove(downloads)
    return target
