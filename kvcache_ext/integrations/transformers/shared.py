"""What the layers of one cache have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .agreement import Agreement
from .groups import LayerGroup
from .padding import DeferredMaskCheck, Padding
from .positions import FedTokens, Positions
from .protocol import PendingKeyValues
from .version import NAME


@dataclass
class ForwardPass:
    """A forward pass under way."""

    columns: int  # of every layer, when the pass began
    state_updates: list[int]  # of each layer with states or an index, when the pass began
    new_tokens: int | None = None  # as the first layer got them; None before that
    compared: bool = False  # ranks have told each other what they were fed

    @classmethod
    def begin(cls, cache: WholeCache) -> ForwardPass:
        return cls(cache.attention_layers[0].columns, cls._updates(cache))

    def has_stored(self, cache: WholeCache) -> bool:
        """Whether any layer has stored something since the pass began, or may have: models change states in place."""
        if cache.state_layers:
            return True
        columns = {layer.columns for layer in cache.attention_layers}
        return columns != {self.columns} or self.state_updates != self._updates(cache)

    def missed_states(self, cache: WholeCache) -> bool:
        """Whether a layer with states, that is here, has had no update since the pass began."""
        now = self._updates(cache)
        with_states = [
            layer in cache.state_layers and layer.here for layer in cache.layers if hasattr(layer, "updates")
        ]
        return any(at and was == is_ for at, was, is_ in zip(with_states, self.state_updates, now, strict=True))

    @staticmethod
    def _updates(cache: WholeCache) -> list[int]:
        return [layer.updates for layer in cache.layers if hasattr(layer, "updates")]


@dataclass
class SharedState:
    """What the layers of one cache have in common.

    Neither the layers nor the `Fp16Cache` are in here: such a reference cycle would keep their memory alive.
    """

    batch_size: int
    max_positions: int
    config: Any  # of the model's attention modules: names the attention in use
    precision: str  # "auto", "fp32" or "fp16"
    compileable: bool
    positions: Positions  # that the sequences were fed
    layer_count: int = 0
    caches: list[LayerGroup] = field(default_factory=list)
    agreement: Agreement | None = None  # of the ranks that positions are dealt out to; None: they are not
    bounded: bool = False  # whether some layer ends at max_positions tokens
    active: int | None = None  # sequences in use; None before the first tokens
    padding: Padding = field(default_factory=Padding)
    fed_tokens: FedTokens = field(default_factory=FedTokens)
    # The forward pass under way. None where there is none, or none that the hooks know of.
    current_pass: ForwardPass | None = None
    masked_calls: int = 0  # of attention, over gathered keys under a 4D mask
    state_padding: DeferredMaskCheck = field(default_factory=DeferredMaskCheck)  # of one-token steps, on a GPU
    broken_off: bool = False  # a pass ended with an error after it had stored something
    pending: PendingKeyValues | None = None  # `update` handed these out, and nobody has attended to them yet
    # The `sequences` argument of calls, by device and number. Kept for ever: captured graphs have their addresses.
    _first_sequences: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedState:
        new = SharedState.__new__(SharedState)
        memo[id(self)] = new
        self.refuse_copies()
        # The configuration is the model's own, as its attention may be changed later. Where a copy of the model was
        # made before, it is that copy's.
        new.config = memo.get(id(self.config), self.config)
        self.append_pending()
        rest = {name: value for name, value in self.__dict__.items() if name != "config"}
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in rest.items()})
        return new

    @property
    def own_attention(self) -> bool:
        """Whether the model is set to this package's attention."""
        return self.config._attn_implementation == NAME

    def use_sequences(self, count: int, columns: int) -> None:
        """Notes that a layer with so many columns gets new tokens of so many sequences; raises if that cannot be."""
        if self.active == count:
            return
        if self.active is not None and columns:
            times, rest = divmod(count, self.active)
            repeat_hint = ""
            if rest == 0 and times > 1:
                repeat_hint = (
                    f", or batch_repeat_interleave({times}) it to go on with each of its sequences {times} times "
                    "(num_return_sequences, num_beams)"
                )
            raise ValueError(
                f"Fp16Cache: it holds {self.active} sequences, and these are {count}; reset() it to begin anew"
                + repeat_hint
            )
        if count > self.batch_size:
            raise ValueError(
                f"Fp16Cache: {count} sequences need batch_size={count} or more at construction, got {self.batch_size} "
                "(beam search and num_return_sequences multiply the batch)"
            )
        if self.active is not None:
            self.forget_tokens()  # of a pass that was broken off in its first layer
        self.active = count

    def forget_tokens(self) -> None:
        for cache in self.caches:
            cache.storage.clear(cache)
        if self.agreement is not None:
            self.agreement.forget()
        self.fed_tokens.forget()
        self.positions.forget()

    def check_ranks(self) -> None:
        """Raises RuntimeError if the ranks that positions are dealt out to have fallen apart, as far as is known."""
        if self.agreement is not None:
            self.agreement.check()

    def compare_ranks(self) -> None:
        """Compares what the ranks are fed, once in each pass that gathers their rows. A collective call."""
        begun = self.current_pass
        if self.agreement is not None and begun is not None and not begun.compared:
            begun.compared = True
            self.agreement.compare(begun.columns)

    def refuse_copies(self) -> None:
        """Raises TypeError where positions are dealt out to ranks: a copy would need a process group of its own."""
        if self.agreement is not None:
            raise TypeError(
                "Fp16Cache: a cache whose positions are dealt out to a process group cannot be copied or pickled; "
                "save() and load() write and read it"
            )

    def append_pending(self) -> None:
        """Appends what `update` handed out and no attention took: a past made by hand.

        What a forward pass left behind, because it was broken off before its attention, is dropped.
        """
        pending, self.pending = self.pending, None
        if pending is not None and not pending.in_pass:
            pending.layer.append_pending(pending)

    def sequences_argument(self, device: torch.device) -> dict[str, Any]:
        """The argument that names the sequences in use to a `StreamingKVCacheFp16`; none where all are in use."""
        if self.active == self.batch_size:
            return {}
        key = device, self.active or 0
        if key not in self._first_sequences:
            self._first_sequences[key] = torch.arange(key[1], device=device)
        return {"sequences": self._first_sequences[key]}

    def raise_deferred_errors(self, *, wait: bool = False) -> None:
        """Raises if a mask of an earlier step was wrong. With `wait`, also if a position was."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        self.padding.raise_if_failed()
        if self.state_padding.has_failed():
            refuse_padding_of_states()
        if wait:
            self.positions.raise_if_fed_twice(wait=True)


def refuse_padding_of_states() -> NoReturn:
    raise ValueError(
        "Fp16Cache: the model has recurrent or convolutional states, which take in padding as if it were text, but on "
        "the left of a text's first tokens: pad there, and not at all in later turns; reset() the cache"
    )


class WholeCache(Protocol):
    """`Fp16Cache`, for the modules that cache.py imports: they cannot import it back."""

    shared: SharedState
    caches: list[LayerGroup]
    layers: list[Any]
    attention_layers: list[Any]  # of Fp16Layer, which imports this module
    state_layers: list[Any]  # of StateLayer
    model_type: str
    model_dtype: torch.dtype | None

    @property
    def batch_size(self) -> int: ...

    def get_seq_length(self, layer_idx: int = 0) -> int: ...

    def check_whole(self) -> None: ...

    def refuse_no_tokens(self) -> NoReturn: ...

    def reset(self) -> None: ...


def find_cache(values: Iterable[Any]) -> Any:
    """The `Fp16Cache` among these values, or None."""
    for value in values:
        if isinstance(value, Cache) and isinstance(getattr(value, "shared", None), SharedState):
            return value
    return None
