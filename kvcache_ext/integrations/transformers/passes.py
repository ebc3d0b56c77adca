"""A decoder's forward passes, watched: does what it is fed go on from what the cache holds?

`watch` puts two hooks on a model's decoder. That module gets token embeddings, masks and `position_ids` whatever was
called: `generate`, the model, or a model around it. `begin_pass` looks at the arguments before anything is stored.
`end_pass` records what was fed. Passes with another cache, or with none, are left alone.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .agreement import UNCOMPILED
from .masks import real_tokens
from .padding import check_columns
from .shared import ForwardPass, SharedState, WholeCache, find_cache, refuse_padding_of_states


def begin_pass(cache: WholeCache, decoder: nn.Module, tokens: Tensor, options: dict[str, Any]) -> None:
    """Before a pass of the model's decoder over `tokens`, `[B, T]` or `[B, T, ...]`, with these keyword arguments.

    Raises ValueError, NotImplementedError or RuntimeError if the pass cannot be served. Nothing is stored then.
    """
    shared = cache.shared
    shared.check_ranks()
    shared.append_pending()
    cache.check_whole()
    shared.current_pass = None
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
    batch, new_tokens = tokens.shape[:2]
    columns, mask = cache.get_seq_length(), options.get("attention_mask")
    if new_tokens == 0:
        cache.refuse_no_tokens()
    if columns > 0:
        shared.use_sequences(batch, columns)
    for name in ("attention_mask", "position_ids"):
        value = options.get(name)
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] not in (1, batch):
            raise ValueError(f"Fp16Cache: {name} must have {batch} rows, one for each sequence, got {value.shape[0]}")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        check_columns(mask, columns, new_tokens)
    elif columns > 0 and options.get("use_cache") is False and not takes_positions(decoder):
        raise ValueError(
            f"Fp16Cache: a forward pass with use_cache=False over {new_tokens} tokens, and the cache holds {columns}: "
            "generate() feeds the whole text at each step then; leave use_cache=False out (in the model's config, "
            "too)"
        )
    if cache.state_layers:
        _check_padding_of_states(shared, mask, columns, new_tokens)
        if columns == 0:
            cache.model_dtype = getattr(decoder, "dtype", cache.model_dtype)
    capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing:
        waits = columns > 0 and new_tokens > 1
        shared.positions.raise_if_fed_twice(wait=waits)
        if (waits or (columns > 0 and not shared.positions.last.is_cuda)) and batch == shared.active:
            real, known = real_tokens(mask, batch, new_tokens)
            if known:
                shared.positions.check(options.get("position_ids"), real, batch, new_tokens)
    if columns > 0 and new_tokens > 1 and not capturing and not takes_positions(decoder) and _are_ids(tokens):
        shared.fed_tokens.check(tokens)
    if shared.agreement is not None:
        shared.agreement.begin_pass(tokens)
    shared.current_pass = ForwardPass.begin(cache)


def _check_padding_of_states(shared: SharedState, mask: Any, columns: int, new_tokens: int) -> None:
    """Raises where padding would go into recurrent states, as they are: anywhere but on the left of a text. What one
    token's mask on a GPU says is noticed at the next pass."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if shared.state_padding.has_failed():
        refuse_padding_of_states()
    new = mask[:, -new_tokens:].bool()
    right = new.all() if columns or new_tokens == 1 else (new[:, 1:] >= new[:, :-1]).all()
    if new_tokens == 1 and shared.padding.defers_checks(mask):
        shared.state_padding.start(~right)
    elif not bool(right):
        refuse_padding_of_states()


def end_pass(cache: WholeCache, decoder: nn.Module, tokens: Tensor, options: dict[str, Any]) -> None:
    """After a pass that went through: notes the positions or tokens that were fed."""
    shared = cache.shared
    batch, new_tokens = tokens.shape[:2]
    position_ids = options.get("position_ids")
    if is_compiling() and position_ids is None:
        return
    forward_pass, shared.current_pass = shared.current_pass, None
    if not is_compiling() and forward_pass is not None and options.get("use_cache") is not False:
        if new_tokens > 0 and cache.get_seq_length() == forward_pass.columns:
            raise NotImplementedError(
                f"Fp16Cache: {type(decoder).__name__} was given this cache and stored nothing in it: it keeps no "
                "keys and values in such a cache"
            )
        if forward_pass.columns == 0 and forward_pass.missed_states(cache):
            shared.broken_off = True
            raise NotImplementedError(
                f"Fp16Cache: {type(decoder).__name__} stored no state in a layer that should have one: it keeps its "
                "states elsewhere, where no cache can take them along"
            )
    if not is_compiling() and not takes_positions(decoder):
        shared.fed_tokens.note(tokens if _are_ids(tokens) else None, cache.get_seq_length())
    real, known = real_tokens(options.get("attention_mask"), batch, new_tokens)
    if not known or batch > cache.batch_size:
        return
    mask = options.get("attention_mask")
    if position_ids is not None:
        shared.positions.note(position_ids, real, batch, new_tokens)
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        shared.positions.assume(batch, mask.bool().sum(1))
    elif real is None and not shared.padding.is_known():
        shared.positions.assume(batch, cache.get_seq_length())


def _are_ids(tokens: Tensor) -> bool:
    return tokens.dim() == 2 and not tokens.is_floating_point()


def break_off(cache: WholeCache) -> None:
    """After a pass that ended with an error: notes whether it had stored anything."""
    shared = cache.shared
    forward_pass, shared.current_pass, shared.pending = shared.current_pass, None, None
    if forward_pass is not None and forward_pass.has_stored(cache):
        shared.broken_off = True


@functools.cache
def _names_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def takes_positions(decoder: nn.Module) -> bool:
    """Whether the decoder's forward has `position_ids`."""
    kind: Any = type(decoder)
    return _names_positions(kind)


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call, by their names."""
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
        cache = find_cache((kwargs.get("cache"), kwargs.get("past_key_values")))
        if cache is not None and cache.shared.agreement is not None:
            raise RuntimeError(f"Fp16Cache: {UNCOMPILED}")  # unless `fullgraph` is set the pass then runs uncompiled
        return
    cache = find_cache((*kwargs.values(), *args))
    if cache is None:
        return
    options = _by_name(module, args, kwargs)
    tokens = _tokens(options)
    if tokens is not None:
        begin_pass(cache, module, tokens, options)


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if is_compiling():
        options = kwargs
        cache = find_cache((kwargs.get("cache"), kwargs.get("past_key_values")))
    else:
        cache = find_cache((*kwargs.values(), *args))
        options = kwargs if cache is None else _by_name(module, args, kwargs)
    if cache is None:
        return
    tokens = _tokens(options)
    if output is None:
        break_off(cache)
    elif tokens is not None:
        end_pass(cache, module, tokens, options)


def watch(model: Any) -> None:
    """Puts the two hooks on the model's decoder, if they are not there yet."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(decoder, nn.Module):
        decoder = model
    if _before not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True, always_call=True)  # also after an error
