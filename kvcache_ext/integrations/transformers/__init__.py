"""Hugging Face transformers on the FP16 cache.

    from kvcache_ext.integrations.transformers import Fp16Cache

    cache = Fp16Cache.for_model(model, max_positions=65536, batch_size=1)
    model.generate(**inputs, past_key_values=cache)

How a forward pass goes through it:

0. Hooks on the model's decoder (passes.py, positions.py) let the cache look at what comes, before anything is stored:
   positions that were fed before, masks of another length, states of an encoder.
1. The model asks for a mask. `make_mask` (masks.py) is what transformers finds under this attention's name. A plain
   causal or sliding pattern needs no mask: attention over the cache is causal by itself. A 2D mask says which of the
   new tokens exist: `Shared.plan` (shared.py) turns it into what the kernels take, the number of rows to append for
   each sequence, and checks that it says of the old tokens what it said before. Every other pattern is built as the 4D
   mask that it is.
2. Each layer calls `update` (layers.py). With this attention it only hands the new rows on, in a `NewRows`; with any
   other (eager, sdpa, flex, ...) it appends them and returns all keys and values, gathered, in the dtype that came in.
   Outside of a pass `update` is a past made by hand: what nobody attends to is appended at the next call.
3. Each layer calls its attention, `attend` (attention.py): `append_attend` on the cache where it lies, or under a 4D
   mask masked attention over gathered keys and values.

A cache so holds real tokens only: padding is not stored. transformers counts columns of its token matrix, padding
included; `columns` is that number.
"""

from __future__ import annotations

from .version import CROP_MARGIN, NAME, NEWEST, OLDEST, check_version

check_version()

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from .attention import attend  # noqa: E402
from .cache import Fp16Cache  # noqa: E402
from .graphs import DecodeGraph  # noqa: E402
from .layers import Fp16Layer  # noqa: E402
from .masks import make_mask  # noqa: E402

# The name contains none of the words that transformers looks for, and is known to both registries: an attention without
# a mask function would get no mask at all.
ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)

__all__ = ["CROP_MARGIN", "NAME", "NEWEST", "OLDEST", "DecodeGraph", "Fp16Cache", "Fp16Layer"]
