"""Every argument of every call, replaced by all that it must not be: table times table.

test_bad_input.py has the calls that are wrong in a way of their own, and the exact words of the sentences. Here it is
breadth: the right kind of error, one sentence that names the argument, a cache that is bit for bit what it was, and a
process that lives on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES, make_cache
from torch._subclasses import FakeTensorMode

from kvcache_ext import StreamingKVCacheFp16, merge_states, ops

Cache = StreamingKVCacheFp16
ROWS = (1, 2, 2, 8)  # [B, T, H, D] of the cache that is used here
MANY = (1, 20, 2, 8)  # of queries: as a prompt has them


class Raises:
    """Passes for an int and for a list until it is asked."""

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __len__(self) -> int:
        raise RuntimeError("no")

    def __getitem__(self, i: int) -> int:
        raise RuntimeError("no")


def without_memory(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def inside(storage: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of what the cache itself has, of another tensor's shape."""
    strides = [0] * (like.dim() - 1) + [1]
    return storage.as_strided(like.shape, strides)


NOT_TENSORS: dict[str, tuple[object, type[Exception]]] = {
    "a list": ([1.0], TypeError),
    "an array": (np.ones(ROWS, np.float32), TypeError),
    "a string": ("x", TypeError),
    "a number": (1.0, TypeError),
    "NaN": (math.nan, TypeError),
    "an int": (2**63, TypeError),
    "an object": (object(), TypeError),
}

# From the right tensor and the cache to a wrong one.
Wrong = Callable[[torch.Tensor, Cache], object]
ANY_TENSOR: dict[str, tuple[Wrong, type[Exception]]] = {
    "bool": (lambda t, c: t.bool(), TypeError),
    "complex": (lambda t, c: t.to(torch.complex64), TypeError),
    "conjugated": (lambda t, c: t.to(torch.complex64).conj(), TypeError),
    "8-bit": (lambda t, c: t.to(torch.uint8), TypeError),
    "16-bit ints": (lambda t, c: t.to(torch.int16), TypeError),
    "FP8": (lambda t, c: t.float().to(torch.float8_e4m3fn), TypeError),
    "sparse": (lambda t, c: t.to_sparse(), TypeError),
    "sparse rows": (lambda t, c: t.reshape(-1, t.shape[-1]).to_sparse_csr(), TypeError),
    "nested": (lambda t, c: torch.nested.nested_tensor([t[0], t[0]]) if t.dim() > 1 else t.to_sparse(), TypeError),
    "jagged": (lambda t, c: torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged),
               TypeError),
    "on meta": (lambda t, c: t.to("meta"), ValueError),
    "without memory": (lambda t, c: without_memory(t), ValueError),
    "of no dimension": (lambda t, c: t.flatten()[0], ValueError),
    "of 6 dimensions": (lambda t, c: t.view(*[1] * (6 - t.dim()), *t.shape), ValueError),
    "of 2^31 rows": (lambda t, c: t.flatten()[:1].expand(2**31, 3, 5), ValueError),
    "of 2^40 elements": (lambda t, c: t.flatten()[:1].expand(1, 2**40, 2, 9), ValueError),
    "of 2^62 elements": (lambda t, c: t.flatten()[:1].expand(2**31, 2**31, 1, 1), ValueError),
}  # fmt: skip
FLOATS: dict[str, tuple[Wrong, type[Exception]]] = ANY_TENSOR | {
    "FP64": (lambda t, c: t.double(), TypeError),
    "INT64": (lambda t, c: t.long(), TypeError),
    "INT32": (lambda t, c: t.int(), TypeError),
    "quantised": (
        lambda t, c: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.is_cpu else t.double(),
        TypeError,
    ),
    "one-dimensional and short": (lambda t, c: torch.ones(15, device=t.device), ValueError),
    "empty": (lambda t, c: torch.ones(0, device=t.device), ValueError),
    "of no sequence": (lambda t, c: torch.ones(0, *t.shape[1:], device=t.device), ValueError),
    "of no heads": (lambda t, c: torch.ones(*t.shape[:-2], 0, 8, device=t.device), ValueError),
    "of another head_dim": (lambda t, c: torch.ones(*t.shape[:-1], 9, device=t.device), ValueError),
    "of head_dim 0": (lambda t, c: torch.ones(*t.shape[:-1], 0, device=t.device), ValueError),
    "of other heads": (lambda t, c: torch.ones(*t.shape[:-2], 3, 8, device=t.device), ValueError),
    "of two sequences": (lambda t, c: torch.ones(*t.shape[:-4], 2, *t.shape[-3:], device=t.device), ValueError),
    "strided": (lambda t, c: torch.ones(*t.shape, 2, device=t.device)[..., 0], ValueError),
    "expanded in head_dim": (lambda t, c: torch.ones(*t.shape[:-1], 1, device=t.device).expand(t.shape), ValueError),
    "of 5 and more dimensions": (lambda t, c: t[None, None], ValueError),
    "negated": (lambda t, c: torch._neg_view(t), ValueError),
    "requiring grad": (lambda t, c: t.clone().requires_grad_(), ValueError),
    "a parameter": (lambda t, c: torch.nn.Parameter(t.clone()), ValueError),
    "computed with grad": (lambda t, c: t.clone().requires_grad_() * 2, ValueError),
}
OUTPUTS: dict[str, tuple[Wrong, type[Exception]]] = FLOATS | {
    "FP16 for FP32": (lambda t, c: t.half(), TypeError),
    "expanded": (lambda t, c: t[:, :, :1].expand(t.shape), ValueError),
    "of rows that overlap": (
        lambda t, c: torch.ones(4 * t.numel(), device=t.device).as_strided(t.shape, (16 * t.shape[1], 16, 5, 1)),
        ValueError,
    ),
    "a fake": (lambda t, c: FakeTensorMode().from_tensor(t), ValueError),
}
NUMBERS: dict[str, tuple[Wrong, type[Exception]]] = ANY_TENSOR | {
    "FP32": (lambda t, c: t.float(), TypeError),
    "FP64": (lambda t, c: t.double(), TypeError),
    "NaN": (lambda t, c: t.float() * math.nan, TypeError),
}
NUMBERS_OF_SEQUENCES: dict[str, tuple[Wrong, type[Exception]]] = NUMBERS | {
    "a fake": (lambda t, c: FakeTensorMode().from_tensor(t), ValueError),
    "too many": (lambda t, c: torch.cat([t, t]), ValueError),
    "of two dimensions": (lambda t, c: t[None], ValueError),
    "the state": (lambda t, c: c.cache_seqlens[0], ValueError),
    "the counters": (lambda t, c: c.tensors.overflow_counts[:1], ValueError),
}

