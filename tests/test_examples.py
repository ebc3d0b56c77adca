"""The examples run, at small sizes, and do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from kvcache_ext import StreamingKVCacheFp16


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def transformers_or_skip() -> ModuleType:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("kvcache_ext.integrations.transformers", exc_type=ImportError)
    return transformers


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_minimal_llama(device: torch.device, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("minimal_llama")
    sizes = ["--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--batch", "2", "--prompt", "20"]
    tokens = module.main([*sizes, "--tokens", "6", "--dtype", dtype, "--device", str(device)])
    assert tokens.shape == (2, 26)
    assert "tok/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("minimal_llama", ["--tokens", "0"]),
        ("minimal_llama", ["--heads", "0"]),
        ("minimal_llama", ["--hidden", "100", "--heads", "3"]),
        ("generate", ["--tokens", "0"]),
        ("generate", ["--max-positions", "0"]),
        ("long_context", ["--tokens", "0"]),
        ("long_context", ["--prompt-tokens", "0"]),
    ],
)
def test_arguments_that_cannot_be(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if name != "minimal_llama":
        transformers_or_skip()
    with pytest.raises(SystemExit):
        example(name).main(arguments)
    assert "must be at least 1" in capsys.readouterr().err


def test_minimal_llama_decodes_what_it_prefills(device: torch.device) -> None:
    """Each token it generates, step by step, is what all the tokens before it give in one go, or nearly."""
    module = example("minimal_llama")
    config = module.Config(vocabulary=100, layers=2, hidden=64, heads=4, kv_heads=2)
    model = module.Llama(config).to(device).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # a model that does not repeat itself
    cache = StreamingKVCacheFp16(2, 64, 2, 16, batch_size=2, device=device)
    prompt = torch.randint(100, (2, 20), device=device)
    tokens = module.generate(model, cache, prompt, 16, chunk=7)
    assert len(tokens[:, 20:].unique()) > 5
    for length in range(20, 36):
        cache.clear()
        with torch.no_grad():
            logits = model(tokens[:, :length], cache)
        chosen = logits.gather(1, tokens[:, length : length + 1])[:, 0]
        assert bool((logits.amax(1) - chosen < 1e-2 * logits.std()).all())


def test_generate(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    transformers_or_skip()
    answers = example("generate").main(["--tokens", "12", "--prompt-tokens", "20", "--device", str(device)])
    assert answers["Fp16Cache"].shape == answers["DynamicCache"].shape == (1, 32)
    out = capsys.readouterr().out
    assert "of 12 tokens are DynamicCache's" in out and "Fp16Cache" in out


def test_generate_with_a_checkpoint(device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = transformers_or_skip()
    tokenizers = pytest.importorskip("tokenizers")
    module = example("generate")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    module.random_model(len(words)).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--prompt", "a b c", "--tokens", "9", "--no-comparison"]
    answers = module.main([*arguments, "--dtype", "float16", "--device", str(device)])
    assert list(answers) == ["Fp16Cache"] and answers["Fp16Cache"].shape == (1, 12)
    assert "a b c" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["positions", "heads", "layers", "one process"])
def test_long_context(way: str) -> None:
    """As a user starts it: two processes, and one without torchrun."""
    transformers_or_skip()
    if way == "heads":
        pytest.importorskip("accelerate")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if way != "one process" else []
    arguments = ["--way", way] if torchrun else []
    arguments += ["--prompt-tokens", "100", "--tokens", "8", "--timeout", "60"]
    command = [sys.executable, *torchrun, str(ROOT / "examples" / "long_context.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "OK: the first 8 of 8 tokens behind a short text are those of one process"
    assert "tok/s" in lines[-2]
    held = sorted(line for line in lines if line.startswith("process "))
    assert len(held) == (2 if way in ("positions", "heads") else 1)
    whole = "keys and values 0.22 MB" if way in ("layers", "one process") else "keys and values 0.11 MB"
    assert all(whole in line for line in held)
