"""Whether all ranks of a group are fed the same: of an `Fp16Cache` whose positions are dealt out to them.

A rank that was fed another token stores rows of another text, and all ranks would go on with a mixture. So each forward
pass makes a number of its tokens and leaves it in `Exchange.tag`. Ranks compare that whenever they merge their answers.
Where they gather rows instead (`attention=None`, 4D masks) they compare it once a pass, in a collective call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .padding import DeferredMaskCheck

UNCOMPILED = "torch.compile cannot trace a cache whose positions are dealt out to a group"
# Odd and even multipliers without any pattern in their bits.
_ODD, _EVEN, _STEP = 0x2545F4914F6CDD1D, 0x1FC9F1DDC1B6A6B2, 0x3C6EF372FE94F82B
_COLUMNS = 0x0B4B82E39


def weights_of(count: int, device: torch.device) -> Tensor:
    """A different odd number for each token: int64 `[count]`."""
    mixed = torch.arange(1, count + 1, device=device) * _STEP
    return (mixed ^ (mixed >> 29)) * _ODD | 1


def number_of(values: Tensor, weights: Tensor) -> Tensor:
    """A number made of int64 values `[n]` and of their places: int64 `[]`. Nothing waits for it.

    The product of odd numbers, each of which has one value in it, modulo 2^64. Other values give another product, but
    by an accident as rare as two equal numbers of 60 random bits.
    """
    return torch.add(weights, values, alpha=_EVEN).prod()


class Agreement:
    """What the ranks are fed, and that it is the same."""

    def __init__(self, exchange: Any) -> None:
        self.exchange = exchange  # distributed.exchange.Exchange
        with torch.inference_mode(False):
            self.chosen = torch.zeros((), dtype=torch.int64, device=exchange.device)  # made of all `select` calls
        self._weights: dict[int, Tensor] = {}  # of one-token passes. Kept for ever: captured graphs read them
        self._one_token = False
        self._other_tokens = DeferredMaskCheck()

    def begin_pass(self, tokens: Tensor) -> None:
        """Notes what a pass is fed: token ids `[B, T]`, or embeddings `[B, T, ...]`. Nothing waits for it."""
        self._one_token = tokens.shape[1] == 1
        values = tokens.detach().to(self.exchange.device)
        if values.is_floating_point():  # the first eight bytes of each embedding will do
            values = values.flatten(2)[..., : 8 // values.element_size()].contiguous().view(torch.uint8)
        values = values.flatten().long()
        torch.add(number_of(values, self._weights_of(len(values))), self.chosen, out=self.exchange.tag[0])

    def _weights_of(self, count: int) -> Tensor:
        if not self._one_token:
            return weights_of(count, self.exchange.device)
        if count not in self._weights:
            if self.chosen.is_cuda and torch.cuda.is_current_stream_capturing():  # not there before the first replay
                return weights_of(count, self.exchange.device)
            with torch.inference_mode(False):
                self._weights[count] = weights_of(count, self.exchange.device)
        return self._weights[count]

    def select(self, sequences: Tensor) -> None:
        """Notes a choice of sequences: int64 `[n]`. From now on it is a part of what is compared."""
        values = sequences.to(self.exchange.device)
        self.chosen.mul_(_ODD).add_(number_of(values, weights_of(len(values), self.exchange.device)))

    def forget(self) -> None:
        self.chosen.zero_()

    def compare(self, columns: int) -> None:
        """Compares what the ranks were fed, before their rows are gathered. A collective call.

        `columns`: what each layer holds. A step of one token on a GPU does not wait: `check` tells of it later.
        """
        mine = self.exchange.tag + columns * _COLUMNS
        most = torch.cat([mine, -mine])
        self.exchange.run(lambda: dist.all_reduce(most, dist.ReduceOp.MAX, group=self.exchange.group, async_op=True))
        self._other_tokens.start(most[0] != -most[1])
        if not self._one_token or not most.is_cuda:
            self.check()

    def check(self) -> None:
        """Raises RuntimeError if ranks have fallen apart, as far as the host has been told."""
        if self._other_tokens.has_failed():
            self.exchange.fail("ranks hold other lengths or were fed other tokens")
        self.exchange.check()

    def synchronize(self) -> None:
        """Waits for the current stream, at most the exchange's timeout, and checks."""
        self.exchange.synchronize()
        self.check()
