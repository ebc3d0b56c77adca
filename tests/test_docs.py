"""The docstrings that `make docs` makes pages of describe what is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
OBJECTS = [name for page in API_PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def found(name: str) -> tuple[Path, ast.AST]:
    """Where a module, class or function stands, and its definition."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:end])
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if path.is_file():
            node: ast.AST = ast.parse(path.read_text())
            for part in parts[end:]:
                node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part)
            return path, node
    raise AssertionError(f"{name} is not there")


def functions_of(node: ast.AST) -> Iterator[ast.FunctionDef]:
    if isinstance(node, ast.FunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield from functions_of(child)


def described(docstring: str) -> list[str]:
    """The names that the section Args has a description of."""
    section = re.search(r"^( *)Args:\n((?:\1 +.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if section is None:
        return []
    depth = len(section[1]) + 4
    names = re.findall(rf"^ {{{depth}}}(\w[\w, *]*):", section[2], re.MULTILINE)
    return [name.strip(" *") for line in names for name in line.split(",")]


@pytest.mark.parametrize("name", OBJECTS)
def test_described_arguments_are_there(name: str) -> None:
    path, node = found(name)
    wrong = []
    for function in functions_of(node):
        arguments = function.args
        there = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        docstring = ast.get_docstring(function) or ""
        wrong += [f"{path.name}: {function.name}: {name}" for name in described(docstring) if name not in there]
    assert wrong == []


def test_the_class_describes_its_constructor() -> None:
    _, node = found("kvcache_ext.cache.StreamingKVCacheFp16")
    assert isinstance(node, ast.ClassDef)
    init = next(function for function in functions_of(node) if function.name == "__init__")
    there = [a.arg for a in (*init.args.args, *init.args.kwonlyargs)]
    assert described(ast.get_docstring(node) or "") == there[1:]


def test_every_public_method_is_described() -> None:
    missing = []
    for name in OBJECTS:
        _, node = found(name)
        for function in functions_of(node):
            if not function.name.startswith("_") and not ast.get_docstring(function):
                missing.append(f"{name}: {function.name}")
    assert missing == []
