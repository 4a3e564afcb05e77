"""The code blocks of README and docs/, and a reader who does what they say.

A block in a fence has a language: `console` (lines after `$ ` or `# ` are typed, the others are shown then), `python`,
or another one, which nobody runs. An HTML comment above it says what else there is to know:

    <!-- block: guest -->              it boots a guest on this terminal; the reader waits for its shell and ends it
    <!-- block: guest stays -->        the same, but it stays until another one is started
    <!-- block: background -->         it goes on while the next ones are done
    <!-- block: starts the guest -->   after it, the console of what is in the background has the guest's shell
    <!-- block: in the guest -->       it is typed there
    <!-- block: before the start -->   a crackle-vmm is wanted that has been configured as in the README
    <!-- block: while it runs -->      then, that it has been started
    <!-- block: not run, REASON -->    nobody runs it
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "",
    "guest",
    "guest stays",
    "background",
    "starts the guest",
    "in the guest",
    "before the start",
    "while it runs",
)
PATIENCE = 400.0
_FENCE = re.compile(
    r"(?:<!-- block: (?P<kind>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)\n```\n", re.DOTALL
)
_PROMPT = " # "
_WAIT = "until [ -S vm.sock ]; do sleep 0.1; done"


class Block(NamedTuple):
    """A code block: where it is, what it is, what is in it."""

    path: Path
    line: int
    language: str
    kind: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why nobody runs it."""
        if self.kind.startswith("not run, "):
            return self.kind.removeprefix("not run, ")
        return None if self.language in ("console", "python") else f"it is {self.language or 'plain text'}"

    def steps(self) -> list[tuple[str, list[str]]]:
        """What is typed, and the lines that are shown then."""
        steps: list[tuple[str, list[str]]] = []
        open_ended = False
        for line in self.text.splitlines():
            prompt = line[:2] in ("$ ", "# ") and not re.match(r"# \S+: ", line)
            if open_ended:
                steps[-1] = (f"{steps[-1][0]}\n{line}", [])
            elif prompt:
                steps.append((line[2:], []))
            else:
                steps[-1][1].append(line)
            typed = re.sub(r"  +#.*$", "", steps[-1][0], flags=re.MULTILINE)
            open_ended = not steps[-1][1] and (typed.endswith("\\") or typed.count("'") % 2 == 1)
        return steps


def documents() -> list[Path]:
    """README, docs/ and the like, relative to the root."""
    found = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "guest/README.md",
        ROOT / "tools/README.md",
    ]
    return sorted(path.relative_to(ROOT) for path in found)


def blocks(path: Path) -> list[Block]:
    """The code blocks of a document."""
    text = (ROOT / path).read_text()
    return [
        Block(
            path,
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["kind"] or "",
            found["text"],
        )
        for found in _FENCE.finditer(text)
    ]


