"""A decode step as a CUDA graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .positions import Positions
from .version import NAME, cache_argument

if TYPE_CHECKING:
    from .cache import Fp16Cache

# Steps before the captured one. Compiled code is there at the third: lengths are constants to the first, and not to the
# second.
WARM_UPS = 3


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _copied(each) for name, each in value.items()})
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_copied(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@contextmanager
def _experts_for_decoding(model: Any, device: torch.device) -> Iterator[None]:
    """Mixtures of experts by `batched_mm` on a GPU, as `generate` has them while it decodes.

    Their default, `grouped_mm`, looks at the device from the host where torch has no kernel for the dtype (FP32).
    """
    ask = getattr(model, "get_experts_implementation", None)
    before = ask() if ask is not None and device.type != "cpu" else {}
    if "grouped_mm" not in before.values():
        yield
        return
    model.set_experts_implementation({k: "batched_mm" if v == "grouped_mm" else v for k, v in before.items()})
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def asks_for_router_logits(model: Any) -> bool:
    """Whether the configuration does, of a mixture of experts: the loss that comes with them cannot be captured."""
    config: Any = getattr(model, "config", None)  # a function that calls the model has none
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "output_router_logits", False))


@contextmanager
def _unwatched(positions: Positions | None) -> Iterator[None]:
    """While steps run that are taken back, all of them at one position."""
    if positions is None:
        yield
        return
    positions.paused = True
    try:
        yield
    finally:
        positions.paused = False


class DecodeGraph:
    """One decode step of a model with its `Fp16Cache`, captured once in a CUDA graph and replayed for each token.

        step = cache.decode_graph(model)          # after the prefill
        logits = step(token)                      # token: int64 [B, 1]; logits: [B, 1, vocabulary]

    The logits are overwritten by the next step. A token's position is the number of tokens held, padding not counted,
    as `generate` has it, unless `position_ids` says otherwise (models whose positions do not begin at 0, such as
    RoBERTa's, need them). Lengths move on the device; `get_seq_length()` is kept right by counting replays. The cache
    must outlive this object.

    Capturing runs the step a few times and takes those back, for which the cache must have room. With `compile` the
    step goes through torch.compile first, which fuses what lies between the matrix products. Mixtures of experts are
    captured with `batched_mm`, as `generate` has them while it decodes. On a CPU there is no graph: each call is the
    step itself.
    """

    def __init__(
        self,
        model: Any,
        cache: Fp16Cache,
        *,
        compile: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        shared = cache._shared
        if not shared.own_attention:
            used = shared.config._attn_implementation
            raise ValueError(f"DecodeGraph: the model's attention must be {NAME!r}, got {used!r}")
        if shared.active is None:
            raise ValueError("DecodeGraph: run the prompt through the model first")
        devices = {layer.device for layer in cache.layers}
        if len(devices) != 1:
            raise NotImplementedError("DecodeGraph: one CUDA graph cannot hold a model on several devices")
        self._forward = model if forward is None else forward
        if compile:
            self._forward = torch.compile(self._forward)
        self._cache = cache
        self._arguments = {cache_argument(): cache, "use_cache": True, "return_dict": True}
        if asks_for_router_logits(model):
            self._arguments["output_router_logits"] = False
        self._batch = shared.active
        device = devices.pop()
        self._ids = torch.zeros(self._batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(self._batch, 1, dtype=torch.int64, device=device)
        self._graph: Any = None
        self._out: Any = None  # of the step: its tensors are the graph's, and overwritten by the next one
        if device.type == "cuda":
            with torch.cuda.device(device), _experts_for_decoding(model, device):
                self._capture(device)

    @torch.no_grad()
    def _step(self) -> None:
        self._out = self._forward(
            input_ids=self._ids, position_ids=self._positions, attention_mask=None, **self._arguments
        )

    def _logits(self) -> Tensor:
        has_logits = isinstance(self._out, dict) and "logits" in self._out
        logits: Tensor = self._out["logits"] if has_logits else self._out[0]  # without a head: the last hidden state
        return logits

    def output(self) -> Any:
        """A copy of all that the model returned at the latest step."""
        return _copied(self._out)

    @staticmethod
    def has_room(cache: Fp16Cache) -> bool:
        """Whether the cache has room for the steps that capturing takes."""
        return all(not at.bounded or at.columns + WARM_UPS <= at.cache.max_positions for at in cache.layers)

    def serves(self, input_ids: Tensor) -> bool:
        return self._cache._shared.active == self._batch and input_ids.shape == self._ids.shape

    def _capture(self, device: torch.device) -> None:
        layers = self._cache.layers
        for layer in layers:
            layer._check(self._batch, WARM_UPS)
        self._cache._shared.passing = None  # what runs here is no part of a pass that may have asked for this graph
        counts = [cache.overflow_counts() for cache in self._cache.caches]
        positions = self._cache._shared.positions
        fed = None if positions is None else positions.last.clone()
        self._positions.copy_(self._held())
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), _unwatched(positions):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        with _unwatched(positions):
            self._cache.crop(-WARM_UPS)
        if positions is not None:
            positions.last.copy_(fed)
        for cache, count in zip(self._cache.caches, counts, strict=True):
            cache.tensors.overflow_counts.copy_(count)
        before = [(layer.columns, layer.first) for layer in layers]
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._step()
        finally:  # a capture runs nothing on the device
            for layer, (columns, first) in zip(layers, before, strict=True):
                layer.columns, layer.first = columns, first

    def _held(self) -> Tensor:
        """How many tokens each sequence has: the next one's position, `[B, 1]`."""
        return self._cache.caches[0].cache_seqlens[self._cache.layers[0].index, : self._batch, None]

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        shared = self._cache._shared
        if not self.serves(input_ids):
            raise ValueError(
                f"DecodeGraph: it steps {self._batch} sequences by one token each, got input_ids of shape "
                f"{list(input_ids.shape)} and a cache that holds {shared.active}"
            )
        shared.settle()
        if shared.positions is not None:
            shared.positions.raise_if_fed_twice()
        for layer in self._cache.layers:
            layer._check(self._batch, 1)
        self._ids.copy_(input_ids)
        self._positions.copy_(self._held() if position_ids is None else position_ids)
        if self._graph is None:
            self._step()
            return self._logits()
        self._graph.replay()
        for layer in self._cache.layers:
            layer._advance(1)
        return self._logits()


class StandIn:
    """What a model has as its `forward` for a while. A copy of the model has its own again."""

    def __init__(self, model: Any, own: Any, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original, updated=())  # generate() reads the signature to know what to pass
        self.model, self.own, self.call = model, own, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        model = copy.deepcopy(self.model, memo)
        return MethodType(type(model).forward, model)


@contextmanager
def replayed(model: Any, cache: Fp16Cache, *, compile: bool) -> Iterator[None]:
    """See `Fp16Cache.cuda_graphs`."""
    graph: DecodeGraph | None = None
    names = {cache_argument(), "past_key_values"}  # the old one is understood by all versions
    original, own = model.forward, model.__dict__.get("forward")

    def replayable(kwargs: dict[str, Any]) -> bool:
        ids, mask, places = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        given = [kwargs[name] for name in names if kwargs.get(name) is not None]
        if len(given) != 1 or given[0] is not cache or not cache._shared.own_attention:
            return False
        if not isinstance(ids, Tensor) or tuple(ids.shape) != (cache._shared.active, 1):
            return False
        if kwargs.get("use_cache") is None and getattr(model.config, "use_cache", True) is False:
            return False
        if not isinstance(places, Tensor) or places.dim() != 2:  # some models have several for a token
            return False
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return False
        if asks_for_router_logits(model) and kwargs.get("output_router_logits") is not False:
            return False
        for name, value in kwargs.items():
            if name in names or name in ("input_ids", "attention_mask", "position_ids") or value is None:
                continue
            if name in ("use_cache", "return_dict"):
                known = value is True
            elif name == "logits_to_keep":  # of one token's logits
                known = isinstance(value, int)
            else:
                known = value is False and name.startswith("output_")
            if not known:
                return False
        return True

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal graph
        if args or not replayable(kwargs):
            return original(*args, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if graph is None or not graph.serves(ids):
            if not DecodeGraph.has_room(cache):
                return original(*args, **kwargs)
            graph = DecodeGraph(model, cache, compile=compile, forward=original)
        if mask is not None:
            mask = mask.to(ids.device).expand(len(ids), -1)
            for window in {layer.window for layer in cache.layers}:
                cache._shared.plan(mask, cache.get_seq_length(), 1, window, no_padding=True)
        graph(ids, kwargs["position_ids"])
        return graph.output()

    model.forward = StandIn(model, own, original, forward)
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    cache._shared.raise_if_late(wait=True)
