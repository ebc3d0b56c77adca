"""Wrong calls: the right kind of error, one sentence that names the argument, and a cache that has not changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import HAS_GPU, make_cache

from kvcache_ext import StreamingKVCacheFp16, build_info, ops

NAN = float("nan")


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def elsewhere(device: torch.device) -> StreamingKVCacheFp16:
    """A cache that says it is on another device: the tests need no second one."""
    cache = make_cache(device)
    cache.device = torch.device("meta")
    return cache


def moved(device: torch.device) -> StreamingKVCacheFp16:
    cache = make_cache(device)
    cache.k_cache.set_(cache.k_cache.clone())
    return cache


GOOD = (2, 8)  # [H, D]
Call = Callable[[StreamingKVCacheFp16, torch.device], object]

# what is wrong: (call, error, words of the sentence)
CALLS: dict[str, tuple[Call, type[Exception], list[str]]] = {
    "layer too large": (lambda c, d: c.append(2, t(*GOOD).to(d), t(*GOOD).to(d)), IndexError, ["layer", "0 to 1", "2"]),
    "layer negative": (lambda c, d: c.append(-1, t(*GOOD).to(d), t(*GOOD).to(d)), IndexError, ["layer", "-1"]),
    "layer huge": (lambda c, d: c.append(2**70, t(*GOOD).to(d), t(*GOOD).to(d)), IndexError, ["layer", "64 bits"]),
    "layer a float": (lambda c, d: c.append(0.0, t(*GOOD).to(d), t(*GOOD).to(d)), TypeError, ["layer", "int", "float"]),
    "layer a bool": (lambda c, d: c.append(True, t(*GOOD).to(d), t(*GOOD).to(d)), TypeError, ["layer", "int", "bool"]),
    "layer a string": (lambda c, d: c.append("0", t(*GOOD).to(d), t(*GOOD).to(d)), TypeError, ["layer", "str"]),
    "layer None": (lambda c, d: c.append(None, t(*GOOD).to(d), t(*GOOD).to(d)), TypeError, ["layer", "NoneType"]),
    "key a list": (lambda c, d: c.append(0, [1.0], t(*GOOD).to(d)), TypeError, ["key", "torch.Tensor", "list"]),
    "value an array": (lambda c, d: c.append(0, t(*GOOD).to(d), t(*GOOD).numpy()), TypeError, ["value", "ndarray"]),
    "key of other heads": (lambda c, d: c.append(0, t(3, 8).to(d), t(*GOOD).to(d)), ValueError, ["key", "[2, 8]", "[3, 8]"]),
    "key of other head_dim": (lambda c, d: c.append(0, t(2, 9).to(d), t(*GOOD).to(d)), ValueError, ["key", "[2, 9]"]),
    "key flat and short": (lambda c, d: c.append(0, t(15).to(d), t(16).to(d)), ValueError, ["key", "[16]", "[15]"]),
    "key a scalar": (lambda c, d: c.append(0, t().to(d), t(16).to(d)), ValueError, ["key", "[]"]),
    "key of 5 dimensions": (lambda c, d: c.append(0, t(1, 1, 1, 2, 8).to(d), t(16).to(d)), ValueError, ["key", "[1, 1, 1, 2, 8]"]),
    "key of another batch": (lambda c, d: c.append(0, t(2, 1, 2, 8).to(d), t(2, 1, 2, 8).to(d)), ValueError, ["key", "[1, T, 2, 8]"]),
    "value of another length": (lambda c, d: c.append(0, t(3, 2, 8).to(d), t(2, 2, 8).to(d)), ValueError, ["value", "3", "2"]),
    "value of another shape": (lambda c, d: c.append(0, t(2, 8).to(d), t(8, 2).to(d)), ValueError, ["value", "[8, 2]"]),
    "key float64": (lambda c, d: c.append(0, t(2, 8, dtype=torch.float64).to(d), t(2, 8).to(d)), TypeError, ["key", "float64"]),
    "key int64": (lambda c, d: c.append(0, t(2, 8, dtype=torch.int64).to(d), t(2, 8).to(d)), TypeError, ["key", "int64"]),
    "key bool": (lambda c, d: c.append(0, t(2, 8, dtype=torch.bool).to(d), t(2, 8).to(d)), TypeError, ["key", "bool"]),
    "key complex": (lambda c, d: c.append(0, t(2, 8, dtype=torch.complex64).to(d), t(2, 8).to(d)), TypeError, ["key", "Complex"]),
    "value of another dtype": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).half().to(d)), TypeError, ["value", "float16", "float32"]),
    "key without unit stride": (lambda c, d: c.append(0, t(8, 2).to(d).T, t(2, 8).to(d)), ValueError, ["key", "stride", "contiguous"]),
    "key strided in head_dim": (lambda c, d: c.append(0, t(2, 16).to(d)[:, ::2], t(2, 8).to(d)), ValueError, ["key", "stride"]),
    "value expanded in head_dim": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 1).to(d).expand(2, 8)), ValueError, ["value", "stride"]),
    "key requires grad": (lambda c, d: c.append(0, t(2, 8).to(d).requires_grad_(), t(2, 8).to(d)), ValueError, ["key", "grad", "detach"]),
    "value requires grad": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d).requires_grad_() * 2), ValueError, ["value", "grad"]),
    "key on meta": (lambda c, d: c.append(0, t(2, 8).to("meta"), t(2, 8).to(d)), ValueError, ["key", "device", "meta"]),
    "value on meta": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to("meta")), ValueError, ["value", "meta"]),
    "key sparse": (lambda c, d: c.append(0, t(2, 8).to(d).to_sparse(), t(2, 8).to(d)), TypeError, ["key", "dense", "Sparse"]),
    "key quantised": (lambda c, d: c.append(0, torch.quantize_per_tensor(t(2, 8), 0.1, 0, torch.qint8), t(2, 8)), (TypeError, ValueError), ["key"]),
    "key a view of the cache": (lambda c, d: c.append(0, c.k_cache[0, 0, :2], t(2, 2, 8, dtype=torch.float16).to(d)), ValueError, ["key", "view of the cache"]),
    "value a view of the cache": (lambda c, d: c.append(0, t(2, 2, 8, dtype=torch.float16).to(d), c.get_range_raw(0, 0, 2)[1]), ValueError, ["value", "view of the cache"]),
    "key a negated view": (lambda c, d: c.append(0, torch._neg_view(t(2, 8).to(d)), t(2, 8).to(d)), ValueError, ["key", "negated"]),
    "too few arguments": (lambda c, d: c.append(0, t(2, 8).to(d)), TypeError, ["value"]),
    "too many arguments": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), None), TypeError, ["append"]),
    "new_lengths a list": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=[1]), TypeError, ["new_lengths", "list"]),
    "new_lengths float": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=t(1).to(d)), TypeError, ["new_lengths", "int"]),
    "new_lengths too many": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=t(2, dtype=torch.int64).to(d)), ValueError, ["new_lengths", "[1]", "[2]"]),
    "new_lengths a scalar": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=torch.tensor(1).to(d)), ValueError, ["new_lengths", "[1]", "[]"]),
    "new_lengths on meta": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=t(1, dtype=torch.int64).to("meta")), ValueError, ["new_lengths", "device"]),
    "new_lengths the state": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=c.cache_seqlens[0]), ValueError, ["new_lengths", "state"]),
    "all: layers missing": (lambda c, d: c.append_all(t(1, 2, 8).to(d), t(1, 2, 8).to(d)), ValueError, ["keys", "[2, 1, T, 2, 8]", "[1, 2, 8]"]),
    "all: one layer's shape": (lambda c, d: c.append_all(t(2, 8).to(d), t(2, 8).to(d)), ValueError, ["keys", "[2, 8]"]),
    "all: values differ": (lambda c, d: c.append_all(t(2, 3, 2, 8).to(d), t(2, 2, 8).to(d)), ValueError, ["values"]),
    "all: float64": (lambda c, d: c.append_all(t(2, 2, 8).double().to(d), t(2, 2, 8).to(d)), TypeError, ["keys", "float64"]),
    "all: not a tensor": (lambda c, d: c.append_all(None, t(2, 2, 8).to(d)), TypeError, ["keys", "NoneType"]),
    "range: end past what is held": (lambda c, d: c.get_range_f32(0, 0, 6), IndexError, ["end", "5", "6"]),
    "range: start past end": (lambda c, d: c.get_range_f32(0, 3, 2), IndexError, ["start", "3", "2"]),
    "range: negative start": (lambda c, d: c.get_range_f32(0, -1, 2), IndexError, ["start", "-1"]),
    "range: layer": (lambda c, d: c.get_range_f32(2, 0, 1), IndexError, ["layer"]),
    "range: float": (lambda c, d: c.get_range_f32(0, 0.0, 1), TypeError, ["start", "int", "float"]),
    "range: tensor of floats": (lambda c, d: c.get_range_f32(0, 0, torch.tensor(1.0)), TypeError, ["end"]),
    "range: huge": (lambda c, d: c.get_range_f32(0, 0, 2**64), IndexError, ["end", "64 bits"]),
    "raw: end": (lambda c, d: c.get_range_raw(0, 0, 6), IndexError, ["end"]),
    "raw: layer": (lambda c, d: c.get_range_raw(9, 0, 1), IndexError, ["layer"]),
    "valid: layer": (lambda c, d: c.get_valid_f32(-2), IndexError, ["layer", "-2"]),
    "valid: layer a tensor": (lambda c, d: c.get_valid_f32(torch.ones(2)), TypeError, ["layer"]),
    "gather: layer": (lambda c, d: c.gather(2, t(1, dtype=torch.int64).to(d)), IndexError, ["layer"]),
    "gather: indices a list": (lambda c, d: c.gather(0, [0, 1]), TypeError, ["indices", "list"]),
    "gather: indices int32": (lambda c, d: c.gather(0, t(2, dtype=torch.int32).to(d)), TypeError, ["indices", "int64", "int32"]),
    "gather: indices float": (lambda c, d: c.gather(0, torch.tensor([NAN]).to(d)), TypeError, ["indices", "int64"]),
    "gather: indices a scalar": (lambda c, d: c.gather(0, torch.tensor(1).to(d)), ValueError, ["indices", "[n]"]),
    "gather: indices of 3 dimensions": (lambda c, d: c.gather(0, t(1, 1, 1, dtype=torch.int64).to(d)), ValueError, ["indices"]),
    "gather: indices of another batch": (lambda c, d: c.gather(0, t(2, 3, dtype=torch.int64).to(d)), ValueError, ["indices", "[1, n]", "[2, 3]"]),
    "gather: indices on meta": (lambda c, d: c.gather(0, t(2, dtype=torch.int64).to("meta")), ValueError, ["indices", "device"]),
    "gather: dtype float64": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), dtype=torch.float64), TypeError, ["dtype", "float64"]),
    "gather: dtype a string": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), dtype="float32"), TypeError, ["dtype", "str"]),
    "gather: out one tensor": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=t(1, 2, 8).to(d)), TypeError, ["out", "pair"]),
    "gather: out of three": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=(t(1, 2, 8),) * 3), TypeError, ["out", "pair"]),
    "gather: out of lists": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=([1], [2])), TypeError, ["out[0]", "list"]),
    "gather: out too short": (lambda c, d: c.gather(0, t(2, dtype=torch.int64).to(d), out=(t(1, 2, 8).to(d), t(1, 2, 8).to(d))), ValueError, ["out[0]", "[1, 2, 2, 8]", "[1, 2, 8]"]),
    "gather: out of another dtype": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=(t(1, 2, 8).to(d), t(1, 2, 8).half().to(d))), TypeError, ["out[1]", "float32", "float16"]),
    "gather: out without unit stride": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=(t(1, 8, 2).to(d).transpose(1, 2), t(1, 2, 8).to(d))), ValueError, ["out[0]", "stride"]),
    "gather: out expanded": (lambda c, d: c.gather(0, t(2, dtype=torch.int64).to(d), out=(t(1, 2, 8).to(d).expand(2, 2, 8), t(2, 2, 8).to(d))), ValueError, ["out[0]", "expanded"]),
    "gather: out the same tensor twice": (lambda c, d: (lambda o: c.gather(0, t(1, dtype=torch.int64).to(d), out=(o, o)))(t(1, 2, 8).to(d)), ValueError, ["out[1]", "share memory with out[0]"]),
    "gather: out overlapping": (lambda c, d: (lambda o: c.gather(0, t(2, dtype=torch.int64).to(d), out=(o[:2], o[1:])))(t(3, 2, 8).to(d)), ValueError, ["out[1]", "share memory with out[0]"]),
    "gather: out the cache itself": (lambda c, d: c.gather(0, t(2, dtype=torch.int64).to(d), dtype=torch.float16, out=(c.k_cache[0, 0, :2], c.v_cache[0, 0, :2])), ValueError, ["out[0]", "share memory with k_cache"]),
    "gather: out on meta": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=(t(1, 2, 8).to("meta"), t(1, 2, 8).to(d))), ValueError, ["out[0]", "device"]),
    "gather: out requires grad": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), out=(t(1, 2, 8).to(d).requires_grad_(), t(1, 2, 8).to(d))), ValueError, ["out[0]", "grad"]),
    "range: out of another length": (lambda c, d: c.get_range_f32(0, 0, 3, out=(t(2, 2, 8).to(d), t(2, 2, 8).to(d))), ValueError, ["out[0]"]),
    "attend: layer": (lambda c, d: c.attend(2, t(2, 8).to(d)), IndexError, ["attend", "layer"]),
    "attend: query a list": (lambda c, d: c.attend(0, [1.0]), TypeError, ["query", "list"]),
    "attend: query of other head_dim": (lambda c, d: c.attend(0, t(2, 9).to(d)), ValueError, ["query", "query heads, 8", "[2, 9]"]),
    "attend: query of an odd group": (lambda c, d: c.attend(0, t(3, 8).to(d)), ValueError, ["query", "2 heads", "3"]),
    "attend: query expanded without end": (lambda c, d: c.attend(0, t(1, 1, 1, 1).to(d).expand(2**20, 1, 2**20, 8)), ValueError, ["query", "1048576"]),
    "attend: query without heads": (lambda c, d: c.attend(0, t(0, 8).to(d)), ValueError, ["query", "2 heads", "0"]),
    "attend: query float64": (lambda c, d: c.attend(0, t(2, 8).double().to(d)), TypeError, ["query", "float64"]),
    "attend: query strided": (lambda c, d: c.attend(0, t(8, 2).to(d).T), ValueError, ["query", "stride"]),
    "attend: query requires grad": (lambda c, d: c.attend(0, t(2, 8).to(d).requires_grad_()), ValueError, ["query", "grad"]),
    "attend: query on meta": (lambda c, d: c.attend(0, t(2, 8).to("meta")), ValueError, ["query", "device"]),
    "attend: query of another batch": (lambda c, d: c.attend(0, t(3, 1, 2, 8).to(d)), ValueError, ["query", "[3, 1, 2, 8]"]),
    "attend: window 0": (lambda c, d: c.attend(0, t(2, 8).to(d), window=0), ValueError, ["window", "0"]),
    "attend: window a float": (lambda c, d: c.attend(0, t(2, 8).to(d), window=2.0), TypeError, ["window", "float"]),
    "attend: softcap 0": (lambda c, d: c.attend(0, t(2, 8).to(d), softcap=0.0), ValueError, ["softcap"]),
    "attend: softcap NaN": (lambda c, d: c.attend(0, t(2, 8).to(d), softcap=NAN), ValueError, ["softcap"]),
    "attend: scale NaN": (lambda c, d: c.attend(0, t(2, 8).to(d), scale=NAN), ValueError, ["scale", "finite"]),
    "attend: scale a string": (lambda c, d: c.attend(0, t(2, 8).to(d), scale="1"), TypeError, ["scale", "str"]),
    "attend: out of another shape": (lambda c, d: c.attend(0, t(2, 8).to(d), out=t(4, 8).to(d)), ValueError, ["out", "[2, 8]", "[4, 8]"]),
    "attend: out of another dtype": (lambda c, d: c.attend(0, t(2, 8).to(d), out=t(2, 8).half().to(d)), TypeError, ["out", "float32", "float16"]),
    "attend: out expanded": (lambda c, d: c.attend(0, t(2, 8).to(d), out=t(1, 8).to(d).expand(2, 8)), ValueError, ["out", "expanded"]),
    "attend: out the query": (lambda c, d: (lambda q: c.attend(0, q, out=q))(t(2, 8).to(d)), ValueError, ["out", "query"]),
    "attend: out the cache": (lambda c, d: c.attend(0, t(2, 8).half().to(d), out=c.k_cache[0, 0, 0]), ValueError, ["out", "cache"]),
    "attend long: query heads": (lambda c, d: c.attend(0, t(1, 30, 3, 8).to(d)), ValueError, ["query", "2 heads", "3"]),
    "attend long: query float64": (lambda c, d: c.attend(0, t(1, 30, 2, 8).double().to(d)), TypeError, ["query", "float64"]),
    "attend long: layer": (lambda c, d: c.attend(5, t(1, 30, 2, 8).to(d)), IndexError, ["layer"]),
    "attend long: window": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), window=-1), ValueError, ["window"]),
    "attend long: out": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), out=t(1, 29, 2, 8).to(d)), ValueError, ["out"]),
    "append_attend: key": (lambda c, d: c.append_attend(0, t(2, 8).to(d), t(3, 8).to(d), t(2, 8).to(d)), ValueError, ["append_attend", "key", "[3, 8]"]),
    "append_attend: value": (lambda c, d: c.append_attend(0, t(2, 8).to(d), t(2, 8).to(d), None), TypeError, ["value", "NoneType"]),
    "append_attend: query longer than key": (lambda c, d: c.append_attend(0, t(1, 3, 2, 8).to(d), t(2, 8).to(d), t(2, 8).to(d)), ValueError, ["query", "1", "3"]),
    "append_attend: query heads": (lambda c, d: c.append_attend(0, t(3, 8).to(d), t(2, 8).to(d), t(2, 8).to(d)), ValueError, ["query", "heads"]),
    "append_attend: new_lengths": (lambda c, d: c.append_attend(0, t(2, 8).to(d), t(2, 8).to(d), t(2, 8).to(d), new_lengths=3), TypeError, ["new_lengths", "int"]),
    "append_attend long: key shorter": (lambda c, d: c.append_attend(0, t(1, 30, 2, 8).to(d), t(29, 2, 8).to(d), t(29, 2, 8).to(d)), ValueError, ["query", "29", "30"]),
    "append_attend long: key dtype": (lambda c, d: c.append_attend(0, t(1, 30, 2, 8).to(d), t(30, 2, 8).double().to(d), t(30, 2, 8).to(d)), TypeError, ["key", "float64"]),
    "attend long: scale NaN": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), scale=NAN), ValueError, ["scale", "finite"]),
    "attend long: softcap a string": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), softcap="a"), TypeError, ["softcap", "str"]),
    "attend long: window a float": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), window=2.5), TypeError, ["window", "float"]),
    "attend long: out a list": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), out=[1]), TypeError, ["out", "list"]),
    "attend: scale above 2^86": (lambda c, d: c.attend(0, t(2, 8).to(d), scale=1.001 * 2.0**86), ValueError, ["attend: scale", "2^86", "7.74"]),
    "attend long: scale below -2^86": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), scale=-3e38), ValueError, ["attend: scale", "2^86", "-3e+38"]),
    "attend: out whose rows overlap": (lambda c, d: c.attend(0, t(2, 8).to(d), out=t(16).to(d).as_strided((2, 8), (4, 1))), ValueError, ["out", "share memory", "[4, 1]"]),
    "attend long: out whose rows overlap": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), out=t(480).to(d).as_strided((1, 30, 2, 8), (0, 12, 8, 1))), ValueError, ["out", "share memory", "[0, 12, 8, 1]"]),
    "gather: out whose rows overlap": (lambda c, d: c.gather(0, t(2, dtype=torch.int64).to(d), out=(t(2, 2, 8).to(d), t(32).to(d).as_strided((2, 2, 8), (12, 8, 1)))), ValueError, ["out[1]", "share memory", "[12, 8, 1]"]),
    "gather: out the state": (lambda c, d: c.gather(0, t(1, dtype=torch.int64).to(d), dtype=torch.float16, out=(c.tensors.state.view(torch.float16).view(-1)[:16].view(1, 2, 8), t(1, 2, 8).half().to(d))), ValueError, ["out[0]", "share memory with state"]),
    "attend: scale beyond FP32": (lambda c, d: c.attend(0, t(2, 8).to(d), scale=1e300), ValueError, ["scale", "FP32"]),
    "attend: softcap below FP32": (lambda c, d: c.attend(0, t(2, 8).to(d), softcap=1e-60), ValueError, ["softcap", "FP32"]),
    "attend: return_lse a string": (lambda c, d: c.attend(0, t(2, 8).to(d), return_lse="yes"), TypeError, ["return_lse", "str"]),
    "append_attend: out the key": (lambda c, d: (lambda k: c.append_attend(0, t(2, 8).to(d), k, t(2, 8).to(d), out=k))(t(2, 8).to(d)), ValueError, ["out", "key"]),
    "append_attend: out the value": (lambda c, d: (lambda v: c.append_attend(0, t(2, 8).to(d), t(2, 8).to(d), v, out=v))(t(2, 8).to(d)), ValueError, ["out", "value"]),
    "append_attend long: out the key": (lambda c, d: (lambda k: c.append_attend(0, t(1, 30, 2, 8).to(d), k, t(1, 30, 2, 8).to(d), out=k))(t(1, 30, 2, 8).to(d)), ValueError, ["out", "key"]),
    "append_attend long: out expanded": (lambda c, d: c.append_attend(0, t(1, 30, 2, 8).to(d), t(30, 2, 8).to(d), t(30, 2, 8).to(d), out=t(1, 1, 2, 8).to(d).expand(1, 30, 2, 8)), ValueError, ["out", "expanded"]),
    "append_attend long: out requires grad": (lambda c, d: c.append_attend(0, t(1, 30, 2, 8).to(d), t(30, 2, 8).to(d), t(30, 2, 8).to(d), out=t(1, 30, 2, 8).to(d).requires_grad_()), ValueError, ["out", "grad"]),
    "attend long: out the cache": (lambda c, d: c.attend(0, t(1, 20, 2, 8).half().to(d), out=torch.as_strided(c.k_cache, (1, 20, 2, 8), (0, 1, 8, 1))), ValueError, ["out", "share memory"]),
    "k_cache replaced": (lambda c, d: setattr(c, "k_cache", c.v_cache), AttributeError, ["k_cache"]),
    "truncate past what is held": (lambda c, d: c.truncate(6), IndexError, ["n", "5", "6"]),
    "truncate negative": (lambda c, d: c.truncate(-1), IndexError, ["n", "-1"]),
    "truncate float": (lambda c, d: c.truncate(1.0), TypeError, ["n", "int", "float"]),
    "truncate None": (lambda c, d: c.truncate(None), TypeError, ["n", "NoneType"]),
    "truncate: list past what is held": (lambda c, d: c.truncate([6]), IndexError, ["n", "sequence 0", "5", "6"]),
    "truncate: list too long": (lambda c, d: c.truncate([1, 1]), ValueError, ["n", "1 sequences", "2"]),
    "truncate: list of floats": (lambda c, d: c.truncate([1.0]), TypeError, ["n", "int", "float"]),
    "truncate: tensor of floats": (lambda c, d: c.truncate(t(1).to(d)), TypeError, ["n", "int64", "float32"]),
    "truncate: tensor of another shape": (lambda c, d: c.truncate(t(2, dtype=torch.int64).to(d)), ValueError, ["n", "[1]", "[2]"]),
    "truncate: tensor on meta": (lambda c, d: c.truncate(t(1, dtype=torch.int64).to("meta")), ValueError, ["n", "device"]),
    "truncate: tensor of two dimensions": (lambda c, d: c.truncate(t(1, 1, dtype=torch.int64).to(d)), ValueError, ["n", "[1, 1]"]),
    "truncate: the state": (lambda c, d: c.truncate(c.cache_seqlens[0]), ValueError, ["n", "state", "copy"]),
    "truncate: a string": (lambda c, d: c.truncate("1"), TypeError, ["n", "str"]),
    "truncate: sequences out of range": (lambda c, d: c.truncate(1, sequences=[1]), IndexError, ["sequences", "0 to 0", "1"]),
    "truncate: sequences twice": (lambda c, d: c.truncate(1, sequences=[0, 0]), ValueError, ["sequences", "once", "0"]),
    "truncate: sequences an int": (lambda c, d: c.truncate(1, sequences=0), TypeError, ["sequences", "list", "int"]),
    "truncate: some past what is held": (lambda c, d: c.truncate(6, sequences=[0]), IndexError, ["n", "5", "6"]),
    "truncate: some negative": (lambda c, d: c.truncate(-1, sequences=t(1, dtype=torch.int64).to(d)), IndexError, ["n", "-1"]),
    "drop_newest more than is held": (lambda c, d: c.drop_newest(6), IndexError, ["drop_newest", "n", "5", "6"]),
    "drop_newest negative": (lambda c, d: c.drop_newest(-1), IndexError, ["drop_newest", "n", "-1"]),
    "drop_newest float": (lambda c, d: c.drop_newest(1.0), TypeError, ["drop_newest", "n", "int", "float"]),
    "drop_newest nothing": (lambda c, d: c.drop_newest(None), TypeError, ["drop_newest", "n", "NoneType"]),
    "drop_newest: list past what is held": (lambda c, d: c.drop_newest([6]), IndexError, ["n", "sequence 0", "5", "6"]),
    "drop_newest: list negative": (lambda c, d: c.drop_newest([-1]), IndexError, ["n", "-1"]),
    "drop_newest: list too long": (lambda c, d: c.drop_newest([1, 1]), ValueError, ["n", "1 sequences", "2"]),
    "drop_newest: tensor of floats": (lambda c, d: c.drop_newest(t(1).to(d)), TypeError, ["drop_newest", "n", "int64", "float32"]),
    "drop_newest: tensor of another shape": (lambda c, d: c.drop_newest(t(2, dtype=torch.int64).to(d)), ValueError, ["n", "[1]", "[2]"]),
    "drop_newest: tensor on meta": (lambda c, d: c.drop_newest(t(1, dtype=torch.int64).to("meta")), ValueError, ["n", "device"]),
    "drop_newest: the state": (lambda c, d: c.drop_newest(c.cache_seqlens[0]), ValueError, ["n", "state", "copy"]),
    "drop_newest: sequences twice": (lambda c, d: c.drop_newest(1, sequences=[0, 0]), ValueError, ["drop_newest", "sequences", "once"]),
    "drop_newest: some more than is held": (lambda c, d: c.drop_newest(6, sequences=[0]), IndexError, ["n", "5", "6"]),
    "drop_newest: some negative": (lambda c, d: c.drop_newest(-1, sequences=t(1, dtype=torch.int64).to(d)), IndexError, ["n", "at least 0", "-1"]),
    "append: sequences out of range": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), sequences=[1]), IndexError, ["sequences", "0 to 0", "1"]),
    "append: sequences an int": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), sequences=0), TypeError, ["sequences", "list", "int"]),
    "append: sequences of strings": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), sequences=["a"]), TypeError, ["sequences", "int", "str"]),
    "append: sequences a string": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), sequences="0"), TypeError, ["sequences", "str"]),
    "append: sequences twice": (lambda c, d: c.append(0, t(2, 1, 2, 8).to(d), t(2, 1, 2, 8).to(d), sequences=[0, 0]), ValueError, ["sequences", "once", "0"]),
    "append: too many sequences": (lambda c, d: c.append(0, t(2, 1, 2, 8).to(d), t(2, 1, 2, 8).to(d), sequences=t(2, dtype=torch.int64).to(d)), ValueError, ["sequences", "1", "2"]),
    "append: sequences of floats": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), sequences=t(1).to(d)), TypeError, ["sequences", "float32"]),
    "append: sequences on meta": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), sequences=t(1, dtype=torch.int64).to("meta")), ValueError, ["sequences", "device"]),
    "append: key of another batch than sequences": (lambda c, d: c.append(0, t(2, 1, 2, 8).to(d), t(2, 1, 2, 8).to(d), sequences=[0]), ValueError, ["key", "[1, T, 2, 8]", "[2, 1, 2, 8]"]),
    "append: new_lengths of another batch": (lambda c, d: c.append(0, t(2, 8).to(d), t(2, 8).to(d), new_lengths=t(2, dtype=torch.int64).to(d), sequences=[0]), ValueError, ["new_lengths", "[1]", "[2]"]),
    "append_all: sequences": (lambda c, d: c.append_all(t(2, 2, 8).to(d), t(2, 2, 8).to(d), sequences=[2]), IndexError, ["append_all", "sequences"]),
    "gather: sequences": (lambda c, d: c.gather(0, t(2, dtype=torch.int64).to(d), sequences=[2]), IndexError, ["gather", "sequences"]),
    "gather: indices of another batch than sequences": (lambda c, d: c.gather(0, t(2, 3, dtype=torch.int64).to(d), sequences=[0]), ValueError, ["indices", "[1, n]", "[2, 3]"]),
    "attend: sequences": (lambda c, d: c.attend(0, t(2, 8).to(d), sequences=[2]), IndexError, ["attend", "sequences"]),
    "attend: sequences and another batch": (lambda c, d: c.attend(0, t(2, 1, 2, 8).to(d), sequences=[0]), ValueError, ["query", "[1, T", "[2, 1, 2, 8]"]),
    "attend long: sequences": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), sequences=[-1]), IndexError, ["attend", "sequences", "-1"]),
    "attend long: sequences of floats": (lambda c, d: c.attend(0, t(1, 30, 2, 8).to(d), sequences=t(1).to(d)), TypeError, ["attend", "sequences"]),
    "append_attend: sequences": (lambda c, d: c.append_attend(0, t(2, 8).to(d), t(2, 8).to(d), t(2, 8).to(d), sequences=[0, 0]), ValueError, ["append_attend", "sequences", "once"]),
    "reset: out of range": (lambda c, d: c.reset([0, 3]), IndexError, ["reset", "sequences", "3"]),
    "reset: twice": (lambda c, d: c.reset([0, 0]), ValueError, ["sequences", "once"]),
    "reset: a bool": (lambda c, d: c.reset(True), TypeError, ["sequences", "bool"]),
    "reset: floats": (lambda c, d: c.reset(t(1).to(d)), TypeError, ["sequences", "int64", "float32"]),
    "reset: two dimensions": (lambda c, d: c.reset(t(1, 1, dtype=torch.int64).to(d)), ValueError, ["sequences", "[1, 1]"]),
    "reorder: None": (lambda c, d: c.reorder(None), TypeError, ["batch_indices", "NoneType"]),
    "reorder: an int": (lambda c, d: c.reorder(0), TypeError, ["batch_indices", "list", "int"]),
    "reorder: out of range": (lambda c, d: c.reorder([1]), IndexError, ["batch_indices", "0 to 0", "1"]),
    "reorder: negative": (lambda c, d: c.reorder([-1]), IndexError, ["batch_indices", "-1"]),
    "reorder: too many": (lambda c, d: c.reorder([0, 0]), ValueError, ["batch_indices", "1 sequences", "2"]),
    "reorder: tensor too long": (lambda c, d: c.reorder(t(2, dtype=torch.int64).to(d)), ValueError, ["batch_indices", "[1]", "[2]"]),
    "reorder: tensor of bools": (lambda c, d: c.reorder(t(1, dtype=torch.bool).to(d)), TypeError, ["batch_indices", "bool"]),
    "reorder: tensor on meta": (lambda c, d: c.reorder(t(1, dtype=torch.int64).to("meta")), ValueError, ["batch_indices", "device"]),
    "copy_sequence: src out of range": (lambda c, d: c.copy_sequence(1, 0), IndexError, ["src", "1"]),
    "copy_sequence: dst out of range": (lambda c, d: c.copy_sequence(0, 1), IndexError, ["dst", "1"]),
    "copy_sequence: dst twice": (lambda c, d: c.copy_sequence([0, 0], [0, 0]), ValueError, ["dst", "once"]),
    "copy_sequence: unequal": (lambda c, d: c.copy_sequence([0, 0], [0]), ValueError, ["src", "dst", "2", "1"]),
    "copy_sequence: a float": (lambda c, d: c.copy_sequence(0.0, 0), TypeError, ["src", "int", "float"]),
    "copy_sequence: tensor of floats": (lambda c, d: c.copy_sequence(t(1).to(d), 0), TypeError, ["src", "float32"]),
    "copy_sequence: tensor dst of floats": (lambda c, d: c.copy_sequence(0, t(1).to(d)), TypeError, ["dst", "float32"]),
    "copy_sequence: source a tensor": (lambda c, d: c.copy_sequence(0, 0, source=c.k_cache), TypeError, ["source", "StreamingKVCacheFp16", "Tensor"]),
    "copy_sequence: source the compiled half": (lambda c, d: c.copy_sequence(0, 0, source=c.native), TypeError, ["source", "StreamingKVCacheFp16"]),
    "copy_sequence: source of other layers": (lambda c, d: c.copy_sequence(0, 0, source=make_cache(d, num_layers=3)), ValueError, ["source", "num_layers", "2", "3"]),
    "copy_sequence: source of other heads": (lambda c, d: c.copy_sequence(0, 0, source=make_cache(d, num_heads=1)), ValueError, ["source", "num_heads", "2", "1"]),
    "copy_sequence: source of another head_dim": (lambda c, d: c.copy_sequence(0, 0, source=make_cache(d, head_dim=16)), ValueError, ["source", "head_dim", "8", "16"]),
    "copy_sequence: source of other sinks": (lambda c, d: c.copy_sequence(0, 0, source=make_cache(d, sink_positions=3)), ValueError, ["source", "sink_positions", "0", "3"]),
    "copy_sequence: source on another device": (lambda c, d: c.copy_sequence(0, 0, source=elsewhere(d)), ValueError, ["source", "device", "meta"]),
    "copy_sequence: source whose memory has moved": (lambda c, d: c.copy_sequence(0, 0, source=moved(d)), RuntimeError, ["copy_sequence", "source", "moved"]),
    "copy_sequence: src beyond source": (lambda c, d: c.copy_sequence(2, 0, source=make_cache(d, batch_size=2)), IndexError, ["src", "0 to 1", "source has 2", "got 2"]),
    "copy_sequence: dst beyond the cache": (lambda c, d: c.copy_sequence(1, 1, source=make_cache(d, batch_size=2)), IndexError, ["dst", "0 to 0", "the cache has 1", "got 1"]),
    "copy_sequence: src on another device than source": (lambda c, d: c.copy_sequence(t(1, dtype=torch.int64).to("meta"), 0, source=make_cache(d)), ValueError, ["src", "device"]),
    "copy_sequence: src of floats, source": (lambda c, d: c.copy_sequence(t(1).to(d), 0, source=make_cache(d)), TypeError, ["src", "float32"]),
    "copy_sequence: unequal, source": (lambda c, d: c.copy_sequence([0, 1], [0], source=make_cache(d, batch_size=2)), ValueError, ["src", "dst", "2", "1"]),
    "copy_sequence: dst twice, source": (lambda c, d: c.copy_sequence([0, 1], [0, 0], source=make_cache(d, batch_size=2)), ValueError, ["dst", "once"]),
    "copy_sequence: dst the state, source": (lambda c, d: c.copy_sequence(0, c.cache_seqlens[0], source=make_cache(d)), ValueError, ["dst", "state"]),
    "copy_sequence: source's own memory": (lambda c, d: ops.copy_from(*c.tensors[:3], c.v_cache, c.v_cache, c.tensors.state, torch.tensor([0]).to(d), torch.tensor([0]).to(d)), ValueError, ["source", "share memory"]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CALLS)
def test_wrong_calls(device: torch.device, wrong: str) -> None:
    call, error, words = CALLS[wrong]
    cache = make_cache(device)
    for layer in range(2):
        cache.append(layer, torch.randn(5, 2, 8, device=device) * 4e4, torch.randn(5, 2, 8, device=device))
    before = [x.clone() for x in cache.tensors[:4]]
    with pytest.raises(error) as raised:
        call(cache, device)
    sentence = str(raised.value)
    for word in words:
        assert word in sentence, sentence
    assert "\n" not in sentence and "incompatible function arguments" not in sentence
    after = cache.tensors[:4]
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    assert (len(cache), cache.position) == (5, 5)
    cache.append(0, torch.randn(2, 8, device=device), torch.randn(2, 8, device=device))  # it still works
    assert cache.position == 6


@pytest.mark.parametrize("head_dim", [7, 12, 520])
def test_head_sizes_without_attention(device: torch.device, head_dim: int) -> None:
    cache = make_cache(device, head_dim=head_dim)
    with pytest.raises(
        ValueError, match=f"head_dim must be a multiple of 8 up to 512 for attention, and .* {head_dim}"
    ):
        cache.attend(0, torch.ones(2, head_dim, device=device))


def test_grad_is_no_matter_without_grad_mode(device: torch.device) -> None:
    cache = make_cache(device)
    key = torch.randn(2, 8, device=device, requires_grad=True)
    with torch.no_grad():
        cache.append(0, key, key)
    with torch.inference_mode():
        cache.append(0, key * 2, key * 2)
    cache.append(0, key.detach(), key.detach())
    assert cache.position == 3


GOOD_ARGUMENTS = {"num_layers": 2, "max_positions": 8, "num_heads": 2, "head_dim": 8, "device": "cpu"}


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"num_layers": 0}, ValueError, ["num_layers", "0"]),
        ({"num_layers": -1}, ValueError, ["num_layers", "-1"]),
        ({"max_positions": 0}, ValueError, ["max_positions"]),
        ({"num_heads": 0}, ValueError, ["num_heads"]),
        ({"head_dim": -8}, ValueError, ["head_dim"]),
        ({"batch_size": 0}, ValueError, ["batch_size"]),
        ({"num_layers": 1.0}, TypeError, ["num_layers", "int", "float"]),
        ({"max_positions": "8"}, TypeError, ["max_positions", "str"]),
        ({"head_dim": None}, TypeError, ["head_dim", "NoneType"]),
        ({"batch_size": True}, TypeError, ["batch_size", "bool"]),
        ({"sink_positions": 8}, ValueError, ["sink_positions", "8"]),
        ({"sink_positions": -1}, ValueError, ["sink_positions"]),
        ({"sink_positions": 0.5}, TypeError, ["sink_positions"]),
        ({"overflow": "x"}, ValueError, ["overflow", "saturate", "inf", "x"]),
        ({"overflow": None}, ValueError, ["overflow"]),
        ({"overflow": ["inf"]}, ValueError, ["overflow"]),
        ({"device": "meta"}, ValueError, ["device", "meta"]),
        ({"device": "nonsense"}, ValueError, ["device", "nonsense"]),
        ({"device": 1.5}, ValueError, ["device"]),
        ({"device": "cuda:99"}, ValueError, ["device", "cuda:99"]),
        ({"max_positions": 2**40}, MemoryError, ["max_positions", "GB"]),
        ({"max_positions": 2**62, "num_heads": 2**40}, MemoryError, ["GB"]),
        ({"num_heads": 2**40}, MemoryError, ["GB"]),
    ],
)
def test_wrong_construction(wrong: dict[str, object], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        StreamingKVCacheFp16(**(GOOD_ARGUMENTS | wrong))  # type: ignore[arg-type]
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU to use")
def test_cuda_that_is_not_there() -> None:
    """The default device on a machine without one: the reason, and what to do."""
    with pytest.raises(ValueError, match=r"device='cuda' needs a CUDA") as raised:
        StreamingKVCacheFp16(2, 8, 2, 8)
    assert "device='cpu'" in str(raised.value)
    if not build_info.with_cuda:
        assert build_info.reason in str(raised.value)
        assert "KVCACHE_EXT_CUDA=1" in str(raised.value)


def test_tensors_of_another_device(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("needs a second device")
    cache = make_cache(device)
    with pytest.raises(ValueError, match="key must be on the cache's device cuda"):
        cache.append(0, torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match="indices must be on the cache's device cuda"):
        cache.gather(0, torch.arange(2))
    with pytest.raises(ValueError, match="n must be on the cache's device cuda"):
        cache.drop_newest(torch.tensor([0]))
    on_cpu = make_cache(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"source must be on the cache's device cuda.*, got cpu"):
        cache.copy_sequence(0, 0, source=on_cpu)
    with pytest.raises(ValueError, match="source must be on the cache's device cpu, got cuda"):
        on_cpu.copy_sequence(0, 0, source=cache)
    with pytest.raises(ValueError, match="src must be on the cache's device cuda"):
        cache.copy_sequence(torch.tensor([0]), torch.tensor([0], device=device), source=make_cache(device))
    with pytest.raises(ValueError, match="value must be on the cache's device cpu"):
        on_cpu.append(0, torch.ones(2, 8), torch.ones(2, 8, device=device))


def test_bad_tensors_through_the_dispatcher(device: torch.device) -> None:
    """The registered ops check the cache's own tensors too."""
    c = make_cache(device)
    key = torch.ones(1, 1, 2, 8, device=device)
    append = torch.ops.kvcache_ext.append
    with pytest.raises(TypeError, match=r"k_cache and v_cache must be torch\.float16"):
        append(
            c.k_cache.float(), c.v_cache.float(), c.tensors.state, c.tensors.overflow_counts, 0, key, key, None, 0, True
        )
    with pytest.raises(ValueError, match="contiguous and of one shape"):
        append(
            c.k_cache[:, :, ::2],
            c.v_cache[:, :, ::2],
            c.tensors.state,
            c.tensors.overflow_counts,
            0,
            key,
            key,
            None,
            0,
            True,
        )
    with pytest.raises(ValueError, match="state must be contiguous and"):
        append(c.k_cache, c.v_cache, c.tensors.state[:2], c.tensors.overflow_counts, 0, key, key, None, 0, True)
    with pytest.raises(ValueError, match="overflow_counts must be contiguous"):
        append(*c.tensors[:3], c.tensors.overflow_counts[:1], 0, key, key, None, 0, True)
    with pytest.raises(ValueError, match="sink_positions must be from 0 to"):
        append(*c.tensors[:4], 0, key, key, None, 8, True)
    with pytest.raises(IndexError, match="layer must be from 0 to 1"):
        append(*c.tensors[:4], 2, key, key, None, 0, True)
    with pytest.raises(ValueError, match="n must not be negative"):
        torch.ops.kvcache_ext.truncate(c.k_cache, c.tensors.state, -1, 0)
    workspace = torch.zeros(c.tensors.workspace.numel() + 1, device=device)[1:]
    with pytest.raises(ValueError, match="workspace must begin at a multiple of 16 bytes"):
        ops.attend(*c.tensors[:3], workspace, 0, key, scale=1.0, out=torch.empty_like(key))


