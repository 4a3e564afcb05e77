"""crackle-launch-jailer: what comes from a zygote is in its jail as what crackle-jailer itself has become."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.jails import EMPTY_ROOT, NONE, OWN, Jailed, descriptors, tree
from support.launcher import LAUNCHER, ZygoteProcess, own_kib

from .conftest import PATIENCE, Client

LAUNCHER_OF_JAILS = LAUNCHER.with_name("crackle-launch-jailer")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root"),
    pytest.mark.skipif(not LAUNCHER_OF_JAILS.exists(), reason="`make build` makes crackle-launch-jailer"),
]


@pytest.fixture(scope="module", params=[0, 1], ids=["fresh", "spare"])
def zygote(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ZygoteProcess]:
    zygote = ZygoteProcess(tmp_path_factory.mktemp("zygote") / "socket", spares=request.param)
    yield zygote
    assert zygote.end() == ""


@pytest.fixture
def start(jailed: Jailed, zygote: ZygoteProcess) -> Callable[..., Jailed]:
    """Starts the jail by way of the zygote; what the launcher would say if it did not take that is none."""

    def start(*more: str, level: str = "Off") -> Jailed:
        jailed.start(*more, command=command(zygote), level=level)
        assert "crackle-launch" not in jailed.read()
        return jailed

    return start


def command(zygote: ZygoteProcess) -> list[str]:
    return [*zygote.command[:-1], str(LAUNCHER_OF_JAILS)]


def test_seen_from_outside_it_is_the_same(
    start: Callable[..., Jailed], jailed: Jailed, zygote: ZygoteProcess, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    plain = Jailed(tmp_path / "plain").start()
    try:
        one = start()
        assert one.process is not None
        assert one.pid != one.process.pid
        for each in (plain, one):
            # It has set itself up when it answers.
            api = Client(each.root / "api.sock")
            api.ask("GET", "/", expect=200)
            api.close()
        assert one.pid in zygote.children()
        assert tree(one.root) == tree(plain.root)
        assert tree(one.root).keys() == {*EMPTY_ROOT, "api.sock"}
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert one.status(kind) == [NONE], kind
        for kind in ("NoNewPrivs", "Groups", "SigIgn", "SigBlk"):
            assert one.status(kind) == plain.status(kind), kind
        assert one.status("Uid") == [str(one.user)] * 4
        assert one.status("Gid") == [str(one.user + 1000)] * 4
        for kind in ("net", "pid", "user", "ipc", "uts"):
            assert one.namespace(kind) == plain.namespace(kind), kind
        assert one.namespace("mnt") not in (plain.namespace("mnt"), os.readlink("/proc/self/ns/mnt"))
        (mount,) = Path(f"/proc/{one.pid}/mountinfo").read_text().splitlines()
        assert mount.split()[4] == "/"
        for name in ("comm", "limits", "cgroup"):
            assert (
                Path(f"/proc/{one.pid}/{name}").read_text() == Path(f"/proc/{plain.pid}/{name}").read_text()
            )
        assert os.stat(f"/proc/{one.pid}/mem").st_uid == 0
        # One more: its launcher's end is its own.
        deadline = time.monotonic() + PATIENCE
        while descriptors(one.pid) != sorted([*descriptors(plain.pid), "socket"]):
            assert time.monotonic() < deadline, (descriptors(one.pid), descriptors(plain.pid))
    finally:
        plain.end()


def test_a_guest_runs_in_it_and_its_launcher_stands_for_it(
    start: Callable[..., Jailed], jailed: Jailed, guests: Path
) -> None:
    jailed.give(guests / "echo.elf")
    one = start("--", "--log-path", "log", level="Error")
    assert one.process is not None
    api = Client(one.root / "api.sock")
    api.ask("PUT", "/boot-source", {"kernel_image_path": "/echo.elf", "boot_args": ""})
    waiting = own_kib(one.pid)
    api.ask("PUT", "/actions", {"action_type": "InstanceStart"})
    one.wait_for("echo\n")
    # A second after the start what only the start needed is given back, and more than that.
    deadline = time.monotonic() + PATIENCE
    while own_kib(one.pid) > 0.6 * waiting:
        assert time.monotonic() < deadline, (waiting, own_kib(one.pid))
        time.sleep(0.05)
    assert (one.root / "log").read_text() == ""
    one.process.terminate()
    assert one.process.wait(PATIENCE) == -signal.SIGTERM


def test_when_its_launcher_is_killed_it_is_too(start: Callable[..., Jailed]) -> None:
    one = start()
    assert one.process is not None
    end = os.pidfd_open(one.pid)
    one.process.kill()
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{one.pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(end)


@pytest.mark.parametrize(
    "more", [["--new-pid-ns"], ["--daemonize"], ["--daemonize", "--new-pid-ns"]], ids=" ".join
)
def test_a_daemon_and_process_1_outlive_their_launcher(start: Callable[..., Jailed], more: list[str]) -> None:
    one = start(*more)
    assert one.process is not None
    assert one.process.wait(PATIENCE) == 0
    assert Client(one.root / "api.sock").ask("GET", "/", expect=200)["id"] == "one"
    # What it may know is of itself, whoever forked it.
    assert set(OWN) <= set(descriptors(one.pid))
    if "--new-pid-ns" in more:
        assert one.status("NSpid")[1:] == ["1"]
    if "--daemonize" in more:
        assert os.getsid(one.pid) not in (os.getsid(0), one.pid)


def test_refusals_are_the_jailers(jailed: Jailed, zygote: ZygoteProcess) -> None:
    arguments = jailed.arguments("--netns", "/no/such")
    done = subprocess.run([*command(zygote), *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == "Failed to open file /no/such: No such file or directory (os error 2)\n"
    assert tree(jailed.base) == {}


def test_without_a_zygote_it_is_crackle_jailer(jailed: Jailed, tmp_path: Path) -> None:
    if not LAUNCHER.with_name("crackle-jailer").exists():
        pytest.skip("crackle-jailer is not installed")
    environment = {**os.environ, "CRACKLE_ZYGOTE": str(tmp_path / "none"), "CRACKLE_LAUNCH_DEBUG": "1"}
    done = subprocess.run(
        [LAUNCHER_OF_JAILS, "--version"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.startswith("Jailer v")
    assert "executing crackle-jailer" in done.stderr
