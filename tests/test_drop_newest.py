"""drop_newest, lengths and device_lengths, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, Twin, assert_same_bits, make_cache
from test_sequences import filled, rows

from kvcache_ext import ops


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("appended", [0, 2, 5, 8, 11, 21])
def test_drop_then_append(backend: Backend, sinks: int, appended: int) -> None:
    """From every length every number of positions, then on past another wrap."""
    held = min(appended, 8)
    for n in range(held + 1):
        twin, other = (Twin(backend, num_layers=1, num_heads=1, head_dim=4, sink_positions=sinks) for _ in range(2))
        key = rows(backend, 1, appended, 1, 4)
        for each in (twin, other):
            each.append(0, key, key)
        twin.drop_newest(n)
        other.truncate(held - n)
        twin.check()
        assert torch.equal(twin.state, other.state)
        assert twin.cache.lengths() == [held - n]
        for count in (1, 2, 9):
            twin.append(0, rows(backend, 1, count, 1, 4), rows(backend, 1, count, 1, 4))
            twin.check()


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("form", ["int", "list", "int64", "int32"])
def test_each_layer_loses_its_own(backend: Backend, form: str, sinks: int) -> None:
    """Sequences and layers of different lengths: each keeps what it held, less n."""
    twin = filled(backend, [5, 7, 9, 30], num_layers=3, sink_positions=sinks)
    before = twin.cache.device_lengths()
    n = {
        "int": 3,
        "list": [3, 0, 1, 7],
        "int64": torch.tensor([3, 0, 1, 7], device=backend.device),
        "int32": torch.tensor([3, 0, 1, 7], dtype=torch.int32, device=backend.device),
    }[form]
    twin.drop_newest(n)
    twin.check()
    dropped = torch.as_tensor(n, device=backend.device)
    assert torch.equal(twin.cache.device_lengths(), before - dropped)
    twin.append_all(rows(backend, 3, 4, 2, 2, 8), rows(backend, 3, 4, 2, 2, 8))
    twin.check()


def test_it_takes_back_what_was_appended_last(backend: Backend) -> None:
    """Rejected draft tokens: before the ring wraps, nothing shows that they ever were there."""
    cache, want = (make_cache(backend, num_layers=2, batch_size=2, sink_positions=1) for _ in range(2))
    prompt, draft = rows(backend, 2, 2, 4, 2, 8), rows(backend, 2, 2, 3, 2, 8)
    for each in (cache, want):
        each.append_all(prompt, prompt)
    cache.append_all(draft, draft)
    cache.drop_newest(torch.tensor([1, 3], device=backend.device))
    want.append_all(draft, draft, new_lengths=torch.tensor([0, 0], device=backend.device))
    want.append_all(draft[:, :, :2], draft[:, :, :2], sequences=[0, 1])
    want.truncate([6, 4])
    assert torch.equal(cache.tensors.state, want.tensors.state)
    for layer in range(2):
        for got, wanted in zip(cache.get_valid_f32(layer), want.get_valid_f32(layer), strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_numbers_on_the_device_are_clamped(backend: Backend, index_dtype: torch.dtype) -> None:
    most = torch.iinfo(index_dtype)
    twin = filled(backend, [0, 2, 8, 13, 6, 7], sink_positions=1)
    n = torch.tensor([4, -2, 100, most.max, most.min, 3], dtype=index_dtype, device=backend.device)
    twin.drop_newest(n)
    twin.check()
    assert twin.cache.lengths() == [0, 1, 0, 0, 5, 3]


def test_of_some_sequences(backend: Backend) -> None:
    for on_device in (False, True):

        def given(*numbers: int, on_device: bool = on_device) -> object:
            return torch.tensor(numbers, dtype=torch.int64, device=backend.device) if on_device else list(numbers)

        twin = filled(backend, [7, 2, 8, 13, 6], num_layers=2, sink_positions=2)
        twin.drop_newest(4, given(3, 0))
        twin.check()
        twin.drop_newest(given(5, 1), given(2, 3))
        twin.check()
        twin.drop_newest(0, given(4))
        twin.check()
        twin.drop_newest(1, given())
        twin.check()
    twin.drop_newest(torch.tensor([2, 2, 2], device=backend.device), torch.tensor([2, 9, -1], device=backend.device))
    twin.check()
    twin.drop_newest([1], torch.tensor([2], device=backend.device))
    twin.check()
    twin.drop_newest(99, torch.tensor([4, 0], device=backend.device))  # more than is held: clamped on the device
    twin.check()
    assert twin.cache.lengths()[4] == twin.cache.lengths()[0] == 0


def test_an_int_is_held_against_the_chosen_sequences(backend: Backend) -> None:
    twin = filled(backend, [5, 2, 7], num_layers=2)
    with pytest.raises(IndexError, match="drop_newest: n must be from 0 to 1, the number of positions held, got 2"):
        twin.cache.drop_newest(2)
    with pytest.raises(IndexError, match="from 0 to 4, the number of positions held by sequence 0, got 5"):
        twin.cache.drop_newest(5, sequences=[2, 0])
    with pytest.raises(IndexError, match="from 0 to 1, the number of positions held by sequence 1, got 2"):
        twin.cache.drop_newest([1, 2, 1])
    with pytest.raises(IndexError, match="drop_newest: n must be at least 0, got -1"):
        twin.cache.drop_newest(-1, sequences=torch.tensor([0], device=backend.device))
    twin.check()
    twin.drop_newest(4, [0, 2])
    twin.check()
    assert twin.cache.cache_seqlens.tolist() == [[1, 2, 3], [0, 1, 2]]


def test_ops_on_plain_tensors(backend: Backend) -> None:
    twin = filled(backend, [3, 9, 5], sink_positions=1)
    c = twin.cache
    for n in (2, torch.tensor([1, 0, 4], device=backend.device)):
        ops.truncate(c.k_cache, c.tensors.state, n, sink_positions=1, newest=True)
        on_host = n.cpu() if isinstance(n, torch.Tensor) else n
        twin.reference.truncate(twin.state, on_host, sink_positions=1, newest=True)
        twin.check()


def test_lengths_are_new_objects(backend: Backend) -> None:
    """What is done to an answer does not reach the cache."""
    twin = filled(backend, [3, 9], sink_positions=1)
    twin.cache.device_lengths().zero_()
    twin.cache.lengths()[0] = 99
    twin.check()
    assert twin.cache.device_lengths().dtype == torch.int64
    assert twin.cache.device_lengths().device == twin.cache.device
    assert twin.cache.device_lengths().shape == (2, 2)
    assert (twin.cache.lengths(), len(twin.cache)) == ([2, 8], 2)