INTS: dict[str, tuple[object, type[Exception]]] = {
    "None": (None, TypeError),
    "a float": (1.0, TypeError),
    "NaN": (math.nan, TypeError),
    "a bool": (True, TypeError),
    "a string": ("1", TypeError),
    "bytes": (b"1", TypeError),
    "a complex number": (1j, TypeError),
    "a list": ([1], TypeError),
    "a type": (int, TypeError),
    "a float tensor": (torch.ones(1), TypeError),
    "a tensor of several": (torch.ones(2, dtype=torch.int64), TypeError),
    "no int after all": (Raises(), TypeError),
    "2^31": (2**31, IndexError),
    "2^63 - 1": (2**63 - 1, IndexError),
    "2^63": (2**63, IndexError),
    "-2^63": (-(2**63), IndexError),
    "-2^63 - 1": (-(2**63) - 1, IndexError),
    "of 5,001 digits": (10**5000, IndexError),
    "-1": (-1, IndexError),
}
SLOTS: dict[str, tuple[object, type[Exception]]] = {
    "a string": ("0", TypeError),
    "bytes": (b"0", TypeError),
    "a float": (0.0, TypeError),
    "a bool": (True, TypeError),
    "a set": ({0}, TypeError),
    "a generator": ((i for i in [0]), TypeError),
    "no list after all": (Raises(), TypeError),
    "of floats": ([0.5], TypeError),
    "of NaN": ([math.nan], TypeError),
    "of None": ([None], TypeError),
    "of bools": ([False], TypeError),
    "of strings": (["a"], TypeError),
    "of lists": ([[0]], TypeError),
    "of no ints": ([Raises()], TypeError),
    "an array of floats": (np.zeros(1), TypeError),
}
SLOTS_OUT_OF_RANGE: dict[str, tuple[object, type[Exception]]] = {
    "out of range": ([1], IndexError),
    "negative": ([-1], IndexError),
    "of 2^63": ([2**63], IndexError),
    "2^62 of them": (range(2**62), IndexError),
}
TWICE: dict[str, tuple[object, type[Exception]]] = {"one of them twice": ([0, 0], ValueError)}
AN_INT: dict[str, tuple[object, type[Exception]]] = {"an int": (0, TypeError)}
NONE: dict[str, tuple[object, type[Exception]]] = {"None": (None, TypeError)}
REALS: dict[str, tuple[object, type[Exception]]] = {
    "a string": ("1", TypeError),
    "a list": ([1.0], TypeError),
    "a bool": (True, TypeError),
    "a complex number": (1j, TypeError),
    "a tensor of several": (torch.ones(2), TypeError),
    "NaN": (math.nan, ValueError),
    "infinite": (math.inf, ValueError),
    "beyond FP32": (1e39, ValueError),
}
SCALES: dict[str, tuple[object, type[Exception]]] = REALS | {
    "above 2^86": (2.0**86 * 1.0001, ValueError),
    "below -2^86": (-3e38, ValueError),
}
CAPS: dict[str, tuple[object, type[Exception]]] = REALS | {
    "0": (0, ValueError),
    "negative": (-1.0, ValueError),
    "below FP32": (1e-60, ValueError),
}
WINDOWS: dict[str, tuple[object, type[Exception]]] = {
    name: wrong for name, wrong in INTS.items() if name not in ("None", "2^31", "2^63 - 1", "-2^63", "-1")
} | {"0": (0, ValueError), "-1": (-1, ValueError), "-2^63": (-(2**63), ValueError)}
FLAGS: dict[str, tuple[object, type[Exception]]] = {
    "1": (1, TypeError),
    "None": (None, TypeError),
    "a string": ("True", TypeError),
    "a tensor": (torch.ones(2), TypeError),
}
PRECISIONS: dict[str, tuple[object, type[Exception]]] = {
    "None": (None, ValueError),
    "unknown": ("fp8", ValueError),
    "of many lines": ("a\nb" * 100, ValueError),
    "a list": (["fp32"], ValueError),
    "an array": (np.ones(3), ValueError),
    "a dtype": (torch.float32, ValueError),
    "a tensor": (torch.ones(3, 3), ValueError),
    "a tensor without memory": (without_memory(torch.ones(3)), ValueError),
    "an int of many digits": (10**5000, ValueError),
}
DTYPES: dict[str, tuple[object, type[Exception]]] = {
    "None": (None, TypeError),
    "a string": ("float32", TypeError),
    "FP64": (torch.float64, TypeError),
    "FP8": (torch.float8_e5m2, TypeError),
    "INT8": (torch.int8, TypeError),
    "Python's": (float, TypeError),
}
PAIRS: dict[str, tuple[object, type[Exception]]] = {
    "one tensor": (torch.ones(ROWS), TypeError),
    "of three": ((torch.ones(ROWS),) * 3, TypeError),
    "of one": ([torch.ones(ROWS)], TypeError),
    "of lists": (([1.0], [1.0]), TypeError),
    "a string of two": ("kv", TypeError),
    "a set": ({1, 2}, TypeError),
}

