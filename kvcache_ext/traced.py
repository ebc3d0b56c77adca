"""The calls of a cache while torch.compile traces them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .errors import refuse_gradients
from .tensors import CacheTensors

Numbers = Sequence[int] | Tensor


class TracedCalls:
    """The methods of the native cache (`_C.Cache`), with its parameters, by the registered ops.

    The native cache parses Python objects, which cannot be traced. Ops take tensors and numbers, so lists become
    tensors here and are checked on the way; what tensors hold, the ops check when they run.
    """

    def __init__(self, tensors: CacheTensors) -> None:
        self.tensors = tensors

    def append(
        self, layer: int, key: Tensor, value: Tensor, new_lengths: Tensor | None, sequences: Numbers | None
    ) -> None:
        refuse_gradients("append", key=key, value=value)
        t = self.tensors
        ops.append(
            t.k_cache, t.v_cache, t.state, t.overflow_counts, layer, key, value, new_lengths,
            sink_positions=t.sink_positions, saturate=t.saturate, sequences=self._sequences("append", sequences),
        )  # fmt: skip

    def append_all(self, keys: Tensor, values: Tensor, new_lengths: Tensor | None, sequences: Numbers | None) -> None:
        refuse_gradients("append_all", keys=keys, values=values)
        t = self.tensors
        ops.append_all(
            t.k_cache, t.v_cache, t.state, t.overflow_counts, keys, values, new_lengths,
            sink_positions=t.sink_positions, saturate=t.saturate, sequences=self._sequences("append_all", sequences),
        )  # fmt: skip

    def gather(
        self,
        layer: int,
        indices: Tensor,
        dtype: torch.dtype,
        out: tuple[Tensor, Tensor] | None,
        sequences: Numbers | None,
    ) -> tuple[Tensor, Tensor]:
        t = self.tensors
        return ops.gather(
            t.k_cache, t.v_cache, t.state, layer, indices,
            sink_positions=t.sink_positions, dtype=dtype, out=out, sequences=self._sequences("gather", sequences),
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        query: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        return_lse: bool,
        out: Tensor | None,
        rounds: bool,
        sequences: Numbers | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse_gradients("attend", query=query, out=out)
        t = self.tensors
        options = self._options(scale, window, softcap)
        out, lse = self._outputs(query, out, return_lse)
        ops.attend(
            t.k_cache, t.v_cache, t.state, t.workspace, layer, query,
            sink_positions=t.sink_positions, scale=options[0], window=options[1], softcap=options[2], out=out, lse=lse,
            sequences=self._sequences("attend", sequences), rounds=rounds,
        )  # fmt: skip
        return out if lse is None else (out, lse)

    def append_attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        new_lengths: Tensor | None,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        return_lse: bool,
        out: Tensor | None,
        rounds: bool,
        sequences: Numbers | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse_gradients("append_attend", query=query, key=key, value=value, out=out)
        t = self.tensors
        options = self._options(scale, window, softcap)
        out, lse = self._outputs(query, out, return_lse)
        ops.append_attend(
            t.k_cache, t.v_cache, t.state, t.overflow_counts, t.workspace, layer, query, key, value, new_lengths,
            sink_positions=t.sink_positions, saturate=t.saturate,
            scale=options[0], window=options[1], softcap=options[2], out=out, lse=lse,
            sequences=self._sequences("append_attend", sequences), rounds=rounds,
        )  # fmt: skip
        return out if lse is None else (out, lse)

    def truncate(self, n: int | Numbers, sequences: Numbers | None) -> None:
        self._shorten("truncate", n, sequences, newest=False)

    def drop_newest(self, n: int | Numbers, sequences: Numbers | None) -> None:
        self._shorten("drop_newest", n, sequences, newest=True)

    def reset(self, sequences: Numbers | None) -> None:
        t = self.tensors
        ops.reset(t.k_cache, t.state, self._sequences("reset", sequences), sink_positions=t.sink_positions)

    def reorder(self, batch_indices: Numbers) -> None:
        t = self.tensors
        sources = self._indices("reorder", "batch_indices", batch_indices, distinct=False)
        ops.copy_sequences(t.k_cache, t.v_cache, t.state, sources, sink_positions=t.sink_positions)

    def copy_sequence(self, src: int | Numbers, dst: int | Numbers) -> None:
        t = self.tensors
        sources = self._indices("copy_sequence", "src", src, distinct=False)
        destinations = self._indices("copy_sequence", "dst", dst)
        ops.copy_sequences(t.k_cache, t.v_cache, t.state, sources, destinations, sink_positions=t.sink_positions)

    def copy_from(self, src: int | Numbers, dst: int | Numbers, source: CacheTensors) -> None:
        t = self.tensors
        sources = TracedCalls(source)._indices("copy_sequence", "src", src, distinct=False, owner="source")
        destinations = self._indices("copy_sequence", "dst", dst)
        ops.copy_from(
            t.k_cache, t.v_cache, t.state, source.k_cache, source.v_cache, source.state, sources, destinations,
            sink_positions=t.sink_positions,
        )  # fmt: skip

    def clear(self) -> None:
        t = self.tensors
        ops.clear(t.k_cache, t.state, t.overflow_counts, sink_positions=t.sink_positions)

    # From Python objects to what ops take

    def _shorten(self, op: str, n: int | Numbers, sequences: Numbers | None, *, newest: bool) -> None:
        t = self.tensors
        length: int | Tensor
        chosen = self._sequences(op, sequences)
        if isinstance(n, Tensor):
            entries = t.k_cache.shape[1] if chosen is None else chosen.shape[0]
            length = n.expand(entries).contiguous() if n.dim() == 0 else n  # one number for all
        else:
            numbers = self._ints(op, "n", n)
            if any(number < 0 for number in numbers):
                raise IndexError(f"{op}: n must be at least 0, got {n}")
            length = n if isinstance(n, int) else torch.tensor(numbers, dtype=torch.int64, device=t.k_cache.device)
        ops.truncate(
            t.k_cache, t.state, length, sequences=chosen, sink_positions=t.sink_positions, newest=newest
        )  # fmt: skip

    @staticmethod
    def _ints(op: str, name: str, numbers: int | Sequence[int]) -> list[int]:
        as_list = [numbers] if isinstance(numbers, int) else list(numbers)
        for number in as_list:
            if isinstance(number, (bool, float, str)):
                raise TypeError(f"{op}: {name} must be an int, got {type(number).__name__}")
        return as_list

    def _indices(
        self, op: str, name: str, numbers: int | Numbers, *, distinct: bool = True, owner: str = "the cache"
    ) -> Tensor:
        """Sequences of this cache as a tensor `[n]`. `owner`: what an error calls the cache."""
        if isinstance(numbers, Tensor):
            return numbers.view(1) if numbers.dim() == 0 else numbers
        if name == "sequences" and isinstance(numbers, int):
            raise TypeError(f"{op}: sequences must be a list of ints or a tensor of them, got int")
        as_list = self._ints(op, name, numbers)
        batch_size = self.tensors.k_cache.shape[1]
        for number in as_list:
            if isinstance(number, int) and not 0 <= number < batch_size:  # else it is a number of the device's
                raise IndexError(
                    f"{op}: {name} must be from 0 to {batch_size - 1}, as {owner} has {batch_size} "
                    f"sequences, got {number}"
                )
        # (Not by a set: to hash a number makes it a constant of the compiled code.)
        if distinct and any(a == b for i, a in enumerate(as_list) for b in as_list[:i] if isinstance(a, int)):
            raise ValueError(f"{op}: {name} must name each sequence once, got {as_list}")
        return torch.tensor(as_list, dtype=torch.int64, device=self.tensors.k_cache.device)

    def _sequences(self, op: str, numbers: Numbers | None) -> Tensor | None:
        return None if numbers is None else self._indices(op, "sequences", numbers)

    def _options(self, scale: float | None, window: int | None, softcap: float | None) -> tuple[float, int, float]:
        """Scale, window and softcap as the ops take them, where 0 means none."""
        if window is not None and window <= 0:
            raise ValueError(f"window must be positive or None, got {window}")
        if softcap is not None and not softcap > 0:  # nor NaN
            raise ValueError(f"softcap must be positive or None, got {softcap}")
        return self.tensors.k_cache.shape[-1] ** -0.5 if scale is None else scale, window or 0, softcap or 0.0

    def _outputs(self, query: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        """The tensors that the answer is written to: `out` or a new one, and the LSE if it is wanted."""
        if out is None:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if not return_lse:
            return out, None
        shape = query.shape[:-1] if query.dim() > 1 else (query.shape[0] // self.tensors.k_cache.shape[-1],)
        return out, torch.empty(shape, dtype=torch.float32, device=query.device)
