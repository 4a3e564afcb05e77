"""Compiles the Cython core, the launcher and the seccomp policy.

`CRACKLE_SANITIZE=address` builds the core with AddressSanitizer for the hostile-guest tests.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# What setuptools has in the place of a module that Python has no more.
from distutils.command.build_scripts import build_scripts  # isort: skip
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("CRACKLE_SANITIZE", "")

FLAGS = ["-O2", "-g1", "-fno-plt", "-fvisibility=hidden", "-Wall", "-Wno-unused-function", "-std=gnu11"]
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1"]


# What an extension links beside the C library.
LIBRARIES = {"crackle.virtio.block.uring": ["uring"], "crackle.seccomp.compiler": ["seccomp"]}


# What of kvm/ is one architecture's, and compiles on no other.
ARCHITECTURES = {"x86_64", "aarch64"}


def extensions() -> list[Extension]:
    """One extension per .pyx file under src/crackle that is for this machine."""
    foreign = ARCHITECTURES - {os.uname().machine}
    found = (ROOT / "src" / "crackle").rglob("*.pyx")
    sources = sorted(path.relative_to(ROOT) for path in found if path.stem not in foreign)
    named = [(".".join(source.with_suffix("").parts[1:]), source) for source in sources]
    return [
        Extension(
            name,
            [str(source)],
            libraries=LIBRARIES.get(name, []),
            extra_compile_args=FLAGS,
            # A sanitizer's library is in the process already: it has to be there before everything else.
            extra_link_args=[] if SANITIZE else ["-Wl,-O1", "-Wl,-z,now", "-s"],
            define_macros=[("_GNU_SOURCE", "1")],
        )
        for name, source in named
    ]


class BuildCore(build_ext):
    """And afterwards the seccomp policy, with the compiler that has just been built."""

    def run(self):
        """Not for a build with a sanitizer, which has no filters, nor for an architecture without a policy."""
        super().run()
        if not SANITIZE and (ROOT / f"src/crackle/seccomp/{os.uname().machine}.policy").exists():
            place = ROOT / "src" if self.inplace else Path(self.build_lib).resolve()
            subprocess.run(
                [sys.executable, "-m", "crackle.seccomp.build"],
                env={**os.environ, "PYTHONPATH": str(place)},
                cwd=place,
                check=True,
            )


class BuildLauncher(build_scripts):
    """Makes the scripts, which are none: `crackle-launch` under its two names, without libraries, to start at once."""

    def copy_scripts(self):
        """Compile instead, statically where there is a C library for that; twice the list of what was made."""
        (source,) = self.scripts
        made = Path(self.build_dir) / "crackle-launch"
        made.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wl,-z,now", "-s"]
        version = f'-DCRACKLE_VERSION="{self.distribution.get_version()}"'
        for linking in (["-static"], []):
            done = subprocess.run(
                [*compiler, *flags, *linking, version, source, "-o", str(made)],
                check=not linking,
                stderr=subprocess.DEVNULL if linking else None,
            )
            if done.returncode == 0:
                break
        # Under this name it stands for crackle-jailer.
        jailer = made.with_name("crackle-launch-jailer")
        shutil.copy(made, jailer)
        return [str(made), str(jailer)], [str(made), str(jailer)]


setup(
    scripts=["src/crackle/launch/launch.c"],
    cmdclass={"build_ext": BuildCore, "build_scripts": BuildLauncher},
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
    ext_modules=cythonize(
        extensions(),
        include_path=["src"],
        nthreads=os.cpu_count() or 1,
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
    ),
)
