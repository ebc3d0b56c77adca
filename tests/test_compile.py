"""torch.compile(fullgraph=True) and opcheck: the registered ops are what the dispatcher needs."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, make_cache

from kvcache_ext import StreamingKVCacheFp16


def op_samples(device: torch.device) -> list[tuple[str, tuple[object, ...]]]:
    c = make_cache(device, batch_size=2, sink_positions=1)
    c.append_all(torch.randn(2, 2, 3, 2, 8, device=device), torch.randn(2, 2, 3, 2, 8, device=device))
    c.k_cache.nan_to_num_(1.0)  # opcheck compares with ==
    c.v_cache.nan_to_num_(1.0)
    tensors = c.tensors[:4]
    key = torch.randn(2, 2, 2, 8, device=device).transpose(1, 2)
    keys = torch.randn(2, 2, 4, 2, 8, device=device)
    lengths = torch.tensor([1, 0], device=device)
    indices = torch.tensor([[2, 0], [5, 1]], device=device)
    out = (torch.zeros(2, 2, 2, 8, device=device), torch.zeros(2, 2, 2, 8, device=device))
    query = torch.randn(2, 2, 4, 8, device=device)
    answer, lse = torch.zeros_like(query), torch.zeros(2, 2, 4, device=device)
    prompt, long_key = (torch.randn(2, 20, heads, 8, device=device) for heads in (4, 2))
    long_answer, long_lse = torch.zeros_like(prompt), torch.zeros(2, 20, 4, device=device)
    reading = (*c.tensors[:3], c.tensors.workspace)
    writing = (*tensors, c.tensors.workspace)
    other = make_cache(device, batch_size=3, max_positions=5, sink_positions=1)
    other.append_all(torch.randn(2, 3, 7, 2, 8, device=device), torch.randn(2, 3, 7, 2, 8, device=device))
    source = (other.k_cache, other.v_cache, other.tensors.state)
    return [
        ("attend", (*reading, 1, query, 1, 0.35, 0, 0.0, answer, lse)),
        ("attend", (*reading, 1, query[:, :1], 1, 0.35, 3, 2.0, answer[:, :1].clone(), None)),
        ("append_attend", (*writing, 1, query, key, key, None, 1, True, 0.35, 0, 0.0, answer, lse)),
        ("attend", (*reading, 0, prompt, 1, 0.35, 0, 0.0, long_answer, long_lse)),
        ("attend", (*reading, 1, prompt, 1, 0.35, 3, 2.0, long_answer, None, lengths, True)),
        ("append_attend", (*writing, 0, prompt, long_key, long_key, None, 1, True, 0.35, 0, 0.0, long_answer, None)),
        ("append_attend", (*writing, 1, prompt, long_key, long_key, lengths * 17, 1, True, 0.35, 3, 2.0, long_answer,
                           long_lse, lengths, True)),
        ("append_attend", (*writing, 0, query, key, key, lengths, 1, False, 0.35, 2, 0.0, answer, None)),
        ("append", (*tensors, 1, key, key * 2, None, 1, True)),
        ("append", (*tensors, 0, key.half(), key.half(), lengths, 1, False)),
        ("append_all", (*tensors, keys, keys, None, 1, True)),
        ("append_all", (*tensors, keys.bfloat16(), keys.bfloat16(), lengths, 1, True)),
        ("gather", (*c.tensors[:3], 1, indices, 1, torch.float32)),
        ("gather", (*c.tensors[:3], 0, indices[0], 1, torch.bfloat16)),
        ("gather_out", (*c.tensors[:3], 1, indices, 1, *out)),
        ("append", (*tensors, 1, key[:1], key[:1], None, 1, True, lengths[:1])),
        ("append_all", (*tensors, keys[:, :1], keys[:, :1], None, 1, True, lengths[1:])),
        ("gather", (*c.tensors[:3], 1, indices[:1], 1, torch.float32, lengths[1:])),
        ("gather_out", (*c.tensors[:3], 1, indices, 1, *out, lengths)),
        ("attend", (*reading, 1, query, 1, 0.35, 0, 0.0, answer, lse, lengths)),
        ("append_attend", (*writing, 1, query, key, key, None, 1, True, 0.35, 0, 0.0, answer, lse, lengths)),
        ("truncate", (c.k_cache, c.tensors.state, 2, 1)),
        ("truncate", (c.k_cache, c.tensors.state, 0, 1, lengths, lengths)),
        ("truncate", (c.k_cache, c.tensors.state, 2, 1, None, None, True)),
        ("truncate", (c.k_cache, c.tensors.state, 0, 1, lengths, lengths, True)),
        ("reset", (c.k_cache, c.tensors.state, lengths[:1], 1)),
        ("copy_sequences", (*tensors[:3], lengths, None, 1)),
        ("copy_sequences", (*tensors[:3], lengths[:1], lengths[1:], 1)),
        ("copy_from", (*tensors[:3], *source, lengths, lengths.flip(0), 1)),
        ("copy_from", (*tensors[:3], *source, lengths[:1].int(), lengths[1:].int(), 1)),
        ("clear", (c.k_cache, c.tensors.state, c.tensors.overflow_counts, 1)),
    ]  # fmt: skip


SAMPLES = len(op_samples(torch.device("cpu")))


@pytest.mark.parametrize("sample", range(SAMPLES))
def test_opcheck(device: torch.device, sample: int) -> None:
    name, arguments = op_samples(device)[sample]
    torch.library.opcheck(getattr(torch.ops.kvcache_ext, name).default, arguments)


def test_every_op_is_checked(device: torch.device) -> None:
    names = {name for name, _ in op_samples(device)}
    registered = {
        schema.name.removeprefix("kvcache_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("kvcache_ext::")
    }
    assert names == registered


def decoder_step(cache: StreamingKVCacheFp16, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Something like a model: every layer appends a function of its input and reads back what it holds."""
    for layer in range(cache.num_layers):
        key = torch.sin(hidden).view(1, 1, cache.num_heads, cache.head_dim)
        cache.append(layer, key, key * 2 + cache.cache_seqlens[layer, 0])
        keys, values = cache.gather(layer, indices)
        hidden = hidden + (keys * values).sum(0).flatten().tanh()
    return hidden


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_is_the_eager_one(device: torch.device, mode: str) -> None:
    if mode == "reduce-overhead" and device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    torch._dynamo.reset()
    eager, compiled = (make_cache(device, sink_positions=1) for _ in range(2))
    step = torch.compile(decoder_step, fullgraph=True, mode=mode)
    indices = torch.arange(8, device=device)
    addresses = compiled.k_cache.data_ptr(), compiled.tensors.state.data_ptr()
    for i in range(20):
        hidden = torch.randn(16, device=device)
        want = decoder_step(eager, hidden, indices)
        got = step(compiled, hidden, indices)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert compiled.position == eager.position == i + 1
        assert len(compiled) == len(eager) == min(i + 1, 8)
    assert torch.equal(compiled.tensors.state, eager.tensors.state)
    assert (compiled.k_cache.data_ptr(), compiled.tensors.state.data_ptr()) == addresses


