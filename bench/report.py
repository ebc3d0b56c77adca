"""Draws the tables of the README, docs/performance.md and docs/accuracy.md and the charts, from bench/results/*.json.

What lies between the markers `<!-- results:begin -->` and `<!-- results:end -->` of those files is replaced;
docs/accuracy.md has a pair for each of its tables, `<!-- results:begin storage -->` and so on. With --check nothing is
written, and the exit status is 1 when a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import accuracy_tables
import charts
from common import RESULTS, ROOT, natural_order, quantity, shown_path

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
ACCURACY = ROOT / "docs" / "accuracy.md"

# The README's rows: measurements by name, where a device has them.
README_ROWS = {
    "gpu015/memory_gb": "65,536 positions: keys and values in memory (FP32: twice that)",
    "gpu015/fill_rate/decode": "fill position by position, `append` layer by layer",
    "gpu015/fill_rate/decode_append_all_graph": "the same, `append_all` in a CUDA graph",
    "gpu015/fill_rate/prefill": "fill in chunks of 2,048",
    "gpu015/retrieve_rate": "read back to FP32",
    "append/prefill/contiguous/4096": "append 4,096 positions of a layer",
    "append/prefill/htd/4096": "the same from `[H, T, D]`",
    "gather/contiguous/65536": "gather a layer, 65,536 positions",
    "gather/indices/65536": "gather 65,536 random positions",
    "lengths/reorder/rotate/8/4096": "`reorder`: 8 sequences of 4,096 positions",
    "append/decode/append_all/graph": "one position, 32 layers, `append_all`, GPU time",
    "append/one_position/host": "one position of one layer, host time",
    "attention/mha32/65536": "attend to 65,536 positions, 32 heads, append included",
    "attention/mha32/4096": "the same, 4,096 positions",
    "attention/gqa32x8/65536": "65,536 positions, 32 query heads on 8",
    "prompt/mha32/4096x4096/fp32": "a prompt of 4,096 tokens, 32 heads: attention, FP32",
    "prompt/mha32/2048x65536/fp32": "2,048 tokens behind 63,488",
    "prompt/mha32/4096x4096/bf16": "a prompt of 4,096 tokens, BF16",
    "attention/error/fp32": "largest error of attention against FP64, FP32 query",
    "storage/save": "`save` a cache to a file, synced to the disk",
    "storage/load": "`load` it from the disk",
    "first_token/7b/fp32/16384": "a 7B FP32 model reads a prompt of 16,384 tokens",
    "first_token/7b/bf16/16384": "the same, BF16 weights",
    "generate/7b/fp32/65536": "a 7B FP32 model decoding at 65,536 positions",
    "generate/7b/fp32/65536/tuned": "the same, its products tuned by Inductor",
    "generate/peak_gb/7b/fp32/65536": "the same: peak memory",
    "generate/7b/fp16/65536": "FP16 weights",
    "generate/7b/fp16/65536/tuned": "the same, tuned",
    "generate/peak_gb/7b/fp16/65536": "the same: peak memory",
    "generate/7b/w4/65536": "4-bit weights",
    "generate/peak_gb/7b/w4/65536": "the same: peak memory",
    "generate/8b/fp16/8192": "an 8B model (Llama 3's shape, FP16 weights) at 8,192 positions",
    "generate/8b/fp16/8192/tuned": "the same, tuned",
    "generate/8b/fp16/131072": "at 131,072 positions",
    "generate/8b/fp16/131072/tuned": "the same, tuned",
}
CPU_HAS_NO_GRAPHS = ", GPU time", " in a graph"
LESS_IS_BETTER = ("us", "ms", "s", "GB", "relative")


def best_peer(entry: dict[str, Any]) -> str:
    """The fastest peer beside ours, and how many times faster ours is."""
    peers: dict[str, float] = entry["peers"]
    if not peers:
        return ""
    less = entry["unit"] in LESS_IS_BETTER
    name = (min if less else max)(peers, key=lambda peer: peers[peer])
    ratio = peers[name] / entry["value"] if less else entry["value"] / peers[name]
    ratio = entry.get("speedups", {}).get(name, ratio)
    return f"{quantity(peers[name], entry['unit'])} ({name}); {ratio:.2f}x"


def of_ceiling(entry: dict[str, Any]) -> str:
    if not entry["ceiling"]:
        return ""
    less = entry["unit"] in LESS_IS_BETTER
    share = entry["ceiling"] / entry["value"] if less else entry["value"] / entry["ceiling"]
    return f"{quantity(entry['ceiling'], entry['unit'])} ({100 * share:.0f}%)"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def row(label: str, entry: dict[str, Any]) -> list[str]:
    return [label, quantity(entry["value"], entry["unit"]), of_ceiling(entry), best_peer(entry)]


HEAD = ["measured", "ceiling, of the same run", "best of the others; how much better ours is"]


def origin(data: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    commits = ", ".join(sorted({entry["commit"] for entry in entries}))
    cuda = f", CUDA {data['cuda']}" if data["cuda"] else ""
    return f"torch {data['torch']}{cuda}, commit {commits}, {max(entry['date'] for entry in entries)}"


def readme_label(label: str, entry: dict[str, Any], gpu: bool) -> str:
    if not gpu:
        for words in CPU_HAS_NO_GRAPHS:
            label = label.replace(words, "")
        if entry["name"].startswith("gpu015/"):
            label += f" ({entry['config']['layers']} layers)"
    return label


def readme_block(files: list[Path]) -> str:
    """Of the first device, a GPU if there is one; all of them are in docs/performance.md."""
    lines: list[str] = []
    for path in files[:1]:
        data = json.loads(path.read_text())
        entries = {entry["name"]: entry for entry in data["measurements"]}
        chosen = [(label, entries[name]) for name, label in README_ROWS.items() if name in entries]
        if not chosen:
            continue
        rows = [row(readme_label(label, entry, bool(data["cuda"])), entry) for label, entry in chosen]
        lines += [f"**{data['device']}** ({origin(data, [entry for _, entry in chosen])})", ""]
        lines += [*markdown_table(["", *HEAD], rows), ""]
    image = charts.IMAGES / f"ratios-{files[0].stem}.svg" if files else None
    if image is not None and image.is_file():
        lines.append(f"![how many times as fast as the best other]({image.relative_to(ROOT)})")
    return "\n".join(lines).strip()


FEW = "prompt/few/"  # prompt/few/g<query heads to a KV head>/<queries>x<positions>/<dtype>: too many for a row each


def few_table(entries: list[dict[str, Any]]) -> list[str]:
    """A row for each number of queries, a column for each number of positions; the share of the ceiling in brackets."""
    cells: dict[str, dict[str, str]] = {}
    for entry in entries:
        group, sizes, dtype = entry["name"].removeprefix(FEW).split("/")
        queries, positions = sizes.split("x")
        share = f"{100 * entry['ceiling'] / entry['value']:.0f}%"
        label = f"{dtype}, group of {group.removeprefix('g')}, {queries} queries"
        cells.setdefault(label, {})[f"{int(positions):,}"] = f"{quantity(entry['value'], entry['unit'])} ({share})"
    columns = list(dict.fromkeys(column for row_cells in cells.values() for column in row_cells))
    columns.sort(key=lambda column: int(column.replace(",", "")))
    rows = [
        [label, *(cells[label].get(column, "") for column in columns)] for label in sorted(cells, key=natural_order)
    ]
    return [*markdown_table([f"{FEW}: positions", *columns], rows), ""] if rows else []


def performance_block(files: list[Path]) -> str:
    lines: list[str] = []
    for path in files:
        data = json.loads(path.read_text())
        timed = [entry for entry in data["measurements"] if not entry["name"].startswith("accuracy/")]
        entries = sorted(timed, key=lambda entry: natural_order(entry["name"]))
        if not entries:
            continue
        lines += [f"## {data['device']}", "", f"`{shown_path(path)}`: {origin(data, entries)}.", ""]
        for kind in dict.fromkeys(entry["name"].split("/")[0] for entry in entries):
            image = charts.IMAGES / f"{kind}-{path.stem}.svg"
            if image.is_file():
                lines += [f"![{kind}](images/{image.name})", ""]
            of_kind = [entry for entry in entries if entry["name"].split("/")[0] == kind]
            rows = [row(f"`{e['name']}`", e) for e in of_kind if not e["name"].startswith(FEW)]
            lines += [*markdown_table([kind, *HEAD], rows), ""]
            lines += few_table([entry for entry in of_kind if entry["name"].startswith(FEW)])
    return "\n".join(lines).strip()


def accuracy_block(files: list[Path], part: str) -> str:
    """One table of docs/accuracy.md, for every device that has its figures."""
    lines: list[str] = []
    for path in files:
        data = json.loads(path.read_text())
        entries = {e["name"]: e for e in data["measurements"] if e["name"].startswith(f"accuracy/{part}/")}
        if entries:
            head, rows = accuracy_tables.PARTS[part](entries)
            lines += [f"**{data['device']}** ({origin(data, list(entries.values()))})", ""]
            lines += [*markdown_table(head, rows), ""]
    return "\n".join(lines).strip()


def with_block(text: str, path: Path, block: str, name: str = "") -> str:
    """The text of a file with the block in its place; where there is no place, said in words, the text as it is."""
    begin, end = (f"<!-- results:{which}{' ' * bool(name)}{name} -->" for which in ("begin", "end"))
    if len(re.findall(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL)) != 1:
        print(f"{shown_path(path)}: {begin} and {end} must stand in it once each; nothing is drawn there")
        return text
    before, _, rest = text.partition(begin)
    inside = f"\n{block}\n" if block else "\n"
    return before + begin + inside + end + rest.partition(end)[2]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file is out of date")
    args = p.parse_args()

    files = sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem.startswith("cpu"), path.stem))  # GPUs first
    if not files:
        print(f"There are no results in {shown_path(RESULTS)}")
    if not args.check:
        for path in files:
            for draw in charts.ALL:
                image = draw(path)
                if image is not None:
                    print(f"drawn: {shown_path(image)}")
    blocks = {
        README: {"": readme_block(files)},
        PERFORMANCE: {"": performance_block(files)},
        ACCURACY: {part: accuracy_block(files, part) for part in accuracy_tables.PARTS},
    }
    stale = []
    for path, its_blocks in blocks.items():
        if not path.is_file():
            print(f"{shown_path(path)}: there is no such file")
            continue
        text = path.read_text()
        wanted = text
        for name, block in its_blocks.items():
            wanted = with_block(wanted, path, block, name)
        if wanted == text:
            continue
        stale.append(shown_path(path))
        if not args.check:
            path.write_text(wanted)
    if not stale:
        print("up to date")
    elif args.check:
        print(f"out of date: {', '.join(stale)}; run `make report`")
    else:
        print(f"written: {', '.join(stale)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
