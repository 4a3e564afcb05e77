"""`crackle clone` and `crackle pool`: microVMs that go on from a snapshot, now or when a client wants one."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from crackle.errors import ConfigError, CrackleError, os_reason
from crackle.runtime.loop import Loop
from crackle.vmm.clones import Snapshot, resume_all, stop_all
from crackle.vmm.identity import CloneOptions
from crackle.vmm.microvm import MicroVM
from crackle.vmm.pool import Pool

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CHUNK = 65536
_ANYTHING = rb"(?s).+"


def allow_many_descriptors() -> None:
    """Some for each microVM: as many as the hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- crackle clone -------------------------------------------------------------------------------------------------


def clone(path: Path, n: int, options: CloneOptions) -> int:
    """Run `n` clones to their ends, their consoles on standard output; the exit status, 143 if a signal ended them."""
    allow_many_descriptors()
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(n)]
    vms: list[MicroVM] = []
    loop = Loop()
    interrupted: list[int] = []

    def interrupt(number: int) -> None:
        interrupted.append(number)
        loop.stop()

    try:
        # Before there is something that has to be ended.
        for number in _ENDING:
            loop.on_signal(number, interrupt)
        with Snapshot(path) as snapshot:
            options["console"] = lambda index: (-1, pipes[index][1])
            vms = snapshot.clone(n, resume=False, **options)
        for vm, (_, theirs) in zip(vms, pipes, strict=True):
            print(_description(vm), file=sys.stderr, flush=True)
            os.close(theirs)
        screens = [_Screen(index, fd, loop, n) for index, (fd, _) in enumerate(pipes)]
        running = set(range(n))

        def ended(index: int) -> None:
            loop.forget(vms[index].fileno())
            running.discard(index)
            if not running:
                loop.stop()

        for index, vm in enumerate(vms):
            loop.watch(vm.fileno(), lambda _events, index=index: ended(index))  # type: ignore[misc]
        resume_all(vms)
        loop.run()
        failures = [(vm, vm.exit_status) for vm in vms]
    finally:
        loop.close()
        stop_all(vms)
    for screen in screens:
        screen.finish()
    failed = [(vm, status) for vm, status in failures if status is not None and status.exit_code]
    for vm, status in failed:
        print(f"crackle: {vm.instance_id}: {status.message}", file=sys.stderr)
    return 1 if failed else 128 + signal.SIGTERM if interrupted else 0


def _description(vm: MicroVM) -> str:
    vsock = vm.config.vsock
    return f"{vm.instance_id}: process {vm.pid}" + ("" if vsock is None else f", vsock {vsock.uds_path}")


class _Screen:
    """What one clone writes, line by line, behind its number where there are several."""

    def __init__(self, index: int, fd: int, loop: Loop, n: int) -> None:
        self._prefix = b"%*d| " % (len(str(n - 1)), index) if n > 1 else b""
        self._fd = fd
        self._loop = loop
        self._rest = b""
        os.set_blocking(fd, False)
        loop.watch(fd, self._ready)

    def _ready(self, _events: int) -> None:
        self._read()

    def _read(self) -> bool:
        """What there is now, shown; False when there is nothing."""
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._loop.forget(self._fd)
            return False
        if not self._prefix:
            sys.stdout.buffer.write(data)
        else:
            *lines, self._rest = (self._rest + data).split(b"\n")
            sys.stdout.buffer.writelines(self._prefix + line + b"\n" for line in lines)
        sys.stdout.buffer.flush()
        return True

    def finish(self) -> None:
        """The guest has ended: what it wrote last."""
        while self._read():
            pass
        if self._rest:
            sys.stdout.buffer.write(self._prefix + self._rest + b"\n")
            sys.stdout.buffer.flush()
        os.close(self._fd)


# -- crackle pool --------------------------------------------------------------------------------------------------


def serve_pool(
    path: Path, address: Path, size: int, limit: int | None, wait: float, options: CloneOptions
) -> None:
    """Keep a pool, and give whoever connects a microVM for as long as he stays, until a signal ends it."""
    allow_many_descriptors()
    listener = _listen(address)
    loop = Loop()
    try:
        for number in _ENDING:
            loop.on_signal(number, lambda _number: loop.stop())
        with Pool(path, size, limit=limit, **options) as pool:

            def accept(_events: int) -> None:
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    threading.Thread(target=_attend, args=(connection, pool, wait), daemon=True).start()

            loop.watch(listener.fileno(), accept)
            print(f"listening at {address}", flush=True)
            loop.run()
    finally:
        loop.close()
        listener.close()
        with contextlib.suppress(OSError):
            address.unlink()


def _listen(address: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(address))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {address}: {os_reason(error)}") from None
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


def _attend(connection: socket.socket, pool: Pool, wait: float) -> None:
    """One client: a line of JSON about its microVM, then that one's console, until either is gone."""
    with connection, contextlib.suppress(OSError):
        connection.setblocking(True)
        try:
            vm = pool.take(wait)
        except CrackleError as error:
            _say(connection, {"error": str(error)})
            return
        with vm:
            vsock = vm.config.vsock
            found = {"id": vm.instance_id, "pid": vm.pid}
            _say(connection, found if vsock is None else {**found, "vsock": vsock.uds_path})
            threading.Thread(target=_show, args=(connection, vm), daemon=True).start()
            with contextlib.suppress(CrackleError):
                while data := connection.recv(_CHUNK):
                    vm.console.write(data)


def _say(connection: socket.socket, what: Any) -> None:
    connection.sendall(json.dumps(what).encode() + b"\n")


def _show(connection: socket.socket, vm: MicroVM) -> None:
    """The guest's output, until it has ended."""
    with contextlib.suppress(OSError, CrackleError):
        while True:
            try:
                connection.sendall(vm.console.expect(_ANYTHING, 5)[0])
            except CrackleError:
                if vm.exit_status is not None:
                    break
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
