"""The model that the benchmarks decode with, at small sizes: weights in few bits, caches, the figures' names."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("kvcache_ext.integrations.transformers", exc_type=ImportError)
sys.path.insert(0, str(ROOT / "bench"))

import bench_first_token
import bench_generate
import charts
import gpu015_model
import llama
import llama_prompt
from common import Results

POSITIONS = 128
SHAPE = llama.LlamaShape("small", 2, 128, 4, 2, 32, 256, 96)


@pytest.mark.parametrize("linear", [llama.Int8Linear, llama.Int4Linear])
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_in_few_bits_multiply_as_they_should(
    linear: type[llama.Int8Linear], rows: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256, device=device) * 0.02
    dtype = torch.bfloat16
    try:
        layer = linear(weight, dtype)
        answer = layer(torch.eye(256, dtype=dtype, device=device)[:rows][None])
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no kernel for it: {error}")
    assert answer.shape == (1, rows, 64)
    # Each weight off by half a step at most, of 15 or 254 over the range, and rounded to BF16 twice.
    step = (weight.amax() - weight.amin()) / (15 if linear is llama.Int4Linear else 254)
    assert (answer[0].float() - weight[:, :rows].t()).abs().max() <= 0.5 * step + 2**-7 * weight.abs().max()


def test_every_weight_is_made_once_and_counted(device: torch.device) -> None:
    model = llama.make_model(SHAPE, "fp32", POSITIONS, device)
    assert all(p.device.type == device.type and bool(p.isfinite().all()) for p in model.parameters())
    assert llama.weight_bytes(model) - llama.weight_bytes_read(model) == (SHAPE.vocabulary - 1) * SHAPE.hidden * 4
    assert len(llama.linears(model)) == 7 * SHAPE.layers + 1


HYBRID = replace(SHAPE, attention_every=2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [SHAPE, HYBRID], ids=["llama", "hybrid"])
def test_options_start_at_the_same_length_and_give_finite_logits(
    device: torch.device, shape: llama.LlamaShape, batch: int
) -> None:
    model = llama.make_model(shape, "fp32", POSITIONS, device)
    held = POSITIONS - llama.RESERVE
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    for key in ("graph", "eager", "static", "dynamic"):
        option = llama.OPTIONS[key]
        with torch.no_grad():
            cache = option.prepare(model, shape, held, POSITIONS, batch)
            assert int(cache.get_seq_length()) == held
            logits = option.step(model, cache)(token)
        assert int(cache.get_seq_length()) == held + 1
        assert logits.shape == (batch, 1, SHAPE.vocabulary) and bool(logits.isfinite().all())


def test_one_failing_option_leaves_the_others(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: object) -> object:
        raise torch.OutOfMemoryError("none left")

    option = llama.Option("DynamicCache, eager", no_memory, llama.OPTIONS["dynamic"].step)
    monkeypatch.setitem(llama.OPTIONS, "dynamic", option)
    chosen = [
        "--models",
        "7b",
        "--weights",
        "fp32",
        "--positions",
        str(POSITIONS),
        "--layers",
        "1",
        "--options",
        "eager,static,dynamic",
    ]
    words = ["bench_generate.py", "--quick", "--results", str(tmp_path), "--device", str(device), *chosen]
    gpu = device.type == "cuda"
    monkeypatch.setattr(sys, "argv", [*words, "--profile"] if gpu else words)
    monkeypatch.setitem(bench_generate.MODELS, "7b", SHAPE)
    monkeypatch.setattr(bench_generate, "TINY", SHAPE)
    assert bench_generate.main() == 0
    printed = capsys.readouterr().out
    assert "DynamicCache, eager: does not fit into memory: left out" in printed
    assert ("kvc::" in printed) == gpu  # our kernels, where kernels are shown
    (path,) = tmp_path.glob("*.json")
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())["measurements"]}
    entry = entries[f"generate/small-1-layers/fp32/{POSITIONS}"]
    assert entry["value"] > 0 and entry["ceiling"] > 0 and list(entry["peers"]) == ["StaticCache, eager"]
    assert list(entry["config"]["ours"]) == ["ours, eager"]
    assert entries[f"generate/small-1-layers/fp32/{POSITIONS}/eager"]["value"] == entry["value"]
    parts = [entries[f"generate/step/small-1-layers/fp32/{POSITIONS}/{part}"] for part in ("weights", "append_attend")]
    assert all(part["value"] > 0 and part["ceiling"] > 0 for part in parts)


def test_cases_of_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["bench_generate.py", *words])
        args = bench_generate.arguments()
        cases = [bench_generate.cases_of(model, args, gpu=True) for model in args.models]
        return [case.name for by_kind in cases for found in by_kind.values() for case in found]

    assert "7b/fp16/65536" in names() and "8b/bf16/131072" in names() and "8b/fp16/b16/8192" in names()
    assert names("--models", "8b", "--weights", "bf16", "--positions", "4096", "--batch", "2") == ["8b/bf16/b2/4096"]


def test_kernels_are_a_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", "--device", "cpu", "--profile"])
    assert bench_generate.main() == 2
    assert "the kernels of a GPU" in capsys.readouterr().out


def test_gpu015_with_a_full_cache(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEVEN_B", "TINY"):
        monkeypatch.setattr(gpu015_model, name, SHAPE)
    for name in ("POSITIONS", "CPU_POSITIONS"):
        monkeypatch.setattr(gpu015_model, name, POSITIONS)
    results = Results(device, None)
    lines = gpu015_model.run(device, results, 1e12, False, ["fp32"], False)
    assert not [line for line in lines if line.passed is False]
    assert lines[0].name.startswith("tokens a second, fp32")
    names = {name.removeprefix("gpu015/small/fp32/") for name in results.measurements}
    assert {"decode", "step/weights", "step/append_attend", "step/rest", "prefill"} <= names
    assert list(results.measurements["gpu015/small/fp32/prefill"].peers) == ["DynamicCache"]


def test_first_tokens(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [bench_first_token.Case(SHAPE, kind, 40, chunk, 1) for kind in ("fp32", "bf16") for chunk in (None, 16)]
    monkeypatch.setattr(bench_first_token, "cases", lambda *_: chosen)
    words = ["bench_first_token.py", "--quick", "--device", str(device), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "fp32,first_token"])
    assert bench_first_token.main() == 0
    (path,) = tmp_path.glob("*.json")
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())["measurements"]}
    names = ["first_token/small/bf16/40", "first_token/small/fp32/40", "gpu015/small/fp32/prefill"]
    assert sorted(name for name in entries if not name.startswith("ceiling/")) == names
    for name in names:
        assert entries[name]["value"] > 0 and entries[name]["ceiling"] > 0
        assert list(entries[name]["peers"]) == ["DynamicCache"]


def test_a_prompt_is_read_whole_and_in_chunks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: object) -> object:
        raise torch.OutOfMemoryError("none left")

    model = llama.make_model(SHAPE, "fp32", POSITIONS, device)
    cache = llama.our_cache(model, 40)
    for chunk in (40, 16):
        assert llama_prompt.read_prompt_ours(model, cache, 40, chunk, 2, device).seconds > 0
        assert int(cache.get_seq_length()) == 40
    assert llama_prompt.read_prompt_dynamic(model, 40, 16, 1, device) is not None
    monkeypatch.setattr(llama_prompt, "read_prompt", no_memory)
    assert llama_prompt.read_prompt_dynamic(model, 40, 16, 1, device) is None
    assert "DynamicCache, a prompt of 40 tokens: left out: does not fit into memory" in capsys.readouterr().out
    assert model.config._attn_implementation == "kvcache_ext"  # as our cache left it


def test_tuned_figures_are_kept_apart(device: torch.device) -> None:
    results = Results(device, None)
    speeds = {"graph": 50.0, "graph-compiled": 60.0, "graph-tuned": 70.0, "static-compiled": 40.0, "static": 30.0}
    figures = {key: bench_generate.Figure(speed, 10**9) for key, speed in speeds.items()}
    for tuned in (False, True):
        case = bench_generate.Case(SHAPE, "fp16", POSITIONS)
        bench_generate.record(results, case, figures, tuned, 10**6, 10.0**9)
    found = results.measurements
    plain, tuned_ours = found[f"generate/small/fp16/{POSITIONS}"], found[f"generate/small/fp16/{POSITIONS}/tuned"]
    assert plain.value == 60 and plain.config["option"] == bench_generate.OPTIONS["graph-compiled"].name
    assert plain.speedups == {"StaticCache, compiled": 1.5, "StaticCache, eager": 2.0}
    assert found[f"generate/small/fp16/{POSITIONS}/graph"].value == 50  # and each way by itself
    assert found[f"generate/small/fp16/{POSITIONS}/compiled"].value == 60
    assert tuned_ours.value == 70 and tuned_ours.peers == {} and len(tuned_ours.config["ours"]) == 1


def test_without_transformers_a_sentence_says_so(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    (line,) = gpu015_model.run(device, Results(device, None), None, True, ["fp16"], False)
    assert line.passed is None and line.figure == "not measured"
    assert "no model is run" in capsys.readouterr().out


def test_the_chart_is_drawn_from_results_and_only_from_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"device": "a device", "measurements": []}))
    assert charts.draw_generate(path, tmp_path) is None
    entries = [
        {
            "name": f"generate/7b/{kind}/{positions}",
            "value": 9e5 / positions,
            "ceiling": 1e6 / positions,
            "peers": {"StaticCache, compiled": 5e5 / positions} if kind == "fp16" else {},
        }
        for kind in ("fp16", "w4")
        for positions in (4_096, 65_536)
    ]
    path.write_text(json.dumps({"device": "a device", "measurements": entries}))
    drawn = charts.draw_generate(path, tmp_path)
    assert drawn == tmp_path / "generate-device.svg" and drawn.is_file()
