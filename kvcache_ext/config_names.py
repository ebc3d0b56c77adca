"""Reads a model's config.json by the names that model families use, without transformers: for `plan --config`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# transformers' names for the same thing, the usual one first.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
QUERY_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num")
HEAD_DIM = ("head_dim", "d_kv", "kv_channels", "dim_head")
DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")  # of models that have an encoder, too
DECODER_HEADS = ("decoder_attention_heads",)
HIDDEN = ("hidden_size", "n_embd", "d_model")
# Models whose config.json may leave out that every so many layers one has no window.
ALTERNATING = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
# Where models keep which of their layers have attention, apart from layer_types.
HYBRID = (
    *("attn_layer_period", "attn_layer_indices", "attn_layer_idx", "block_types", "layers_block_type"),
    *("hybrid_layer_ids", "hybrid_override_pattern", "full_attn_idxs"),
)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass
class Shape:
    """What a config.json says of a model's cache."""

    layers: int
    heads: int
    head_dim: int
    positions: int | None
    remarks: list[str] = field(default_factory=list)  # what a plan from it leaves out or counts too much


def _number(path: Path, config: dict[str, Any], names: tuple[str, ...], least: int = 1) -> int | None:
    """The first of these entries that is there and not null."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least or value.bit_length() > 63:
            got = "one beyond 64 bits" if isinstance(value, int) and value.bit_length() > 63 else repr(value)
            raise ValueError(f"plan: {name} in {path} must be an int of at least {least}, got {got}")
        return value
    return None


def _needed(path: Path, config: dict[str, Any], names: tuple[str, ...]) -> int:
    value = _number(path, config, names)
    if value is None:
        raise ValueError(f"plan: {path} has no {names[0]}; give the shape as --layers, --heads and --head-dim instead")
    return value


def _remarks(config: dict[str, Any], layers: int) -> list[str]:
    """What the plan does not tell apart: layers that keep less than every position, or nothing, and encoders."""
    found = []
    kinds = config.get("layer_types")
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    if isinstance(kinds, list):
        local = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
        other = sum("attention" not in str(kind) or kind == "linear_attention" for kind in kinds)
    else:
        used = window is not None and config.get("use_sliding_window", True)
        local, other = (layers if used else 0), 0
        pattern = config.get("sliding_window_pattern") or ALTERNATING.get(str(config.get("model_type")))
        if local and isinstance(pattern, int) and pattern > 0:  # every so many layers one without a window
            local = layers - layers // pattern
    if local:
        of = f" of {window:,} positions" if isinstance(window, int) else ""
        found.append(
            f"{local} of {layers} layers have a sliding window{of}: Fp16Cache gives those no more slots than their "
            "window and 128 positions, so this plan is an upper bound"
        )
    if other:
        found.append(f"{other} of {layers} layers keep no keys and values, so this plan is an upper bound")
    elif any(config.get(name) is not None for name in HYBRID):
        found.append(
            "only some of the layers have attention, and it is not known which, so this plan is an upper bound"
        )
    if config.get("is_encoder_decoder") is True:
        found.append("this is the decoder's own attention; what it keeps of the encoder's answers comes on top")
    shared = config.get("num_kv_shared_layers")
    if isinstance(shared, int) and shared > 0:
        found.append(f"{shared} of {layers} layers use the keys and values of others, so this plan is an upper bound")
    return found


def read_config(folder: Path) -> Shape:
    """The shape in a transformers config.json; `folder` may be the file itself.

    Raises:
        ValueError: there is none, it cannot be read, or it lacks what a cache's shape needs.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"plan: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"plan: {path} is not JSON: {error}") from error
    nested = config.get("text_config") if isinstance(config, dict) else config
    config = nested if isinstance(nested, dict) else config  # models of text and images
    if not isinstance(config, dict):
        raise ValueError(f"plan: {path} must hold a JSON object, got a {type(config).__name__}")
    if config.get("kv_lora_rank") is not None:
        raise ValueError(
            f"plan: {path} describes latent attention (kv_lora_rank), whose keys and values differ in size; "
            "StreamingKVCacheFp16 holds keys and values of one head_dim"
        )
    inner = config.get("attn_config")
    if isinstance(inner, dict):  # MPT and DBRX
        config = {**inner, **config, "multi_query": inner.get("attn_type") == "multiquery_attention"}
    if config.get("multi_query_attention") is False:  # ChatGLM, whose number of groups then means nothing
        config = {name: value for name, value in config.items() if name != "multi_query_group_num"}
    of_decoder = config.get("is_encoder_decoder") is True
    query_heads = (*DECODER_HEADS, *QUERY_HEADS) if of_decoder else QUERY_HEADS
    layers = _needed(path, config, (*DECODER_LAYERS, *LAYERS) if of_decoder else LAYERS)
    head_dim = _number(path, config, HEAD_DIM)
    if _number(path, config, ("state_size", "ssm_state_size")) and not any(name in config for name in QUERY_HEADS[:2]):
        raise ValueError(f"plan: {path} describes a model without attention (state_size), which has no keys and values")
    heads = _number(path, config, KV_HEADS)
    if config.get("new_decoder_architecture") is True:
        heads = _needed(path, config, query_heads)  # Falcon repeats its keys to all heads before it caches them
    elif config.get("multi_query") is True:
        heads = 1  # Falcon's config has num_kv_heads all the same
    elif heads is None:
        heads = _needed(path, config, query_heads)
    if head_dim is None:
        hidden, queries = _needed(path, config, HIDDEN), _needed(path, config, query_heads)
        if hidden % queries:
            raise ValueError(
                f"plan: {path} has no head_dim, and {HIDDEN[0]}, {hidden}, is not a multiple of {QUERY_HEADS[0]}, "
                f"{queries}"
            )
        head_dim = hidden // queries
    return Shape(layers, heads, head_dim, _number(path, config, POSITIONS), _remarks(config, layers))
