"""Compiles the Cython core. `CRACKLE_SANITIZE=address` builds it with AddressSanitizer for the hostile-guest tests."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("CRACKLE_SANITIZE", "")

FLAGS = ["-O2", "-g1", "-fno-plt", "-fvisibility=hidden", "-Wall", "-Wno-unused-function", "-std=gnu11"]
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-O1"]


# What an extension links beside the C library.
LIBRARIES = {"crackle.virtio.block.uring": ["uring"]}


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


setup(
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
