"""CUDA graphs, streams and devices: captured calls move the cache on, replay after replay. Needs a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import Twin, assert_same_bits, make_cache, needs_gpu

from kvcache_ext import StreamingKVCacheFp16

pytestmark = [needs_gpu, pytest.mark.gpu]
GPU = torch.device("cuda")


def capture(call: object, warm_up: int = 0) -> torch.cuda.CUDAGraph:
    """Captures call() after running it `warm_up` times on the capturing stream's side."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()  # type: ignore[operator]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()  # type: ignore[operator]
    return graph


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_replayed_appends_are_eager_ones(sinks: int, chunk: int) -> None:
    """Bit for bit, across several wraps; and what the capture itself must not do: move the cache."""
    captured, eager = (make_cache(GPU, num_layers=3, batch_size=2, sink_positions=sinks) for _ in range(2))
    key = torch.empty(2, chunk, 2, 8, device=GPU)
    value = torch.empty_like(key)

    def step(cache: StreamingKVCacheFp16) -> None:
        for layer in range(3):
            cache.append(layer, key * (layer + 1), value)

    graph = capture(lambda: step(captured))
    assert captured.position == 0
    for i in range(40):
        key.copy_(torch.randn_like(key) * (1e5 if i % 7 == 0 else 1))
        value.normal_()
        graph.replay()
        step(eager)
        assert len(captured) == len(eager) == min((i + 1) * chunk, 8)
        assert captured.position == eager.position == (i + 1) * chunk
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert_same_bits(captured.v_cache, eager.v_cache)
    assert torch.equal(captured.tensors.state, eager.tensors.state)
    assert torch.equal(captured.overflow_counts(), eager.overflow_counts())
    assert captured.overflow_counts().sum() > 0


def test_append_all_with_device_side_lengths_in_a_graph() -> None:
    """new_lengths is read at each replay: the same graph serves a ragged batch."""
    twin = Twin(GPU, num_layers=2, batch_size=3, sink_positions=1)
    keys = torch.empty(2, 3, 4, 2, 8, device=GPU)
    lengths = torch.zeros(3, dtype=torch.int64, device=GPU)
    graph = capture(lambda: twin.cache.append_all(keys, keys * 2, new_lengths=lengths))
    for new in ([1, 2, 4], [0, 0, 3], [4, 4, 4], [7, -1, 1]):
        keys.normal_()
        lengths.copy_(torch.tensor(new))
        graph.replay()
        twin.reference.append_all(
            twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, keys.cpu(), keys.cpu() * 2, lengths.cpu(),
            sink_positions=1,
        )  # fmt: skip
        twin.check()


def test_gather_in_a_graph_follows_the_cache() -> None:
    twin = Twin(GPU, num_layers=1, sink_positions=2)
    key = torch.empty(1, 1, 2, 8, device=GPU)
    indices = torch.tensor([0, 3, 7, 1, 100], device=GPU)
    out = tuple(torch.empty(5, 2, 8, device=GPU) for _ in range(2))

    def step() -> None:
        twin.cache.append(0, key, -key)
        twin.cache.gather(0, indices, out=out)

    graph = capture(step)
    for _ in range(20):
        key.normal_()
        graph.replay()
        twin.reference.append(
            twin.k_cache, twin.v_cache, twin.state, twin.overflow_counts, 0, key.cpu(), -key.cpu(), sink_positions=2
        )
        for o, w in zip(out, twin.gather(0, indices), strict=True):
            assert_same_bits(o.cpu(), w)


