"""What a call writes must not lie in memory that the call uses for anything else. Sharing a buffer is no matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcache_ext import StreamingKVCacheFp16, ops

Cache = StreamingKVCacheFp16


def filled(device: torch.device, **arguments: object) -> Cache:
    cache = make_cache(device, sink_positions=1, **arguments)
    for layer in range(2):
        shape = (cache.batch_size, 5, cache.num_heads, cache.head_dim)
        cache.append(layer, torch.randn(shape, device=device), torch.randn(shape, device=device))
    return cache


def inside(storage: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `like`, contiguous, at the beginning of another one's memory."""
    return storage.view(-1).view(like.dtype)[: like.numel()].view(like.shape)


def unchanged(cache: Cache) -> Callable[[], None]:
    def bits() -> list[Tensor]:
        kept = (
            cache.k_cache,
            cache.v_cache,
            cache.tensors.state,
            cache.tensors.overflow_counts,
            cache.tensors.workspace,
        )
        return [t.view(torch.uint8).clone() for t in kept]

    before = bits()

    def check() -> None:
        for x, y in zip(before, bits(), strict=True):
            assert torch.equal(x, y)

    return check


def attention_arguments(cache: Cache, appends: bool) -> dict[str, Any]:
    """Of `ops.attend` or `ops.append_attend`; all inputs large enough to hold an answer in their memory."""
    device = cache.device
    query = torch.randn(2, 1, 2, 8, device=device)
    arguments = {
        "k_cache": cache.k_cache, "v_cache": cache.v_cache, "state": cache.tensors.state,
        "workspace": cache.tensors.workspace,
        "layer": 0, "query": query, "scale": 1.0, "sink_positions": 1, "out": torch.zeros_like(query),
        "lse": torch.zeros(2, 1, 2, device=device), "sequences": torch.tensor([1, 0], device=device),
    }  # fmt: skip
    if appends:
        arguments |= {
            "overflow_counts": cache.tensors.overflow_counts, "key": torch.randn(2, 1, 2, 8, device=device),
            "value": torch.randn(2, 1, 2, 8, device=device), "new_lengths": torch.tensor([1, 1], device=device),
        }  # fmt: skip
    return arguments


def pairs() -> Iterator[tuple[str, str, str]]:
    """op, what it writes, what that must not lie in"""
    own = ["k_cache", "v_cache", "state", "query", "sequences"]
    of_append = ["overflow_counts", "key", "value", "new_lengths"]
    for written, others in (("out", ["workspace"]), ("lse", ["workspace", "out"]), ("workspace", [])):
        for op, more in (("attend", []), ("append_attend", of_append)):
            for other in own + more + others:
                yield op, written, other
    for written in ("out[0]", "out[1]"):
        for other in ("k_cache", "v_cache", "state", "indices", "sequences"):
            yield "gather", written, other
    yield "gather", "out[1]", "out[0]"


@pytest.mark.parametrize(("op", "written", "other"), list(pairs()))
def test_every_op_refuses(device: torch.device, op: str, written: str, other: str) -> None:
    """The registered ops, where all tensors are arguments. The smaller of the two lies in the other's memory."""
    cache = filled(device, batch_size=2, num_layers=16)  # state and counters large enough for an LSE
    if op == "gather":
        numbers = torch.tensor([1, 0], device=device)
        shape = (2, 2, 2, 8)
        arguments: dict[str, Any] = {
            "k_cache": cache.k_cache, "v_cache": cache.v_cache, "state": cache.tensors.state, "layer": 0,
            "sink_positions": 1,
            "indices": torch.tensor([[0, 1], [2, 3]], device=device), "sequences": numbers,
            "out[0]": torch.zeros(shape, device=device), "out[1]": torch.zeros(shape, device=device),
        }  # fmt: skip
    else:
        arguments = attention_arguments(cache, op == "append_attend")
    small, large = sorted((written, other), key=lambda name: arguments[name].nbytes)
    arguments[small] = inside(arguments[large], arguments[small])
    if small != written and not arguments[small].is_floating_point():
        arguments[small].copy_(torch.arange(arguments[small].numel(), device=device).view(arguments[small].shape))
    if op == "gather":
        arguments["out"] = arguments.pop("out[0]"), arguments.pop("out[1]")
    check = unchanged(cache)
    with pytest.raises(ValueError) as raised:
        getattr(ops, op)(**arguments)
    sentence = str(raised.value)
    words = f"{op}: {written} must not share memory with {other}, which the call uses as well"
    if small in ("sequences", "new_lengths") and large == "state":  # they have a sentence of their own
        words = f"{op}: {small} must not be a view of the cache's own state"
    assert sentence == words or sentence.startswith(words + ";"), sentence
    check()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("other", ["query", "key", "value", "sequences", "new_lengths"])
