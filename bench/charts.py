"""Charts of a results file. matplotlib is optional: without it nothing is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import ROOT, natural_order

IMAGES = ROOT / "docs" / "images"
OURS, ALSO_OURS, TORCH, ALSO_TORCH, LIMIT = "#1f6fb4", "#7db8e8", "#c8601b", "#eda877", "#555555"


def load(results: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The device's name, and the measurements by name."""
    data = json.loads(results.read_text())
    return data["device"], {entry["name"]: entry for entry in data["measurements"]}


def _figure(width: float, height: float, columns: int = 1) -> Any | None:
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.figure import Figure

    # The same file for the same results: no dates, no random names within it.
    matplotlib.rcParams.update({"svg.hashsalt": "kvcache_ext", "font.size": 9, "axes.titlesize": 10})
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    for axes in figure.subplots(1, columns, squeeze=False).flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def _by_size(entries: dict[str, dict[str, Any]], prefix: str) -> dict[int, dict[str, Any]]:
    """The measurements `<prefix>/<number>`, by their number."""
    names = [name for name in entries if name.startswith(f"{prefix}/") and name[len(prefix) + 1 :].isdigit()]
    return {int(name[len(prefix) + 1 :]): entries[name] for name in sorted(names, key=natural_order)}


def _draw_throughput(
    results: Path, folder: Path, name: str, title: str, lines: list[tuple[str, str, str, str | None]]
) -> Path | None:
    """Rate against the number of positions. `lines`: prefix of measurements, label, colour, and the peer or None."""
    device, entries = load(results)
    found = [(_by_size(entries, prefix), label, colour, peer) for prefix, label, colour, peer in lines]
    if not any(by_size for by_size, *_ in found):
        return None
    figure = _figure(6.6, 4.2)
    if figure is None:
        return None
    axes = figure.axes[0]
    most = max(entry["value"] for by_size, *_ in found for entry in by_size.values())
    scale, unit = (1.0, "TB/s") if most >= 0.5 else (1e3, "GB/s")
    for by_size, label, colour, peer in found:
        rates = {
            size: entry["value"] if peer is None else entry["peers"][peer]
            for size, entry in by_size.items()
            if peer is None or peer in entry["peers"]
        }
        style = {"marker": "o", "linewidth": 2.0} if peer is None else {"marker": "s", "linewidth": 1.2}
        if rates:
            axes.plot(list(rates), [scale * rate for rate in rates.values()], color=colour, label=label, ms=4, **style)
    ceilings = {size: entry["ceiling"] for size, entry in found[0][0].items() if entry["ceiling"]}
    if ceilings:
        limits = [scale * rate for rate in ceilings.values()]
        axes.plot(list(ceilings), limits, color=LIMIT, linestyle="--", linewidth=1.2, label="ceiling of this run")
    axes.set_xscale("log", base=2)
    ticks = sorted({size for by_size, *_ in found for size in by_size})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("positions a call")
    axes.set_ylabel(f"{unit}, read + written")
    axes.set_title(f"{title}\n{device}", loc="left")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return _save(figure, folder / f"{name}-{results.stem}.svg")


def draw_append(results: Path, folder: Path = IMAGES) -> Path | None:
    return _draw_throughput(
        results,
        folder,
        "append",
        "append: FP32 keys and values of one layer into the FP16 cache",
        [
            ("append/prefill/contiguous", "append, contiguous source", OURS, None),
            ("append/prefill/htd", "append, [H, T, D] source", ALSO_OURS, None),
            ("append/prefill/contiguous", "torch copy_, contiguous", TORCH, "slice copy_"),
            ("append/prefill/htd", "torch copy_, [H, T, D]", ALSO_TORCH, "slice copy_"),
        ],
    )


def draw_gather(results: Path, folder: Path = IMAGES) -> Path | None:
    return _draw_throughput(
        results,
        folder,
        "gather",
        "gather: FP16 keys and values of one layer out to FP32",
        [
            ("gather/contiguous", "get_range_f32, a range", OURS, None),
            ("gather/indices", "gather, random positions", ALSO_OURS, None),
            ("gather/contiguous", "torch copy_, a range", TORCH, "copy_"),
            ("gather/indices", "torch index_select + float", ALSO_TORCH, "index_select, float"),
        ],
    )


GENERATE = {"fp16": "FP16 weights", "fp32": "FP32 model", "w4": "4-bit weights", "w8": "8-bit weights"}
OTHERS = {
    "StaticCache, compiled": TORCH,
    "StaticCache, eager": ALSO_TORCH,
    "DynamicCache, eager": "#a0a0a0",
}


