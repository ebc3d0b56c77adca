"""The CPU's threads: every op gives the same bits, however many share it. (Most tests run with one thread.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16

LAYERS, SLOTS, HEADS, HEAD_DIM, BATCH = 2, 700, 8, 64, 3


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(cache: StreamingKVCacheFp16, other: StreamingKVCacheFp16) -> list[Tensor]:
    """Each op once, on enough rows for several threads, around the end of the ring."""
    torch.manual_seed(0)
    new = torch.randn(2, LAYERS, BATCH, SLOTS - 50, HEADS, HEAD_DIM)
    cache.append_all(*new)
    cache.append(1, *new[:, 0, :, :200], new_lengths=torch.tensor([200, 0, 77]))
    query = torch.randn(BATCH, 2, HEADS, HEAD_DIM)
    found = [cache.attend(0, query), cache.append_attend(0, query, *new[:, 1, :, :2])]
    found += cache.gather(1, torch.randint(0, SLOTS, (BATCH, 500)))
    found += cache.get_valid_f32(0)
    cache.reorder([1, 2, 0])
    cache.copy_sequence([0, 1], [1, 0], source=other)
    cache.drop_newest(5)
    found += [cache.tensors.state, cache.overflow_counts()]
    return [*found, *cache.get_valid_f32(1)]


def test_threads_change_nothing(set_threads: Callable[[int], None]) -> None:
    answers = []
    for threads in (1, 2, 5):
        set_threads(threads)
        cache, other = (
            StreamingKVCacheFp16(LAYERS, slots, HEADS, HEAD_DIM, batch_size=BATCH, sink_positions=3, device="cpu")
            for slots in (SLOTS, 2 * SLOTS)
        )
        torch.manual_seed(1)
        other.append_all(*torch.randn(2, LAYERS, BATCH, SLOTS, HEADS, HEAD_DIM))
        answers.append(everything(cache, other))
    for more in answers[1:]:
        for got, want in zip(more, answers[0], strict=True):
            assert torch.equal(got, want)
