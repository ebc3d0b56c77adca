"""Checks of arguments that several modules share, and how an error shows a wrong one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ._extension import build_info


def shown(value: object) -> str:
    """A wrong argument for an error's one sentence: whole if it is short, else its type.

    A tensor's text has many lines, and that of one whose memory is gone crashes the process.
    """
    if value is None or isinstance(value, (str, bool, float, torch.device, torch.dtype)):
        text = repr(value)
        if len(text) <= 60:  # and in one line, as a repr's are
            return text
    if isinstance(value, int) and value.bit_length() <= 64:
        return str(value)
    return f"a {type(value).__name__}"


def checked_int(name: str, value: Any, least: int, *, of: str = "StreamingKVCacheFp16") -> int:
    """An argument of a class or function, `of`, as an int of at most 64 bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{of}: {name} must be an int, got {type(value).__name__}")
    try:
        number = operator.index(value)
    except Exception as error:  # a tensor of floats has the method, too
        raise TypeError(f"{of}: {name} must be an int, got a {type(value).__name__}") from error
    if number.bit_length() > 63:
        raise ValueError(f"{of}: {name} must fit in 64 bits, got an int of {number.bit_length()} bits")
    if number < least:
        raise ValueError(f"{of}: {name} must be at least {least}, got {number}")
    return number


def checked_device(device: Any) -> torch.device:
    """A device that this build can use and that is there, with its index."""
    try:
        chosen = torch.device(device)
    except Exception as error:  # torch has a kind for each way to be wrong
        raise ValueError(
            f"StreamingKVCacheFp16: device must name a CUDA device or the CPU, got {shown(device)}"
        ) from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise ValueError(f"StreamingKVCacheFp16: device must be a CUDA device or the CPU, got {shown(device)}")
    if not build_info.with_cuda:
        raise ValueError(
            f"StreamingKVCacheFp16: device={str(device)!r} needs a CUDA build of kvcache_ext, and this is a CPU "
            f"build, as {build_info.reason}; install a CUDA build of torch and a CUDA toolkit and run `pip install "
            "--force-reinstall --no-deps .` (KVCACHE_EXT_CUDA=1 forces a CUDA build), or pass device='cpu'"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"StreamingKVCacheFp16: device={str(device)!r} needs a CUDA GPU, and torch {torch.__version__} sees none "
            "here; pass device='cpu'"
        )
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"StreamingKVCacheFp16: device={str(device)!r} does not exist; there are "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", index)


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """Raises if a tensor requires grad. Needed while tracing: by the time the kernel runs, `requires_grad` is gone.

    In eager code the bindings (checks.cpp) raise the same.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require grad, as a cache records no gradients, got requires_grad=True; call it "
                "under torch.no_grad() or pass .detach()"
            )