def test_memory_beside_is_not_shared(device: torch.device) -> None:
    """An expanded tensor has fewer bytes than elements: what lies behind them is somebody else's."""
    cache = make_cache(device, batch_size=4)
    buffer = torch.ones(1000, device=device)
    one, behind = buffer[:16].view(1, 1, 2, 8).expand(4, 1, 2, 8), buffer[16:80].view(4, 1, 2, 8)
    assert cache.append_attend(0, one, one, one, out=behind) is behind
    assert cache.attend(0, one, out=behind) is behind
    with pytest.raises(ValueError, match="out must not share memory with query"):
        cache.attend(0, one, out=buffer[15:79].view(4, 1, 2, 8))
    spread = buffer[:120].view(4, 30)[:, :16].view(4, 1, 2, 8)  # rows far apart, and out between them
    with pytest.raises(ValueError, match="out must not share memory with query"):
        cache.attend(0, spread, out=buffer[100:164].view(4, 1, 2, 8))


def test_a_query_that_is_about_to_be_overwritten(device: torch.device) -> None:
    """Read and written by one launch: a race on a GPU."""
    cache = make_cache(device)
    new = torch.ones(1, 1, 2, 8, dtype=torch.float16, device=device)
    cache.append(0, new, new)
    cache.attend(0, cache.k_cache[0, :, :1])  # nothing is written
    with pytest.raises(ValueError, match="append_attend: query must not be a view of the cache"):
        cache.append_attend(0, cache.k_cache[0, :, :1], new, new)


