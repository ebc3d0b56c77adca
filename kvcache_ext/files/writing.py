"""Writing a file: layers and sequences of caches, with their state and checksums."""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import transfer
from .layout import Layout, held
from .paths import replacing, reporting
from .rows import Selection, blocks_of
from .transfer import reworded_oserror


def write(op: str, target: Path, selection: Selection, layout: Layout, small: bytes, progress: Any) -> None:
    """`layout`: its layers' `rows` are filled in here. `small`: the caller's small tensors, with their padding."""
    if selection.group is not None:
        transfer.Collected.announce(True, selection.group, selection.devices[0])
    seen, first, counts = selection.read_state()
    sinks = layout.sink_positions
    lengths = [[held(s, f, sinks) for s, f in zip(*pair, strict=True)] for pair in zip(seen, first, strict=True)]
    shapes = zip(layout.layers, lengths, strict=True)
    layout = replace(layout, layers=tuple(replace(layer, rows=sum(of_layer)) for layer, of_layer in shapes))
    numbers = [n for matrix in (seen, first, lengths) for of_layer in matrix for n in of_layer] + counts
    head = layout.header() + struct.pack(f"<{len(numbers)}q", *numbers) + small
    data_bytes, block_bytes = layout.data_bytes, layout.block_bytes

    with replacing(op, target, len(head) + data_bytes + layout.checksum_bytes) as fd:
        with reworded_oserror(f"{op}: path cannot be written", target):
            transfer.transfer(os.pwritev, fd, [memoryview(head)], 0)
        checksums = [zlib.crc32(head)]
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            transfer.on_device(selection.devices),
            ThreadPoolExecutor(transfer.THREADS + 1) as pool,
            reporting(op, target, progress, data_bytes) as report,
        ):
            report(0)
            syncing: Future[None] | None = None
            blocks = blocks_of(selection.pieces(seen, first), block_bytes)
            size = min(block_bytes, data_bytes)
            of_blocks = selection.storages(), layout.blocks, size
            dealt_out = selection.group is not None
            memory = transfer.Collected(*of_blocks, selection.group) if dealt_out else transfer.block_memory(*of_blocks)
            for crc in transfer.bounded_map(pool, transfer.writers(op, memory, blocks, fd, len(head), target)):
                checksums.append(crc)
                # The disk is to begin now: left to itself, the system lets some gigabytes pile up first.
                if len(checksums) % transfer.SYNC_BLOCKS == 0 and (syncing is None or syncing.done()):
                    if syncing is not None:
                        syncing.result()  # an error is told once, and to whoever asks first
                    syncing = pool.submit(_sync, op, fd, target)
                report(min((len(checksums) - 1) * block_bytes, data_bytes))
            if syncing is not None:
                syncing.result()
        # The end of the file comes last: one that was left unfinished is too short.
        tail = struct.pack(f"<{len(checksums)}I", *checksums)
        with reworded_oserror(f"{op}: path cannot be written", target):
            transfer.transfer(os.pwritev, fd, [memoryview(tail)], len(head) + data_bytes)


def _sync(op: str, fd: int, path: Path) -> None:
    with reworded_oserror(f"{op}: path cannot be written", path):
        os.fdatasync(fd)
