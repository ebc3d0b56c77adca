"""The benchmark of prompts, at small sizes: it runs, its figures have their names, and what fails is left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "bench"))

import bench_prompt
import sdpa_peers

from kvcache_ext import StreamingKVCacheFp16


def figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, *options: str
) -> dict[str, dict[str, Any]]:
    words = ["bench_prompt.py", "--quick", "--device", str(device), "--results", str(folder), *options]
    monkeypatch.setattr(sys, "argv", words)
    assert bench_prompt.main() == 0
    (path,) = folder.iterdir()
    return {entry["name"]: entry for entry in json.loads(path.read_text())["measurements"]}


def test_it_runs_in_small(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prompt, "SHAPES", {"mha32": (4, 4), "gqa32x8": (4, 1)})
    entries = figures(tmp_path, monkeypatch, device)
    rows = [name for name in entries if name.startswith("prompt/")]
    sizes = ["24x24", "16x40", "16x40/window8", "8x40/ragged8"]
    wanted = [f"{shape}/{size}/{kind}" for shape in ("mha32", "gqa32x8") for size in sizes for kind in KINDS]
    wanted += [f"mha32/{size}/bf16-exact" for size in sizes]
    wanted += [f"{name}/append" for name in wanted if "/24x24/" in name and "exact" not in name]
    wanted += [
        f"{name}/append" for name in wanted if "/16x40/" in name and "window" not in name and "exact" not in name
    ]
    if bench_prompt.runs_sm90_code(device):
        wanted += [f"mha32/{size}/{kind}/portable" for size in sizes[:2] for kind in ("fp32", "fp16")]
    assert sorted(rows) == sorted(f"prompt/{name}" for name in wanted)
    assert all(entries[name]["value"] > 0 and entries[name]["ceiling"] > 0 for name in rows)
    if device.type == "cpu":
        assert all(entries[name]["peers"] for name in rows)
        assert list(entries["prompt/mha32/16x40/fp32"]["peers"]) == ["SDPA FP32", "to FP32, SDPA"]
    # Every query sees itself and what is before it: 24 + 23 + ...; with a window of 8, 8 each.
    assert entries["prompt/mha32/24x24/fp32"]["config"]["flop"] == 4 * 128 * 4 * 300
    assert entries["prompt/mha32/16x40/window8/fp32"]["config"]["flop"] == 4 * 128 * 4 * 16 * 8
    ragged = entries["prompt/mha32/8x40/ragged8/fp32"]["config"]
    assert ragged["lengths"][0] == 12 and ragged["lengths"][-1] == 40


KINDS = ("fp32", "fp16", "bf16")


def test_few_queries(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = figures(tmp_path, monkeypatch, device, "--crossover", "--only", "few/g4")
    names = [f"prompt/few/g4/{t}x64/{kind}" for t in (2, 17) for kind in ("fp32", "bf16")]
    assert sorted(name for name in entries if name.startswith("prompt/")) == sorted(names)
    for name in names:
        assert entries[name]["unit"] == "us" and entries[name]["value"] > 0 and entries[name]["ceiling"] > 0


def test_a_peer_that_answers_something_else_is_left_out(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sdpa_peers.Attention, "attend", lambda _, query: torch.zeros_like(query))
    entries = figures(tmp_path, monkeypatch, device, "--only", "gqa32x8/24x24/fp32")
    assert entries["prompt/gqa32x8/24x24/fp32"]["peers"] == {}
    assert "is left out: ValueError: its answer differs from ours by 1" in capsys.readouterr().out


def test_a_row_that_fails_is_named(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(StreamingKVCacheFp16, "append_attend", broken)
    words = ["--quick", "--device", str(device), "--results", str(tmp_path), "--only", "gqa32x8/16x40/fp"]
    monkeypatch.setattr(sys, "argv", ["bench_prompt.py", *words])
    assert bench_prompt.main() == 1
    printed = capsys.readouterr().out
    assert "no such kernel" in printed and printed.count("prompt/gqa32x8/16x40/fp32/append") == 2
    (path,) = tmp_path.iterdir()
    names = {entry["name"] for entry in json.loads(path.read_text())["measurements"]}
    assert {"prompt/gqa32x8/16x40/fp32", "prompt/gqa32x8/16x40/fp16"} <= names


@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("queries", [1, 5, 20])
def test_the_mask_is_that_of_attend(queries: int, window: int | None, device: torch.device) -> None:
    cache = StreamingKVCacheFp16(1, 20, 2, 64, device=device)
    keys, values = (torch.randn(20, 2, 64, device=device) for _ in range(2))
    cache.append(0, keys, values)
    query = torch.randn(1, queries, 4, 64, device=device)
    want = cache.attend(0, query, window=window)
    assert isinstance(want, Tensor)
    stored = (x[0].transpose(1, 2).float() for x in (cache.k_cache, cache.v_cache))
    attention = sdpa_peers.Attention.prepared(None, query.transpose(1, 2), *stored, window=window)
    torch.testing.assert_close(attention().transpose(1, 2), want, rtol=1e-3, atol=1e-3)
