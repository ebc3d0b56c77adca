"""The walls of CONTRIBUTING.md: short files, no import cycles, nobody uses another module's underscore names."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

LONGEST = 400
REASON = "longer than"  # at the head of a file that is
PACKAGE = ROOT / "kvcache_ext"
BUILT = ("_C", "_build_info")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "_build_info.py"
}


def test_files_are_short_or_say_why_not() -> None:
    """Those that ship. (Tests may be long: they are lists.)"""
    long = []
    for path in (*PACKAGE.rglob("*.py"), *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())):
        lines = path.read_text().splitlines()
        if len(lines) > LONGEST and REASON not in "\n".join(lines[:30]):
            long.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert long == []


def imports_of(name: str, path: Path) -> set[str]:
    """The package's modules that one imports, also for types alone or within a function."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names if alias.name not in BUILT]
            wanted = [full if full in MODULES else module for full in names]
        found |= {module for module in wanted if module in MODULES and module != name}
    return found


def test_no_import_cycles() -> None:
    TopologicalSorter({name: imports_of(name, path) for name, path in MODULES.items()}).prepare()


def test_underscore_names_stay_at_home() -> None:
    """Of this package. torch's and transformers' are used where they have no other."""
    own = {
        found
        for path in MODULES.values()
        for found in re.findall(r"(?:def |self\.|^)(_[a-z]\w*)", path.read_text(), re.MULTILINE)
        if not found.startswith("__")
    }
    strangers = []
    for name, path in MODULES.items():
        text = path.read_text()
        at_home = set(re.findall(r"(?:def |self\.|cls\.|^class |^)(_[a-z]\w*)", text, re.MULTILINE))
        for node in ast.walk(ast.parse(text)):
            used = []
            if isinstance(node, ast.Attribute):
                used = [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.level:
                used = [alias.name for alias in node.names]
            strangers += [
                f"{name}: {x}" for x in used if x in own and x not in at_home and x not in ("_C", "_build_info")
            ]
    assert strangers == []