Table = dict[str, tuple[Any, type[Exception]]]


def tensors(table: dict[str, tuple[Wrong, type[Exception]]]) -> Table:
    """Rows that make a tensor from the right one, told from rows that are the wrong thing itself."""
    return {name: ((make,), error) for name, (make, error) in table.items()}


def pairs(table: dict[str, tuple[Wrong, type[Exception]]]) -> Table:
    """A wrong tensor in either place."""
    first = {
        f"first {name}": ((lambda t, c, m=make: (m(t[0], c), t[1]),), error) for name, (make, error) in table.items()
    }
    second = {f"second {name}": ((lambda t, c, m=make: (t[0], m(t[1], c)),), error)
              for name, (make, error) in table.items()}  # fmt: skip
    return first | second


STORED = tensors(FLOATS | {"a view of the cache": (lambda t, c: inside(c.k_cache, t), ValueError)})
ASKED = tensors(FLOATS)
ANSWERS = tensors(OUTPUTS | {"the cache's own": (lambda t, c: inside(c.v_cache, t), (TypeError, ValueError))})  # type: ignore[dict-item]
SEQUENCES = tensors(NUMBERS_OF_SEQUENCES) | SLOTS | SLOTS_OUT_OF_RANGE
CHOSEN = SEQUENCES | TWICE | AN_INT
LENGTHS = tensors(NUMBERS_OF_SEQUENCES) | NOT_TENSORS
ATTENTION: dict[str, Table] = {
    "scale": SCALES, "window": WINDOWS, "softcap": CAPS, "return_lse": FLAGS, "precision": PRECISIONS,
    "out": ANSWERS | NOT_TENSORS, "sequences": CHOSEN,
}  # fmt: skip
QUERY = ASKED | NOT_TENSORS | NONE
NEW = STORED | NOT_TENSORS | NONE


