"""Making the layers of an `Fp16Cache` for a model, and setting the model up for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import shown
from .agreement import Agreement
from .groups import LayerGroup
from .indexed import IndexedLayer
from .layer_plan import LayerPlan, check_attention, check_takes_a_cache, plan_layers
from .layers import AbsentLayer, Fp16Layer
from .longrope import keep_cache_where_rope_changes
from .passes import watch
from .positions import Positions
from .shared import SharedState
from .states import EmptyLayer, HybridLayer, StateLayer
from .version import NAME

AnyLayer = Fp16Layer | StateLayer | EmptyLayer


def build(
    model: Any,
    max_positions: int,
    batch_size: int,
    *,
    attention: str | None,
    overflow: str,
    precision: str,
    compileable: bool,
    group: Any,
    exchange: Any,
    timeout: Any,
) -> tuple[list[AnyLayer], SharedState]:
    """See `Fp16Cache.for_model`."""
    if attention not in (None, NAME):
        raise ValueError(f"Fp16Cache: attention must be {NAME!r} or None, got {attention!r}")
    if precision not in ("auto", "fp32", "fp16"):
        raise ValueError(f"Fp16Cache: precision must be 'auto', 'fp32' or 'fp16', got {precision!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"Fp16Cache: batch_size must be an int, got {shown(batch_size)}")
    if batch_size < 1:
        raise ValueError(f"Fp16Cache: batch_size must be at least 1, got {batch_size}")
    if not isinstance(overflow, str) or overflow not in ("saturate", "inf"):
        raise ValueError(f"Fp16Cache: overflow must be 'saturate' or 'inf', got {shown(overflow)}")
    sharding = None
    if group is not None:
        from .sharded import Sharding  # which needs a torch that has process groups

        sharding = Sharding(group, exchange, timeout)
        max_positions = sharding.rounded(max_positions)
    elif exchange != "auto" or timeout != 60.0:
        raise ValueError("Fp16Cache: exchange and timeout are of the ranks of a group: pass group=, too")
    plans, config = plan_layers(model, max_positions)
    check_takes_a_cache(model)
    present = [plan for plan in plans if plan.present]
    if compileable and any(plan.states for plan in plans):
        raise NotImplementedError(
            f"Fp16Cache: {type(model).__name__} has recurrent or convolutional states, which compileable=True does not "
            "serve; decode with cuda_graphs() instead"
        )
    if attention is not None:
        check_attention(model, present)
    if sharding is not None:
        sharding.check(model, plans, compileable)
        sharding.describe(model, plans, batch_size, attention, overflow, precision, exchange, timeout)
    shared = SharedState(
        batch_size,
        max_positions,
        config,
        precision,
        compileable,
        positions=Positions(batch_size, next(plan.device for plan in present if plan.attends)),
        layer_count=len(plans),
    )
    layers = _make_layers(plans, shared, overflow, sharding)
    if sharding is not None:
        shared.agreement = Agreement(sharding.exchange)
    if attention is not None:
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise NotImplementedError(
                f"Fp16Cache: the attention of {type(model).__name__} cannot be set; make the cache with "
                "attention=None, which gives the model gathered keys and values"
            )
    watch(model)
    keep_cache_where_rope_changes(model)
    return layers, shared


def _make_layers(plans: list[LayerPlan], shared: SharedState, overflow: str, sharding: Any) -> list[AnyLayer]:
    """The layers in the model's order. Their `StreamingKVCacheFp16`s, one for each group, are put into `shared`."""
    members: dict[tuple[Any, ...], list[int]] = {}
    for i, plan in enumerate(plans):
        if plan.present and plan.attends:
            members.setdefault(plan.group, []).append(i)
    layers: dict[int, AnyLayer] = {}
    storages = [(len(indices), plans[indices[0]]) for indices in members.values()]
    shared.caches += _make_groups(storages, sharding, batch_size=shared.batch_size, overflow=overflow)
    for cache, indices in zip(shared.caches, members.values(), strict=True):
        for index_in_cache, i in enumerate(indices):
            kind = HybridLayer if plans[i].states else IndexedLayer if plans[i].indexed else Fp16Layer
            layers[i] = kind(shared, cache, index_in_cache, plans[i])
    beside = layers[min(layers)]
    assert isinstance(beside, Fp16Layer)
    for i, plan in enumerate(plans):
        if not plan.attends:
            layers[i] = StateLayer(shared, plan.states, here=plan.present) if plan.states else EmptyLayer()
        elif not plan.present:
            layers[i] = AbsentLayer(beside, plan)
    return [layers[i] for i in range(len(plans))]


def _make_groups(storages: list[tuple[int, LayerPlan]], sharding: Any, **options: Any) -> list[LayerGroup]:
    """The storage of so many layers of each plan. `sharding`: a `Sharding`, or None."""

    def make(kind: Callable[..., LayerGroup], layers: int, plan: LayerPlan) -> LayerGroup:
        return kind(layers, plan.max_positions, plan.heads, plan.head_dim, device=plan.device, **options)

    if sharding is None:
        return [make(LayerGroup, *storage) for storage in storages]
    whole = {i: storage for i, storage in enumerate(storages) if not sharding.deals_out(storage[1])}
    made = sharding.together(
        storages[0][1].device, lambda: {i: make(LayerGroup, *storage) for i, storage in whole.items()}
    )
    return [made[i] if i in made else make(sharding.make, *storage) for i, storage in enumerate(storages)]