class Terminal:
    """A program with its input and output on pipes."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.text = ""

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def expect(self, pattern: str) -> str:
        """What was shown up to the pattern's end."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if select.select([self.process.stdout], [], [], 0.2)[0]:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"it has ended: {self.text!r}"
                self.text += data.decode(errors="replace").replace("\r", "")
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown

    def wait_listening(self) -> None:
        """Until one of its processes accepts connections at a Unix socket."""
        deadline = time.monotonic() + PATIENCE
        while not self._listens():
            assert self.process.poll() is None, "it has ended"
            assert time.monotonic() < deadline, "it listens nowhere"
            time.sleep(0.1)

    def _listens(self) -> bool:
        # <linux/net.h>: __SO_ACCEPTCON among the flags.
        rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
        wanted = {f"socket:[{row[6]}]" for row in rows if int(row[3], 16) & 0x10000}
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getsid(int(directory.name)) == self.process.pid and wanted & {
                    os.readlink(fd) for fd in (directory / "fd").iterdir()
                }:
                    return True
        return False

    def end(self) -> None:
        """End it, and what it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=30)
                return


class Reader:
    """Does what a document says, in a directory that looks like the checkout. A context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("guest", "tools", "examples", ".venv"):
            (directory / name).symlink_to(ROOT / name)
        self.environment = os.environ | {
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PS1": "",
        }
        self.shell = self._terminal(["bash", "--norc", "--noprofile"])
        self.guest: Terminal | None = None
        self._configured: list[tuple[str, str]] = []
        self._others: list[Terminal] = []
        self._boots = False
        self._began = time.monotonic()

    def _terminal(self, command: list[str]) -> Terminal:
        return Terminal(command, self.directory, self.environment)

    def do(self, block: Block) -> None:
        """Do what the block says; AssertionError when that is not what happens."""
        self._say(f"{block.path}:{block.line} {block.kind or block.language}")
        if re.search(r"crackle run|crackle-vmm |MicroVM\(", block.text):
            self._end_guest()
        if block.language == "python":
            self._python(block)
        elif block.kind == "in the guest":
            for typed, shown in block.steps():
                _compare(self._in_guest(typed), shown)
        elif block.kind in ("guest", "guest stays", "background"):
            ((command, _),) = block.steps()
            terminal = self._terminal(["bash", "-c", command])
            if block.kind == "background":
                terminal.wait_listening()
            if "crackle" not in command:
                self._others.append(terminal)
                return
            self.guest = terminal
            if block.kind != "background":
                self._greet()
            if block.kind == "guest":
                self._end_guest()
        else:
            self._prepare_monitor(block.kind)
            if block.kind == "starts the guest":
                self.run(_WAIT)
            for typed, shown in block.steps():
                _compare(self.run(typed), shown)
            if block.kind == "before the start":
                # A guest that ends in between is configured as this one was.
                self._configured += block.steps()
            if block.kind == "starts the guest":
                self._greet()

    def _say(self, what: str) -> None:
        """Where it is, and when: shown when it fails, or with pytest's -s."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {what}", flush=True)

    def run(self, command: str) -> str:
        """What a command prints in the shell; it must succeed."""
        self._say(f"$ {command}")
        self.shell.type(f'{{ {command}\n}} < /dev/null 2>&1; echo "<$?>"\n')
        shown = self.shell.expect(r"<\d+>\n")
        assert shown.endswith("<0>\n"), f"{command}\n{shown}"
        return shown.removesuffix("<0>\n")

    def _python(self, block: Block) -> None:
        # How long an example waits is meant for a machine that is not emulated.
        text = re.sub(r'(expect\(".*?"), 60\)', rf"\1, {PATIENCE})", block.text)
        (self.directory / "example.py").write_text(text + "\n")
        if block.kind == "background":
            self._others.append(self._terminal(["python", "example.py"]))
            self._others[-1].wait_listening()
            return
        self.run("python example.py")

    def _prepare_monitor(self, kind: str) -> None:
        if kind not in ("before the start", "while it runs") or (self.guest is not None and not self._boots):
            return
        readme = blocks(Path("README.md"))
        start = next(block for block in readme if block.kind == "starts the guest").steps()
        if self.guest is None:
            (monitor,) = next(block for block in readme if block.kind == "background").steps()
            self.run("rm -f vm.sock")
            self.guest = self._terminal(["bash", "-c", monitor[0]])
            self._boots = True
            self.run(_WAIT)
            for typed, _ in start[:-1] + self._configured:
                self.run(typed)
        if kind == "while it runs":
            self._boots = False
            self.run(start[-1][0])
            self._greet()

    def _greet(self) -> None:
        """Wait for the guest's shell."""
        assert self.guest is not None
        self.guest.expect("user space after .*\n")
        self.guest.expect(_PROMPT)
        self.guest.type("stty -echo; PS1= PS2=; echo re''ady\n")
        self.guest.expect("ready\n")

    def _in_guest(self, command: str) -> str:
        assert self.guest is not None
        self.guest.type(f'{command}\necho "<$?>"\n')
        shown = self.guest.expect(r"<\d+>\n")
        self._say(f"# {command}\n{shown}")
        assert shown.endswith("<0>\n"), f"{command}\n{shown}"
        return shown.removesuffix("<0>\n")

    def _end_guest(self) -> None:
        guest, self.guest = self.guest, None
        if guest is not None:
            if not self._boots:
                guest.type("reboot -f\n")
                assert guest.process.wait(PATIENCE) == 0
            guest.end()
        self._boots = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        for each in (self.guest, *self._others, self.shell):
            if each is not None:
                each.end()


def _compare(got: str, wanted: list[str]) -> None:
    """Lines as they are shown in the document, whatever their numbers are."""
    lines = list(_without_numbers(got.splitlines()))
    for line in _without_numbers(wanted):
        assert line in lines, f"{line!r} is not in {got!r}"


def _without_numbers(lines: list[str]) -> Iterator[str]:
    return (re.sub(r"\d+", "0", line) for line in lines)
