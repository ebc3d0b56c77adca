"""What each process of test_transformers_tensor_parallel.py runs, and the small models that it runs.

The test's own process makes the models and writes them to a folder. `run` loads each on several ranks, generates, and
leaves what it got in the folder: `ranks.RANK.pt`, a dict of jobs. What a job got is a dict, or an error as a string.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from llms import BASE, WINDOW, RoundingCache, generate, logits_of, prompts

RANKS = 2
SECONDS = 60  # for one collective, before the ranks give up
LAYERS = 2
VOCABULARY = 96  # two ranks divide it: up to 5.17 transformers wants that of an output that is collected
SMALL = BASE | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 7, **ALTERNATING}

# transformers' own cache generates with each of these on two ranks, with 5.17.0 and with 5.24.0.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", ALTERNATING),
    "exaone4": ("Exaone4", ALTERNATING),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", GEMMA),
    "glm4": ("Glm4", {"head_dim": 16}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_oss": ("GptOss", {"head_dim": 16, **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("Granite", {}),
    "helium": ("Helium", {"head_dim": 16}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
}
# Models of other numbers of heads than two ranks divide.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "one head": ("Llama", {"num_key_value_heads": 1}),
    "three heads": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}),
}
WITHOUT_KEY_HEADS = ("GPTNeoX",)  # whose configuration does not know the word
# Keys and values are whole on every rank. Queries are not.
KEYS_WHOLE = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise_gather_output",
    "model.layers.*.self_attn.v_proj": "colwise_gather_output",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
TOKENS = 10
BEAMS = 2


def make_model(family: str) -> Any:
    import transformers

    name, options = (FAMILIES | OTHERS)[family]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    small = {k: v for k, v in SMALL.items() if k != "num_key_value_heads" or name not in WITHOUT_KEY_HEADS}
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config_name)(**small | options))
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < SMALL["initializer_range"] / 4:
            torch.nn.init.normal_(parameter, std=SMALL["initializer_range"])
    model.set_attn_implementation("eager")
    return model.eval()


def inputs_of(device: torch.device) -> dict[str, torch.Tensor]:
    return {name: x % VOCABULARY for name, x in prompts(3, 12, device, padded=True).items()}


def refusal(call: Callable[[], Any]) -> str:
    """The error of a call, which must have one."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Process:
    """One of several processes that run the same jobs."""

    def __init__(self, rank: int, backend: str, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        self.inputs = inputs_of(self.device)
        self.got: dict[str, Any] = {}

    def generate(self, model: Any, cache: Any, **options: Any) -> torch.Tensor:
        return generate(model, self.inputs, cache, max_new_tokens=TOKENS, **options).cpu()

    def job(self, name: str, call: Callable[[], Any]) -> None:
        try:
            self.got[name] = call()
        except Exception as error:
            self.got[name] = f"{type(error).__name__}: {error}"
        torch.distributed.barrier()


class Rank(Process):
    """One process of several that share a model."""

    def load(self, family: str, **how: Any) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        if "tp_plan" not in how:
            how = {"distributed_config": DistributedConfig(tp_size=RANKS, tp_plan=how.pop("plan", "auto"))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `tp_plan` among them: a later release wants the config
            path = self.folder / family
            return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **how).eval()

    def family(self, family: str) -> dict[str, Any]:
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load(family)
        cache = Fp16Cache.for_model(model, 64, 3 * BEAMS)
        got = {
            "bytes": cache.memory_bytes(),
            "shards": [layer.shard for layer in cache.attention_layers],
            "tokens": self.generate(model, cache),
        }
        cache.reset()
        got["beams"] = self.generate(model, cache, num_beams=BEAMS)
        model.set_attn_implementation("eager")
        gathered = Fp16Cache.for_model(model, 64, 3, attention=None)
        got["attention=None"] = self.generate(model, gathered)
        return got

    def graphs(self, family: str) -> dict[str, Any]:
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load(family)
        cache = Fp16Cache.for_model(model, 64, 3)
        with cache.cuda_graphs(model):
            return {"tokens": self.generate(model, cache)}

    def loaded_by_tp_plan(self) -> dict[str, Any]:
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load("llama", tp_plan="auto")
        return {"tokens": self.generate(model, Fp16Cache.for_model(model, 64, 3))}

    def the_decoder_alone(self) -> dict[str, Any]:
        """A cache that is made for the decoder within the model that was loaded."""
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load("llama")
        cache = Fp16Cache.for_model(model.model, 64, 3)
        return {"tokens": self.generate(model, cache), "shards": [layer.shard for layer in cache.attention_layers]}

    def sampled(self) -> dict[str, Any]:
        """With the same seed on every rank."""
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load("llama")
        torch.manual_seed(7)
        return {"tokens": self.generate(model, Fp16Cache.for_model(model, 64, 3), do_sample=True)}

    def heads_that_the_ranks_do_not_divide(self, family: str) -> dict[str, str]:
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load(family)
        theirs = refusal(lambda: self.generate(model, RoundingCache(config=model.config)))
        return {"transformers": theirs, "ours": refusal(lambda: Fp16Cache.for_model(model, 64, 3))}

    def keys_whole(self) -> dict[str, Any]:
        """Where each rank has all of the keys, but only some of the queries."""
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load("llama", plan=KEYS_WHOLE)
        got: dict[str, Any] = {"two heads": refusal(lambda: Fp16Cache.for_model(model, 64, 3))}
        model = self.load("one head", plan=KEYS_WHOLE)
        got["tokens"] = self.generate(model, Fp16Cache.for_model(model, 64, 3))
        return got

    def files(self) -> dict[str, Any]:
        """Of each rank its own; of the other rank, and of a model that is not sharded, an error."""
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.load("llama")
        cache = Fp16Cache.for_model(model, 64, 3)
        logits_of(model, cache, **self.inputs)
        cache.save(self.folder / f"cache.{self.rank}")
        torch.distributed.barrier()
        again = Fp16Cache.load(self.folder / f"cache.{self.rank}", model)
        step = {"input_ids": self.inputs["input_ids"][:, -1:]}
        return {
            "the other rank's": refusal(lambda: Fp16Cache.load(self.folder / f"cache.{1 - self.rank}", model)),
            "one process's": refusal(lambda: Fp16Cache.load(self.folder / "cache", model)),
            "goes on": torch.equal(logits_of(model, cache, **step), logits_of(model, again, **step)),
        }


def join(rank: int, backend: str, folder: Path, graphs: bool) -> None:
    """Makes this process a member of the default process group."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        # transformers shards on the kind of device that torch was built for, whether there is one or not.
        torch._C._get_accelerator = lambda check=None: torch.device("cpu")
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{folder / f'store.{graphs}'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=SECONDS),
        device_id=torch.device("cuda", rank) if backend == "nccl" else None,
    )


def leave(folder: Path, graphs: bool, got: dict[str, Any]) -> None:
    """Leaves what this process got in the folder, and the process group."""
    gc.collect()  # captured graphs must go before NCCL's communicators
    rank = torch.distributed.get_rank()
    torch.save(got, folder / f"{'graphs' if graphs else 'ranks'}.{rank}.pt")
    torch.distributed.destroy_process_group()


def run(rank: int, backend: str, folder: Path, graphs: bool) -> None:
    """On one rank: every job, or with `graphs` every family within `cuda_graphs` alone."""
    join(rank, backend, folder, graphs)
    this = Rank(rank, backend, folder)
    if graphs:
        for family in FAMILIES:
            this.job(family, lambda family=family: this.graphs(family))  # type: ignore[misc]
    else:
        for family in FAMILIES:
            this.job(family, lambda family=family: this.family(family))  # type: ignore[misc]
        for name in OTHERS:
            this.job(name, lambda name=name: this.heads_that_the_ranks_do_not_divide(name))  # type: ignore[misc]
        for call in (this.loaded_by_tp_plan, this.the_decoder_alone, this.sampled, this.keys_whole, this.files):
            this.job(call.__name__, call)
        this.job("within_cuda_graphs", lambda: this.graphs("llama"))
    leave(folder, graphs, this.got)
