"""`Fp16Cache`: the cache that `generate` and a model are given."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import Cache

from ...errors import shown
from . import files
from .build import build
from .changes import keep, repeat, select, take_back
from .graphs import DecodeGraph, replayed_steps
from .groups import LayerGroup
from .indexed import IndexedLayer
from .layer_plan import model_type_of
from .layers import AbsentLayer, Fp16Layer
from .padding import DeferredMaskCheck
from .shared import SharedState
from .states import StateLayer, refuse_to_take_back
from .version import NAME


class Fp16Cache(Cache):
    """A transformers `Cache` whose keys and values are FP16 in preallocated memory, for FP32, FP16 and BF16 models.

    Make one with `for_model`, and pass it as `past_key_values` to `generate` or to the model.

    Attributes:
        caches: the `StreamingKVCacheFp16`s, one for all layers of one shape. They may be read and saved.
        layers: the model's layers, in its order. `attention_layers` are those with keys and values, `Fp16Layer`s;
            `state_layers` those with recurrent or convolutional states, some of which may be both.
        shared: what the layers have in common. It is for this package's own modules.
    """

    shared: SharedState
    caches: list[LayerGroup]
    attention_layers: list[Fp16Layer]
    state_layers: list[StateLayer]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise TypeError(
            "Fp16Cache: make one with Fp16Cache.for_model(model, max_positions), or with Fp16Cache.load(path, model)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp16Cache:
        self.shared.refuse_copies()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.shared = copy.deepcopy(self.shared, memo)  # first, as a layer can be copied only after it
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.shared.refuse_copies()
        self.shared.append_pending()
        return super().__reduce_ex__(protocol)

    @classmethod
    def for_model(
        cls,
        model: Any,
        max_positions: int,
        batch_size: int = 1,
        *,
        attention: str | None = NAME,
        overflow: str = "saturate",
        precision: str = "auto",
        compileable: bool = False,
        group: Any = None,
        exchange: str = "auto",
        timeout: float = 60.0,
    ) -> Fp16Cache:
        """A cache for this model: shapes, windows and devices are the model's. Of one that is sharded by tensor
        parallelism it has this rank's heads: every rank makes its own.

        Args:
            model: a decoder-only model of transformers, on its device or devices.
            max_positions: the longest text, in tokens. Sliding window layers take window + 128 positions at most.
            batch_size: the most sequences at a time. Beams count: batch times `num_beams`.
            attention: "kvcache_ext" sets the model to this package's attention, which reads the FP16 data where it lies
                (`model.set_attn_implementation("sdpa")`, or "eager", undoes that, also between two calls with the same
                cache). None leaves the model's attention alone: it then gets gathered keys and values of its own dtype,
                copied out at every step.
            overflow: what becomes of finite values beyond FP16's range: see `StreamingKVCacheFp16`.
            precision: of attention over many new tokens (a prompt): "fp32" answers at FP32 accuracy; "fp16" rounds
                queries and weights to FP16, for twice the speed on a GPU with an error of some 3e-4; "auto" takes
                "fp32" for FP32 models and "fp16" for FP16 and BF16 ones.
            compileable: let `generate` compile the model by itself, as it does with `StaticCache`.
            group: a process group of torch.distributed, each rank of which has the whole model and makes the same
                calls. Positions of layers with full attention are dealt out to its ranks; `max_positions` is rounded up
                to a multiple of them. Sliding window layers and recurrent states are whole on every rank.
            exchange, timeout: how its ranks exchange answers, and the seconds after which one that does not answer is
                given up: see `ShardedKVCacheFp16`.

        Raises:
            NotImplementedError: the model has layers that such a cache cannot hold, or its positions cannot be dealt
                out to a group (see docs/transformers.md).
            MemoryError: it does not fit.
            RuntimeError: ranks of the group passed different models or arguments, or another rank could not make its
                cache.
            TypeError, ValueError: an argument is wrong; the model is FP64, or sharded among a number of ranks that does
                not divide its key/value heads.
        """
        layers, shared = build(
            model,
            max_positions,
            batch_size,
            attention=attention,
            overflow=overflow,
            precision=precision,
            compileable=compileable,
            group=group,
            exchange=exchange,
            timeout=timeout,
        )
        self = cls.__new__(cls)
        Cache.__init__(self, layers=layers)
        self.shared = shared
        self.caches = shared.caches
        self.attention_layers = [layer for layer in layers if isinstance(layer, Fp16Layer)]
        self.state_layers = [layer for layer in layers if isinstance(layer, StateLayer)]
        self.model_type, self.model_dtype = model_type_of(model), getattr(model, "dtype", None)
        return self

    # Positions that are dealt out to the ranks of a group

    def check(self) -> None:
        """Raises RuntimeError if the ranks of its group have fallen apart, as far as is known. Does not wait.

        A rank is missing, holds other lengths, or was fed other tokens. Each forward pass looks, too.
        """
        self.shared.check_ranks()

    def synchronize(self) -> None:
        """Waits until the current stream has done its work, at most `timeout` seconds, and checks.

        Raises:
            RuntimeError: as `check`, or it did not end in time. (Without a group there is nothing to wait for.)
        """
        if self.shared.agreement is not None:
            self.shared.agreement.synchronize()

    # Files (see files.py)

    def save(self, path: str | PathLike[str], *, progress: files.Progress = None) -> None:
        """Writes all that the cache holds to one file. `load` goes on from it: in another process, on another device,
        with more room.

        Like `StreamingKVCacheFp16.save`: a safetensors file with checksums, written whole or not at all. It has the
        tokens that are held, of the sequences in use. Where positions are dealt out to a group all ranks call it, and
        rank 0 writes the file.

        Args:
            path: the file. One that is there is replaced.
            progress: as for `StreamingKVCacheFp16.save`.

        Raises:
            RuntimeError: a forward pass was broken off, the current stream is being captured into a graph, or rank 0
                could not write the file.
            ValueError: a mask or a position of an earlier step was wrong, and this is the first call to notice.
            TypeError, OSError: the path is wrong, or the file cannot be written. The old one stays.
        """
        files.save(self, path, progress)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: Any,
        *,
        max_positions: int | None = None,
        batch_size: int | None = None,
        attention: str | None = NAME,
        overflow: str | None = None,
        precision: str = "auto",
        compileable: bool = False,
        group: Any = None,
        exchange: str = "auto",
        timeout: float = 60.0,
        progress: files.Progress = None,
    ) -> Fp16Cache:
        """A cache for this model with what `save` wrote: the same text goes on where it was.

        Keys and values depend on the model's weights, of which the file knows nothing: load it for the model that
        filled it, or for a copy. Of a model that is sharded by tensor parallelism a file is one rank's.

        Args:
            path: the file.
            model: the model, of any float dtype, on its device or devices, whatever those were.
            max_positions: the longest text; None: as it was. Less will do as long as what is held fits.
            batch_size: the most sequences at a time; None: as it was.
            overflow: None: as it was.
            attention, precision, compileable, group, exchange, timeout: as for `for_model`. With a group every rank
                reads the file, whatever number of ranks wrote it.
            progress: as for `StreamingKVCacheFp16.load`.

        Raises:
            ValueError: the file is no `Fp16Cache`'s, is truncated or damaged, is of a model with other layers (the
                error names what differs), or does not fit into `max_positions` or `batch_size`.
            NotImplementedError, MemoryError, TypeError: as `for_model`.
            OSError: the file cannot be read.

        After an error the model's attention is as it was.
        """
        options: dict[str, Any] = {"attention": attention, "overflow": overflow, "precision": precision}
        options |= {"compileable": compileable, "group": group, "exchange": exchange, "timeout": timeout}
        return files.load(cls.for_model, path, model, max_positions, batch_size, progress, options)

    @property
    def batch_size(self) -> int:
        """The most sequences at a time."""
        return self.shared.batch_size

    def memory_bytes(self) -> int:
        """Bytes of keys and values, all layers together."""
        return sum(cache.memory_bytes() for cache in self.caches)

    def overflow_counts(self) -> Tensor:
        """Finite values that FP16 could not hold, by layer: int64 on the CPU. This waits for the device."""
        self.shared.append_pending()
        counts = {id(cache): cache.overflow_counts().cpu() for cache in self.caches}
        none = torch.zeros((), dtype=torch.int64, device="cpu")
        stored = [isinstance(layer, Fp16Layer) and not isinstance(layer, AbsentLayer) for layer in self.layers]
        return torch.stack(
            [counts[id(at.cache)][at.index] if here else none for at, here in zip(self.layers, stored, strict=True)]
        )

    def __repr__(self) -> str:
        windows = sorted({layer.window for layer in self.attention_layers if layer.window is not None})
        return (
            f"Fp16Cache({len(self.layers)} layers, max_positions={self.shared.max_positions}, "
            f"batch_size={self.batch_size}, windows={windows}, {self.memory_bytes() / 1e6:.1f} MB, "
            f"{self.attention_layers[0].columns} tokens)"
        )

    # What generation does to a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The columns that a layer has: tokens and padding.

        Raises ValueError if the device has noticed that a token was fed twice.
        """
        if not is_compiling():
            self.shared.positions.raise_if_fed_twice()
        if layer_idx >= len(self.layers):
            return 0
        return self._attention_layer(layer_idx).get_seq_length()

    def _attention_layer(self, layer_idx: int) -> Fp16Layer:
        """This layer, or if it has no keys and values the first that has: all have as many columns."""
        layer = self.layers[layer_idx]
        return layer if isinstance(layer, Fp16Layer) else self._first_full

    @property
    def _first_full(self) -> Fp16Layer:
        """The first layer without a window, or if all have one the first."""
        return next((layer for layer in self.attention_layers if layer.window is None), self.attention_layers[0])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of columns of this layer's mask, and the first of them. transformers asks in each forward pass."""
        if layer_idx >= len(self.layers):
            return query_length, 0
        sizes = self._attention_layer(layer_idx).get_mask_sizes(query_length)
        if is_compiling():
            return sizes
        self.shared.append_pending()
        if self.shared.current_pass is None:  # (within one, layers before the one that asks have stored theirs)
            self._check_layers()
        if query_length == 0:
            self.refuse_no_tokens()
        return sizes

    def refuse_no_tokens(self) -> NoReturn:
        """Raises ValueError: a forward pass needs at least one new token."""
        raise ValueError(
            f"Fp16Cache: a forward pass over no tokens: it holds {self.get_seq_length()}, the whole text or more; "
            "reset() it to begin anew"
        )

    def check_whole(self) -> None:
        """Raises RuntimeError if the last forward pass was broken off after it had stored something."""
        self._check_layers()
        left_behind = self.shared.current_pass  # by a pass that was interrupted
        if self.shared.broken_off or (left_behind is not None and left_behind.has_stored(self)):
            raise RuntimeError("Fp16Cache: a forward pass was broken off after it had stored its tokens; reset() it")

    def _check_layers(self) -> None:
        counts = {layer.columns for layer in self.attention_layers}
        if len(counts) != 1:
            raise RuntimeError(
                f"Fp16Cache: its layers hold from {min(counts)} to {max(counts)} tokens, as after a forward pass "
                "that was broken off; reset() it"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """A layer's new keys and values, `[B, H, T, D]`: see `Fp16Layer.update`."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"Fp16Cache: it was made for a model of {len(self.layers)} layers, and this one has a layer {layer_idx}"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def offload(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: keys and values stay where they are allocated."""
        self.attention_layers[0].offload()

    prefetch = offload

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        shared = self.shared
        shared.pending = shared.current_pass = None
        shared.broken_off = False
        shared.state_padding = DeferredMaskCheck()
        shared.forget_tokens()
        shared.padding.forget()
        shared.active = None
        for layer in self.attention_layers:
            layer.columns = layer.first_held = 0
        for other in self.layers:
            if isinstance(other, (StateLayer, IndexedLayer)):
                other.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest `-tokens_to_remove` tokens back, such as those that assisted decoding rejects.

        Raises:
            ValueError: the number is positive, more than there are tokens, or more than the ring of a sliding window
                layer can take back (128, once it is full). The cache is unchanged.
            TypeError: it is no integer.
            RuntimeError: a forward pass was broken off, and layers hold different tokens.
            NotImplementedError: some would be left, and the model has recurrent or convolutional states.
        """
        try:
            count = -operator.index(tokens_to_remove)
        except TypeError:
            raise TypeError(f"Fp16Cache: crop takes an integer, got {shown(tokens_to_remove)}") from None
        if count < 0:
            raise ValueError(
                f"Fp16Cache: crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}"
            )
        if count == 0:
            return
        self.shared.append_pending()
        self.check_whole()
        if self.state_layers and count < self.attention_layers[0].columns:
            refuse_to_take_back()
        take_back(self, count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was. `beam_idx`: integers `[n]`.

        Raises:
            TypeError, ValueError, IndexError: they are no integers, none, more than `batch_size`, or no sequences in
                use. The cache is unchanged. (Numbers on a GPU are not checked, as that would wait for it. One that is
                out of range leaves its sequence as it is.)
        """
        select(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times, its copies side by side. `batch_size` must have room for them."""
        repeat(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these sequences, in this order: integers `[n]`, or bools, one for each sequence in use."""
        keep(self, indices)

    # CUDA graphs

    def decode_graph(self, model: Any, *, compile: bool = False) -> DecodeGraph:
        """One decode step of `model` with this cache as a CUDA graph: see `DecodeGraph`."""
        return DecodeGraph(model, self, compile=compile)

    @contextmanager
    def cuda_graphs(self, model: Any, *, compile: bool = False) -> Iterator[None]:
        """Within this block `model` (and so `model.generate`) runs its one-token steps as a replayed CUDA graph.

            with cache.cuda_graphs(model):
                model.generate(**inputs, past_key_values=cache)

        Everything else runs as it always does: several tokens at once, the first tokens of a text, a step without
        `position_ids` (`generate` passes them), or one with an argument that the graph does not know. The token of a
        one-token step must not be padding, also where a prompt comes in chunks of one. `compile`: see `DecodeGraph`. On
        a CPU there is no graph.
        """
        with replayed_steps(model, self, compile=compile):
            yield
