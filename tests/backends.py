"""The implementations of the ops that are tested, and how to choose one: for conftest.py and tools/soak.py."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcache_ext._extension import extension

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
EMULATOR_VARIABLE = "KVC_TEST_EMULATOR"  # the way to a library of build_emulator's that the tests are to use
EMULATOR = ROOT / "tests" / "emulator"
EMULATOR_OPTIONS = (
    *("-std=c++17", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused", "-fPIC"),
    *("-fsanitize=bounds,shift,integer-divide-by-zero,signed-integer-overflow", "-fno-sanitize-recover=all"),
)
CPU_BACKENDS = ("cpu-generic", "cpu-avx2", "cpu-avx512", "emulated")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: a device, and on the CPU which code serves it."""

    name: str
    device: torch.device

    @property
    def slow(self) -> bool:
        return self.name == "emulated"


class Unavailable(Exception):
    """A backend that this machine does not have."""


def emulator_compiler() -> str:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Unavailable("no C++ compiler to build the emulator with")
    return compiler


def build_emulator(folder: Path, kernels: Path = KERNELS) -> Path:
    """Compiles the GPU kernels' own source to run on a CPU (tests/emulator), into `folder`; a file at a time on each
    core."""
    compiler = emulator_compiler()
    options = [*EMULATOR_OPTIONS, f"-I{EMULATOR}", f"-I{kernels}"]
    sources = [EMULATOR / "emulator.cpp", *sorted(kernels.rglob("*.cu"))]
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, target: str) -> None:
        subprocess.run([compiler, *options, "-o", target, "-c", "-x", "c++", str(source)], check=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "libemulated.so"
    subprocess.run([compiler, *EMULATOR_OPTIONS, "-shared", "-o", str(library), *objects], check=True)
    return library


def built_emulator() -> Path:
    """The emulator of this checkout's kernels, built once for all processes, and again when a source changes."""
    version = subprocess.run([emulator_compiler(), "--version"], capture_output=True).stdout
    digest = hashlib.sha256(" ".join(EMULATOR_OPTIONS).encode() + version)
    for root in (KERNELS, EMULATOR):
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    place = ROOT / "build" / "emulator"
    place.mkdir(parents=True, exist_ok=True)
    wanted = place / f"libemulated-{digest.hexdigest()[:16]}.so"
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.exists():
            for old in place.glob("libemulated-*.so"):
                if time.time() - old.stat().st_mtime > 24 * 3600:  # a younger one may be in use
                    old.unlink()
            with tempfile.TemporaryDirectory(dir=place) as folder:
                build_emulator(Path(folder)).rename(wanted)
    return wanted


@contextlib.contextmanager
def using(name: str, emulator: Path | None = None, sm90: bool = True) -> Iterator[Backend]:
    """A backend by its name: "cpu" (what the CPU chooses itself), one of CPU_BACKENDS, or "cuda".

    `sm90`: prompts may go to the kernels for sm_90a, on a GPU that runs them or an emulated one.
    """
    if name == "cuda":
        extension.prefer_portable_prompts(not sm90)
        yield Backend(name, torch.device("cuda", torch.cuda.current_device()))
        extension.prefer_portable_prompts(False)
        return
    device = torch.device("cpu")
    if name == "emulated":
        assert emulator is not None
        ctypes.CDLL(str(emulator)).kvc_emulate_sm90(sm90)
        extension.load_cpu_ops(str(emulator))
        yield Backend(name, device)
        extension.load_cpu_ops("")
        return
    chosen = extension.cpu_instruction_set()
    if name != "cpu" and not extension.select_cpu_instruction_set(name.removeprefix("cpu-")):
        raise Unavailable(f"this CPU has no {name.removeprefix('cpu-')}")
    yield Backend(name, device)
    assert extension.select_cpu_instruction_set(chosen)
