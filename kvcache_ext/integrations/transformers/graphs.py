"""A decode step as a CUDA graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .agreement import UNCOMPILED
from .changes import take_back
from .passes import takes_positions
from .positions import Positions
from .shared import WholeCache
from .version import NAME, cache_argument

# Steps before the captured one. torch.compile takes lengths for constants at the first step, and compiles anew at the
# second. So the third is the first that only runs compiled code.
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
    """On a GPU, experts are computed by `batched_mm` within, as `generate` has them while it decodes.

    The default, `grouped_mm`, synchronises with the device where torch has no kernel for the dtype (FP32).
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
    """Whether a mixture of experts is configured to return router logits. The loss that it adds cannot be captured."""
    config: Any = getattr(model, "config", None)  # `model` may be a function that calls a model
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "output_router_logits", False))


@contextmanager
def _unchecked(positions: Positions) -> Iterator[None]:
    """Positions are not checked within: all warm-up steps run at one position, and are taken back."""
    positions.paused = True
    try:
        yield
    finally:
        positions.paused = False


class DecodeGraph:
    """One decode step of a model with its `Fp16Cache`, captured once in a CUDA graph and replayed for each token.

        step = cache.decode_graph(model)          # after the prefill
        logits = step(token)                      # token: int64 [B, 1]; logits: [B, 1, vocabulary]

    The next step overwrites the logits. A token's position is the number of tokens before it, padding not counted, as
    `generate` has it, unless `position_ids` says otherwise (models whose positions do not begin at 0, such as
    RoBERTa's, need them). Lengths move on the device; the host counts replays, which keeps `get_seq_length()` right.
    The cache must outlive this object.

    Capturing runs the step a few times and takes those steps back. The cache must have room for them. With `compile`
    the step goes through torch.compile first, which fuses what lies between the matrix products. Mixtures of experts
    are captured with `batched_mm`, as `generate` has them while it decodes. On a CPU there is no graph: each call runs
    the step itself.
    """

    def __init__(
        self,
        model: Any,
        cache: WholeCache,
        *,
        compile: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        shared = cache.shared
        if not shared.own_attention:
            used = shared.config._attn_implementation
            raise ValueError(f"DecodeGraph: the model's attention must be {NAME!r}, got {used!r}")
        if shared.active is None:
            raise ValueError("DecodeGraph: run the prompt through the model first")
        if compile and shared.agreement is not None:
            raise NotImplementedError(f"DecodeGraph: {UNCOMPILED}; leave compile=True out")
        if compile and any(layer.chunked for layer in cache.attention_layers):
            raise NotImplementedError("DecodeGraph: compiled code cannot serve chunked attention")
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        if isinstance(decoder, nn.Module) and not takes_positions(decoder):
            raise NotImplementedError(
                f"DecodeGraph: {type(model).__name__} takes no position_ids, and a graph would keep the position that "
                "it has now; decode without a graph"
            )
        devices = {layer.device for layer in cache.attention_layers}
        devices |= {memory.device for layer in cache.state_layers for memory in layer.memory.values()}
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
        self._out: Any = None  # what the latest step returned: the graph's own tensors, which the next step overwrites
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
    def has_room(cache: WholeCache) -> bool:
        """Whether the cache has room for the steps that capturing takes."""
        return all(not at.bounded or at.columns + WARM_UPS <= at.cache.max_positions for at in cache.attention_layers)

    def serves(self, input_ids: Tensor) -> bool:
        """Whether these ids have the shape of the captured step."""
        return self._cache.shared.active == self._batch and input_ids.shape == self._ids.shape

    def _capture(self, device: torch.device) -> None:
        cache, layers, shared = self._cache, self._cache.attention_layers, self._cache.shared
        for layer in layers:
            layer.check_room(self._batch, WARM_UPS)
        # The pass under way, which may have asked for this graph, does not include the steps that run here.
        shared.current_pass = None
        counts = [group.tensors.overflow_counts.clone() for group in cache.caches]  # of this rank alone
        positions = shared.positions
        fed = positions.last.clone()
        states = [layer.snapshot() for layer in cache.state_layers]
        masked_calls = shared.masked_calls
        self._positions.copy_(self._next_positions())
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), _unchecked(positions):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        with _unchecked(positions):
            take_back(cache, WARM_UPS)
        for layer, snapshot in zip(cache.state_layers, states, strict=True):
            layer.restore(snapshot)
        positions.last.copy_(fed)
        for group, count in zip(cache.caches, counts, strict=True):
            group.tensors.overflow_counts.copy_(count)
        if shared.masked_calls != masked_calls:
            raise MaskedStep(
                "DecodeGraph: a step of this model attends under a 4D mask (chunked attention, say), and a graph would "
                "keep the columns that it has now; decode without a graph"
            )
        before = [(layer.columns, layer.first_held) for layer in layers]
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._step()
        finally:  # a capture runs nothing on the device, so the layers hold what they held
            for layer, (columns, first_held) in zip(layers, before, strict=True):
                layer.columns, layer.first_held = columns, first_held

    def _next_positions(self) -> Tensor:
        """The position of each sequence's next token, `[B, 1]`: how many tokens it has."""
        return self._cache.caches[0].cache_seqlens[self._cache.attention_layers[0].index, : self._batch, None]

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        shared = self._cache.shared
        if not self.serves(input_ids):
            raise ValueError(
                f"DecodeGraph: it steps {self._batch} sequences by one token each, got input_ids of shape "
                f"{list(input_ids.shape)} and a cache that holds {shared.active}"
            )
        shared.check_ranks()
        shared.append_pending()
        shared.positions.raise_if_fed_twice()
        for layer in self._cache.attention_layers:
            layer.check_room(self._batch, 1)
        self._ids.copy_(input_ids)
        self._positions.copy_(self._next_positions() if position_ids is None else position_ids)
        if self._graph is None:
            self._step()
            return self._logits()
        self._graph.replay()
        for layer in self._cache.attention_layers:
            layer.advance(1)
        shared.check_ranks()
        return self._logits()


