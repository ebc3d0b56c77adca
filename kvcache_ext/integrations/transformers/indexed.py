"""Layers with an index of their keys, by which the model chooses those that it attends to (DeepSeek V3.2, GLM-5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layers import Fp16Layer
from .states import chosen


def _alike(memory: Tensor, states: Tensor) -> bool:
    return memory.dtype == states.dtype and memory.device == states.device and memory.shape[2:] == states.shape[2:]


class IndexedLayer(Fp16Layer):
    """Keys and values, and their index `[sequences, columns, index_head_dim]`: unrounded, of the model's dtype.

    With `attention=None` alone: which keys are chosen is the model's affair.
    """

    index_keys: Tensor | None = None  # [batch_size, max_positions, index_head_dim]
    indexed = 0  # columns in it
    updates = 0  # since the layer was made

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """See `Cache.update_indexer`: new rows `[B, T, index_head_dim]`; returns all."""
        batch, new, head_dim = indexer_key_states.shape
        start = self.indexed
        if start == self.columns:  # (else the layer's own keys came first, and were looked at)
            self.check_room(batch, new)
        if self.index_keys is None or (start == 0 and not _alike(self.index_keys, indexer_key_states)):
            shape = self.shared.batch_size, self.cache.max_positions, head_dim
            with torch.inference_mode(False):
                self.index_keys = torch.zeros(shape, dtype=indexer_key_states.dtype, device=indexer_key_states.device)
        self.indexed = start + new
        self.updates += 1
        self.index_keys[:batch, start : self.indexed] = indexer_key_states.detach()
        return self.index_keys[:batch, : self.indexed]

    def forget(self) -> None:
        self.indexed = 0

    def select(self, sequences: Tensor) -> None:
        """Sequence i becomes what sequence `sequences[i]` was."""
        if self.index_keys is not None:
            self.index_keys[: len(sequences)] = chosen(self.index_keys, sequences, self.shared.active)

    def saved_index(self) -> Tensor | None:
        if self.index_keys is None or self.columns == 0:
            return None
        return self.index_keys[: self.shared.active, : self.columns]

    def load_index(self, index: Tensor, device: torch.device) -> None:
        self.update_indexer(index.to(device))

    @property
    def indexer_position_ids(self) -> Any:
        return None

    @indexer_position_ids.setter
    def indexer_position_ids(self, value: Any) -> None:
        raise NotImplementedError("Fp16Cache: there is no place in it for the positions of an index of keys")
