"""crackle-launch and the zygote: what a client of crackle-vmm sees is the same, whoever of them lives and dies."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from crackle.version import VERSION
from support.launcher import LAUNCHER, ZygoteProcess, by_launcher
from support.network import Namespace

pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="`make build` makes crackle-launch")

TIMEOUT = 30.0
REQUEST = struct.Struct("=32sQ3I64I4x")

# A zygote of a program of our own: {} is what its children do with `arguments`, and return.
PROGRAM = """
import os, random, sys
from crackle.runtime.zygote import Zygote, listen
sys.path.insert(0, {directory!r})
import value
def run(arguments, ahead):
{body}
if sys.argv[1] == "--listener":
    import _socket
    listener = _socket.socket(fileno=int(sys.argv[2]))
    children = sys.argv[4]
else:
    listener, children = listen(sys.argv[1]), ""
again = [sys.executable, __file__, "--listener", str(listener.fileno())]
Zygote(listener, run, again=again, children=children).serve()
"""


def eventually(condition: Callable[[], Any]) -> Any:
    """What the condition is once it is something."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.fixture(params=[0, 1], ids=["no-spare", "spare"])
def zygote(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ZygoteProcess]:
    zygote = ZygoteProcess(tmp_path / "zygote", spares=request.param)
    yield zygote
    if zygote.process.poll() is None:
        zygote.end()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], ZygoteProcess]]:
    """Zygotes whose children do what a few lines say."""
    started: list[ZygoteProcess] = []

    def program(body: str) -> ZygoteProcess:
        (tmp_path / "value.py").write_text("VALUE = 17\n")
        script = tmp_path / "zygote-program"
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        script.write_text(PROGRAM.format(directory=str(tmp_path), body=indented))
        path = tmp_path / "program.socket"
        started.append(ZygoteProcess(path, str(script), str(path)))
        return started[-1]

    yield program
    for each in started:
        each.process.kill()
        each.process.communicate()


