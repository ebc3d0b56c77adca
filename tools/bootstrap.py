"""Runs one of the Makefile's targets on whatever machine this is, setting up first what it lacks.

An interpreter that already holds torch and the tools is used as it is, and then nothing is downloaded. Otherwise what
is missing goes into the virtual environment that the interpreter belongs to; or, where it belongs to none or there is
no torch at all, into .venv beside this project. Only the standard library is needed to get here.
"""

import sys

if sys.version_info < (3, 10):  # said before anything that an older Python stumbles over; no newer syntax here
    sys.exit(f"kvcache_ext needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}: set PYTHON=")

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOGS = ROOT / "build"
STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def fail(sentence: str) -> NoReturn:
    raise SystemExit(sentence)


# The targets


@dataclass(frozen=True)
class Target:
    """What a target needs, and the programs that it runs once that is there."""

    extras: tuple[str, ...]  # of pyproject.toml
    # "{args}" is replaced by ARGS, "{c++}" by every C++ and CUDA file, "{parallel}" by pytest-xdist's options
    programs: tuple[tuple[str, ...], ...] = ()
    torch: bool = True
    build: bool = False
    optional: tuple[str, ...] = ()  # extras that are installed where that is possible, and else done without

    def requirements(self) -> list[str]:
        tools = ["setuptools", "ninja"] if self.torch else []
        return tools + [requirement for extra in self.extras for requirement in listed_in_pyproject(extra)]


BENCHMARKS = (
    "bench/gpu015.py",
    "bench/bench_append.py",
    "bench/bench_gather.py",
    "bench/bench_attention.py",
    "bench/bench_prompt.py",
    "bench/bench_reorder.py",
    "bench/bench_storage.py",
    "bench/bench_generate.py",
    "bench/bench_first_token.py",
    "bench/bench_sharded.py",
    "bench/accuracy.py",
)
REPORT = ("python", "bench/report.py")

FOR_TESTS = ("parallel", "transformers", "accelerate")

TARGETS = {
    "build": Target((), build=True),
    "test": Target(("test",), (("python", "-m", "pytest", "{parallel}", "{args}"),), build=True, optional=FOR_TESTS),
    "test-all": Target(
        ("test",), (("python", "-m", "pytest", "--all", "{parallel}", "{args}"),), build=True, optional=FOR_TESTS
    ),
    "bench": Target(("bench",), (("python", "bench/gpu015.py", "{args}"),), build=True, optional=("transformers",)),
    "bench-all": Target(
        ("bench",),
        (*(("python", path, "{args}") for path in BENCHMARKS), REPORT),
        build=True,
        optional=("transformers",),
    ),
    # The docstrings are read, not imported: neither torch nor a build is needed.
    "docs": Target(("docs",), (("mkdocs", "build", "--strict", "{args}"),), torch=False),
    "report": Target(("bench",), ((*REPORT, "{args}"),), build=True),
    "check-kernels": Target(("sass",), (("python", "tools/check_kernels.py", "{args}"),), torch=False),
    "check-cuda-build": Target((), (("python", "tools/check_cuda_build.py"),)),
    "coverage": Target(("test",), (("python", "tools/families.py", "{args}"),), build=True, optional=("transformers",)),
    "soak": Target(("test",), (("python", "tools/soak.py", "{args}"),), build=True),
    "check-barriers": Target(("test",), (("python", "tools/leave_out_barriers.py", "{args}"),), build=True),
    "sanitize": Target((), (("python", "tools/sanitize.py", "{args}"),), torch=False),
    "lint": Target(
        ("lint",),
        (("ruff", "check"), ("ruff", "format", "--check"), ("clang-format", "--dry-run", "-Werror", "{c++}")),
        torch=False,
    ),
    "format": Target(
        ("lint",), (("ruff", "check", "--fix-only"), ("ruff", "format"), ("clang-format", "-i", "{c++}")), torch=False
    ),
    "typecheck": Target(("types", "test", "bench"), (("mypy",),)),
    "install-hooks": Target(("hooks",), (("pre-commit", "install"),), torch=False),
}


