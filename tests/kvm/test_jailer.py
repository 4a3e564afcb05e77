"""crackle-jailer, seen from outside: where its monitor is, what it may; and a guest runs in it as anywhere else."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle.jail.options import OPTIONS
from support.documents import Reader, blocks
from support.jails import EMPTY_ROOT, JAILER, NONE, OWN, RECORDED, Jailed, descriptors, tree
from support.vhost_user import Impostor

from .conftest import PATIENCE, Client, Process
from .test_preload import configure, use

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Callable[..., Jailed]]:
    """Makes jails, in a folder of their own."""
    made: list[Jailed] = []
    base = tmp_path / "jails"
    base.mkdir()

    def make(name: str = "one") -> Jailed:
        made.append(Jailed(base, name))
        return made[-1]

    yield make
    for each in made:
        each.end()


def client(jailed: Jailed) -> Client:
    return Client(jailed.root / "api.sock")


def boot(jailed: Jailed, kernel: str, **sections: Any) -> Client:
    api = client(jailed)
    api.ask("PUT", "/boot-source", {"kernel_image_path": f"/{kernel}", "boot_args": ""})
    api.ask("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
    for path, body in sections.items():
        api.ask("PUT", f"/{path.replace('__', '/')}", body)
    api.ask("PUT", "/actions", {"action_type": "InstanceStart"})
    return api


# -- seen from outside -------------------------------------------------------------------------------------------------


def test_its_root_holds_devices_and_the_users_files_and_is_the_jails_users(
    jail: Callable[..., Jailed], guests: Path
) -> None:
    one = jail()
    one.give(guests / "echo.elf")
    one.start()
    expected = {
        **EMPTY_ROOT,
        "echo.elf": (guests / "echo.elf").stat().st_mode,
        "api.sock": stat.S_IFSOCK | 0o755,
    }
    assert tree(Path(f"/proc/{one.pid}/root")) == expected
    assert tree(one.root) == expected
    for path in (one.root, *(one.root / name for name in expected if name != "crackle-vmm.pid")):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (one.user, one.user + 1000), path
    assert stat.S_IMODE(one.root.stat().st_mode) == 0o700
    for device, number in (("kvm", (10, 232)), ("net/tun", (10, 200)), ("urandom", (1, 9))):
        found = (one.root / "dev" / device).stat().st_rdev
        assert (os.major(found), os.minor(found)) == number
    assert os.readlink(f"/proc/{one.pid}/cwd") == "/"
    (mount,) = Path(f"/proc/{one.pid}/mountinfo").read_text().splitlines()
    assert mount.split()[4] == "/"


def test_it_has_no_privileges(jail: Callable[..., Jailed]) -> None:
    one = jail().start()
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert one.status(kind) == [NONE], kind
    assert one.status("NoNewPrivs") == ["1"]
    assert one.status("Uid") == [str(one.user)] * 4
    assert one.status("Gid") == [str(one.user + 1000)] * 4
    assert one.status("Groups") == []
    # It may not be traced, and leaves no core: its files of /proc are root's then (proc(5)).
    assert os.stat(f"/proc/{one.pid}/mem").st_uid == 0


def test_root_in_a_jail_has_no_capabilities_either(jail: Callable[..., Jailed]) -> None:
    one = jail()
    one.user = 0
    one.start()
    assert one.status("Uid") == ["0"] * 4
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        assert one.status(kind) == [NONE], kind


def test_its_descriptors_are_those_of_a_monitor_without_a_jail_and_two_about_itself(
    jail: Callable[..., Jailed], spawn: Callable[..., Process]
) -> None:
    free = spawn("--level", "Off")
    read, write = os.pipe()
    one = jail().start(pass_fds=[write])
    os.close(read)
    os.close(write)
    # Each makes a virtual machine ahead, and is done with that at some time.
    deadline = time.monotonic() + PATIENCE
    while (found := descriptors(one.pid)) != (expected := sorted([*descriptors(free.process.pid), *OWN])):
        assert time.monotonic() < deadline, f"{found} and not {expected}"
    assert "anon_inode:kvm-vm" in found


def test_its_environment_and_command_line_are_those_of_a_monitor(jail: Callable[..., Jailed]) -> None:
    one = jail().start(command=("env", "SECRET=hidden", *JAILER))
    assert b"hidden" not in Path(f"/proc/{one.pid}/environ").read_bytes()
    line = Path(f"/proc/{one.pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    assert line.startswith("/crackle-vmm --id one --start-time-us ")
    assert line.endswith("--api-sock api.sock")
    assert Path(f"/proc/{one.pid}/comm").read_text() == "crackle-vmm\n"


def test_the_metrics_say_how_long_it_took_from_the_jailers_start(jail: Callable[..., Jailed]) -> None:
    one = jail()
    one.root.mkdir(parents=True)
    one.start("--", "--metrics-path", "metrics", "--no-drive-locks")
    client(one).ask("PUT", "/actions", {"action_type": "FlushMetrics"}, expect=400)
    client(one).ask("GET", "/", expect=200)
    one.process.send_signal(signal.SIGHUP)
    assert one.process.wait(PATIENCE) == 156
    found = json.loads((one.root / "metrics").read_text().splitlines()[-1])["api_server"]
    assert 1_000 < found["process_startup_time_us"] < 60_000_000
    assert 1_000 < found["process_startup_time_cpu_us"] < 60_000_000


# -- what the options do -----------------------------------------------------------------------------------------------


def test_it_is_process_1_of_a_namespace_and_its_number_outside_is_in_the_pid_file(
    jail: Callable[..., Jailed],
) -> None:
    one = jail().start("--new-pid-ns")
    assert one.process.wait(PATIENCE) == 0
    assert one.pid != one.process.pid
    assert one.status("NSpid") == [str(one.pid), "1"]
    assert one.namespace("pid") != os.readlink("/proc/self/ns/pid")
    assert client(one).ask("GET", "/", expect=200)["id"] == "one"


def test_the_pid_file_has_the_monitors_number_without_a_namespace_too(jail: Callable[..., Jailed]) -> None:
    one = jail().start()
    assert one.pid == one.process.pid
    assert one.namespace("pid") == os.readlink("/proc/self/ns/pid")
    assert one.namespace("net") == os.readlink("/proc/self/ns/net")
    assert one.namespace("mnt") != os.readlink("/proc/self/ns/mnt")


@pytest.mark.parametrize("more", [[], ["--new-pid-ns"]])
def test_a_daemon_has_a_session_and_no_streams(jail: Callable[..., Jailed], more: list[str]) -> None:
    one = jail().start("--daemonize", *more)
    assert one.process.wait(PATIENCE) == 0
    assert os.getsid(one.pid) not in (os.getsid(0), one.pid)
    # Of another file system by now, so its name is that of the device there.
    streams = {os.stat(f"/proc/{one.pid}/fd/{fd}").st_rdev for fd in range(3)}
    assert streams == {os.stat("/dev/null").st_rdev}
    assert one.process.communicate()[0] == b""


def test_it_joins_the_network_namespace(jail: Callable[..., Jailed], namespace: Any) -> None:
    one = jail().start("--netns", namespace.path)
    assert os.stat(f"/proc/{one.pid}/ns/net").st_ino == os.fstat(namespace.fd).st_ino


@pytest.mark.parametrize(
    ("given", "fsize", "nofile"),
    [([], "unlimited", "2048"), (["fsize=250000000", "no-file=1024"], "250000000", "1024")],
)
def test_resource_limits(jail: Callable[..., Jailed], given: list[str], fsize: str, nofile: str) -> None:
    one = jail().start(*(word for limit in given for word in ("--resource-limit", limit)))
    limits = {line[:26].strip(): line[26:].split() for line in _lines(f"/proc/{one.pid}/limits")}
    assert limits["Max file size"][:2] == [fsize] * 2
    assert limits["Max open files"][:2] == [nofile] * 2


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


# -- a guest in it -----------------------------------------------------------------------------------------------------


def test_a_guest_boots_is_saved_and_loaded_and_nothing_is_imported_in_the_jail(
    jail: Callable[..., Jailed], guests: Path, tmp_path: Path
) -> None:
    for name in ("disk", "other"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    recorded = (sys.executable, "-c", RECORDED)
    one = jail()
    one.give(guests / "count.elf", tmp_path / "disk", tmp_path / "other")
    one.start(command=recorded)
    drive = {"drive_id": "d", "is_root_device": False, "path_on_host": "/disk"}
    api = boot(one, "count.elf", drives__d=drive)
    one.wait_for("count 3")
    threads = [task.name for task in Path(f"/proc/{one.pid}/task").iterdir()]
    assert len(threads) > 2
    for thread in threads:
        lines = _lines(f"/proc/{one.pid}/task/{thread}/status")
        assert {"NoNewPrivs:\t1", "Seccomp:\t2"} <= set(lines), lines
    api.ask("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/other"})
    api.ask("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/etc/passwd"}, expect=400)
    api.ask("PATCH", "/vm", {"state": "Paused"})
    api.ask("PUT", "/snapshot/create", {"snapshot_path": "/state", "mem_file_path": "/memory"})
    one.end()
    assert one.imports() == []

    two = jail("two")
    two.give(*(one.root / name for name in ("state", "memory", "disk", "other")))
    two.start(command=recorded)
    api = client(two)
    backend = {"backend_type": "File", "backend_path": "/memory"}
    load = {"snapshot_path": "/state", "mem_backend": backend, "resume_vm": True}
    api.ask("PUT", "/snapshot/load", load)
    two.wait_for("count 6")
    api.ask("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/disk"})
    two.process.terminate()
    assert two.process.wait(PATIENCE) == -signal.SIGTERM
    assert two.imports() == []


def test_a_snapshot_is_loaded_from_a_page_fault_handler_outside(
    jail: Callable[..., Jailed], guests: Path
) -> None:
    one = jail()
    one.give(guests / "count.elf")
    one.start()
    api = boot(one, "count.elf")
    one.wait_for("count 3")
    api.ask("PATCH", "/vm", {"state": "Paused"})
    api.ask("PUT", "/snapshot/create", {"snapshot_path": "/state", "mem_file_path": "/memory"})
    one.end()

    two = jail("two")
    two.give(one.root / "state")
    two.start(command=(sys.executable, "-c", RECORDED))
    command = [sys.executable, "-m", "support.page_handler", two.root / "faults", one.root / "memory"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as handler:
        try:
            assert handler.stdout is not None
            assert handler.stdout.readline() == b"ready\n"
            os.chown(two.root / "faults", two.user, -1)
            backend = {"backend_type": "Uffd", "backend_path": "/faults"}
            load = {"snapshot_path": "/state", "mem_backend": backend, "resume_vm": True}
            client(two).ask("PUT", "/snapshot/load", load)
            two.wait_for("count 6")
        finally:
            two.end()
            handler.kill()
    assert two.imports() == []


def test_nothing_is_imported_in_the_jail_whatever_the_microvm_has(
    jail: Callable[..., Jailed], guests: Path, tmp_path: Path, namespace: Any
) -> None:
    one = jail()
    # Files have the same names inside and outside, and all are root's.
    one.user = 0
    inside = one.root / str(tmp_path / "both").lstrip("/")
    inside.mkdir(parents=True)
    (tmp_path / "both").symlink_to(inside)
    os.chown(one.root, 0, 0)
    (inside / "log").touch()
    shutil.copy(guests / "echo.elf", inside)
    backend = Impostor(tmp_path / "both" / "backend")
    try:
        # Making a TAP takes a capability.
        namespace.tap("preload0")
        recorded = (sys.executable, "-c", RECORDED)
        one.start("--netns", namespace.path, "--", "--boot-timer", command=recorded)
        everything = {"logger", "metrics", "Sync", "Async", "vhost-user", "vsock", "net", "mmds"}
        api = client(one)
        configure(api, tmp_path / "both", tmp_path / "both", everything, backend)
        api.ask("PUT", "/actions", {"action_type": "InstanceStart"})
        use(api, tmp_path / "both", everything)
        # A second after the start what only the start needed is given back.
        select.select([], [], [], 1.2)
        api.close()
        one.process.stdin.write(b"end\n")
        one.process.stdin.flush()
        assert one.process.wait(PATIENCE) == 0
    finally:
        backend.close()
    assert one.imports() == []


def test_a_configuration_file_and_a_guest_that_fails(jail: Callable[..., Jailed], guests: Path) -> None:
    one = jail()
    one.give(guests / "faults.elf")
    config = {
        "boot-source": {"kernel_image_path": "/faults.elf", "boot_args": "f=triple"},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    }
    (one.root / "config").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", RECORDED, *one.arguments("--", "--no-api", "--config-file", "config")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done
    assert one.imports() == []


def test_an_unexpected_exception_is_reported_as_anywhere_else(jail: Callable[..., Jailed]) -> None:
    one = jail()
    broken = f"from crackle.cli import vmm\nvmm._serve = None\n{RECORDED}"
    done = subprocess.run(
        [sys.executable, "-c", broken, *one.arguments()], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "TypeError" in done.stderr
    assert one.imports() == []


def test_refusals_say_why_with_firecrackers_status(tmp_path: Path) -> None:
    done = subprocess.run([*JAILER, "--id", "a/b"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == "Failed to parse arguments: Argument 'exec-file' required, but not found.\n"


def test_help_and_version_go_before_everything_else() -> None:
    for given in (["--version"], ["--help"], ["-h"], ["--nonsense", "--version"]):
        done = subprocess.run([*JAILER, *given], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0
        assert re.match(r"Jailer v1\.\d+\.\d+\n\nCrackle v", done.stdout)
        for name in OPTIONS if "--version" not in given else ():
            assert f"--{name}" in done.stdout


def test_the_document_is_true(tmp_path: Path) -> None:
    if not Path(sysconfig.get_path("scripts"), "crackle-jailer").exists():
        pytest.skip("crackle-jailer is not installed: make setup")
    with Reader(tmp_path) as reader:
        for block in blocks(Path("docs/jailer.md")):
            # The others boot Linux.
            if block.language == "console":
                reader.do(block)
