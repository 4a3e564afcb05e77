"""`crackle doctor`: what it says of this host, whatever host that is."""

import json
import os
import time

import pytest

from crackle.arch.x86_64 import probe as programs
from crackle.cli import doctor
from crackle.vmm import probe


def test_the_probe_sees_user_code_and_interrupts():
    findings = {finding.name: finding for finding in probe.probe().findings}
    assert findings["user code"].works
    assert findings["interrupts"].works
    assert findings["kernel code"].works


def test_the_verdict_rests_on_the_findings():
    verdict = probe.probe()
    assert verdict.linux == all(finding.works for finding in verdict.findings)
    assert verdict.sentence.startswith("yes" if verdict.linux else "no: ")


def test_the_verdict_is_right_about_the_kvm_it_knows():
    verdict = probe.probe()
    if os.path.isdir("/sys/module/kvm_pvm"):  # loses system calls
        assert not verdict.linux
        assert "syscall" in verdict.sentence
        assert "tools/emuhost" in verdict.sentence
    else:
        assert verdict.sentence == "yes: Linux guests will run here"


def test_a_guest_that_hangs_is_stopped(monkeypatch):
    hang = b"\xeb\xfe"  # jmp $
    monkeypatch.setattr(programs, "TIME_LIMIT", 0.1)
    monkeypatch.setattr(programs, "USER_PROGRAM", hang)
    monkeypatch.setitem(programs.ENTRY, hang, programs.CODE + 0x800)
    before = time.monotonic()
    verdict = probe.probe()
    assert time.monotonic() - before < 10
    assert not verdict.linux
    assert "nothing for 0.1 s" in verdict.findings[0].detail


def test_code_and_tables_of_the_probe_do_not_overlap():
    ends = [address + len(program) for program, address in programs.ENTRY.items()]
    assert all(end <= start for end, start in zip(ends, [*programs.ENTRY.values()][1:], strict=False))
    assert sum(map(len, programs.PROGRAMS)) <= 200


def test_the_report_names_every_area():
    areas = {row.area for row in doctor.report()}
    assert {"host", "kvm", "probe", "network", "disk", "memory", "confinement", "limits"} <= areas


def test_a_missing_kvm_is_a_problem_with_advice(tmp_path):
    rows = doctor.report(str(tmp_path / "kvm"))
    problem = next(row for row in rows if row.state == "problem")
    assert "does not exist" in problem.value
    assert problem.advice
    assert not doctor.runs_linux(rows)
    assert not any(row.area == "probe" for row in rows)


def test_something_else_in_its_place_is_a_problem(tmp_path):
    path = tmp_path / "kvm"
    path.write_text("not a device")
    rows = doctor.report(str(path))
    assert any(row.state == "problem" for row in rows)


def test_the_table_is_printed(capsys):
    doctor.render(doctor.report())
    printed = capsys.readouterr().out
    assert "/dev/kvm" in printed
    assert "Linux guests" in printed


def test_there_is_a_verdict_in_every_case_and_programs_can_read_it(tmp_path, capsys):
    unreadable = tmp_path / "unreadable"
    unreadable.write_bytes(b"")
    for path in ("/dev/kvm", str(tmp_path / "none"), str(unreadable)):
        rows = doctor.report(path)
        assert doctor.verdict(rows).startswith(
            "Linux guests: yes" if doctor.runs_linux(rows) else "Linux guests: no"
        )
        doctor.render(rows)
        assert "\n" + doctor.verdict(rows) + "\n" in capsys.readouterr().out
        doctor.render_json(rows)
        told = json.loads(capsys.readouterr().out)
        assert told["linux_guests"] == doctor.runs_linux(rows)
        assert told["verdict"] == doctor.verdict(rows)
        assert {"area", "name", "value", "state", "advice"} == set(told["rows"][0])


def test_only_a_host_without_hardware_virtualisation_is_asked_why_it_runs_no_linux(monkeypatch):
    monkeypatch.setattr(probe.os.path, "isdir", lambda path: path == "/sys/module/kvm_amd")
    monkeypatch.setattr(probe, "probe", lambda _path: pytest.fail("it was asked"))
    assert probe.why_no_linux("/dev/kvm-of-amd") is None


def test_a_kvm_that_cannot_be_opened_is_not_blamed(tmp_path):
    assert probe.why_no_linux(str(tmp_path / "none")) is None
