"""What `crackle run` makes of its options and of a configuration file, before anything is booted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crackle.cli import boot
from crackle.errors import ConfigError
from crackle.version import VERSION

COMMAND = [sys.executable, "-m", "crackle.cli.main"]


def crackle(*arguments: str | Path, status: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512),
        ("512M", 512),
        ("512m", 512),
        ("512MiB", 512),
        ("1G", 1024),
        ("2 GB", 2048),
        (" 3g ", 3072),
    ],
)
def test_memory_is_in_mib_or_as_its_unit_says(text: str, mib: int) -> None:
    assert boot.parse_memory(text) == mib


@pytest.mark.parametrize("text", ["", "0", "0G", "-1", "1.5G", "1K", "1T", "G", "x", "1 2", "٣"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount of memory like"):
        boot.parse_memory(text)


def test_options_come_on_top_of_the_file(tmp_path: Path) -> None:
    config = {
        "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0 a"},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 512},
        "drives": [{"drive_id": "root", "path_on_host": "x", "is_root_device": True, "is_read_only": False}],
        "vsock": {"guest_cid": 5, "uds_path": "v.sock"},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    found = boot.options(boot.Wanted(config=str(file), memory=1024, append=["b", "c=d"], drives=["more"]))
    assert (found["kernel"], found["cpus"], found["memory"]) == ("vmlinux", 2, 1024)
    assert found["boot_args"] == "console=ttyS0 a b c=d"
    assert [getattr(drive, "drive_id", drive) for drive in found["drives"]] == ["root", "more"]
    assert found["vsock"].guest_cid == 5
    assert boot.options(boot.Wanted(config=str(file), boot_args="own", kernel="other"))["boot_args"] == "own"
    with pytest.raises(ConfigError, match="leave out one"):
        boot.options(boot.Wanted(config=str(file), rootfs="root.ext4"))


def test_the_root_disk_may_have_an_overlay_in_a_file_or_in_memory() -> None:
    wanted = {"kernel": "vmlinux", "rootfs": "root.ext4"}
    assert boot.options(boot.Wanted(overlay="o", **wanted))["overlay"] == "o"
    assert boot.options(boot.Wanted(overlay="memory", **wanted))["overlay"].memory
    with pytest.raises(ConfigError, match="--overlay takes the writes of the root disk: give one"):
        boot.options(boot.Wanted(kernel="vmlinux", overlay="o"))


def test_a_cpu_template_is_a_name_or_a_file_or_in_the_configuration_file(tmp_path: Path) -> None:
    assert boot.options(boot.Wanted(kernel="vmlinux", cpu_template="T2A"))["cpu_template"] == "T2A"
    file = tmp_path / "config.json"
    rest = '"drives": [], "boot-source": {"kernel_image_path": "k"}'
    file.write_text(f'{{{rest}, "cpu-config": {{"kvm_capabilities": ["1"]}}}}')
    assert boot.options(boot.Wanted(config=str(file)))["cpu_template"].kvm_capabilities == ["1"]
    machine = '{"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "T2"}'
    file.write_text(f'{{{rest}, "machine-config": {machine}}}')
    assert boot.options(boot.Wanted(config=str(file)))["cpu_template"] == "T2"
    found = boot.options(boot.Wanted(config=str(file), cpu_template="other.json"))
    assert found["cpu_template"] == "other.json"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "config.json: "),
        ("[]", "config.json: "),
        ('{"drives": []}', "boot-source"),
        ('{"drives": [], "boot-source": {"kernel_image_path": "k"}, "logger": {"log_path": "l"}}', "logger"),
        (
            '{"drives": [], "boot-source": {"kernel_image_path": "k"}, "memory-hotplug": {"total_size_mib": 1024}}',
            "memory-hotplug",
        ),
    ],
)
def test_a_file_that_cannot_be_honoured_is_refused_with_its_name(
    tmp_path: Path, content: str, words: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        boot.options(boot.Wanted(config=str(file)))
    assert "config.json" in str(caught.value)


def test_what_cannot_be_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xff{")
    for arguments, words in (
        (["run"], "There is no kernel: give one"),
        (["run", "k", "--kernel", "k"], "The kernel is given twice: k and k"),
        (["run", "k", "r", "--rootfs", "r"], "The root disk is given twice"),
        (["run", "k", "--memory", "1K"], "'1K' is not an amount of memory"),
        (["run", "k", "--config", tmp_path / "none"], "Cannot read"),
        (["run", "k", "--net", "--metadata", tmp_path / "bad"], "is not JSON"),
        (["run", "k", "--metadata", "/dev/null"], "is not JSON"),
        (["run", tmp_path / "none", "--api-sock", tmp_path], "Cannot listen on the API socket"),
    ):
        said = crackle(*arguments, status=1)
        assert said.startswith("crackle: ")
        assert words in said
        assert said.count("\n") == 1


def test_version_and_help_have_the_usual_names() -> None:
    assert crackle("--version") == crackle("version") == f"crackle {VERSION}\n"
    for arguments in (["-h"], ["run", "-h"], ["net", "up", "-h"]):
        assert "Usage: " in crackle(*arguments)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str) -> None:
    assert "crackle" in crackle("--show-completion", shell)