def draw_generate(results: Path, folder: Path = IMAGES) -> Path | None:
    """Tokens a second of the 7B model against the positions held, a panel for each kind of weights."""
    device, entries = load(results)
    found = {kind: _by_size(entries, f"generate/7b/{kind}") for kind in GENERATE}
    found = {kind: by_size for kind, by_size in found.items() if by_size}
    if not found:
        return None
    figure = _figure(max(6.6, 3.6 * len(found)), 4.0, columns=len(found))
    if figure is None:
        return None
    handles: dict[str, Any] = {}
    for axes, (kind, by_size) in zip(figure.axes, found.items(), strict=True):
        ours = [entry["value"] for entry in by_size.values()]
        lines = [("Fp16Cache, CUDA graph", list(by_size), ours, {"color": OURS, "marker": "o", "linewidth": 2.0})]
        for name, colour in OTHERS.items():
            speeds = {size: entry["peers"][name] for size, entry in by_size.items() if name in entry["peers"]}
            style = {"color": colour, "marker": "s", "linewidth": 1.2}
            lines.append((name, list(speeds), list(speeds.values()), style))
        limits = {size: entry["ceiling"] for size, entry in by_size.items() if entry["ceiling"]}
        style = {"color": LIMIT, "linestyle": "--", "linewidth": 1.2}
        lines.append(("reading weights and FP16 cache once", list(limits), list(limits.values()), style))
        for label, sizes, values, style in lines:
            if sizes:
                handles[label] = axes.plot(sizes, values, ms=4, **style)[0]
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(by_size), [f"{size // 1024}k" if size >= 1024 else str(size) for size in by_size])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("positions held")
        axes.set_title(GENERATE[kind], loc="left")
    figure.axes[0].set_ylabel("tokens a second, one sequence")
    figure.suptitle(f"a 7B model decoding, {device}", x=0.01, ha="left", fontsize=10)
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return _save(figure, folder / f"generate-{results.stem}.svg")


SHAPES = {
    "32 heads": "mha32",
    "32 on 8": "gqa32x8",
    "64 on 8": "gqa64x8",
    "28 on 4": "gqa28x4",
    "64 on 4": "gqa64x4",
}
Panels = dict[str, dict[str, dict[str, str]]]  # title, group of bars, what stands below a bar: a measurement's name


def _attention_groups(middle: str, sizes: tuple[int, ...]) -> dict[str, dict[str, str]]:
    return {
        shape: {_short(positions): f"attention/{name}/{middle}{positions}" for positions in sizes}
        for shape, name in SHAPES.items()
    }


def _short(positions: int) -> str:
    return f"{positions // 1024}k" if positions >= 1024 else str(positions)


def _generate_groups(**sizes: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """By model and weights, such as `_7b_fp16`."""
    found = {}
    for name, its_sizes in sizes.items():
        model, weights = name.strip("_").split("_")
        found[f"{model.upper()} {weights.upper()}"] = {
            _short(positions): f"generate/{model}/{weights}/{positions}" for positions in its_sizes
        }
    return found


RATIOS: Panels = {
    "attention of one token": _attention_groups("", (1_024, 4_096, 16_384, 65_536)),
    "attention of a prompt": {
        words: {_short(tokens): f"prompt/mha32/{tokens}x{tokens}/{kind}" for tokens in (2_048, 4_096, 16_384)}
        for words, kind in (("FP32", "fp32"), ("BF16", "bf16"))
    },
    "a whole model decoding": _generate_groups(
        _7b_fp16=(1_024, 16_384, 65_536),
        _7b_fp32=(4_096, 65_536),
        _8b_fp16=(8_192, 32_768, 131_072),
        _8b_bf16=(8_192, 32_768, 131_072),
    ),
}
ATTENTION_RATIOS: Panels = {
    "1 sequence": _attention_groups("", (256, 1_024, 4_096, 16_384, 65_536, 262_144)),
    "8 sequences": _attention_groups("b8/", (256, 1_024, 4_096, 16_384, 65_536, 262_144)),
    "64 sequences": _attention_groups("b64/", (256, 1_024, 4_096, 16_384, 65_536, 262_144)),
}


LESS_IS_BETTER = ("us", "ms", "s", "GB", "relative")


def best_peer(entry: dict[str, Any]) -> str:
    """The name of the best of the others."""
    peers: dict[str, float] = entry["peers"]
    return (min if entry["unit"] in LESS_IS_BETTER else max)(peers, key=lambda peer: peers[peer])


def times_better(entry: dict[str, Any]) -> float | None:
    """How many times better than the best of the others; 1 is level. The median over rounds, where that was kept."""
    peers: dict[str, float] = entry["peers"]
    if not peers:
        return None
    less = entry["unit"] in LESS_IS_BETTER
    best = best_peer(entry)
    ratio = peers[best] / entry["value"] if less else entry["value"] / peers[best]
    return float(entry.get("speedups", {}).get(best, ratio))


def _draw_ratio_bars(axes: Any, groups: dict[str, dict[str, float]]) -> None:
    at = 0
    ticks: dict[int, str] = {}
    for group, bars in groups.items():
        for i, (label, ratio) in enumerate(bars.items(), start=at):
            axes.bar(i, ratio - 1, bottom=1, color=OURS if ratio >= 1 else TORCH, width=0.8)
            words = f"{ratio:.2f}" if ratio < 2 else f"{ratio:.2g}"
            axes.text(i, max(ratio, 1) * 1.04, words, ha="center", va="bottom", fontsize=6.5)
            ticks[i] = label
        middle = at + (len(bars) - 1) / 2
        axes.text(middle, -0.13, group, ha="center", va="top", fontsize=8, transform=axes.get_xaxis_transform())
        at += len(bars) + 1
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.tick_params(length=0)
    axes.axhline(1, color=LIMIT, linewidth=1)
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.9, at - 1.1)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _found_ratios(entries: dict[str, dict[str, Any]], panels: Panels) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for title, groups in panels.items():
        for group, names in groups.items():
            bars = {label: times_better(entries[name]) for label, name in names.items() if name in entries}
            known = {label: ratio for label, ratio in bars.items() if ratio is not None}
            if known:
                found.setdefault(title, {})[group] = known
    return found


