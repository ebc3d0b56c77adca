"""Streams, threads, processes, devices, deletion, forks, copies and pickles: as docs/reliability.md has them."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import Twin, assert_same_bits, make_cache, needs_gpu, poison

from kvcache_ext import StreamingKVCacheFp16, memory

GPU = torch.device("cuda")
on_gpu = [needs_gpu, pytest.mark.gpu]
SHAPE = {"num_layers": 2, "max_positions": 48, "num_heads": 2, "head_dim": 64, "sink_positions": 3}


def walk(cache: StreamingKVCacheFp16, seed: int, steps: int, layers: tuple[int, ...] = (0, 1)) -> list[torch.Tensor]:
    """The same calls for the same seed, over several wraps; what they answered."""
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for step in range(steps):
        rows = (1, 1, 5, 1, 20, 70)[step % 6]  # 20 and 70: as a prompt has them
        layer = layers[step % len(layers)]
        x = torch.randn(1, rows, 4, cache.head_dim, generator=generator).to(cache.device)
        if step % 3 == 0:
            cache.append(layer, x[:, :, :2], x[:, :, 2:] * 1e5)  # some values overflow
            answers.append(cache.attend(layer, x))
        else:
            answers.append(cache.append_attend(layer, x, x[:, :, :2], x[:, :, 2:]))
        answers.extend(cache.get_valid_f32(layer))
    return answers


def assert_same_answers(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def assert_close_answers(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """For another device: what was stored and read back is the same, attention as close as its stated error."""
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert (a.cpu().double() - b.cpu().double()).norm() <= 1e-5 * b.cpu().double().norm()


def assert_same_cache(got: StreamingKVCacheFp16, want: StreamingKVCacheFp16) -> None:
    """All that is held, the lengths and the counters."""
    assert (len(got), got.position) == (len(want), want.position)
    assert torch.equal(got.cache_seqlens.cpu(), want.cache_seqlens.cpu())
    assert torch.equal(got.overflow_counts().cpu(), want.overflow_counts().cpu())
    for layer in range(want.num_layers):
        for a, b in zip(got.get_valid_f32(layer), want.get_valid_f32(layer), strict=True):
            assert_same_bits(a.cpu(), b.cpu())


# Threads


def run_in_threads(*calls: Callable[[], None]) -> None:
    """All at once; what one of them raises is raised here."""
    errors: list[BaseException] = []
    together = threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        try:
            together.wait()
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_each_with_its_own_cache(device: torch.device) -> None:
    """On a GPU each on a stream of its own."""
    want = [walk(make_cache(device, **SHAPE), seed, 30) for seed in (1, 2)]
    got: list[list[torch.Tensor]] = [[], []]

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext():
            got[number] = walk(make_cache(device, **SHAPE), number + 1, 30)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()

    run_in_threads(lambda: work(0), lambda: work(1))
    for g, w in zip(got, want, strict=True):
        assert_same_answers(g, w)


def test_two_threads_on_one_cache_under_a_lock(device: torch.device) -> None:
    """Each works on a layer of its own, so that their order is of no consequence, on the stream that both have."""
    want_cache, cache = (make_cache(device, **SHAPE) for _ in range(2))
    want = [walk(want_cache, layer + 5, 24, (layer,)) for layer in range(2)]
    got: list[list[torch.Tensor]] = [[], []]
    lock = threading.Lock()

    class Locked:
        """The cache, one call at a time."""

        def __getattr__(self, name: str) -> object:
            value = getattr(cache, name)
            if not callable(value):
                return value

            def call(*arguments: object, **options: object) -> object:
                with lock:
                    return value(*arguments, **options)

            return call

    def work(layer: int) -> None:
        got[layer] = walk(Locked(), layer + 5, 24, (layer,))  # type: ignore[arg-type]

    run_in_threads(lambda: work(0), lambda: work(1))
    for g, w in zip(got, want, strict=True):
        assert_same_answers(g, w)
    assert_same_cache(cache, want_cache)


# Processes


def walk_in_process(device: str, seed: int, connection: object) -> None:
    answers = walk(make_cache(torch.device(device), **SHAPE), seed, 18)
    connection.send([answer.cpu().numpy() for answer in answers])  # type: ignore[attr-defined]


def test_two_processes_on_one_device(device: torch.device) -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for seed in (3, 4):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=walk_in_process, args=(str(device), seed, sender)))
        processes[-1].start()
        pipes.append(receiver)
    for seed, pipe, process in zip((3, 4), pipes, processes, strict=True):
        assert pipe.poll(300), "no answer from the process"
        got = [torch.from_numpy(answer) for answer in pipe.recv()]
        process.join(60)
        assert process.exitcode == 0
        assert_same_answers(got, [answer.cpu() for answer in walk(make_cache(device, **SHAPE), seed, 18)])


def walk_what_was_sent(cache: StreamingKVCacheFp16, queue: object) -> None:
    queue.put((cache, walk(cache, 9, 6)[-1].cpu().numpy()))  # type: ignore[attr-defined]


def test_a_cache_sent_to_another_process_is_a_copy(device: torch.device) -> None:
    """As an argument and through a queue. The one that was sent stays where it is, and what it is."""
    cache, want = (make_cache(device, **SHAPE) for _ in range(2))
    for c in (cache, want):
        walk(c, 1, 12)
    addresses = cache.k_cache.data_ptr(), cache.tensors.state.data_ptr()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=walk_what_was_sent, args=(cache, queue))
    process.start()
    sent_back, answer = queue.get(timeout=300)
    process.join(60)
    assert process.exitcode == 0
    assert (cache.k_cache.data_ptr(), cache.tensors.state.data_ptr()) == addresses
    assert_same_cache(cache, want)
    assert_same_answers([torch.from_numpy(answer)], [walk(want, 9, 6)[-1].cpu()])
    assert_same_cache(sent_back, want)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "state"])
def test_memory_that_torch_moves_is_noticed(device: torch.device, name: str, tmp_path: Path) -> None:
    """No call goes on where the memory was. What there is can be copied."""
    cache, want = (make_cache(device, **SHAPE) for _ in range(2))
    for c in (cache, want):
        walk(c, 1, 12)
    tensor = getattr(cache.tensors, name)
    with torch.no_grad():
        tensor.set_(tensor.clone()) if device.type == "cuda" else tensor.share_memory_()
    x = torch.ones(2, 64, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    calls: list[Callable[[], object]] = [
        lambda: cache.append(0, x, x),
        lambda: cache.append_all(x.expand(2, 2, 64), x.expand(2, 2, 64)),
        lambda: cache.attend(0, x),
        lambda: cache.attend(0, x.expand(20, 2, 64)),
        lambda: cache.append_attend(0, x, x, x),
        lambda: cache.append_attend(0, *(x.expand(20, 2, 64),) * 3),
        lambda: cache.gather(0, index),
        lambda: cache.get_range_f32(0, 0, 1),
        lambda: cache.get_range_raw(0, 0, 1),
        lambda: cache.get_valid_f32(0),
        lambda: cache.truncate(1),
        lambda: cache.reset(),
        lambda: cache.reorder([0]),
        lambda: cache.copy_sequence(0, 0),
        lambda: cache.copy_sequence(0, 0, source=make_cache(cache.device, **SHAPE)),
        lambda: make_cache(cache.device, **SHAPE).copy_sequence(0, 0, source=cache),
        lambda: cache.drop_newest(1),
        lambda: cache.lengths(),
        lambda: cache.clear(),
        lambda: len(cache),
        lambda: cache.position,
        lambda: cache.is_empty(),
        lambda: cache.save(tmp_path / "file"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="the cache's memory has been moved"):
            call()
    assert_same_cache(copy.deepcopy(cache), want)


def test_a_forked_process_has_a_copy() -> None:
    """Of a CPU cache. With one thread: torch's own threads do not survive a fork, and waiting for them has no end."""
    cache, want = (make_cache(torch.device("cpu"), **SHAPE) for _ in range(2))
    big = torch.randn(1, 48, 2, 64)
    for c in (cache, want):
        c.append_all(big.expand(2, 1, 48, 2, 64), big.expand(2, 1, 48, 2, 64))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        sender.send([answer.numpy() for answer in walk(cache, 7, 12)])

    process = context.Process(target=child)
    process.start()
    assert receiver.poll(120), "no answer from the fork"
    got = [torch.from_numpy(answer) for answer in receiver.recv()]
    process.join(60)
    assert process.exitcode == 0
    assert_same_cache(cache, want)  # nothing of what the child did
    assert_same_answers(got, walk(want, 7, 12))


