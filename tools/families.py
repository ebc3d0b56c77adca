"""Which families of transformers work on an `Fp16Cache`: a tiny random model of each, and the tokens that it generates.

Every family that transformers' mappings name for text, and for images and text (which get no image), is built with
small numbers, as far as they can be guessed from the names of its configuration's fields. Then it generates greedily on
a cache of transformers' own that rounds keys and values to FP16, and on an `Fp16Cache`, with this package's attention
and with the model's own (`attention=None`): one prompt; a padded batch; beams; a second turn; and again after
`reset()`. The logits must be close, and the tokens the same, but where two are nearly equally likely.

    make coverage                               every family, and the table in docs/transformers.md
    python tools/families.py llama qwen3_next   these

The last lines say how many work. The exit code is 1 if one is wrong in silence, or fails with an error that is no
refusal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 97
LAYERS = 4
SECONDS = 120  # for a family
LOGITS = (
    0.02  # of the spread of logits: how far they may be from the reference's, whose keys round otherwise here and there
)
NEAR_TIE = 1e-3  # of the spread of logits: two tokens that are so nearly as likely may change places
NAME = "kvcache_ext"
WAYS = (NAME, None)
WITH_IMAGES = " (images)"

# Small numbers for fields of configurations, by name. A family takes those that its configuration has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "dim_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("is_decoder",), True),
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "attention_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "attention_chunk_size"), 8),
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    **{"linear_num_heads": 4, "linear_head_dim": 8, "num_expert_group": 1, "unpadded_vocab_size": VOCABULARY},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 256),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 24),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), None),
    **dict.fromkeys(("initializer_range",), 0.2),
    **dict.fromkeys(("tie_word_embeddings",), False),
}
# Where names do not suffice.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **{"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "intermediate_size": 96},
        **{"num_kv_shared_layers": 2, "activation_sparsity_pattern": None, "hidden_size_per_layer_input": 16},
    },
    "gemma4_text": {
        **{"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
        **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 32},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_d_head": 32},
    "hrm_text": {"initializer_range": 0.05},  # 32 passes through layers: with 0.2 rounding errors grow to 2% of logits
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}},
        "layer_types": ["full_attention"] * LAYERS,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 32}},
    "dory": {
        **{"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6},
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "mimo_v2_flash": {"head_dim": 24},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": LAYERS, "expansion_ratio": 2},
    "inkling2_loop_text": {
        **{"n_layers_per_attn_res_block": 1, "loop_num_passes": 2},
        **{"loop_layer_index_start": 1, "loop_layer_index_end": 3},
    },
    "longcat_flash": {"head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 32},
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
        **{"attention_head_dim": 32, "mamba_headdim": 32},
    },
}


@dataclass
class Result:
    family: str
    model: str = ""
    kinds: dict[str, int] = field(default_factory=dict)  # layers, by type
    # By way ("kvcache_ext" or "None"): "works", or what it says.
    ways: dict[str, str] = field(default_factory=dict)


def small_config(kind: Any, family: str, depth: int = 0) -> dict[str, Any]:
    """Arguments for a configuration of this class."""
    known = kind().to_dict()
    options = {name: value for name, value in SMALL.items() if name in known}
    for name, part in known.items():
        if isinstance(part, dict) and "model_type" in part and name in getattr(kind, "sub_configs", {}):
            from transformers import CONFIG_MAPPING

            sub = CONFIG_MAPPING[part["model_type"]] if part["model_type"] in CONFIG_MAPPING else None
            if sub is not None and depth < 2:
                options[name] = small_config(sub, part["model_type"], depth + 1)
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        options |= {name: 4 for name in ("num_key_value_heads",) if name in options}
        options.pop("head_dim", None)
    if isinstance(known.get("layer_types"), list):  # each type once, and again
        types = list(dict.fromkeys(known["layer_types"]))
        options["layer_types"] = (types * LAYERS)[: max(LAYERS, len(types))]
        options |= {
            name: len(options["layer_types"]) for name in options if SMALL.get(name) == LAYERS and "layer" in name
        }
    return options | FAMILIES.get(family, {})


def known_families() -> dict[str, str]:
    """Model classes by family: those for text, and, marked, those for images and text, which get no image here."""
    from transformers.models.auto import modeling_auto

    found = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return found | {f"{family}{WITH_IMAGES}": name for family, name in images.items()}


def build(family: str) -> Any:
    import torch
    import transformers

    kind = transformers.CONFIG_MAPPING[family.removesuffix(WITH_IMAGES)]
    name = known_families()[family]
    config = kind(**small_config(kind, family))
    torch.manual_seed(1)
    try:
        model = getattr(transformers, name)(config)
    except AttributeError:  # of a family with images, whose class for text takes that part
        model = getattr(transformers, name)(config.get_text_config(decoder=True))
    spread = FAMILIES.get(family, {}).get("initializer_range", SMALL["initializer_range"])
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < spread / 4:
            torch.nn.init.normal_(parameter, std=spread)
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    return model.float().eval()


class Parted(Exception):
    """Tokens differ, and not by a near tie."""


def compare(got: Any, want: Any) -> None:
    """`got`, `want`: what two greedy runs returned."""
    prompt = want.sequences.shape[1] - len(want.logits)
    for row in range(len(want.sequences)):
        for step, of_step in enumerate(want.logits):
            a, b = int(got.sequences[row, prompt + step]), int(want.sequences[row, prompt + step])
            scores = of_step[row].double()
            spread = float(scores.std())
            # Of tokens that repeat, too, the logits must be those.
            if float((got.logits[step][row].double() - scores).abs().max()) > LOGITS * spread:
                raise Parted(f"logits {step} of sequence {row}")
            if a == b:
                continue
            if abs(float(scores[a] - scores[b])) > NEAR_TIE * spread:
                raise Parted(f"token {step} of sequence {row}")
            break


def inputs_of(batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    import torch

    torch.manual_seed(100 + seed)
    ids = torch.randint(3, VOCABULARY, (batch, length))
    mask = torch.ones_like(ids)
    for row in range(batch - 1):
        mask[row, : (row + 1) * length // (batch + 1)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def rounding_cache(config: Any) -> Any:
    """The reference: keys and values of any dtype, rounded to FP16 as they come."""
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            rounded = (x.half().to(x.dtype) for x in (key_states, value_states))
            return super().update(*rounded, *args, **kwargs)

    return RoundingCache(config=config)


def steps(model: Any, new_cache: Any, reset: Any) -> list[tuple[str, Any]]:
    """What is generated, by the name of the case."""
    import torch

    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = []
    cache = new_cache(1)
    first = model.generate(**inputs_of(1, 11), past_key_values=cache, **options)
    found.append(("one prompt", first))
    more = torch.cat([first.sequences, inputs_of(1, 5, 1)["input_ids"]], 1)
    second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    found.append(("a second turn", model.generate(**second, past_key_values=cache, **options)))
    cache = reset(cache)
    found.append(("after reset()", model.generate(**inputs_of(1, 9, 2), past_key_values=cache, **options)))
    found.append(("a padded batch", model.generate(**inputs_of(3, 12, 3), past_key_values=new_cache(3), **options)))
    beams = options | {"num_beams": 2, "max_new_tokens": 6}
    found.append(("beams", model.generate(**inputs_of(2, 7, 4), past_key_values=new_cache(4), **beams)))
    return found


def try_way(model: Any, way: str | None, reference: list[tuple[str, Any]]) -> str:
    from kvcache_ext.integrations.transformers import Fp16Cache

    def reset(cache: Any) -> Any:
        cache.reset()
        return cache

    try:
        got = steps(model, lambda batch: Fp16Cache.for_model(model, 128, batch, attention=way), reset)
    except Exception as error:
        refused = "Fp16Cache" in str(error) or "DecodeGraph" in str(error)
        words = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        return f"refused: {words}" if refused else f"CRASH {words}"
    for (name, ours), (_, theirs) in zip(got, reference, strict=True):
        try:
            if name == "beams":
                same = ours.sequences.shape == theirs.sequences.shape and bool(
                    (ours.sequences == theirs.sequences).all()
                )
                close = same or abs(float((ours.sequences_scores - theirs.sequences_scores).abs().max())) < 1e-3
                if not close:
                    raise Parted("beams")
            else:
                compare(ours, theirs)
        except Parted as where:
            return f"WRONG: {name}, {where}"
    return "works"


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def examine(family: str) -> Result:
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = Result(family)
    try:
        with at_most(SECONDS):
            model = build(family)
            result.model = type(model).__name__
            implementation = model.config._attn_implementation
            config = model.config.get_text_config(decoder=True)
            from transformers.cache_utils import get_layer_types_and_kwargs

            result.kinds = dict(Counter(get_layer_types_and_kwargs(config)[0]))
            with torch.no_grad():
                reference = steps(
                    model, lambda batch: rounding_cache(model.config), lambda _: rounding_cache(model.config)
                )
    except Exception as error:
        result.ways["built"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        return result
    for way in WAYS:
        try:
            with at_most(SECONDS), torch.no_grad():
                model.set_attn_implementation(implementation)
                result.ways[str(way)] = try_way(model, way, reference)
        except Exception as error:
            result.ways[str(way)] = f"CRASH {type(error).__name__}: {error}".split("\n")[0][:300]
    return result


# The table in docs/transformers.md.

DOCS = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
REASONS = {  # by a part of the sentence with which something is refused
    "own modules": "it keeps recurrent states on its own modules",
    "registry": "its attention is not taken from transformers' registry",
    "uses keys and values elsewhere": "it uses keys and values elsewhere than in its attention",
    "not causal": "its attention is not causal",
    "a position bias": "its attention has a position bias",
    "by an index": "it chooses keys by an index",
    "one width": "its keys and values differ in width (latent attention)",
    "multiple of 8": "the head_dim of the tiny model",
    "no attention, so": "it has no attention",
    "no num_attention_heads": "it has no attention",
    "cross-attention layers": "it has cross-attention layers",
    "cannot hold": "it has layers of another type: ",
}


def reason_of(words: str) -> str:
    for part, reason in REASONS.items():
        if part in words:
            return reason + (words.split("of type ")[1].split(",")[0] if reason.endswith(": ") else "")
    return words.removeprefix("refused: ")


def table(results: list[Result]) -> str:
    import transformers

    rows: dict[str, list[str]] = {}
    for result in results:
        if "built" in result.ways:
            what = "not tried: no tiny model of it ran on transformers' own cache"
        elif result.ways[NAME] == "works":
            what = "works"
        elif result.ways["None"] == "works":
            what = f"works with `attention=None` alone: {reason_of(result.ways[NAME])}"
        else:
            what = f"refused: {reason_of(result.ways['None'])}"
        rows.setdefault(what, []).append(result.family)
    lines = [
        f"transformers {transformers.__version__}, {len(results)} families for text, or for images and text:",
        "",
        "| | families |",
        "| --- | --- |",
        *(f"| {what} ({len(rows[what])}) | {', '.join(rows[what])} |" for what in sorted(rows, key=_order)),
    ]
    return "\n".join(lines)


def _order(what: str) -> tuple[int, str]:
    beginnings = ("works with", "works", "refused", "not tried")
    return (1, 0, 2, 3)[next(i for i, each in enumerate(beginnings) if what.startswith(each))], what


def write_table(results: list[Result]) -> None:
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    print(f"written: {DOCS.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="of the causal mapping (default: all)")
    args = parser.parse_args()
    families = args.families or sorted(known_families())
    results = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, result in enumerate(pool.map(examine, families)):
            results.append(result)
            print(f"[{number + 1}/{len(families)}] {result.family}: {result.kinds} {result.ways}", flush=True)
    if not args.families:
        write_table(results)
    built = [result for result in results if "built" not in result.ways]
    for way in WAYS:
        counts = Counter(result.ways[str(way)].split(" ")[0].rstrip(":") for result in built)
        print(f"attention={way}: {dict(counts)}, of {len(built)} that can be tried, of {len(results)} in all")
    bad = [result.family for result in built if any(w.startswith(("WRONG", "CRASH")) for w in result.ways.values())]
    print("families: " + (f"FAILED: {', '.join(bad)}" if bad else "none is wrong in silence"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
