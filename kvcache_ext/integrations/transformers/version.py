"""The name of the attention, and the releases of transformers that this is written for."""

from __future__ import annotations

import re

# The name of the attention. transformers treats names with "flash", "sdpa" or "flex_attention" in them specially.
NAME = "kvcache_ext"
OLDEST, NEWEST = (5, 17), (5, 24)  # the releases of transformers that this is written for and tested with
CROP_MARGIN = 128  # tokens that `crop` can take back from a sliding window layer


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def cache_argument() -> str:
    """The name of a cache among a model's arguments, and in what it returns."""
    import transformers

    return "cache" if _release(transformers.__version__) >= (5, 24) else "past_key_values"


def check_version() -> None:
    """Raises ImportError unless transformers is there, in a release that this is written for."""
    wanted = f"kvcache_ext.integrations.transformers needs transformers {OLDEST[0]}.{OLDEST[1]} to "
    wanted += f"{NEWEST[0]}.{NEWEST[1]}"
    install = f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{wanted}, and it cannot be imported ({error}): {install}") from error
    if not OLDEST <= _release(transformers.__version__) <= NEWEST:
        raise ImportError(f"{wanted}, and this is transformers {transformers.__version__}: {install}")
