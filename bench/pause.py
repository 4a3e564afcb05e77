"""pause.*: milliseconds that a pause takes, the median and the longest, whatever guest and host programs do meanwhile.

`idle`: a guest that sleeps. `hostile`: one that has asked its disk for 250 GiB at once. `connecting`: programs that
connect to the guest's vsock socket in a loop. `streaming`: one that sends the guest as much as it takes, and has it
back.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import TYPE_CHECKING

from bench.rows import GUESTS, Bench, absolute
from crackle import MicroVM
from crackle.schema import Drive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from bench.rows import Row

PAUSES = 200
PROGRAMS = 4
PORT = 53  # on which the guest sends all back
CONNECT = f"""
import socket, sys
while True:
    with socket.socket(socket.AF_UNIX) as program:
        try:
            program.connect(sys.argv[1])
            program.sendall(b"CONNECT {PORT}\\n")
            program.recv(99)
        except OSError:
            pass
"""


def pauses(vm: MicroVM, count: int) -> list[float]:
    """Milliseconds of each, the guest running for some other milliseconds between them."""
    taken = []
    chance = random.Random(1)
    for _ in range(count):
        time.sleep(chance.random() * 0.01)
        begin = time.perf_counter()
        vm.pause()
        taken.append((time.perf_counter() - begin) * 1000)
        vm.resume()
    return taken


@contextmanager
def idle(_scratch: Path) -> Iterator[MicroVM]:
    with MicroVM(GUESTS / "idle.elf", boot_args="tick=100 beats=10", memory=64) as vm:
        vm.console.expect("beat")
        yield vm


@contextmanager
def hostile(scratch: Path, engine: str) -> Iterator[MicroVM]:
    disk = scratch / "pause.img"
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    drive = Drive("disk", False, path_on_host=str(disk), is_read_only=True, io_engine=engine)  # type: ignore[arg-type]
    with MicroVM(GUESTS / "hostile.elf", drives=[drive], boot_args="n=250", memory=64) as vm:
        vm.console.expect("beat")
        yield vm
    disk.unlink()


@contextmanager
def connecting(scratch: Path) -> Iterator[MicroVM]:
    path = str(scratch / "pause.vsock")
    with (
        MicroVM(GUESTS / "vsock.elf", boot_args="irq t=echo,1000000000", memory=64, vsock=path) as vm,
        ExitStack() as programs,
    ):
        vm.console.expect("echo ready")
        for _ in range(PROGRAMS):
            program = subprocess.Popen([sys.executable, "-c", CONNECT, path])
            programs.callback(program.wait)
            programs.callback(program.kill)
        time.sleep(0.5)
        yield vm


@contextmanager
def streaming(scratch: Path) -> Iterator[MicroVM]:
    path = str(scratch / "pause.vsock")
    with (
        MicroVM(GUESTS / "vsock.elf", boot_args="irq t=echo,1000000000", memory=64, vsock=path) as vm,
        socket.socket(socket.AF_UNIX) as program,
        ExitStack() as programs,
    ):
        vm.console.expect("echo ready")
        program.connect(path)
        program.sendall(f"CONNECT {PORT}\n".encode())
        program.recv(99)
        for command in ("cat /dev/zero", "exec cat > /dev/null"):
            end = program.fileno()
            stream = subprocess.Popen(
                ["sh", "-c", command], stdin=end, stdout=end if "zero" in command else None
            )
            programs.callback(stream.wait)
            programs.callback(stream.kill)
        yield vm


def rows(bench: Bench) -> Iterator[Row]:
    """Two rows for each situation."""
    situations: dict[str, AbstractContextManager[MicroVM]] = {
        "idle": idle(bench.scratch),
        "hostile.sync": hostile(bench.scratch, "Sync"),
        "hostile.async": hostile(bench.scratch, "Async"),
        "connecting": connecting(bench.scratch),
        "streaming": streaming(bench.scratch),
    }
    for name, situation in situations.items():
        with situation as vm:
            taken = pauses(vm, bench.times(PAUSES))
        against = f"{len(taken)} pauses"
        yield absolute(f"pause.{name}.p50", median(taken), "ms", against=against)
        yield absolute(f"pause.{name}.longest", max(taken), "ms", against=against)
