"""What crackle-jailer refuses, and that nothing is left of it; what others try with its folders; many jails."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.jails import JAILER, PATIENCE, Herd, Jailed, tree

from .conftest import Client

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")

STRANGER = 60_500
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def parent() -> Iterator[str]:
    """A cgroup of the tests' own, in whichever hierarchy; what is in it is taken away."""
    name = f"crackle-test-{os.getpid()}"
    yield name
    for hierarchy in CGROUPS.iterdir():
        for group in sorted((hierarchy / name).rglob("*/"), reverse=True):
            group.rmdir()
        if (hierarchy / name).exists():
            (hierarchy / name).rmdir()


def groups(name: str) -> list[Path]:
    return sorted(path for hierarchy in CGROUPS.iterdir() for path in (hierarchy / name).rglob("*/"))


needs_v1 = pytest.mark.skipif(
    not (CGROUPS / "pids" / "tasks").exists() or not (CGROUPS / "cpuset" / "tasks").exists(),
    reason="no cgroups of version 1",
)


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    with Herd(tmp_path_factory.mktemp("herd") / "said", one_at_a_time=True) as herd:
        yield herd


def refusal(herd: Herd, arguments: list[str]) -> str:
    """What it says; its status is that of every refusal of Firecracker's."""
    before = herd.said.stat().st_size if herd.said.exists() else 0
    _, status = herd.start(arguments)
    text = herd.said.read_text()[before:]
    assert status == 1, text
    assert text.count("\n") == 1, text
    return text.strip()


def replaced(arguments: list[str], **values: str) -> list[str]:
    changed = list(arguments)
    for name, value in values.items():
        changed[changed.index(f"--{name.replace('_', '-')}") + 1] = value
    return changed


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    ({"id": "a/b"}, [], r"Invalid instance ID: Invalid char \(/\) at position 1"),
    ({"id": ""}, [], r"Invalid instance ID: Invalid len \(0\);  the length must be between 1 and 64"),
    ({"id": "a" * 65}, [], r"Invalid instance ID: Invalid len \(65\);  the length must be between 1 and 64"),
    ({"id": ".."}, [], r"Invalid instance ID: Invalid char \(\.\) at position 0"),
    ({"exec_file": "/no/such"}, [], r"Failed to canonicalize path /no/such: No such file or directory \(os error 2\)"),
    ({"exec_file": "/"}, [], r"/ is not a file"),
    ({"chroot_base_dir": "/no/such"}, [], r"Failed to canonicalize path /no/such: No such file .*"),
    ({"chroot_base_dir": "/dev/null"}, [], r"/dev/null is not a directory"),
    ({"uid": "nobody"}, [], r"Invalid uid: nobody"),
    ({"uid": "4294967296"}, [], r"Invalid uid: 4294967296"),
    ({"uid": "4294967295"}, [], r"Invalid uid: 4294967295"),
    ({"uid": "-1"}, [], r"Invalid uid: -1"),
    ({"gid": "1_000"}, [], r"Invalid gid: 1_000"),
    ({}, ["--netns", "/no/such"], r"Failed to open file /no/such: No such file or directory \(os error 2\)"),
    ({}, ["--netns", "/dev/null"], r"Failed to join network namespace: netns: Invalid argument \(os error 22\)"),
    ({}, ["--netns", "/proc/self/ns/mnt"], r"Failed to join network namespace: netns: Invalid argument .*"),
    ({}, ["--parent-cgroup", "/a"], r"Parent cgroup path is invalid\..*"),
    ({}, ["--parent-cgroup", "a/../.."], r"Parent cgroup path is invalid\..*"),
    ({}, ["--cgroup-version", "x"], r"x is an invalid cgroup version specifier"),
    ({}, ["--cgroup-version", "9", "--cgroup", "a.b=1"], r"Hierarchy not found: .*"),
    ({}, ["--cgroup", "pids.max"], r"Invalid format for cgroups: pids\.max"),
    ({}, ["--cgroup", "pids.max="], r"Invalid format for cgroups: pids\.max="),
    ({}, ["--cgroup", "../pids.max=1"], r"Cgroup invalid file: \.\./pids\.max=1"),
    ({}, ["--resource-limit", "fsize"], r"Invalid format for resources limits: fsize"),
    ({}, ["--resource-limit", "cores=1"], r"Invalid resource argument: cores"),
    ({}, ["--resource-limit", "fsize=many"], r"Invalid limit value for resource: many: .*"),
    ({}, ["--resource-limit", "no-file=99999999999"], r"Failed to set limit for resource: number of file descri.*"),
    ({}, ["--nonsense"], r"Failed to parse arguments: Found argument 'nonsense' which wasn't expected, .*"),
    ({}, ["nonsense"], r"Failed to parse arguments: Found argument 'nonsense' which wasn't expected, .*"),
    ({}, ["--uid", "1"], r"Failed to parse arguments: The argument 'uid' was provided more than once\."),
    ({}, ["--netns"], r"Failed to parse arguments: The argument 'netns' requires a value, but none was supplied\."),
]  # fmt: skip
V1 = [
    (
        ["--cgroup", "pids.nonsense=1"],
        r"Failed to read file .*/pids\.nonsense into a string: No such file .*",
    ),
    (["--cgroup", "pids.max=some"], r"Failed to write to .*/one/pids\.max: Invalid argument \(os error 22\)"),
    (["--cgroup", "nonsense.max=1"], r"Controller nonsense is unavailable"),
    # Without memory nodes no process may enter a cpuset; that is found out after another cgroup was made and set.
    (
        ["--cgroup", "pids.max=50", "--cgroup", "cpuset.cpus=0"],
        r"Failed to write to .*/one/tasks: No space left on device \(os error 28\)",
    ),
]


