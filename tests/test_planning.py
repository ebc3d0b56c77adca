"""`python -m kvcache_ext plan`: options, config.json files of many kinds, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache_ext import memory, planning
from kvcache_ext.__main__ import main

SHAPE = ["--layers", "32", "--heads", "32", "--head-dim", "128", "--positions", "65536"]
LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 4096}
# As transformers writes it: num_kv_heads is there though one KV head is all that multi_query has.
MPT = {
    "n_layers": 32,
    "n_heads": 32,
    "d_model": 4096,
    "max_seq_len": 2048,
    "attn_config": {"attn_type": "multihead_attention"},
}
CHATGLM = {
    **{"num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096, "kv_channels": 128, "seq_length": 8192},
    **{"multi_query_attention": True, "multi_query_group_num": 2},
}
FALCON = {
    **{"num_hidden_layers": 32, "num_attention_heads": 71, "num_kv_heads": 71, "hidden_size": 4544},
    **{"multi_query": True, "new_decoder_architecture": False, "max_position_embeddings": 2048},
}


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """The table by the names of its rows; the headline is under ""."""
    assert main(["plan", *options]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {"": head}
    for line in lines:
        name, _, rest = line.strip().partition("  " if "  " in line.strip() else ": ")
        rows[name] = " ".join(rest.split())
    return rows


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The sentence that it ends with."""
    assert main(["plan", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def config(folder: Path, **entries: Any) -> str:
    (folder / "config.json").write_text(json.dumps(entries))
    return str(folder)


def test_the_budget_of_the_7b_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, *SHAPE, "--weights-gb", "4", "--free-gb", "48")
    assert rows[""] == "32 layers, 65,536 positions, 32 key/value heads of 128"
    assert rows["weights"] == "4.00 GB"
    assert rows["cache, keys and values (FP16)"] == "34.36 GB in FP32: 68.72 GB"
    assert rows["total"] == "38.40 GB with a cache in FP32: 72.76 GB"
    assert rows["free"] == "48.00 GB fits"
    assert rows["most positions that fit"] == "83,850 for a batch of 1"
    assert rows["largest batch that fits"] == "1 of 65,536 positions"
    assert rows["fits on an empty GPU of"] == "16 GB no, 24 GB no, 40 GB yes, 48 GB yes, 80 GB yes, 141 GB yes"


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, *SHAPE, "--weights-gb", "4", "--free-gb", "48", "--batch", "2")
    assert rows[""] == "32 layers, 2 sequences of 65,536 positions, 32 key/value heads of 128"
    assert rows["free"] == "48.00 GB does not fit: 24.76 GB too much"
    assert rows["largest batch that fits"] == "1 of 65,536 positions"


