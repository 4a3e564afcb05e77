"""Runs the coverage-guided fuzzer: `make fuzz`, or

    python tests/fuzz/fuzzer.py [--seconds 600] [--jobs 1] [--merge] [TARGET ...]

Each target runs for so long on one CPU, beginning with its corpus in tests/fuzz/corpus, on a core that clang has built
with AddressSanitizer and counters in build/fuzz. What is new goes to build/fuzzing/corpus; --merge keeps the least of
both that covers as many edges in tests/fuzz/corpus. An input that found something is left in build/fuzzing/found, and
makes the status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import asan  # noqa: E402
import targets  # noqa: E402

CORPUS = HERE / "corpus"
WORK = asan.ROOT / "build" / "fuzzing"
MAX_BYTES = 1024
"""Of an input."""


def _library() -> str:
    """AddressSanitizer and libFuzzer in one, from atheris."""
    found = importlib.util.find_spec("atheris")
    if found is None or found.origin is None:
        raise SystemExit("the fuzzer needs atheris: pip install -e '.[fuzz]'")
    return str(Path(found.origin).parents[1] / "asan_with_fuzzer.so")


def _native_functions(source: Path) -> list[str]:
    """The names of the functions in `source` that run without the GIL: those that hostile bytes reach."""
    text = re.sub(r"\([^()]*\)", "()", source.read_text())
    return re.findall(r"^ *cdef [^\n=#]*?(\w+)\(\)[^\n:]*\bnogil\b[^\n:]*:", text, re.MULTILINE)


def mangled(module: str) -> str:
    """How the names of C functions show the module `crackle.{module}`."""
    return "_".join(f"{len(part)}{part}" for part in ("crackle", *module.split(".")))


def _source(module: str) -> Path:
    return asan.PACKAGE.joinpath(*module.split(".")).with_suffix(".pyx")


def _flags(home: Path) -> list[str]:
    """Counters only in what runs without the GIL, and in what Python devices call: not in Cython's own code."""
    lines = ["src:*"]
    for path in sorted(asan.PACKAGE.rglob("*.pyx")):
        module = mangled(".".join(path.relative_to(asan.PACKAGE).with_suffix("").parts))
        lines += [f"fun:__pyx_f_{module}_*{name}" for name in _native_functions(path)]
        if path.stem == "python":
            lines += [f"fun:__pyx_pf_{module}_*Request*", f"fun:__pyx_f_{module}_*"]
    allowed = home / "functions"
    allowed.write_text("\n".join(lines) + "\n")
    return [f"-fsanitize-coverage-allowlist={allowed}"]


FUZZ = asan.Build("fuzz", "clang", "address,fuzzer-no-link", _library, _flags)


class Run:
    """One target's."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name, self.environment = name, environment
        self.fresh = WORK / "corpus" / name
        self.found = WORK / "found" / name
        self.kept = CORPUS / name
        for place in (self.fresh, self.found, self.kept):
            place.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments: str, log: Path) -> int:
        command = [sys.executable, str(HERE / "target.py"), self.name, *arguments]
        with log.open("w") as output:
            return subprocess.run(
                command, cwd=asan.ROOT, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode

    def fuzz(self, seconds: int) -> dict[str, object]:
        """For so long; what came of it."""
        log, before = WORK / f"{self.name}.log", {*self.found.iterdir()}
        options = [f"-max_total_time={seconds}", "-timeout=10", f"-max_len={MAX_BYTES}", "-rss_limit_mb=4096"]
        options += ["-print_final_stats=1", "-len_control=20", f"-artifact_prefix={self.found}/"]
        begin = time.monotonic()
        status = self.start(*options, str(self.fresh), str(self.kept), log=log)
        took = time.monotonic() - begin
        text = log.read_text(errors="replace")
        executions = [int(n) for n in re.findall(r"^stat::number_of_executed_units: +(\d+)", text, re.M)]
        executions = executions or [int(n) for n in re.findall(r"^#(\d+)\t", text, re.M)][-1:]
        return {
            "target": self.name,
            "seconds": round(took),
            "executions": executions[-1] if executions else 0,
            "per_second": round(executions[-1] / took) if executions else 0,
            **self.coverage(),
            "status": status,
            "found": sorted(path.name for path in {*self.found.iterdir()} - before),
        }

    def coverage(self) -> dict[str, int]:
        """Edges of the target's modules (lines, if they are Python) that its inputs reach, and how many there are."""
        log = WORK / f"{self.name}.coverage"
        modules = targets.NAMES[self.name].modules
        places = [str(self.fresh), str(self.kept)]
        if targets.NAMES[self.name].python:
            self.start("--lines", *places, log=log)
            found = re.findall(r"^(\d+) of (\d+) lines", log.read_text(errors="replace"), re.M)
        else:
            self.start("-runs=0", "-timeout=60", "-print_coverage=1", *places, log=log)
            names = "|".join(
                rf"{mangled(module)}_\w*?(?:{'|'.join(_native_functions(_source(module)))})"
                for module in modules
            )
            functions = rf"^(?:UN)?COVERED_FUNC: hits: \d+ edges: (\d+)/(\d+) __pyx_f_(?:{names}) "
            found = re.findall(functions, log.read_text(errors="replace"), re.M)
        return {"covered": sum(int(n) for n, _ in found), "edges": sum(int(n) for _, n in found)}

    def merge(self) -> None:
        """Keep the least that covers as much."""
        least = WORK / "merged" / self.name
        shutil.rmtree(least, ignore_errors=True)
        least.mkdir(parents=True)
        options = [
            "-set_cover_merge=1",
            "-use_counters=0",
            f"-max_len={MAX_BYTES}",
            str(least),
            str(self.kept),
            str(self.fresh),
        ]
        self.start(*options, log=WORK / f"{self.name}.merge")
        shutil.rmtree(self.kept)
        shutil.copytree(least, self.kept)


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"{'target':<10} {'seconds':>7} {'executions':>11} {'per s':>6} {'edges':>12}  found"]
    for row in rows:
        edges = f"{row['covered']} of {row['edges']}"
        found = ", ".join(row["found"]) or ("nothing" if row["status"] == 0 else f"status {row['status']}")
        numbers = f"{row['seconds']:>7} {row['executions']:>11} {row['per_second']:>6}"
        lines.append(f"{row['target']:<10} {numbers} {edges:>12}  {found}")
    return "\n".join(lines)


def main() -> int:
    """Status 0 when nothing was found."""
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of what guests and peers reach.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets.NAMES))
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument(
        "--reproduce", nargs=2, metavar=("TARGET", "INPUT"), help="run one input again, with gcc's build"
    )
    parser.add_argument("--merge", action="store_true", help="keep what is new in tests/fuzz/corpus")
    options = parser.parse_args()
    if options.reproduce:
        name, place = options.reproduce
        command = [sys.executable, str(HERE / "target.py"), name, "--replay", place]
        return subprocess.run(command, env=asan.environment()).returncode
    if unknown := [name for name in options.targets if name not in targets.NAMES]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(targets.NAMES)}")
    environment = asan.environment(FUZZ)
    # Reports do without where memory was allocated: it costs two thirds of the speed, and --reproduce tells.
    environment["ASAN_OPTIONS"] += ":malloc_context_size=0"

    def work(name: str) -> dict[str, object]:
        print(f"{name}: {options.seconds} s", flush=True)
        run = Run(name, environment)
        row = run.fuzz(options.seconds)
        if options.merge:
            run.merge()
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(work, options.targets or targets.NAMES))
    (asan.ROOT / "build" / "fuzz.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return int(any(row["status"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
