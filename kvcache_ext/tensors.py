"""The tensors of a cache, which travel together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import memory


class CacheTensors(NamedTuple):
    """A cache of `L` layers, `B` sequences, `N` slots a sequence, `H` heads of `D` elements, as kernels take it."""

    k_cache: Tensor  # FP16 [L, B, N, H, D], contiguous; the slots in physical order
    v_cache: Tensor  # the same
    state: Tensor  # int64 [3, L, B]: seqlens; oldest held positions that are no sinks; scratch, zero between calls
    overflow_counts: Tensor  # int64 [L]
    workspace: Tensor  # FP32 [memory.workspace_floats(...)]: what attention's blocks share within a call
    sink_positions: int
    saturate: bool  # finite values that FP16 cannot hold become +-65504, not infinite

    @classmethod
    def allocate(cls, planned: memory.Plan, device: torch.device, sink_positions: int, saturate: bool) -> CacheTensors:
        """Allocates all of a cache, or nothing. Keys and values are not initialised, nor is `state[1]`.

        Raises:
            MemoryError: it cannot be allocated.
        """
        p = planned
        shape = (p.num_layers, p.batch_size, p.max_positions, p.num_heads, p.head_dim)
        sizes: list[tuple[tuple[int, ...], torch.dtype]] = [
            (shape, torch.float16),
            (shape, torch.float16),
            ((3, p.num_layers, p.batch_size), torch.int64),
            ((p.num_layers,), torch.int64),
            ((p.workspace_bytes // 4,), torch.float32),
        ]
        tensors: list[Tensor] = []
        try:
            with torch.inference_mode(False):  # or a cache made under it could never be cleared outside it
                for i, (size, dtype) in enumerate(sizes):
                    make = torch.empty if i < 2 else torch.zeros
                    tensors.append(make(size, dtype=dtype, device=device))
        except (MemoryError, RuntimeError) as error:
            tensors.clear()  # which the exception's traceback would keep
            # On a CPU torch's allocator raises a plain RuntimeError. On a GPU that would be something else.
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and device.type != "cpu":
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
            free = memory.free_bytes(device)
            although = "" if free is None else f", although {free / memory.GB:.2f} GB are free"
            raise MemoryError(
                f"StreamingKVCacheFp16: {p.total_bytes / memory.GB:.2f} GB could not be allocated on "
                f"{device}{although} (in pieces that are too small, perhaps, or another process was faster); "
                "nothing of it is kept"
            ) from error
        k_cache, v_cache, state, overflow_counts, workspace = tensors
        return cls(k_cache, v_cache, state, overflow_counts, workspace, sink_positions, saturate)

    def saved(self) -> dict[str, Any]:
        """What a pickle holds, in types that `torch.load` allows: all but the workspace, which lives for one call."""
        return {name: value for name, value in self._asdict().items() if name != "workspace"}

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> CacheTensors:
        """From what `saved` gave, with a new workspace."""
        k_cache = saved["k_cache"]
        floats = memory.workspace_floats(k_cache.device, k_cache.shape[-1], k_cache.shape[1])
        with torch.inference_mode(False):
            workspace = torch.zeros(floats, dtype=torch.float32, device=k_cache.device)
        return cls(**saved, workspace=workspace)

    def prepared(self) -> CacheTensors:
        """Plain tensors, and marked for torch.compile as ones that never move."""
        t = self._replace(
            k_cache=_plain(self.k_cache),
            v_cache=_plain(self.v_cache),
            state=_plain(self.state),
            overflow_counts=_plain(self.overflow_counts),
        )
        for tensor in (t.k_cache, t.v_cache, t.state, t.overflow_counts, t.workspace):
            # What torch._dynamo.mark_static_address(tensor) does; importing torch._dynamo for it takes seconds.
            tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        return t


def _plain(tensor: Tensor) -> Tensor:
    """The same memory outside inference mode: torch may not change there what was copied or unpickled in it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        return plain
