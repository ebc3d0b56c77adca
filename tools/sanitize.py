"""Runs every kernel under compute-sanitizer: memcheck, racecheck, initcheck, synccheck. Needs a GPU and a CUDA toolkit.

tests/sanitize.cu has no torch in it: its buffers come straight from cudaMalloc, where a caching allocator would hide
reads of what nobody wrote. racecheck, which takes longest, sees the FP32 shapes alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup  # the way to the toolkit is the build's own

TOOLS = {"memcheck": [], "synccheck": [], "initcheck": [], "racecheck": ["9"]}
NOTHING_FOUND = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")


def main() -> int:
    toolkit = setup.find_toolkit()
    if toolkit is None:
        raise SystemExit("sanitize: no CUDA toolkit (nvcc) was found: install one, or set CUDA_HOME")
    started = time.monotonic()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "sanitize")
        sources = [str(ROOT / "tests" / "sanitize.cu"), *map(str, sorted((ROOT / "csrc" / "kernels").glob("*.cu")))]
        command = [str(toolkit / "bin" / "nvcc"), "-std=c++17", "-O2", "-lineinfo", "--expt-relaxed-constexpr"]
        subprocess.run([*command, "-arch=native", "-o", program, *sources], check=True)
        print(f"[{time.monotonic() - started:5.1f} s] built", flush=True)
        for tool, arguments in TOOLS.items():
            run = subprocess.run(
                [str(toolkit / "bin" / "compute-sanitizer"), "--tool", tool, program, *arguments],
                capture_output=True,
                text=True,
            )
            fine = run.returncode == 0 and any(line in run.stdout for line in NOTHING_FOUND)
            print(f"[{time.monotonic() - started:5.1f} s] {'ok' if fine else 'FAILED':<6} {tool}", flush=True)
            if not fine:
                failed.append(tool)
                print((run.stdout + run.stderr)[-4000:])
    print(f"sanitize: {'nothing found' if not failed else 'findings of ' + ', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
