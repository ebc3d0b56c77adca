"""Reading all of a file but its keys and values, and checking it: nothing of what it says is believed."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .layout import (
    CORE_NUMBERS,
    DTYPES,
    KINDS,
    LAYERS,
    LAYERS_NUMBERS,
    OWN_METADATA,
    Kind,
    LayerShape,
    Layout,
    SmallTensor,
    held,
    is_own_tensor,
    small_tensors,
)
from .transfer import LARGEST_BLOCK_BYTES, crc_of, read_parts

LARGEST_HEADER = 100_000_000  # what safetensors itself reads
LARGEST_POSITION = 2**62


@dataclass(frozen=True)
class CheckedFile:
    """A file's small parts, read and checked."""

    layout: Layout
    seen: list[list[int]]  # [layer][sequence], as `first` and `lengths`
    first: list[list[int]]
    lengths: list[list[int]]
    overflow_counts: list[int]
    tensors: bytes  # the caller's small ones, one after the other
    checksums: tuple[int, ...]
    data_start: int  # where keys.0 begins


def read_header(op: str, fd: int, source: Path, kind: Kind) -> CheckedFile:
    """Raises ValueError where the file is not one of that kind, or is damaged."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, f"{op}: path must name a file, not a folder", str(source))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{op}: path must name a regular file, {source} is none")
    size = status.st_size

    def part(offset: int, length: int) -> bytes:
        read = bytearray(length)
        if length:
            read_parts(op, fd, [memoryview(read)], offset, source)
        return bytes(read)

    foreign = f"{op}: {source} is not a file of {kind.save}"
    if size < 8:
        raise ValueError(f"{foreign}: it has {size} bytes")
    prefix = part(0, 8)
    length = struct.unpack("<Q", prefix)[0]
    if not 2 <= length <= LARGEST_HEADER:
        raise ValueError(f"{foreign}, nor of any other safetensors writer: its header would have {length:,} bytes")
    if 8 + length > size:
        raise ValueError(
            f"{op}: {source} is truncated, or not a safetensors file: its header would end at byte {8 + length:,} "
            f"of {size:,}"
        )
    text = part(8, length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{foreign}, or its header is damaged: it is not JSON") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    found_format = metadata.get("format") if isinstance(metadata, dict) else None
    if isinstance(found_format, str) and found_format != kind.format and found_format in KINDS:
        other = KINDS[found_format]
        raise ValueError(f"{op}: {source} is a file of {other.save}, which {other.load} reads")
    if not isinstance(metadata, dict) or found_format != kind.format:
        raise ValueError(f"{foreign}: its metadata does not say format {kind.format!r}")
    layout = _Description(op, source, header, metadata, kind).layout()

    expected = 8 + length + layout.small_bytes + layout.data_bytes + layout.checksum_bytes
    if size != expected:
        what = "is truncated" if size < expected else "has something behind its end"
        raise ValueError(f"{op}: {source} {what}: it has {size:,} bytes, and its header describes {expected:,}")
    small = part(8 + length, layout.small_bytes)
    count = 1 + layout.blocks
    checksums = struct.unpack(f"<{count}I", part(size - layout.checksum_bytes, layout.checksum_bytes))
    if crc_of([memoryview(prefix), memoryview(text), memoryview(small)]) != checksums[0]:
        raise ValueError(f"{op}: {source} is damaged: its header or its lengths are not those that were saved")

    numbers = list(struct.unpack_from(f"<{layout.state_bytes // 8}q", small))
    pairs = layout.num_layers * layout.batch_size

    def matrix(i: int) -> list[list[int]]:
        flat = numbers[i * pairs : (i + 1) * pairs]
        return [flat[j : j + layout.batch_size] for j in range(0, pairs, layout.batch_size)]

    found = CheckedFile(
        layout,
        matrix(0),
        matrix(1),
        matrix(2),
        numbers[3 * pairs :],
        small[layout.state_bytes :],
        checksums,
        8 + length + len(small),
    )
    _check_lengths(op, source, found)
    return found


def _short(text: str) -> str:
    """What a file says is not to fill the screen."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_POSITION


