"""The state file: what is written is read, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.snapshot import statefile
from support.snapshots import CONFIG, SNAPSHOT

DATA = statefile.encode(SNAPSHOT)


def test_what_is_written_is_read_again() -> None:
    assert statefile.decode(DATA) == SNAPSHOT
    assert statefile.describe(DATA) == statefile.VERSION


def test_the_file_says_what_it_is_and_names_its_fields() -> None:
    assert DATA.startswith(b"CRACKLE\0")
    assert b"x86_64" in DATA[: statefile.HEADER_SIZE]
    tree = msgspec.msgpack.decode(DATA[statefile.HEADER_SIZE :], strict=False)
    assert tree["config"]["boot-source"]["kernel_image_path"] == CONFIG.boot_source.kernel_image_path
    assert tree["machine"]["vcpus"][0]["regs"]["rip"] == 0x100000


def test_every_truncation_is_refused() -> None:
    for size in range(len(DATA)):
        with pytest.raises(ConfigError, match=r"truncated|no state file"):
            statefile.decode(DATA[:size])


@given(st.integers(0, len(DATA) * 8 - 1))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    changed = bytearray(DATA)
    changed[bit >> 3] ^= 1 << (bit & 7)
    with pytest.raises(ConfigError):
        statefile.decode(bytes(changed))


@given(st.binary(max_size=200))
def test_any_other_file_is_refused(data: bytes) -> None:
    for given_data in (data, b"CRACKLE\0" + data):
        with pytest.raises(ConfigError):
            statefile.decode(given_data)


def test_what_follows_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="goes on after its end"):
        statefile.decode(DATA + b"x")


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((1, 1, 0), "its format v1.1.0 is newer than this version of Crackle reads"),
        ((2, 0, 0), "its format v2.0.0 is newer"),
        ((0, 9, 9), "its format v0.9.9 is older"),
    ],
)
def test_another_format_is_refused(
    version: tuple[int, int, int], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statefile, "VERSION", version)
    data = statefile.encode(SNAPSHOT)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=sentence):
        statefile.decode(data)


def test_a_correction_of_the_format_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "VERSION", (1, 0, 9))
    data = statefile.encode(SNAPSHOT)
    monkeypatch.undo()
    assert statefile.decode(data) == SNAPSHOT


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "MACHINE", "aarch64")
    data = statefile.encode(SNAPSHOT)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="it is of an aarch64 microVM, and this host is x86_64"):
        statefile.decode(data)


def test_a_state_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = statefile.encode({"id": 5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="its state means nothing to this version of Crackle"):
        statefile.decode(data)


def told(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from crackle.cli.vmm import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_the_command_line_tells_the_version(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(DATA)
    assert told("--snapshot-version").stdout == "v1.0.0\n"
    assert told("--describe-snapshot", str(tmp_path / "state")).stdout == "v1.0.0\n"
    (tmp_path / "state").write_bytes(DATA[:-1])
    bad = told("--describe-snapshot", str(tmp_path / "state"))
    assert bad.returncode == 1
    assert "Invalid data format version of snapshot file: it is truncated" in bad.stderr
    missing = told("--describe-snapshot", str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "No such file or directory (os error 2)" in missing.stderr