def test_free_memory_is_looked_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or 50 * 10**9)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert printed(capsys, *SHAPE)[f"free on {best}"] == "50.00 GB fits"
    assert printed(capsys, *SHAPE, "--device", "cpu")["free on cpu"] == "50.00 GB fits"
    assert [device.type for device in asked] == [best, "cpu"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert "free on cpu" not in printed(capsys, *SHAPE, "--device", "cpu")


def test_small_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(
        capsys, "--layers", "1", "--heads", "1", "--head-dim", "8", "--positions", "1_000", "--device", "cpu"
    )
    assert rows["cache, keys and values (FP16)"].startswith("0.03 MB")


@pytest.mark.parametrize(
    "entries, shape",
    [
        (LLAMA, (32, 32, 128, 4096)),
        (LLAMA | {"num_key_value_heads": 8}, (32, 8, 128, 4096)),
        (LLAMA | {"num_key_value_heads": 8, "head_dim": 256}, (32, 8, 256, 4096)),
        (LLAMA | {"head_dim": None, "num_key_value_heads": None}, (32, 32, 128, 4096)),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, (12, 12, 64, 1024)),
        (LLAMA | {"multi_query": True}, (32, 1, 128, 4096)),
        ({"text_config": LLAMA, "vision_config": {"num_hidden_layers": 5}}, (32, 32, 128, 4096)),
        ({"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 64}, (2, 4, 64, None)),
        (FALCON, (32, 1, 64, 2048)),
        (MPT, (32, 32, 128, 2048)),
        (MPT | {"attn_config": {"attn_type": "multiquery_attention"}}, (32, 1, 128, 2048)),
        (MPT | {"attn_config": {"kv_n_heads": 8}}, (32, 8, 128, 2048)),  # and DBRX
        (CHATGLM, (28, 2, 128, 8192)),
        (CHATGLM | {"multi_query_attention": False}, (28, 32, 128, 8192)),
        (FALCON | {"new_decoder_architecture": True, "num_kv_heads": 8}, (32, 71, 64, 2048)),  # repeated, then cached
    ],
)
def test_configs(tmp_path: Path, entries: dict[str, Any], shape: tuple[int | None, ...]) -> None:
    folder = Path(config(tmp_path, **entries))
    for path in (folder, folder / "config.json"):
        found = planning.read_config(path)
        assert (found.layers, found.heads, found.head_dim, found.positions) == shape
        assert found.remarks == []


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"sliding_window": 4096}, ["32 of 32 layers have a sliding window of 4,096 positions"]),
        ({"sliding_window": 4096, "model_type": "gemma2"}, ["16 of 32 layers have a sliding window"]),
        ({"sliding_window": 512, "model_type": "gemma3_text"}, ["27 of 32 layers have a sliding window"]),
        ({"sliding_window": None}, []),
        ({"sliding_window": 4096, "use_sliding_window": False}, []),
        ({"sliding_window": 512, "sliding_window_pattern": 6}, ["27 of 32 layers have a sliding window of 512"]),
        (
            {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 16},
            ["16 of 32 layers have a sliding window of 512 positions"],
        ),
        ({"layer_types": ["full_attention"] * 32, "sliding_window": 512}, []),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, ["24 of 32 layers keep no keys"]),
        ({"layer_types": ["mamba"] * 31 + ["attention"]}, ["31 of 32 layers keep no keys and values"]),
        ({"attention_chunk_size": 8192, "layer_types": ["chunked_attention"] * 32}, ["a sliding window of 8,192"]),
        ({"num_kv_shared_layers": 15}, ["15 of 32 layers use the keys and values of others"]),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, ["only some of the layers have attention"]),
        ({"block_types": ["recurrent", "recurrent", "attention"]}, ["only some of the layers have attention"]),
        ({"hybrid_layer_ids": [6, 12]}, ["only some of the layers have attention"]),
    ],
)
def test_configs_of_layers_that_keep_less(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    entries: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setattr(planning, "_read_by_transformers", lambda path: None)  # as without it
    folder = config(tmp_path, **LLAMA | entries)
    found = planning.read_config(Path(folder))
    assert len(found.remarks) == len(words)
    for remark, part in zip(found.remarks, words, strict=True):
        assert part in remark and remark.endswith("so this plan is an upper bound")
        assert printed(capsys, "--config", folder, "--free-gb", "1")["note"] == remark


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("positions", [300, 1])
def test_transformers_reads_a_config_as_for_model_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, positions: int
) -> None:
    llms = pytest.importorskip("llms", reason="transformers is not installed")
    from kvcache_ext.integrations.transformers import Fp16Cache

    model = llms.make_model(family)
    model.config.save_pretrained(tmp_path)
    cache = Fp16Cache.for_model(model, positions, 2, attention=None)
    options = ["--config", str(tmp_path), "--batch", "2", "--positions", str(positions), "--free-gb", "1"]
    rows = printed(capsys, *options)
    assert rows["cache, keys and values (FP16)"].startswith(f"{cache.memory_bytes() / 1e6:,.2f} MB")
    held = [layer for layer in cache.layers if hasattr(layer, "window")]
    assert rows[""].startswith(f"{len(held)} layers, 2 sequences of {positions:,} positions: ")
    assert ("note" in rows and "recurrent or convolutional states" in rows["note"]) == bool(cache.state_layers)
    most = int(rows["most positions that fit"].split()[0].replace(",", ""))
    for room, verdict in ((most, "fits"), (most + 1, "does not fit")):
        options[5] = str(room)
        assert printed(capsys, *options)["free"].startswith(f"1.00 GB {verdict}")


def test_positions_by_another_name_and_models_that_take_no_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llms", reason="transformers is not installed")
    folder = config(tmp_path, model_type="mpt", d_model=64, n_heads=4, n_layers=2, max_seq_len=300)
    rows = printed(capsys, "--config", folder, "--free-gb", "1")
    assert rows[""] == "2 layers, 300 positions: 2 of 4 key/value heads of 16"
    folder = config(tmp_path, model_type="openai-gpt", n_embd=64, n_head=4, n_layer=2, n_positions=50)
    rows = printed(capsys, "--config", folder, "--free-gb", "1")
    assert rows[""] == "2 layers, 50 positions, 4 key/value heads of 16"
    assert "takes no cache of this kind" in rows["note"]


