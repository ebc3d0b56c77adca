"""Fp16Cache: models that transformers shards among several processes, token for token with one process.

All that needs several processes runs once, in one pair of them (`ranks.py`): with gloo on a CPU, and with NCCL where
there are two GPUs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from llms import check_beams, check_tokens, expected, logits_of
from processes import BACKENDS, TWO_GPUS, Outcomes, device_of, same_on_all
from ranks import BEAMS, FAMILIES, LAYERS, OTHERS, RANKS, TOKENS

from kvcache_ext.integrations.transformers import Fp16Cache
from kvcache_ext.integrations.transformers.tensor_parallel import TensorParallel

pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE = ("gpt_oss", "olmo2", "phi3")  # the families whose layers see all heads on every rank

_models: dict[tuple[str, str], Any] = {}


def model_of(family: str, backend: str) -> Any:
    """In this process, whole."""
    if (family, backend) not in _models:
        _models[family, backend] = ranks.make_model(family).to(device_of(backend))
    return _models[family, backend]


def save_models(backend: str, folder: Path) -> None:
    for family in (*FAMILIES, *OTHERS):
        if not (folder / family).exists():
            ranks.make_model(family).save_pretrained(folder / family)
    model = model_of("llama", backend)
    cache = Fp16Cache.for_model(model, 64, 3)
    logits_of(model, cache, **ranks.inputs_of(device_of(backend)))
    cache.save(folder / "cache")


@pytest.fixture(scope="module", params=BACKENDS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    pytest.importorskip("accelerate")  # transformers loads no sharded model without it
    prepare = functools.partial(save_models, request.param)
    return Outcomes(ranks.run, prepare, request.param, tmp_path_factory)


def check(backend: str, family: str, got: list[dict[str, Any]], counted: dict[str, int], what: str = "tokens") -> None:
    """Greedy tokens of the ranks against those of one process with transformers' own cache."""
    model, inputs = model_of(family, backend), ranks.inputs_of(device_of(backend))
    tokens = same_on_all(got, what, device_of(backend))
    check_tokens(model, inputs, tokens, expected(model, inputs, max_new_tokens=TOKENS), counted)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(outcomes: Outcomes, family: str, counted: dict[str, int]) -> None:
    got = outcomes(family)
    model, device = model_of(family, outcomes.backend), device_of(outcomes.backend)
    cache = Fp16Cache.for_model(model, 64, 3 * BEAMS)
    for rank, of_rank in enumerate(got):
        whole = family in WHOLE
        assert of_rank["shards"] == [(0, 1) if whole else (rank, RANKS)] * LAYERS
        assert of_rank["bytes"] == cache.memory_bytes() // (1 if whole else RANKS)
    check(outcomes.backend, family, got, counted)
    check(outcomes.backend, family, got, counted, "attention=None")
    inputs = ranks.inputs_of(device)
    want = expected(model, inputs, max_new_tokens=TOKENS, num_beams=BEAMS)
    check_beams(model, inputs, same_on_all(got, "beams", device), want, counted, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not TWO_GPUS, reason=f"needs {RANKS} GPUs")