class _Description:
    """A header, whose every entry is checked on the way to a `Layout`."""

    def __init__(self, op: str, source: Path, header: dict[str, Any], metadata: dict[str, Any], kind: Kind) -> None:
        self.op, self.source, self.header, self.metadata, self.kind = op, source, header, metadata, kind
        self.damaged = f"{op}: {source} is damaged: its header"

    def layout(self) -> Layout:
        version = self.number("version", 1)
        if version > self.kind.version:
            writer = _short(json.dumps(self.metadata.get("writer")).strip('"'))
            raise ValueError(
                f"{self.op}: {self.source} has version {version} of the format (written by {writer}), and this "
                f"kvcache_ext reads version {self.kind.version}; a newer kvcache_ext is needed"
            )
        layout = self.of_layers() if self.kind is LAYERS else self.of_a_cache()
        wanted = layout.entries()
        for name, entry in wanted.items():
            if self.header.get(name) != entry:
                raise ValueError(
                    f"{self.damaged} has {_short(json.dumps(self.header.get(name)))} as {name}, "
                    f"and should have {json.dumps(entry)}"
                )
        for name in self.header:
            if name not in wanted and name != "__metadata__":
                raise ValueError(f"{self.damaged} has an entry {_short(repr(name))} that no cache has")
        return layout

    def number(self, name: str, least: int, value: Any = None) -> int:
        """Of the metadata, or a part of what is there."""
        value = self.metadata.get(name) if value is None else value
        if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > 18:
            raise ValueError(f"{self.damaged} gives {name} as {_short(repr(value))}")
        if int(value) < least:
            raise ValueError(f"{self.damaged} gives {name} as {value}, and it is at least {least}")
        return int(value)

    def numbers(self, names: dict[str, int]) -> dict[str, int]:
        numbers = {name: self.number(name, least) for name, least in names.items()}
        if numbers["block_bytes"] > LARGEST_BLOCK_BYTES:
            raise ValueError(f"{self.damaged} gives block_bytes as {numbers['block_bytes']}")
        return numbers

    def shape_of(self, layer: int) -> list[Any]:
        """Of a layer's keys: the number of rows is known to be one, the rest not."""
        entry = self.header.get(f"keys.{layer}")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not shape or not _is_count(shape[0]):
            raise ValueError(f"{self.damaged} has no keys.{layer}, or not its shape")
        return shape

    def of_a_cache(self) -> Layout:
        numbers = self.numbers(CORE_NUMBERS)
        overflow = self.metadata.get("overflow")
        if overflow not in ("saturate", "inf"):
            raise ValueError(f"{self.damaged} gives overflow as {_short(repr(overflow))}")
        sinks, slots = numbers["sink_positions"], numbers["max_positions"]
        if sinks >= slots:
            raise ValueError(f"{self.damaged} gives sink_positions as {sinks}, and max_positions as {slots}")
        shape = (slots, numbers["num_heads"], numbers["head_dim"])
        layers = []
        for layer in range(numbers["num_layers"]):  # ends at the first that is not there
            layers.append(LayerShape(*shape, self.shape_of(layer)[0]))
        return Layout(self.kind, numbers["batch_size"], sinks, numbers["block_bytes"], tuple(layers), overflow)

    def of_layers(self) -> Layout:
        numbers = self.numbers(LAYERS_NUMBERS)
        given = self.metadata.get("max_positions")
        slots = given.split(",") if isinstance(given, str) else []
        if len(slots) != numbers["num_layers"]:
            raise ValueError(
                f"{self.damaged} gives num_layers as {numbers['num_layers']}, and max_positions of {len(slots)} layers"
            )
        layers = []
        for layer, text in enumerate(slots):
            shape = self.shape_of(layer)
            if len(shape) != 3 or not all(_is_count(n) and n > 0 for n in shape[1:]):
                raise ValueError(f"{self.damaged} has no keys.{layer}, or not its shape")
            layers.append(LayerShape(self.number("max_positions", 1, text), shape[1], shape[2], shape[0]))
        metadata = tuple((name, text) for name, text in self.metadata.items() if name not in OWN_METADATA)
        for name, text in metadata:
            if not isinstance(text, str):
                raise ValueError(f"{self.damaged} gives {_short(repr(name))} as {_short(repr(text))}")
        tensors = small_tensors(self.small(name) for name in self.header if not is_own_tensor(name))
        return Layout(
            self.kind, numbers["batch_size"], 0, numbers["block_bytes"], tuple(layers), None, metadata, tensors
        )

    def small(self, name: str) -> SmallTensor:
        entry = self.header[name]
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list):
            raise ValueError(f"{self.damaged} has {_short(json.dumps(entry))} as {_short(repr(name))}")
        if not all(_is_count(n) for n in shape):
            raise ValueError(f"{self.damaged} has {_short(json.dumps(shape))} as the shape of {_short(repr(name))}")
        return SmallTensor(name, dtype, tuple(shape))


def _check_lengths(op: str, source: Path, found: CheckedFile) -> None:
    """Whether a cache can be in that state, and whether it fits the tensors' shapes."""
    sinks = found.layout.sink_positions
    wrong = f"{op}: {source} is damaged: no cache has the lengths that it gives"
    for i, layer in enumerate(found.layout.layers):
        ring = layer.max_positions - sinks
        for seen, first, length in zip(found.seen[i], found.first[i], found.lengths[i], strict=True):
            # (So `first` is below LARGEST_POSITION, too: it is at most `seen`, or it is `sinks`.)
            possible = 0 <= seen < LARGEST_POSITION and sinks <= first
            possible = possible and seen - first <= ring and (seen >= first or first == sinks)
            if not possible or length != held(seen, first, sinks):
                raise ValueError(f"{wrong} for layer {i}: {seen} seen, {first} the first, {length} held")
        total = sum(found.lengths[i])
        if total != layer.rows:
            raise ValueError(f"{wrong} for layer {i}: {total} positions, {layer.rows} rows")
    for i, count in enumerate(found.overflow_counts):
        if count < 0:
            raise ValueError(f"{op}: {source} is damaged: it gives {count} overflows for layer {i}")
