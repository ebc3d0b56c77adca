"""A decoder's forward passes, watched: whether what it is fed goes on from what the cache holds.

`watch` puts two hooks on a model's decoder, the module that gets token embeddings, masks and `position_ids` whatever
was called: `generate`, the model, a model around it. Before a pass `begin_pass` looks at what comes, after it
`end_pass` at what was fed. Passes with another cache, or with none, are left alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .positions import real_tokens
from .shared import Pass, Shared, check_columns

if TYPE_CHECKING:
    from .cache import Fp16Cache


def begin_pass(cache: Fp16Cache, decoder: nn.Module, tokens: Tensor, options: dict[str, Any]) -> None:
    """Before a pass of the model's decoder over `tokens`, `[B, T]` or `[B, T, ...]`, with these keyword arguments.

    Raises what is wrong with it before anything is stored: ValueError, NotImplementedError, RuntimeError.
    """
    shared = cache._shared
    shared.settle()
    cache.check_whole()
    shared.passing = None
    if len(cache.layers) != shared.layer_count:
        raise NotImplementedError(
            f"Fp16Cache: {type(decoder).__name__} has changed its list of {shared.layer_count} layers to one of "
            f"{len(cache.layers)}, and what it added would be left out when tokens are taken back or forgotten"
        )
    if options.get("encoder_hidden_states") is not None:
        raise NotImplementedError(
            "Fp16Cache: there is no place in it for the keys and values of cross-attention (encoder_hidden_states: "
            "an image's or an encoder's states)"
        )
    batch, rows = tokens.shape[:2]
    columns, mask = cache.get_seq_length(), options.get("attention_mask")
    if rows == 0:
        cache.refuse_no_tokens()
    if columns > 0:
        shared.use_batch(batch, columns)
    for name in ("attention_mask", "position_ids"):
        value = options.get(name)
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] not in (1, batch):
            raise ValueError(f"Fp16Cache: {name} must have {batch} rows, one for each sequence, got {value.shape[0]}")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        check_columns(mask, columns, rows)
    elif columns > 0 and options.get("use_cache") is False and not _takes_positions(decoder):
        raise ValueError(
            f"Fp16Cache: a forward pass with use_cache=False over {rows} tokens, and the cache holds {columns}: "
            "generate() feeds the whole text at each step then; leave use_cache=False out (in the model's config, "
            "too)"
        )
    capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
    if shared.positions is not None and not capturing:
        waits = columns > 0 and rows > 1
        shared.positions.raise_if_fed_twice(wait=waits)
        if (waits or (columns > 0 and not shared.positions.last.is_cuda)) and batch == shared.active:
            real, known = real_tokens(mask, batch, rows)
            if known:
                shared.positions.check(options.get("position_ids"), real, batch, rows)
    if columns > 0 and rows > 1 and not capturing and not _takes_positions(decoder) and _are_ids(tokens):
        shared.texts.check(tokens)
    shared.passing = Pass(columns)


def end_pass(cache: Fp16Cache, decoder: nn.Module, tokens: Tensor, options: dict[str, Any]) -> None:
    """After a pass that went through."""
    shared = cache._shared
    batch, rows = tokens.shape[:2]
    position_ids = options.get("position_ids")
    if is_compiling() and position_ids is None:
        return
    passing, shared.passing = shared.passing, None
    if not is_compiling() and passing is not None and options.get("use_cache") is not False:
        if rows > 0 and cache.get_seq_length() == passing.columns:
            raise NotImplementedError(
                f"Fp16Cache: {type(decoder).__name__} was given this cache and stored nothing in it: it keeps no "
                "keys and values in such a cache"
            )
    if not is_compiling() and not _takes_positions(decoder):
        shared.texts.note(tokens if _are_ids(tokens) else None, cache.get_seq_length())
    real, known = real_tokens(options.get("attention_mask"), batch, rows)
    if shared.positions is None or not known or batch > cache.batch_size:
        return
    mask = options.get("attention_mask")
    if position_ids is not None:
        shared.positions.note(position_ids, real, batch, rows)
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        shared.positions.assume(batch, mask.bool().sum(1))
    elif real is None and not shared.has_padding():
        shared.positions.assume(batch, cache.get_seq_length())


def _are_ids(tokens: Tensor) -> bool:
    return tokens.dim() == 2 and not tokens.is_floating_point()


def break_off(cache: Fp16Cache) -> None:
    """After a pass that ended with an error."""
    shared = cache._shared
    passing, shared.passing, shared.handed_out = shared.passing, None, None
    columns = {layer.columns for layer in cache.layers}
    if passing is not None and columns != {passing.columns}:
        shared.broken_off = True


@functools.cache
def _names_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _takes_positions(decoder: nn.Module) -> bool:
    kind: Any = type(decoder)
    return _names_positions(kind)


def _cache_of(values: Iterable[Any]) -> Any:
    """The `Fp16Cache` among a decoder's arguments. (Its class is not known here, as it knows this file.)"""
    return next((value for value in values if isinstance(getattr(value, "_shared", None), Shared)), None)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def _tokens(options: dict[str, Any]) -> Tensor | None:
    """Token ids `[B, T]` or embeddings `[B, T, ...]`."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(options.get(name), Tensor) and options[name].dim() >= 2:
            found: Tensor = options[name]
            return found
    return None


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if is_compiling():
        return
    cache = _cache_of((*kwargs.values(), *args))
    if cache is None:
        return
    options = _named(module, args, kwargs)
    tokens = _tokens(options)
    if tokens is not None:
        begin_pass(cache, module, tokens, options)


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if is_compiling():
        options = kwargs
        cache = _cache_of((kwargs.get("cache"), kwargs.get("past_key_values")))
    else:
        cache = _cache_of((*kwargs.values(), *args))
        options = kwargs if cache is None else _named(module, args, kwargs)
    if cache is None:
        return
    tokens = _tokens(options)
    if output is None:
        break_off(cache)
    elif tokens is not None:
        end_pass(cache, module, tokens, options)


def watch(model: Any) -> None:
    """Hooks the model's decoder, once."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(decoder, nn.Module):
        decoder = model
    if _before not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True, always_call=True)  # also after an error
