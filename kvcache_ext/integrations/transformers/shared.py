"""What all layers of a cache share: the sequences in use, and which tokens were padding."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .positions import Positions, Texts
from .version import NAME

if TYPE_CHECKING:
    from .cache import Storage
    from .layers import NewRows


class LateCheck:
    """Looks at a flag on the device without waiting for it: a raised one is noticed a step later."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._done: Any = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins without a flag: events cannot be copied
        return LateCheck, ()

    def raise_if_bad(self) -> None:
        if self._flag is None:
            return
        if self._done is not None:
            self._done.synchronize()  # of the step before; the device has the latest step still to do
        flag, self._flag = self._flag, None
        if flag.item():
            _mask_changed()

    def post(self, bad: Tensor) -> None:
        if not bad.is_cuda:
            self._flag = bad
            return
        self._flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._flag.copy_(bad, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(bad.device))


def _mask_changed() -> NoReturn:
    raise ValueError(
        "Fp16Cache: attention_mask says something else of the tokens in the cache than it did when they were appended "
        "(padding is not stored, so it cannot come back, and what is stored cannot be hidden by a 2D mask); pass the "
        "mask of the whole text, old and new, or reset() the cache (a prompt with a mask of its own pattern, such as "
        "one with images in it, is stored with its padding: for padded ones make the cache with attention=None)"
    )


def check_columns(mask: Tensor, held: int, new: int) -> None:
    """Whether a 2D mask is of the whole text: what the cache holds, and so many new tokens."""
    if mask.shape[1] == held + new:
        return
    again = "; with use_cache=False the whole text comes again at each step: leave it out"
    raise ValueError(
        f"Fp16Cache: attention_mask has {mask.shape[1]} columns, and the cache holds {held} tokens and gets {new} "
        "more: pass the mask of the whole text, old and new, or None if nothing is padding; reset() the cache first "
        f"if this is another text{again if mask.shape[1] == new == held + 1 else ''}"
    )


@dataclass
class Pass:
    """A forward pass under way."""

    columns: int  # that every layer had when it began
    rows: int | None = None  # new tokens, as the first layer got them


