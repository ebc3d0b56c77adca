"""The `StreamingKVCacheFp16` of layers of one shape."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NoReturn

from ...cache import StreamingKVCacheFp16


class LayerGroup(StreamingKVCacheFp16):
    """The storage of layers of one shape. Everybody may read it. Only its `Fp16Cache` changes it.

    An `Fp16Cache` counts the tokens of each layer. It would not count what others append. So the methods that change a
    cache are errors here, and the `Fp16Cache` calls those of `storage`: `cache.storage.append(cache, ...)`.
    """

    storage: ClassVar[type[StreamingKVCacheFp16]] = StreamingKVCacheFp16


def _refused(name: str) -> Callable[..., NoReturn]:
    def call(self: LayerGroup, *arguments: Any, **options: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: this is the storage of an Fp16Cache, which counts the tokens in it; change it through the "
            "Fp16Cache: update, crop, reorder_cache, reset, save and load"
        )

    return call


for _name in (
    *("append", "append_all", "append_attend", "truncate", "drop_newest", "reset", "reorder", "copy_sequence"),
    *("clear", "load_sequences"),
):
    setattr(LayerGroup, _name, _refused(_name))


def _sent_to_a_process(group: LayerGroup) -> tuple[Callable[[bytes], LayerGroup], tuple[bytes]]:
    return pickle.loads, (pickle.dumps(group),)


ForkingPickler.register(LayerGroup, _sent_to_a_process)