def of(*shape: int) -> Callable[[torch.device], torch.Tensor]:
    return lambda device: torch.ones(shape, device=device)


def halves(*shape: int) -> Callable[[torch.device], torch.Tensor]:
    return lambda device: torch.ones(shape, dtype=torch.float16, device=device)


def numbers(*values: int) -> Callable[[torch.device], torch.Tensor]:
    return lambda device: torch.tensor(values, device=device)


def two(*shape: int) -> Callable[[torch.device], tuple[torch.Tensor, torch.Tensor]]:
    return lambda device: (torch.ones(shape, device=device), torch.ones(shape, device=device))


SOURCES: Table = {
    name: wrong for name, wrong in NOT_TENSORS.items() if name != "None"
} | {
    "a tensor": (torch.ones(ROWS), TypeError),
    "a class": (Cache, TypeError),
    "the cache's own keys": ((lambda t, c: c.k_cache,), TypeError),
    "the native half": ((lambda t, c: c.native,), TypeError),
    "of one layer": ((lambda t, c: make_cache(c.device, num_layers=1, sink_positions=1),), ValueError),
    "of other heads": ((lambda t, c: make_cache(c.device, num_heads=3, sink_positions=1),), ValueError),
    "of another head_dim": ((lambda t, c: make_cache(c.device, head_dim=9, sink_positions=1),), ValueError),
    "of no sinks": ((lambda t, c: make_cache(c.device),), ValueError),
}  # fmt: skip

# A call: its method, its arguments (functions are called with the device), and what is wrong for each argument.
CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Table]]] = {
    "append": (
        "append",
        {"layer": 0, "key": of(*ROWS), "value": of(*ROWS), "new_lengths": numbers(1), "sequences": numbers(0)},
        {"layer": INTS, "key": NEW, "value": NEW, "new_lengths": LENGTHS, "sequences": CHOSEN},
    ),
    "append_all": (
        "append_all",
        {"keys": of(2, *ROWS), "values": of(2, *ROWS), "new_lengths": numbers(1), "sequences": numbers(0)},
        {"keys": NEW, "values": NEW, "new_lengths": LENGTHS, "sequences": CHOSEN},
    ),
    "gather": (
        "gather",
        {"layer": 0, "indices": numbers(0, 1), "dtype": torch.float32, "out": two(*ROWS), "sequences": numbers(0)},
        {
            "layer": INTS,
            "indices": tensors(NUMBERS) | {"INT32": ((lambda t, c: t.int(),), TypeError)} | NOT_TENSORS | NONE,
            "dtype": DTYPES, "out": pairs(OUTPUTS) | PAIRS, "sequences": CHOSEN,
        },
    ),
    "get_range_f32": (
        "get_range_f32",
        {"layer": 0, "start": 0, "end": 2, "out": two(*ROWS)},
        {"layer": INTS, "start": INTS, "end": INTS, "out": pairs(OUTPUTS) | PAIRS},
    ),
    "get_valid_f32": (
        "get_valid_f32",
        {"layer": 0, "out": two(1, 5, 2, 8)},
        {"layer": INTS, "out": pairs(OUTPUTS) | PAIRS},
    ),
    "get_range_raw": (
        "get_range_raw",
        {"layer": 0, "start": 0, "end": 2},
        {"layer": INTS, "start": INTS, "end": INTS},
    ),
    "attend": (
        "attend",
        {"layer": 0, "query": of(*ROWS), "out": of(*ROWS), "sequences": numbers(0)},
        {"layer": INTS, "query": QUERY, **ATTENTION},
    ),
    "attend, new answer": ("attend", {"layer": 0, "query": of(*ROWS)}, {"query": QUERY, "sequences": CHOSEN}),
    "attend, many": (
        "attend",
        {"layer": 0, "query": of(*MANY), "out": of(*MANY), "sequences": numbers(0)},
        {"layer": INTS, "query": QUERY, **ATTENTION},
    ),
    "append_attend": (
        "append_attend",
        {"layer": 0, "query": of(*ROWS), "key": of(*ROWS), "value": of(*ROWS), "new_lengths": numbers(1),
         "out": of(*ROWS), "sequences": numbers(0)},
        {"layer": INTS, "query": QUERY, "key": NEW, "value": NEW, "new_lengths": LENGTHS, **ATTENTION},
    ),
    "append_attend, many": (
        "append_attend",
        {"layer": 0, "query": of(*MANY), "key": of(*MANY), "value": of(*MANY), "new_lengths": numbers(1),
         "out": of(*MANY), "sequences": numbers(0)},
        {"layer": INTS, "query": QUERY, "key": NEW, "value": NEW, "new_lengths": LENGTHS, **ATTENTION},
    ),
    "truncate": (
        "truncate",
        {"n": 1, "sequences": numbers(0)},
        {"sequences": CHOSEN},
    ),
    "truncate to numbers": (
        "truncate",
        {"n": numbers(1)},
        {"n": {k: v for k, v in SEQUENCES.items() if k not in ("of no dimension", "out of range", "2^62 of them")}
              | {"2^62 of them": (range(2**62), ValueError), "more than is held": ([6], IndexError)}},
    ),
    "truncate to one number": ("truncate", {"n": 1}, {"n": {k: v for k, v in INTS.items() if not k.startswith("a ")}}),
    "drop_newest": ("drop_newest", {"n": 1, "sequences": numbers(0)}, {"sequences": CHOSEN}),
    "drop_newest of each": (
        "drop_newest",
        {"n": numbers(1)},
        {"n": {k: v for k, v in SEQUENCES.items() if k not in ("of no dimension", "out of range", "2^62 of them")}
              | {"2^62 of them": (range(2**62), ValueError), "more than is held": ([6], IndexError)}},
    ),
    "drop_newest, one number": (
        "drop_newest", {"n": 1}, {"n": {k: v for k, v in INTS.items() if not k.startswith("a ")}},
    ),
    "reset": ("reset", {"sequences": numbers(0)}, {"sequences": CHOSEN}),
    "reorder": ("reorder", {"batch_indices": numbers(0)}, {"batch_indices": SEQUENCES | AN_INT | NONE}),
    "copy_sequence": (
        "copy_sequence",
        {"src": numbers(0), "dst": numbers(0)},
        {name: {k: v for k, v in (SEQUENCES | NONE).items() if k not in ("of no dimension", "too many")}
               for name in ("src", "dst")},
    ),
    "copy_sequence from another": (
        "copy_sequence",
        {"src": numbers(0), "dst": numbers(0), "source": lambda device: make_cache(device, sink_positions=1)},
        {name: {k: v for k, v in (SEQUENCES | NONE).items() if k not in ("of no dimension", "too many")}
               for name in ("src", "dst")} | {"source": SOURCES},
    ),
}  # fmt: skip