class Launched:
    """crackle-launch with a monitor that serves its API."""

    def __init__(self, zygote: ZygoteProcess, directory: Path, name: str, **options: Any) -> None:
        self.socket = directory / name
        before = zygote.monitors()
        self.process = subprocess.Popen(
            [*zygote.command, "--api-sock", str(self.socket), "--level", "Off"],
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options},
        )
        eventually(self.socket.exists)
        assert self.get().startswith(b"HTTP/1.1 200")
        (self.monitor,) = zygote.monitors() - before

    def get(self) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            client.connect(str(self.socket))
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return client.recv(4096)

    def state(self) -> tuple[str, str]:
        """Of launcher and monitor, as proc(5) has it."""
        launcher, monitor = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            for pid in (self.process.pid, self.monitor)
        )
        return launcher, monitor

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def launch(zygote: ZygoteProcess, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts crackle-launch; its monitor is ready."""
    started: list[Launched] = []

    def launch(**options: Any) -> Launched:
        started.append(Launched(zygote, tmp_path, f"api{len(started)}", **options))
        return started[-1]

    yield launch
    for each in started:
        each.close()


def gone(pid: int) -> bool:
    """Whether the process is no more, or only its parent's to wait for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def launch_to_end(zygote: ZygoteProcess, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*zygote.command, *arguments],
        text=True,
        timeout=TIMEOUT,
        check=False,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


# -- who lives and dies ------------------------------------------------------------------------------------------------


def test_when_the_launcher_is_killed_the_monitor_is_at_once(launch: Callable[..., Launched]) -> None:
    launched = launch()
    os.kill(launched.monitor, signal.SIGSTOP)  # nothing of its own could notice
    launched.process.kill()
    eventually(lambda: gone(launched.monitor))


def test_when_the_monitor_is_killed_the_launcher_ends_by_the_same_signal(
    launch: Callable[..., Launched], tmp_path: Path
) -> None:
    for number in (signal.SIGKILL, signal.SIGABRT):
        launched = launch(cwd=tmp_path)
        os.kill(launched.monitor, number)
        assert launched.process.wait(TIMEOUT) == -number


def test_monitors_outlive_the_zygote_and_end_as_they_do(
    zygote: ZygoteProcess, launch: Callable[..., Launched]
) -> None:
    by_status, by_signal, by_kill = launch(), launch(), launch()
    zygote.process.kill()
    zygote.process.communicate()
    for launched in (by_status, by_signal, by_kill):
        assert launched.get().startswith(b"HTTP/1.1 200")
    by_status.process.send_signal(signal.SIGHUP)
    assert by_status.process.wait(TIMEOUT) == 156
    # Which signal it was, the kernel tells from 6.15 on.
    version = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    by_signal.process.send_signal(signal.SIGTERM)
    assert by_signal.process.wait(TIMEOUT) in {-signal.SIGTERM, *([] if version >= (6, 15) else [-9])}
    os.kill(by_kill.monitor, signal.SIGKILL)
    assert by_kill.process.wait(TIMEOUT) == -signal.SIGKILL


def test_no_child_stays_as_a_zombie(zygote: ZygoteProcess, launch: Callable[..., Launched]) -> None:
    for launched in [launch() for _ in range(3)]:
        launched.close()
    assert launch_to_end(zygote, "--version").returncode == 0
    eventually(zygote.is_idle)


def test_a_stopped_launcher_stops_its_monitor(launch: Callable[..., Launched]) -> None:
    launched = launch()
    for number, state in (
        (signal.SIGTSTP, "T"),
        (signal.SIGCONT, "S"),
        (signal.SIGTTIN, "T"),
        (signal.SIGCONT, "S"),
    ):
        launched.process.send_signal(number)
        eventually(lambda state=state: launched.state() == (state, state))
    assert launched.get().startswith(b"HTTP/1.1 200")


def test_signals_that_come_early_are_not_lost(zygote: ZygoteProcess, tmp_path: Path) -> None:
    for _ in range(10):
        process = subprocess.Popen(
            [*zygote.command, "--api-sock", "early", "--level", "Off"], cwd=tmp_path, stdin=subprocess.DEVNULL
        )
        process.terminate()
        assert process.wait(TIMEOUT) == -signal.SIGTERM
        (tmp_path / "early").unlink(missing_ok=True)


# -- what a child has --------------------------------------------------------------------------------------------------


def descriptors(pid: int) -> dict[str, str]:
    """What each is open on, without the numbers of what is made anew."""
    names = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            names[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return {fd: re.sub(r":\[\d+", ":[N", name) for fd, name in names.items() if "kvm" not in name}


def without_children(zygote: ZygoteProcess) -> dict[str, str]:
    """What the zygote has open, once it has no child any more."""
    found = descriptors(zygote.process.pid)
    names = list(found.values())
    # A spare that is not there yet has the socket that a child still has.
    alone = names.count("socket:[N]") == 1 + zygote.spares and "anon_inode:[pidfd]" not in names
    return found if alone else {}


def test_children_have_the_same_few_descriptors(
    zygote: ZygoteProcess, launch: Callable[..., Launched]
) -> None:
    assert launch_to_end(zygote, "--version").returncode == 0
    alone = eventually(lambda: without_children(zygote))
    first, second = launch(), launch()
    # The streams, the lifeline, the listener twice, epoll, and the pipe of signals; KVM's are left out.
    wanted = ["/dev/null"] * 2 + ["anon_inode:[eventpoll]"] + ["pipe:[N]"] * 2 + ["socket:[N]"] * 3
    wanted = sorted([*wanted, os.readlink("/proc/self/fd/2")])
    for pid in (first.monitor, second.monitor):
        eventually(lambda pid=pid: sorted(descriptors(pid).values()) == wanted)
    first.close()
    second.close()
    assert sorted(eventually(lambda: without_children(zygote)).values()) == sorted(alone.values())


def test_other_descriptors_that_a_client_leaves_open_are_the_monitors(
    launch: Callable[..., Launched], tmp_path: Path
) -> None:
    with (tmp_path / "kept").open("w") as file:
        launched = launch(pass_fds=[file.fileno()])
        assert os.readlink(f"/proc/{launched.monitor}/fd/{file.fileno()}") == str(tmp_path / "kept")


def test_directory_mask_limits_and_niceness_are_the_launchers(
    launch: Callable[..., Launched], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def prepare() -> None:
        os.umask(0o027)
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        Path("/proc/self/oom_score_adj").write_text("77")

    launched = launch(cwd=elsewhere, preexec_fn=prepare)
    for name in ("limits", "oom_score_adj", "personality", "cgroup"):
        assert (
            Path(f"/proc/{launched.monitor}/{name}").read_text()
            == Path(f"/proc/{launched.process.pid}/{name}").read_text()
        )
    pids = (launched.monitor, launched.process.pid)
    assert len({os.sched_getaffinity(pid) == os.sched_getaffinity(pids[0]) for pid in pids}) == 1
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [os.nice(0) + 3] * 2
    assert os.readlink(f"/proc/{launched.monitor}/cwd") == str(elsewhere)
    assert launched.socket.stat().st_mode & 0o777 == 0o750


def test_the_process_is_listed_as_what_it_is(launch: Callable[..., Launched]) -> None:
    launched = launch()
    assert Path(f"/proc/{launched.monitor}/comm").read_text() == "crackle-vmm\n"
    line = Path(f"/proc/{launched.monitor}/cmdline").read_bytes()
    assert line.rstrip(b"\0").startswith(b"crackle-vmm --api-sock /")


def test_a_relative_socket_is_in_the_launchers_directory(zygote: ZygoteProcess, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    done = launch_to_end(zygote, "--no-api", "--config-file", "missing", cwd=tmp_path / "a")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: Unable to open or read from the configuration file: No such file or directory (os error 2): missing\n",
    )


def test_the_network_namespace_is_the_launchers(
    zygote: ZygoteProcess, namespace: Namespace, tmp_path: Path
) -> None:
    path = tmp_path / "api"
    process = subprocess.Popen(
        namespace.command(*zygote.command, "--api-sock", str(path), "--level", "Off"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        eventually(path.exists)
        (monitor,) = zygote.monitors()
        launchers = os.readlink(f"/proc/{process.pid}/ns/net")
        assert os.readlink(f"/proc/{monitor}/ns/net") == launchers != os.readlink("/proc/self/ns/net")
    finally:
        process.kill()
        process.wait()


def test_another_mount_namespace_and_root_are_the_launchers(zygote: ZygoteProcess, tmp_path: Path) -> None:
    if os.getuid() or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs a mount namespace")
    (tmp_path / "over").mkdir()
    script = f'mount -t tmpfs none {tmp_path}/over && echo {{ > {tmp_path}/over/config && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *zygote.command]
    done = subprocess.run(
        [*command, "--no-api", "--config-file", f"{tmp_path}/over/config"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 1
    assert "Invalid JSON" in done.stderr
    assert done.stderr.count("\n") == 1


def cgroup_directories() -> list[Path]:
    """A writable directory of each version of cgroups that is here."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 ") or (right.startswith("cgroup ") and "pids" in right.split()[2]):
            found.append(Path(left.split()[4]))
    return [path for path in found if os.access(path / "cgroup.procs", os.W_OK)]


def test_cgroups_are_the_launchers(launch: Callable[..., Launched]) -> None:
    mounts = cgroup_directories()
    if not mounts:
        pytest.skip("no cgroup can be made here")
    groups = [mount / f"crackle-test-{os.getpid()}" for mount in mounts]
    with contextlib.ExitStack() as stack:
        for group in groups:
            group.mkdir()
            stack.callback(group.rmdir)
        launched = launch(
            preexec_fn=lambda: [(group / "cgroup.procs").write_text(str(os.getpid())) for group in groups]
        )
        stack.callback(lambda: eventually(lambda: not any((g / "cgroup.procs").read_text() for g in groups)))
        stack.callback(launched.close)
        text = Path(f"/proc/{launched.monitor}/cgroup").read_text()
        assert text == Path(f"/proc/{launched.process.pid}/cgroup").read_text()
        assert text.count(f"crackle-test-{os.getpid()}") == len(groups)


def test_environment_and_time_zone_are_the_launchers(
    program: Callable[[str], ZygoteProcess],
) -> None:
    zygote = program(
        "import time\nhour = time.localtime(0).tm_hour\n"
        "print(os.environ.get('NEW'), os.environ.get('HOME'), hour, flush=True)\nreturn 0"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = launch_to_end(zygote, env={**environment, "NEW": "1", "TZ": "XYZ-5"})
    assert (done.stdout, done.stderr) == ("1 None 5\n", "")


def test_children_draw_different_random_numbers(program: Callable[[str], ZygoteProcess]) -> None:
    zygote = program("print(random.random(), os.urandom(8).hex(), flush=True)\nreturn 0")
    drawn = [word for _ in range(2) for word in launch_to_end(zygote).stdout.split()]
    assert len(set(drawn)) == 4


def test_no_child_imports_anything(tmp_path: Path) -> None:
    script = tmp_path / "recording"
    script.write_text(
        "import os, sys\nfrom crackle.cli import vmm, zygote\nfrom crackle.runtime.zygote import Zygote, listen\n"
        "zygote.load()\n"
        "def run(arguments, shell):\n"
        "    sys.addaudithook(lambda event, given: event == 'import' and os.write(2, given[0].encode() + b'\\n'))\n"
        "    return vmm.run(arguments, shell)\n"
        "Zygote(listen(sys.argv[1]), run).serve()\n"
    )
    zygote = ZygoteProcess(tmp_path / "socket", str(script), str(tmp_path / "socket"))
    try:
        process = subprocess.Popen(
            [*zygote.command, "--api-sock", "api", "--level", "Off"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually((tmp_path / "api").exists)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "api"))
            for request in (b"GET / HTTP/1.1\r\n\r\n", b"PUT /vm HTTP/1.1\r\nContent-Length: 1\r\n\r\n{"):
                client.sendall(request)
                assert client.recv(4096)
        process.terminate()
        assert process.communicate(timeout=TIMEOUT)[1] == ""
    finally:
        zygote.end()


# -- who is served, and who is not -------------------------------------------------------------------------------------


def connect(zygote: ZygoteProcess) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(TIMEOUT)
    connection.connect(str(zygote.path))
    return connection


def listens(path: Path) -> bool:
    """Whether somebody does, at this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        return connection.connect_ex(str(path)) == 0


def test_those_who_say_nothing_keep_nobody_waiting(zygote: ZygoteProcess) -> None:
    silent = [connect(zygote) for _ in range(20)]
    started = time.monotonic()
    assert launch_to_end(zygote, "--version").returncode == 0
    for connection in silent:
        assert b"has sent nothing" in connection.recv(4096)
        connection.close()
    assert time.monotonic() - started < TIMEOUT
    eventually(zygote.is_idle)


def request(version: bytes, strings: bytes, arguments: int, variables: int, *fds: int) -> bytes:
    numbers = [*fds, *([0] * (64 - len(fds)))]
    return REQUEST.pack(version, 0, arguments, variables, len(fds), *numbers) + strings


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", b"too short or too long"),
        (b"x", b"too short or too long"),
        (b"\xff" * 4096, b"another version"),
        (request(b"9.9.9", b"a\0", 1, 0, 0, 1, 2), b"another version"),
        (request(b"0.1.0", b"a\0b\0", 1, 0, 0, 1, 2), b"strings"),
        (request(b"0.1.0", b"a\0b", 1, 0, 0, 1, 2), b"strings"),
        (request(b"0.1.0", b"", 0, 0, 0, 1, 2), b"strings"),
        (request(b"0.1.0", b"a\0", 1, 0), b"descriptors"),
        (request(b"0.1.0", b"a\0", 1, 0, 0, 1), b"descriptors"),
        (request(b"0.1.0", b"a\0", 1, 0, 0, 1, 1), b"descriptors"),
        (request(b"0.1.0", b"a\0", 1, 0, 0, 1, 1 << 30), b"descriptors"),
        (b"\0" * (129 << 10), b"too short or too long"),
    ],
)
def test_a_request_that_is_none_is_refused(zygote: ZygoteProcess, message: bytes, reason: bytes) -> None:
    with connect(zygote) as connection:
        fds = [0, 1, 2]
        socket.send_fds(connection, [message or b"\0"], fds) if message else connection.shutdown(
            socket.SHUT_WR
        )
        answer = connection.recv(4096)
        assert answer[:1] == b"R"
        assert reason in answer
    assert launch_to_end(zygote, "--version").returncode == 0


def test_another_users_launcher_is_not_served(zygote: ZygoteProcess, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs another user")
    assert zygote.path.stat().st_mode & 0o777 == 0o600
    zygote.path.chmod(0o666)
    open_path = Path(f"/tmp/crackle-zygote-{os.getpid()}")
    os.link(zygote.path, open_path)
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); print(s.recv(99))"
    )
    try:
        done = subprocess.run(
            ["python3", "-c", script, str(open_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert done.stdout == "b''\n", done.stderr
        assert zygote.is_idle()
    finally:
        open_path.unlink()


def fallen_back(
    tmp_path: Path, zygote: Path, *arguments: str, prefix: Sequence[str] = (), **options: Any
) -> str:
    """What the launcher says before it executes crackle-vmm, which here is a program beside it."""
    shutil.copy(LAUNCHER, tmp_path / "launcher")
    instead = tmp_path / "crackle-vmm"
    instead.write_text('#!/bin/sh\necho "instead $@"\nexit 7\n')
    instead.chmod(0o755)
    command = [*prefix, *by_launcher(zygote)[:-1], str(tmp_path / "launcher"), *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, text=True, check=False, timeout=TIMEOUT, **{**streams, **options})
    assert (done.returncode, done.stdout) == (7, f"instead {' '.join(arguments)}\n"), done
    return done.stderr


def test_without_a_zygote_it_executes_the_monitor(tmp_path: Path) -> None:
    said = "crackle-launch: no zygote answers; executing crackle-vmm\n"
    assert fallen_back(tmp_path, tmp_path / "none", "--id", "a") == said
    (tmp_path / "file").touch()
    assert fallen_back(tmp_path, tmp_path / "file") == said


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PYTHONHASHSEED": "1"}, "a variable like PYTHON... or LD_... is not as the zygote has it"),
        ({"LD_PRELOAD": ""}, "a variable like PYTHON... or LD_... is not as the zygote has it"),
        ({"LC_ALL": "de_DE.ISO-8859-1"}, "the locale's characters are not UTF-8"),
        ({"LARGE": "x" * 100_000, "LARGER": "x" * 100_000}, "the request does not fit, or cannot be sent"),
    ],
)
def test_what_works_only_at_an_interpreters_start_is_left_to_one(
    zygote: ZygoteProcess, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    assert reason in fallen_back(tmp_path, zygote.path, env={**os.environ, **variables})


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (["setpriv", "--bounding-set=-sys_admin"], "CapPrm in /proc/PID/status differs"),
        (["setpriv", "--groups=7"], "Groups in /proc/PID/status differs"),
        (["setarch", "-R"], "/proc/PID/personality differs"),
        (["unshare", "--pid", "--fork"], "it is in another pid namespace"),
        (["unshare", "--user", "--map-root-user"], "CapPrm in /proc/PID/status differs"),
    ],
)
def test_other_privileges_and_namespaces_are_left_to_the_monitor_itself(
    zygote: ZygoteProcess, tmp_path: Path, prefix: list[str], reason: str
) -> None:
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip(f"{prefix[0]} is not allowed here")
    assert reason in fallen_back(tmp_path, zygote.path, prefix=prefix)


def test_no_new_privileges_are_the_launchers(launch: Callable[..., Launched]) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    import ctypes

    launched = launch(preexec_fn=lambda: ctypes.CDLL(None).prctl(38, 1, 0, 0, 0))
    assert "NoNewPrivs:\t1" in Path(f"/proc/{launched.monitor}/status").read_text()


def test_spares_end_with_the_zygote_and_one_that_is_killed_is_replaced(tmp_path: Path) -> None:
    zygote = ZygoteProcess(tmp_path / "zygote", spares=2)
    first = eventually(lambda: len(zygote.children()) == 2 and zygote.children())
    os.kill(first[0], signal.SIGKILL)
    assert launch_to_end(zygote, "--version").returncode == 0
    # The other may have been the launcher's, or not: the zygote may have learned of the death first.
    eventually(lambda: len(zygote.children()) == 2 and first[0] not in zygote.children())
    last = zygote.children()
    zygote.process.kill()
    zygote.process.communicate()
    eventually(lambda: all(gone(pid) for pid in last))


# -- the zygote itself -------------------------------------------------------------------------------------------------


def test_the_zygote_executes_itself_anew_when_its_code_has_changed(
    program: Callable[[str], ZygoteProcess], tmp_path: Path
) -> None:
    zygote = program("print('here', flush=True)\nif arguments: sys.stdin.read()\nreturn value.VALUE")
    assert launch_to_end(zygote).returncode == 17
    waiting = subprocess.Popen(
        [*zygote.command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"here\n"
    (tmp_path / "value.py").write_text("VALUE = 18  # another size\n")

    def renewed() -> bool:
        shutil.copy(LAUNCHER, tmp_path / "launcher")
        command = [*zygote.command[:-1], str(tmp_path / "launcher")]
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=TIMEOUT
        )
        # Until then it refuses, and there is nothing beside this launcher to execute.
        assert done.returncode in (18, 17, 1)
        return done.returncode == 18

    eventually(renewed)
    # The child of before is still its child.
    waiting.communicate(timeout=TIMEOUT)
    assert waiting.returncode == 17
    eventually(zygote.is_idle)


def test_the_socket_of_a_dead_zygote_is_replaced_and_a_living_ones_is_not(
    zygote: ZygoteProcess, tmp_path: Path
) -> None:
    second = subprocess.run(
        ["crackle", "zygote", "--socket", str(zygote.path)],
        executable=LAUNCHER.with_name("crackle"),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert second.returncode == 1
    assert second.stderr.startswith("crackle zygote: Cannot listen for launchers at")
    zygote.process.kill()
    zygote.process.communicate()
    assert zygote.path.exists()
    replaced = ZygoteProcess(zygote.path, appears=listens)
    assert launch_to_end(replaced, "--version").returncode == 0
    replaced.end()
    assert not zygote.path.exists()


def test_a_socket_of_systemds_is_served_and_left_there(tmp_path: Path) -> None:
    path = tmp_path / "activated"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
    zygote = ZygoteProcess(
        path,
        command=["sh", "-c", script, "sh", str(LAUNCHER.with_name("crackle")), "zygote"],
        preexec_fn=lambda: os.dup2(listener.fileno(), 3),
        close_fds=False,
    )
    listener.close()
    done = launch_to_end(zygote, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Crackle v{VERSION}" in done.stdout
    assert zygote.end() == ""
    assert path.exists()
