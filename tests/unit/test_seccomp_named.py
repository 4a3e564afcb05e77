"""What the core's sources ask the kernel for by name is in the lists of the threads that run them.

Read, not run: what seldom happens is no less named. Seen are functions of the C library, by the function of ours that
they are called in, through lines of C, too; and requests of ioctl(2). Not seen is what libraries and the interpreter
call by themselves, nor other arguments; and which thread runs what is known no better than PARTS has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.seccomp import build
from crackle.seccomp.compiler import number_of
from crackle.seccomp.policy import Policy

CORE = Path(__file__).parents[2] / "src" / "crackle"

# Native threads run functions without the GIL, of these files; the main thread any function.
NATIVE = {
    "io": ("virtio/**/*.pyx", "ratelimit/*.pyx", "runtime/iothread.pyx"),
    "vcpu": ("kvm/*.pyx", "devices/*.pyx", "virtio/transport/*.pyx"),
    "faults": ("memory/userfault.pyx",),
}
ROOMS = ("kvm", "devices", "memory", "virtio", "ratelimit", "runtime")
PARTS = {**NATIVE, "main": tuple(f"{room}/**/*.pyx" for room in ROOMS)}

# What the kernel has other names for than the C library, and the policy than headers.
OTHER_NAMES = """
    open=openat usleep=clock_nanosleep nanosleep=clock_nanosleep recv=recvfrom send=sendto pread=pread64
    pwrite=pwrite64 io_uring_submit=io_uring_enter pthread_kill=tgkill _exit=exit_group eventfd=eventfd2
    getrlimit=prlimit64 SIOCOUTQ=TIOCOUTQ QUERY_MAP=PROCMAP_QUERY
"""
KERNEL = dict(pair.split("=") for pair in OTHER_NAMES.split())

# Why the main thread has no line for these.
EXCEPT = {
    "nothing here makes use of the binding": {
        "kvm/vm.pyx": "KVM_SIGNAL_MSI",
        "kvm/x86_64.pyx": "KVM_GET_MSR_FEATURE_INDEX_LIST KVM_SET_GUEST_DEBUG KVM_TRANSLATE KVM_NMI",
    },
    "before the filter: a snapshot is loaded, a process becomes what it is": {
        "memory/userfault.pyx": "USERFAULTFD_IOC_NEW UFFDIO_API UFFDIO_REGISTER",
        "runtime/launcher.pyx": "stat fchdir dup3 umask",
        "runtime/system.pyx": "mount umount2 inotify_init1 inotify_add_watch",
    },
    "a page-fault handler's process has no filter": {"memory/pager.pyx": "UFFDIO_COPY"},
}
EXCEPTIONS = {
    (file, call) for files in EXCEPT.values() for file, calls in files.items() for call in calls.split()
}

IMPORT = re.compile(r"^from (?:posix|libc)\.\w+ cimport (\([^)]*\)|[^\n]*)", re.M)
CIMPORT = re.compile(r"^from (crackle\.[\w.]+) cimport", re.M)
EXTERN = re.compile(r"^cdef extern from .*?(?=^\S|\Z)", re.M | re.S)
IN_C = re.compile(r"^\s*(?:# *define (\w+)\(|static [\w *]*?(\w+)\()", re.M)
# A declaration, and all lines that are further in.
FUNCTION = re.compile(
    r"^( *)(?:cdef (?!class)|cpdef |def )([^=\n]*?\w+\((?:.|\n)*?:)\n((?:\1 +\S.*\n|\s*\n)*)", re.M
)
CALL = re.compile(r"(?<![\w.])(\w+)\(")
REQUEST = re.compile(r"\bioctl\((?:[^,()]*, )?([A-Z][A-Z0-9_]+)\b|\bself\.\w+\((KVM_(?!CAP_)\w+)")


def is_system_call(name: str) -> bool:
    try:
        return number_of(name) >= 0
    except ConfigError:
        return False


def in_c(extern: str) -> dict[str, set[str]]:
    """The functions and macros in lines of C, and what each calls."""
    text = re.sub(r"/\*.*?\*/", "", "".join(re.findall(r'"""(.*?)"""', extern, re.S)), flags=re.S)
    heads = list(IN_C.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {
        head[1] or head[2]: set(CALL.findall(text[head.end() : end]))
        for head, end in zip(heads, ends, strict=False)
    }


def named(path: Path) -> Iterator[tuple[str, str, bool]]:
    """System calls and requests that a file names, in which function, and whether that runs without the GIL."""
    text = path.read_text()
    others = [f"crackle.{'.'.join(path.relative_to(CORE).with_suffix('').parts)}", *CIMPORT.findall(text)]
    files = [CORE.parent / f"{module.replace('.', '/')}.pxd" for module in others]
    extern = "".join(
        EXTERN.findall("\n".join([text, *(file.read_text() for file in files if file.exists())]))
    )
    ours = in_c(extern)
    system = {*re.findall(r"(\w+)\(", extern), *re.findall(r"\w+", " ".join(IMPORT.findall(text))), *ours}

    def calls(word: str) -> set[str]:
        return set().union(*(calls(each) for each in ours[word] - {word})) if word in ours else {word}

    for _, declaration, body in FUNCTION.findall(re.sub(r'"""(?:.|\n)*?"""', "", EXTERN.sub("", text))):
        code = re.sub("#.*", "", body)
        words = set().union(*(calls(word) for word in set(CALL.findall(code)) & system))
        found = {call for word in words if is_system_call(call := KERNEL.get(word, word))} - {"ioctl"}
        found |= {KERNEL.get(each, each) for pair in REQUEST.findall(code) for each in pair if each}
        for call in found:
            yield call, declaration.partition("(")[0].split()[-1], "nogil" in declaration


def missing(kind: str, policy: Policy) -> dict[tuple[str, str], set[str]]:
    """What that kind of thread has no line for, by file and call, and the functions that name it."""
    lines = policy.lines(kind)
    listed = {line.call for line in lines}
    requests = {line.conditions[0].value for line in lines if line.call == "ioctl" and line.conditions}
    listed |= {name for name, value in build.names().items() if value & 0xFFFFFFFF in requests}
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted({path for pattern in PARTS[kind] for path in CORE.glob(pattern)}):
        for call, function, is_native in named(path):
            if call not in listed and (is_native or kind not in NATIVE):
                found.setdefault((str(path.relative_to(CORE)), call), set()).add(function)
    return found


@pytest.mark.parametrize("kind", PARTS)
def test_what_a_kind_of_thread_may_call_is_in_its_list(kind: str) -> None:
    found = missing(kind, build.read_policy())
    unneeded = EXCEPTIONS - set(found) if kind == "main" else set()
    assert ({key: functions for key, functions in found.items() if key not in EXCEPTIONS}, unneeded) == (
        {},
        set(),
    )


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("io", "fstat TIOCOUTQ fallocate io_uring_enter getrandom"),
        ("vcpu", "preadv2 timerfd_settime sendto"),
        ("main", "KVM_GET_XCRS io_uring_register BLKDISCARD openat copy_file_range"),
    ],
)
def test_lines_that_are_not_there_are_missed(kind: str, calls: str) -> None:
    whole = build.read_policy()
    requests = {value & 0xFFFFFFFF for name, value in build.names().items() if name in calls.split()}
    own = {
        section: [
            line
            for line in lines
            if line.call not in calls.split()
            and not (line.call == "ioctl" and line.conditions[0].value in requests)
        ]
        for section, lines in whole.own.items()
    }
    assert set(calls.split()) <= {call for _, call in missing(kind, whole._replace(own=own))}
