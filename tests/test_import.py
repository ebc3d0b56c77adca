"""What importing the package costs beside torch."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import NOTES, ROOT

PROGRAM = """
import sys, time
import torch
before, begin = set(sys.modules), time.perf_counter()
import kvcache_ext
print(1e3 * (time.perf_counter() - begin), *sorted(set(sys.modules) - before))
"""


def test_importing_imports_little() -> None:
    """No compiler, no numpy, no transformers: those take up to seconds, and come when they are needed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    milliseconds, *modules = done.stdout.split()
    others = {name.partition(".")[0] for name in modules}
    assert "kvcache_ext" in others and not others & {"numpy", "transformers", "safetensors", "tqdm"}
    assert not [name for name in modules if name.startswith("torch.")], "parts of torch that `import torch` leaves out"
    NOTES.append(f"import kvcache_ext, beside torch: {float(milliseconds):.0f} ms, {len(modules)} modules")
