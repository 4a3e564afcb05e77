"""guest/kernel/build: says how far it is, goes on where it was interrupted, and leaves only its results behind."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Enough of a kernel: configurations, three objects, two images. `$(O)/broken` is half an object.
MAKEFILE = """
tinyconfig olddefconfig:
	@mkdir -p $(O)/arch/x86/boot; cp -n /dev/null $(O)/.config || true
vmlinux bzImage: objects
	@echo image > $(O)/vmlinux; echo image > $(O)/arch/x86/boot/bzImage
objects:
	@test ! -e $(O)/broken
	@for object in a b c; do test -e $(O)/$$object || { echo "  CC      $$object.o"; touch $(O)/$$object; }; done
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a package of a very small source, an empty cache, and nothing to install."""
    loader = SourceFileLoader("kernel_build", str(ROOT / "guest" / "kernel" / "build"))
    spec = importlib.util.spec_from_loader("kernel_build", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = tmp_path / f"{module.SOURCE}_6.1.1_all"
    (package / "usr/src").mkdir(parents=True)
    source = tmp_path / "linux"
    source.mkdir()
    (source / "Makefile").write_text(MAKEFILE)
    archive = package / "usr/src" / f"{module.SOURCE}.tar.xz"
    subprocess.run(["tar", "-C", tmp_path, "-cf", archive, "linux"], check=True)
    monkeypatch.setattr(module, "unpacked", lambda _name: package)
    monkeypatch.setattr(module, "install", lambda _packages: None)
    monkeypatch.setattr(module, "settings", lambda _text: {})
    return module


def work(tmp_path: Path) -> Path:
    return tmp_path / "cache/crackle/kernel-build"


def test_it_leaves_its_results_only(kernel: ModuleType, tmp_path: Path) -> None:
    kernel.build(["acpi", "mptable"], 1)
    for variant in ("acpi", "mptable"):
        assert {path.name for path in kernel.result(variant).iterdir()} == {"vmlinux", "bzImage", "config"}
    assert not work(tmp_path).exists()


def test_it_goes_on_where_it_was_interrupted(
    kernel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = kernel.run

    def interrupted(log: Path, *command: str) -> None:
        run(log, *command)
        if command[-1] == "bzImage":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernel.build(["acpi"], 1)
    (work(tmp_path) / "source/witness").touch()
    before = (work(tmp_path) / "build/a").stat().st_mtime_ns

    def looked_at(log: Path, *command: str) -> None:
        run(log, *command)
        assert (work(tmp_path) / "source/witness").exists()
        assert (work(tmp_path) / "build/a").stat().st_mtime_ns == before

    monkeypatch.setattr(kernel, "run", looked_at)
    kernel.build(["acpi"], 1)
    assert "going on with the build that was interrupted" in capsys.readouterr().err
    assert kernel.result("acpi").exists()
    assert not work(tmp_path).exists()


def test_half_an_object_of_an_interrupted_build_is_built_again(kernel: ModuleType, tmp_path: Path) -> None:
    work(tmp_path).mkdir(parents=True)
    kernel.unpack(kernel.unpacked("source"), work(tmp_path))
    (work(tmp_path) / "build").mkdir()
    (work(tmp_path) / "build/broken").touch()
    kernel.build(["acpi"], 1)
    assert kernel.result("acpi").exists()


def test_a_failure_shows_the_log_and_leaves_nothing(kernel: ModuleType, tmp_path: Path) -> None:
    archive = kernel.unpacked("source") / "usr/src" / f"{kernel.SOURCE}.tar.xz"
    (tmp_path / "linux/Makefile").write_text(MAKEFILE.replace("objects", "nothing", 1))
    subprocess.run(["tar", "-C", tmp_path, "-cf", archive, "linux"], check=True)
    with pytest.raises(kernel.BuildError, match=r"(?s)failed with status 2:.*No rule to make target"):
        kernel.build(["acpi"], 1)
    assert not work(tmp_path).exists()


def test_it_says_how_far_it_is(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel, "PROGRESS_S", -1.0)
    kernel.build(["acpi"], 1)
    said = capsys.readouterr().err
    assert "3 files compiled, now CC      c.o" in said