def test_compiled_code_does_not_copy_the_cache(device: torch.device) -> None:
    """Inductor must change the cache in place: a clone of it would cost gigabytes a step."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    cache = make_cache(device, max_positions=4096)
    indices = torch.arange(8, device=device)
    step = torch.compile(decoder_step, fullgraph=True)
    _, sources = run_and_get_code(step, cache, torch.randn(16, device=device), indices)
    source = "\n".join(sources)
    assert "kvcache_ext.append" in source
    assert f"empty_strided_{device.type}((2, 1, 4096, 2, 8)" not in source  # a buffer of the cache's shape
    assert str(cache.k_cache.numel()) not in source  # a loop over the cache's elements


def attention_step(cache: StreamingKVCacheFp16, hidden: torch.Tensor) -> torch.Tensor:
    """A small decoder: each layer appends, attends, and hands its answer on, to the next one's query.

    Keys and values are exact in eager and compiled code alike. Were they computed from answers, a last bit of those
    could round them to the next FP16 number.
    """
    whole = hidden.view(1, 1, 2 * cache.num_heads, cache.head_dim)
    for layer in range(cache.num_layers):
        query = torch.sin(hidden).view(whole.shape)
        key = -whole[:, :, : cache.num_heads]
        answer, lse = cache.append_attend(layer, query, key, key * 2, return_lse=True)
        again = cache.attend(layer, query, window=3)
        hidden = hidden + answer.flatten() + again.flatten() * lse.mean()
    return hidden


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_attention_step_is_the_eager_one(device: torch.device, mode: str) -> None:
    if mode == "reduce-overhead" and device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    torch._dynamo.reset()
    eager, compiled = (make_cache(device, sink_positions=1) for _ in range(2))
    step = torch.compile(attention_step, fullgraph=True, mode=mode)
    for i in range(20):
        hidden = torch.randn(32, device=device)
        torch.testing.assert_close(step(compiled, hidden), attention_step(eager, hidden), rtol=1e-4, atol=1e-4)
        assert compiled.position == eager.position == i + 1
    assert_same_bits(compiled.k_cache, eager.k_cache)
    assert_same_bits(compiled.v_cache, eager.v_cache)


def test_options_are_checked_in_compiled_code(device: torch.device) -> None:
    cache = make_cache(device)
    query = torch.randn(2, 8, device=device)
    for options, match in (
        ({"window": 0}, "must be positive or None, got 0"),
        ({"softcap": 0.0}, "must be positive or None, got 0"),
        ({"scale": 3e38}, r"attend: scale must be finite and at most 2\^86"),
        ({"scale": float("nan")}, r"attend: scale must be finite and at most 2\^86"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=match):
            torch.compile(lambda q, o=options: cache.attend(0, q, **o))(query)
        with pytest.raises(Exception, match=match):
            torch.compile(lambda q, o=options: cache.append_attend(0, q, q, q, **o))(query)
    assert cache.position == 0


OPTIONS = {
    "none": {}, "scale": {"scale": 0.9}, "window": {"window": 3}, "softcap": {"softcap": 0.3},
    "all": {"scale": -1.5, "window": 5, "softcap": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 512])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_mean_the_same_in_compiled_code(device: torch.device, options: str, rows: int, head_dim: int) -> None:
    """Each option of attend and append_attend, of few and of many queries, changes the answer as it does in eager."""
    given = OPTIONS[options]
    eager, compiled, plain = (make_cache(device, num_layers=1, max_positions=64, head_dim=head_dim) for _ in range(3))
    query = torch.randn(1, rows, 4, head_dim, device=device)
    held = torch.randn(1, 9, 2, head_dim, device=device)
    for cache in (eager, compiled, plain):
        cache.append(0, held, held)

    def calls(cache: StreamingKVCacheFp16, query: torch.Tensor, **o: object) -> list[torch.Tensor]:
        key = query[:, :, :2]
        answers = [*cache.attend(0, query, return_lse=True, **o)]
        answers += cache.append_attend(0, query, key, -key, return_lse=True, **o)
        answers.append(cache.append_attend(0, query, key, -key, out=torch.zeros_like(query), **o))
        answers.append(cache.attend(0, query, out=torch.zeros_like(query), **o))
        return answers

    torch._dynamo.reset()
    want = calls(eager, query, **given)
    got = torch.compile(lambda q: calls(compiled, q, **given), fullgraph=True, backend="aot_eager")(query)
    for g, w, p in zip(got, want, calls(plain, query), strict=True):
        assert_same_bits(g, w)
        assert not given or not torch.allclose(w, p, rtol=1e-3)
    assert_same_bits(compiled.k_cache, eager.k_cache)
    assert torch.equal(compiled.tensors.state, eager.tensors.state)


WRONG_LONG_CALLS = {
    "fewer keys": (lambda c, q, k: c.append_attend(0, q, k[:, :5], k[:, :5]), "as many positions"),
    "no value": (lambda c, q, k: c.append_attend(0, q, k, None), "value must be"),
    "fewer values": (lambda c, q, k: c.append_attend(0, q, k, k[:, :5]), "value"),
    "heads of keys": (lambda c, q, k: c.append_attend(0, q, k[:, :, :1], k[:, :, :1]), "key must have shape"),
    **{
        f"scale {x}": (lambda c, q, k, x=x: c.attend(0, q, scale=x), r"attend: scale must be finite and at most 2\^86")
        for x in (float("nan"), float("-inf"), 3e38, -(2.0**86) * 1.01)
    },
    **{
        f"softcap {x}": (lambda c, q, k, x=x: c.attend(0, q, softcap=x), "softcap must be positive")
        for x in (float("nan"), float("inf"), 1e39, 1e-50)
    },
    "dtype": (lambda c, q, k: c.attend(0, q.double()), "query must be torch.float32"),
    "heads": (lambda c, q, k: c.attend(0, q[:, :, :3]), "multiple of the cache's 2 heads"),
    "head_dim": (lambda c, q, k: c.attend(0, q[..., :8]), "query must have shape"),
    "batch": (lambda c, q, k: c.attend(0, q.expand(2, *q.shape[1:])), "query must have shape"),
    "layer": (lambda c, q, k: c.attend(9, q), "layer must be from 0 to 1"),
    "dtype of out": (lambda c, q, k: c.attend(0, q, out=q.half()), "out must have the dtype"),
    "shape of out": (lambda c, q, k: c.attend(0, q, out=q.new_empty(3, *q.shape[1:])), "out must have the shape"),
}


@pytest.mark.parametrize("name", WRONG_LONG_CALLS)
def test_long_calls_are_checked_in_compiled_code(device: torch.device, name: str) -> None:
    call, match = WRONG_LONG_CALLS[name]
    cache = make_cache(device, head_dim=16, max_positions=64)
    query, key = torch.randn(1, 20, 4, 16, device=device), torch.randn(1, 20, 2, 16, device=device)
    cache.append(0, key, key)
    with pytest.raises(Exception, match=match):
        call(cache, query, key)
    for fullgraph in (False, True):
        torch._dynamo.reset()
        # With fullgraph the compiler does not pass the sentence on.
        with pytest.raises(Exception, match=None if fullgraph else match):
            torch.compile(lambda q, k: call(cache, q, k), backend="aot_eager", fullgraph=fullgraph)(query, key)
        assert cache.position == 20


WRONG_LISTS = {
    "append twice": lambda c, k: c.append(0, k, k, sequences=[1, 1]),
    "append below": lambda c, k: c.append(0, k, k, sequences=[-1, 0]),
    "append_all": lambda c, k: c.append_all(k.expand(2, *k.shape), k.expand(2, *k.shape), sequences=[0, 2]),
    "reset": lambda c, k: c.reset([7]),
    "reorder": lambda c, k: c.reorder([1, -1]),
    "copy_sequence from": lambda c, k: c.copy_sequence(5, [0]),
    "copy_sequence to": lambda c, k: c.copy_sequence([0, 1], [1, 1]),
    "copy_sequence from another": lambda c, k: c.copy_sequence(3, [0], source=c.source),
    "copy_sequence to this": lambda c, k: c.copy_sequence([2, 2], [0, 2], source=c.source),
    "copy_sequence twice to this": lambda c, k: c.copy_sequence([2, 2], [1, 1], source=c.source),
    "copy_sequence of other sinks": lambda c, k: c.copy_sequence(0, 0, source=c.of_other_sinks),
    "drop_newest": lambda c, k: c.drop_newest([1, -1]),
    "drop_newest of a fraction": lambda c, k: c.drop_newest([1.5, 1]),
    "drop_newest of truth": lambda c, k: c.drop_newest(True),
    "drop_newest of a sequence": lambda c, k: c.drop_newest(1, sequences=0),
    "copy_sequence of truth": lambda c, k: c.copy_sequence(True, 0),
    "drop_newest all": lambda c, k: c.drop_newest(-1),
    "drop_newest some": lambda c, k: c.drop_newest(1, sequences=[0, 0]),
    "truncate": lambda c, k: c.truncate([1, -1]),
    "truncate all": lambda c, k: c.truncate(-1),
    "truncate some": lambda c, k: c.truncate(1, sequences=[0, 0]),
    "gather": lambda c, k: c.gather(0, torch.arange(2, device=k.device), sequences=[2]),
    "attend": lambda c, k: c.attend(0, k, sequences=[0, 9]),
    "attend with many": lambda c, k: c.attend(0, k.repeat(1, 9, 1, 1), sequences=[0, 9]),
    "append_attend": lambda c, k: c.append_attend(0, k, k, k, sequences=[0, 0]),
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_lists_are_checked_in_compiled_code(device: torch.device, name: str) -> None:
    call = WRONG_LISTS[name]
    cache = make_cache(device, head_dim=16, batch_size=2)
    cache.source = make_cache(device, head_dim=16, batch_size=3, max_positions=5)
    cache.of_other_sinks = make_cache(device, head_dim=16, sink_positions=1)
    key = torch.randn(2, 3, 2, 16, device=device)
    cache.append(0, key, key)
    before = cache.tensors.state.clone()
    with pytest.raises((TypeError, ValueError, IndexError)) as eager:
        call(cache, key)
    for fullgraph in (False, True):
        torch._dynamo.reset()
        # With fullgraph the compiler does not pass the sentence on.
        with pytest.raises(Exception if fullgraph else eager.type, match=None if fullgraph else name.split()[0]):
            torch.compile(lambda k: call(cache, k), backend="aot_eager", fullgraph=fullgraph)(key)
    assert torch.equal(cache.tensors.state, before)


def test_numbers_that_change_are_no_constants(device: torch.device) -> None:
    """Slots and lengths as ints: compiled once for all of them, not once for each."""
    cache, other = (make_cache(device, head_dim=16, batch_size=32) for _ in range(2))
    key = torch.randn(1, 1, 2, 16, device=device)

    def step(key: torch.Tensor, slot: int, length: int) -> None:
        cache.append(0, key, key, sequences=[slot])
        cache.attend(0, key, sequences=[slot])
        cache.copy_sequence(slot, slot + 1)
        cache.truncate(length, sequences=[slot])
        cache.truncate([length, length], sequences=[slot, slot + 1])
        cache.drop_newest(length, sequences=[slot])
        cache.drop_newest([length, length], sequences=[slot, slot + 1])
        cache.copy_sequence(slot, slot + 1, source=other)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for slot in range(2, 30):
        compiled(key, slot, slot % 7)
    cache.reset()
    cache.append(0, key.expand(32, -1, -1, -1), key.expand(32, -1, -1, -1))
    torch._dynamo.reset()
    torch.compile(lambda n: cache.truncate(n, sequences=[1]), fullgraph=True, backend="aot_eager")(
        torch.tensor(0, device=device)
    )
    assert cache.cache_seqlens[0].tolist() == [1, 0, *[1] * 30]


@pytest.mark.parametrize("rows", [1, 20])
def test_gradients_are_refused_in_compiled_code(device: torch.device, rows: int) -> None:
    cache = make_cache(device, head_dim=16, max_positions=64)
    key = torch.randn(1, rows, 2, 16, device=device)
    grad = key.clone().requires_grad_()
    with torch.enable_grad():
        for call in (
            lambda x: cache.append(0, x, key),
            lambda x: cache.append_all(torch.stack([x, x]), torch.stack([key, key])),
            lambda x: cache.attend(0, x),
            lambda x: cache.append_attend(0, key, x, key),
            lambda x: cache.append_attend(0, x, key, key),
        ):
            torch._dynamo.reset()
            with pytest.raises(Exception, match="must not require grad"):
                torch.compile(call, backend="aot_eager")(grad)
            assert cache.position == 0


def test_a_compiler_that_clones_the_cache(device: torch.device) -> None:
    """aot_eager changes clones of the tensors and copies them back: lengths on the host must notice."""
    torch._dynamo.reset()
    cache = make_cache(device)
    key = torch.randn(1, 2, 8, device=device)
    cache.append_all(key.expand(2, 1, 2, 8), key.expand(2, 1, 2, 8))
    assert len(cache) == 1
    step = torch.compile(lambda k: cache.append(0, k, k), backend="aot_eager")
    for i in range(3):
        step(key + i)
        assert cache.position == i + 2
        assert cache.get_valid_f32(0)[0].shape[0] == i + 2


def test_a_step_of_some_sequences_compiles(device: torch.device) -> None:
    torch._dynamo.reset()
    eager, compiled = (make_cache(device, batch_size=3, max_positions=32, sink_positions=1) for _ in range(2))

    def step(c: StreamingKVCacheFp16, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        c.append(0, x[:, :, :2], x[:, :, 2:], sequences=chosen)
        x = x + c.attend(0, x, sequences=chosen)
        x = x + c.append_attend(1, x, x[:, :, :2].floor(), x[:, :, 2:].floor(), sequences=[2, 0])
        keys, values = c.gather(1, torch.arange(3, device=x.device), sequences=chosen)
        c.append_all(keys[None, ...].expand(2, *keys.shape), values.expand(2, *values.shape), sequences=chosen)
        return x

    compiled_step = torch.compile(step, fullgraph=True)
    for count in (1, 3, 20):
        x = torch.randn(2, count, 4, 8, device=device)
        chosen = torch.tensor([2, 1], device=device)
        torch.testing.assert_close(compiled_step(compiled, x, chosen), step(eager, x, chosen), rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.tensors.state, eager.tensors.state)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("new_lengths", [None, [20, 7], [0, 20]])
def test_a_long_prompt_compiles(device: torch.device, new_lengths: list[int] | None, precision: str) -> None:
    """Onto nothing, and past the end of the ring."""
    torch._dynamo.reset()
    eager, compiled = (make_cache(device, batch_size=2, max_positions=32, sink_positions=2) for _ in range(2))
    lengths = None if new_lengths is None else torch.tensor(new_lengths, device=device)

    def prompt(c: StreamingKVCacheFp16, query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        c.append(0, key, key, new_lengths=lengths)
        answers = [*c.attend(0, query, return_lse=True, precision=precision)]
        for window in (None, 9):
            answers.append(
                c.append_attend(0, query, key, -key, new_lengths=lengths, window=window, precision=precision)
            )
        return answers

    step = torch.compile(prompt, fullgraph=True)
    for _ in range(2):
        query, key = (torch.randn(2, 20, heads, 8, device=device) for heads in (4, 2))
        for got, want in zip(step(compiled, query, key), prompt(eager, query, key), strict=True):
            assert_same_bits(got, want)
    assert torch.equal(compiled.tensors.state, eager.tensors.state)
    assert_same_bits(compiled.k_cache, eager.k_cache)
    assert_same_bits(compiled.v_cache, eager.v_cache)


def test_the_other_methods_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    cache, eager = make_cache(device, batch_size=2), make_cache(device, batch_size=2)

    def calls(
        c: StreamingKVCacheFp16, keys: torch.Tensor, lengths: torch.Tensor, out: tuple[torch.Tensor, ...]
    ) -> None:
        c.clear()
        c.append_all(keys, keys, new_lengths=lengths)
        c.truncate(2)
        c.append(1, keys[0], keys[1].half().float(), new_lengths=lengths)
        c.gather(1, torch.arange(6, device=keys.device), out=(out[0], out[1]))
        c.reorder(lengths - 3)  # -> 1, out of range
        c.copy_sequence(1, 0)
        c.truncate([2, 1])
        c.truncate(lengths, sequences=[1, 0])
        c.append_all(keys, keys)
        c.reset([1])
        c.copy_sequence(lengths[:1] - 4, lengths[1:] - 1)

    keys = torch.randn(2, 2, 5, 2, 8, device=device)
    lengths = torch.tensor([4, 2], device=device)
    outs = [tuple(torch.zeros(2, 6, 2, 8, device=device) for _ in range(2)) for _ in range(2)]
    calls(eager, keys, lengths, outs[0])
    torch.compile(calls, fullgraph=True)(cache, keys, lengths, outs[1])
    assert cache.cache_seqlens.tolist() == eager.cache_seqlens.tolist() == [[7, 7], [7, 7]]
    assert_same_bits(cache.k_cache, eager.k_cache)
    for a, b in zip(*outs, strict=True):
        assert_same_bits(a, b)


def test_copies_between_caches_and_lengths_compile(device: torch.device) -> None:
    """The source is another ring; both caches end as eager ones do, in place."""
    torch._dynamo.reset()
    shape = {"batch_size": 3, "sink_positions": 1}
    sources = [make_cache(device, **shape) for _ in range(2)]
    caches = [make_cache(device, **(shape | {"max_positions": 5})) for _ in range(2)]

    def calls(
        c: StreamingKVCacheFp16, source: StreamingKVCacheFp16, keys: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        source.append_all(keys, keys * 2)
        c.copy_sequence(chosen, chosen.flip(0), source=source)
        before = c.device_lengths()
        c.append_all(keys[:, :1], keys[:, :1], sequences=chosen[:1])
        source.drop_newest(chosen, sequences=chosen)
        source.drop_newest(1)
        c.drop_newest([1, 0, 2])
        c.copy_sequence(0, [1, 2], source=source)
        c.copy_sequence(1, 0, source=c)
        return before - c.device_lengths() + source.device_lengths()

    step = torch.compile(calls, fullgraph=True)
    addresses = [t.data_ptr() for t in (caches[1].k_cache, caches[1].tensors.state, sources[1].k_cache)]
    for count in (3, 4, 11):
        keys = torch.randn(2, 3, count, 2, 8, device=device)
        chosen = torch.tensor([2, 0], device=device)
        want = calls(caches[0], sources[0], keys, chosen)
        assert torch.equal(step(caches[1], sources[1], keys, chosen), want)
        for eager, compiled in ((caches[0], caches[1]), (sources[0], sources[1])):
            assert torch.equal(compiled.tensors.state, eager.tensors.state)
            assert compiled.lengths() == eager.lengths()
            assert_same_bits(compiled.k_cache, eager.k_cache)
            assert_same_bits(compiled.v_cache, eager.v_cache)
    assert [t.data_ptr() for t in (caches[1].k_cache, caches[1].tensors.state, sources[1].k_cache)] == addresses


def test_storage_is_marked_as_static() -> None:
    """What the cache does by hand is what torch's own function does."""
    import torch._dynamo

    cache = make_cache(torch.device("cpu"))
    marked = torch.empty(1)
    torch._dynamo.mark_static_address(marked)
    assert cache.k_cache._dynamo_static_input_type == marked._dynamo_static_input_type
