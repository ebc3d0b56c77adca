"""Fp16Cache over a process group: positions dealt out to its ranks, token for token with one process.

All that needs several processes runs once, in one pair of them (`sharded_ranks.py`): with gloo on a CPU, and with NCCL
where there are two GPUs.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import ranks
import sharded_ranks
import torch
from llms import check_beams, check_tokens, expected, generate, logits_of, ones_after
from processes import BACKENDS, TWO_GPUS, Outcomes, device_of, same_on_all
from ranks import BEAMS, RANKS, TOKENS
from sharded_ranks import FAMILIES, POSITIONS, WITHOUT_OURS

from kvcache_ext.integrations.transformers import Fp16Cache
from kvcache_ext.integrations.transformers.agreement import number_of, weights_of
from kvcache_ext.integrations.transformers.layer_plan import plan_layers
from kvcache_ext.memory import LayerShape
from kvcache_ext.multi_gpu import plan_model_on_gpus

pytestmark = pytest.mark.usefixtures("one_thread")

_models: dict[tuple[str, str], Any] = {}


def model_of(family: str, backend: str) -> Any:
    """In this process, with eager attention."""
    if (family, backend) not in _models:
        try:
            _models[family, backend] = sharded_ranks.make_model(family).to(device_of(backend))
        except (KeyError, ValueError) as error:
            pytest.skip(f"no such tiny model with this transformers: {error}")
    _models[family, backend].set_attn_implementation("eager")
    return _models[family, backend]


def copies_a_constant() -> bool:
    """Whether Gemma 3n of this transformers copies a constant from the CPU in each step. No graph captures that."""
    from transformers.models.gemma3n import modeling_gemma3n

    return "epsilon_tensor.to(" in inspect.getsource(modeling_gemma3n)


def save_files(backend: str, folder: Path) -> None:
    for family in ("gemma3", "falcon_h1"):
        model = model_of(family, backend)
        cache = Fp16Cache.for_model(model, POSITIONS, 3)
        logits_of(model, cache, **ranks.inputs_of(device_of(backend)))
        cache.save(folder / f"{family}.process")


@pytest.fixture(scope="module", params=BACKENDS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    prepare = functools.partial(save_files, request.param)
    return Outcomes(sharded_ranks.run, prepare, request.param, tmp_path_factory)


def check(backend: str, family: str, got: list[dict[str, Any]], counted: dict[str, int], what: str = "tokens") -> None:
    """Greedy tokens of the ranks against those of one process with transformers' own cache."""
    model, inputs = model_of(family, backend), ranks.inputs_of(device_of(backend))
    tokens = same_on_all(got, what, device_of(backend))
    check_tokens(model, inputs, tokens, expected(model, inputs, max_new_tokens=TOKENS), counted, least=3)


def bytes_planned(model: Any) -> int:
    """What `plan --gpus` says that each GPU takes of keys and values, by positions."""

    def layers(positions: int) -> list[LayerShape | None]:
        return [
            LayerShape(plan.max_positions, plan.heads, plan.head_dim, plan.window) if plan.attends else None
            for plan in plan_layers(model, positions)[0]
        ]

    planned = plan_model_on_gpus(layers, POSITIONS, gpus=RANKS, gpu_bytes=10**9, batch_size=3 * BEAMS)
    assert planned.by_positions.why_not is None
    return planned.by_positions.cache_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_families(outcomes: Outcomes, family: str, counted: dict[str, int]) -> None:
    model, device = model_of(family, outcomes.backend), device_of(outcomes.backend)
    got = outcomes(family)
    check(outcomes.backend, family, got, counted, "attention=None")
    if family in WITHOUT_OURS:
        return
    check(outcomes.backend, family, got, counted)
    inputs = ranks.inputs_of(device)
    want = expected(model, inputs, max_new_tokens=TOKENS, num_beams=BEAMS)
    check_beams(model, inputs, same_on_all(got, "beams", device), want, counted, 1)
    assert {of_rank["bytes"] for of_rank in got} == {bytes_planned(model)}


@pytest.mark.gpu
@pytest.mark.skipif(not TWO_GPUS, reason=f"needs {RANKS} GPUs")
@pytest.mark.parametrize("outcomes", ["nccl"], indirect=True)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_OURS])
def test_cuda_graphs(outcomes: Outcomes, family: str, counted: dict[str, int]) -> None:
    if family == "gemma3n_text" and copies_a_constant():
        pytest.skip("Gemma 3n of this transformers copies a tensor from the CPU in each step (5.17 does, 5.24 not)")
    check(outcomes.backend, family, outcomes(family, graphs=True), counted)


def test_within_cuda_graphs(outcomes: Outcomes, counted: dict[str, int]) -> None:
    """Also where there are none."""
    check(outcomes.backend, "llama", outcomes("within_cuda_graphs"), counted)


def test_turns(outcomes: Outcomes, counted: dict[str, int]) -> None:
    got = outcomes("turns")
    for what in ("first", "again", "afresh"):
        check(outcomes.backend, "gemma3", got, counted, what)
    model, device = model_of("gemma3", outcomes.backend), device_of(outcomes.backend)
    inputs = ranks.inputs_of(device)
    cache = Fp16Cache.for_model(model, POSITIONS, 3)
    tokens = generate(model, inputs, cache, max_new_tokens=TOKENS)
    if not torch.equal(tokens, same_on_all(got, "again", device)):
        return  # `check` has found a near tie
    want = logits_of(model, cache, input_ids=tokens[:, -1:])[:, -1]
    assert torch.allclose(same_on_all(got, "logits", device), want, atol=1e-4 * float(want.std()))


