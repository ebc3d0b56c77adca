"""What each of several GPUs takes: `plan_gpus`, and `python -m kvcache_ext plan --gpus`.

Bytes of the 7B model (32 layers, 32 heads, head_dim 128): a position takes 32 * 32 * 128 * 2 tensors * 2 bytes =
524,288 bytes, so that 65,536 positions take 34,359,738,368.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache_ext import memory, planning
from kvcache_ext.__main__ import main
from kvcache_ext.memory import LayerShape
from kvcache_ext.multi_gpu import GpusPlan, plan_gpus, plan_model_on_gpus

GB = 10**9
SHAPE = ["--layers", "32", "--heads", "32", "--head-dim", "128", "--positions", "65536"]
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 65536}
POSITION = 524_288  # bytes, of the 7B model
# Beside keys and values: lengths and counters, (3 + 1) int64 a layer; the workspace of any GPU, 1,024 + 4 numbers and
# 128 * 192 partials of 130, FP32; what the allocator rounds up.
WORKSPACE = (1028 + 128 * 192 * 130) * 4
BESIDE = 32 * 4 * 8 + WORKSPACE + 24 * 2**20
WAYS = ("one_gpu", "by_layers", "by_heads", "by_positions")


def of_7b(**changed: Any) -> GpusPlan:
    arguments: dict[str, Any] = {"gpus": 2, "gpu_bytes": 24 * GB, "weights_bytes": 4 * GB}
    return plan_gpus(32, 65_536, 32, 128, **arguments | changed)


def test_the_7b_model_on_two_gpus() -> None:
    plan = of_7b()
    assert plan.one_gpu.cache_bytes == 34_359_738_368
    for name in ("by_layers", "by_heads", "by_positions"):
        assert getattr(plan, name).cache_bytes == 17_179_869_184
    assert [getattr(plan, name).weights_bytes for name in WAYS] == [4 * GB, 2 * GB, 2 * GB, 4 * GB]
    assert [getattr(plan, name).beside_bytes for name in WAYS] == [
        BESIDE,
        BESIDE - 16 * 4 * 8,  # 16 layers' lengths and counters
        BESIDE,
        BESIDE + 32_000_000,  # the exchange
    ]
    assert plan.by_heads.total_bytes == 2 * GB + 17_179_869_184 + BESIDE
    assert [getattr(plan, name).fits for name in WAYS] == [False, True, True, True]
    assert [getattr(plan, name).why_not for name in WAYS] == [None] * 4
    assert plan.best is plan.by_heads
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.gpus = 3  # type: ignore[misc]


def test_the_largest_max_positions() -> None:
    """A GPU has room for (24 GB - its weights - what is beside the cache) / (bytes of a position on it)."""
    plan = of_7b()
    assert plan.one_gpu.largest_max_positions == (20 * GB - BESIDE) // POSITION
    assert plan.by_heads.largest_max_positions == (22 * GB - BESIDE) // (POSITION // 2)
    assert plan.by_layers.largest_max_positions == (22 * GB - BESIDE + 512) // (POSITION // 2)
    # Every GPU has a slot for every second position, so the number is even.
    assert plan.by_positions.largest_max_positions == (20 * GB - BESIDE - 32_000_000) // POSITION * 2


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gpus", [2, 4])
def test_the_largest_that_is_named_fits_and_one_more_does_not(name: str, batch: int, gpus: int) -> None:
    arguments: dict[str, Any] = {"gpus": gpus, "gpu_bytes": 2 * GB, "batch_size": batch, "weights_bytes": 10**8}
    most = getattr(plan_gpus(5, 1000, 8, 64, **arguments), name).largest_max_positions
    assert most > 1000
    for positions, fits in ((most, True), (most + 1, False)):
        assert getattr(plan_gpus(5, positions, 8, 64, **arguments), name).fits is fits


def test_sequences_and_several_gpus() -> None:
    plan = of_7b(gpus=4, batch_size=2)
    assert plan.by_heads.cache_bytes == plan.by_layers.cache_bytes == plan.by_positions.cache_bytes == 17_179_869_184
    assert plan.by_heads.weights_bytes == GB and plan.by_positions.weights_bytes == 4 * GB


def test_shares_that_are_not_equal() -> None:
    """32 layers on 3 GPUs: 11 on the fullest. 65,536 positions: 21,846 slots each. 32 heads: not possible."""
    plan = of_7b(gpus=3)
    assert plan.by_layers.cache_bytes == 11 * 65_536 * POSITION // 32
    assert plan.by_layers.weights_bytes == 4 * GB * 11 // 32
    assert plan.by_positions.cache_bytes == 21_846 * POSITION
    assert plan.by_heads.why_not == "32 key/value heads of a layer cannot be dealt equally to 3 GPUs"
    assert plan.by_heads.total_bytes == plan.by_heads.largest_max_positions == 0 and not plan.by_heads.fits
    assert plan.best is plan.by_positions


def test_fewer_layers_than_gpus() -> None:
    plan = plan_gpus(1, 100, 4, 64, gpus=2, gpu_bytes=GB)
    assert plan.by_layers.why_not == "the model has 1 layer, and a layer stays on one GPU"
    assert plan.by_heads.fits and plan.by_positions.fits


def test_which_is_best() -> None:
    assert of_7b(gpus=3).best is not None
    heavy = of_7b(gpus=3, weights_bytes=40 * GB)  # all weights do not fit on one GPU, and heads cannot be dealt out
    assert heavy.best is None
    heavy = of_7b(gpus=3, gpu_bytes=26 * GB, weights_bytes=40 * GB)
    assert not heavy.by_positions.fits and heavy.best is heavy.by_layers
    none = of_7b(gpu_bytes=10 * GB)
    assert none.best is None and none.by_heads.largest_max_positions == (8 * GB - BESIDE) // (POSITION // 2)
    assert of_7b(gpu_bytes=0).by_heads.largest_max_positions == 0


def mixed(positions: int) -> list[LayerShape | None]:
    """A window, no keys and values, full attention; twice."""
    window = LayerShape(min(positions, 640), 8, 64, window=512)
    return [window, None, LayerShape(positions, 4, 128)] * 2


def test_a_model_whose_layers_differ() -> None:
    """A slot of either shape takes 8 * 64 * 4 = 4 * 128 * 4 = 2,048 bytes."""
    plan = plan_model_on_gpus(mixed, 10_000, gpus=2, gpu_bytes=GB, weights_bytes=600)
    assert plan.one_gpu.cache_bytes == 2 * (640 + 10_000) * 2048
    assert plan.by_layers.cache_bytes == (640 + 10_000) * 2048
    assert plan.by_heads.cache_bytes == (640 + 10_000) * 2048
    assert plan.by_positions.cache_bytes == 2 * (640 + 5_000) * 2048  # windows stay whole
    short = plan_model_on_gpus(mixed, 599, gpus=2, gpu_bytes=GB)  # so a window's ring is as long as max_positions
    assert short.by_positions.cache_bytes == 2 * (600 + 300) * 2048  # rounded up to two GPUs before
    plan = plan_model_on_gpus(mixed, 10_000, gpus=4, gpu_bytes=GB, weights_bytes=600)
    # 1, 2, 1 and 2 layers: the last GPU has one of no keys and values and one of full attention.
    assert plan.by_layers.cache_bytes == 10_000 * 2048 and plan.by_layers.weights_bytes == 200
    plan = plan_model_on_gpus(mixed, 10_000, gpus=6, gpu_bytes=GB)
    assert plan.by_heads.why_not == "4 and 8 key/value heads of a layer cannot be dealt equally to 6 GPUs"


def test_windows_alone() -> None:
    plan = plan_model_on_gpus(
        lambda positions: [LayerShape(min(positions, 640), 1, 64, window=512)] * 2, 10_000, gpus=2, gpu_bytes=GB
    )
    assert plan.one_gpu.largest_max_positions is plan.by_layers.largest_max_positions is None
    assert plan.by_positions.why_not == "every layer has a sliding window, and such layers stay whole on every GPU"
    assert plan.by_heads.why_not == "1 key/value head of a layer cannot be dealt equally to 2 GPUs"
    assert plan.best is plan.by_layers


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"gpus": 1}, ValueError, "plan_gpus: gpus must be at least 2, got 1"),
        ({"gpus": 2.0}, TypeError, "plan_gpus: gpus must be an int, got float"),
        ({"gpu_bytes": -1}, ValueError, "plan_gpus: gpu_bytes must be at least 0, got -1"),
        ({"gpu_bytes": None}, TypeError, "plan_gpus: gpu_bytes must be an int"),
        ({"weights_bytes": 1e9}, TypeError, "plan_gpus: weights_bytes must be an int"),
        ({"num_layers": 0}, ValueError, "plan_gpus: num_layers must be at least 1"),
        ({"num_layers": 10_001}, ValueError, "plan_gpus: num_layers must be at most 10000, got 10001"),
        ({"max_positions": 1 << 63}, ValueError, "plan_gpus: max_positions must fit in 64 bits"),
        ({"num_heads": True}, TypeError, "plan_gpus: num_heads must be an int"),
        ({"head_dim": 0}, ValueError, "plan_gpus: head_dim must be at least 1"),
        ({"batch_size": 0}, ValueError, "plan_gpus: batch_size must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    right = {"num_layers": 2, "max_positions": 10, "num_heads": 2, "head_dim": 8, "gpus": 2, "gpu_bytes": GB}
    with pytest.raises(error, match=words):
        plan_gpus(**right | arguments)


# The command


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """The lines by their first words; the headline is under ""."""
    assert main(["plan", *options]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {"": head, "notes": ""}
    for line in lines:
        name, _, rest = line.strip().partition("  " if "  " in line.strip() else ": ")
        name = f"{name} why not" if name in rows else name
        rows[name] = " ".join(rest.split())
        rows["notes"] += f"{rest}\n" if name.startswith("note") else ""
    return rows


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, *SHAPE, "--weights-gb", "4", "--gpus", "2", "--gpu-gb", "24")
    assert rows[""] == "32 layers, 65,536 positions, 32 key/value heads of 128"
    assert "2 GPUs of 24.00 GB each" in rows
    assert rows["each GPU takes"] == "weights cache beside it total most positions"
    assert rows["one GPU"] == "4.00 GB 34.36 GB 0.04 GB 38.40 GB 38,074 does not fit: 14.40 GB too much"
    assert rows["by layers"] == rows["by heads"] == "2.00 GB 17.18 GB 0.04 GB 19.22 GB 83,778 fits"
    assert rows["by positions"] == "4.00 GB 17.18 GB 0.07 GB 21.25 GB 76,026 fits"
    assert rows["pick"].startswith("by heads, as for each token all GPUs at once read 1/2 of the weights")
    assert "by heads counts 1/2 of the weights" in rows["notes"] and "by layers counts 1/2" in rows["notes"]
    assert "the CUDA context need room of their own" in rows["notes"]


def test_what_is_not_possible_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, *SHAPE, "--gpus", "3", "--gpu-gb", "24", "--batch", "2")
    assert rows[""] == "32 layers, 2 sequences of 65,536 positions, 32 key/value heads of 128"
    assert rows["by heads"] == "- - - - - not possible"
    assert (
        rows["by heads why not"] == "not possible, as 32 key/value heads of a layer cannot be dealt equally to 3 GPUs"
    )
    assert rows["pick"].startswith("by positions, as for each token all GPUs at once read 1/3 of the cache")
    assert "no weights are counted: --weights-gb" in rows["notes"]


@pytest.mark.parametrize(
    "gpus, gpu_gb, weights, words",
    [
        (3, 26, 40, "by layers, the only way that fits: the GPUs read their layers one after the other"),
        (
            2,
            80,
            4,
            "by heads, as for each token all GPUs at once read 1/2 of the weights and of the cache (all of it fits",
        ),
        (2, 10, 4, "none, as none fits; by heads there is room for the most, "),
        (2, 10, 40, "none, as not even one position fits beside the weights"),
    ],
)
def test_what_to_pick(capsys: pytest.CaptureFixture[str], gpus: int, gpu_gb: int, weights: int, words: str) -> None:
    rows = printed(capsys, *SHAPE, "--weights-gb", str(weights), "--gpus", str(gpus), "--gpu-gb", str(gpu_gb))
    assert rows["pick"].startswith(words)


def test_the_gpus_that_are_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: (24 + device.index) * GB)
    assert "2 GPUs of 24.00 GB each" in printed(capsys, *SHAPE, "--gpus", "2")
    assert "needs --gpu-gb, the memory of each GPU in GB, as torch sees 2 GPUs here" in refused(
        capsys, *SHAPE, "--gpus", "3"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "as torch sees no GPU here" in refused(capsys, *SHAPE, "--gpus", "2")


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --gpus" in refused(capsys, *SHAPE, "--gpu-gb", "24")
    assert "--gpus must be at least 2, got 1" in refused(capsys, *SHAPE, "--gpus", "1", "--gpu-gb", "24")
    several = ("--gpus", "2", "--gpu-gb", "24")
    assert "--free-gb is for one device" in refused(capsys, *SHAPE, *several, "--free-gb", "24")
    assert "--device is for one device" in refused(capsys, *SHAPE, *several, "--device", "cpu")
    assert "--layers must be at most 10,000" in refused(capsys, *SHAPE, *several, "--layers", "10001")
    for options, words in (
        (["--gpus", "0"], "must be at least 1"),
        (["--gpus", "two"], "invalid int value: 'two'"),
        (["--gpu-gb", "nan"], "that is not negative"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["plan", *SHAPE, *options])
        assert raised.value.code == 2 and words in capsys.readouterr().err


def test_a_config_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_read_by_transformers", lambda path: None)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"sliding_window": 4096}))
    rows = printed(capsys, "--config", str(tmp_path), "--gpus", "2", "--gpu-gb", "24")
    assert rows["by positions"].startswith("0.00 GB 17.18 GB 0.07 GB 17.25 GB")
    assert "have a sliding window of 4,096 positions" in rows["notes"]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_a_config_whose_layers_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    """Three layers each, 2 KV heads of 16, so that a slot takes 128 bytes.

    Gemma 3: a window of 8 (136 slots), full attention, a window. Qwen3-Next: one layer with keys and values.
    """
    llms = pytest.importorskip("llms", reason="transformers is not installed")
    llms.make_model(family).config.save_pretrained(tmp_path)
    options = ("--positions", "100000", "--batch", "2", "--gpus", "2", "--gpu-gb", "24", "--weights-gb", "1")
    rows = printed(capsys, "--config", str(tmp_path), *options)
    windows = 136 if family == "gemma3" else 0
    caches = {
        "one GPU": 2 * windows + 100_000,
        "by layers": windows + 100_000,  # two of three layers
        "by heads": (2 * windows + 100_000) // 2,
        "by positions": 2 * windows + 50_000,
    }
    for way, slots in caches.items():
        cache = rows[way].split()[2:4]
        assert " ".join(cache) == memory.shown_gb(2 * slots * 128), way
        assert rows[way].endswith("fits")
    assert ("recurrent or convolutional states" in rows["notes"]) == (family == "qwen3_next")


@pytest.mark.parametrize(
    "family, words",
    [
        ("GPT2", "transformers has no tensor-parallel plan for gpt2"),
        ("Olmo2", "transformers' tensor-parallel plan for olmo2 leaves every GPU all key/value heads"),
        ("GPTNeoX", None),
        ("Llama", None),
    ],
)
def test_models_that_are_not_dealt_out_by_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, words: str | None
) -> None:
    llms = pytest.importorskip("llms", reason="transformers is not installed")
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}
    getattr(llms.transformers, f"{family}Config")(**small).save_pretrained(tmp_path)
    rows = printed(capsys, "--config", str(tmp_path), "--positions", "100", "--gpus", "2", "--gpu-gb", "24")
    assert rows.get("by heads why not") == (None if words is None else f"not possible, as {words}")
    assert rows["pick"].startswith("by positions" if words else "by heads")
