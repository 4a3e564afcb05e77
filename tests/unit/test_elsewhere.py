"""Tests that run beside the others in a session of their own: their results count as if they had run here."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from support.elsewhere import Elsewhere

pytestmark = pytest.mark.timeout(300)

TESTS = Path(__file__).resolve().parents[1]

HERE_AND_BESIDE = """
import os
import pathlib
import time

import pytest

HERE = os.getppid() == int(os.environ["STARTER"])

@pytest.mark.beside
def test_fails():
    assert HERE, "it ran beside"

@pytest.mark.beside
def test_passes():
    assert not HERE

@pytest.mark.beside
@pytest.mark.skipif(True, reason="for a reason")
def test_is_skipped():
    pass

@pytest.mark.beside
def test_is_no_more_idle_when_the_others_have_ended():
    while os.sched_getscheduler(0) == os.SCHED_IDLE:
        time.sleep(0.01)

@pytest.mark.beside
def test_ends_the_session():
    if "END" in os.environ:
        os._exit(3)

def test_runs_here():
    assert HERE
    (session,) = map(int, pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    assert os.sched_getscheduler(session) == os.SCHED_IDLE
    pathlib.Path("session").write_text(str(session))
    if "KILL" in os.environ:
        os.kill(os.getpid(), 9)
"""


def session(directory: Path, *arguments: str, **variables: str) -> str:
    """What pytest says about HERE_AND_BESIDE."""
    (directory / "test_it.py").write_text(HERE_AND_BESIDE)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = beside: as here\ntimeout = 300\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
    variables |= {"PYTHONPATH": str(TESTS), "PYTEST_PLUGINS": "conftest", "STARTER": str(os.getpid())}
    done = subprocess.run(command, cwd=directory, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if "KILL" in variables else 1), done.stdout + done.stderr
    return done.stdout


def test_what_runs_beside_fails_passes_and_is_skipped_as_it_does_there(tmp_path: Path) -> None:
    said = session(tmp_path)
    assert "5 tests run beside the others" in said
    assert "AssertionError: it ran beside" in said
    assert "1 failed, 4 passed, 1 skipped" in said
    assert said.index("PASSED test_it.py::test_runs_here") < said.index("PASSED test_it.py::test_passes")


def test_what_a_session_that_ended_did_not_get_to_has_failed(tmp_path: Path) -> None:
    said = session(tmp_path, END="1")
    assert "FAILED test_it.py::test_ends_the_session" in said
    assert "the session ended before this test did" in said
    assert "2 failed, 3 passed, 1 skipped" in said


@pytest.mark.parametrize("arguments", [("-s",), ("-m", "beside")])
def test_where_they_are_alone_or_their_output_is_wanted_they_run_here(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    said = session(tmp_path, *arguments)
    assert "beside the others" not in said
    assert "FAILED test_it.py::test_passes" in said


def test_its_session_ends_when_the_one_that_has_started_it_is_killed(tmp_path: Path) -> None:
    session(tmp_path, KILL="1")
    beside = int((tmp_path / "session").read_text())
    with suppress(ProcessLookupError):
        end = os.pidfd_open(beside)
        os.sched_setscheduler(beside, os.SCHED_OTHER, os.sched_param(0))
        assert select.select([end], [], [], 60)[0]
        os.close(end)


def test_sessions_that_share_their_tests_run_each_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(20))\ndef test_one(n, capfd):\n    print(n)\n"
    )
    (tmp_path / "begun").mkdir()
    (tmp_path / "pytest.ini").touch()
    sessions = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        variables = Elsewhere.environment(tmp_path / str(number), tmp_path / "begun")
        variables |= {"PYTHONPATH": str(TESTS), "PYTEST_PLUGINS": "conftest"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        sessions.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL))
    assert all(each.wait(60) in (0, 5) for each in sessions)
    lines = [line for path in tmp_path.glob("[01]/reports") for line in path.read_text().splitlines()]
    ended = [report["nodeid"] for report in map(json.loads, lines) if report["when"] == "teardown"]
    assert sorted(ended) == sorted(f"test_it.py::test_one[{n}]" for n in range(20))
