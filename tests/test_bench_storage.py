"""The benchmark of save and load, at a small size: it runs, cleans up, and its figures have their names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import bench_storage


def test_it_runs_in_small(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, figures = tmp_path / "files", tmp_path / "results"
    options = ["--quick", "--layers", "1", "--positions", "300", "--heads", "2", "--head-dim", "8", "--batch", "2"]
    where = ["--device", str(device), "--folder", str(files), "--results", str(figures)]
    monkeypatch.setattr(sys, "argv", ["bench_storage.py", *options, *where])
    bench_storage.main()
    (path,) = figures.iterdir()
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())["measurements"]}
    ceilings = ["disk_read", "disk_write"] + (["bus_to_gpu", "bus_to_host"] if device.type == "cuda" else [])
    names = ["host_memory/load", "host_memory/save", "load", "load/page_cache", "save"]
    assert sorted(entries) == sorted(f"storage/{name}" for name in [*names, *(f"ceiling/{name}" for name in ceilings)])
    for op in ("save", "load"):
        assert set(entries[f"storage/{op}"]["peers"]) == {f"torch.{op}"} and entries[f"storage/{op}"]["ceiling"] > 0
        assert entries[f"storage/{op}"]["config"]["bytes"] == 2 * 300 * 2 * 8 * 2 * 2
    assert list(files.iterdir()) == []