class MaskedStep(NotImplementedError):
    """A step that a graph cannot hold, as it has a 4D mask."""


class PatchedForward:
    """A model's `forward` within `replayed_steps`: replays one-token steps, and runs the original for all others."""

    def __init__(self, model: Any, cache: WholeCache, *, compile: bool) -> None:
        self.model, self.cache, self.compile = model, cache, compile
        self.original: Callable[..., Any] = model.forward
        self.previous: Any = model.__dict__.get("forward")  # set on the model itself before, or None
        self.graph: DecodeGraph | None = None
        self.has_masked_steps = any(layer.chunked for layer in cache.attention_layers)
        self.cache_names = {cache_argument(), "past_key_values"}  # all versions understand the old name
        functools.update_wrapper(self, self.original, updated=())  # generate() reads the signature

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has its own forward again."""
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        model = copy.deepcopy(self.model, memo)
        return MethodType(type(model).forward, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or self.has_masked_steps or not self._can_replay(kwargs):
            return self.original(*args, **kwargs)
        cache, ids, mask = self.cache, kwargs["input_ids"], kwargs.get("attention_mask")
        if self.graph is None or not self.graph.serves(ids):
            if not DecodeGraph.has_room(cache):
                return self.original(*args, **kwargs)
            try:
                self.graph = DecodeGraph(self.model, cache, compile=self.compile, forward=self.original)
            except MaskedStep:
                self.has_masked_steps = True
                return self.original(*args, **kwargs)
        if mask is not None:  # the captured step has none: it is checked and recorded here
            mask = mask.to(ids.device).expand(len(ids), -1)
            columns = cache.get_seq_length()
            for window in {layer.window for layer in cache.attention_layers}:
                cache.shared.padding.mask_for(mask, columns, 1, window, refuse_padding=True)
        self.graph(ids, kwargs["position_ids"])
        return self.graph.output()

    def _can_replay(self, kwargs: dict[str, Any]) -> bool:
        """Whether the captured step computes what this call asks for."""
        shared, model = self.cache.shared, self.model
        ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        given = [kwargs[name] for name in self.cache_names if kwargs.get(name) is not None]
        if len(given) != 1 or given[0] is not self.cache or not shared.own_attention:
            return False
        if not isinstance(ids, Tensor) or tuple(ids.shape) != (shared.active, 1):
            return False
        if kwargs.get("use_cache") is None and getattr(model.config, "use_cache", True) is False:
            return False
        if not isinstance(positions, Tensor) or positions.dim() != 2:  # some models have several for a token
            return False
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return False
        if asks_for_router_logits(model) and kwargs.get("output_router_logits") is not False:
            return False
        known = {"input_ids", "attention_mask", "position_ids", *self.cache_names}
        return all(
            name in known or value is None or self._is_as_captured(name, value) for name, value in kwargs.items()
        )

    @staticmethod
    def _is_as_captured(name: str, value: Any) -> bool:
        if name in ("use_cache", "return_dict"):
            return value is True
        if name == "logits_to_keep":  # of one token's logits
            return isinstance(value, int)
        return value is False and name.startswith("output_")


@contextmanager
def replayed_steps(model: Any, cache: WholeCache, *, compile: bool) -> Iterator[None]:
    """See `Fp16Cache.cuda_graphs`."""
    patched = PatchedForward(model, cache, compile=compile)
    model.forward = patched
    try:
        yield
    finally:
        del model.forward
        if patched.previous is not None:
            model.forward = patched.previous
    if cache.shared.agreement is not None:
        cache.shared.agreement.synchronize()
    cache.shared.raise_deferred_errors(wait=True)
