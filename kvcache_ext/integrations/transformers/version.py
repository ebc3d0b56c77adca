"""The name of the attention, and the releases of transformers that this is written for."""

from __future__ import annotations

import re

NAME = "kvcache_ext"  # of the attention; transformers treats names with "flash", "sdpa" or "flex_attention" specially
OLDEST, NEWEST = (5, 17), (5, 23)  # the releases of transformers that this is written for and tested with
CROP_MARGIN = 128  # tokens that `crop` can take back from a sliding window layer


def check_version() -> None:
    wanted = f"kvcache_ext.integrations.transformers needs transformers {OLDEST[0]}.{OLDEST[1]} to "
    wanted += f"{NEWEST[0]}.{NEWEST[1]}"
    install = f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{wanted}, and it cannot be imported ({error}): {install}") from error
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        raise ImportError(f"{wanted}, and this is transformers {transformers.__version__}: {install}")