# Copies and pickles


def torch_saved(cache: StreamingKVCacheFp16) -> StreamingKVCacheFp16:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([StreamingKVCacheFp16]):
        return torch.load(buffer)


COPIES: dict[str, Callable[[StreamingKVCacheFp16], StreamingKVCacheFp16]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": torch_saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("inference", [False, True])
def test_copies_hold_the_same_and_share_nothing(device: torch.device, how: str, inference: bool) -> None:
    cache, want = (make_cache(device, overflow="inf", **SHAPE) for _ in range(2))
    for c in (cache, want):
        walk(c, 1, 12)
    with torch.inference_mode(inference):
        other = COPIES[how](cache)
    assert repr(other) == repr(cache)
    tensors = [t for c in (cache, other) for t in c.tensors if isinstance(t, torch.Tensor)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) == 10
    assert not any(t.is_inference() for t in tensors)  # or torch could not change them outside of inference mode
    assert_same_cache(other, want)
    assert_same_answers(walk(other, 2, 18), walk(want, 2, 18))
    poison(other)
    other.clear()
    assert (len(other), int(other.overflow_counts().sum())) == (0, 0)
    again = make_cache(device, overflow="inf", **SHAPE)
    walk(again, 1, 12)
    assert_same_cache(cache, again)


def test_a_copy_compiles(device: torch.device) -> None:
    """Also by a compiler that writes to the cache through torch (aot_eager), also of a copy made in inference mode."""
    cache = make_cache(device, **SHAPE)
    walk(cache, 1, 6)
    with torch.inference_mode():
        other = copy.deepcopy(cache)
    x = torch.randn(1, 1, 4, 64, device=device)

    def step(c: StreamingKVCacheFp16) -> torch.Tensor:
        return c.append_attend(0, x, x[:, :, :2], x[:, :, 2:])

    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(other), step(cache))
        assert_same_cache(other, cache)


