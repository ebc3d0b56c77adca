"""An FP16 key/value cache for FP32, FP16 and BF16 models in PyTorch: half the memory, twice the context."""

from __future__ import annotations

import sys

from .version import __version__

try:
    from ._extension import build_info
    from .cache import StreamingKVCacheFp16
    from .merging import merge_states
except ImportError:
    # `python -m kvcache_ext env` must run also where the extension does not load: it says why. (While Python imports a
    # package for -m, "-m" is what it leaves in argv[0].)
    if sys.argv[:1] != ["-m"]:
        raise

__all__ = ["StreamingKVCacheFp16", "__version__", "build_info", "merge_states"]
