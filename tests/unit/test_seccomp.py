"""The seccomp policy: what the kernel makes of it, and what becomes of a process that does what it forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC
from pathlib import Path

import msgspec
import pytest
from tests.support.seccomp import ALLOWED, EVERYTHING, FORBIDDEN, FOREIGN, calls_about, decisions, expected

from crackle.errors import ConfigError
from crackle.seccomp import ENDS, FAILS, build, compiled_path, default_filters, policy
from crackle.seccomp.compiler import name_of, number_of
from crackle.seccomp.custom import read_filters

LISTS = build.read_policy()
NUMBERS = {line.call: number_of(line.call) for lines in LISTS.own.values() for line in lines}
KINDS = [(section, kind) for section, kinds in build.KINDS.items() for kind in kinds]

PAST_THE_LAST = 1024
BEFORE_FILTERS = {335, 336} if os.uname().machine == "x86_64" else set()
"""uretprobe and uprobe: the kernel answers with SIGILL before it asks any filter, but where it has put them itself."""
ALL = [number for number in range(PAST_THE_LAST) if number not in BEFORE_FILTERS]
X32 = 0x40000000
"""<asm/unistd.h>, __X32_SYSCALL_BIT: another architecture's numbers on the same processor."""


@pytest.mark.parametrize(("section", "kind"), KINDS)
def test_of_all_system_calls_exactly_those_listed_for_a_kind_of_thread_are_made(
    section: str, kind: str
) -> None:
    (program,) = default_filters(section)[kind]
    lines = LISTS.lines(build.KINDS[section][kind])
    calls = [(number, (fill,) * 6) for number in ALL for fill in (0, EVERYTHING)]
    calls += [call for line in lines for call in calls_about(line, NUMBERS[line.call])]
    otherwise = FORBIDDEN if section == ENDS else 1
    wrong = [
        (name_of(call[0]), [hex(argument) for argument in call[1]], found)
        for call, found in zip(calls, decisions(program, calls), strict=True)
        if found != (otherwise if (word := expected(lines, NUMBERS, call)) == FORBIDDEN else word)
    ]
    assert wrong == []


def test_numbers_of_another_architecture_are_never_made() -> None:
    (program,) = default_filters()["main"]
    calls = [(X32 | number, (0,) * 6) for number in ALL]
    assert set(decisions(program, calls)) == {FOREIGN}


