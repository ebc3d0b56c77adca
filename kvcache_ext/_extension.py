"""Loads the compiled extension, or says in one sentence why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_REBUILD = "rebuild it with `pip install --force-reinstall --no-deps .`, or `python setup.py build_ext --inplace`"


@dataclass(frozen=True)
class BuildInfo:
    """What the extension was built with."""

    torch_version: str
    with_cuda: bool
    reason: str  # why it is a CUDA build, or a CPU build
    cuda_architectures: str


def _load() -> tuple[Any, BuildInfo]:
    try:
        from . import _build_info
    except ImportError:
        raise ImportError(
            "kvcache_ext has not been built here: run `pip install .` in its folder, or `make build`"
        ) from None
    info = BuildInfo(
        _build_info.TORCH_VERSION, _build_info.WITH_CUDA, _build_info.REASON, _build_info.CUDA_ARCHITECTURES
    )
    if info.torch_version != str(torch.__version__):
        raise ImportError(
            f"kvcache_ext was built with torch {info.torch_version}, and this is torch {torch.__version__}: {_REBUILD}"
        )
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"kvcache_ext's compiled part does not load ({error}): {_REBUILD}") from error
    return _C, info


extension, build_info = _load()
