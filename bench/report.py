"""Draws tables and charts from bench/results/*.json.

- README.md, docs/performance.md and docs/accuracy.md: what lies between the markers `<!-- results:begin -->` and
  `<!-- results:end -->` is replaced. docs/accuracy.md has a pair for each of its tables, such as
  `<!-- results:begin storage -->`.
- docs/results/<device>.md: the whole page is written, one for each results file. Pages of other devices are removed.

With --check nothing is written, and the exit status is 1 when a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import accuracy_tables
import charts
from common import RESULTS, ROOT, natural_order, quantity, shown_path

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
PAGES = ROOT / "docs" / "results"
ACCURACY = ROOT / "docs" / "accuracy.md"

# Rows by the names of measurements, where a device has them. The README has those of `README_ROWS`.
HEADLINES = {
    "generate/7b/fp32/65536": "a 7B FP32 model decoding at 65,536 positions",
    "generate/peak_gb/7b/fp32/65536": "the same: peak memory (ceiling: weights, keys and values alone)",
    "prompt/mha32/4096x4096/fp32": "attention of a prompt of 4,096 tokens, 32 heads, FP32",
    "generate/8b/fp16/8192": "an 8B model (Llama 3's shape, FP16 weights) decoding at 8,192 positions",
    "generate/8b/fp16/131072": "the same at 131,072 positions",
    "attention/gqa32x8/65536": "attention of one token, 65,536 positions, 32 query heads on 8, a layer",
    "sharded/gqa32x8/262144": "the same at 262,144 positions that are dealt out to two of these GPUs",
    "generate/8b/fp16/131072/tuned": "the 8B model at 131,072 positions, its products tuned by Inductor",
    "generate/8b/fp16/32768": "the 8B model at 32,768 positions",
    "generate/8b/fp16/1048576/sharded": "the 8B model at 1,048,576 positions, on two of these GPUs by positions",
    "generate/8b/fp16/b16/8192": "the 8B model, 16 sequences of 8,192 positions",
    "generate/8h/fp16/32768": "a hybrid of that size (one layer in four with attention) decoding at 32,768 positions",
    "generate/7b/fp16/65536": "a 7B model with FP16 weights decoding at 65,536 positions",
    "prompt/mha32/4096x4096/bf16": "attention of a prompt of 4,096 tokens, 32 heads, BF16",
    "append/prefill/contiguous/4096": "append 4,096 positions of a layer, from FP32",
    "gather/indices/65536": "gather 65,536 random positions of a layer, to FP32",
    "storage/save": "save a cache to a file, synced to the disk",
}
README_ROWS = tuple(HEADLINES)[:7]


def best_peer(entry: dict[str, Any]) -> str:
    """The fastest peer beside ours, and how many times faster ours is."""
    peers: dict[str, float] = entry["peers"]
    if not peers:
        return ""
    name = charts.best_peer(entry)
    return f"{quantity(peers[name], entry['unit'])} ({name}); {charts.times_better(entry):.2f}x"


def of_ceiling(entry: dict[str, Any]) -> str:
    if not entry["ceiling"] and entry["name"].startswith("generate/peak_gb/"):
        # No memory is less than what a step reads: weights, keys and values.
        entry = {**entry, "ceiling": entry["config"]["bytes"] / 1e9}
    if not entry["ceiling"]:
        return ""
    less = entry["unit"] in charts.LESS_IS_BETTER
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


def headline_block(path: Path, names: tuple[str, ...]) -> list[str]:
    """The rows of HEADLINES of one device; nothing where it has none of them."""
    data = json.loads(path.read_text())
    entries = {entry["name"]: entry for entry in data["measurements"]}
    there = [name for name in names if name in entries]
    if not there:
        return []
    rows = [row(HEADLINES[name], entries[name]) for name in there]
    title = f"**{data['device']}** ({origin(data, [entries[name] for name in there])})"
    return [title, "", *markdown_table(["", *HEAD], rows), ""]


def image_lines(words: str, name: str, page: Path) -> list[str]:
    """A chart on a page, where it has been drawn."""
    image = charts.IMAGES / name
    if not image.is_file():
        return []
    return [f"![{words}]({Path(os.path.relpath(image, page.parent)).as_posix()})", ""]


RATIOS_WORDS = "How many times as fast as the fastest alternative: bars by shape and number of positions"
MEMORY_WORDS = "Memory of keys and values beside FP32, and of a whole model beside StaticCache, by number of positions"


def readme_block(files: list[Path]) -> str:
    """Of the first device, a GPU if there is one."""
    lines = headline_block(files[0], README_ROWS) if files else []
    if files:
        lines += image_lines(RATIOS_WORDS, f"ratios-{files[0].stem}.svg", README)
    return "\n".join(lines).strip()


def performance_block(files: list[Path]) -> str:
    """The headlines and charts of the first device, and where the tables of all devices are."""
    lines: list[str] = []
    for path in files[:1]:
        lines += headline_block(path, tuple(HEADLINES))
        lines += image_lines(RATIOS_WORDS, f"ratios-{path.stem}.svg", PERFORMANCE)
        lines += image_lines(MEMORY_WORDS, f"memory-{path.stem}.svg", PERFORMANCE)
    if files:
        lines += ["Every measurement, by device:", ""]
    for path in files:
        lines.append(f"- [{json.loads(path.read_text())['device']}](results/{path.stem}.md)")
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


def device_page(path: Path) -> str:
    """Every measurement of a device but those of docs/accuracy.md, with the charts."""
    data = json.loads(path.read_text())
    timed = [entry for entry in data["measurements"] if not entry["name"].startswith("accuracy/")]
    entries = sorted(timed, key=lambda entry: natural_order(entry["name"]))
    page = PAGES / f"{path.stem}.md"
    lines = [f"# {data['device']}", "", f"Drawn by `make report` from `{shown_path(path)}`; not edited by hand.", ""]
    if entries:
        lines += [f"{origin(data, entries)}. How it is measured: [performance.md](../performance.md).", ""]
    lines += image_lines(RATIOS_WORDS, f"ratios-{path.stem}.svg", page)
    lines += image_lines(MEMORY_WORDS, f"memory-{path.stem}.svg", page)
    for kind in dict.fromkeys(entry["name"].split("/")[0] for entry in entries):
        lines += [f"## {kind}", "", *image_lines(kind, f"{kind}-{path.stem}.svg", page)]
        of_kind = [entry for entry in entries if entry["name"].split("/")[0] == kind]
        rows = [row(f"`{e['name']}`", e) for e in of_kind if not e["name"].startswith(FEW)]
        lines += [*markdown_table([kind, *HEAD], rows), ""] if rows else []
        lines += few_table([entry for entry in of_kind if entry["name"].startswith(FEW)])
    return "\n".join(lines).strip() + "\n"


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
    wanted: dict[Path, str | None] = dict.fromkeys(PAGES.glob("*.md"))  # None: to be removed
    wanted |= {PAGES / f"{path.stem}.md": device_page(path) for path in files}
    for path, its_blocks in blocks.items():
        if not path.is_file():
            print(f"{shown_path(path)}: there is no such file")
            continue
        text = path.read_text()
        for name, block in its_blocks.items():
            text = with_block(text, path, block, name)
        wanted[path] = text
    stale = []
    for path, new in wanted.items():
        if new == (path.read_text() if path.is_file() else None):
            continue
        stale.append(shown_path(path))
        if args.check:
            continue
        if new is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new)
    if not stale:
        print("up to date")
    elif args.check:
        print(f"out of date: {', '.join(stale)}; run `make report`")
    else:
        print(f"written: {', '.join(stale)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