@pytest.mark.parametrize("outcomes", ["nccl"], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(outcomes: Outcomes, family: str, counted: dict[str, int]) -> None:
    check(outcomes.backend, family, outcomes(family, graphs=True), counted)


@pytest.mark.parametrize("job", ["loaded_by_tp_plan", "the_decoder_alone", "within_cuda_graphs"])
def test_other_ways_to_the_same(outcomes: Outcomes, job: str, counted: dict[str, int]) -> None:
    got = outcomes(job)
    check(outcomes.backend, "llama", got, counted)
    for rank, of_rank in enumerate(got):
        assert of_rank.get("shards", [(rank, RANKS)] * LAYERS) == [(rank, RANKS)] * LAYERS


def test_sampling_with_one_seed(outcomes: Outcomes) -> None:
    tokens = same_on_all(outcomes("sampled"), "tokens", torch.device("cpu"))
    assert len(tokens.unique()) > 6


@pytest.mark.parametrize(("family", "heads"), [("one head", 1), ("three heads", 3)])
def test_heads_that_the_ranks_do_not_divide(outcomes: Outcomes, family: str, heads: int) -> None:
    """With any cache: transformers' own fails within the model."""
    for of_rank in outcomes(family):
        assert of_rank["transformers"].startswith("RuntimeError: shape")
        assert of_rank["ours"].startswith(
            f"ValueError: Fp16Cache: {heads} key/value heads, as layer 0 of LlamaForCausalLM has, cannot be divided "
            "among 2 ranks: transformers gives each rank an equal share"
        )


def test_queries_that_are_sharded_and_keys_that_are_not(outcomes: Outcomes, counted: dict[str, int]) -> None:
    """One head of keys serves all queries. Of several, a rank's queries would take the wrong one."""
    got = outcomes("keys_whole")
    for of_rank in got:
        words = "does not shard queries, keys and values alike (q_proj is sharded, k_proj is whole"
        assert words in of_rank["two heads"]
    check(outcomes.backend, "one head", got, counted)


def test_files(outcomes: Outcomes) -> None:
    for rank, of_rank in enumerate(outcomes("files")):
        assert of_rank["goes on"]
        own = f"the heads of rank {rank} of {RANKS} in this one"
        assert (
            f"layer 0 has the heads of rank {1 - rank} of {RANKS} in the file and {own}"
            in (of_rank["the other rank's"])
        )
        assert f"layer 0 has all heads in the file and {own}" in of_rank["one process's"]


class Mesh:
    """A device mesh of these axes, on whose every axis this process has the last rank."""

    def __init__(self, **axes: int) -> None:
        self.sizes = list(axes.values())
        self.mesh_dim_names = tuple(axes) if "unnamed" not in axes else None

    def size(self, axis: int) -> int:
        return self.sizes[axis]

    def get_local_rank(self, axis: int) -> int:
        return self.sizes[axis] - 1


def model_with(mesh: Mesh, plan: dict[str, str], **projections: torch.nn.Module) -> tuple[Any, torch.nn.Module]:
    """A model, and the attention within it."""
    model, attention = torch.nn.Module(), torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Identity(), attention])
    for name, projection in projections.items():
        attention.add_module(name, projection)
    model._device_mesh, model.tp_plan = mesh, {f"layers.*.{name}": style for name, style in plan.items()}
    return model, attention


@pytest.mark.parametrize(
    ("axes", "want"),
    [
        ({"unnamed": 4}, (3, 4)),
        ({"tp": 4}, (3, 4)),
        ({"pp": 1, "fsdp": 3, "tp": 2}, (1, 2)),
        ({"pp": 1, "fsdp": 3, "tp": 1}, (0, 1)),
        ({"fsdp": 2}, (0, 1)),
    ],
)
def test_the_axis_of_tensor_parallelism(axes: dict[str, int], want: tuple[int, int]) -> None:
    model, attention = model_with(Mesh(**axes), {"query_key_value": "colwise"}, query_key_value=torch.nn.Identity())
    assert TensorParallel.of(model).shard("Model", 1, attention, 12) == want


def test_keys_that_are_not_known() -> None:
    model, attention = model_with(Mesh(tp=2), {"q_proj": "colwise"}, q_proj=torch.nn.Identity())
    with pytest.raises(NotImplementedError, match=r"alike \(q_proj is sharded\)"):
        TensorParallel.of(model).shard("Model", 1, attention, 2)
    attention.expand_kv = None  # latents, which are whole on every rank
    assert TensorParallel.of(model).shard("Model", 1, attention, 1) == (0, 1)


def test_a_model_that_is_not_sharded() -> None:
    found = TensorParallel.of(model_of("llama", "gloo"))
    assert (found.rank, found.ranks) == (0, 1)
