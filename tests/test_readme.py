"""The README's Python runs as it stands, and its commands print what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU, ROOT

from kvcache_ext.__main__ import main


def readme_blocks() -> list[str]:
    if torch.cuda.is_available() and not HAS_GPU:
        pytest.skip("a CPU build on a GPU machine: the README's code would ask for the GPU")
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a file
    blocks = readme_blocks()
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        if "transformers" not in block:
            exec(compile(block, "README.md", "exec"), names)
    plan = names["plan"]
    assert (plan.cache_bytes, plan.fits, plan.largest_max_positions) == (34359738368, True, 83850)  # type: ignore[attr-defined]
    cache = names["cache"]
    assert (len(cache), cache.position) == ((515, 592) if HAS_GPU else (512, 589))  # type: ignore[arg-type, attr-defined]
    assert names["keys"].shape == (3, 32, 128) and names["k16"].shape == (500, 32, 128)  # type: ignore[attr-defined]


def test_readme_code_for_transformers_runs() -> None:
    pytest.importorskip("kvcache_ext.integrations.transformers", exc_type=ImportError)
    (block,) = (block for block in readme_blocks() if "transformers" in block)
    names: dict[str, object] = {"torch": torch}
    exec(compile(block, "README.md", "exec"), names)
    assert names["tokens"].shape == (1, 48)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "docs/multi-gpu.md"])
def test_what_commands_print(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their first lines: a page may leave out the last."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    commands = [block for block in blocks if block.startswith("$ python -m kvcache_ext plan")]
    assert commands
    for block in commands:
        command, _, shown = block.partition("\n")
        assert main(command.split()[4:]) == 0
        assert capsys.readouterr().out.startswith(shown)


def test_plan_gpus_in_the_docs() -> None:
    page = (ROOT / "docs/multi-gpu.md").read_text()
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "plan_gpus(" in b)
    names: dict[str, object] = {}
    *code, last = block.splitlines()
    exec(compile("\n".join(code), "docs/multi-gpu.md", "exec"), names)
    expression, _, answer = last.partition("  # ")
    assert repr(eval(expression, names)) == answer
