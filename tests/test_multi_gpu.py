"""What each of several GPUs takes: `plan_gpus`, and `python -m kvcache_ext plan --gpus`.

Bytes of the 7B model (32 layers, 32 heads, head_dim 128): a position takes 32 * 32 * 128 * 2 tensors * 2 bytes =
524,288 bytes, so that 65,536 positions take 34,359,738,368.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvcache_ext.memory import LayerShape
from kvcache_ext.multi_gpu import GpusPlan, plan_gpus, plan_model_on_gpus

GB = 10**9
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
