"""Checks the kernels without torch and without a GPU.

- Nothing below csrc/kernels includes a header of torch (ATen, c10, pybind11) or of the bindings.
- Every csrc/kernels/**/*.cu compiles with plain nvcc, warnings as errors, for the architectures that setup.py builds by
  default, and every kernel of it needs neither register spills nor a stack frame. (But for attention that uses all
  registers: see Kernel.allowed.) Where ptxas says that it ignores setmaxnreg or lets wgmma wait for each other, that is
  an error too.
- append, gather, copy_sequences and copy_from load and store 16 bytes at a time: LDG.E.128 and STG.E.128 are in their
  machine code.
- Every csrc/kernels/cpu/*.cpp compiles with warnings as errors as C++17 (torch up to 2.11) and C++20 (torch since), and
  for aarch64 where a cross compiler is there.

The bindings are the matter of tools/check_cuda_build.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup  # the list of architectures and the way to the toolkit are the build's own

KERNELS = ROOT / "csrc" / "kernels"
STANDARDS = ("c++17", "c++20")
WIDE_LOADS_AND_STORES = (
    "append",
    "gather",
    "copy_sequences",
    "copy_from",
)  # moving bytes is all they do, so they move as many at a time as there are
DISASSEMBLED_ARCHITECTURE = "90a"
# What need not be compiled for all. many_queries_sm90.cu has code for sm_90a alone, and empty kernels for all others;
# many_queries.cu takes the longest, and what ptxas makes of it for sm_89 and sm_110 is what it does for their kin.
ARCHITECTURES_OF = {"many_queries_sm90.cu": {"80", "90a"}, "many_queries.cu": {"80", "86", "90a", "100", "120"}}
# What ptxas does not say as a warning, or -Werror does not take for one: C7508, C7510 and their like.
SLOW = re.compile(r"^.*(?:C75\d\d|Potential Performance Loss|setmaxnreg|wgmma).*$", re.M)

FORBIDDEN = re.compile(r'\s*#\s*include\s*[<"]((torch|ATen|c10|caffe2|pybind11)/|Python\.h|(\.\./)*bindings/)')


@dataclass
class Compilation:
    """A compiler's run: what it was for, and what came of it."""

    name: str
    succeeded: bool
    output: str


@dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture; all but the registers in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def allowed(self) -> int:
        """Bytes that may be spilled, each way."""
        since_sm_100 = int(self.architecture.rstrip("af")) >= 100
        if re.match(r"few_queries_kernel<(16|32)\b", self.name):
            return 128
        if re.match(r"few_queries_kernel<8, SixteenQueries\b", self.name):
            # Stored before the loop over key tiles, read after it.
            return 64 if since_sm_100 else 32 if self.architecture in ("86", "89") else 0
        if (
            re.match(r"(append_kernel|copy_sequences_kernel|merge_kernel|gather_kernel<.*ReadShare)\b", self.name)
            and self.architecture != "90a"
        ):
            # In the branch for a share of a text, which is computed once a block.
            return 24
        if re.match(r"many_queries_kernel<ManyQueriesBlock<ManyQueries256\b", self.name):
            return 288
        if re.match(r"many_queries_kernel<ManyQueriesBlock<ManyQueries128\b", self.name) and since_sm_100:
            return 96
        if re.match(r"many_queries_sm90_kernel<Sm90Block<Sm90Queries256<2>", self.name):
            return 820
        if re.match(
            r"many_queries_sm90_kernel<", self.name
        ):  # by the warpgroup that loads, which has given its registers away
            return 288
        if re.match(r"finish_kernel\b", self.name):  # where an answer has a NaN
            return 160
        return 0

    @property
    def offends(self) -> bool:
        return max(self.stack, self.spill_stores, self.spill_loads) > self.allowed


def run(name: str, command: list[str]) -> Compilation:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return Compilation(name, done.returncode == 0, done.stdout + done.stderr)


def run_ptxas(name: str, command: list[str]) -> Compilation:
    done = run(name, command)
    slow = "\n".join(dict.fromkeys(SLOW.findall(done.output)))
    return Compilation(name, False, slow) if done.succeeded and slow else done


