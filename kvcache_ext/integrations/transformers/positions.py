"""Notices a text that is fed twice.

`Positions` remembers the largest position that each sequence was fed. A token whose position is not larger comes again:
a text is fed twice, an earlier text was not forgotten, or `use_cache=False` feeds the whole text at each step. On a
CPU, and where several tokens come at once, this is an error before anything is stored. One token on a GPU is checked by
the device. Its error comes some steps later, so no step waits. `FedTokens` is for models without positions.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

UNKNOWN = -(2**62)  # no position was fed
FED_TWICE = 2**62  # a token came again. This stays until the sequence is forgotten.
CALLS_PER_COPY = 8  # each such call of `raise_if_fed_twice` copies what a GPU has noticed to the host


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"Fp16Cache: {what}: the text, or a part of it, comes again on top of what the cache holds. reset() the cache "
        "before another text, pass only tokens that are new, and leave out use_cache=False (in the model's config, "
        "too), with which the whole text comes again at each step. (Pad batches for generate() on the left: behind "
        "padding on the right it counts from the padding's position on.)"
    )


class Positions:
    """The largest position that each sequence was fed: `last`, int64 `[batch_size]` on the decoder's device."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.last = torch.full((batch_size,), UNKNOWN, dtype=torch.int64, device=device)
        self.paused = False  # True while steps run that will be taken back
        self._connect()

    def _connect(self) -> None:
        with torch.inference_mode(False):
            if self.last.is_inference():  # copied or unpickled under inference mode
                self.last = torch.empty_like(self.last).copy_(self.last)
            self._fed_twice = torch.full((), FED_TWICE, dtype=torch.int64, device=self.last.device)
        self._copy: Tensor | None = None  # of `last`, on its way to the host
        self._arrived: Any = None  # the event after that copy
        self._stream: Any = None  # of the copies
        self._calls = 0
        # Dynamo neither guards these nor copies them: captured graphs have their addresses, as StreamingKVCacheFp16's.
        for tensor in (self.last, self._fed_twice):
            tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {"last": self.last, "paused": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def forget(self) -> None:
        self.last.fill_(UNKNOWN)
        self._copy = None

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequence `sequences[i]` was."""
        chosen = sequences.to(self.last.device).clamp(0, len(self.last) - 1)
        self.last[: len(chosen)] = self.last[chosen]

    def remove(self, count: int, left: int) -> None:
        """Notes that the newest `count` columns of every sequence are gone and `left` are left.

        Some of them may have been padding, and positions may have had gaps. Then the result is too small rather than
        too large: an error may be missed, and no right call is refused.
        """
        self.last.sub_(count).clamp_(max=left - 1)

    def assume(self, batch: int, tokens: int | Tensor) -> None:
        """Notes that each sequence has so many tokens (an int, or `[B]`), some of which came without positions.

        Those are taken to count from 0. (A model that counts padding, too, has larger ones.)
        """
        last = self.last[:batch]
        if isinstance(tokens, Tensor):
            torch.maximum(last, tokens.to(last.device) - 1, out=last)
        else:
            last.clamp_(min=tokens - 1)

    @staticmethod
    def _of_tokens(position_ids: Any, batch: int, new_tokens: int) -> tuple[Tensor, bool] | None:
        """The positions `[B or 1, T]`, and whether neighbours may be equal. None if they cannot be compared.

        Models of images have several positions for a token: `[3 or 4, B, T]`. The first is equal within an image.
        """
        if not isinstance(position_ids, Tensor) or position_ids.dim() < 2 or position_ids.shape[-1] != new_tokens:
            return None
        if position_ids.shape[-2] not in (1, batch):
            return None
        if position_ids.dim() == 2:
            return position_ids, False
        return (position_ids[0], True) if position_ids.dim() == 3 and len(position_ids) in (3, 4) else None

    def check(self, position_ids: Any, real: Tensor | None, batch: int, new_tokens: int) -> None:
        """Raises if a token comes again. On a GPU this waits. `real`: which tokens are, bool `[B, T]`; None: all."""
        found = self._of_tokens(position_ids, batch, new_tokens)
        if found is None:
            return
        positions = found[0].to(self.last.device).expand(batch, -1)
        if real is not None:
            positions = positions.where(real.to(positions.device), FED_TWICE)
        first, last = torch.stack([positions.amin(1), self.last[:batch]]).tolist()
        for sequence in range(batch):
            if first[sequence] + found[1] <= last[sequence]:
                _refuse(
                    f"sequence {sequence} is fed position {first[sequence]}, and was fed positions up to "
                    f"{last[sequence]} before"
                )

    def note(self, position_ids: Any, real: Tensor | None, batch: int, new_tokens: int) -> None:
        """Notes the positions that were fed, and whether a token came again. This does not wait."""
        found = self._of_tokens(position_ids, batch, new_tokens)
        if found is None:
            return
        last = self.last[:batch]
        positions = found[0].to(last.device).expand(batch, -1)
        if new_tokens == 1 and real is None:
            first = largest = positions[:, 0]
        else:
            there = positions > UNKNOWN if real is None else real.to(last.device)
            first = positions.where(there, FED_TWICE).amin(1)
            largest = torch.maximum(last, positions.where(there, UNKNOWN).amax(1))
        again = first < last if found[1] else first <= last
        torch.where(again, self._fed_twice, largest, out=last)

    def raise_if_fed_twice(self, *, wait: bool = False) -> None:
        """Raises if the device has noticed a token that came again. With `wait`, all that was fed is checked."""
        if self.paused or (self.last.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if wait:
            self._copy = None
        noticed = self.last if wait or not self.last.is_cuda else self._latest_copy()
        if noticed is not None and int(noticed.max()) >= FED_TWICE:
            _refuse("a token came at a position that was fed before")

    def _latest_copy(self) -> Tensor | None:
        """A copy of `last` that has arrived, or None. Every few calls another one is begun.

        The copy has a stream of its own. On the steps' stream it would delay the next step by some 20 us. It may run
        while a step changes `last`: what that step noticed is then in the next copy.
        """
        arrived = None
        if self._copy is not None:
            if not self._arrived.query():
                return None
            arrived, self._copy = self._copy, None
        self._calls += 1
        if self._calls % CALLS_PER_COPY == 0:
            self._copy = torch.empty(self.last.shape, dtype=torch.int64, device="cpu", pin_memory=True)
            with torch.cuda.device(self.last.device):
                if self._stream is None:
                    self._stream, self._arrived = torch.cuda.Stream(), torch.cuda.Event()
                with torch.cuda.stream(self._stream):
                    self._copy.copy_(self.last, non_blocking=True)
                    self._arrived.record()
        return arrived


class FedTokens:
    """The token ids that were fed to a model without `position_ids`: `[sequences, columns]`. None: not all are known.

    Without positions a text that is fed twice shows by its tokens alone: the new ones begin with all that came before.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def forget(self) -> None:
        self.ids = None

    def check(self, ids: Tensor) -> None:
        """Raises if `ids`, `[B, T]`, begin with all that was fed. On a GPU this waits."""
        fed = self.ids
        if fed is None or len(fed) != len(ids) or ids.shape[1] <= fed.shape[1]:
            return
        if torch.equal(ids[:, : fed.shape[1]].to(fed.device), fed):
            _refuse(f"{ids.shape[1]} tokens begin with the {fed.shape[1]} that were fed before")

    def note(self, ids: Tensor | None, columns: int) -> None:
        """Notes that `ids` were fed, after which there are so many columns. `ids`: None if they are unknown."""
        before = 0 if self.ids is None else self.ids.shape[1]
        known = ids is not None and before + ids.shape[1] == columns
        if not known or ids is None:
            self.ids = None
        elif self.ids is None:
            self.ids = ids.clone()
        else:
            self.ids = torch.cat([self.ids, ids.to(self.ids.device)], 1)

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequence `sequences[i]` was."""
        if self.ids is not None:
            self.ids = self.ids[sequences.to(self.ids.device).clamp(0, len(self.ids) - 1)]

    def crop(self, left: int) -> None:
        if self.ids is not None:
            self.ids = self.ids[:, :left]
