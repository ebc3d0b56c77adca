"""What each process of test_transformers_sharded.py runs: each has the whole model, and a share of the positions."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import llms
import ranks
import torch
from conftest import ROOT
from llms import generate, logits_of, ones_after
from ranks import BEAMS, RANKS, TOKENS, Process, refusal

sys.path.insert(0, str(ROOT / "tools"))
import families

POSITIONS = 63  # which two ranks do not divide
# Full attention, grouped heads; one key/value head; sliding layers beside it; sinks; no registry but attention=None.
SMALL = ("llama", "gemma3", "gpt_neox", "gpt_oss", "qwen3")
HYBRIDS = ("qwen3_next", "falcon_h1")
# Layers that share keys and values; chunked attention; keys and values of different widths.
OTHERS = ("gemma3n_text", "llama4_text", "deepseek_v3")
FAMILIES = (*SMALL, *HYBRIDS, *OTHERS)
WITHOUT_OURS = ("deepseek_v3",)  # attention=None alone


def make_model(family: str) -> Any:
    if family in OTHERS:
        model = families.build(family)
        model.set_attn_implementation("eager")
        return model.eval()
    return llms.make_model(family) if family in HYBRIDS else ranks.make_model(family)


class Rank(Process):
    """One process of several that share the positions of a cache."""

    def __init__(self, rank: int, backend: str, folder: Path) -> None:
        super().__init__(rank, backend, folder)
        self.group = torch.distributed.group.WORLD
        self.models: dict[str, Any] = {}

    def model(self, family: str) -> Any:
        """With eager attention."""
        if family not in self.models:
            self.models[family] = make_model(family).to(self.device)
        self.models[family].set_attn_implementation("eager")
        return self.models[family]

    def cache(self, model: Any, positions: int = POSITIONS, batch: int = 3, **options: Any) -> Any:
        from kvcache_ext.integrations.transformers import Fp16Cache

        return Fp16Cache.for_model(model, positions, batch, **{"group": self.group, "timeout": 20.0} | options)

    def family(self, family: str) -> dict[str, Any]:
        got: dict[str, Any] = {}
        model = self.model(family)
        if family not in WITHOUT_OURS:
            cache = self.cache(model, batch=3 * BEAMS)
            got |= {"bytes": cache.memory_bytes(), "tokens": self.generate(model, cache)}
            cache.reset()
            got["beams"] = self.generate(model, cache, num_beams=BEAMS)
            cache.synchronize()
        gathered = self.cache(self.model(family), attention=None)
        got["attention=None"] = self.generate(model, gathered)
        return got

    def graphs(self, family: str) -> dict[str, Any]:
        model = self.model(family)
        cache = self.cache(model)
        with cache.cuda_graphs(model):
            return {"tokens": self.generate(model, cache)}

    def turns(self) -> dict[str, Any]:
        """A text that is cropped to its prompt, generated again, and goes on; then another after `reset`."""
        model = self.model("gemma3")
        cache = self.cache(model)
        first = self.generate(model, cache)
        cache.crop(self.inputs["input_ids"].shape[1] - 1 - cache.get_seq_length())
        again = self.generate(model, cache)
        logits = logits_of(model, cache, input_ids=again[:, -1:].to(self.device))[:, -1].cpu()
        cache.reset()
        return {"first": first, "again": again, "logits": logits, "afresh": self.generate(model, cache)}

    def prompt_lookup(self) -> dict[str, Any]:
        """Assisted decoding: several tokens at a time, of which some are taken back."""
        model = self.model("llama")
        one = {name: x[2:] for name, x in self.inputs.items()}
        options = {"max_new_tokens": TOKENS, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        return {"tokens": generate(model, one, self.cache(model, batch=1), **options).cpu()}

    def masked(self) -> dict[str, Any]:
        """A 4D mask: attention over gathered keys and values. Then sequences that are chosen and repeated."""
        model = self.model("llama")
        cache = self.cache(model)
        ids = self.inputs["input_ids"][2:]
        mask = torch.ones(12, 12, dtype=torch.bool, device=self.device).tril()[None, None]
        got = {"logits": logits_of(model, cache, input_ids=ids, attention_mask=mask).cpu()}
        cache.batch_repeat_interleave(3)
        step = {"input_ids": torch.tensor([[5], [6], [7]], device=self.device)}
        got["of three"] = logits_of(model, cache, **step)[:, -1].cpu()
        cache.batch_select_indices(torch.tensor([1]))
        got["of one"] = logits_of(model, cache, input_ids=step["input_ids"][:1])[:, -1].cpu()
        return got

    def sampled(self) -> dict[str, Any]:
        """With the same seed on every rank."""
        model = self.model("llama")
        torch.manual_seed(7)
        return {"tokens": self.generate(model, self.cache(model), do_sample=True)}

    def files(self) -> dict[str, Any]:
        """What the group writes, and what one process has written, are read by the group."""
        from kvcache_ext.integrations.transformers import Fp16Cache

        got: dict[str, Any] = {}
        for family in ("gemma3", "falcon_h1"):
            model = self.model(family)
            cache = self.cache(model)
            logits_of(model, cache, **self.inputs)
            cache.save(self.folder / f"{family}.group")
            step = {"input_ids": self.inputs["input_ids"][:, -1:], "attention_mask": ones_after(self.inputs, 1)}
            want = logits_of(model, cache, **step).cpu()
            for name in ("group", "process"):
                path = self.folder / f"{family}.{name}"
                loaded = Fp16Cache.load(path, model, group=self.group, max_positions=80, timeout=20.0)
                got[f"{family}.{name}"] = logits_of(model, loaded, **step).cpu(), want
        got["nowhere"] = refusal(lambda: cache.save(self.folder / "none" / "file"))
        path = self.folder / ("gemma3.group" if self.rank == 0 else "none")
        got["one rank"] = refusal(lambda: Fp16Cache.load(path, self.model("gemma3"), group=self.group))
        return got

    def refused(self) -> dict[str, str]:
        from kvcache_ext.integrations.transformers import Fp16Cache

        model = self.model("llama")
        cache = self.cache(model)
        parallel, spread = copy.deepcopy(model), copy.deepcopy(model)
        parallel._device_mesh = ranks_of_tensor_parallelism()
        last = spread.model.layers[-1].self_attn
        last._hf_hook = type("Hook", (), {"execution_device": torch.device("cuda", 7)})
        stage = copy.deepcopy(model)
        del stage.model.layers[0]
        logits_of(model, cache, **self.inputs)
        return {
            "compileable": refusal(lambda: self.cache(model, compileable=True)),
            "compiled graph": refusal(lambda: cache.decode_graph(model, compile=True)),
            "compiled": refusal(lambda: compiled_step(model, cache, self.inputs)),
            "copy": refusal(lambda: copy.deepcopy(cache)),
            "pickle": refusal(lambda: pickle.dumps(cache)),
            "sliding": refusal(lambda: self.cache(self.model("mistral"))),
            "tensor parallel": refusal(lambda: self.cache(parallel)),
            "spread": refusal(lambda: self.cache(spread)),
            "stage": refusal(lambda: self.cache(stage)),
            "no group": refusal(lambda: self.cache(model, group="all")),
            "exchange": refusal(lambda: self.cache(model, exchange="mail")),
            "timeout alone": refusal(lambda: Fp16Cache.for_model(model, 64, timeout=5.0)),
            "other arguments": refusal(lambda: self.cache(model, 64 + 8 * self.rank)),
            "other precision": refusal(lambda: self.cache(model, precision=("fp32", "fp16")[self.rank])),
            "one rank": self.no_memory_on_one_rank(),
        }

    def no_memory_on_one_rank(self) -> str:
        """For the rings of sliding layers."""
        from kvcache_ext.integrations.transformers import build

        class Fails(build.LayerGroup):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                raise MemoryError("there is no room")

        whole = build.LayerGroup
        if self.rank == 1:
            build.LayerGroup = Fails  # type: ignore[misc]
        try:
            return refusal(lambda: self.cache(self.model("gemma3")))
        finally:
            build.LayerGroup = whole  # type: ignore[misc]

    def fed_otherwise(self) -> dict[str, str]:
        """Tokens, embeddings or seeds that differ between ranks. These come last: the ranks stop at different calls."""
        got: dict[str, str] = {}
        model = self.model("llama")
        if self.device.type == "cuda" and self.cache(model).caches[0].exchange == "gather":
            return got  # NCCL would wait for calls that the other rank does not make any more
        other = self.inputs["input_ids"].clone()
        other[1, -1] += self.rank
        with torch.no_grad():
            embedded = model.get_input_embeddings()(other)

        def of(name: str, attention: str | None = llms.NAME, **inputs: Any) -> None:
            cache = self.cache(self.model("llama"), attention=attention)

            def call() -> None:
                logits_of(model, cache, **inputs)
                cache.synchronize()

            got[name] = refusal(call)
            got[f"{name}, again"] = refusal(cache.check)

        mask = torch.ones(12, 12, dtype=torch.bool, device=self.device).tril()[None, None].expand(3, 1, 12, 12)
        of("ids", input_ids=other)
        of("embeddings", inputs_embeds=embedded)
        of("attention=None", None, input_ids=other)
        of("4D mask", input_ids=other, attention_mask=mask)
        for attention in (llms.NAME, None):
            cache = self.cache(self.model("llama"), attention=attention)
            torch.manual_seed(self.rank)

            def call(cache: Any = cache) -> None:
                # (Answers are NaN after an error. torch's sampling on a GPU would end the process for them.)
                self.generate(model, cache, do_sample=True, remove_invalid_values=True)
                cache.synchronize()

            got[f"seeds, {attention}"] = refusal(call)
        cache = self.cache(self.model("llama"))

        def choose() -> None:
            logits_of(model, cache, input_ids=self.inputs["input_ids"])
            cache.reorder_cache(torch.tensor([0, 1, 2 - self.rank]))
            logits_of(model, cache, input_ids=self.inputs["input_ids"][:, :1])
            cache.synchronize()

        got["beams"] = refusal(choose)
        return got


def ranks_of_tensor_parallelism() -> Any:
    """A device mesh whose axis is that of tensor parallelism."""
    methods = {"size": lambda self, axis: RANKS, "get_local_rank": lambda self, axis: 0, "mesh_dim_names": ("tp",)}
    return type("Mesh", (), methods)()


def compiled_step(model: Any, cache: Any, inputs: dict[str, torch.Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def run(rank: int, backend: str, folder: Path, graphs: bool) -> None:
    """On one rank: every job, or with `graphs` every family within `cuda_graphs` alone."""
    ranks.join(rank, backend, folder, graphs)
    this = Rank(rank, backend, folder)
    if graphs:
        for family in FAMILIES:
            if family not in WITHOUT_OURS:
                this.job(family, lambda family=family: this.graphs(family))  # type: ignore[misc]
    else:
        for family in FAMILIES:
            this.job(family, lambda family=family: this.family(family))  # type: ignore[misc]
        for call in (this.turns, this.prompt_lookup, this.masked, this.sampled, this.files, this.refused):
            this.job(call.__name__, call)
        this.job("within_cuda_graphs", lambda: this.graphs("llama"))
        this.job("fed_otherwise", this.fed_otherwise)
    ranks.leave(folder, graphs, this.got)