def snapshot(cache: Cache) -> list[torch.Tensor]:
    tensors = (
        cache.k_cache.view(torch.int16),
        cache.v_cache.view(torch.int16),
        cache.tensors.state,
        cache.tensors.overflow_counts,
    )
    return [t.clone() for t in tensors]


def assert_one_sentence(error: BaseException, argument: str) -> None:
    sentence = str(error)
    assert argument in sentence, sentence
    assert "\n" not in sentence and len(sentence) < 400, sentence


@pytest.fixture(scope="module", params=DEVICES)
def cache(request: pytest.FixtureRequest) -> Cache:
    torch.manual_seed(0)
    cache = make_cache(torch.device(request.param), sink_positions=1)
    for layer in range(2):
        cache.append(layer, torch.randn(5, 2, 8).to(cache.device) * 4e4, torch.randn(5, 2, 8).to(cache.device))
    return cache


def failure_of(call: Callable[[], object], what: str, error: type[Exception], words: str) -> list[str]:
    """Nothing, where the call raises this error in one sentence with these words; else what it did instead."""
    try:
        call()
    except error as raised:
        try:
            assert_one_sentence(raised, words)
        except AssertionError as wrong_words:
            return [f"{what}: {wrong_words}"]
        return []
    except Exception as raised:
        return [f"{what}: {type(raised).__name__}, not {error}: {raised}"]
    return [f"{what}: no error"]