def listed_in_pyproject(extra: str) -> list[str]:
    """A list of [project.optional-dependencies], read by hand, as Python 3.10 has no reader of TOML."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    found = re.search(rf"^{extra} = (\[.*?\])", section.partition("\n[")[0], re.MULTILINE | re.DOTALL)
    assert found is not None, f"pyproject.toml has no optional dependencies {extra}"
    return [str(requirement) for requirement in ast.literal_eval(found[1])]


def cxx_files() -> list[str]:
    suffixes = (".h", ".cuh", ".cpp", ".cu")
    files = (path for folder in ("csrc", "tests") for path in sorted((ROOT / folder).rglob("*")))
    return [str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes]


# Running programs


def run_logged(doing: str, command: list[str], log: str, environment: dict[str, str] | None = None) -> tuple[bool, str]:
    """Runs a program with its output in a log; whether it succeeded, and the log.

    On a terminal a line that is wiped again shows for how long it has been running, and what ninja has done so far.
    """
    path = LOGS / log
    path.parent.mkdir(exist_ok=True)
    say(f"{doing} (log: {path.relative_to(ROOT)})")
    live = sys.stdout.isatty()
    started = time.monotonic()
    with path.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        while process.poll() is None:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                if live:
                    done = re.findall(r"^\[\d+/\d+\]", path.read_text(errors="replace"), re.MULTILINE)
                    print(f"\r{time.monotonic() - started:7.0f} s {''.join(done[-1:])}", end="", flush=True)
            except KeyboardInterrupt:
                process.wait()
                raise
    if live:
        print("\r\x1b[K", end="", flush=True)
    return process.returncode == 0, path.read_text(errors="replace")


def last_lines(text: str, count: int) -> str:
    lines = text.rstrip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-count:])


# The interpreter

PROBE = """
import importlib.metadata, importlib.util, json, sys, sysconfig
try:
    import torch
    torch_version, torch_error = str(torch.__version__), ""
except Exception as error:
    torch_version, torch_error = "", f"{type(error).__name__}: {error}"
if importlib.util.find_spec("torch") is None:
    torch_error = ""
