"""Hugging Face transformers on the FP16 cache.

    from kvcache_ext.integrations.transformers import Fp16Cache

    cache = Fp16Cache.for_model(model, max_positions=65536, batch_size=1)
    model.generate(**inputs, past_key_values=cache)

protocol.py has a diagram of a forward pass, and all that travels through transformers' code on the way to the kernels.
In short:

0. Hooks on the model's decoder (passes.py, positions.py) look at the arguments before anything is stored. Positions
   that were fed before, masks of another length, and states of an encoder are errors.
1. transformers asks for a mask, and `make_mask` (masks.py) makes it. A plain causal or sliding pattern needs none, as
   attention over the cache is causal by itself. A 2D mask says which tokens are padding: padding.py checks and records
   it, and returns how many new tokens to append. Every other pattern is built as the 4D mask that it is.
2. Each layer calls `update` (layers.py). With this attention it only hands the new keys and values on. With any other
   (eager, sdpa, flex, ...) it appends them and returns all keys and values, gathered, in the dtype that came in.
   Outside of a forward pass, a call of `update` is a past made by hand. Nobody attends to it, and it is appended at the
   next call.
3. Each layer calls its attention, `attend` (attention.py): `append_attend` on the cache where it lies, or under a 4D
   mask masked attention over gathered keys and values.

Padding is not stored: a cache holds real tokens only. transformers counts columns of its token matrix, padding
included. `columns` is that number, everywhere here.

The other modules: cache.py (`Fp16Cache`), build.py and layer_plan.py (which layers a model needs, and making them),
shared.py (what the layers have in common), groups.py (their storage), states.py (recurrent and convolutional states),
indexed.py (an index of keys), laid_out.py (keys and values of different widths), changes.py (taking tokens back,
choosing sequences), graphs.py (CUDA graphs), files.py (save and load), planned.py (for a config.json), longrope.py
(Phi-3), sharded.py and agreement.py (positions dealt out to the ranks of a group), version.py (names and releases).
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

# Both registries must know the name: an attention without a mask function gets no mask at all. About the name itself:
# see `NAME`.
ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)

__all__ = ["CROP_MARGIN", "NAME", "NEWEST", "OLDEST", "DecodeGraph", "Fp16Cache", "Fp16Layer"]