@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_attention_is_the_eager_one(rows: int) -> None:
    """Bit for bit, across wraps: a graph of layers, each one's answer the next one's query."""
    captured, eager = (
        make_cache(GPU, num_layers=4, max_positions=50, batch_size=2, num_heads=2, head_dim=64, sink_positions=3)
        for _ in range(2)
    )
    hidden = torch.empty(2, rows, 6, 64, device=GPU)
    results: dict[str, torch.Tensor] = {}

    def step(cache: StreamingKVCacheFp16, name: str) -> None:
        x = hidden
        for layer in range(4):
            x = cache.append_attend(layer, x, x[:, :, :2] * (layer + 1), x[:, :, 2:4])
            x = x + cache.attend(layer, x, window=20)
        results[name] = x

    graph = capture(lambda: step(captured, "captured"))
    for i in range(200):
        hidden.normal_()
        graph.replay()
        step(eager, "eager")
        assert_same_bits(results["captured"], results["eager"])
        assert captured.position == eager.position == (i + 1) * rows
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert torch.equal(captured.tensors.state, eager.tensors.state)
    assert not captured.tensors.workspace[:1024].any()


@pytest.mark.parametrize("group", [1, 4])
def test_attention_launches_that_follow_each_other_at_once(group: int) -> None:
    """A captured launch reads its layer before the launch ahead is done, if that leaves the layer alone: every order of
    writing and reading a layer, without anything in between, against eager calls."""
    heads = 8 // group
    captured, eager = (
        make_cache(GPU, num_layers=3, max_positions=700, num_heads=heads, head_dim=128, sink_positions=2)
        for _ in range(2)
    )
    x = torch.empty(8, 128, device=GPU)
    generator = random.Random(group)
    calls = [
        (generator.choice(["append", "append", "attend", "both", "both", "all"]), generator.randrange(3))
        for _ in range(60)
    ]
    outs = {name: torch.zeros(len(calls), 8, 128, device=GPU) for name in ("captured", "eager")}

    def step(cache: StreamingKVCacheFp16, out: torch.Tensor) -> None:
        query = x
        for (what, layer), answer in zip(calls, out, strict=True):
            if what == "append":
                cache.append(layer, query[:heads], query[-heads:])
            elif what == "all":
                cache.append_all(query[:heads].expand(3, -1, -1), query[-heads:].expand(3, -1, -1))
            elif what == "attend":
                query = cache.attend(layer, query, out=answer)
            else:
                query = cache.append_attend(layer, query, query[:heads], query[-heads:], out=answer)

    graph = capture(lambda: step(captured, outs["captured"]))
    for _ in range(60):
        x.normal_()
        graph.replay()
        step(eager, outs["eager"])
        assert_same_bits(outs["captured"], outs["eager"])
    assert_same_bits(captured.v_cache, eager.v_cache)
    assert torch.equal(captured.tensors.state, eager.tensors.state)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("slots", "sinks"), [(1000, 0), (300, 4), (50, 2)])
def test_a_prompt_in_chunks_in_a_graph(slots: int, sinks: int, precision: str) -> None:
    """A replay appends and attends to 64 tokens of each layer; many of them, through several wraps, against eager.

    Into a ring that holds several chunks, and one that is shorter than a chunk.
    """
    captured, eager = (
        make_cache(
            GPU, num_layers=2, max_positions=slots, batch_size=2, num_heads=2, head_dim=128, sink_positions=sinks
        )
        for _ in range(2)
    )
    x = torch.empty(2, 64, 8, 128, device=GPU)
    outs = {name: torch.zeros(2, 2, 64, 8, 128, device=GPU) for name in ("captured", "eager")}
    lses: dict[str, torch.Tensor] = {}

    def step(cache: StreamingKVCacheFp16, name: str) -> None:
        query = x
        for layer in range(2):
            _, lses[name] = cache.append_attend(
                layer, query, query[:, :, :2], query[:, :, 2:4], out=outs[name][layer], precision=precision,
                return_lse=True,
            )  # fmt: skip
            query = x + cache.attend(layer, outs[name][layer], window=100, precision=precision)

    graph = capture(lambda: step(captured, "captured"))
    assert captured.position == 0
    for i in range(80):
        x.normal_()
        graph.replay()
        step(eager, "eager")
        assert_same_bits(outs["captured"], outs["eager"])
        assert_same_bits(lses["captured"], lses["eager"])
        assert captured.position == eager.position == (i + 1) * 64
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert_same_bits(captured.v_cache, eager.v_cache)
    assert torch.equal(captured.tensors.state, eager.tensors.state)
    assert not captured.tensors.workspace[:1024].any()