@pytest.mark.parametrize("argument", [f"{call}: {argument}" for call in CALLS for argument in CALLS[call][2]])
def test_every_argument(cache: Cache, argument: str) -> None:
    call, _, name = argument.partition(": ")
    method, right, tables = CALLS[call]
    before = snapshot(cache)
    failures = []
    for what, (wrong, error) in tables[name].items():
        arguments = {k: v(cache.device) if callable(v) and not isinstance(v, type) else v for k, v in right.items()}
        given = wrong
        if isinstance(wrong, tuple) and len(wrong) == 1:
            good = arguments.get(name)
            given = wrong[0](numbers(0)(cache.device) if good is None else good, cache)
        arguments[name] = given
        failures += failure_of(lambda made=arguments: getattr(cache, method)(**made), what, error, name)
        for x, y in zip(before, snapshot(cache), strict=True):
            assert torch.equal(x, y), f"{what} has changed the cache"
    assert not failures, "\n".join(failures)
    assert (len(cache), cache.position) == (5, 5)
    arguments = {k: v(cache.device) if callable(v) and not isinstance(v, type) else v for k, v in right.items()}
    if method.startswith(("get", "gather", "attend")):
        getattr(cache, method)(**arguments)  # what is right but for that argument is right


# The registered ops over plain tensors, where the cache's own can be wrong too.

CACHE_TENSORS: dict[str, tuple[Wrong, type[Exception]]] = {
    "another dtype": (lambda t, c: t.to(torch.int32), TypeError),
    "FP64": (lambda t, c: t.double(), TypeError),
    "one layer": (lambda t, c: t.narrow(t.dim() - 1 if t.dim() < 3 else t.dim() - 2, 0, 1), ValueError),
    "of another shape": (lambda t, c: t[None], ValueError),
    "strided": (lambda t, c: torch.stack([t, t], -1)[..., 0], ValueError),
    "without memory": (lambda t, c: without_memory(t), ValueError),
    "negated": (lambda t, c: torch._neg_view(t), ValueError),
    "on meta": (lambda t, c: t.to("meta"), ValueError),
}
K_V: dict[str, tuple[Wrong, type[Exception]]] = CACHE_TENSORS | {
    "empty": (lambda t, c: t[:, :, :0], ValueError),
    "FP32": (lambda t, c: t.float(), TypeError),
}
WORKSPACES: dict[str, tuple[Wrong, type[Exception]]] = {
    "another dtype": (lambda t, c: t.double(), ValueError),
    "small": (lambda t, c: t[:100], ValueError),
    "unaligned": (lambda t, c: t[1:], ValueError),
    "strided": (lambda t, c: torch.stack([t, t], -1)[..., 0], ValueError),
    "without memory": (lambda t, c: without_memory(t), ValueError),
    "negated": (lambda t, c: torch._neg_view(t), ValueError),
    "on meta": (lambda t, c: t.to("meta"), ValueError),
}
LSES: dict[str, tuple[Wrong, type[Exception]]] = {
    "the state": (lambda t, c: c.tensors.state.view(torch.float32).view(-1)[:4].view(t.shape), ValueError),
    "the cache": (lambda t, c: c.k_cache.view(torch.float32).view(-1)[:4].view(t.shape), ValueError),
    "the workspace": (lambda t, c: c.tensors.workspace[:4].view(t.shape), ValueError),
    "another dtype": (lambda t, c: t.half(), ValueError),
    "of another shape": (lambda t, c: t[:, :1], ValueError),
    "strided": (lambda t, c: torch.stack([t, t], -1)[..., 0], ValueError),
    "negated": (lambda t, c: torch._neg_view(t), ValueError),
    "without memory": (lambda t, c: without_memory(t), ValueError),
}
# The dispatcher itself refuses some tensors before an op is asked, in a sentence and an error of its own.
REFUSED = ("sparse", "sparse rows", "nested", "jagged", "quantised")


def op_rows(table: dict[str, tuple[Wrong, type[Exception]]]) -> dict[str, tuple[Wrong, type[Exception]]]:
    return {k: v for k, v in table.items() if k not in (*REFUSED, "a fake")} | {"None": (lambda t, c: None, TypeError)}


