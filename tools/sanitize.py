"""Runs every kernel under sanitizers: those of the CPU everywhere, and where there is a GPU those of the GPU, too.

tests/sanitize.cu is one list of calls for all of them, without torch: a caching allocator hides reads of what nobody
wrote and steps past an end (tests/sanitize_device.h has the buffers).

On a CPU, under AddressSanitizer and UndefinedBehaviorSanitizer: the CPU kernels with each instruction set that this
machine has, and the GPU kernels' own source as tests/emulator runs it (FP32, as that is slow). On a GPU, under
compute-sanitizer: memcheck, synccheck, initcheck and racecheck (which takes longest: it sees FP32 alone, in parts, and
its program passes a few barriers more, see docs/reliability.md). Some run side by side: each keeps a core busy, and the
GPU hardly.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup  # the way to the toolkit is the build's own

CASES = ROOT / "tests" / "sanitize.cu"
KERNELS = ROOT / "csrc" / "kernels"
EMULATOR = ROOT / "tests" / "emulator"
STARTED = time.monotonic()

INSTRUCTION_SETS = ("generic", "avx2", "avx512")
NOT_ON_THIS_CPU = 2  # the exit code of the cases
CPU_FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"),
]
# The emulator's threads are fibers, whose small stacks AddressSanitizer would overflow and does not follow.
EMULATED_FLAGS = ["--param", "asan-stack=0", "-DSANITIZE_EMULATED", f"-I{EMULATOR}", f"-I{KERNELS}"]
# Finding leaks needs ptrace, which containers forbid; kernels allocate nothing but vectors.
CPU_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}

# Parts, that run side by side. Of racecheck each takes gigabytes of the host's memory.
GPU_TOOLS = {"memcheck": 8, "synccheck": 4, "initcheck": 8, "racecheck": 40}
AT_A_TIME = 8  # compute-sanitizer can run ten
NOTHING_FOUND = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")


def say(what: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f} s] {what}", flush=True)


def run(name: str, command: Sequence[str], found_nothing: Sequence[str] = ()) -> str | None:
    """Runs one sanitizer; its name if it found something."""
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **CPU_OPTIONS})
    if result.returncode == NOT_ON_THIS_CPU and not found_nothing:
        say(f"left out {name}: this CPU lacks the instructions")
        return None
    fine = result.returncode == 0 and (not found_nothing or any(line in result.stdout for line in found_nothing))
    say(f"{'ok' if fine else 'FAILED':<6} {name}" + ("" if fine else f", exit code {result.returncode}"))
    if not fine:
        said = result.stdout + result.stderr
        print(said if len(said) < 8000 else f"{said[:4000]}\n[...]\n{said[-4000:]}", flush=True)
    return None if fine else name


def compile_all(folder: Path, program: str, sources: Sequence[Path], flags: Sequence[str], jobs: int) -> Path:
    compiler = [shlex.split(os.environ.get("CXX", "c++"))[0]]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{program}-{source.parent.name}-{source.name}.o")
        subprocess.run([*compiler, *CPU_FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*compiler, *CPU_FLAGS, *objects, "-o", str(folder / program)], check=True)
    say(f"built {program}")
    return folder / program


def on_cpu(folder: Path) -> list[str]:
    """The names of what found something."""
    jobs = min(os.cpu_count() or 1, 8)
    cpu = compile_all(folder, "cpu", [CASES, *sorted((KERNELS / "cpu").glob("*.cpp"))], [], jobs)
    emulated_sources = [CASES, EMULATOR / "emulator.cpp", *sorted(KERNELS.rglob("*.cu"))]
    emulated = compile_all(folder, "emulated", emulated_sources, EMULATED_FLAGS, jobs)
    runs = [("emulated GPU kernels", [str(emulated), "fp32"])]
    runs += [(f"CPU kernels, {name}", [str(cpu), name]) for name in INSTRUCTION_SETS]
    with ThreadPoolExecutor(jobs) as pool:
        return [name for name in pool.map(lambda each: run(*each), runs) if name is not None]


def architecture() -> list[str]:
    """Of the GPU that is there: with the kernels for sm_90a, if it can run them."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    listing = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    if listing.startswith("9.0"):
        return ["-gencode=arch=compute_90a,code=sm_90a", "-DKVC_WITH_SM90A"]
    return ["-arch=native"]


def on_gpu(folder: Path, tools: Sequence[str]) -> list[str]:
    toolkit = setup.find_toolkit()
    if toolkit is None:
        raise SystemExit("sanitize: there is a GPU, but no CUDA toolkit (nvcc): install one, or set CUDA_HOME")
    nvcc = [str(toolkit / "bin" / "nvcc"), "-std=c++17", "-O2", "-lineinfo", "--expt-relaxed-constexpr"]
    sources = [str(CASES), *map(str, sorted(KERNELS.rglob("*.cu")))]

    def build(name: str, *flags: str) -> str:
        program = str(folder / name)
        subprocess.run([*nvcc, *flags, *architecture(), "--threads", "0", "-o", program, *sources], check=True)
        return program

    sanitizer = str(toolkit / "bin" / "compute-sanitizer")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        building = pool.submit(build, "gpu"), pool.submit(build, "gpu-racecheck", "-DKVC_RACECHECK")
        plain, racecheck = (each.result() for each in building)
        say("built gpu")
        runs = []
        for tool, parts in ((tool, GPU_TOOLS[tool]) for tool in tools):
            program = [racecheck, "fp32"] if tool == "racecheck" else [plain]
            for part in range(parts):
                command = [sanitizer, "--tool", tool, *program, f"{part}/{parts}"]
                runs.append(pool.submit(run, f"GPU kernels, {tool}, {part}/{parts}", command, NOTHING_FOUND))
        found = [each.result() for each in runs]
    return [name for name in found if name is not None]


def has_gpu() -> bool:
    query = shutil.which("nvidia-smi")
    if query is not None:
        return subprocess.run([query, "-L"], capture_output=True).stdout.startswith(b"GPU ")
    return any(Path("/dev").glob("nvidia[0-9]*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one of the two parts; gpu: even if none is seen")
    parser.add_argument("--tools", nargs="+", choices=GPU_TOOLS, default=list(GPU_TOOLS), help="on a GPU these alone")
    chosen = parser.parse_args()
    only = chosen.only
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if only != "gpu":
            found += on_cpu(Path(folder))
        if only == "gpu" or (only is None and has_gpu()):
            found += on_gpu(Path(folder), chosen.tools)
        elif only is None:
            say("left out the GPU's part: there is no GPU here (--only gpu runs it all the same)")
    print(f"sanitize: {'nothing found' if not found else 'findings of ' + '; '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