@pytest.mark.parametrize("chosen", [False, True])
def test_a_ragged_prompt_in_a_graph(chosen: bool) -> None:
    """Lengths and sequences are read at each replay: who evicts is another one every time."""
    captured, eager = (
        make_cache(GPU, num_layers=1, max_positions=200, batch_size=4, head_dim=64, sink_positions=2) for _ in range(2)
    )
    x = torch.empty(3 if chosen else 4, 64, 2, 64, device=GPU)
    lengths = torch.zeros(len(x), dtype=torch.int64, device=GPU)
    numbers = torch.arange(len(x), device=GPU)
    out = torch.empty_like(x)
    options = {"new_lengths": lengths} | ({"sequences": numbers} if chosen else {})
    graph = capture(lambda: captured.append_attend(0, x, x * 2, x * 3, out=out, **options))
    generator = random.Random(0)
    for _ in range(60):
        x.normal_()
        lengths.copy_(torch.tensor([generator.choice((0, 1, 20, 63, 64)) for _ in range(len(x))]))
        if chosen:
            numbers.copy_(torch.tensor(generator.sample(range(-1, 5), 3)))  # some out of range
        graph.replay()
        assert_same_bits(out, eager.append_attend(0, x, x * 2, x * 3, **options))
    assert torch.equal(captured.tensors.state, eager.tensors.state)
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert_same_bits(captured.v_cache, eager.v_cache)


def test_prompts_do_not_wait_for_the_gpu() -> None:
    """No call of many queries waits, whether it evicts or not; and it allocates nothing but what it returns."""
    cache = make_cache(GPU, num_layers=1, max_positions=300, batch_size=2, head_dim=64)
    x = torch.randn(2, 100, 4, 64, device=GPU)
    key, out, lengths = x[:, :, :2], torch.empty_like(x), torch.tensor([100, 30], device=GPU)
    calls = (
        lambda: cache.append_attend(0, x, key, key, out=out),
        lambda: cache.append_attend(0, x, key, key, out=out, precision="fp16"),
        lambda: cache.append_attend(0, x, key, key, out=out, new_lengths=lengths),
        lambda: cache.append_attend(0, x, key, key, out=out, sequences=lengths - 30, window=40),
        lambda: cache.attend(0, x, out=out),
    )
    for call in calls:  # loading a kernel may wait and allocate
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for call in calls[:3] + calls[4:]:
                before = torch.cuda.memory_stats()["allocation.all.allocated"]
                call()
                assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            calls[3]()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ragged_attention_in_a_graph() -> None:
    """new_lengths is read at each replay; padding queries answer zeros."""
    captured, eager = (
        make_cache(GPU, num_layers=1, max_positions=20, batch_size=3, head_dim=64, sink_positions=2) for _ in range(2)
    )
    x = torch.empty(3, 1, 2, 64, device=GPU)
    lengths = torch.zeros(3, dtype=torch.int64, device=GPU)
    out = torch.empty_like(x)
    graph = capture(lambda: captured.append_attend(0, x, x * 2, x * 3, new_lengths=lengths, out=out))
    for i in range(60):
        x.normal_()
        lengths.copy_(torch.tensor([1, i % 2, 0]))
        graph.replay()
        assert_same_bits(out, eager.append_attend(0, x, x * 2, x * 3, new_lengths=lengths))
        assert not out[2].any()
    assert captured.cache_seqlens.tolist() == eager.cache_seqlens.tolist() == [[60, 30, 0]]
    assert_same_bits(captured.k_cache, eager.k_cache)


