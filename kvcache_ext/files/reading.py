"""Reading a file into layers and sequences of caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import transfer
from .header import CheckedFile, read_header
from .layout import Kind
from .paths import reporting
from .rows import NOWHERE, Block, Selection, block_size, blocks_of
from .transfer import InPlace, reworded_oserror


class OpenFile:
    """A file whose header, lengths and small tensors have been read and checked."""

    def __init__(self, op: str, path: Path, kind: Kind) -> None:
        self.op, self.path = op, path
        with reworded_oserror(f"{op}: path cannot be read", path):
            # O_NONBLOCK: a pipe would make it wait, and is refused by `read_header`.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.found: CheckedFile = read_header(op, self.fd, path, kind)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(
        self, selection: Selection, progress: Any, *, verify: bool, emptied: str | None, overflow_counts: bool
    ) -> None:
        """Keys, values and state, on the devices' current streams.

        Args:
            verify: compare all checksums in a pass of its own before anything is overwritten.
            emptied: where the caches outlive an error: a clause that tells which sequences are empty after it. They
                are reset, and the clause ends the error's sentence.
            overflow_counts: whether the counters become those of the file.
        """
        found, layout = self.found, self.found.layout
        first, lost = selection.shortened(found.seen, found.first)
        data_bytes, block_bytes = layout.data_bytes, layout.block_bytes
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            transfer.on_device(selection.devices),
            reporting(self.op, self.path, progress, data_bytes * (2 if verify else 1)) as report,
        ):
            report(0)
            memory = transfer.block_memory(selection.storages(), layout.blocks, min(block_bytes, data_bytes))
            blocks = list(blocks_of(selection.pieces(found.seen, first, lost), block_bytes))
            if verify:  # to nowhere
                self._pass(memory, list(blocks_of([(NOWHERE, 0, data_bytes)], block_bytes)), report)
            with self._emptying(selection, emptied):
                done_before = data_bytes if verify else 0
                self._pass(memory, blocks, lambda done: report(done_before + done))
                selection.write_state(found.seen, first)
                if overflow_counts:
                    selection.write_overflow_counts(found.overflow_counts)
                memory.finish()

    def _pass(self, memory: InPlace, blocks: list[Block], report: Callable[[int], object]) -> None:
        """Reads all blocks, compares their checksums and brings them to where they belong."""
        found, done = self.found, 0
        with ThreadPoolExecutor(transfer.THREADS) as pool:
            tasks = transfer.readers(self.op, memory, blocks, self.fd, found.data_start, self.path)
            for i, crc in enumerate(transfer.bounded_map(pool, tasks)):
                if crc != found.checksums[1 + i]:
                    start = found.data_start + done
                    end = start + block_size(blocks[i]) - 1
                    raise ValueError(
                        f"{self.op}: {self.path} is damaged: its bytes {start:,} to {end:,} are not those that were "
                        "saved"
                    )
                memory.store(i, blocks[i])
                done += block_size(blocks[i])
                report(done)

    @contextmanager
    def _emptying(self, selection: Selection, emptied: str | None) -> Iterator[None]:
        """After an error within, the selection's sequences are empty, and the error says so."""
        try:
            yield
        except BaseException as error:
            if emptied is None:
                raise
            selection.reset()
            if isinstance(error, OSError) and error.strerror is not None:
                raise OSError(error.errno, f"{error.strerror}; {emptied}", error.filename) from error
            if type(error) is ValueError:
                raise ValueError(f"{error}; {emptied}") from error
            raise
