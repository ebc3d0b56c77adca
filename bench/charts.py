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


def draw_attention(results: Path, folder: Path = IMAGES) -> Path | None:
    """Time of a layer against the positions held, for each of the shapes: ours, the best other, the ceiling."""
    device, entries = load(results)
    shapes = {
        "attention/mha32": ("32 heads", OURS),
        "attention/gqa32x8": ("32 query heads on 8", ALSO_OURS),
    }
    found = {prefix: _by_size(entries, prefix) for prefix in shapes}
    if not any(found.values()):
        return None
    figure = _figure(6.6, 4.2)
    if figure is None:
        return None
    axes = figure.axes[0]
    for prefix, (label, colour) in shapes.items():
        by_size = found[prefix]
        if not by_size:
            continue
        ours = [entry["value"] for entry in by_size.values()]
        axes.plot(list(by_size), ours, color=colour, marker="o", ms=4, linewidth=2.0, label=f"append_attend, {label}")
        others = {size: min(entry["peers"].values()) for size, entry in by_size.items() if entry["peers"]}
        torch_colour = TORCH if colour == OURS else ALSO_TORCH
        axes.plot(
            list(others), list(others.values()), color=torch_colour, marker="s", ms=4, label=f"best other, {label}"
        )
        limits = {size: entry["ceiling"] for size, entry in by_size.items() if entry["ceiling"]}
        axes.plot(list(limits), list(limits.values()), color=LIMIT, linestyle="--", label=f"reading alone, {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({size for by_size in found.values() for size in by_size})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("positions held")
    axes.set_ylabel("microseconds a layer")
    axes.set_title(f"decode attention, FP32 queries on the FP16 cache, head_dim 128\n{device}", loc="left")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return _save(figure, folder / f"attention-{results.stem}.svg")


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


# What is held against the best other in draw_ratios: groups of bars, and the measurements of each by what stands below.
RATIOS = {
    "decode attention, a layer": {
        shape: {
            f"{positions // 1024}k": f"attention/{name}/{positions}" for positions in (1_024, 4_096, 16_384, 65_536)
        }
        for shape, name in (
            ("32 heads", "mha32"),
            ("32 on 8", "gqa32x8"),
            ("64 on 8", "gqa64x8"),
            ("28 on 4", "gqa28x4"),
            ("64 on 4", "gqa64x4"),
        )
    },
    "prompts, a layer": {
        words: {f"{tokens // 1024}k": f"prompt/mha32/{tokens}x{tokens}/{kind}" for tokens in (2_048, 4_096, 16_384)}
        for words, kind in (("FP32", "fp32"), ("BF16", "bf16"))
    },
    "decoding, a whole model": {
        "7B FP16": {"1k": "generate/7b/fp16/1024", "16k": "generate/7b/fp16/16384", "64k": "generate/7b/fp16/65536"},
        "7B FP32": {"4k": "generate/7b/fp32/4096", "64k": "generate/7b/fp32/65536"},
        "8B FP16": {"8k": "generate/8b/fp16/8192", "32k": "generate/8b/fp16/32768", "128k": "generate/8b/fp16/131072"},
        "8B BF16": {"8k": "generate/8b/bf16/8192", "32k": "generate/8b/bf16/32768", "128k": "generate/8b/bf16/131072"},
    },
}


def times_better(entry: dict[str, Any]) -> float | None:
    """How many times better than the best of the others; 1 is level."""
    if not entry["peers"]:
        return None
    if entry["unit"] in ("us", "ms", "s", "GB"):
        return float(min(entry["peers"].values()) / entry["value"])
    return float(entry["value"] / max(entry["peers"].values()))


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
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_ratios(results: Path, folder: Path = IMAGES) -> Path | None:
    """How many times as fast as the best other, by shape and length: a panel for each of RATIOS."""
    device, entries = load(results)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for title, groups in RATIOS.items():
        for group, names in groups.items():
            bars = {label: times_better(entries[name]) for label, name in names.items() if name in entries}
            known = {label: ratio for label, ratio in bars.items() if ratio is not None}
            if known:
                found.setdefault(title, {})[group] = known
    if not found:
        return None
    figure = _figure(10.5, 3.6)
    if figure is None:
        return None
    figure.clear()
    widths = [sum(len(bars) + 1 for bars in panel.values()) for panel in found.values()]
    most = max(ratio for panel in found.values() for bars in panel.values() for ratio in bars.values())
    all_axes = figure.subplots(1, len(found), squeeze=False, width_ratios=widths, sharey=True)[0]
    for axes, (title, panel) in zip(all_axes, found.items(), strict=True):
        _draw_ratio_bars(axes, panel)
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.5, 2 * most)
        levels = [level for level in (0.5, 1, 2, 4, 8, 16, 32) if level <= 2 * most]
        axes.set_yticks(levels, [f"{level:g}x" for level in levels])
        axes.set_title(title, loc="left", fontsize=9)
    title = f"how many times as fast as the best other, by shape and positions; 1x is level; {device}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _save(figure, folder / f"ratios-{results.stem}.svg")


