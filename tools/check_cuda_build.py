"""Builds the whole CUDA extension in a temporary folder and imports it, with or without a GPU.

The CUDA binding includes torch's device-generic headers only, so that it compiles against a CPU build of torch as well:
a machine with nvcc and neither a GPU nor a CUDA build of torch sees every line that a GPU machine will compile. One
architecture is enough here; tools/check_kernels.py compiles the kernels for all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = "9.0a"
LOG = ROOT / "build" / "check_cuda_build.log"

# Run in the folder of the built package. The CPU's ops go through the same module as the GPU's.
TRY = """
import torch, kvcache_ext
from kvcache_ext._extension import extension
assert extension.with_cuda is True and kvcache_ext.build_info.with_cuda, kvcache_ext.build_info
cache = kvcache_ext.StreamingKVCacheFp16(2, 8, 3, 5, device="cpu")
keys, values = torch.randn(2, 11, 3, 5)
cache.append(1, keys, values)
for given, read in zip((keys, values), cache.get_valid_f32(1)):
    assert torch.equal(read, given[-8:].half().float())
print(f"with_cuda is True with torch {torch.__version__}, and the CPU's append and gather are right")
"""


def main() -> int:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    def fail(output: str, sentence: str) -> int:
        print(output.rstrip())
        print(f"check-cuda-build: {sentence}")
        return 1

    environment = {"TORCH_CUDA_ARCH_LIST": ARCHITECTURE, **os.environ, "KVCACHE_EXT_CUDA": "1"}
    with tempfile.TemporaryDirectory() as folder:
        say(f"building for {environment['TORCH_CUDA_ARCH_LIST']} (log: {LOG.relative_to(ROOT)})")
        command = [sys.executable, "setup.py", "build", "--build-base", folder]
        LOG.parent.mkdir(exist_ok=True)
        with LOG.open("w") as log:
            built = subprocess.run(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        output = LOG.read_text(errors="replace")
        if built.returncode != 0:
            return fail("\n".join(output.splitlines()[-60:]), "the CUDA extension does not build")
        warnings = sorted(set(re.findall(r"^\S*csrc/.*\bwarning\b.*$", output, re.MULTILINE)))
        if warnings:
            return fail("\n".join(warnings), f"{len(warnings)} compiler warning(s)")
        say("built without a warning")
        library = next(Path(folder).glob("lib*"))
        environment["PYTHONPATH"] = str(library)
        tried = subprocess.run(
            [sys.executable, "-c", TRY], cwd=library, env=environment, capture_output=True, text=True
        )
        if tried.returncode != 0:
            return fail(tried.stdout + tried.stderr, "the CUDA extension was built, but does not work")
        say(tried.stdout.strip())
    print("check-cuda-build: no problem found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
