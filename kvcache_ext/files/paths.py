"""What the calls are given: paths, sequences, progress; and the file that takes another's place when it is whole."""

from __future__ import annotations

import errno
import importlib
import operator
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .transfer import on_device, reworded_oserror

Progress = Callable[[int, int], object]


def refuse_capture(op: str, devices: Iterable[torch.device] = (torch.device("cpu"),)) -> None:
    """RuntimeError where the current stream of one of the devices is being captured into a graph.

    A CPU stands for the GPU that is current.
    """
    if not torch.cuda.is_initialized():
        return
    for device in devices:
        with on_device([device]):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{op}: a file cannot be part of a CUDA graph, and the current stream is being captured"
                )


def checked_path(op: str, path: Any) -> Path:
    """The file itself, where the path is a link: that is written and read, and the link stays."""
    try:
        name = os.fspath(path)
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise TypeError(f"{op}: path must be a str or an os.PathLike of one, got {type(path).__name__}")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        encoded = b""
    if encoded == b"" or b"\0" in encoded or os.path.basename(name) in ("", ".", ".."):
        raise ValueError(f"{op}: path must be a file's name, got {name!r}")
    return Path(os.path.realpath(name))


def checked_int(op: str, name: str, value: Any, kind: str = "an int") -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except Exception as error:  # what __index__ raises, too: a tensor of floats has one
        raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}") from error


def checked_sequences(op: str, sequences: Any, batch_size: int) -> list[int]:
    """Distinct sequences of a cache, from a list of ints or a tensor of them, which is read on the host."""
    wanted = "sequences must be a list of ints or a tensor of them"
    if isinstance(sequences, Tensor):
        if sequences.dim() != 1 or sequences.dtype not in (torch.int64, torch.int32):
            shape = list(sequences.shape)
            raise TypeError(f"{op}: {wanted}, int64 or int32 [n], got {sequences.dtype} {shape}")
        try:
            numbers: Any = sequences.tolist()
        except (RuntimeError, NotImplementedError) as error:  # of a tensor without memory, or on meta
            raise ValueError(f"{op}: {wanted}, and this tensor has no numbers") from error
    else:
        is_list = hasattr(sequences, "__len__") and hasattr(sequences, "__getitem__")
        if not is_list or isinstance(sequences, (str, bytes, dict)):
            raise TypeError(f"{op}: {wanted}, got {type(sequences).__name__}")
        numbers = sequences
    chosen: list[int] = []
    known: set[int] = set()
    items = iter(numbers)
    while True:  # each is looked at as it comes: range(2**62) ends soon
        try:
            item = next(items)
        except StopIteration:
            break
        except Exception as error:
            raise TypeError(f"{op}: {wanted}, got a {type(sequences).__name__} that is none") from error
        number = checked_int(op, "each of sequences", item)
        if not 0 <= number < batch_size:
            got = str(number) if number.bit_length() <= 64 else f"an int of {number.bit_length()} bits"
            raise IndexError(
                f"{op}: sequences must be from 0 to {batch_size - 1}, as the cache has {batch_size} sequences, "
                f"got {got}"
            )
        if number in known:
            raise ValueError(f"{op}: sequences must name each sequence once, got {number} twice")
        known.add(number)
        chosen.append(number)
    if not chosen:
        raise ValueError(f"{op}: sequences must name at least one sequence, got none")
    return chosen


def check_progress(op: str, progress: Any) -> None:
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"{op}: progress must be True, False, None or a function of two ints, got {type(progress).__name__}"
        )


@contextmanager
def reporting(op: str, path: Path, progress: Any, total: int) -> Iterator[Callable[[int], object]]:
    """A function that takes the number of bytes done so far."""
    if callable(progress):
        yield lambda done: progress(done, total)
        return
    if not progress:
        yield lambda done: None
        return
    try:
        bars: Any = importlib.import_module("tqdm")
    except ImportError:
        shown = -1

        def line(done: int) -> None:
            nonlocal shown
            percent = 100 if total == 0 else done * 100 // total
            if percent // 10 > shown:
                shown = percent // 10
                print(f"{op} {path.name}: {percent}% of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

        yield line
        return
    with bars.tqdm(total=total, desc=f"{op} {path.name}", unit="B", unit_scale=True) as bar:
        yield lambda done: bar.update(done - bar.n)


def check_target(op: str, target: Path) -> None:
    """That a file can be put there: it names a regular file or nothing."""
    mode = stat.S_IFREG
    with suppress(FileNotFoundError), reworded_oserror(f"{op}: path cannot be looked at", target):
        mode = target.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{op}: path must name a file, not a folder", str(target))
    if not stat.S_ISREG(mode):
        raise ValueError(f"{op}: path must name a regular file or a new one, {target} is neither")


@contextmanager
def replacing(op: str, target: Path, size: int) -> Iterator[int]:
    """A new file to write to, which becomes `target` at the end, or is removed where there is an error."""
    folder = target.parent
    temporary = folder / f".{target.name[:40]}.{secrets.token_hex(4)}.tmp"
    with reworded_oserror(f"{op}: path cannot be written", target):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            with suppress(OSError):  # as the one that it replaces
                os.fchmod(fd, stat.S_IMODE(target.stat().st_mode))
            room = os.fstatvfs(fd)
            free = room.f_bavail * room.f_frsize
            if size > free and room.f_blocks > 0:
                raise OSError(
                    errno.ENOSPC,
                    f"{op}: path needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on its disk",
                    str(target),
                )
            yield fd
            with reworded_oserror(f"{op}: path cannot be written", target):
                os.fsync(fd)
        finally:
            os.close(fd)
        with reworded_oserror(f"{op}: path cannot be written", target):
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(PermissionError), reworded_oserror(f"{op}: path is written, but its folder cannot be synced", target):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # may be for writing only
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # on file systems that have no such thing
                raise
        finally:
            os.close(descriptor)
