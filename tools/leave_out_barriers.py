"""Leaves out every barrier of every GPU kernel, one at a time: the tests must fail each time. `make check-barriers`.

The kernels run under the tests' emulator (tests/emulator), so no GPU is needed. A barrier that no test misses is either
one too many or one that the tests do not reach; both are worth knowing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from backends import EMULATOR_VARIABLE, KERNELS, build_emulator

# A statement that is nothing but a barrier, a wait or a fence. (`sync_team` is that of a team of warps.)
BARRIER = re.compile(
    r"^ *(?:(?:__syncthreads|sync_team|show_barriers|fence_for_products|wait_for_products<\d>)\(\)"
    r"|(?:sync_threads|wait_barrier)\(.*\));"
)
TESTS = {  # by the beginning of a file's name
    "append.cu": ["test_append.py"],
    "copy_sequences": ["test_sequences.py"],
    "one_query": ["test_attention.py"],
    "few_queries": ["test_attention.py"],
    "many_queries": ["test_prompt.py"],
}
OF_ATTENTION = ["test_attention.py", "test_prompt.py"]  # of all other files
LONGEST = 3600  # seconds of the tests
STARTED = time.monotonic()


@dataclass(frozen=True)
class Barrier:
    file: Path
    line: int  # from 0

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line + 1}"


def barriers() -> list[Barrier]:
    return [
        Barrier(path, number)
        for path in sorted(KERNELS.rglob("*.cu*"))
        for number, line in enumerate(path.read_text().splitlines())
        if BARRIER.match(line)
    ]


def tests_of(barrier: Barrier) -> list[str]:
    return next((tests for start, tests in TESTS.items() if barrier.file.name.startswith(start)), OF_ATTENTION)


def missed(left_out: Barrier | None, tests: list[str]) -> str:
    """The test that fails without it (with all barriers, for None), or the file whose tests break off, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        shutil.copytree(KERNELS, kernels)
        if left_out is not None:
            copy = kernels / left_out.file.relative_to(KERNELS)
            lines = copy.read_text().splitlines(keepends=True)
            lines[left_out.line] = BARRIER.sub(";", lines[left_out.line])
            copy.write_text("".join(lines))
        environment = os.environ | {
            EMULATOR_VARIABLE: str(build_emulator(Path(folder), kernels)),
            "OMP_NUM_THREADS": "1",
            "UBSAN_OPTIONS": "abort_on_error=1",  # the emulator's; else its end would look like that of failing tests
        }
        command = [sys.executable, "-m", "pytest", "--all", "-q", "-x", "-k", "emulated", "-p", "no:cacheprovider"]
        command += [str(ROOT / "tests" / test) for test in tests]
        try:
            result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return f"{', '.join(tests)}, which do not end"
    if result.returncode == 0:
        return ""
    if result.returncode < 0:  # a step out of bounds, say, at which the emulator's sanitizers end the process
        return f"{', '.join(tests)}, by {signal.Signals(-result.returncode).name}"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"pytest ended with {result.returncode}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return found[1].removeprefix("tests/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="barriers whose file and line contain this, such as append.cu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (default: the cores)")
    args = parser.parse_args()
    chosen = [barrier for barrier in barriers() if args.only in str(barrier)]
    if not chosen:
        parser.error(f"--only: no barrier's place contains {args.only!r}")
    failing = missed(None, sorted({test for barrier in chosen for test in tests_of(barrier)}))
    if failing:
        print(f"check-barriers: FAILED: with every barrier in its place, {failing} fails")
        return 1
    print(f"[{time.monotonic() - STARTED:5.0f} s] with every barrier the tests pass", flush=True)
    unnoticed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for barrier, test in zip(chosen, pool.map(missed, chosen, map(tests_of, chosen)), strict=True):
            if not test:
                unnoticed.append(str(barrier))
            what = f"missed by {test}" if test else "NOT MISSED"
            print(f"[{time.monotonic() - STARTED:5.0f} s] {barrier}: {what}", flush=True)
    if unnoticed:
        print(f"check-barriers: FAILED: left out and not missed: {', '.join(unnoticed)}")
        return 1
    print(f"check-barriers: PASSED: each of {len(chosen)} barriers is missed by a test when it is left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
