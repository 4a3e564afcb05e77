"""A page-fault handler as Firecracker's users write them: `python -m support.page_handler SOCKET MEMORY [HOW]`.

HOW: "serve"; "refuse" (close the connection unread); "leave" (close it once read); "silent" (give no page); or a
number, after so many pages it dies; or "until-" and an offset in the memory file: when somebody wants that page it
prints "asked", and gives no page any more. Prints "ready" when it listens, and the message that it got.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys

# linux/userfaultfd.h
UFFDIO_COPY = 0xC028AA03
PAGEFAULT = 0x12
REMOVE = 0x15
MESSAGE = 32


def handed_over(peer: socket.socket) -> tuple[list[dict[str, int]], int]:
    text, ancillary, _, _ = peer.recvmsg(65536, socket.CMSG_SPACE(4))
    print(text.decode(), flush=True)
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    return json.loads(text), fds[0]


def serve(path: str, memory: str, how: str) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    peer, _ = listener.accept()
    if how == "refuse":
        select.select([peer], [], [])
        peer.close()
        return
    mappings, fault = handed_over(peer)
    if how == "leave":
        peer.close()
        return
    if how == "silent":
        signal.pause()
    size = os.path.getsize(memory)
    with open(memory, "rb") as file:
        contents = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    source = ctypes.addressof(ctypes.c_char.from_buffer(contents))
    os.set_blocking(fault, False)
    left = int(how) if how.isdigit() else -1
    last = int(how.removeprefix("until-")) if how.startswith("until-") else -1
    waiting: list[bytes] = []
    while left:
        # While pages are being given back none can be given.
        select.select([fault], [], [], 0.01 if waiting else None)
        given, waiting = waiting, []
        for copy in given:
            give(fault, copy, waiting)
        try:
            event, address = struct.unpack_from("<B15xQ", os.read(fault, MESSAGE))
        except BlockingIOError:
            continue
        if event == REMOVE:
            # What comes there then is anybody's guess.
            continue
        assert event == PAGEFAULT, event
        for mapping in mappings:
            base, page_size = mapping["base_host_virt_addr"], mapping["page_size"]
            if base <= address < base + mapping["size"]:
                page = address // page_size * page_size
                if mapping["offset"] + page - base == last:
                    print("asked", flush=True)
                    signal.pause()
                where = source + mapping["offset"] + page - base
                give(fault, struct.pack("<QQQQq", page, where, page_size, 0, 0), waiting)
        left -= 1


def give(fault: int, copy: bytes, waiting: list[bytes]) -> None:
    """Or note that it is to be given later."""
    try:
        fcntl.ioctl(fault, UFFDIO_COPY, copy)
    except FileExistsError:
        pass
    except BlockingIOError:
        waiting.append(copy)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "serve")
