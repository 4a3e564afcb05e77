"""A guest started by crackle-launch: all is imported beforehand, and devices are opened where the launcher is."""

from __future__ import annotations

import json
import select
import subprocess
from pathlib import Path

import pytest
from tests.kvm.conftest import configuration

from support.launcher import LAUNCHER, ZygoteProcess
from support.network import Namespace

pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="`make build` makes crackle-launch")

# What a child imports is told on its standard error.
RECORDING = """
import os, sys
from crackle.cli import vmm, zygote
from crackle.runtime.zygote import Zygote, listen
zygote.load()
def run(arguments):
    sys.addaudithook(lambda event, given: event == "import" and os.write(2, given[0].encode() + b"\\n"))
    return vmm.run(arguments)
Zygote(listen(sys.argv[1]), run).serve()
"""


def test_a_guest_with_every_device_starts_where_the_launcher_is(
    guests: Path, tmp_path: Path, namespace: Namespace
) -> None:
    tap = namespace.tap()
    drives = []
    for engine in ("Sync", "Async"):
        (tmp_path / engine).write_bytes(bytes(1 << 20))
        drives.append({"path_on_host": engine, "drive_id": engine, "io_engine": engine})
    config = configuration(guests / "idle.elf", "", drives, 64, 1)
    config["network-interfaces"] = [{"iface_id": "eth0", "host_dev_name": tap}]
    config["vsock"] = {"guest_cid": 3, "uds_path": "v.sock"}
    config["mmds-config"] = {"network_interfaces": ["eth0"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "script").write_text(RECORDING)
    zygote = ZygoteProcess(tmp_path / "zygote", str(tmp_path / "script"), str(tmp_path / "zygote"))
    process = subprocess.Popen(
        namespace.command(*zygote.command, "--no-api", "--config-file", "config.json", "--level", "Off"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline().startswith(b"idle")
        assert (tmp_path / "v.sock").exists()
        process.terminate()
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == -15
    finally:
        process.kill()
        process.communicate()
        assert zygote.end() == ""
