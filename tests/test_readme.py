"""README and docs: their Python runs, commands print what they show, links lead somewhere, and pages stay short.

The blocks of a page run one after the other in one namespace. A block that does not run here has a comment with the
reason on the line before it: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, ROOT

from kvcache_ext.__main__ import main

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md")))
ALL_PAGES = (*PAGES, *sorted((ROOT / "docs" / "results").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
MOST_README_WORDS = 1200  # beside code and tables
MOST_LINES = 300
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """What runs: where each block stands, and its code."""
    text = page.read_text()
    found = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code")) + 1
        if block["reason"] is None:
            found.append((f"{name_of(page)}:{line}", "\n" * (line - 1) + block["code"]))
    return found


def given(page: Path) -> dict[str, Any]:
    """What a page takes as there: docs/transformers.md a model and a text."""
    if page.name != "transformers.md":
        return {}
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=100)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.int64, device=device)}
    return {"model": LlamaForCausalLM(config).to(device), "inputs": inputs}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and not HAS_GPU:
        pytest.skip("a CPU build on a GPU machine: the code would ask for the GPU")
    monkeypatch.chdir(tmp_path)  # it saves files
    # Inductor takes half a minute to compile; what is traced is the same (test_compile.py runs Inductor).
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    has_transformers = importlib.util.find_spec("transformers") is not None
    if page.name == "transformers.md" and not has_transformers:
        pytest.skip("transformers is not installed")
    names = given(page)
    for place, code in blocks_of(page):
        if has_transformers or "transformers" not in code:
            exec(compile(code, place, "exec"), names)
    check = {"README.md": check_readme, "guide.md": check_guide}.get(page.name)
    if check is not None:
        check(names, has_transformers)


def check_readme(names: dict[str, Any], has_transformers: bool) -> None:
    assert names["answer"].shape == (1, 1, 32, 128) and names["answer"].dtype == torch.float32
    if has_transformers:
        assert names["tokens"].shape == (1, 48)


def check_guide(names: dict[str, Any], has_transformers: bool) -> None:
    """What comments on the page say."""
    plan = names["plan"]
    assert (plan.cache_bytes, plan.fits, plan.largest_max_positions) == (34359738368, True, 83850)
    assert names["cache"].memory_bytes() == 33554432
    assert names["keys"].shape == (3, 32, 128) and names["k16"].shape == (500, 32, 128)
    assert names["answer"].shape == (1, 1, 64, 128)
    if has_transformers:
        assert names["tokens"].shape == (1, 48)


def test_comments_of_the_guide() -> None:
    """The figures in comments within the page, at the places where they stand."""
    text = (ROOT / "docs" / "guide.md").read_text()
    for line, figure in (
        ("len(cache), cache.position", "(1024, 1100)"),
        ("batch.lengths()", "[28, 25, 19, 0]"),
    ):
        code = text.partition(line)[0]
        names: dict[str, Any] = {}
        blocks = re.findall(r"^```python\n(.*?)(?:^```|\Z)", code, re.MULTILINE | re.DOTALL)
        if torch.cuda.is_available() and not HAS_GPU:
            pytest.skip("a CPU build on a GPU machine")
        for block in blocks:
            exec(block, names)
        assert str(eval(line, names)) == figure
        assert figure in text.partition(line)[2].partition("\n")[0]


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/multi-gpu.md"])
def test_what_commands_print(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their first lines. Where a page leaves out the last, its block ends in a line of three dots."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    commands = [block for block in blocks if block.startswith("$ python -m kvcache_ext plan")]
    assert commands
    for block in commands:
        command, _, shown = block.partition("\n")
        assert main(command.split()[4:]) == 0
        printed, first = capsys.readouterr().out, shown.removesuffix("  ...\n")
        assert printed.startswith(first) and (printed == shown or first != shown)


def test_plan_gpus_in_the_docs() -> None:
    page = (ROOT / "docs/multi-gpu.md").read_text()
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "plan_gpus(" in b)
    names: dict[str, Any] = {}
    *code, last = block.splitlines()
    exec(compile("\n".join(code), "docs/multi-gpu.md", "exec"), names)
    expression, _, answer = last.partition("  # ")
    assert repr(eval(expression, names)) == answer


def prose_of(text: str) -> str:
    """Without code, tables and comments."""
    for what in (r"^```.*?^```", r"^\|.*$", r"<!--.*?-->"):
        text = re.sub(what, "", text, flags=re.MULTILINE if "|" in what else re.MULTILINE | re.DOTALL)
    return text


def test_readme_is_short() -> None:
    assert len(prose_of(README.read_text()).split()) <= MOST_README_WORDS


def test_readme_has_the_two_commands() -> None:
    assert "make bench " in README.read_text() and "make test " in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= MOST_LINES


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"https?:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            wrong.append(link)
    assert wrong == []
