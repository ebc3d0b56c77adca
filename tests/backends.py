"""The implementations of the ops that are tested, and how to choose one: for conftest.py and tools/soak.py."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcache_ext._extension import extension

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
EMULATOR_VARIABLE = "KVC_TEST_EMULATOR"  # the way to a library of build_emulator's that the tests are to use
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


def build_emulator(folder: Path, kernels: Path = KERNELS) -> Path:
    """Compiles the GPU kernels' own source to run on a CPU (tests/emulator), into `folder`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Unavailable("no C++ compiler to build the emulator with")
    library = folder / "libemulated.so"
    source_folder = ROOT / "tests" / "emulator"
    command = [compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += ["-fsanitize=bounds,shift,integer-divide-by-zero,signed-integer-overflow"]
    command += ["-fno-sanitize-recover=all"]
    command += [f"-I{source_folder}", f"-I{kernels}", "-o", str(library), str(source_folder / "emulator.cpp")]
    command += ["-x", "c++", *(str(source) for source in sorted(kernels.rglob("*.cu")))]
    subprocess.run(command, check=True)
    return library


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