@pytest.mark.parametrize("group", [1, 4])
def test_a_hundred_thousand_replays_of_attention(group: int) -> None:
    """Tickets and lengths, which no sanitizer sees: every replay of a wrapping cache against eager, bit for bit.

    Both kernels: one query to a KV head, and several.
    """
    captured, eager = (
        make_cache(GPU, num_layers=1, max_positions=777, num_heads=4, head_dim=128, sink_positions=4) for _ in range(2)
    )
    x = torch.randn(4, 128, device=GPU)
    queries = torch.empty(4 * group, 128, device=GPU)
    outs = [torch.empty_like(queries) for _ in range(2)]
    differing = torch.zeros((), dtype=torch.int64, device=GPU)

    def step() -> None:
        x.mul_(1.7).sin_()
        queries.view(4, group, 128).copy_(x[:, None])
        captured.append_attend(0, queries, x * 2, x * 3, out=outs[0])

    graph = capture(step)
    for _ in range(100_000):
        graph.replay()
        eager.append_attend(0, queries, x * 2, x * 3, out=outs[1])
        differing += (outs[0].view(torch.int32) != outs[1].view(torch.int32)).sum()
    assert int(differing) == 0
    assert captured.position == eager.position == 100_000
    assert_same_bits(captured.v_cache, eager.v_cache)


def test_clear_in_a_graph() -> None:
    cache = make_cache(GPU, sink_positions=2)
    cache.append_all(torch.full((2, 11, 2, 8), 1e6, device=GPU), torch.zeros(2, 11, 2, 8, device=GPU))
    graph = capture(cache.clear)
    assert len(cache) == 8 and cache.overflow_counts().sum() > 0
    graph.replay()
    assert (len(cache), cache.position, int(cache.overflow_counts().sum())) == (0, 0, 0)
    cache.append_all(torch.ones(2, 3, 2, 8, device=GPU), torch.ones(2, 3, 2, 8, device=GPU))
    assert len(cache) == 3


def test_sequences_in_a_graph() -> None:
    """Indices and lengths are read at each replay: one graph serves every order of the beams."""
    twin = Twin(GPU, batch_size=4, sink_positions=2)
    key = torch.empty(2, 4, 3, 2, 8, device=GPU)
    order, lengths, pair = (torch.zeros(n, dtype=torch.int64, device=GPU) for n in (4, 2, 2))
    c = twin.cache

    def step() -> None:
        c.append_all(key, key * 2)
        c.reorder(order)
        c.truncate(lengths, sequences=pair)
        c.append(1, key[0], key[1])  # overlaps with nothing of the launches before it
        c.copy_sequence(pair[:1], pair[1:])
        c.truncate(3, sequences=pair[:1])
        c.reset(pair[1:])

    graph = capture(step)
    generator = random.Random(0)
    for _ in range(30):
        key.normal_()
        numbers = [generator.randrange(-1, 5) for _ in range(4)]
        chosen = generator.sample(range(4), 2)
        order.copy_(torch.tensor(numbers))
        pair.copy_(torch.tensor(chosen))
        lengths.copy_(torch.tensor([generator.randrange(-1, 10) for _ in range(2)]))
        graph.replay()
        keys, state, settings = key.cpu(), twin.state, twin._settings
        storage = (twin.k_cache, twin.v_cache, state)
        reference, sinks = twin.reference, {"sink_positions": 2}
        chosen_pair = pair.cpu()
        reference.append_all(*storage, twin.overflow_counts, keys, keys * 2, **settings)
        reference.copy_sequences(*storage, order.cpu(), **sinks)
        reference.truncate(state, lengths.cpu(), sequences=chosen_pair, **sinks)
        reference.append(*storage, twin.overflow_counts, 1, keys[0], keys[1], **settings)
        reference.copy_sequences(*storage, chosen_pair[:1], chosen_pair[1:], **sinks)
        reference.truncate(state, 3, sequences=chosen_pair[:1], **sinks)
        reference.reset(state, chosen_pair[1:], **sinks)
        twin.check()


