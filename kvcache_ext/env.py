"""What a bug report needs: versions, the build, CPU and GPUs.

Nothing here may fail where the extension or torch does: it is run to find out why.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from .version import __version__

_VARIABLES = (
    "KVCACHE_EXT_CUDA",
    "KVCACHE_EXT_EXCHANGE",
    "KVCACHE_EXT_SITE",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_CUDA_ARCH_LIST",
)

Row = tuple[str, str]


def _output(command: list[str]) -> str:
    """What a program prints; nothing where it is not there or fails."""
    if not command or shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _first_match(path: str, name: str) -> str:
    """The value of the first `name: value` line of a file of /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def _extension() -> Iterator[Row]:
    yield "kvcache_ext", f"{__version__} in {Path(__file__).parent}"
    if importlib.util.find_spec("torch") is None:
        yield "extension", "does not load: torch is not installed"
    else:
        try:
            from ._extension import extension
        except Exception as error:  # anything that keeps it from loading is what the reader wants to see
            yield "extension", f"does not load: {error}"
        else:
            yield "extension", "loads"
            yield "CPU instruction set in use", extension.cpu_instruction_set()
    try:
        from . import _build_info as built
    except ImportError:
        yield "built", "no"
        return
    yield "built", f"for {'CUDA and CPU' if built.WITH_CUDA else 'the CPU only'}, as {built.REASON}"
    yield "built with torch", built.TORCH_VERSION
    yield "built with compiler", getattr(built, "COMPILER", "unknown")
    if built.WITH_CUDA:
        yield "built with CUDA toolkit", getattr(built, "CUDA_TOOLKIT", "unknown")
        yield "built for architectures", built.CUDA_ARCHITECTURES


def _torch() -> Iterator[Row]:
    try:
        import torch
    except Exception as error:  # as above
        yield "torch", f"does not load: {error}"
        return
    yield "torch", f"{torch.__version__} in {Path(torch.__file__).parent}"
    yield "CUDA of torch", torch.version.cuda or "none: a build without CUDA"
    yield "torch threads", str(torch.get_num_threads())
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}",
            f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.multi_processor_count} multiprocessors",
        )
    try:
        yield from _between_gpus(torch)
    except Exception as error:  # as above
        yield "exchange between GPUs", f"unknown: {error}"


def _between_gpus(torch: Any) -> Iterator[Row]:
    """Which exchanges of `ShardedKVCacheFp16` are possible between the GPUs that are here."""
    count = torch.cuda.device_count()
    if count < 2:
        return
    apart = [f"{a} and {b}" for a, b in combinations(range(count), 2) if not _reach_each_other(torch, a, b)]
    if not apart:
        yield "GPUs reach each other's memory", "all of them: an exchange through symmetric memory is possible"
    else:
        yield "GPUs reach each other's memory", f"not {', '.join(apart)}: a group with such a pair exchanges by NCCL"
    there = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    version = ".".join(str(number) for number in torch.cuda.nccl.version()) if there else ""
    yield "NCCL of torch", version or "none: between GPUs there is no exchange"


def _reach_each_other(torch: Any, a: int, b: int) -> bool:
    return bool(torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a))


def _machine() -> Iterator[Row]:
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}) at {sys.executable}"
    yield "operating system", platform.platform()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = _first_match("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    yield "CPU", f"{name} ({platform.machine()}), {usable} of {os.cpu_count()} logical cores usable"
    memory = _first_match("/proc/meminfo", "MemTotal").removesuffix("kB").strip()
    if memory.isdigit():
        yield "memory", f"{int(memory) * 1024 / 1e9:.1f} GB"
    compiler = _output([*shlex.split(os.environ.get("CXX", "c++")), "--version"])
    yield "compiler available", compiler.partition("\n")[0] or "none found"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    nvcc = next((path for path in (f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc") if shutil.which(path)), "")
    version = _output([nvcc, "--version"]).partition("release ")[2].partition(",")[0]
    yield "CUDA toolkit available", f"{version} ({shutil.which(nvcc)})" if nvcc else "none found"
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]
    yield "NVIDIA driver", driver or _first_match("/proc/driver/nvidia/version", "NVRM version") or "none found"


def print_environment() -> None:
    """Prints it as aligned lines of `name: value`."""
    rows = [*_extension(), *_torch(), *_machine()]
    rows += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    width = max(len(name) for name, _ in rows) + 1
    for name, value in rows:
        print(f"{name + ':':<{width}} {value}")