def test_a_deep_copy_of_a_structure_keeps_its_shape(device: torch.device) -> None:
    """One cache that is named twice is one copy."""
    cache = make_cache(device, **SHAPE)
    walk(cache, 1, 3)
    pair = copy.deepcopy({"a": cache, "b": cache})
    assert pair["a"] is pair["b"] is not cache
    assert_same_cache(pair["a"], cache)


def test_unpickled_where_torch_put_it() -> None:
    """A pickle of another device's cache: where torch.load's map_location puts the tensors is where the cache is."""
    cache = make_cache(torch.device("cpu"), **SHAPE)
    walk(cache, 1, 6)
    state = cache.__getstate__() | {"device": torch.device("cuda", 7)}
    other = StreamingKVCacheFp16.__new__(StreamingKVCacheFp16)
    other.__setstate__(copy.deepcopy(state))
    assert other.device == torch.device("cpu")
    other.append_all(torch.ones(2, 2, 64), torch.ones(2, 2, 64))
    other.reorder([0])  # a list, which goes to the cache's device
    assert other.position == cache.position + 1


@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.gpu
@needs_gpu
def test_pickles_cross_devices(source: str, target: str) -> None:
    cache = make_cache(torch.device(source), **SHAPE)
    walk(cache, 1, 12)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    other = torch.load(buffer, map_location=target, weights_only=False)
    assert other.device.type == other.k_cache.device.type == target
    assert other.tensors.workspace.numel() == memory.workspace_floats(other.device, other.head_dim, other.batch_size)
    assert_same_cache(other, cache)
    assert_close_answers(walk(other, 2, 18), walk(cache, 2, 18))
    assert_same_cache(other, cache)


def test_the_memory_of_a_deleted_cache_can_be_used_again(device: torch.device) -> None:
    """Caches come and go at the same addresses: lengths on the host belong to the cache, not to the address."""
    addresses = set()
    for i in range(1_000):  # behind other tests the allocator may have many free places of that size
        if i >= 20 and len(addresses) < i:
            break
        cache = make_cache(device, **SHAPE)
        addresses.add(cache.tensors.state.data_ptr())
        assert (len(cache), cache.position) == (0, 0)
        walk(cache, i, 1 + i % 3)
        assert cache.position > 0
        del cache
    assert len(addresses) < i  # or this shows nothing


# GPUs


@pytest.mark.gpu
@needs_gpu
def test_two_streams_in_turn() -> None:
    """Each waits for the other's last call: a cache is used by one stream at a time, whichever it is."""
    cache, want = (make_cache(GPU, **SHAPE) for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]
    x = torch.randn(60, 1, 1, 4, 64, device=GPU)
    torch.cuda.synchronize()
    got, last = [], torch.cuda.Event()
    last.record()
    for step, row in enumerate(x):
        with torch.cuda.stream(streams[step % 2]):
            torch.cuda.current_stream().wait_event(last)
            if step % 7 == 0:
                torch.cuda._sleep(5_000_000)  # without the wait the other stream would be ahead
            got.append(cache.append_attend(0, row, row[:, :, :2], row[:, :, 2:]))
            last = torch.cuda.Event()
            last.record()
    torch.cuda.current_stream().wait_event(last)
    for row, answer in zip(x, got, strict=True):
        assert_same_bits(answer, want.append_attend(0, row, row[:, :, :2], row[:, :, 2:]))
    assert torch.equal(cache.tensors.state, want.tensors.state)
    assert_same_bits(cache.get_valid_f32(0)[1], want.get_valid_f32(0)[1])


