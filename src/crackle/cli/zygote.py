"""`python -m crackle.cli.zygote`: the process that `crackle zygote` executes, without what only a command line needs.

[--socket PATH | --listener FD] [--children FD:PID,...]
"""

from __future__ import annotations

import _socket
import os
import sys

from crackle.cli import end_on_interrupt, jailer, vmm
from crackle.cli.vmm import load
from crackle.errors import ConfigError, CrackleError
from crackle.runtime.zygote import Zygote, listen, socket_path

# sd_listen_fds(3): the first descriptor that systemd hands over.
_FIRST_ACTIVATED = 3


def command(*arguments: str) -> list[str]:
    """The command line of this module. -X utf8: a launcher's names are bytes, which UTF-8 keeps."""
    return [sys.executable, "-X", "utf8", "-m", "crackle.cli.zygote", *arguments]


def main(arguments: list[str]) -> None:
    """Serve until a signal says to end. Raises CrackleError."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    fd = given.get("--listener") or _activated()
    path = given.get("--socket")
    if fd is None:
        path = path or socket_path()
        listener = listen(path)
    else:
        listener = _socket.socket(fileno=int(fd))
        os.set_inheritable(listener.fileno(), False)
    spares = given.get("--spares", "0")
    again = command(
        "--listener", str(listener.fileno()), "--spares", spares, *(("--socket", path) if path else ())
    )
    children = given.get("--children", "")
    zygote = Zygote(
        listener,
        vmm.run,
        prepare=vmm.prepare_shell,
        jail=jailer.run,
        path=path,
        again=again,
        children=children,
        spares=int(spares),
    )
    load()
    zygote.serve()


def _activated() -> str | None:
    """The socket that systemd gives, if it has started this process for it."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise ConfigError(f"A zygote has one socket, not LISTEN_FDS={os.environ.get('LISTEN_FDS')}.")
    return str(_FIRST_ACTIVATED)


if __name__ == "__main__":
    end_on_interrupt()
    try:
        main(sys.argv[1:])
    except CrackleError as problem:
        print(f"crackle zygote: {problem}", file=sys.stderr)
        sys.exit(1)
