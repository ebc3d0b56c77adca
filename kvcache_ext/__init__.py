"""An FP16 key/value cache for PyTorch models of any float dtype: half the memory, twice the context."""

from __future__ import annotations

from ._extension import build_info
from .attention import merge_states
from .cache import StreamingKVCacheFp16

__all__ = ["StreamingKVCacheFp16", "__version__", "build_info", "merge_states"]

__version__ = "0.1.0"
