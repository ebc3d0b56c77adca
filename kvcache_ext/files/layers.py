"""Files of layers of several caches, for `Fp16Cache.save` and `Fp16Cache.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import transfer
from .layout import (
    DTYPES,
    LAYERS,
    NAMES,
    OWN_METADATA,
    LayerShape,
    Layout,
    described,
    is_own_tensor,
    small_tensors,
)
from .paths import Progress, check_progress, check_target, checked_path, refuse_capture
from .reading import OpenFile
from .rows import Cache, Selection
from .writing import write

LayerOf = tuple[Cache, int]  # a layer of a cache, by its number there


def _selected(op: str, layers: Sequence[LayerOf], sequences: int) -> Selection:
    """The first sequences of these layers, all checked."""
    selection = Selection(layers, range(sequences))
    if not selection.layers:
        raise ValueError(f"{op}: layers must name at least one layer, got none")
    seen: set[tuple[int, int]] = set()
    for i, (cache, layer) in enumerate(selection.layers):
        if not 0 <= layer < cache.num_layers:
            raise IndexError(f"{op}: layer {i} is layer {layer} of a cache that has {cache.num_layers} layers")
        if (id(cache), layer) in seen:
            raise ValueError(f"{op}: layer {i} is layer {layer} of a cache, which an earlier one is, too")
        if cache.sink_positions != 0:
            raise ValueError(f"{op}: layer {i} is of a cache with {cache.sink_positions} sink positions, not of 0")
        if not 1 <= sequences <= cache.batch_size:
            raise ValueError(
                f"{op}: sequences must be from 1 to {cache.batch_size}, as the cache of layer {i} has "
                f"{cache.batch_size} sequences, got {sequences}"
            )
        seen.add((id(cache), layer))
    selection.check_in_place(op)
    refuse_capture(op, selection.devices)
    return selection


def save_layers(
    path: Any,
    layers: Sequence[LayerOf],
    *,
    sequences: int,
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    progress: bool | Progress | None = None,
) -> None:
    """Writes layers of one or several caches to one file, whole or not at all, as `StreamingKVCacheFp16.save` does.

    Args:
        path, progress: as for `StreamingKVCacheFp16.save`.
        layers: `(cache, layer of that cache)`, in the model's order. No cache has sinks. Their max_positions,
            num_heads, head_dim and devices may differ.
        sequences: how many of the batch sequences are saved, 0 to `sequences - 1`.
        metadata: goes into the file's `__metadata__`. `layout.OWN_METADATA` has the names that are taken.
        tensors: small tensors, of dtypes in `layout.DTYPES`, on any device. They are part of what the first checksum
            covers. `layout.is_own_tensor` knows the names that are taken.

    Raises:
        TypeError, ValueError, IndexError: an argument is wrong.
        OSError: the file cannot be written. The old one stays.
        RuntimeError: a current stream is being captured into a graph, or a cache's memory has been moved.
    """
    kind = LAYERS
    op = kind.save
    target = checked_path(op, path)
    check_progress(op, progress)
    selection = _selected(op, layers, sequences)
    for name, text in metadata.items():
        if name in OWN_METADATA:
            raise ValueError(f"{op}: metadata must not have the name {name!r}, which is the format's own")
        if not isinstance(text, str):
            raise TypeError(f"{op}: metadata must be of str, got {type(text).__name__} as {name!r}")
    for name, tensor in tensors.items():
        if is_own_tensor(name):
            raise ValueError(f"{op}: tensors must not have the name {name!r}, which is the format's own")
        if not isinstance(tensor, Tensor) or tensor.dtype not in NAMES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: tensors must have dtypes that safetensors has, got {got} as {name!r}")
    check_target(op, target)
    layout = Layout(
        kind,
        sequences,
        0,
        transfer.BLOCK_BYTES,
        tuple(LayerShape(cache.max_positions, cache.num_heads, cache.head_dim, 0) for cache, _ in selection.layers),
        metadata=tuple(metadata.items()),
        tensors=small_tensors(described(name, tensor) for name, tensor in tensors.items()),
    )
    parts = [_bytes_of(tensors[tensor.name]) for tensor in layout.tensors]
    write(op, target, selection, layout, b"".join(parts) + b"\0" * layout.padding_bytes, progress)


def _bytes_of(tensor: Tensor) -> bytes:
    here = tensor.detach().to("cpu").contiguous()
    return bytes(transfer.memory_of(here)) if here.numel() else b""


@dataclass(frozen=True)
class SavedLayer:
    """What a file says of a layer. Its tuples have one number for each sequence."""

    max_positions: int
    num_heads: int
    head_dim: int
    lengths: tuple[int, ...]  # positions held
    seen: tuple[int, ...]  # positions ever appended
    first: tuple[int, ...]  # the oldest position held


class LayersFile:
    """An open file of `save_layers`, of which all but keys and values has been read and checked.

    It is closed at the end of a `with` block, or by `close`.

    Attributes:
        sequences: how many there are.
        metadata: what `save_layers` was given.
        tensors: what `save_layers` was given, on the CPU.
        layers: a `SavedLayer` for each layer, in the model's order.
    """

    def __init__(self, file: OpenFile) -> None:
        found, layout = file.found, file.found.layout
        self._file = file
        self.sequences = layout.batch_size
        self.metadata: dict[str, str] = dict(layout.metadata)
        self.tensors: dict[str, Tensor] = {}
        at = 0
        with torch.inference_mode(False):
            for tensor in layout.tensors:
                data = bytearray(found.tensors[at : at + tensor.bytes])
                dtype = DTYPES[tensor.dtype]
                if data:
                    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
                else:
                    flat = torch.empty(0, dtype=dtype, device="cpu")
                self.tensors[tensor.name] = flat.reshape(tensor.shape)
                at += tensor.bytes
        self.layers = tuple(
            SavedLayer(shape.max_positions, shape.num_heads, shape.head_dim, tuple(lengths), tuple(seen), tuple(first))
            for shape, lengths, seen, first in zip(layout.layers, found.lengths, found.seen, found.first, strict=True)
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LayersFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def load(
        self,
        layers: Sequence[LayerOf],
        *,
        fresh: bool = False,
        progress: bool | Progress | None = None,
    ) -> None:
        """Reads keys, values, state and overflow counters into layers of caches: into their first sequences.

        Layer i of the file goes into `layers[i]`. That may have another `max_positions`: in a smaller ring, the newest
        positions are held. It may be on another device, and the layers may be grouped into caches in another way.
        Other sequences of the caches are untouched, and their native objects stay, so captured graphs go on working.

        Args:
            layers: `(cache, layer of that cache)` for each layer of the file. Caches have no sinks.
            fresh: the caches hold nothing worth keeping, so the file is read once. Otherwise all checksums are compared
                in a first pass, before anything is overwritten.
            progress: as for `StreamingKVCacheFp16.save`; without `fresh` bytes of both passes count.

        Raises:
            ValueError: the caches do not fit the file, or the file is damaged. In the second case the caches are
                unchanged, or, with `fresh` and where the file changes between the passes, the sequences are empty (in
                all layers of the caches), and the error says so.
            OSError: the file cannot be read. The same holds.
            IndexError, TypeError, RuntimeError: an argument is wrong, a current stream is being captured into a graph,
                or a cache's memory has been moved. The caches are unchanged.
        """
        op, path = self._file.op, self._file.path
        check_progress(op, progress)
        if len(layers) != len(self.layers):
            raise ValueError(f"{op}: {path} has {len(self.layers)} layers, and it is loaded into {len(layers)}")
        selection = _selected(op, layers, self.sequences)
        for i, (saved, (cache, _)) in enumerate(zip(self.layers, selection.layers, strict=True)):
            for name in ("num_heads", "head_dim"):
                there, here = getattr(saved, name), getattr(cache, name)
                if there != here:
                    raise ValueError(
                        f"{op}: {path} does not fit this cache: {name} of layer {i} is {there} in the file "
                        f"and {here} here"
                    )
        emptied = f"sequences 0 to {self.sequences - 1} of the cache are empty now"
        if self.sequences == 1:
            emptied = "sequence 0 of the cache is empty now"
        self._file.read(selection, progress, verify=not fresh, emptied=emptied, overflow_counts=True)


def open_layers(path: Any) -> LayersFile:
    """Opens a file of `save_layers` and reads and checks all of it but keys and values.

    Raises:
        ValueError: the file is not one of that kind (where another call of this package reads it, the error names that
            call), has a newer version, is truncated or damaged.
        TypeError, OSError: the path is wrong, or the file cannot be read.
    """
    kind = LAYERS
    source = checked_path(kind.load, path)
    return LayersFile(OpenFile(kind.load, source, kind))