def test_tensors_that_the_dispatcher_would_copy(device: torch.device) -> None:
    """PyTorch's fallback for lazily negated tensors corrupts memory with ops that return nothing: it must not be used."""
    c = make_cache(device)
    x = torch.ones(1, 1, 2, 8, device=device)
    for _ in range(20):
        for argument in ("out", "workspace", "query"):
            given = {"workspace": c.tensors.workspace, "query": x, "out": torch.empty_like(x)}
            given[argument] = torch._neg_view(given[argument])
            with pytest.raises(ValueError, match=f"attend: {argument} must be a plain tensor"):
                ops.attend(*c.tensors[:3], layer=0, scale=1.0, **given)
    with pytest.raises(ValueError, match="append: key must have memory"):
        zero = torch._efficientzerotensor((1, 1, 2, 8), device=device)
        ops.append(*c.tensors[:4], 0, zero, x)


def test_one_tensor_on_meta_through_the_dispatcher(device: torch.device) -> None:
    """It makes the dispatcher choose the fake, which must not do nothing in silence."""
    c = make_cache(device)
    x = torch.ones(1, 1, 2, 8, device=device)
    with pytest.raises(ValueError, match=r"append: value must be on the cache's device .*, got meta"):
        ops.append(*c.tensors[:4], 0, x, x.to("meta"))
    with pytest.raises(ValueError, match="truncate: sequences must be on the cache's device"):
        ops.truncate(c.k_cache, c.tensors.state, 0, sequences=torch.zeros(1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="gather: indices must be on the cache's device"):
        ops.gather(*c.tensors[:3], 0, torch.zeros(1, dtype=torch.int64, device="meta"))


def test_tensors_of_a_function_transform(device: torch.device) -> None:
    """vmap's and grad's wrappers have no memory that a kernel could read."""
    cache = make_cache(device)
    x = torch.ones(3, 2, 8, device=device)
    with pytest.raises(ValueError, match="append: key must have memory of its own"):
        torch.vmap(lambda key: (cache.append(0, key, key), key)[1])(x)
    with pytest.raises(ValueError, match="attend: query must have memory of its own"):
        torch.func.grad(lambda query: cache.attend(0, query).sum())(x[0])
    with pytest.raises(ValueError, match="gather: indices must have memory of its own"):
        torch.vmap(lambda i: cache.gather(0, i)[0])(torch.zeros(3, 2, dtype=torch.int64, device=device))
    assert cache.is_empty()
