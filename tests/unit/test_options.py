"""The command line of crackle-vmm."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from crackle.monitor.options import OPTIONS, UsageError, help_text, parse
from crackle.version import VERSION


def test_nothing_given_means_the_defaults() -> None:
    options = parse([])
    assert options == {}
    assert options.value("api-sock") == "/run/firecracker.socket"
    assert options.value("id") == "anonymous-instance"
    assert options.number("http-api-max-payload-size") == 51200
    assert options.value("config-file") is None
    assert options.number("start-time-us") is None


def test_options_take_the_word_that_follows() -> None:
    options = parse(["--api-sock", "a", "--no-seccomp", "--id", "vm-1", "--level", "-x"])
    assert options == {"api-sock": "a", "no-seccomp": "", "id": "vm-1", "level": "-x"}


def test_what_follows_two_dashes_is_ignored() -> None:
    assert parse(["--id", "vm-1", "--", "--bad", "word"]) == {"id": "vm-1"}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--bad", "--help"], ["--version", "-h"]])
def test_help_goes_before_everything(arguments: list[str]) -> None:
    assert parse(arguments) == {"help": ""}


def test_version_goes_before_errors() -> None:
    assert parse(["--bad", "--version"]) == {"version": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bad"], "Found argument 'bad' which wasn't expected"),
        (["word"], "Found argument 'word' which wasn't expected"),
        (["-i"], "Found argument '-i' which wasn't expected"),
        (["--api-sock"], "'api-sock' requires a value, but none was supplied"),
        (["--api-sock", "--id", "x"], "'api-sock' requires a value, but none was supplied"),
        (["--id", "a", "--id", "b"], "'id' was provided more than once"),
        (["--no-seccomp", "--no-seccomp"], "'no-seccomp' was provided more than once"),
        (["--no-api"], "Argument 'config-file' required, but not found"),
        (["--no-seccomp", "--seccomp-filter", "f"], "'seccomp-filter' cannot be used together"),
        (["--http-api-max-payload-size", "1k"], "'http-api-max-payload-size' takes a number, not '1k'"),
        (["--start-time-us", "-1"], "'start-time-us' takes a number, not '-1'"),
        (["--mmds-size-limit", "٣"], "'mmds-size-limit' takes a number"),
        (["--id", ""], "Invalid instance ID: it has 0 characters"),
        (["--id", "x" * 65], "Invalid instance ID: it has 65 characters"),
        (["--id", "a_b"], r"Invalid instance ID: invalid character \(_\) at position 1"),
    ],
)
def test_a_command_line_that_means_nothing_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(arguments)


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_help_tells_of_every_option() -> None:
    text = help_text()
    for name, (value, default, what) in OPTIONS.items():
        assert f"--{name} <{value}>" in text if value else f"--{name}" in text
        assert what in text
        assert default is None or f"[default: {default}]" in text