RATES = {
    "gpu015/fill_rate/decode": "fill one by one, append",
    "gpu015/fill_rate/decode_append_all": "fill one by one, append_all",
    "gpu015/fill_rate/decode_graph": "fill one by one, append, graph",
    "gpu015/fill_rate/decode_append_all_graph": "fill one by one, append_all, graph",
    "gpu015/fill_rate/prefill": "fill in chunks",
    "gpu015/retrieve_rate": "read back (layer-positions/s)",
}


def draw_gpu015(results: Path, folder: Path = IMAGES) -> Path | None:
    """Memory at each number of positions, and rates beside plain torch's and the ceiling."""
    device, entries = load(results)
    memory = {int(e["config"]["positions"]): e for name, e in entries.items() if name.endswith("/memory_gb")}
    rates = [(label, entries[name]) for name, label in RATES.items() if name in entries]
    if not memory or not rates:
        return None
    figure = _figure(10.5, 3.8, columns=2)
    if figure is None:
        return None
    left, right = figure.axes

    for i, (_, entry) in enumerate(sorted(memory.items())):
        for x, held, colour, label in (
            (i - 0.2, entry["value"], OURS, "FP16, this cache"),
            (i + 0.2, 2 * entry["value"], "#c9c9c9", "FP32"),
        ):
            left.bar(x, held, 0.38, color=colour, label=label if i == 0 else None)
            left.text(x, held, f"{held:.4g}", ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(memory)), [f"{size:,}" for size in sorted(memory)])
    left.set_xlim(-0.7, max(len(memory), 2) - 0.3)
    left.margins(y=0.25)
    left.set_xlabel("positions held")
    left.set_ylabel("GB of keys and values")
    left.grid(False, axis="x")
    left.legend(frameon=False, loc="upper left", fontsize=8)
    config = memory[min(memory)]["config"]
    shape = f"{config['layers']} layers, {config['kv_heads']} heads, head_dim {config['head_dim']}"
    left.set_title(f"GPU-015: memory, {shape}", loc="left")

    for y, (_, entry) in enumerate(rates):
        peers = list(entry["peers"].values())
        marks = [(entry["value"], "o", OURS, "this cache")]
        marks += [(max(peers), "D", TORCH, "plain torch, the best of it")] if peers else []
        marks += [(entry["ceiling"], "|", LIMIT, "ceiling of this run")] if entry["ceiling"] else []
        for value, marker, colour, label in marks:
            size = 14 if marker == "|" else 7
            right.plot(value, y, marker, color=colour, ms=size, mew=1.5, label=label if y == 0 else None)
        right.annotate(
            f"{entry['value']:,.0f}", (entry["value"], y), (0, 7), textcoords="offset points", ha="center", fontsize=7.5
        )
    right.set_xscale("log")
    right.margins(x=0.12)
    right.set_ylim(len(rates) - 0.5, -0.8)
    right.set_yticks(range(len(rates)), [label for label, _ in rates])
    right.set_xlabel("positions/s through all layers")
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3)
    right.set_title(device, loc="left")
    return _save(figure, folder / f"gpu015-{results.stem}.svg")


ALL = (draw_append, draw_gather, draw_attention, draw_generate, draw_gpu015, draw_ratios)