def test_no_code_of_a_model_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = LLAMA | {"model_type": "someones", "auto_map": {"AutoConfig": "configuration_someones.SomeonesConfig"}}
    rows = printed(capsys, "--config", config(tmp_path, **entries), "--free-gb", "100")
    assert rows[""] == "32 layers, 4,096 positions, 32 key/value heads of 128"


def test_transformers_reads_what_an_fp16_cache_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llms = pytest.importorskip("llms", reason="transformers is not installed")
    llms.transformers.T5Config(num_layers=2, num_decoder_layers=3, d_model=64, num_heads=4, d_kv=16).save_pretrained(
        tmp_path
    )
    assert main(["plan", "--config", str(tmp_path), "--positions", "100", "--free-gb", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 layers, 100 positions, 4 key/value heads of 16\n")
    assert "T5Model is an encoder-decoder model; only decoders are supported" in out


def test_configs_of_encoders_and_decoders(tmp_path: Path) -> None:
    t5 = {"num_layers": 24, "num_decoder_layers": 12, "num_heads": 128, "d_model": 1024, "d_kv": 64}
    bart = {
        "encoder_layers": 12,
        "num_hidden_layers": 12,
        "decoder_layers": 6,
        "decoder_attention_heads": 8,
        "d_model": 512,
    }
    for entries, shape in ((t5, (12, 128, 64)), (bart, (6, 8, 64))):
        found = planning.read_config(Path(config(tmp_path, **entries, is_encoder_decoder=True)))
        assert (found.layers, found.heads, found.head_dim) == shape
    found = planning.read_config(Path(config(tmp_path, **LLAMA | {"is_encoder_decoder": True})))
    assert ["comes on top" in remark for remark in found.remarks] == [True]


def test_options_go_before_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config(tmp_path, **LLAMA)
    rows = printed(capsys, "--config", folder, "--free-gb", "48")
    assert rows[""] == "32 layers, 4,096 positions, 32 key/value heads of 128"
    rows = printed(capsys, "--config", folder, "--free-gb", "48", "--positions", "100", "--heads", "4")
    assert rows[""] == "32 layers, 100 positions, 4 key/value heads of 128"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is not JSON"),
        ("[1]", "must hold a JSON object, got a list"),
        ("{}", "has no num_hidden_layers; give the shape as --layers, --heads and --head-dim instead"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers in"),
        ("[" * 200_000, "is not JSON"),
        ('{"num_hidden_layers": 1' + "0" * 400 + "}", "must be an int of at least 1, got one beyond 64 bits"),
        ('{"num_hidden_layers": "12"}', "must be an int of at least 1, got '12'"),
        ('{"num_hidden_layers": 2, "num_kv_heads": [2, 4]}', "must be an int of at least 1, got [2, 4]"),
        ('{"num_hidden_layers": 2, "num_key_value_heads": 2}', "has no hidden_size"),
        ('{"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 64}', "is not a multiple of"),
        ('{"num_hidden_layers": 2, "kv_lora_rank": 512}', "describes latent attention (kv_lora_rank)"),
        ('{"num_hidden_layers": 2, "num_heads": 128, "head_dim": 64, "state_size": 128}', "a model without attention"),
        ('{"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}', "--positions is missing"),
    ],
)
def test_wrong_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert words in refused(capsys, "--config", str(tmp_path), "--free-gb", "48")


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read: No such file" in refused(capsys, "--config", str(tmp_path / "none"))
    assert "cannot be read: No such file" in refused(capsys, "--config", str(tmp_path))
    assert "--heads is missing, or --config" in refused(capsys, "--layers", "2")
    assert "--device nope cannot be used" in refused(capsys, *SHAPE, "--device", "nope")
    assert "--device cuda:99 cannot be used" in refused(capsys, *SHAPE, "--device", "cuda:99")
    assert "must be a CUDA device or cpu, got meta" in refused(capsys, *SHAPE, "--device", "meta")
    for options, words in (
        (["--layers", "0"], "must be at least 1"),
        (["--layers", "x"], "invalid int value: 'x'"),
        (["--weights-gb", "nan"], "that is not negative"),
        (["--free-gb", "-1"], "that is not negative"),
        (["--free-gb", "1", "--device", "cpu"], "not allowed with"),
        (["--nonsense"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["plan", *SHAPE, *options])
        assert raised.value.code == 2 and words in capsys.readouterr().err


def test_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "plan" in shown and "env" in shown
    with pytest.raises(SystemExit):
        main(["env", "--nonsense"])
    with pytest.raises(SystemExit) as raised:
        main(["plan", "--help"])
    assert raised.value.code == 0 and "--weights-gb" in capsys.readouterr().out
