"""Tensor parallelism of transformers: which part of a layer's heads this rank has.

A model that is loaded with `tp_plan="auto"`, or with a `DistributedConfig`, has its projections cut into equal parts,
one for each rank. Its configuration and its modules' `out_features` go on to say all heads. The plan names a style for
each projection, and the style says what a layer sees:

- `colwise`: this rank's rows of the weight, and so this rank's heads alone. Most families.
- `colwise_gather_output` (formerly `colwise_rep`): the weight is cut, but its output is collected from all ranks. The
  layer sees all heads (Olmo2, Phi-3).
- none, or any other: the layer sees all heads (gpt-oss).

The styles are read from the plan, not from the weights: a weight is cut in the same way under the first two styles, and
FSDP may have cut it once more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

CUT = "colwise"  # the style that leaves a projection's output cut by heads
# Projections whose outputs are cut by heads, as attention modules name them. Fused ones hold keys, values and queries.
# Those of GPT-NeoX and CodeGen lie in such an order that equal parts are whole heads.
FUSED = ("query_key_value", "qkv_proj")
OF_KEYS = ("k_proj", "v_proj", "kv_b_proj", *FUSED)
OF_QUERIES = ("q_proj", "q_b_proj", *FUSED)
WHOLE = (0, 1)  # as a part: no other rank has any of it


@dataclass(frozen=True)
class TensorParallel:
    """How a model is cut among the ranks of its tensor parallelism, if it is."""

    rank: int  # of this process
    ranks: int  # 1: the model is not cut
    plan: dict[str, str]  # the style of each cut module, by its name, with `*` in place of numbers
    names: dict[Any, str]  # of all modules

    @classmethod
    def of(cls, model: Any) -> TensorParallel:
        rank, ranks = _rank_of(model)
        if ranks == 1:
            return cls(*WHOLE, {}, {})
        return cls(rank, ranks, dict(model.tp_plan or {}), {module: name for name, module in model.named_modules()})

    def part(self, model_name: str, layer: int, module: Any, heads: int) -> tuple[int, int]:
        """Which part of a layer's `heads` key/value heads this rank has: its number, and of how many.

        `module`: the layer's attention, or None if it is not known.

        Raises ValueError or NotImplementedError where transformers cuts them so that attention would be wrong.
        """
        if self.ranks == 1 or module is None or hasattr(module, "expand_kv"):  # the last has latents, of no head
            return WHOLE
        keys = {name: self._is_cut(module, name) for name in OF_KEYS if hasattr(module, name)}
        queries = {name: self._is_cut(module, name) for name in OF_QUERIES if hasattr(module, name)}
        cut = any(keys.values())
        if cut and heads % self.ranks:
            raise ValueError(
                f"Fp16Cache: the {self.ranks} ranks of this tensor parallelism do not divide the {heads} key/value "
                f"heads of layer {layer} of {model_name}: transformers cuts the projections of keys and values into "
                "equal parts and gives no head to two ranks, so a head would be cut in two; load the model on a number "
                f"of ranks that divides {heads}"
            )
        # One key/value head on every rank is right for whichever query heads a rank has.
        if len({cut, *keys.values(), *queries.values()}) > 1 and not (heads == 1 and not cut):
            each = ", ".join(f"{name} {'cut' if is_cut else 'whole'}" for name, is_cut in (queries | keys).items())
            raise NotImplementedError(
                f"Fp16Cache: the tensor parallelism of layer {layer} of {model_name} does not cut queries, keys and "
                f"values alike ({each}), so that query heads would meet other key/value heads than their own; leave "
                "tp_plan to the model ('auto')"
            )
        return (self.rank, self.ranks) if cut else WHOLE

    def _is_cut(self, module: Any, projection: str) -> bool:
        name = f"{self.names.get(module, '')}.{projection}".lstrip(".")
        return self.plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)) == CUT


def _rank_of(model: Any) -> tuple[int, int]:
    """The rank of this process in the model's tensor parallelism, and the number of ranks."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        # A part of a model that was loaded so: the parts have no mesh of their own, but their weights have.
        from torch.distributed.tensor import DTensor

        mesh = next((weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)), None)
    if mesh is None:
        return WHOLE
    axes = mesh.mesh_dim_names or ("tp",)  # up to 5.17 the mesh of tensor parallelism alone has no names
    if "tp" not in axes:  # FSDP, or a pipeline
        return WHOLE
    axis = axes.index("tp")
    return mesh.get_local_rank(axis), mesh.size(axis)