def find_disassembler(toolkit: Path | None) -> list[str] | None:
    """A command that takes a cubin and prints its machine code: from PATH, the toolkit, triton or NVIDIA's packages."""
    folders = [] if toolkit is None else [toolkit / "bin"]
    for package in ("triton", "nvidia"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            pattern = "backends/nvidia/bin" if package == "triton" else "*/bin"
            folders += sorted(Path(root).glob(pattern))
    for program, arguments in (("nvdisasm", []), ("cuobjdump", ["-sass"])):
        for path in (None, *map(str, folders)):
            found = shutil.which(program, path=path)
            if found is not None:
                return [found, *arguments]
    return None


def demangled(names: list[str]) -> dict[str, str]:
    """Readable names, without parameters and namespaces; the mangled ones where there is no c++filt."""
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None or not names:
        return {name: name for name in names}
    listing = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = {}
    for name, text in zip(names, listing.stdout.splitlines(), strict=True):
        text = re.sub(r"\(anonymous namespace\)::|\bkvc::|^void ", "", text)
        text = re.sub(r"\((DType)\)(\d)", lambda m: ("f32", "f16", "bf16")[int(m[2])], text)
        readable[name] = re.sub(r"\(.*", "", text)
    return readable


def kernels_in(ptxas_output: str, architecture: str) -> list[Kernel]:
    """The kernels that `ptxas -v` lists; functions that are not inlined into one are its own lines and count as one."""
    kernels = []
    for part in re.split(r"^ptxas info\s*: Compiling entry function ", ptxas_output, flags=re.M)[1:]:
        name = re.match(r"'([^']+)'", part)
        frames = [
            [int(number) for number in numbers]
            for numbers in re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            )
        ]
        registers = re.search(r"Used (\d+) registers", part)
        if name is None or not frames or registers is None:
            raise SystemExit(f"ptxas prints something new, which this check cannot read:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = (sum(column) for column in zip(*frames, strict=True))
        kernels.append(
            Kernel(name[1], architecture, int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads)
        )
    names = demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return sorted(kernels, key=lambda kernel: kernel.name)


def print_table(kernels: list[Kernel]) -> None:
    """A line for each kernel; what differs between architectures has a number for each of them."""
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    width = max((len(kernel.name) for kernel in kernels), default=0)
    print(f"\n{'':<{width}}  {'registers on sm_':<{5 * len(architectures)}} {'shared':>8} {'stack':>7} {'spilled':>8}")
    print(f"{'kernel':<{width}}  {''.join(f'{a:>5}' for a in architectures)} {'bytes':>8} {'bytes':>7} {'bytes':>8}")
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        its = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        registers = "".join(f"{its[a].registers if a in its else '-':>5}" for a in architectures)
        shared, stack, spilled = (
            max(values)
            for values in zip(*((k.shared, k.stack, k.spill_stores + k.spill_loads) for k in its.values()), strict=True)
        )
        print(f"{name:<{width}}  {registers} {shared:>8} {stack:>7} {spilled:>8}")
    print()


class Check:
    """Collects what is wrong, and says after each step whether it found anything."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.started = time.monotonic()

    def step(self, what: str, problems: list[str]) -> None:
        self.problems += problems
        print(f"[{time.monotonic() - self.started:5.1f} s] {'FAILED' if problems else 'ok':<6} {what}", flush=True)
        for problem in problems:
            print(f"{'':17}{problem}", flush=True)


def forbidden_includes() -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sorted(path for path in KERNELS.rglob("*") if path.is_file())
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if FORBIDDEN.match(line)
    ]


def failures(compilations: list[Compilation]) -> list[str]:
    return [f"{c.name}:\n{c.output.rstrip()}" for c in compilations if not c.succeeded]


def check_cuda(check: Check, toolkit: Path, scratch: Path, pool: ThreadPoolExecutor) -> None:
    nvcc = str(toolkit / "bin" / "nvcc")
    files = sorted(KERNELS.rglob("*.cu"), key=lambda file: -file.stat().st_size)  # what takes longest begins first
    architectures = [a.removesuffix("+PTX").replace(".", "") for a in setup.supported_architectures(toolkit).split(";")]
    flags = ["-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-DKVC_WITH_SM90A"]

    def host(file: Path, standard: str) -> Compilation:
        """The launchers too, as both of torch's C++ standards.

        Device code no further than PTX, and not optimised, which takes longest: `device` does that.
        """
        virtual = f"compute_{DISASSEMBLED_ARCHITECTURE}"
        command = [nvcc, f"-std={standard}", *flags, "-Xcicc", "-O0", "-Xcompiler", "-Wall,-Wextra,-Werror"]
        command += ["-gencode", f"arch={virtual},code={virtual}"]
        target = scratch / f"{file.stem}.{standard}.o"
        return run(f"{file.name} as {standard}", [*command, "-c", str(file), "-o", str(target)])

    def device(file: Path, architecture: str) -> Compilation:
        command = [nvcc, f"-std={STANDARDS[0]}", *flags, "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
        target = scratch / f"{file.stem}.sm_{architecture}.cubin"
        return run_ptxas(f"{file.name} for sm_{architecture}", [*command, str(file), "-o", str(target)])

    compiled = list(pool.map(lambda job: host(*job), [(f, s) for f in files for s in STANDARDS]))
    check.step(f"{len(files)} CUDA files as {' and '.join(STANDARDS)}, host code included", failures(compiled))

    jobs = [
        (file, architecture)
        for file in files
        for architecture in architectures
        if architecture in ARCHITECTURES_OF.get(file.name, architectures)
    ]
    compiled = list(pool.map(lambda job: device(*job), jobs))
    check.step(f"{len(files)} CUDA files for sm_{', sm_'.join(architectures)}", failures(compiled))

    kernels = [
        kernel
        for (_, architecture), compilation in zip(jobs, compiled, strict=True)
        if compilation.succeeded
        for kernel in kernels_in(compilation.output, architecture)
    ]
    print_table(kernels)
    check.step(
        f"no stack frame, no spilled register (attention of full registers apart) in {len(kernels)} compiled kernels",
        [
            f"{k.name} on sm_{k.architecture}: {k.stack} bytes of stack, {k.spill_stores} stored and {k.spill_loads} "
            "loaded by spills"
            for k in kernels
            if k.offends
        ],
    )


def wide_accesses(listing: str) -> dict[str, dict[str, int]]:
    """For each kernel of a disassembly how often it loads (LDG) and stores (STG) 16 bytes."""
    # A kernel begins at a section (nvdisasm) or a heading (cuobjdump) with its name.
    parts = re.split(r"^\s*(?:\.section\s+\.text\.|Function\s*:\s*)(\w+).*$", listing, flags=re.M)[1:]
    names = demangled(parts[::2])
    return {
        names[name]: {kind: len(re.findall(rf"\b{kind}\.E(?:\.\w+)*\.128\b", code)) for kind in ("LDG", "STG")}
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def check_wide_accesses(check: Check, disassembler: list[str], scratch: Path) -> None:
    for name in WIDE_LOADS_AND_STORES:
        cubin = scratch / f"{name}.sm_{DISASSEMBLED_ARCHITECTURE}.cubin"
        listing = run(name, [*disassembler, str(cubin)])
        kernels = wide_accesses(listing.output)
        totals = {kind: sum(counts[kind] for counts in kernels.values()) for kind in ("LDG", "STG")}
        problems = [f"no {kind}.E.128 in {name}" for kind, total in totals.items() if total == 0]
        # The second template argument (copy_sequences and copy_from have no other) is how many elements a thread moves
        # at a time: 16 bytes on the wider side, but for the kernels of odd shapes, where it is 1. States are no
        # elements.
        problems += [
            f"no 16-byte access in {kernel}"
            for kernel, counts in kernels.items()
            if not re.search(r"<(\w+, )?1[,>]|states", kernel) and counts["LDG"] + counts["STG"] == 0
        ]
        check.step(
            f"{name}: {totals['LDG']} loads and {totals['STG']} stores of 16 bytes in {len(kernels)} kernels for "
            f"sm_{DISASSEMBLED_ARCHITECTURE}",
            failures([listing]) or problems,
        )


def check_cpu(check: Check, scratch: Path, pool: ThreadPoolExecutor) -> None:
    files = sorted((KERNELS / "cpu").glob("*.cpp"))
    cross = "aarch64-linux-gnu-g++"
    compilers = {"this machine": shlex.split(os.environ.get("CXX", "c++"))}
    if shutil.which(cross):
        compilers["aarch64"] = [cross]
    for machine, compiler in compilers.items():

        def compile_one(file: Path, standard: str, compiler: list[str] = compiler) -> Compilation:
            # At the build's optimisation, without which the compiler does not see all that it warns of.
            flags = [f"-std={standard}", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror"]
            target = scratch / f"{file.stem}.{Path(compiler[0]).name}.{standard}.o"
            return run(f"{file.name} as {standard}", [*compiler, *flags, "-c", str(file), "-o", str(target)])

        compiled = list(pool.map(lambda job: compile_one(*job), [(f, s) for f in files for s in STANDARDS]))
        what = f"{len(files)} CPU files as {' and '.join(STANDARDS)} for {machine} ({shlex.join(compiler)})"
        check.step(what, failures(compiled))
    if "aarch64" not in compilers:
        print(f"{'':10}skipped: the CPU files for aarch64, as there is no {cross}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--allow-no-disassembler", action="store_true", help="leave out the look at the machine code if there is none"
    )
    parser.add_argument(
        "--find-disassembler", action="store_true", help="only print which one would be used; 1 if there is none"
    )
    options = parser.parse_args()
    toolkit = setup.find_toolkit()
    disassembler = find_disassembler(toolkit)
    if options.find_disassembler:
        print(disassembler[0] if disassembler else "none")
        return 0 if disassembler else 1

    check = Check()
    check.step("no header of torch or of the bindings below csrc/kernels", forbidden_includes())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        scratch = Path(folder)
        check_cpu(check, scratch, pool)
        if toolkit is None:
            check.step("the CUDA kernels", ["no CUDA toolkit (nvcc) was found: install one, or set CUDA_HOME"])
        else:
            check_cuda(check, toolkit, scratch, pool)
            if disassembler is not None:
                check_wide_accesses(check, disassembler, scratch)
            elif options.allow_no_disassembler:
                print(f"{'':10}skipped: the loads and stores of 16 bytes, as there is no nvdisasm or cuobjdump")
            else:
                missing = "no nvdisasm or cuobjdump: pip install nvidia-cuda-nvdisasm, or pass --allow-no-disassembler"
                check.step("the loads and stores of 16 bytes", [missing])
    print(f"check-kernels: {len(check.problems) or 'no'} problem{'s' * (len(check.problems) != 1)} found")
    return 1 if check.problems else 0


if __name__ == "__main__":
    sys.exit(main())
