"""A file's parts: its kind, its header, and how large everything is. See the head of the package for the format."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import version


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of files."""

    format: str  # in the metadata
    version: int  # the newest that is read, and the one that is written
    save: str  # the call that writes it
    load: str  # the call that reads it


CORE = Kind("kvcache_ext", 1, "StreamingKVCacheFp16.save", "StreamingKVCacheFp16.load")
LAYERS = Kind("kvcache_ext.Fp16Cache", 1, "Fp16Cache.save", "Fp16Cache.load")
KINDS = {kind.format: kind for kind in (CORE, LAYERS)}

# The dtypes that a caller's small tensors may have, by safetensors' names.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The numbers in the metadata of a file of one cache, in order, with the least that each may be.
CORE_NUMBERS = {
    "num_layers": 1,
    "batch_size": 1,
    "max_positions": 1,
    "num_heads": 1,
    "head_dim": 1,
    "sink_positions": 0,
    "block_bytes": 1,
}
LAYERS_NUMBERS = {"num_layers": 1, "batch_size": 1, "block_bytes": 1}  # of a file of several
OWN_METADATA = {"format", "version", "writer", "overflow", *CORE_NUMBERS}
OWN_TENSORS = {"__metadata__", "seen", "first", "lengths", "overflow_counts", "padding", "checksums"}


def is_own_tensor(name: str) -> bool:
    """Whether a caller's tensor must not have this name."""
    return name in OWN_TENSORS or name.startswith(("keys.", "values."))


def held(seen: int, first: int, sinks: int) -> int:
    """Positions held by a sequence in that state."""
    return min(seen, sinks) + max(seen - first, 0)


@dataclass(frozen=True)
class LayerShape:
    max_positions: int
    num_heads: int
    head_dim: int
    rows: int  # positions held, all sequences together

    @property
    def row_bytes(self) -> int:
        return self.num_heads * self.head_dim * 2

    @property
    def tensor_bytes(self) -> int:
        """Of its keys, or of its values."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class SmallTensor:
    """A caller's own tensor, as the header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def small_tensors(tensors: Iterable[SmallTensor]) -> tuple[SmallTensor, ...]:
    """In the order in which they lie: so each begins at a multiple of its dtype's size."""
    return tuple(sorted(tensors, key=lambda tensor: (-tensor.item_bytes, tensor.name)))


def described(name: str, tensor: Tensor) -> SmallTensor:
    return SmallTensor(name, NAMES[tensor.dtype], tuple(tensor.shape))


@dataclass(frozen=True)
class Layout:
    """All that the header depends on."""

    kind: Kind
    batch_size: int
    sink_positions: int
    block_bytes: int
    layers: tuple[LayerShape, ...]
    overflow: str | None = None  # in files of one cache
    metadata: tuple[tuple[str, str], ...] = ()  # the caller's own, in files of several caches
    tensors: tuple[SmallTensor, ...] = ()  # the caller's own, likewise, in the order in which they lie

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def data_bytes(self) -> int:
        """Keys and values."""
        return 2 * sum(layer.tensor_bytes for layer in self.layers)

    @property
    def blocks(self) -> int:
        return -(-self.data_bytes // self.block_bytes)

    @property
    def state_bytes(self) -> int:
        """seen, first, lengths and overflow_counts."""
        return (3 * self.num_layers * self.batch_size + self.num_layers) * 8

    @property
    def padding_bytes(self) -> int:
        return -sum(tensor.bytes for tensor in self.tensors) % 8

    @property
    def small_bytes(self) -> int:
        """What lies between the header and keys.0."""
        return self.state_bytes + sum(tensor.bytes for tensor in self.tensors) + self.padding_bytes

    @property
    def checksum_bytes(self) -> int:
        return 4 * (1 + self.blocks)

    def entries(self) -> dict[str, Any]:
        """The header, without its metadata."""
        entries: dict[str, Any] = {}
        offset = 0

        def add(name: str, dtype: str, shape: list[int], size: int) -> None:
            nonlocal offset
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size

        for name in ("seen", "first", "lengths"):
            add(name, "I64", [self.num_layers, self.batch_size], self.num_layers * self.batch_size * 8)
        add("overflow_counts", "I64", [self.num_layers], self.num_layers * 8)
        if self.kind is LAYERS:
            for tensor in self.tensors:
                add(tensor.name, tensor.dtype, list(tensor.shape), tensor.bytes)
            add("padding", "U8", [self.padding_bytes], self.padding_bytes)
        for i, layer in enumerate(self.layers):
            for name in ("keys", "values"):
                add(f"{name}.{i}", "F16", [layer.rows, layer.num_heads, layer.head_dim], layer.tensor_bytes)
        add("checksums", "U32", [1 + self.blocks], self.checksum_bytes)
        return entries

    def _settings(self) -> dict[str, str]:
        if self.kind is LAYERS:
            numbers: dict[str, Any] = {
                "num_layers": self.num_layers,
                "batch_size": self.batch_size,
                "max_positions": ",".join(str(layer.max_positions) for layer in self.layers),
                "block_bytes": self.block_bytes,
                **dict(self.metadata),
            }
        else:
            (shape,) = {(layer.max_positions, layer.num_heads, layer.head_dim) for layer in self.layers}
            values = (self.num_layers, self.batch_size, *shape, self.sink_positions, self.block_bytes)
            numbers = {**dict(zip(CORE_NUMBERS, values, strict=True)), "overflow": self.overflow}
        return {name: str(value) for name, value in numbers.items()}

    def header(self) -> bytes:
        """With the eight bytes before it that tell its length."""
        metadata = {
            "format": self.kind.format,
            "version": str(self.kind.version),
            "writer": f"kvcache_ext {version.__version__}",
            **self._settings(),
        }
        text = json.dumps({"__metadata__": metadata, **self.entries()}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        return struct.pack("<Q", len(text)) + text