def test_no_line_allows_what_another_of_its_section_does_and_every_number_has_a_use() -> None:
    for section, lines in LISTS.own.items():
        said = [(line.call, line.conditions) for line in lines]
        assert len(said) == len(set(said)), section
        without = {line.call for line in lines if not line.conditions and line.error is None}
        assert [
            line for line in lines if line.conditions and line.error is None and line.call in without
        ] == []
    words = set(policy.path().read_text().replace("|", " ").split())
    assert [name for name in build.names() if name not in words] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("write # why\n", "line 1 is neither a section nor a call with a reason"),
        ("[a]\nwrite\n", "line 2 is neither"),
        ("[a: b]\n", "line 1: .a. is there already, or names {'b'}"),
        ("[a]\nioctl arg1 = NONSENSE # why\n", "line 2: 'NONSENSE' is no number"),
        ("[a]\nioctl arg6 = 1 # why\n", "line 2: this is no condition"),
    ],
)
def test_a_policy_file_says_where_it_means_nothing(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        policy.parse(text, {})


# -- a process under its filter ------------------------------------------------------------------------------------

UNDER_FILTER = """
import os, socket, sys
from crackle.runtime.filters import confine, set_last_words, use_filters
from crackle.runtime.threads import Thread
from crackle.seccomp import default_filters
kind, source, words = sys.argv[1:4]
use_filters(default_filters())
log = os.open(words, os.O_WRONLY | os.O_CREAT)
metrics = os.open(words + ".metrics", os.O_WRONLY | os.O_CREAT)
set_last_words(log, b" [an-id:", b":ERROR] ", 3600, metrics, b'{"utc_timestamp_ms":1000000000000,"seccomp":1}\\n')
failed = []
def run():
    try:
        exec(source, {"os": os, "socket": socket})
    except BaseException as error:
        failed.append(repr(error))
if kind == "main":
    confine(kind)
    run()
else:
    Thread(kind, run).join()
for line in failed:
    os.write(2, line.encode())
os._exit(len(failed))
"""


def under_filter(directory: Path, kind: str, source: str) -> subprocess.CompletedProcess[str]:
    """Runs Python source on a thread of a kind; 0 when it did, 148 when it was ended."""
    command = [sys.executable, "-c", UNDER_FILTER, kind, source, str(directory / "words")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


PYTHON_KINDS = ["main", "vcpu", "mmds", "shell", "faults", "reaper"]

SURVIVED = {
    "a lazy import": "import colorsys; colorsys.rgb_to_hls(0, 0, 0)",
    "compiled code, which cannot be loaded": (
        "try:\n  import _crypt\nexcept ImportError: pass\nelse: raise SystemError('it was loaded')"
    ),
    "a traceback": "import sys\ntry: 1 / 0\nexcept Exception as e: sys.excepthook(type(e), e, e.__traceback__)",
    "a traceback that is formatted": "import traceback\ntry: 1 / 0\nexcept Exception: traceback.print_exc()",
    "an unraisable exception": "class A:\n  def __del__(self): 1 / 0\nA()",
    "garbage": "import gc\nclass A: pass\nfor _ in range(100000):\n  a = A(); a.a = a\ngc.collect()",
    "garbage with a descriptor": "import gc, io\na = [io.FileIO('/dev/null')]; a.append(a); del a; gc.collect()",
    "memory that comes and goes": "for _ in range(20):\n  a = [bytearray(1 << n) for n in range(6, 25)]; del a",
    "deep recursion": "def f(n): return f(n + 1)\ntry: f(0)\nexcept RecursionError: pass",
    "random numbers": "import os; os.urandom(16)",
    "a file that is not there": "try: open('/nonexistent')\nexcept FileNotFoundError: pass",
}


@pytest.mark.parametrize("kind", PYTHON_KINDS)
def test_python_goes_on_under_every_filter(tmp_path: Path, kind: str) -> None:
    sources = "\n".join(f"exec({source!r}, {{}})" for source in SURVIVED.values())
    done = under_filter(tmp_path, kind, sources)
    assert done.returncode == 0, (done.stderr, (tmp_path / "words").read_text())
    assert done.stderr.count("ZeroDivisionError") == 3


FORBIDDEN_THERE = {
    "main": [
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getpid(), 9 - 8)",
        "socket.socket(socket.AF_INET)",
    ],
    "vcpu": ["os.fork()", "os.unlink('/nonexistent')", "os.open('/dev/null', os.O_RDWR)", "os.kill(1, 0)"],
    "io": ["os.open('/dev/null', os.O_RDONLY)", "os.stat('/')"],
    "mmds": ["socket.socket(socket.AF_UNIX)", "os.mkdir('/nonexistent/a')"],
    "shell": ["os.fork()", "os.rename('/nonexistent', '/nonexistent')"],
    "faults": ["os.setsid()", "os.chroot('/nonexistent')"],
    "reaper": ["os.fork()", "os.symlink('a', '/nonexistent/a')"],
}


@pytest.mark.parametrize(
    ("kind", "call"), [(kind, call) for kind, calls in FORBIDDEN_THERE.items() for call in calls]
)
def test_a_forbidden_call_ends_the_process_and_is_named_in_log_and_metrics(
    tmp_path: Path, kind: str, call: str
) -> None:
    done = under_filter(tmp_path, kind, call)
    assert done.returncode == 148, done.stderr
    lines = (tmp_path / "words").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        time, rest = line.split(" [an-id:", 1)
        assert len(time) == len("2026-01-31T12:00:00.123456789")
        assert rest.startswith(f"{kind}:ERROR] ")
    assert lines[0].endswith("Shutting down VM after intercepting signal 31, code 1.")
    number = int(lines[1].rpartition("(")[2].removesuffix(")."))
    assert lines[1].endswith(f"Shutting down VM after intercepting a bad syscall ({number}).")
    assert name_of(number) in {call.partition("(")[0].rpartition(".")[2], *SYSTEM_CALLS_OF.get(call[:9], ())}
    metrics = (tmp_path / "words.metrics").read_text()
    assert msgspec.json.decode(metrics)["utc_timestamp_ms"] > 1_700_000_000_000


SYSTEM_CALLS_OF = {
    "os.execv(": ("execve",),
    "os.open('": ("openat",),
    "os.stat('": ("newfstatat",),
    "os.fork()": ("clone", "clone3"),
    "os.kill(o": ("kill",),
}


def test_the_time_in_a_forbidden_calls_line_is_that_of_the_log(tmp_path: Path) -> None:
    from datetime import datetime, timedelta, timezone

    before = datetime.now(UTC)
    under_filter(tmp_path, "main", "import os; os.execv('/bin/true', ['true'])")
    stamp = (tmp_path / "words").read_text().split(" ", 1)[0]
    told = datetime.fromisoformat(stamp[:26]).replace(tzinfo=timezone(timedelta(hours=1)))
    assert timedelta() <= told - before + timedelta(milliseconds=1) < timedelta(minutes=1)


# -- policies of users ---------------------------------------------------------------------------------------------


CATEGORIES = ("vmm", "api", "vcpu")


def written(directory: Path, **categories: object) -> Path:
    path = directory / "policy.json"
    path.write_bytes(msgspec.json.encode(categories))
    return path


def allow_list(*rules: dict[str, object]) -> dict[str, object]:
    return {"default_action": "trap", "filter_action": "allow", "filter": list(rules)}


def test_firecrackers_json_is_a_policy_as_it_is(tmp_path: Path) -> None:
    request = {"index": 1, "type": "dword", "op": "eq", "val": 44672, "comment": "KVM_RUN"}
    executable = {"index": 2, "type": "dword", "op": {"masked_eq": 4}, "val": 0}
    large = {"index": 1, "type": "qword", "op": "ge", "val": 1 << 40}
    filters = read_filters(
        str(
            written(
                tmp_path,
                vmm=allow_list(
                    {"syscall": "read", "comment": "files"}, {"syscall": "mmap", "args": [executable]}
                ),
                api=allow_list({"syscall": "accept4"}),
                vcpu=allow_list({"syscall": "ioctl", "args": [request]}, {"syscall": "brk", "args": [large]}),
            )
        )
    )

    def passes(kind: str, call: str, *arguments: int) -> bool:
        (program,) = filters[kind]
        (found,) = decisions(program, [(number_of(call), (*arguments, *(0,) * (6 - len(arguments))))])
        return found == ALLOWED

    # The main thread is Firecracker's two, the I/O thread its first.
    assert [passes("main", call) for call in ("read", "accept4", "ioctl")] == [True, True, False]
    assert [passes("io", call) for call in ("read", "accept4", "ioctl")] == [True, False, False]
    assert [passes("io", "mmap", 0, 0, protection) for protection in (3, 7)] == [True, False]
    assert [passes("vcpu", "ioctl", 3, number) for number in (44672, 5 << 32 | 44672, 44673)] == [
        True,
        True,
        False,
    ]
    assert [passes("vcpu", "brk", 0, size) for size in ((1 << 40) - 1, 1 << 40)] == [False, True]


def test_what_two_of_a_policys_threads_forbid_by_other_means_the_main_thread_must_not_do_by_either(
    tmp_path: Path,
) -> None:
    deny = {"default_action": "allow", "filter_action": {"errno": 7}, "filter": [{"syscall": "brk"}]}
    filters = read_filters(str(written(tmp_path, vmm=allow_list({"syscall": "brk"}), api=deny, vcpu=deny)))
    assert [len(filters[kind]) for kind in ("main", "io", "vcpu")] == [2, 1, 1]


@pytest.mark.parametrize(
    ("categories", "problem"),
    [
        ({"vmm": allow_list(), "api": allow_list()}, "Missing thread category: vcpu"),
        ({"vmm": allow_list(), "io": allow_list()}, "Invalid thread categories: io"),
        (
            {name: allow_list({"syscall": "nonsense"}) for name in CATEGORIES},
            "'nonsense' is no system call",
        ),
        (
            {
                name: {"default_action": "maybe", "filter_action": "allow", "filter": []}
                for name in CATEGORIES
            },
            "'maybe' is no action",
        ),
        (
            {
                name: allow_list(
                    {"syscall": "brk", "args": [{"index": 6, "type": "dword", "op": "eq", "val": 0}]}
                )
                for name in CATEGORIES
            },
            "counted from 0",
        ),
    ],
)
def test_a_policy_that_means_nothing_is_refused_with_what_is_wrong(
    tmp_path: Path, categories: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_filters(str(written(tmp_path, **categories)))


def test_what_the_build_left_is_the_policy_as_it_is_now() -> None:
    assert msgspec.json.decode(
        Path(compiled_path()).read_bytes(), type=dict[str, dict[str, tuple[bytes, ...]]]
    ) == (build.compile_policy())
    assert set(default_filters(FAILS)) == {"vcpu", "io"}