@pytest.mark.parametrize("slots", [5, 8, 20])
def test_copies_between_caches_in_a_graph(slots: int) -> None:
    """Indices and numbers are read at each replay, and the source as it is by then. Into smaller and larger rings."""
    source = Twin(GPU, batch_size=3, sink_positions=2)
    twin = Twin(GPU, batch_size=4, max_positions=slots, sink_positions=2)
    key = torch.empty(2, 3, 3, 2, 8, device=GPU)
    src, dst, n = (torch.zeros(2, dtype=dtype, device=GPU) for dtype in (torch.int64, torch.int32, torch.int64))
    chosen = torch.zeros(2, dtype=torch.int64, device=GPU)
    held: dict[str, torch.Tensor] = {}

    def step() -> None:
        source.cache.append_all(key, key * 2)
        twin.cache.copy_sequence(src, dst, source=source.cache)
        held["copied"] = twin.cache.device_lengths()
        source.cache.drop_newest(n, sequences=chosen)
        twin.cache.append(1, key[0, :1], key[1, :1], sequences=src[:1] + 1)  # overlaps with nothing of the copy
        twin.cache.drop_newest(2, sequences=chosen)
        held["dropped"] = twin.cache.device_lengths()

    graph = capture(step)
    generator = random.Random(slots)
    sinks = {"sink_positions": 2}
    for _ in range(30):
        key.normal_()
        src.copy_(torch.tensor([generator.randrange(-1, 4) for _ in range(2)]))
        dst.copy_(torch.tensor(generator.sample(range(-1, 5), 2)))
        n.copy_(torch.tensor([generator.randrange(-1, 10) for _ in range(2)]))
        chosen.copy_(torch.tensor(generator.sample(range(4), 2)))  # 3 is out of the source's range
        graph.replay()
        keys, of, to = (
            key.cpu(),
            (source.k_cache, source.v_cache, source.state),
            (twin.k_cache, twin.v_cache, twin.state),
        )
        reference = twin.reference
        reference.append_all(*of, source.overflow_counts, keys, keys * 2, **source._settings)
        reference.copy_from(*to, *of, src.cpu(), dst.cpu(), **sinks)
        want = [[len(twin.held(layer, b)) for b in range(4)] for layer in range(2)]
        assert held["copied"].tolist() == want
        reference.truncate(source.state, n.cpu(), sequences=chosen.cpu(), newest=True, **sinks)
        reference.append(
            *to, twin.overflow_counts, 1, keys[0, :1], keys[1, :1], sequences=src.cpu()[:1] + 1, **twin._settings
        )
        reference.truncate(twin.state, 2, sequences=chosen.cpu(), newest=True, **sinks)
        assert held["dropped"].tolist() == [[len(twin.held(layer, b)) for b in range(4)] for layer in range(2)]
        source.check()
        twin.check()


