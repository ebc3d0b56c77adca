"""The tables of docs/accuracy.md, from the measurements of bench/accuracy.py: a head and rows for each part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import natural_order

Entries = dict[str, dict[str, Any]]  # by name
Table = tuple[list[str], list[list[str]]]

DYNAMIC, ROUNDED = "FP32 DynamicCache", "FP16-rounded DynamicCache"


def error(value: float | None) -> str:
    """Such as "2.9e-07"; nothing where there is no figure."""
    return "" if value is None else f"{value:.1e}"


def cases(entries: Entries, figure: str) -> list[str]:
    """The names, without the figure at their ends, of the measurements that have it."""
    found = (name.removesuffix(f"/{figure}") for name in entries if name.endswith(f"/{figure}"))
    return sorted(found, key=natural_order)


def storage(entries: Entries) -> Table:
    """One row a model, length and cache."""
    head = [
        "model",
        "tokens",
        "cache",
        "logits, relative",
        "largest difference",
        "KL, mean",
        "KL, largest",
        "same token",
    ]
    figures = ("relative", "max", "kl", "kl_max")
    rows = []
    for case in cases(entries, "relative"):
        config = entries[f"{case}/relative"]["config"]
        model = f"{config['layers']} layers" if config["weights"] == "random" else config["weights"]
        model += "" if config["truth"] == "FP64 model" else f" (against the {config['truth']})"
        for cache, label in ((DYNAMIC, "FP32"), (ROUNDED, "rounded to FP16, FP32 attention"), (None, "this one")):
            its = {f: entries[f"{case}/{f}"] for f in (*figures, "same_token")}
            values = {f: e["value"] if cache is None else e["peers"].get(cache) for f, e in its.items()}
            if values["relative"] is not None:
                same = f"{100 * values['same_token']:.0f}%"
                rows.append([model, f"{config['positions']:,}", label, *(error(values[f]) for f in figures), same])
    return head, rows


def trained(entries: Entries) -> Table:
    """One row a text and cache."""
    head = ["text", "tokens", "cache", "perplexity", "KL, mean", "KL, largest", "same token"]
    head += ["largest key", "largest value", "overflows"]
    rows = []
    for case in cases(entries, "perplexity"):
        its = {figure: entries[f"{case}/{figure}"] for figure in ("perplexity", "kl", "kl_max", "same_token")}
        config = its["perplexity"]["config"]
        for cache, label in ((DYNAMIC, "FP32"), (ROUNDED, "rounded to FP16, FP32 attention"), (None, "this one")):
            values = {f: e["value"] if cache is None else e["peers"].get(cache) for f, e in its.items()}
            same = "" if values["same_token"] is None else f"{100 * values['same_token']:.1f}%"
            cells = [case.rsplit("/", 1)[1], f"{config['positions']:,}", label, f"{values['perplexity']:.4f}"]
            cells += [error(values["kl"]), error(values["kl_max"]), same]
            largest = [f"{max(config[name]):.1f}" for name in ("largest_keys", "largest_values")]
            rows.append([*cells, *([*largest, str(config["overflows"])] if cache is None else [""] * 3)])
    return head, rows


def attention(entries: Entries) -> Table:
    peers = list(dict.fromkeys(peer for entry in entries.values() for peer in entry["peers"]))
    rows = []
    for name in sorted(entries, key=natural_order):
        entry, config = entries[name], entries[name]["config"]
        heads = f"{config['query_heads']} on {config['kv_heads']}"
        others = [error(entry["peers"].get(peer)) for peer in peers]
        rows.append([heads, str(config["head_dim"]), f"{config['positions']:,}", error(entry["value"]), *others])
    return ["query heads on KV heads", "head_dim", "positions", "ours", *peers], rows


def prefill(entries: Entries) -> Table:
    ways = {"`fp32`": None, "FP32, gathered": "FP32, gathered", "`fp16`": "fp16"}
    head = ["queries", "positions held", *(f"{way}, {what}" for way in ways for what in ("all", "worst"))]
    head.insert(4, "of the bound")
    rows = []
    for case in cases(entries, "worst"):
        config = entries[f"{case}/worst"]["config"]
        values = []
        for peer in ways.values():
            for entry in (entries[f"{case}/{figure}"] for figure in ("all", "worst")):
                values.append(entry["value"] if peer is None else entry["peers"].get(peer))
        of_bound = f"{100 * entries[f'{case}/of_bound']['value']:.0f}%"
        cells = [f"{config['queries']:,}", f"{config['positions']:,}", *(error(value) for value in values)]
        rows.append([*cells[:4], of_bound, *cells[4:]])
    return head, rows


def overflow(entries: Entries) -> Table:
    head = ["one channel of", "is about", "largest", "overflow=", "counted", "answers that are finite"]
    head += ["their error, median", "worst"]
    rows = []
    for case in cases(entries, "counted"):
        counted = entries[f"{case}/counted"]
        config = counted["config"]
        where = "every key" if config["where"] == "every" else "1 key in 512"
        share = f"{100 * entries[f'{case}/finite']['value']:.0f}%"
        errors = [error(entries.get(f"{case}/{figure}", {}).get("value")) for figure in ("error", "error_worst")]
        of = f"{counted['value']:,.0f} of {config['keys']:,}"
        policy = f'`"{case.rsplit("/", 1)[1]}"`'
        rows.append([where, f"{config['magnitude']:,}", f"{config['largest']:,.0f}", policy, of, share, *errors])
    return head, rows


PARTS: dict[str, Callable[[Entries], Table]] = {
    "storage": storage,
    "trained": trained,
    "attention": attention,
    "prefill": prefill,
    "overflow": overflow,
}