OPS: dict[str, tuple[dict[str, Any], dict[str, dict[str, tuple[Wrong, type[Exception]]]]]] = {
    "append": (
        {"layer": 0, "key": of(*ROWS), "value": of(*ROWS), "new_lengths": numbers(1), "sequences": numbers(0)},
        {"k_cache": K_V, "v_cache": K_V, "state": CACHE_TENSORS, "overflow_counts": CACHE_TENSORS, "key": FLOATS,
         "value": FLOATS, "new_lengths": NUMBERS_OF_SEQUENCES, "sequences": NUMBERS_OF_SEQUENCES},
    ),
    "append_all": (
        {"keys": of(2, *ROWS), "values": of(2, *ROWS), "new_lengths": numbers(1)},
        {"k_cache": K_V, "state": CACHE_TENSORS, "overflow_counts": CACHE_TENSORS, "keys": FLOATS, "values": FLOATS},
    ),
    "gather": (
        {"layer": 0, "indices": numbers(0, 1)},
        {"k_cache": K_V, "v_cache": K_V, "state": CACHE_TENSORS, "indices": NUMBERS},
    ),
    "attend": (
        {"workspace": None, "layer": 0, "query": of(*ROWS), "scale": 1.0, "out": of(*ROWS), "lse": of(1, 2, 2)},
        {"k_cache": K_V, "state": CACHE_TENSORS, "workspace": WORKSPACES, "query": FLOATS, "out": OUTPUTS, "lse": LSES},
    ),
    "append_attend": (
        {"workspace": None, "layer": 0, "query": of(*ROWS), "key": of(*ROWS), "value": of(*ROWS), "scale": 1.0,
         "out": of(*ROWS), "lse": of(1, 2, 2)},
        {"k_cache": K_V, "state": CACHE_TENSORS, "overflow_counts": CACHE_TENSORS, "workspace": WORKSPACES,
         "query": FLOATS, "key": FLOATS, "value": FLOATS, "out": OUTPUTS, "lse": LSES},
    ),
    "copy_sequences": (
        {"sources": numbers(0), "destinations": numbers(0)},
        {"k_cache": K_V, "v_cache": K_V, "state": CACHE_TENSORS},
    ),
    "copy_from": (
        {"source_k_cache": halves(2, 1, 5, 2, 8), "source_v_cache": halves(2, 1, 5, 2, 8),
         "source_state": lambda device: torch.tensor([[[3]] * 2, [[1]] * 2, [[0]] * 2], device=device),
         "sources": numbers(0), "destinations": numbers(0)},
        {"k_cache": K_V, "v_cache": K_V, "state": CACHE_TENSORS, "source_k_cache": K_V, "source_v_cache": K_V,
         "source_state": CACHE_TENSORS},
    ),
    "truncate": ({"length": numbers(1)}, {"k_cache": K_V, "state": CACHE_TENSORS}),
    "reset": ({"sequences": numbers(0)}, {"k_cache": K_V, "state": CACHE_TENSORS}),
    "clear": ({}, {"k_cache": K_V, "state": CACHE_TENSORS, "overflow_counts": CACHE_TENSORS}),
}  # fmt: skip
WITHOUT_V = ("truncate", "reset", "clear")
COUNTING = ("append", "append_all", "append_attend", "clear")


def op_arguments(op: str, cache: Cache) -> dict[str, Any]:
    own = {"k_cache": cache.k_cache, "state": cache.tensors.state, "sink_positions": cache.sink_positions}
    if op not in WITHOUT_V:
        own["v_cache"] = cache.v_cache
    if op in COUNTING:
        own["overflow_counts"] = cache.tensors.overflow_counts
    given = {k: v(cache.device) if callable(v) else v for k, v in OPS[op][0].items()}
    if "workspace" in given:
        given["workspace"] = cache.tensors.workspace
    return own | given


@pytest.mark.parametrize("argument", [f"{op}: {argument}" for op in OPS for argument in OPS[op][1]])
def test_every_tensor_of_every_op(cache: Cache, argument: str) -> None:
    op, _, name = argument.partition(": ")
    before = snapshot(cache)
    failures = []
    optional = ("new_lengths", "sequences", "lse")
    for what, (wrong, error) in op_rows(OPS[op][1][name]).items():
        if what == "None" and name in optional:
            continue
        arguments = op_arguments(op, cache)
        arguments[name] = wrong(arguments[name], cache)
        # With two devices among the cache's own tensors, either may be the wrong one.
        own = name in ("k_cache", "v_cache", "state", "overflow_counts")
        words = "device" if own and "meta" in what else "source" if name.startswith("source_") else name
        failures += failure_of(lambda made=arguments: getattr(ops, op)(**made), what, error, words)
        for x, y in zip(before, snapshot(cache), strict=True):
            assert torch.equal(x, y), f"{what} has changed the cache"
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("what", REFUSED[:3])
def test_what_the_dispatcher_refuses(cache: Cache, what: str) -> None:
    """Not by us, so it is a RuntimeError of PyTorch's, of many lines; but it names the op and changes nothing."""
    before = snapshot(cache)
    arguments = op_arguments("append", cache)
    arguments["key"] = FLOATS[what][0](arguments["key"], cache)
    with pytest.raises(RuntimeError, match="kvcache_ext::append"):
        ops.append(**arguments)
    for x, y in zip(before, snapshot(cache), strict=True):
        assert torch.equal(x, y)


