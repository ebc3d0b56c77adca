"""Which columns of a text are padding, as 2D masks say. Padding is not stored: a cache holds real tokens only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

from .protocol import mask_of_left_padding, mask_of_padding


class DeferredMaskCheck:
    """A check that the device does. The host asks for its result one step later, so that no step waits."""

    def __init__(self) -> None:
        self._failed: Tensor | None = None  # bool, on the host
        self._arrived: Any = None  # the event after the copy of `_failed`

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins without a check: events cannot be copied
        return DeferredMaskCheck, ()

    def start(self, failed: Tensor) -> None:
        """`failed`: a bool on the device."""
        if not failed.is_cuda:
            self._failed = failed
            return
        self._failed = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._failed.copy_(failed, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(failed.device))

    def raise_if_failed(self) -> None:
        if self.has_failed():
            _mask_changed()

    def has_failed(self) -> bool:
        """The result of the latest check, told once."""
        if self._failed is None:
            return False
        if self._arrived is not None:
            # This waits for the mask of the step before. The device still has the latest step to do.
            self._arrived.synchronize()
        failed, self._failed = self._failed, None
        return bool(failed.item())


def _mask_changed() -> NoReturn:
    raise ValueError(
        "Fp16Cache: attention_mask says something else of the tokens in the cache than it did when they were appended "
        "(padding is not stored, so it cannot come back, and what is stored cannot be hidden by a 2D mask); pass the "
        "mask of the whole text, old and new, or reset() the cache (a prompt with a mask of its own pattern, such as "
        "one with images in it, is stored with its padding: for padded ones make the cache with attention=None)"
    )


def check_columns(mask: Tensor, columns: int, new_tokens: int) -> None:
    """Raises unless a 2D mask is of the whole text: the columns so far, and so many new tokens."""
    if mask.shape[1] == columns + new_tokens:
        return
    again = "; with use_cache=False the whole text comes again at each step: leave it out"
    raise ValueError(
        f"Fp16Cache: attention_mask has {mask.shape[1]} columns, and the cache holds {columns} tokens and gets "
        f"{new_tokens} more: pass the mask of the whole text, old and new, or None if nothing is padding; reset() the "
        f"cache first if this is another text{again if mask.shape[1] == new_tokens == columns + 1 else ''}"
    )


class Padding:
    """The padding of a cache's texts, recorded for each window apart.

    transformers asks for one mask for each window. Padding is left out only where that mask's pattern is plain, so
    layers with different windows may hold different columns.
    """

    def __init__(self) -> None:
        # Which columns are real, by window: bool [sequences, n]. No entry: all are. Columns from n on are real.
        self._real: dict[int | None, Tensor] = {}
        self._checks: dict[int | None, DeferredMaskCheck] = {}  # by window

    def is_known(self) -> bool:
        """Whether there may be padding."""
        return bool(self._real)

    def windows(self) -> list[int | None]:
        """The windows whose layers may have padding."""
        return list(self._real)

    def real_columns(self, window: int | None, columns: int) -> Tensor | None:
        """Which of the first `columns` columns are real: bool `[sequences, columns]`. None: all."""
        real = self._real.get(window) if columns else None  # of no columns: left over from a call that was refused
        if real is None:
            return None
        missing = columns - real.shape[1]
        return pad(real, (0, missing), value=True) if missing > 0 else real[:, :columns]

    def restore(self, window: int | None, real: Tensor) -> None:
        """Records what `real_columns` returned before it was saved to a file."""
        self._real[window] = real

    def mask_for(
        self, mask: Tensor, columns: int, new_tokens: int, window: int | None, *, refuse_padding: bool = False
    ) -> Tensor | None:
        """Checks and records a 2D mask `[B, columns + T]`. Returns what `attend` needs to know of the new tokens.

        None: all are real. int32 `[B, 1, 1, 1]`: left padding, or one token that the host does not look at (on a GPU).
        int8 `[B, 1, 1, T]`: padding anywhere. See protocol.py.

        On a GPU several tokens cost one synchronisation. One token costs none: a mask that disagrees with what was
        recorded is then noticed at the next step. With `refuse_padding` a new token that is padding is an error too.
        """
        check = self._checks.setdefault(window, DeferredMaskCheck())
        check.raise_if_failed()
        check_columns(mask, columns, new_tokens)
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Fp16Cache: an attention_mask cannot be captured into a CUDA graph, as it grows with the text; pass "
                "attention_mask=None (new tokens of a decode step are never padding)"
            )
        mask = mask.bool()
        old, new = mask[:, :columns], mask[:, columns:]
        recorded = self.real_columns(window, columns)
        agrees = old.all() if recorded is None else (old == recorded.to(mask.device)).all()
        if new_tokens == 1 and self.defers_checks(mask):
            check.start(~(agrees & new.all()) if refuse_padding else ~agrees)
            self._real[window] = mask.clone()
            return mask_of_left_padding(new)
        is_left = (new[:, 1:] >= new[:, :-1]).all()
        agrees_, all_old, all_new, left = torch.stack([agrees, old.all(), new.all(), is_left]).tolist()
        if not agrees_ or (refuse_padding and not all_new):
            _mask_changed()
        if all_old and all_new:
            self._real.pop(window, None)
        else:
            self._real[window] = mask.clone()
        if all_new:
            return None
        return mask_of_left_padding(new) if left else mask_of_padding(new)

    @staticmethod
    def defers_checks(mask: Tensor) -> bool:
        """Whether looking at a mask on the host costs a synchronisation."""
        return mask.is_cuda

    def record_last_column(self, mask: Tensor, columns: int, window: int | None) -> None:
        """Records what a 2D mask says of a single new token. The other columns are not looked at."""
        if is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        recorded = self.real_columns(window, columns)
        if recorded is None:
            recorded = mask.new_ones(mask.shape[0], columns, dtype=torch.bool)
        self._real[window] = torch.cat([recorded.to(mask.device), mask[:, -1:].bool()], 1)

    def all_real_from(self, column: int, window: int | None) -> None:
        """Records that all columns from this one on are real."""
        if is_compiling():  # no mask was made for these tokens, and a record that grows would mean compiling anew
            return
        real = self._real.get(window)
        if real is not None and column:
            self._real[window] = real[:, :column]
        elif real is not None:
            del self._real[window]

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequence `sequences[i]` was."""
        for window, real in self._real.items():
            self._real[window] = real[sequences.to(real.device)]

    def forget(self) -> None:
        self._real.clear()
        self._checks.clear()

    def raise_if_failed(self) -> None:
        """Raises if a mask of an earlier step disagreed with what was recorded."""
        for check in self._checks.values():
            check.raise_if_failed()
