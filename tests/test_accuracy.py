"""The figures of docs/accuracy.md can be taken: bench/accuracy.py runs, and its figures are as they should be."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("accuracy")


def test_accuracy(bench: ModuleType, device: torch.device, tmp_path: Path) -> None:
    bench.main(["--quick", "--device", str(device), "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())["measurements"]}
    for name, entry in entries.items():
        if name.startswith("accuracy/attention/"):
            assert entry["value"] <= bench.BOUND
            assert all(1e-5 < error < 2e-3 for peer, error in entry["peers"].items() if peer.startswith("FP16"))
        if name.endswith("/of_bound"):
            assert entry["value"] <= 1
    every = "accuracy/overflow/every/100000"
    assert entries[f"{every}/saturate/finite"]["value"] == 1 > entries[f"{every}/inf/finite"]["value"]
    assert entries[f"{every}/saturate/counted"]["value"] == entries[f"{every}/inf/counted"]["value"] > 0
    ours = entries.get("accuracy/storage/2x64/relative")
    if ours is not None:  # not without transformers
        assert ours["peers"]["FP32 DynamicCache"] < 1e-4 < ours["value"] < 1e-2
        assert ours["value"] < 1.1 * ours["peers"]["FP16-rounded DynamicCache"]

    tables = importlib.import_module("accuracy_tables")
    for part, table in tables.PARTS.items():
        its = {name: entry for name, entry in entries.items() if name.startswith(f"accuracy/{part}/")}
        head, rows = table(its)
        assert bool(rows) == bool(its)
        assert all(len(row) == len(head) for row in rows)


def test_accuracy_of_a_checkpoint(
    bench: ModuleType, device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("kvcache_ext.integrations.transformers", exc_type=ImportError)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    bench.main(["--model", str(tmp_path / "tiny"), "--lengths", "20", "30", "--device", str(device)])
    assert "storage/tiny/20/kl" in capsys.readouterr().out


def test_accuracy_of_a_text(bench: ModuleType, device: torch.device, tmp_path: Path) -> None:
    """The part `trained`, with a tiny random model in place of the trained one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("kvcache_ext.integrations.transformers", exc_type=ImportError)
    trained, common = importlib.import_module("accuracy_trained"), importlib.import_module("common")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    results = common.Results(device, tmp_path, "0000000")
    tokens = torch.randint(1, 100, (1, 300), device=device)
    with torch.no_grad():
        trained.measure("accuracy/trained/text", model, tokens, results, {"positions": 300})
        logits = model(tokens).logits[0].double().cpu()
    want = float(torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:].cpu()).exp())
    found = results.measurements
    perplexity = found["accuracy/trained/text/perplexity"]
    assert perplexity.peers["FP32 DynamicCache"] == pytest.approx(want, rel=1e-4)
    assert perplexity.value == pytest.approx(want, rel=1e-2) and perplexity.config["overflows"] == 0
    assert 0 < found["accuracy/trained/text/kl"].value < found["accuracy/trained/text/kl_max"].value < 1e-2
    results.save()
    (path,) = tmp_path.glob("*.json")
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())["measurements"]}
    head, rows = importlib.import_module("accuracy_tables").trained(entries)
    assert len(rows) == 3 and all(len(row) == len(head) for row in rows)
    assert {"python", "licence"} >= set(trained.texts())
