"""vsock between a bare-metal guest and host programs: streams each way, many at once, and their ends."""

from __future__ import annotations

import gc
import os
import random
import selectors
import socket
import threading
from pathlib import Path

import pytest

from crackle import MicroVM

PORT, ECHO = 52, 53


def connected(path: str, port: int) -> socket.socket:
    """A host program's connection to the guest's `port`."""
    program = socket.socket(socket.AF_UNIX)
    program.settimeout(30)
    program.connect(path)
    program.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        answer += program.recv(1)
    assert answer.startswith(b"OK ")
    return program


def checksum(data: bytes) -> int:
    """As the guest's."""
    total = 0
    for byte in data:
        total = (total * 31 + byte) & (1 << 64) - 1
    return total


def guest(guests: Path, path: str, options: str) -> MicroVM:
    return MicroVM(guests / "vsock.elf", boot_args=options, memory=64, vsock=path)


@pytest.mark.parametrize(
    "options", ["", "irq", "noevent", "buffer=65536 buffers=16", "buffer=100 buffers=256"]
)
def test_every_byte_of_a_stream_to_the_guest_arrives(guests: Path, tmp_path: Path, options: str) -> None:
    path = str(tmp_path / "v")
    data = random.randbytes(1_000_000)
    with guest(guests, path, f"{options} sum t=recv") as vm:
        vm.console.expect("recv ready", timeout=30)
        with connected(path, PORT) as program:
            program.sendall(data)
            program.shutdown(socket.SHUT_WR)
            found = vm.console.expect(r"recv bytes=(\d+) us=\d+ packets=\d+ sum=(0x[0-9a-f]+)\s")
            assert (int(found[1]), int(found[2], 16)) == (len(data), checksum(data))
        vm.console.expect("vsock end status=0xf")
        vm.wait(timeout=30)
        counters = vm.metrics()["vsock"]
        assert counters["rx_bytes_count"] == len(data)
        assert counters["conns_added"] == counters["conns_removed"] == 1
    assert not os.path.exists(path)


@pytest.mark.parametrize("size", [1, 1000, 4096, 65536])
def test_every_byte_of_a_stream_from_the_guest_arrives(guests: Path, tmp_path: Path, size: int) -> None:
    path = str(tmp_path / "v")
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(30)
        server.bind(f"{path}_80")
        server.listen()
        with guest(guests, path, f"ms=50 t=send,{size},80") as vm:
            program, _ = server.accept()
            received = 0
            while data := program.recv(1 << 20):
                received += len(data)
            program.close()
            found = vm.console.expect(r"send bytes=(\d+)\s")
            assert int(found[1]) == received > 0
            vm.wait(timeout=30)


@pytest.mark.parametrize("options", ["", "irq"])
def test_hundreds_of_streams_at_once_and_each_is_answered_to_its_end(
    guests: Path, tmp_path: Path, options: str
) -> None:
    """Each program writes everything, finishes sending, and only then reads what the guest sends back."""
    path, count, size = str(tmp_path / "v"), 300, 50_000
    with guest(guests, path, f"{options} buffers=256 t=echo,{count}") as vm:
        vm.console.expect("echo ready")
        programs = [connected(path, ECHO) for _ in range(count)]
        sent = [random.randbytes(size) for _ in programs]
        received = [bytearray() for _ in programs]

        def write() -> None:
            for start in range(0, size, 10_000):
                for program, data in zip(programs, sent, strict=True):
                    program.sendall(data[start : start + 10_000])
            for program in programs:
                program.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        with selectors.DefaultSelector() as selector:
            for index, program in enumerate(programs):
                selector.register(program, selectors.EVENT_READ, index)
            while selector.get_map():
                ready = selector.select(30)
                assert ready, "nothing comes any more"
                for key, _ in ready:
                    data = programs[key.data].recv(1 << 16)
                    received[key.data] += data
                    if not data:
                        selector.unregister(programs[key.data])
        writer.join()
        assert [bytes(data) for data in received] == sent
        found = vm.console.expect(r"echo bytes=(\d+) ended=(\d+)\s")
        assert (int(found[1]), int(found[2])) == (count * size, count)
        for program in programs:
            program.close()
        vm.wait(timeout=30)


def test_streams_stand_still_while_the_microvm_is_paused_and_go_on_after(
    guests: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "v")
    with guest(guests, path, "irq t=echo,1") as vm:
        vm.console.expect("echo ready")
        with connected(path, ECHO) as program:
            program.sendall(b"before")
            assert program.recv(99) == b"before"
            vm.pause()
            program.sendall(b"meanwhile")
            program.settimeout(0.2)
            with pytest.raises(TimeoutError):
                program.recv(99)
            vm.resume()
            program.settimeout(30)
            assert program.recv(99) == b"meanwhile"


def test_what_a_guest_does_makes_no_threads_descriptors_or_metrics(guests: Path, tmp_path: Path) -> None:
    """But a descriptor for each connection, and that goes with it."""
    path, count = str(tmp_path / "v"), 50

    def held(vm: MicroVM) -> tuple[int, int, set[str]]:
        names = {f"{section}.{name}" for section, values in vm.metrics().items() for name in values}
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), names

    with guest(guests, path, f"irq t=echo,{count} t=wait,60000") as vm:
        vm.console.expect("echo ready")
        gc.collect()  # what earlier tests have left to it
        threads, descriptors, names = held(vm)
        programs = [connected(path, ECHO) for _ in range(count)]
        assert held(vm) == (threads, descriptors + 2 * count, names)
        for program in programs:
            program.sendall(b"x")
            assert program.recv(9) == b"x"
            program.shutdown(socket.SHUT_WR)
            assert program.recv(9) == b""
            program.close()
        vm.console.expect("ended=50")
        assert held(vm) == (threads, descriptors, names)