def _draw_ratios(results: Path, folder: Path, name: str, panels: Panels, *, below: bool) -> Path | None:
    """How many times as fast as the best other: a panel for each of `panels`, beside or `below` each other."""
    device, entries = load(results)
    found = _found_ratios(entries, panels)
    if not found:
        return None
    figure = _figure(11.5, 2.3 * len(found) + 0.9 if below else 3.9)
    if figure is None:
        return None
    figure.clear()
    names = [name for groups in panels.values() for bars in groups.values() for name in bars.values()]
    others = {best_peer(entries[name]) for name in names if name in entries and entries[name]["peers"]}
    ratios = [ratio for panel in found.values() for bars in panel.values() for ratio in bars.values()]
    most, least = max(*ratios, 1.1), min(*ratios, 0.95)
    if below:
        all_axes = figure.subplots(len(found), 1, squeeze=False, sharey=True)[:, 0]
    else:
        widths = [sum(len(bars) + 1 for bars in panel.values()) + 0.6 for panel in found.values()]
        all_axes = figure.subplots(1, len(found), squeeze=False, width_ratios=widths, sharey=True)[0]
    for axes, (title, panel) in zip(all_axes, found.items(), strict=True):
        _draw_ratio_bars(axes, panel)
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.85 * least, 1.2 * most if most < 2 else 1.6 * most)
        levels = [level for level in (0.5, 1, 2, 4, 8, 16, 32) if 0.85 * least <= level <= 1.6 * most]
        axes.set_yticks(levels, [f"{level:g}x" for level in levels])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=9)
    title = (
        f"{device}: speed beside the fastest alternative ({'; '.join(sorted(others))}; SDPA is torch's attention).\n"
        "1x: level. Blue: this cache is faster. Orange: it is slower. "
        "Below: positions (1k is 1,024); query heads on KV heads."
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
    return _save(figure, folder / f"{name}-{results.stem}.svg")


def draw_ratios(results: Path, folder: Path = IMAGES) -> Path | None:
    """Attention, prompts and whole models beside the best others: the README's chart."""
    return _draw_ratios(results, folder, "ratios", RATIOS, below=False)


def draw_attention(results: Path, folder: Path = IMAGES) -> Path | None:
    """Attention of one token beside the best others, by shape, positions and sequences."""
    return _draw_ratios(results, folder, "attention", ATTENTION_RATIOS, below=True)


RATES = {
    "gpu015/fill_rate/decode": "fill one by one, append",
    "gpu015/fill_rate/decode_append_all": "fill one by one, append_all",
    "gpu015/fill_rate/decode_graph": "fill one by one, append, graph",
    "gpu015/fill_rate/decode_append_all_graph": "fill one by one, append_all, graph",
    "gpu015/fill_rate/prefill": "fill in chunks",
    "gpu015/retrieve_rate": "read back (layer-positions/s)",
}


def draw_gpu015(results: Path, folder: Path = IMAGES) -> Path | None:
    """Rates of filling and reading back, beside plain torch's and the ceiling."""
    device, entries = load(results)
    rates = [(label, entries[name]) for name, label in RATES.items() if name in entries]
    if not rates:
        return None
    figure = _figure(8.5, 3.8)
    if figure is None:
        return None
    axes = figure.axes[0]
    for y, (_, entry) in enumerate(rates):
        peers = list(entry["peers"].values())
        marks = [(entry["value"], "o", OURS, "this cache")]
        marks += [(max(peers), "D", TORCH, "plain torch, the best of it")] if peers else []
        marks += [(entry["ceiling"], "|", LIMIT, "ceiling of this run")] if entry["ceiling"] else []
        for value, marker, colour, label in marks:
            size = 14 if marker == "|" else 7
            axes.plot(value, y, marker, color=colour, ms=size, mew=1.5, label=label if y == 0 else None)
        axes.annotate(
            f"{entry['value']:,.0f}", (entry["value"], y), (0, 7), textcoords="offset points", ha="center", fontsize=7.5
        )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_ylim(len(rates) - 0.5, -0.8)
    axes.set_yticks(range(len(rates)), [label for label, _ in rates])
    axes.set_xlabel("positions/s through all layers")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3)
    axes.set_title(f"GPU-015: filling the cache of a 7B model and reading it back, {device}", loc="left")
    return _save(figure, folder / f"gpu015-{results.stem}.svg")


