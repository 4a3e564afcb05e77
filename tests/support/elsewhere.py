"""Tests that run in a pytest session of their own, and are reported here one by one as if they had run here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

REPORTS = "CRACKLE_TEST_REPORTS"
"""Tells such a session which file its reports go to."""
_SHARED = "CRACKLE_TEST_SHARED"
"""Tells one of several sessions with the same tests of the directory in which each takes those that it runs."""
_LIFELINE = "CRACKLE_TEST_LIFELINE"
"""Tells it of a descriptor at which it can be read that the session that has started it is no more."""


class Reporting:
    """A plugin of such a session: passes each report on as soon as there is one."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")


class Sharing:
    """A plugin of one of several sessions: it runs the tests that no other one has begun."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        try:
            # Where it is among the tests, which is the same in all of them.
            os.mkdir(f"{self.directory}/{item.session.items.index(item)}")
        except FileExistsError:
            item.session._setupstate.teardown_exact(nextitem)
            return True
        return None


def report_where_told(config: pytest.Config) -> None:
    """Be such a session, if this was told to, and not those that its tests start."""
    path, shared, lifeline = (os.environ.pop(name, None) for name in (REPORTS, _SHARED, _LIFELINE))
    if shared is not None:
        config.pluginmanager.register(Sharing(shared))
    if lifeline is not None:
        threading.Thread(target=_end_with, args=(int(lifeline),), daemon=True).start()
    if path is not None:
        config.pluginmanager.register(Reporting(config, path), "reporting")


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def runs_elsewhere(config: pytest.Config) -> bool:
    """Whether this session runs for another one, or runs nothing."""
    return config.pluginmanager.has_plugin("reporting") or bool(config.option.collectonly)


class Elsewhere:
    """A plugin that hands out the reports of other sessions in the place of their tests."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.config = config
        self.wanted = {item.nodeid for item in items}
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.output: list[str] = []

    def say(self, line: str) -> None:
        self.config.get_terminal_writer().line(f"\n{line}", flush=True)

    @staticmethod
    def command(names: list[str]) -> list[str]:
        """The session that runs these tests."""
        options = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=150"]
        # Whatever was selected here: these.
        return [sys.executable, "-m", "pytest", *options, "-m", "", *names]

    @staticmethod
    def environment(directory: Path, shared: Path | None = None) -> dict[str, str]:
        """Of a session that reports to this directory, and shares its tests with others."""
        more = {} if shared is None else {_SHARED: str(shared)}
        return os.environ | {REPORTS: str(directory / "reports")} | more

    def take(self, directory: Path) -> None:
        """What is reported there; `output` is what the session printed."""
        self.output.append((directory / "output").read_text(errors="replace")[-4000:])
        reports = directory / "reports"
        for line in reports.read_text().splitlines() if reports.exists() else ():
            report = self.config.hook.pytest_report_from_serializable(
                config=self.config, data=json.loads(line)
            )
            if isinstance(
                report.longrepr, list
            ):  # why it was skipped, which pytest wants as it was before JSON
                report.longrepr = tuple(report.longrepr)
            self.reports.setdefault(report.nodeid, []).append(report)

    def ended(self, name: str) -> bool:
        """Whether the test came to its end there."""
        return any(report.when == "teardown" for report in self.reports.get(name, ()))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Report what happened to the test there."""
        if item.nodeid not in self.wanted:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports.get(item.nodeid, []):
            item.ihook.pytest_runtest_logreport(report=report)
        if not self.ended(item.nodeid):
            item.ihook.pytest_runtest_logreport(report=self._missing(item))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # What an earlier test, one that ran here, has left set up for its neighbours.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def _missing(self, item: pytest.Item) -> pytest.TestReport:
        text = "the session ended before this test did:\n" + "\n".join(self.output)
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")


class Beside(Elsewhere):
    """Runs tests while the others run, on what those leave of the processors. A context manager."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        super().__init__(config, items)
        self.directory = config.rootpath / "build" / "beside"
        self.names = [item.nodeid for item in items]
        self._stack = ExitStack()

    def __enter__(self) -> Beside:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "reports").unlink(missing_ok=True)
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        with (self.directory / "output").open("wb") as output:
            self._session = subprocess.Popen(
                self.command(self.names),
                cwd=self.config.rootpath,
                env=self.environment(self.directory) | {_LIFELINE: str(theirs)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs],
                # Not a session: the scheduler may weigh those instead of their processes.
                process_group=0,
            )
        # The session, and what it has started, ends with this one, whatever ends it.
        self._stack.callback(self._session.wait)
        self._stack.callback(os.close, ours)
        os.close(theirs)
        os.sched_setscheduler(self._session.pid, os.SCHED_IDLE, os.sched_param(0))
        self.say(f"{len(self.names)} tests run beside the others, which come first ...")
        return self

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Wait for the session at the first of its tests."""
        if item.nodeid in self.wanted and self._session.returncode is None:
            self._promote()
            self._session.wait()
            self.take(self.directory)
        return super().pytest_runtest_protocol(item, nextitem)

    def _promote(self) -> None:
        """The others have ended: whatever else this machine does need not come first."""
        for thread in Path("/proc").glob("[0-9]*/task/[0-9]*"):
            with suppress(OSError):
                if os.getpgid(int(thread.name)) == self._session.pid:
                    os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