def test_attention_around_copies_between_caches_in_a_graph() -> None:
    """An attention launch may read its layer early where the launch ahead leaves it alone. A copy does not."""
    shape = {"num_layers": 3, "max_positions": 300, "num_heads": 2, "head_dim": 128, "sink_positions": 2}
    captured, eager = ([make_cache(GPU, batch_size=2, **shape) for _ in range(2)] for _ in range(2))
    x = torch.empty(2, 1, 8, 128, device=GPU)
    zero, one = (torch.tensor([i], device=GPU) for i in range(2))
    generator = random.Random(0)
    calls = [(generator.choice(["attend", "both", "both", "copy"]), generator.randrange(2), generator.randrange(3))
             for _ in range(60)]  # fmt: skip
    outs = {name: torch.zeros(len(calls), 2, 1, 8, 128, device=GPU) for name in ("captured", "eager")}

    def step(caches: list[StreamingKVCacheFp16], out: torch.Tensor) -> None:
        query = x
        for (what, which, layer), answer in zip(calls, out, strict=True):
            cache, other = caches[which], caches[1 - which]
            if what == "attend":
                query = cache.attend(layer, query, out=answer)
            elif what == "both":
                query = cache.append_attend(layer, query, query[:, :, :2], query[:, :, -2:], out=answer)
            else:
                cache.copy_sequence(zero, one, source=other)

    graph = capture(lambda: step(captured, outs["captured"]))
    for _ in range(60):
        x.normal_()
        graph.replay()
        step(eager, outs["eager"])
        assert_same_bits(outs["captured"], outs["eager"])
    for got, want in zip(captured, eager, strict=True):
        assert torch.equal(got.tensors.state, want.tensors.state)
        assert_same_bits(got.k_cache, want.k_cache)
        assert_same_bits(got.v_cache, want.v_cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_chosen_sequences_in_a_graph(rows: int) -> None:
    """They are read at each replay, also where the launch just before has written them."""
    captured, eager = (
        make_cache(GPU, num_layers=2, max_positions=50, batch_size=6, head_dim=64, sink_positions=3) for _ in range(2)
    )
    x = torch.empty(3, rows, 2, 64, device=GPU)
    numbers = torch.zeros(3, dtype=torch.int64, device=GPU)
    results: dict[str, torch.Tensor] = {}

    def step(cache: StreamingKVCacheFp16, name: str) -> None:
        chosen = numbers + 1  # a launch of its own
        cache.append(0, x, x * 2, sequences=chosen)
        y = cache.append_attend(1, x, x * 3, x, sequences=chosen - 0)
        y = y + cache.attend(0, y, sequences=chosen + 0)
        keys, _ = cache.gather(0, torch.arange(5, device=GPU), sequences=chosen.clone())
        results[name] = y + keys.sum(1, keepdim=True)

    graph = capture(lambda: step(captured, "captured"))
    generator = random.Random(0)
    for _ in range(100):
        x.normal_()
        numbers.copy_(torch.tensor(generator.sample(range(-2, 7), 3)))  # some out of range
        graph.replay()
        step(eager, "eager")
        assert_same_bits(results["captured"], results["eager"])
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert torch.equal(captured.tensors.state, eager.tensors.state)
    assert not captured.tensors.workspace[:1024].any()


def test_lengths_during_capture_raise() -> None:
    cache, other = make_cache(GPU), make_cache(GPU)
    key = torch.ones(2, 8, device=GPU)
    cache.append_all(key.expand(2, 2, 8), key.expand(2, 2, 8))
    for call in (
        lambda: len(cache),
        cache.lengths,
        lambda: cache.position,
        cache.is_empty,
        lambda: cache.get_valid_f32(0),
        lambda: cache.get_range_f32(0, 0, 1),
        lambda: cache.get_range_raw(0, 0, 1),
        lambda: cache.truncate(0),
        lambda: cache.truncate([0]),
        lambda: cache.truncate(torch.zeros(1, dtype=torch.int64, device=GPU), sequences=[0]),
        lambda: cache.drop_newest(0),
        lambda: cache.drop_newest([0]),
        lambda: cache.drop_newest(torch.zeros(1, dtype=torch.int64, device=GPU), sequences=[0]),
        lambda: cache.reset([0]),
        lambda: cache.reorder([0]),
        lambda: cache.copy_sequence(0, 0),
        lambda: cache.copy_sequence(0, 0, source=other),
        lambda: cache.append(0, key, key, sequences=[0]),
        lambda: cache.attend(0, key, sequences=[0]),
    ):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scratch = key * 2  # a capture of nothing would warn
            with pytest.raises(RuntimeError, match="CUDA graph capture"):
                call()
        del scratch
    assert len(cache) == 1


def test_lengths_stay_exact_without_synchronising() -> None:
    """On the usual path no call waits for the device; after a device-side length the first look does."""
    cache = make_cache(GPU, batch_size=2, sink_positions=1)
    key = torch.ones(2, 3, 2, 8, device=GPU)
    lengths = torch.tensor([3, 1], device=GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in range(2):
            cache.append(layer, key, key)
        assert (len(cache), cache.position) == (3, 3)
        cache.truncate(2)
        cache.get_valid_f32(0)
        cache.get_range_raw(1, 0, 2)
        cache.gather(0, lengths)
        cache.append_all(key.expand(2, 2, 3, 2, 8), key.expand(2, 2, 3, 2, 8))
        assert len(cache) == 5
        cache.append_all(key.expand(2, 2, 3, 2, 8), key.expand(2, 2, 3, 2, 8))
        cache.truncate([3, 7])
        cache.reorder([1, 0])
        assert (len(cache), cache.position) == (3, 7)
        cache.copy_sequence(0, 1)
        assert len(cache) == 7
        cache.reset([0])
        assert (len(cache), cache.position) == (0, 7)
        cache.reset()
        cache.append_all(key.expand(2, 2, 3, 2, 8), key.expand(2, 2, 3, 2, 8))
        cache.truncate(2, sequences=[0, 1])
        cache.append_all(key.expand(2, 2, 3, 2, 8), key.expand(2, 2, 3, 2, 8))
        assert len(cache) == 5
        cache.append(0, key[:1], key[:1], sequences=[1])
        cache.append_all(key[:1].expand(2, 1, 3, 2, 8), key[:1].expand(2, 1, 3, 2, 8), sequences=[0])
        assert (len(cache), cache.position) == (5, 8)
        cache.truncate(5)
        cache.append(0, key, key, new_lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.cache_seqlens.tolist() == [[8, 6], [5, 5]]
    assert (len(cache), cache.position) == (5, 8)
    cache.append(1, key, key)
    assert (len(cache), cache.position) == (6, 8)
    cache.reorder(lengths - 2)  # -> [1, -1]: out of range leaves a sequence as it is
    assert cache.cache_seqlens.tolist() == [[6, 6], [8, 8]]
    assert (len(cache), cache.position) == (6, 8)
    cache.truncate(lengths)
    assert (len(cache), cache.position) == (1, 3)


def test_host_lengths_of_copies_between_caches() -> None:
    """Exact without a synchronisation as long as both caches' are, and right after one where they are not."""
    source = make_cache(GPU, batch_size=3, sink_positions=1)
    cache = make_cache(GPU, batch_size=2, max_positions=5, sink_positions=1)
    key = torch.ones(2, 3, 3, 2, 8, device=GPU)
    numbers = torch.tensor([2, 0], device=GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        source.append_all(key, key)
        source.append_all(key[:, :1], key[:, :1], sequences=[2])
        source.append(0, key[0, :1], key[0, :1], sequences=[1])
        assert source.lengths() == [3, 3, 6]
        cache.copy_sequence([2, 1], [0, 1], source=source)
        assert (cache.lengths(), cache.position) == ([5, 3], 6)
        cache.drop_newest(1)
        assert (cache.lengths(), cache.position) == ([4, 2], 5)
        cache.drop_newest([2, 0])
        assert (cache.lengths(), cache.position) == ([2, 2], 5)
        cache.drop_newest(1, sequences=[1])
        assert (cache.lengths(), cache.position) == ([2, 1], 4)
        source.drop_newest([0, 3], sequences=[0, 1])
        assert source.lengths() == [3, 0, 6]
        cache.append_all(key[:, :2], key[:, :2])
        assert cache.lengths() == [5, 4]
        held = cache.device_lengths()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert held.tolist() == [[5, 5], [5, 4]]
    assert cache.cache_seqlens.tolist() == [[6, 7], [6, 4]]

    def check(of: StreamingKVCacheFp16) -> None:
        """What the host says is what the device has."""
        want = of.device_lengths().amin(0).tolist()
        assert (of.lengths(), len(of), of.position) == (want, min(want), int(of.cache_seqlens.max()))

    source.append_all(key, key, new_lengths=torch.tensor([1, 0, 3], device=GPU))  # the source's are not known
    cache.copy_sequence([0, 1], [1, 0], source=source)
    check(cache)
    check(source)
    cache.append_all(key[:, :2], key[:, :2])
    check(cache)
    cache.copy_sequence(numbers, [0, 1], source=source)  # the sources are not known
    check(cache)
    cache.copy_sequence([1, 2], numbers // 2, source=source)  # the destinations are not known
    check(cache)
    cache.drop_newest(torch.tensor([1, 9], device=GPU))
    check(cache)
    cache.drop_newest(1, sequences=numbers[1:])
    check(cache)
    graph = capture(lambda: source.append_all(key, key))  # from here on the source's are never known
    for _ in range(3):
        graph.replay()
        cache.copy_sequence([0, 2], [0, 1], source=source)
        check(cache)
        check(source)
    graph = capture(lambda: cache.drop_newest(1, sequences=numbers))
    source.append_all(key, key)
    for _ in range(3):
        cache.copy_sequence(2, 0, source=source)
        graph.replay()
        check(cache)


def test_out_calls_allocate_nothing() -> None:
    cache = make_cache(GPU, num_layers=1, max_positions=64)
    key = torch.ones(5, 2, 8, device=GPU)
    indices = torch.arange(5, device=GPU)
    out = (torch.empty(5, 2, 8, device=GPU), torch.empty(5, 2, 8, device=GPU))
    query = torch.randn(5, 4, 8, device=GPU)
    answer = torch.empty_like(query)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        cache.append(0, key, key)
        cache.gather(0, indices, out=out)
        cache.get_range_f32(0, 0, 5, out=out)
        cache.attend(0, query, out=answer)
        cache.append_attend(0, query[0], key[0], key[0], out=answer[0])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_current_stream_is_used() -> None:
    """Work queued behind a slow kernel on another stream waits for it, and only for it."""
    cache = make_cache(GPU, num_layers=1, max_positions=64)
    source = torch.zeros(16, 2, 8, device=GPU)
    stream = torch.cuda.Stream()
    source.fill_(1.0)
    cache.append(0, source, source)  # loading a kernel may wait for the GPU
    cache.get_valid_f32(0)
    cache.clear()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        source.fill_(3.0)
        cache.append(0, source, source)
        keys, _ = cache.get_valid_f32(0)
    assert not stream.query()
    stream.synchronize()
    assert (keys == 3).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    with torch.cuda.device(0):
        twin = Twin(torch.device("cuda:1"), sink_positions=1)
        for _ in range(5):
            twin.append(0, torch.randn(1, 3, 2, 8, device="cuda:1"), torch.randn(1, 3, 2, 8, device="cuda:1"))
            twin.check()
        assert torch.cuda.current_device() == 0


def test_a_large_replay_run_is_eager_bit_for_bit() -> None:
    """Ten thousand steps of a wrapping cache at the size of a real layer: the tickets and lengths never slip."""
    captured, eager = (
        make_cache(GPU, num_layers=4, max_positions=129, num_heads=32, head_dim=128, sink_positions=4) for _ in range(2)
    )
    pool = torch.randn(64, 4, 32, 128, device=GPU)
    step = torch.zeros(1, dtype=torch.int64, device=GPU)

    def run(cache: StreamingKVCacheFp16, counter: torch.Tensor) -> None:
        rows = pool.index_select(0, counter % 64)[0]
        for layer in range(4):
            cache.append(layer, rows[layer], rows[layer - 1])
        counter += 1

    graph = capture(lambda: run(captured, step))
    eager_step = torch.zeros_like(step)
    for _ in range(10_000):
        graph.replay()
        run(eager, eager_step)
    assert captured.position == eager.position == 10_000
    assert torch.equal(captured.tensors.state, eager.tensors.state)
    assert_same_bits(captured.k_cache, eager.k_cache)
    assert_same_bits(captured.v_cache, eager.v_cache)
