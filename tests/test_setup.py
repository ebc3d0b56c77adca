"""setup.py and pyproject.toml: GPU architectures, the oldest torch, what a source distribution and a wheel hold."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import kvcache_ext

spec = importlib.util.spec_from_file_location("kvcache_ext_setup", ROOT / "setup.py")
assert spec is not None and spec.loader is not None
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        ("75 80 86 87 88 89 90 100 110 103 120 121", "8.0;8.6;8.9;9.0a;10.0;11.0;12.0+PTX"),  # CUDA 13.0
        ("50 60 70 75 80 86 89 90 100 101 120", "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"),  # 12.8
        ("50 60 70 75 80 86 87 89 90", "8.0;8.6;8.9+PTX;9.0a"),  # 12.4: PTX of 9.0a would run on no newer GPU
        ("70", ""),
    ],
)
def test_default_architectures(known: str, kept: str) -> None:
    assert setup.architectures_of([f"compute_{number}" for number in known.split()]) == kept


@pytest.mark.parametrize(
    ("given", "built", "sm90a"),
    [
        ("9.0", "9.0a", True),
        ("8.0 9.0;12.0+PTX", "8.0;9.0a;12.0+PTX", True),
        ("9.0;9.0a", "9.0a", True),
        ("9.0a+PTX", "9.0a+PTX", True),
        ("8.0;9.0+PTX", "8.0;9.0+PTX", False),
        ("9.0a;9.0+PTX", "9.0a;9.0+PTX", False),
        ("Hopper", "Hopper", False),
        ("8.9;10.0", "8.9;10.0", False),
        ("native", "native", False),
    ],
)
def test_sm90a_takes_the_place_of_9_0(given: str, built: str, sm90a: bool) -> None:
    assert setup.with_sm90a(given) == built
    assert setup.has_sm90a(built) is sm90a


NEW_ENOUGH = ("2.11.0", "2.11.0+cu130", "2.13.0+cpu", "2.14.0a0+git1234567", "3.0.0", str(torch.__version__))


@pytest.mark.parametrize("version", NEW_ENOUGH)
def test_torch_that_is_new_enough(version: str) -> None:
    setup.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1"])
def test_an_older_torch_is_refused_in_a_sentence(version: str) -> None:
    sentence = rf"needs torch 2\.11 or newer, and .* has torch {re.escape(version)}: pip install"
    with pytest.raises(SystemExit, match=sentence):
        setup.check_torch(version)


def test_the_oldest_torch_stands_in_the_readme() -> None:
    oldest = ".".join(map(str, setup.OLDEST_TORCH))
    assert f"| torch | {oldest} or newer" in (ROOT / "README.md").read_text()


def pyproject(key: str) -> str:
    """The value of a line of pyproject.toml, as it stands. (Python 3.10 has no reader of TOML.)"""
    found = re.search(rf"^{re.escape(key)} = (.*?)(?: #.*)?$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None, key
    return found[1]


def test_metadata() -> None:
    assert ast.literal_eval(pyproject("version")) == kvcache_ext.__version__
    assert ast.literal_eval(pyproject("requires-python")) == ">=3.10"
    assert (
        f"| Python | {ast.literal_eval(pyproject('requires-python')).removeprefix('>=')} or newer |"
        in (ROOT / "README.md").read_text()
    )
    assert ast.literal_eval(pyproject("dependencies")) == []  # torch among them would let pip replace the one in use


def test_the_transformers_extra_is_what_the_package_accepts() -> None:
    pytest.importorskip("kvcache_ext.integrations.transformers", exc_type=ImportError)
    from kvcache_ext.integrations.transformers import version

    oldest, (major, minor) = version.OLDEST, version.NEWEST
    wanted = f"transformers>={oldest[0]}.{oldest[1]},<{major}.{minor + 1}"
    assert ast.literal_eval(pyproject("transformers")) == [wanted]
    assert f"{oldest[0]}.{oldest[1]} to {major}.{minor} |" in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a source distribution, from a copy of what git or the folder has, by the build backend."""
    source, out = tmp_path_factory.mktemp("source") / "kvcache_ext", tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", ".*_cache", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=left_out)
    (source / "kvcache_ext" / "_build_info.py").write_text("# of a build\n")
    (source / "tests" / "leftover.pyc").write_text("")
    code = f"import sys; sys.path.insert(0, '_build'); import backend; backend.build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}


def test_sdist_has_what_a_build_and_the_makefile_need(sdist: set[str]) -> None:
    names = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "README.md", "mkdocs.yml", "PKG-INFO")
    wanted = {ROOT / name for name in names if name != "PKG-INFO"}
    for folder in ("_build", "kvcache_ext", "csrc", "tests", "tools", "bench", "docs", "examples"):
        wanted |= {path for path in (ROOT / folder).rglob("*") if path.is_file()}
    relative = {path.relative_to(ROOT).as_posix() for path in wanted}
    relative = {name for name in relative if "__pycache__" not in name and not name.endswith((".so", ".pyc"))}
    assert relative - sdist - {"kvcache_ext/_build_info.py"} == set()


def test_sdist_has_nothing_that_was_built(sdist: set[str]) -> None:
    assert [name for name in sdist if re.search(r"_build_info|\.so$|\.pyc$|^build/", name)] == []


def test_wheel_would_hold_the_package_alone() -> None:
    """What setuptools finds as packages: neither tests nor benchmarks. (Building a wheel takes minutes.)"""
    from setuptools import find_packages

    found = find_packages(str(ROOT), include=ast.literal_eval(pyproject("include")))
    folders = {path.parent for path in (ROOT / "kvcache_ext").rglob("__init__.py")}
    assert set(found) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert Path(ROOT, "kvcache_ext", "py.typed").is_file()