@dataclass
class Shared:
    """What the layers of one cache have in common. (Not the cache itself: a cycle would keep its memory alive.)"""

    batch_size: int
    max_positions: int
    config: Any  # of the model's attention modules: says which attention is in use
    precision: str
    compileable: bool
    layer_count: int = 0
    bounded: bool = False  # whether some layer has room for max_positions tokens and no more
    active: int | None = None  # sequences in use; None before the first tokens
    # Which columns the layers with each window hold: bool [active, n]. None: all of them. Columns beyond n are held.
    records: dict[int | None, Tensor | None] = field(default_factory=dict)
    # By device and number of them; never let go, as a captured graph has their address.
    sequences: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)
    late: dict[int | None, LateCheck] = field(default_factory=dict)
    storage: Storage | None = None
    positions: Positions | None = None  # that the sequences were fed
    texts: Texts = field(default_factory=Texts)
    passing: Pass | None = None  # the forward pass under way, where it is known
    broken_off: bool = False  # a pass ended with an error after it had stored something
    handed_out: NewRows | None = None  # by `update`, and not yet attended to

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        new = Shared.__new__(Shared)
        memo[id(self)] = new
        # The model's, whose attention may be changed later; or its copy's, where that has been copied before.
        new.config = memo.get(id(self.config), self.config)
        self.settle()
        rest = {name: value for name, value in self.__dict__.items() if name != "config"}
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in rest.items()})
        return new

    @property
    def own_attention(self) -> bool:
        return self.config._attn_implementation == NAME

    def use_batch(self, batch: int, held: int) -> None:
        """That a layer which holds so many tokens gets some of so many sequences."""
        if self.active == batch:
            return
        if self.active is not None and held:
            times, rest = divmod(batch, self.active)
            repeat_hint = ""
            if rest == 0 and times > 1:
                repeat_hint = (
                    f", or batch_repeat_interleave({times}) it to go on with each of its sequences {times} times "
                    "(num_return_sequences, num_beams)"
                )
            raise ValueError(
                f"Fp16Cache: it holds {self.active} sequences, and these are {batch}; reset() it to begin anew"
                + repeat_hint
            )
        if batch > self.batch_size:
            raise ValueError(
                f"Fp16Cache: {batch} sequences need batch_size={batch} or more at construction, got {self.batch_size} "
                "(beam search and num_return_sequences multiply the batch)"
            )
        if self.active is not None and self.storage is not None:
            self.storage.clear()  # of a pass that was broken off in its first layer
            self.texts.forget()
            if self.positions is not None:
                self.positions.forget()
        self.active = batch

    def has_padding(self) -> bool:
        """Whether padding is known of."""
        return any(record is not None for record in self.records.values())

    def settle(self) -> None:
        """Appends rows that `update` handed out to somebody who is no model's attention: a past made by hand.

        Those of a forward pass that was broken off before its attention are dropped.
        """
        rows, self.handed_out = self.handed_out, None
        if rows is not None and not rows.of_a_pass:
            rows.layer.append_rows(rows)

    def slots(self, device: torch.device) -> dict[str, Any]:
        """The batch slots in use, as the cache's methods take them; nothing where all of them are."""
        if self.active == self.batch_size:
            return {}
        key = device, self.active or 0
        if key not in self.sequences:
            self.sequences[key] = torch.arange(key[1], device=device)
        return {"sequences": self.sequences[key]}

    def raise_if_late(self, *, wait: bool = False) -> None:
        """Whether a mask that has been looked at since the last step was wrong; with `wait` also any position."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        for late in self.late.values():
            late.raise_if_bad()
        if wait and self.positions is not None:
            self.positions.raise_if_fed_twice(wait=True)

    def plan(self, mask: Tensor, seen: int, new: int, window: int | None, *, no_padding: bool = False) -> Tensor | None:
        """What a 2D mask `[B, seen + new]` means for the layers with this window.

        None: all new tokens exist. int32 `[B, 1, 1, 1]`: the last so many of each sequence do. int8 `[B, 1, 1, new]`:
        these do. (Four dimensions, because transformers takes those for a finished mask and passes them on.)

        On a GPU several tokens cost one synchronisation; one token costs none, and a mask that does not fit is then
        noticed at the next step. With `no_padding` a new token that does not exist is an error too.
        """
        if seen:
            self.use_batch(mask.shape[0], seen)
        late = self.late.setdefault(window, LateCheck())
        late.raise_if_bad()
        check_columns(mask, seen, new)
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Fp16Cache: an attention_mask cannot be captured into a CUDA graph, as it grows with the text; pass "
                "attention_mask=None (new tokens of a decode step are never padding)"
            )
        mask = mask.bool()
        keep = mask[:, seen:]
        record = self.records.get(window) if seen else None  # of nothing: of a call that was refused
        recorded = 0 if record is None else min(record.shape[1], seen)
        same = mask[:, recorded:seen].all()
        if record is not None:
            same = same & (mask[:, :recorded] == record[:, :recorded].to(mask.device)).all()
        if self.looks_late(mask) and new == 1:
            late.post(~(same & keep.all()) if no_padding else ~same)
            self.records[window] = mask.clone()
            return keep.to(torch.int32)[:, None, None]
        padded_left = (keep[:, 1:] >= keep[:, :-1]).all()
        same_, all_old, all_new, left = torch.stack([same, mask[:, :seen].all(), keep.all(), padded_left]).tolist()
        if not same_ or (no_padding and not all_new):
            _mask_changed()
        self.records[window] = None if all_old and all_new else mask.clone()
        if all_new:
            return None
        if left:
            return keep.sum(1, dtype=torch.int32)[:, None, None, None]
        return keep.to(torch.int8)[:, None, None]

    @staticmethod
    def looks_late(mask: Tensor) -> bool:
        """Whether looking at a mask on the host costs a synchronisation."""
        return mask.is_cuda

    def note_last(self, mask: Tensor, seen: int, window: int | None) -> None:
        """Records what a 2D mask says of a single new token, without looking at the rest."""
        if is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        record = self.records.get(window) if seen else None
        before = mask.new_ones(mask.shape[0], seen, dtype=torch.bool)
        if record is not None:
            known = record[:, :seen]
            before[:, : known.shape[1]] = known.to(mask.device)
        self.records[window] = torch.cat([before, mask[:, -1:].bool()], 1)

    def all_held_from(self, column: int, window: int | None) -> None:
        """That from this column on, the layers with this window hold all that came."""
        if is_compiling():  # no mask has been planned for it; and a record that grows would mean compiling anew
            return
        record = self.records.get(window)
        if record is not None:
            self.records[window] = record[:, :column] if column else None
