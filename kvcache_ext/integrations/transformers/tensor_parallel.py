"""Tensor parallelism of transformers: which of a layer's heads are on this rank.

A model that is loaded with `tp_plan="auto"`, or with a `DistributedConfig`, has the weights of its projections sharded:
each rank has some rows. Its configuration and its modules' `out_features` still say all of them. The plan names a style
for each projection, and the style says what a layer sees:

- `colwise`: the outputs of this rank's rows, so the heads of this rank alone. Most families.
- `colwise_gather_output` (formerly `colwise_rep`): the outputs are gathered from all ranks. The layer sees all heads
  (Olmo2, Phi-3).
- Another style, or none: the layer sees all heads (gpt-oss).

The styles are read from the plan. The weights do not tell: they are sharded in the same way under the first two styles,
and FSDP may have sharded them once more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

SHARDED = "colwise"  # the style after which a layer sees the heads of its own rank alone
# Projections by the names that attention modules give them. Fused ones have queries, keys and values in one weight. In
# that of GPT-NeoX and of CodeGen equal shares of the rows are whole heads.
FUSED = ("query_key_value", "qkv_proj")
OF_KEYS = ("k_proj", "v_proj", "kv_b_proj", *FUSED)
OF_QUERIES = ("q_proj", "q_b_proj", *FUSED)
WHOLE = (0, 1)  # a shard that is all there is


@dataclass(frozen=True)
class TensorParallel:
    """How a model is sharded among the ranks of its tensor parallelism, if it is."""

    rank: int  # of this process
    ranks: int  # 1: the model is not sharded
    plan: dict[str, str]  # styles, by the names of modules, with `*` in place of numbers
    names: dict[Any, str]  # of all modules

    @classmethod
    def of(cls, model: Any) -> TensorParallel:
        rank, ranks = _rank_of(model)
        if ranks == 1:
            return cls(*WHOLE, {}, {})
        return cls(rank, ranks, dict(model.tp_plan or {}), {module: name for name, module in model.named_modules()})

    def shard(self, model_name: str, layer: int, module: Any, heads: int) -> tuple[int, int]:
        """Which of a layer's `heads` key/value heads are on this rank: rank and number of ranks, or `WHOLE`.

        `module`: the layer's attention, or None if it is not known.

        Raises ValueError or NotImplementedError where attention on this rank would fail or be wrong.
        """
        if self.ranks == 1 or module is None:
            return WHOLE
        if hasattr(module, "expand_kv"):  # the cache gets latents, which are the same on all ranks
            return WHOLE
        keys = {name: self._is_sharded(module, name) for name in OF_KEYS if hasattr(module, name)}
        queries = {name: self._is_sharded(module, name) for name in OF_QUERIES if hasattr(module, name)}
        sharded = any(keys.values())
        if sharded and heads % self.ranks:
            raise ValueError(
                f"Fp16Cache: {heads} key/value heads, as layer {layer} of {model_name} has, cannot be divided among "
                f"{self.ranks} ranks: transformers gives each rank an equal share of the rows of the projections, and "
                f"no head to two ranks, so a head would be split; use a number of ranks that divides {heads}"
            )
        # A single key/value head that is on every rank serves whichever query heads a rank has.
        alike = len({sharded, *keys.values(), *queries.values()}) == 1
        if not alike and (sharded or heads > 1):
            each = ", ".join(f"{name} is {'sharded' if it else 'whole'}" for name, it in (queries | keys).items())
            raise NotImplementedError(
                f"Fp16Cache: in layer {layer} of {model_name} the tensor parallelism does not shard queries, keys and "
                f"values alike ({each}), so queries would attend to the key/value heads of others; use tp_plan='auto'"
            )
        return (self.rank, self.ranks) if sharded else WHOLE

    def _is_sharded(self, module: Any, projection: str) -> bool:
        name = f"{self.names.get(module, '')}.{projection}".lstrip(".")
        return self.plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)) == SHARDED


def _rank_of(model: Any) -> tuple[int, int]:
    """The rank of this process in the model's tensor parallelism, and the number of ranks."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        # The decoder of a model that was loaded so has no mesh of its own. Its weights have one.
        from torch.distributed.tensor import DTensor

        mesh = next((weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)), None)
    if mesh is None:
        return WHOLE
    axes = mesh.mesh_dim_names or ("tp",)  # transformers 5.17 gives a mesh of tensor parallelism alone no names
    if "tp" not in axes:  # FSDP, or a pipeline
        return WHOLE
    axis = axes.index("tp")
    return mesh.get_local_rank(axis), mesh.size(axis)