def test_every_method_refuses(device: torch.device, rows: int, other: str) -> None:
    cache = filled(device, batch_size=2, max_positions=64)
    query, key, value = (torch.randn(2, rows, 2, 8, device=device) for _ in range(3))
    numbers = {name: torch.zeros(40, dtype=torch.int64, device=device) for name in ("sequences", "new_lengths")}
    numbers["sequences"][1] = 1
    inputs = {"query": query, "key": key, "value": value, **{name: t[:2] for name, t in numbers.items()}}
    out = torch.zeros(2, rows, 2, 8, device=device)
    if other in numbers:
        inputs[other] = out.view(-1).view(torch.int64)[:2].copy_(inputs[other])
    else:
        out = inputs[other]
    check = unchanged(cache)
    with pytest.raises(ValueError, match=f"append_attend: out must not share memory with {other}, which"):
        cache.append_attend(0, **inputs, out=out)
    if other in ("query", "sequences"):
        with pytest.raises(ValueError, match=f"attend: out must not share memory with {other}, which"):
            cache.attend(0, query, sequences=inputs["sequences"], out=out)
    check()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("other", ["k_cache", "v_cache", "state", "overflow_counts"])
def test_no_answer_is_written_into_the_cache(device: torch.device, rows: int, other: str) -> None:
    cache = filled(device, batch_size=2, max_positions=64, num_layers=512)
    memory = {"state": cache.tensors.state, "overflow_counts": cache.tensors.overflow_counts}.get(other)
    query = torch.randn(2, rows, 2, 8, device=device).half()
    key, indices = torch.randn(2, rows, 2, 8, device=device), torch.arange(rows, device=device)
    out = inside(getattr(cache, other) if memory is None else memory, query)
    fine = torch.zeros_like(query)
    check = unchanged(cache)
    for words, call in (
        ("attend: out", lambda: cache.attend(0, query, out=out)),
        ("append_attend: out", lambda: cache.append_attend(0, query, key, key, out=out)),
        (r"gather: out\[0\]", lambda: cache.gather(0, indices, dtype=torch.float16, out=(out, fine))),
        (r"gather: out\[1\]", lambda: cache.gather(0, indices, dtype=torch.float16, out=(fine, out))),
    ):
        with pytest.raises(ValueError, match=f"^{words} must not share memory with {other}, which"):
            call()
    check()


