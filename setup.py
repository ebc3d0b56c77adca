"""Builds kvcache_ext._C against the torch that is installed.

KVCACHE_EXT_CUDA=1 forces a CUDA build, KVCACHE_EXT_CUDA=0 a CPU build; unset, a CUDA build is made when torch has CUDA
and a CUDA toolkit is found (a GPU need not be there). TORCH_CUDA_ARCH_LIST chooses the GPU architectures; 9.0 in it
means 9.0a.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;11.0;12.0+PTX"
OLDEST_TORCH = (2, 11)  # that the package has been tested with


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


def toolkit_version(toolkit: Path) -> str:
    """For example "13.0"; empty if nvcc does not say."""
    listing = subprocess.run([str(toolkit / "bin" / "nvcc"), "--version"], capture_output=True, text=True)
    return listing.stdout.partition("release ")[2].partition(",")[0]


def supported_architectures(toolkit: Path) -> str:
    """The default list, less what this nvcc is too old for."""
    listing = subprocess.run(
        [str(toolkit / "bin" / "nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    return architectures_of(listing.stdout.split())


def architectures_of(known: list[str]) -> str:
    """The default list, less what is not among these: compute_80 and so on, which names no compute_90a."""
    kept = [arch for arch in DEFAULT_ARCHITECTURES.split(";") if f"compute_{plain_number(arch)}" in known]
    if not any(arch.endswith("+PTX") for arch in kept):
        # The PTX is for GPUs that are newer than the compiler. That of 9.0a runs on no other.
        newest = max((i for i, arch in enumerate(kept) if not arch.endswith("a")), default=None)
        if newest is not None:
            kept[newest] += "+PTX"
    return ";".join(kept)


def plain_number(architecture: str) -> str:
    """For example "90" for "9.0a", and "120" for "12.0+PTX"."""
    return architecture.removesuffix("+PTX").rstrip("af").replace(".", "")


def with_sm90a(architectures: str) -> str:
    """This list with 9.0a for 9.0: every GPU of compute capability 9.0 runs code for sm_90a. 9.0+PTX stays."""
    entries = architectures.replace(" ", ";").split(";")
    return ";".join(dict.fromkeys("9.0a" if arch == "9.0" else arch for arch in entries if arch))


def has_sm90a(architectures: str) -> bool:
    """Whether GPUs of compute capability 9.0 run the code for sm_90a: a build for 9.0 beside it leaves that open."""
    entries = architectures.split(";")
    return any(arch.startswith("9.0a") for arch in entries) and not {"9.0", "9.0+PTX", "Hopper"} & set(entries)


def cxx_compiler() -> str:
    """The C++ compiler that torch will call, and its version; no build is begun without one, or without Python.h."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise SystemExit(
            f"kvcache_ext needs a C++ compiler, and {' '.join(command)!r} was not found: install g++ (Debian and "
            "Ubuntu: apt install g++), or name one in CXX"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise SystemExit(
            f"kvcache_ext needs Python's C headers, and {sysconfig.get_path('include')} has no Python.h: install them "
            "(Debian and Ubuntu: apt install python3-dev)"
        )
    listing = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return next(iter(listing.stdout.splitlines()), command[0])


def check_torch(version: str) -> None:
    """Refuses a torch that is older than any this has been tested with. (What is no release, such as 2.14.0a0, passes.)

    At import kvcache_ext/_extension.py refuses every torch but the one that this was built against.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"kvcache_ext needs torch {oldest} or newer, and {sys.executable} has torch {version}: "
            f"pip install 'torch>={oldest}', then install kvcache_ext again"
        )


def choose_build() -> tuple[Path | None, str]:
    """The toolkit for a CUDA build or None for a CPU build, and the reason in words."""
    import torch

    switch = os.environ.get("KVCACHE_EXT_CUDA", "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"KVCACHE_EXT_CUDA must be 0, 1 or unset, got {switch!r}")
    if switch == "0":
        return None, "KVCACHE_EXT_CUDA=0 was set when it was built"
    toolkit = find_toolkit()
    if switch == "1" and toolkit is None:
        raise SystemExit("KVCACHE_EXT_CUDA=1 was set, but no CUDA toolkit (nvcc) was found; set CUDA_HOME")
    if switch == "" and torch.version.cuda is None:
        return None, f"the torch that it was built with, {torch.__version__}, is a build without CUDA"
    if toolkit is None:
        return None, "no CUDA toolkit (nvcc) was found when it was built"
    version = toolkit_version(toolkit)
    if torch.version.cuda is not None and version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        raise SystemExit(
            f"torch {torch.__version__} is built with CUDA {torch.version.cuda}, and the toolkit in {toolkit} is CUDA "
            f"{version}: set CUDA_HOME to a toolkit of the same major version, or KVCACHE_EXT_CUDA=0 for a CPU build"
        )
    if switch == "1":
        return toolkit, "KVCACHE_EXT_CUDA=1 was set when it was built"
    return toolkit, f"torch {torch.__version__} has CUDA and a toolkit was found at build time"


def sources(with_cuda: bool) -> list[str]:
    """Every C++ file of the bindings and of the CPU kernels; with CUDA its binding and every .cu as well."""
    files = sorted(ROOT.glob("csrc/bindings/*.cpp")) + sorted(ROOT.glob("csrc/kernels/cpu/*.cpp"))
    if with_cuda:
        files += sorted(ROOT.glob("csrc/kernels/**/*.cu"))
    else:
        files = [file for file in files if file.name != "backend_cuda.cpp"]
    return [str(file.relative_to(ROOT)) for file in files]  # setuptools takes nothing but relative paths


def holding(toolkit: Path, name: str, *patterns: str) -> list[str]:
    """The first folder of the toolkit that holds this file; none where the compiler's own search path has it."""
    folders = (folder for pattern in patterns for folder in sorted(toolkit.glob(pattern)))
    return next(([str(folder)] for folder in folders if (folder / name).exists()), [])


