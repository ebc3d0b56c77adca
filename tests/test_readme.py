"""The README's Python runs as it stands."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import HAS_GPU, ROOT


def test_readme_code_runs() -> None:
    if torch.cuda.is_available() and not HAS_GPU:
        pytest.skip("a CPU build on a GPU machine: the README's code would ask for the GPU")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    cache = names["cache"]
    assert (len(cache), cache.position) == ((515, 592) if HAS_GPU else (512, 589))  # type: ignore[arg-type, attr-defined]
    assert names["keys"].shape == (3, 32, 128) and names["k16"].shape == (500, 32, 128)  # type: ignore[attr-defined]