@pytest.mark.parametrize("rows", [1, 20])
def test_an_output_that_shares_memory_with_itself(device: torch.device, rows: int) -> None:
    cache = filled(device, max_positions=64)
    query = torch.randn(1, rows, 2, 8, device=device)
    key = torch.randn(1, rows, 2, 8, device=device)
    indices = torch.arange(3, device=device)
    fine = torch.zeros(3, 2, 8, device=device)
    buffer = torch.zeros(1000, device=device)
    words = "must not have elements that share memory, as an expanded tensor has, got strides"
    check = unchanged(cache)
    for strides in ((0, 16, 4, 1), (0, 8, 0, 1), (0, 12, 7, 1)):
        out = buffer.as_strided(query.shape, strides)
        for call in (
            lambda o=out: cache.attend(0, query, out=o),
            lambda o=out: cache.append_attend(0, query, key, key, out=o),
        ):
            with pytest.raises(ValueError, match=f"attend: out {words}"):
                call()
        rows_of = buffer.as_strided((3, 2, 8), strides[1:])
        for place, pair in (("0", (rows_of, fine)), ("1", (fine, rows_of))):
            with pytest.raises(ValueError, match=rf"gather: out\[{place}\] {words}"):
                cache.gather(0, indices, out=pair)
            with pytest.raises(ValueError, match=rf"get_range_f32: out\[{place}\] {words}"):
                cache.get_range_f32(0, 0, 3, out=pair)
    check()
    assert not buffer.any() and not fine.any()


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_one_buffer_for_inputs_and_outputs(device: torch.device, rows: int) -> None:
    """Query, key, value and answer side by side in one buffer, in any order of dimensions; keys beside values."""
    cache, apart = (filled(device, batch_size=2, max_positions=64) for _ in range(2))
    apart.k_cache.copy_(cache.k_cache)
    apart.v_cache.copy_(cache.v_cache)
    for dim in (1, 2, 3, 4):  # where the four lie: [2, rows, 2, 8] with a dimension of 4 before, between or behind
        if dim == 4:  # the last elements of longer rows
            whole = torch.randn(2, rows, 2, 32, device=device)
            query, key, value, out = whole.split(8, dim=-1)
        else:
            query, key, value, out = (
                torch.randn(2, rows, 2, 8, device=device).unsqueeze(dim).repeat_interleave(4, dim).unbind(dim)
            )
        calls = (
            lambda c, new=(query,), **options: c.attend(0, *new, **options),
            lambda c, new=(query, key, value), **options: c.append_attend(0, *new, **options),
        )
        for call in calls:
            want = call(apart)
            before = [t.clone() for t in (query, key, value)]
            assert_same_bits(call(cache, out=out).contiguous(), want)
            for t, b in zip((query, key, value), before, strict=True):
                assert torch.equal(t, b)
    indices = torch.arange(4, device=device)
    want_rows = cache.gather(0, indices)
    for dim in range(5):  # where keys and values lie: [2, 4, 2, 8] with a dimension of 2 in each place
        if dim == 4:
            keys, values = torch.zeros(2, 4, 2, 16, device=device).split(8, dim=-1)
        else:
            keys, values = torch.zeros(2, 4, 2, 8, device=device).unsqueeze(dim).repeat_interleave(2, dim).unbind(dim)
        for x, y in zip(cache.gather(0, indices, out=(keys, values)), want_rows, strict=True):
            assert_same_bits(x.contiguous(), y)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=2),
    starts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_strides(sizes: tuple[int, int], strides: list[tuple[int, int]], starts: tuple[int, int]) -> None:
    """Two tensors anywhere in a buffer: refused exactly where some element of it would be used twice."""
    device = torch.device("cpu")
    cache = make_cache(device, num_heads=1)
    cache.append(0, torch.ones(2, 1, 8), torch.ones(2, 1, 8))
    buffer = torch.randn(400)
    places = torch.arange(400)
    shape = (*sizes, 8)
    query, out = (buffer.as_strided(shape, (*s, 1), b) for s, b in zip(strides, starts, strict=True))
    of_query, of_out = (places.as_strided(shape, (*s, 1), b).flatten() for s, b in zip(strides, starts, strict=True))
    within = len(of_out.unique()) < len(of_out)
    between = bool(torch.isin(of_out, of_query).any())
    if not within and not between:
        want = cache.attend(0, query.clone(memory_format=torch.contiguous_format))
        assert_same_bits(cache.attend(0, query, out=out).contiguous(), want)
        return
    with pytest.raises(ValueError, match="elements that share memory" if within else "share memory with query"):
        cache.attend(0, query, out=out)