FP32_COLOUR = "#c9c9c9"


def _draw_memory_bars(axes: Any, groups: dict[str, dict[str, tuple[float, str]]]) -> None:
    """Groups of bars, each a size and a colour."""
    at = 0.0
    ticks: dict[float, str] = {}
    shown: set[str] = set()
    for group, bars in groups.items():
        for i, (label, (gigabytes, colour)) in enumerate(bars.items()):
            x = at + 0.8 * i
            axes.bar(x, gigabytes, 0.74, color=colour, label=None if label in shown else label)
            axes.text(x, gigabytes, f"{gigabytes:.3g}", ha="center", va="bottom", fontsize=7)
            shown.add(label)
        ticks[at + 0.4 * (len(bars) - 1)] = group
        at += 0.8 * len(bars) + 0.5
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.margins(y=0.2)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.2, 1.0), fontsize=8)


def draw_memory(results: Path, folder: Path = IMAGES) -> Path | None:
    """Keys and values beside FP32, and a whole model's peak beside StaticCache, by the number of positions."""
    device, entries = load(results)
    held = {int(e["config"]["positions"]): e for name, e in entries.items() if name.endswith("/memory_gb")}
    models: dict[str, dict[str, tuple[float, str]]] = {}
    for kind, words in (("fp32", "FP32"), ("fp16", "FP16"), ("w4", "4-bit")):
        for size, entry in _by_size(entries, f"generate/peak_gb/7b/{kind}").items():
            bars = {"this cache": (entry["value"], OURS)}
            if "StaticCache, compiled" in entry["peers"]:
                bars["StaticCache, compiled"] = (entry["peers"]["StaticCache, compiled"], TORCH)
            models[f"{words}\n{_short(size)}"] = bars
    if len(held) < 2:  # nothing to see in a single pair of bars
        return None
    columns = 2 if models else 1
    figure = _figure(11.5 if models else 5.5, 3.8, columns=columns)
    if figure is None:
        return None
    caches = {
        f"{size:,}": {"this cache, FP16": (e["value"], OURS), "FP32": (2 * e["value"], FP32_COLOUR)}
        for size, e in sorted(held.items())
    }
    config = held[min(held)]["config"]
    shape = f"{config['layers']} layers, {config['kv_heads']} heads, head_dim {config['head_dim']}"
    _draw_memory_bars(figure.axes[0], caches)
    figure.axes[0].set_title(f"keys and values ({shape})", loc="left", fontsize=9)
    figure.axes[0].set_ylabel("GB")
    figure.axes[0].set_xlabel("positions")
    if models:
        _draw_memory_bars(figure.axes[1], models)
        figure.axes[1].set_title("a whole 7B model decoding: peak memory, weights included", loc="left", fontsize=9)
        figure.axes[1].set_xlabel("weights, and positions held (1k is 1,024)")
    figure.suptitle(f"Memory, {device}", x=0.01, ha="left", fontsize=10)
    return _save(figure, folder / f"memory-{results.stem}.svg")


ALL = (draw_append, draw_gather, draw_attention, draw_generate, draw_gpu015, draw_memory, draw_ratios)