@pytest.mark.parametrize(("values", "more", "why"), BAD, ids=lambda value: " ".join(map(str, value)))
def test_bad_input_is_refused_and_leaves_nothing(
    jailed: Jailed, herd: Herd, values: dict[str, str], more: list[str], why: str
) -> None:
    said = refusal(herd, [*replaced(jailed.arguments(), **values), *more])
    assert re.fullmatch(why, said), said
    assert tree(jailed.base) == {}


@needs_v1
@pytest.mark.parametrize(("more", "why"), V1, ids=lambda value: " ".join(value))
def test_a_cgroup_that_refuses_leaves_nothing(
    jailed: Jailed, herd: Herd, parent: str, more: list[str], why: str
) -> None:
    said = refusal(herd, [*jailed.arguments("--parent-cgroup", f"{parent}/inner", *more)])
    assert re.fullmatch(why, said), said
    assert tree(jailed.base) == {}
    assert groups(parent) == []
    assert not any((hierarchy / parent).exists() for hierarchy in CGROUPS.iterdir())


def test_what_is_missing_is_named(herd: Herd) -> None:
    for given, missing in (
        ([], "exec-file"),
        (["--exec-file", "x"], "gid"),
        (["--exec-file", "x", "--gid", "1"], "id"),
        (["--exec-file", "x", "--gid", "1", "--id", "y"], "uid"),
    ):
        expected = f"Failed to parse arguments: Argument '{missing}' required, but not found."
        assert refusal(herd, given) == expected


