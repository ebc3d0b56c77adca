"""The GPU architectures that setup.py builds for."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import ROOT

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