print(json.dumps({
    "path": sys.executable,
    "in_venv": sys.prefix != sys.base_prefix,
    "torch": torch_version,
    "torch_error": torch_error,
    "has_pip": importlib.util.find_spec("pip") is not None,
    "scripts": [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", "posix_user")],
    "installed": {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]},
}))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Interpreter:
    """A Python, and what can be imported there."""

    path: str
    in_venv: bool
    torch: str  # its version; empty where it does not import
    torch_error: str  # why it does not, if it is there
    has_pip: bool
    scripts: list[str]
    installed: dict[str, str]

    @staticmethod
    def probe(python: str | Path) -> "Interpreter | None":
        """None if it does not run."""
        # From this folder, as `-c` makes the current folder importable and the project's has other things in it.
        try:
            listing = subprocess.run(
                [str(python), "-c", PROBE], capture_output=True, text=True, cwd=ROOT / "tools", check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return Interpreter(**json.loads(listing.stdout.splitlines()[-1]))

    def environment(self) -> dict[str, str]:
        """For the programs that a target runs: the project importable, and this interpreter's programs found first."""
        environment = dict(os.environ)
        environment["PATH"] = os.pathsep.join([*self.scripts, environment.get("PATH", os.defpath)])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
        environment["PYTHONUNBUFFERED"] = "1"  # progress is to be seen when it is made, through a pipe as well
        return environment

    def lacks(self, requirements: list[str]) -> list[str]:
        """Those that are not there, or not in the version that pyproject.toml pins."""
        installed = {canonical(name): version for name, version in self.installed.items()}
        missing = []
        for requirement in requirements:
            name, _, version = requirement.partition("==")
            name = re.split(r"[<>~!]", name)[0]
            there = installed.get(canonical(name))
            if there is not None and version in ("", there):
                continue
            if name == "ninja" and shutil.which("ninja", path=self.environment()["PATH"]):
                continue
            if name == "nvidia-cuda-nvdisasm" and self.finds_disassembler():
                continue
            missing.append(requirement)
        return missing

    def finds_disassembler(self) -> bool:
        """Whether there is one beside PyPI's: on PATH, in a CUDA toolkit, in triton."""
        command = [self.path, "tools/check_kernels.py", "--find-disassembler"]
        return subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0

    def install(self, requirements: list[str], *, optional: bool = False) -> bool:
        """Whether that succeeded; what is not optional must."""
        names = " ".join(requirements)
        command = [self.path, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *requirements]
        if self.torch:  # whatever is asked for, torch stays the one that is there
            constraints = LOGS / "constraints.txt"
            constraints.parent.mkdir(exist_ok=True)
            constraints.write_text(f"torch=={self.torch}\n")
            command += ["--constraint", str(constraints)]
        if optional:
            command += ["--retries=1", "--timeout=10"]
        elif not self.has_pip:
            fail(f"{self.path} lacks {names}, and has no pip to install with: install them there, or set PYTHON=...")
        # One download fewer on a second try: pip keeps what it has fetched.
        installed, output = run_logged(f"installing {names} for {self.path}", command, "pip.log")
        if not installed and not optional:
            print(last_lines(output, 15))
            fail(f"pip could not install {names} (the reason is above): is there a network?")
        return installed

    def install_optional(self, target: Target) -> None:
        """Only into a virtual environment; where it cannot be done, that is said, and the tests skip what needs it."""
        missing = self.lacks([name for extra in target.optional for name in listed_in_pyproject(extra)])
        if missing and not (self.in_venv and self.has_pip and self.install(missing, optional=True)):
            say(f"without {' '.join(missing)}: what needs it is left out")


def make_venv(with_system_packages: bool) -> None:
    say(f"making {VENV.name}{', in which the packages of ' + sys.prefix + ' are seen' if with_system_packages else ''}")
    command = [sys.executable, "-m", "venv", "--clear", *(["--system-site-packages"] * with_system_packages), str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if made.returncode != 0:
        print(last_lines(made.stdout + made.stderr, 15))
        fail(
            f"{sys.executable} could not make a virtual environment (the reason is above): install what it lacks "
            "(Debian, Ubuntu: apt install python3-venv), or set PYTHON=... to an interpreter with torch and the tools"
        )


def venv_interpreter(base: Interpreter) -> Interpreter:
    """.venv's Python; it is made anew where it is missing, broken, or of no use with the torch that base has."""
    python = VENV / "bin" / "python"
    found = Interpreter.probe(python) if python.exists() else None
    if found is None or not found.has_pip or (base.torch and not found.torch):
        make_venv(with_system_packages=bool(base.torch))
        found = Interpreter.probe(python)
    if found is None:
        fail(f"{python} does not run: remove {VENV} and try again")
    return found


def choose_interpreter(target: Target, torch_requirement: str) -> Interpreter:
    """The interpreter to run the target with, after installing what it lacks."""
    base = Interpreter.probe(sys.executable)
    if base is None:
        fail(f"{sys.executable} does not run a small program: set PYTHON=...")
    if base.torch_error:
        say(f"the torch of {base.path} does not import and is left alone: {base.torch_error}")
    chosen = base
    missing = chosen.lacks(target.requirements())
    if (target.torch and not chosen.torch) or (missing and not chosen.in_venv):
        chosen = venv_interpreter(base)
        if target.torch and not chosen.torch:
            say("torch is a large download: this takes minutes, once")
            chosen.install(shlex.split(torch_requirement))
            chosen = Interpreter.probe(chosen.path) or chosen
            if not chosen.torch:
                fail(f"torch was installed for {chosen.path}, but does not import there: {chosen.torch_error}")
        missing = chosen.lacks(target.requirements())
    if missing:
        chosen.install(missing)
    chosen.install_optional(target)
    chosen = Interpreter.probe(chosen.path) or chosen  # with what is installed by now
    say(f"using {chosen.path}{f' with torch {chosen.torch}' if chosen.torch else ''}")
    return chosen


# Building and running


def check_compiler() -> None:
    """Says that there is none before anything large is downloaded."""
    sys.path.insert(0, str(ROOT))
    import setup

    setup.cxx_compiler()


def build(chosen: Interpreter) -> None:
    """Compiles what has changed. Nothing of it is shown unless it fails."""
    built, output = run_logged(
        "building kvcache_ext",
        [chosen.path, "setup.py", "build_ext", "--inplace"],
        "build.log",
        chosen.environment(),
    )
    if not built:
        print(last_lines(output, 60))
        fail("kvcache_ext could not be built (the reason is above)")
    info = runpy.run_path(str(ROOT / "kvcache_ext" / "_build_info.py"))
    kind = f"a CUDA build for {info['CUDA_ARCHITECTURES']}" if info["WITH_CUDA"] else "a CPU build"
    news = "nothing to build" if "ninja: no work to do" in output else "built"
    say(f"{news}: {kind}, as {info['REASON']}")


def run_programs(target: Target, arguments: list[str], chosen: Interpreter) -> int:
    """Runs them all, also after one has failed; the first exit code that is not 0."""
    environment = chosen.environment()
    parallel: list[str] = []
    if not chosen.lacks(["pytest-xdist"]) and not any(word.startswith("-n") or "xdist" in word for word in arguments):
        parallel = ["-n", "auto", "--dist", "worksteal"]  # a process a core (tests/conftest.py), of one thread each
    first_failure = 0
    for words in target.programs:
        command: list[str] = []
        for word in words:
            command += {"{args}": arguments, "{c++}": cxx_files(), "{parallel}": parallel}.get(word, [word])
        if parallel and "{parallel}" in words:
            environment.setdefault("OMP_NUM_THREADS", "1")
        shown = shlex.join(command)
        shown = shown if len(shown) <= 100 else f"{shown[:100]} ..."
        say(f"running {shown}")
        program = chosen.path if words[0] == "python" else shutil.which(words[0], path=environment["PATH"])
        if program is None:
            fail(f"{words[0]} is installed for {chosen.path}, but is not found as a program")
        command[0] = program
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code != 0:
            say(f"FAILED with exit code {code}: {shown}")
        first_failure = first_failure or code
    return first_failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("arguments", nargs="*", metavar="ARGS", help="for the target's program; after --")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs where there is no torch")
    options = parser.parse_args()
    target = TARGETS[options.target]
    code = 1
    try:
        if target.build:
            check_compiler()
        chosen = choose_interpreter(target, options.torch)
        if target.build:
            build(chosen)
        code = run_programs(target, options.arguments, chosen)
    except SystemExit as reason:
        print(f"make {options.target}: {reason.code}", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        code = 130
    verdict = "PASSED" if code == 0 else "INTERRUPTED" if code == 130 else f"FAILED (exit code {code})"
    print(f"make {options.target}: {verdict} after {time.monotonic() - STARTED:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