@pytest.mark.gpu
@needs_gpu
def test_a_cache_deleted_while_its_kernels_run() -> None:
    """Its memory goes to what is allocated next on the stream, whose writes come after the kernels."""
    gc.collect()
    torch.cuda.empty_cache()  # else other memory of that size is taken first
    shape = {"num_layers": 1, "max_positions": 4096, "num_heads": 8, "head_dim": 128}
    x = torch.randn(1, 4096, 8, 128, device=GPU)
    query = torch.randn(1, 1, 8, 128, device=GPU)
    want_cache = make_cache(GPU, **shape)
    want_cache.append(0, x, x)
    want = want_cache.attend(0, query)
    del want_cache
    torch.cuda.synchronize()
    cache = make_cache(GPU, **shape)
    address = cache.k_cache.data_ptr()
    torch.cuda._sleep(2_000_000_000)
    cache.append(0, x, x)
    answers = [cache.attend(0, query) for _ in range(20)]
    assert not torch.cuda.current_stream().query()  # they are still to come
    del cache
    overwriting = [torch.full((1, 1, 4096, 8, 128), float("nan"), dtype=torch.float16, device=GPU) for _ in range(4)]
    assert not torch.cuda.current_stream().query()
    assert address in {t.data_ptr() for t in overwriting}  # or this shows nothing
    for answer in answers:
        assert_same_bits(answer, want)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_and_its_cache() -> None:
    """Copies of a cache that a graph moves are the cache as it stands, and the graph does not know of them.

    That a graph must not be replayed after its cache is gone is the caller's affair: it writes to where the cache was.
    """
    cache, want = (make_cache(GPU, **SHAPE) for _ in range(2))
    x = torch.empty(1, 1, 4, 64, device=GPU)
    out = torch.empty_like(x)
    for c in (cache, want):
        walk(c, 1, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append_attend(0, x, x[:, :, :2], x[:, :, 2:], out=out)
        cache.append(1, x[:, :, :2], x[:, :, 2:])
    for i in range(60):
        x.normal_()
        graph.replay()
        assert_same_bits(out, want.append_attend(0, x, x[:, :, :2], x[:, :, 2:]))
        want.append(1, x[:, :, :2], x[:, :, 2:])
        if i % 20 == 0:
            for how in COPIES.values():
                other = how(cache)
                assert_same_cache(other, want)
                walk(other, i, 6)
                poison(other)
    assert_same_cache(cache, want)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_call_on_a_device_that_is_not_current(tmp_path: Path) -> None:
    device = torch.device("cuda:1")
    with torch.cuda.device(0):
        twin = Twin(device, batch_size=3, sink_positions=1, max_positions=12)
        key = torch.randn(3, 4, 2, 8, device=device)
        for _ in range(4):
            twin.append(0, key, key * 2, torch.tensor([4, 1, 2], device=device))
            twin.append_all(key.expand(2, 3, 4, 2, 8), key.expand(2, 3, 4, 2, 8))
            twin.append(1, key[:2], key[1:], sequences=[2, 0])
            twin.reorder([1, 2, 0])
            twin.copy_sequence(0, 2)
            twin.check()
            twin.truncate([3, 2, 4])
            twin.reset([1])
            twin.check()
        cache = make_cache(device, **SHAPE)
        want = make_cache(torch.device("cuda:0"), **SHAPE)
        answers = walk(cache, 1, 18)
        assert {answer.device for answer in answers} == {device}
        assert_close_answers(answers, walk(want, 1, 18))
        assert_same_cache(copy.deepcopy(cache), want)
        cache.save(tmp_path / "file")
        loaded = StreamingKVCacheFp16.load(tmp_path / "file", device=device)
        assert_same_cache(loaded, want)
        for got, there in zip(loaded.get_range_raw(1, 3, 20), want.get_range_raw(1, 3, 20), strict=True):
            assert got.device == device and torch.equal(got.cpu(), there.cpu())
        loaded.clear()
        assert loaded.is_empty() and len(cache) == len(want)
        assert torch.cuda.current_device() == 0
