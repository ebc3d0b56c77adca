"""Builds kvcache_ext._C against the torch that is installed.

KVCACHE_EXT_CUDA=1 forces a CUDA build, KVCACHE_EXT_CUDA=0 a CPU build; unset, a CUDA build is made when torch has CUDA
and a CUDA toolkit is found (a GPU need not be there). TORCH_CUDA_ARCH_LIST chooses the GPU architectures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def find_toolkit() -> Path | None:
    """The CUDA toolkit's home: $CUDA_HOME, or where nvcc says that it lives (nvcc on PATH may be a wrapper)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda")
        return default if (default / "bin" / "nvcc").is_file() else None
    # `nvcc --dryrun` prints the folders that it will use, the wrapper's target among them.
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
    for line in listing.stderr.splitlines():
        if line.startswith("#$ TOP="):
            top = Path(line.removeprefix("#$ TOP=").strip())
            if (top / "bin" / "nvcc").is_file():
                return top.resolve()
    return Path(nvcc).resolve().parent.parent


def supported_architectures(toolkit: Path) -> str:
    """The default list, less what this nvcc is too old for."""
    listing = subprocess.run(
        [str(toolkit / "bin" / "nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    known = listing.stdout.split()
    wanted = DEFAULT_ARCHITECTURES.split(";")
    kept = [arch for arch in wanted if f"compute_{arch.removesuffix('+PTX').replace('.', '')}" in known]
    if kept and not kept[-1].endswith("+PTX"):
        kept[-1] += "+PTX"
    return ";".join(kept)


def choose_build() -> tuple[Path | None, str]:
    """The toolkit for a CUDA build or None for a CPU build, and the reason in words."""
    import torch

    switch = os.environ.get("KVCACHE_EXT_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"KVCACHE_EXT_CUDA must be 0, 1 or unset, got {switch!r}")
    if switch == "0":
        return None, "KVCACHE_EXT_CUDA=0 was set when it was built"
    toolkit = find_toolkit()
    if switch == "1":
        if toolkit is None:
            raise SystemExit("KVCACHE_EXT_CUDA=1 was set, but no CUDA toolkit (nvcc) was found; set CUDA_HOME")
        return toolkit, "KVCACHE_EXT_CUDA=1 was set when it was built"
    if torch.version.cuda is None:
        return None, f"the torch that it was built with, {torch.__version__}, is a build without CUDA"
    if toolkit is None:
        return None, "no CUDA toolkit (nvcc) was found when it was built"
    return toolkit, f"torch {torch.__version__} has CUDA and a toolkit was found at build time"


def extension_and_commands() -> dict[str, object]:
    toolkit, reason = choose_build()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # before torch looks for it itself
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", supported_architectures(toolkit))
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    bindings = ["checks.cpp", "host_lengths.cpp", "module.cpp", "ops.cpp", "ops_cpu.cpp"]
    kernels = ["convert_generic.cpp", "convert_avx2.cpp", "attend_generic.cpp", "attend_avx2.cpp", "attend_avx512.cpp", "dispatch.cpp", "ops.cpp"]
    sources = [f"csrc/bindings/{name}" for name in bindings] + [f"csrc/kernels/cpu/{name}" for name in kernels]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if sys.platform.startswith("linux"):
        # Compiled for OpenMP, never linked with it: the symbols are then those of torch's own thread pool.
        cxx.append("-fopenmp")
    options: dict[str, object] = {"extra_compile_args": {"cxx": cxx}}
    if toolkit is not None:
        sources += ["csrc/bindings/ops_cuda.cpp"]
        sources += [f"csrc/kernels/{name}.cu" for name in ("append", "gather", "decode_attention", "truncate")]
        libraries = next((p for p in (toolkit / "lib64", toolkit / "lib") if p.is_dir()), toolkit / "lib64")
        cxx.append("-DKVC_WITH_CUDA")
        options = {
            "extra_compile_args": {"cxx": cxx, "nvcc": ["-O3", "--threads", "2"]},
            "include_dirs": [str(toolkit / "include")],
            "libraries": ["cudart"],
            "library_dirs": [str(libraries)],
            # torch brings its own runtime of the same name, which is the one in use; this one is for where it does not.
            "extra_link_args": [f"-Wl,-rpath,{libraries}"],
        }

    class Build(BuildExtension):  # type: ignore[misc]
        """Also writes what the extension was built with beside it, for `import` to compare and `env` to print."""

        def run(self) -> None:
            super().run()
            folder = ROOT / "kvcache_ext" if self.inplace else Path(self.build_lib) / "kvcache_ext"
            architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit is not None else ""
            (folder / "_build_info.py").write_text(
                '"""Written by setup.py when the extension was built."""\n\n'
                f"TORCH_VERSION = {str(torch.__version__)!r}\n"
                f"WITH_CUDA = {toolkit is not None!r}\n"
                f"REASON = {reason!r}\n"
                f"CUDA_ARCHITECTURES = {architectures!r}\n"
            )

    return {
        "ext_modules": [CppExtension("kvcache_ext._C", sources, **options)],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True)},
    }


needs_build = not any(command in sys.argv for command in ("sdist", "egg_info", "dist_info", "clean"))
setup(**(extension_and_commands() if needs_build else {}))