def test_prompt_lookup(outcomes: Outcomes, counted: dict[str, int]) -> None:
    model, device = model_of("llama", outcomes.backend), device_of(outcomes.backend)
    inputs = {name: x[2:] for name, x in ranks.inputs_of(device).items()}
    tokens = same_on_all(outcomes("prompt_lookup"), "tokens", device)
    check_tokens(model, inputs, tokens, expected(model, inputs, max_new_tokens=TOKENS), counted)


def test_a_4d_mask_and_chosen_sequences(outcomes: Outcomes) -> None:
    model, device = model_of("llama", outcomes.backend), device_of(outcomes.backend)
    got = outcomes("masked")
    cache = Fp16Cache.for_model(model, POSITIONS, 3)
    ids = ranks.inputs_of(device)["input_ids"][2:]
    want = {"logits": logits_of(model, cache, input_ids=ids)}
    cache.batch_repeat_interleave(3)
    want["of three"] = logits_of(model, cache, input_ids=torch.tensor([[5], [6], [7]], device=device))[:, -1]
    cache.batch_select_indices(torch.tensor([1]))
    want["of one"] = logits_of(model, cache, input_ids=torch.tensor([[5]], device=device))[:, -1]
    for name, logits in want.items():
        assert torch.allclose(same_on_all(got, name, device), logits, atol=1e-3 * float(logits.std()))


def test_sampling_with_one_seed(outcomes: Outcomes) -> None:
    tokens = same_on_all(outcomes("sampled"), "tokens", torch.device("cpu"))
    assert len(tokens.unique()) > 6


def test_files(outcomes: Outcomes) -> None:
    got, device = outcomes("files"), device_of(outcomes.backend)
    inputs = ranks.inputs_of(device)
    step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": ones_after(inputs, 1)}
    for family in ("gemma3", "falcon_h1"):
        for name in ("group", "process"):
            logits, want = got[0][f"{family}.{name}"]
            assert torch.allclose(logits, want, atol=1e-4 * float(want.std()))
            assert torch.equal(logits, got[1][f"{family}.{name}"][0])
        model = model_of(family, outcomes.backend)
        one = Fp16Cache.load(outcomes.folder / f"{family}.group", model)
        logits = logits_of(model, one, **step).cpu()
        assert torch.allclose(logits, want, atol=1e-4 * float(want.std()))
    assert got[0]["nowhere"].startswith("FileNotFoundError")
    assert got[1]["nowhere"].startswith("RuntimeError: Fp16Cache.save: rank 0 could not write the file: ")
    assert got[0]["one rank"] == "RuntimeError: Fp16Cache.load: another rank could not read the file"
    assert got[1]["one rank"].startswith("FileNotFoundError")


def test_what_is_refused(outcomes: Outcomes) -> None:
    llama = "Fp16Cache: positions cannot be dealt out to a group, as LlamaForCausalLM"
    words = {
        "compileable": "torch.compile cannot trace a cache whose positions are dealt out to a group (compileable=True)",
        "compiled graph": "DecodeGraph: torch.compile cannot trace a cache whose positions are dealt out to a group",
        "compiled": "torch.compile cannot trace",
        "copy": "a cache whose positions are dealt out to a process group cannot be copied or pickled",
        "pickle": "a cache whose positions are dealt out to a process group cannot be copied or pickled",
        "sliding": "as MistralForCausalLM has a sliding window in every layer, and such layers stay whole",
        "tensor parallel": f"{llama} is sharded by tensor parallelism, too",
        "spread": f"{llama} is spread over several devices",
        "stage": f"{llama} is a stage of a pipeline",
        "no group": "ValueError: Fp16Cache: group must be a process group of this process, got 'all'",
        "exchange": "ValueError: Fp16Cache: exchange must be one of auto, symmetric, gather, got 'mail'",
        "timeout alone": "ValueError: Fp16Cache: exchange and timeout are of the ranks of a group: pass group=, too",
        "other arguments": "passed another model or other arguments to for_model than this rank",
        "other precision": "passed another model or other arguments to for_model than this rank",
    }
    for rank, of_rank in enumerate(outcomes("refused")):
        for name, sentence in words.items():
            assert sentence in of_rank[name], name
        own = "MemoryError: there is no room"
        assert of_rank["one rank"] == (
            own if rank == 1 else f"RuntimeError: Fp16Cache: rank 1 could not make its cache: {own.partition(': ')[2]}"
        )


def test_ranks_that_are_fed_something_else(outcomes: Outcomes) -> None:
    got = outcomes("fed_otherwise")
    if not any(got):
        pytest.skip("these GPUs do not reach each other's memory")
    for of_rank in got:
        assert len(of_rank) == 11
        for name, sentence in of_rank.items():
            assert sentence.startswith("RuntimeError: ShardedKVCacheFp16: rank"), (name, sentence)
            assert "fed other tokens" in sentence and "make the caches anew on all ranks" in sentence, name


def test_the_number_that_ranks_compare() -> None:
    """It depends on each value and on its place. Bits of embeddings count, too."""
    weights = weights_of(1000, torch.device("cpu"))
    assert len(weights.unique()) == 1000 and bool((weights & 1).all())
    rows = torch.randint(0, 50, (3000, 4), generator=torch.Generator().manual_seed(1)).unique(dim=0)
    numbers = torch.stack([number_of(row, weights[:4]) for row in rows])
    assert len(numbers.unique()) == len(rows) > 2900
    pairs = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    assert len(torch.stack([number_of(pair, weights[:2]) for pair in pairs]).unique()) == 3600