def test_the_base_folder_is_no_link(jailed: Jailed, herd: Herd, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(jailed.base)
    for path in (tmp_path / "link", f"{tmp_path / 'link'}/"):
        said = refusal(herd, replaced(jailed.arguments(), chroot_base_dir=str(path)))
        assert said == f"{path} is a symbolic link: give the folder itself, {jailed.base}"
    assert tree(jailed.base) == {}


def test_what_is_wrong_with_the_monitors_arguments_is_said_before_there_is_a_jail(jailed: Jailed) -> None:
    done = subprocess.run(
        [*JAILER, *jailed.arguments("--", "--nonsense")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 153
    assert done.stderr.startswith("Error: Arguments parsing error: Found argument 'nonsense'")
    assert tree(jailed.base) == {}


def test_without_root_it_says_so(jailed: Jailed) -> None:
    os.chown(jailed.base, STRANGER, STRANGER)
    shutil.chown(jailed.base.parent, STRANGER)
    # Its own files it reads as root, and is somebody else then.
    script = (
        "from crackle.cli import jailer, vmm; vmm.load(); import os, sys, crackle.jail.entry;"
        f"os.setresuid({STRANGER}, {STRANGER}, {STRANGER}); os.chdir('/'); sys.exit(jailer.run(sys.argv[1:]))"
    )
    for folder in jailed.base.parents:
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o11)
    done = subprocess.run(
        [sys.executable, "-c", script, *jailed.arguments()], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"Failed to unshare into new mount namespace: run the jailer as root, user {STRANGER} may not (os error 1)\n"
    )
    assert tree(jailed.base) == {}


@pytest.mark.parametrize("there", ["crackle-vmm.pid", "dev/kvm", "dev/net/tun", "dev/urandom"])
def test_an_id_that_was_used_before_is_refused_and_its_folder_stays_as_it_was(
    jailed: Jailed, herd: Herd, there: str
) -> None:
    path = jailed.root / there
    path.parent.mkdir(parents=True)
    path.write_bytes(b"before")
    for folder in (jailed.root, *(each for each in jailed.root.rglob("*/"))):
        os.chown(folder, 7, 8)
        folder.chmod(0o751)
    os.chown(jailed.root / "dev", jailed.user, 8) if there.startswith("dev") else None
    os.chown(jailed.root, jailed.user, 8)
    for folder in jailed.root.rglob("*/"):
        os.chown(folder, jailed.user, 8)
    before = [(each, each.lstat().st_mode, each.lstat().st_uid) for each in sorted(jailed.base.rglob("*"))]
    assert refusal(herd, jailed.arguments()).endswith("File exists (os error 17)")
    assert [
        (each, each.lstat().st_mode, each.lstat().st_uid) for each in sorted(jailed.base.rglob("*"))
    ] == before
    assert path.read_bytes() == b"before"


# -- what others try ---------------------------------------------------------------------------------------------------


def state(folder: Path) -> list[tuple[str, int, int, int]]:
    """Of a folder and all that is in it."""
    found = ((path, path.lstat()) for path in (folder, *sorted(folder.rglob("*"))))
    return [(str(path), each.st_mode, each.st_uid, each.st_gid) for path, each in found]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder that a jailer has no business with, and that looks like one of its own."""
    folder = tmp_path / "victim"
    for name in ("one/root/dev/net", "one/root/run", "root/dev/net", "dev/net", "net"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("victim")
    return folder


PLACES = ["", "one", "one/root", "one/root/dev", "one/root/dev/net", "one/root/run"]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place or "executable")
def test_a_link_in_a_folders_place_is_not_followed(
    jailed: Jailed, herd: Herd, victim: Path, place: str
) -> None:
    link = jailed.base / "crackle-vmm" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    before, rest = state(victim), state(jailed.base)
    assert "something is there that is no directory, or a symbolic link" in refusal(herd, jailed.arguments())
    assert state(victim) == before
    assert state(jailed.base) == rest


def test_a_link_in_a_files_place_is_not_followed(jailed: Jailed, herd: Herd, victim: Path) -> None:
    for name in ("crackle-vmm.pid", "dev/kvm", "dev/net/tun"):
        link = jailed.root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        for target in (victim / "file", victim / "new"):
            link.symlink_to(target)
            before = state(victim)
            assert refusal(herd, jailed.arguments()).endswith("File exists (os error 17)")
            assert state(victim) == before
            link.unlink()
    assert (victim / "file").read_text() == "victim"


@pytest.mark.parametrize("place", PLACES[:4], ids=lambda place: place or "executable")
def test_a_folder_that_is_somebody_elses_is_refused(jailed: Jailed, herd: Herd, place: str) -> None:
    folder = jailed.base / "crackle-vmm" / place
    folder.mkdir(parents=True)
    os.chown(folder, STRANGER, STRANGER)
    before = state(jailed.base)
    assert refusal(herd, jailed.arguments()).endswith(f"it is there, and user {STRANGER}'s")
    assert state(jailed.base) == before


ATTACKER = """
import os, sys
base, victim, user = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
os.chdir(base)
print("ready", flush=True)
number = 0
while True:
    number += 1
    for path, target in (("crackle-vmm", victim), ("crackle-vmm/one", victim + "/one")):
        try:
            os.rename(path, f"{path}-{number}")
        except OSError:
            pass
        try:
            os.symlink(target, path)
            os.unlink(path)
        except OSError:
            pass
"""


def test_a_stranger_who_exchanges_folders_all_the_time_gets_nothing_made_elsewhere(
    jailed: Jailed, herd: Herd, victim: Path
) -> None:
    jailed.base.chmod(0o777)
    for folder in jailed.base.parents:
        if not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o11)
    before = state(victim)
    attacker = subprocess.Popen(
        [sys.executable, "-c", ATTACKER, str(jailed.base), str(victim), str(STRANGER)], stdout=subprocess.PIPE
    )
    try:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"ready\n"
        for _ in range(60):
            # Its last step fails, so that there is no microVM; all that is made is made before.
            herd.start(jailed.arguments("--resource-limit", "no-file=99999999999"))
            assert state(victim) == before
    finally:
        attacker.kill()
        attacker.communicate()
    devices = [path for path in jailed.base.rglob("*") if path.is_char_device()]
    assert devices == [], herd.said.read_text()[-2000:]


# -- cgroups -----------------------------------------------------------------------------------------------------------


@needs_v1
def test_its_cgroups_are_made_set_and_entered_and_inherit_what_is_empty(jailed: Jailed, parent: str) -> None:
    one = jailed.start(
        *("--parent-cgroup", f"{parent}/a/b", "--cgroup", "pids.max=77"),
        *("--cgroup", "cpuset.mems=0", "--cgroup", "cpuset.cpus=0"),
    )
    lines = Path(f"/proc/{one.pid}/cgroup").read_text().splitlines()
    paths = dict(line.split(":")[1:] for line in lines)
    for controller in ("pids", "cpuset"):
        assert paths[controller] == f"/{parent}/a/b/one"
    place = f"{parent}/a/b/one"
    assert (CGROUPS / "pids" / place / "pids.max").read_text() == "77\n"
    assert (CGROUPS / "cpuset" / place / "cpuset.cpus").read_text() == "0\n"
    # Those around it have all, from the root of the hierarchy.
    everything = (CGROUPS / "cpuset" / "cpuset.cpus").read_text()
    assert (CGROUPS / "cpuset" / parent / "a" / "cpuset.cpus").read_text() == everything
    assert os.sched_getaffinity(one.pid) == {0}
    one.end()
    # As Firecracker's: they stay, with nothing in them.
    assert (CGROUPS / "pids" / place / "tasks").read_text() == ""


@needs_v1
def test_a_refusal_gives_a_cgroup_that_was_there_its_values_back(
    jailed: Jailed, herd: Herd, parent: str
) -> None:
    group = CGROUPS / "pids" / parent / "one"
    group.mkdir(parents=True)
    (group / "pids.max").write_text("123")
    more = ["--cgroup", "pids.max=50", "--cgroup", "cpuset.cpus=0"]
    assert "tasks" in refusal(herd, jailed.arguments("--parent-cgroup", parent, *more))
    assert (group / "pids.max").read_text() == "123\n"
    assert (group / "tasks").read_text() == ""
    assert not (CGROUPS / "cpuset" / parent / "one").exists()


def unified() -> tuple[Path, str, str] | None:
    """Where version 2 is mounted, and a file and a value of a controller that it has; None for none."""
    for line in Path("/proc/mounts").read_text().splitlines():
        place = Path(line.split()[1])
        if line.split()[2] == "cgroup2":
            controllers = (place / "cgroup.controllers").read_text().split()
            for controller, file, value in (
                ("pids", "pids.max", "60"),
                ("hugetlb", "hugetlb.2MB.max", "4194304"),
            ):
                if controller in controllers:
                    return place, file, value
    return None


@pytest.fixture
def unified_parent() -> Iterator[tuple[Path, str, str, str]]:
    """That, and a cgroup of the test's own, which is not there yet."""
    found = unified()
    if found is None:
        pytest.skip("no cgroups of version 2 with a controller")
    place, file, value = found
    before = (place / "cgroup.subtree_control").read_text().split()
    name = f"crackle-test-{os.getpid()}"
    yield place, file, value, name
    for group in sorted((place / name).rglob("*/"), reverse=True):
        group.rmdir()
    if (place / name).exists():
        (place / name).rmdir()
    controller = file.partition(".")[0]
    if controller not in before:
        with contextlib.suppress(OSError):
            (place / "cgroup.subtree_control").write_text(f"-{controller}")


def test_version_2_enables_controllers_from_the_root_on(
    jailed: Jailed, unified_parent: tuple[Path, str, str, str]
) -> None:
    place, file, value, name = unified_parent
    one = jailed.start(
        "--cgroup-version", "2", "--parent-cgroup", f"{name}/inner", "--cgroup", f"{file}={value}"
    )
    controller = file.partition(".")[0]
    for above in (place, place / name, place / name / "inner"):
        assert controller in (above / "cgroup.subtree_control").read_text().split()
    group = place / name / "inner" / "one"
    assert (group / file).read_text() == f"{value}\n"
    assert (group / "cgroup.procs").read_text() == f"{one.pid}\n"
    assert f"0::/{name}/inner/one" in Path(f"/proc/{one.pid}/cgroup").read_text().splitlines()
    one.end()
    assert (group / "cgroup.procs").read_text() == ""


def test_version_2_without_values_moves_to_the_parent_if_it_is_there(
    jailed: Jailed, unified_parent: tuple[Path, str, str, str]
) -> None:
    place, _, _, name = unified_parent
    (place / name).mkdir()
    one = jailed.start("--cgroup-version", "2", "--parent-cgroup", name)
    assert (place / name / "cgroup.procs").read_text() == f"{one.pid}\n"
    one.end()


def test_version_2_is_left_as_it_was_by_a_refusal(
    jailed: Jailed, herd: Herd, unified_parent: tuple[Path, str, str, str]
) -> None:
    place, file, _, name = unified_parent
    before = (place / "cgroup.subtree_control").read_text()
    more = ["--cgroup-version", "2", "--parent-cgroup", f"{name}/inner", "--cgroup", f"{file}=nonsense"]
    said = refusal(herd, jailed.arguments(*more))
    assert said == f"Failed to write to {place}/{name}/inner/one/{file}: Invalid argument (os error 22)"
    assert not (place / name).exists()
    assert (place / "cgroup.subtree_control").read_text() == before
    assert tree(jailed.base) == {}


# -- many --------------------------------------------------------------------------------------------------------------


@needs_v1
def test_a_hundred_jails_leave_their_folders_and_cgroups_and_nothing_else(
    tmp_path: Path, parent: str
) -> None:
    base = tmp_path / "jails"
    base.mkdir()
    jails = [Jailed(base, f"jail{number}") for number in range(100)]
    with Herd(tmp_path / "said", one_at_a_time=False) as herd:
        for some in (jails[first : first + 10] for first in range(0, 100, 10)):
            for each in some:
                more = ["--parent-cgroup", parent, "--cgroup", "pids.max=50", "--", "--api-sock", "api.sock"]
                (each.pid,) = herd.start(each.arguments(*more))
            deadline = time.monotonic() + PATIENCE
            for each in some:
                while not (each.root / "api.sock").exists():
                    assert time.monotonic() < deadline, herd.said.read_text()
                    time.sleep(0.01)
            for each in some:
                Client(each.root / "api.sock").ask("GET", "/", expect=200)
                assert f"{each.name}/root / " in Path(f"/proc/{each.pid}/mountinfo").read_text()
                os.kill(each.pid, signal.SIGTERM)
        assert set(herd.statuses().values()) == {-signal.SIGTERM}
    # Its root shows as a part of the file system, by the end of its path.
    ending = "/".join(base.parts[-4:])
    assert not [mount for mount in _mounts() if ending in mount]
    assert {path.name for path in base.iterdir()} == {"crackle-vmm"}
    assert {path.name for path in (base / "crackle-vmm").iterdir()} == {each.name for each in jails}
    # The monitor takes its socket away.
    assert {name for each in jails for name in tree(each.root)} >= {"dev/kvm", "crackle-vmm.pid"}
    for each in jails:
        assert (CGROUPS / "pids" / parent / each.name / "tasks").read_text() == ""


def _mounts() -> set[str]:
    """What is mounted anywhere, in any process's namespace: where from, and where."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.update((process / "mountinfo").read_text().splitlines())
        except OSError:
            continue
    return found