# merge_states and construction

OUTS: dict[str, tuple[object, type[Exception]]] = {
    "None": (None, TypeError),
    "a number": (1.0, TypeError),
    "a tensor": (torch.ones(2, 2, 8), TypeError),
    "a generator": ((t for t in [torch.ones(2, 8)]), TypeError),
    "no list after all": (Raises(), TypeError),
    "empty": ([], ValueError),
    "one too few": ([torch.ones(2, 8)], ValueError),
    "of arrays": ([np.ones((2, 8))] * 2, TypeError),
    "of None": ([None, None], TypeError),
    "of ints": ([torch.ones(2, 8, dtype=torch.int64)] * 2, TypeError),
    "of bools": ([torch.ones(2, 8, dtype=torch.bool)] * 2, TypeError),
    "complex": ([torch.ones(2, 8, dtype=torch.complex64)] * 2, TypeError),
    "sparse": ([torch.ones(2, 8).to_sparse()] * 2, TypeError),
    "sparse rows": ([torch.ones(2, 8).to_sparse_csr()] * 2, TypeError),
    "nested": ([torch.nested.nested_tensor([torch.ones(8), torch.ones(8)])] * 2, TypeError),
    "quantised": ([torch.quantize_per_tensor(torch.ones(2, 8), 0.1, 0, torch.qint8)] * 2, TypeError),
    "one on meta": ([torch.ones(2, 8), torch.ones(2, 8, device="meta")], ValueError),
    "without memory": ([without_memory(torch.ones(2, 8))] * 2, ValueError),
    "of two shapes": ([torch.ones(2, 8), torch.ones(3, 8)], ValueError),
    "of two dtypes": ([torch.ones(2, 8), torch.ones(2, 8).half()], ValueError),
    "of no dimension": ([torch.ones(()), torch.ones(())], ValueError),
}


@pytest.mark.parametrize("what", OUTS)
def test_merge_states(what: str) -> None:
    wrong, error = OUTS[what]
    good = {"outs": [torch.ones(2, 8)] * 2, "lses": [torch.ones(2)] * 2}
    for name in good:
        given: Any = wrong
        if name == "lses" and isinstance(wrong, list) and wrong and isinstance(wrong[0], torch.Tensor):
            if what in ("of two dtypes", "sparse rows", "nested"):
                continue  # any float dtype will do; and there is no such thing of one dimension
            given = [t if t.dim() == 0 or not t.numel() else t[:, 0] for t in wrong] if "memory" not in what else [
                without_memory(torch.ones(2))] * 2  # fmt: skip
        with pytest.raises(error) as raised:
            merge_states(**(good | {name: given}))
        assert_one_sentence(raised.value, name)


SIZES: dict[str, tuple[object, type[Exception]]] = {
    name: wrong for name, wrong in INTS.items() if name not in ("2^31", "2^63 - 1")
} | {
    "0": (0, ValueError), "2^63": (2**63, ValueError), "-2^63": (-(2**63), ValueError),
    "-2^63 - 1": (-(2**63) - 1, ValueError), "of 5,001 digits": (10**5000, ValueError), "-1": (-1, ValueError),
    "2^63 - 1": (2**63 - 1, MemoryError),
}  # fmt: skip
CONSTRUCTION: dict[str, Table] = dict.fromkeys(
    ("num_layers", "max_positions", "num_heads", "head_dim", "batch_size"), SIZES
) | {
    "sink_positions": {k: v for k, v in SIZES.items() if k != "0"} | {"2^63 - 1": (2**63 - 1, ValueError)},
    "overflow": PRECISIONS,
    "device": PRECISIONS | {"negative": ("cuda:-1", ValueError), "huge": (2**63, ValueError)},
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction(name: str) -> None:
    for what, (wrong, error) in CONSTRUCTION[name].items():
        if name == "device" and what == "None":
            continue  # the default device of torch
        arguments = {"num_layers": 2, "max_positions": 8, "num_heads": 2, "head_dim": 8, "device": "cpu"}
        with pytest.raises(error) as raised:
            Cache(**(arguments | {name: wrong}))
        if error is not MemoryError:
            assert_one_sentence(raised.value, name)
        assert "\n" not in str(raised.value), what


def test_there_are_many() -> None:
    assert sum(len(table) for _, _, tables in CALLS.values() for table in tables.values()) > 1000
    assert sum(len(op_rows(table)) for _, tables in OPS.values() for table in tables.values()) > 400