def loaded_cxx_library() -> list[str]:
    """The C++ standard library that torch has in use here.

    A toolchain whose own is static would put a second copy into the extension, and an exception or a stream that meets
    both crashes.
    """
    try:
        mapped = (line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines())
        return [next(path for path in mapped if Path(path).name.startswith("libstdc++.so"))]
    except (OSError, StopIteration):
        return []


def extension_and_commands() -> dict[str, object]:
    compiler = cxx_compiler()
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit(f"kvcache_ext is built against an installed torch, and {sys.executable} has none") from None
    check_torch(str(torch.__version__))
    toolkit, reason = choose_build()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # before torch looks for it itself
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or supported_architectures(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = with_sm90a(architectures)
    from torch.utils import cpp_extension

    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if sys.platform.startswith("linux"):
        # Compiled for OpenMP, never linked with it: the symbols are then those of torch's own thread pool.
        cxx.append("-fopenmp")
    link = loaded_cxx_library()
    options: dict[str, object] = {"extra_compile_args": {"cxx": cxx}, "extra_link_args": link}
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit)  # which a CPU build of torch leaves empty, whatever the environment says
        libraries = holding(toolkit, "libcudart.so", "lib64", "lib", "targets/*/lib")
        cxx.append("-DKVC_WITH_CUDA")
        nvcc = ["-O3", "--threads", "2"]
        if has_sm90a(os.environ["TORCH_CUDA_ARCH_LIST"]):
            cxx.append("-DKVC_WITH_SM90A")
            nvcc.append("-DKVC_WITH_SM90A")
        options = {
            "extra_compile_args": {"cxx": cxx, "nvcc": nvcc},
            "include_dirs": holding(toolkit, "cuda_runtime.h", "include", "targets/*/include"),
            "libraries": ["cudart"],
            "library_dirs": libraries,
            # torch brings its own runtime of the same name, which is the one in use; this one is for where it does not.
            "extra_link_args": [*link, *(f"-Wl,-rpath,{folder}" for folder in libraries)],
        }

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """Also writes what the extension was built with beside it, for `import` to compare and `env` to print."""

        def run(self) -> None:
            super().run()
            folder = ROOT / "kvcache_ext" if self.inplace else Path(self.build_lib) / "kvcache_ext"
            facts = {
                "TORCH_VERSION": str(torch.__version__),
                "WITH_CUDA": toolkit is not None,
                "REASON": reason,
                "CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit is not None else "",
                "CUDA_TOOLKIT": toolkit_version(toolkit) if toolkit is not None else "",
                "COMPILER": compiler,
            }
            lines = [f"{name} = {value!r}\n" for name, value in facts.items()]
            (folder / "_build_info.py").write_text(
                '"""Written by setup.py when the extension was built."""\n\n' + "".join(lines)
            )

    return {
        "ext_modules": [cpp_extension.CppExtension("kvcache_ext._C", sources(toolkit is not None), **options)],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True)},
    }


def main() -> None:
    from setuptools import setup

    needs_build = not any(command in sys.argv for command in ("sdist", "egg_info", "dist_info", "clean"))
    # The license is here, as no one spelling in pyproject.toml suits both older and newer setuptools.
    setup(license="MIT", **(extension_and_commands() if needs_build else {}))


if __name__ == "__main__":  # tools/check_kernels.py imports the list of architectures from here
    main()
