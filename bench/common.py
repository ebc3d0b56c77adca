"""What the benchmarks share: the machine, the results file, timers, tables. Ceilings are in ceilings.py."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

if importlib.util.find_spec("kvcache_ext") is None:  # not installed: the one that was built in place
    sys.path.insert(0, str(ROOT))

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# The machine


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def choose_device(name: str | None) -> torch.device:
    """The device asked for; without a wish a GPU where there is one that kvcache_ext was built for, else the CPU."""
    from kvcache_ext import build_info

    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            if build_info.with_cuda:
                name = "cuda"
            else:
                print(f"There is a GPU, but kvcache_ext is a CPU build, as {build_info.reason}: measuring the CPU.")
    device = torch.device(name)
    if on_gpu(device):
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200", or "AMD EPYC, 2 threads, avx2"."""
    if on_gpu(device):
        return torch.cuda.get_device_name(device)
    from kvcache_ext._extension import extension

    model = "CPU"
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {torch.get_num_threads()} threads, {extension.cpu_instruction_set()}"


def synchronize(device: torch.device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One thread on a CPU: a position is too little to share, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if on_gpu(device) else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated; 4 GB where that cannot be found out."""
    from kvcache_ext import memory

    if on_gpu(device):
        torch.cuda.empty_cache()
    free = memory.free_bytes(device)
    return 4 * 10**9 if free is None else free


def fill_random(tensor: Tensor) -> Tensor:
    """Fills a contiguous tensor with one block of N(0, 1) over and over: fast, also on a CPU. Never time on zeros."""
    flat = tensor.view(-1)
    block = torch.randn(min(flat.numel(), 1 << 20), device=tensor.device).to(tensor.dtype)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])
    return tensor


# The results file


@dataclass
class Measurement:
    """One figure, with what was measured beside it in the same run.

    `ceiling` and `peers` are in `unit`. `speedups` says how many times faster ours was than each peer: the median over
    rounds in which all took their turn, which on a busy machine says more than the two medians do.
    """

    name: str
    value: float
    unit: str
    ceiling: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return value


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts append/4096 before append/16384."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def git_commit() -> str:
    """The short hash of HEAD, "-dirty" behind it when code differs from it (results and documents do not count)."""
    code = ["csrc", "kvcache_ext", "bench/*.py", "_build", "setup.py", "pyproject.toml"]
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=7", "HEAD"], ["status", "--porcelain", "--", *code])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changes else head


class Results:
    """bench/results/<device>.json: one file a device, one entry a measurement, new ones replacing old ones by name."""

    def __init__(self, device: torch.device, folder: Path | None, commit: str | None = None) -> None:
        """`folder` None: nothing is written."""
        name = device_name(device)
        title = name if on_gpu(device) else f"cpu {name.split()[-1]}"  # with its instruction set
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self.path = folder / f"{slug}.json" if folder else None
        self.measurements: dict[str, Measurement] = {}
        self._head = {
            "device": name,
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda if on_gpu(device) else None,
            "commit": commit or git_commit(),
            "date": datetime.date.today().isoformat(),
        }

    def add(self, measurement: Measurement) -> Measurement:
        self.measurements[measurement.name] = measurement
        return measurement

    def save(self, last: bool = True) -> None:
        """Merges what was added into the file, and when it is the last time says so."""
        if self.path is None or not self.measurements:
            return
        entries = {}
        if self.path.is_file():
            entries = {entry["name"]: entry for entry in json.loads(self.path.read_text())["measurements"]}
        for name, measurement in self.measurements.items():
            entry = {key: value for key, value in asdict(measurement).items() if key != "speedups" or value}
            entries[name] = _rounded(entry) | {key: self._head[key] for key in ("commit", "date")}
        lines = [json.dumps(entries[name]) for name in sorted(entries, key=natural_order)]
        head = json.dumps(self._head)[:-1]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(head + ',\n "measurements": [\n  ' + ",\n  ".join(lines) + "]}\n")
        if last:
            print(f"{len(self.measurements)} measurements written to {shown_path(self.path)}")


def shown_path(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# Timers. A sampler runs its work for a few milliseconds and says how many seconds one unit of it took.

Work = Callable[[], object]
Sampler = Callable[[], float]

ENOUGH_SECONDS = 5e-3  # of work in a sample
SLEEP_CYCLES = 4_000_000  # about 2 ms of GPU time in which the host gets ahead, so that launching is not what is timed


def _repeats(once: float, most: int) -> int:
    return max(1, min(most, int(ENOUGH_SECONDS / max(once, 1e-9))))


class Captured:
    """`work` as a CUDA graph, after a warm-up on another stream: it runs once then, and once for each replay."""

    def __init__(self, work: Work) -> None:
        self._work = work  # the graph uses its tensors, which nothing else may keep alive
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        self._graph.replay()


def _event_sampler(work: Work, units: int, most_repeats: int) -> Sampler:
    def sample(repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    work()
    repeats = _repeats(statistics.median(sample(1) for _ in range(3)), most_repeats)
    return lambda: sample(repeats) / units


def graph_sampler(work: Work, units: int = 1) -> Sampler:
    """GPU time of `work` replayed as a CUDA graph. Let it be a tenth of a millisecond or more: a replay costs some."""
    return _event_sampler(Captured(work).replay, units, 100)


def eager_sampler(work: Work, units: int = 1) -> Sampler:
    """GPU time of `work` launched call by call. At most some 100 launches, or the GPU gets to wait for the host."""
    return _event_sampler(work, units, max(1, 100 // units))


def host_sampler(work: Work, device: torch.device, units: int = 1) -> Sampler:
    """Host time of `work` alone: its launches are waited for between two calls of it, not within one."""

    def sample() -> float:
        times = []
        for _ in range(20):
            synchronize(device)
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        synchronize(device)
        return statistics.median(times) / units

    return sample


def cpu_sampler(work: Work, units: int = 1) -> Sampler:
    """Time of `work` on the CPU."""

    def sample(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats

    work()
    repeats = _repeats(sample(1), 1000)
    return lambda: sample(repeats) / units


def throughput_sampler(work: Work, device: torch.device, units: int = 1) -> Sampler:
    """Time of `work`: of the GPU's, as a graph, or of the CPU's."""
    return graph_sampler(work, units) if on_gpu(device) else cpu_sampler(work, units)


@dataclass(frozen=True)
class Timing:
    seconds: float  # median over rounds
    ratio: float  # median over rounds of this one's time over the first contender's: the first's speedup over it


def compare(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, Timing]:
    """Times contenders in turn, every one in every round, so that what disturbs the machine disturbs them all."""
    names = list(samplers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for sampler in samplers.values():
        sampler()
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(samplers[name]())
    first = times[names[0]]
    return {
        name: Timing(statistics.median(t), statistics.median(a / b for a, b in zip(t, first, strict=True)))
        for name, t in times.items()
    }


def measured(
    name: str,
    unit: str,
    timings: Mapping[str, Timing],
    figure: Callable[[float], float],
    ceiling: float | None,
    config: dict[str, Any],
) -> Measurement:
    """A measurement of the first contender, with the others as its peers; `figure` makes seconds into `unit`."""
    ours, *others = timings
    return Measurement(
        name,
        figure(timings[ours].seconds),
        unit,
        ceiling,
        {other: figure(timings[other].seconds) for other in others},
        {other: timings[other].ratio for other in others},
        config,
    )


class Stopwatch:
    """Adds up the time of parts of a run: by events on a GPU, where nothing waits for them, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if on_gpu(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def seconds(self) -> float:
        synchronize(self._device)
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1e3


# What is printed. rich draws it where it is installed.


def quantity(value: float, unit: str) -> str:
    """Such as "4.17 TB/s", "41.2 GB/s" (for 0.0412 TB/s), "1.19 us", "65,536 positions/s"."""
    if unit in ("TB/s", "TFLOP/s") and value < 0.5:
        value, unit = value * 1e3, f"G{unit[1:]}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".strip()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        rows = [[cell.replace("\n", "; ") for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        print(f"\n{title}")
        for row in [columns, ["-" * width for width in widths], *rows]:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
        return
    table = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    colours = {"pass": "green", "miss": "yellow", "FAIL": "red"}
    for row in rows:
        table.add_row(*(f"[{colours[cell]}]{cell}[/]" if cell in colours else cell for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; yields a function that moves it on. It is drawn in calls of that and at no other time."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        done, shown = 0, 0

        def advance(steps: int) -> None:
            nonlocal done, shown
            done += steps
            if done * 4 // total > shown:
                shown = done * 4 // total
                print(f"{what}: {done:,} of {total:,}", flush=True)

        yield advance
        return
    columns = (TextColumn("{task.description:<58}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    with Progress(*columns, auto_refresh=False, console=console if console.is_terminal else Console(width=120)) as bar:
        task = bar.add_task(what, total=total)
        drawn = time.perf_counter()

        def advance_bar(steps: int) -> None:
            nonlocal drawn
            bar.advance(task, steps)
            if time.perf_counter() - drawn > 0.1:
                bar.refresh()
                drawn = time.perf_counter()

        yield advance_bar
        bar.refresh()


@dataclass(frozen=True)
class Target:
    """What a figure is to reach: itself, or how many times faster than a peer."""

    value: float
    at_least: bool = True
    over_peer: str | None = None

    def verdict(self, m: Measurement) -> str:
        figure = m.speedups.get(self.over_peer, 0.0) if self.over_peer else m.value
        return "pass" if (figure >= self.value if self.at_least else figure <= self.value) else "miss"

    def text(self, unit: str) -> str:
        if self.over_peer:
            return f"{self.value:.3g}x {self.over_peer}"
        return (">= " if self.at_least else "<= ") + quantity(self.value, unit)


def of_ceiling(m: Measurement) -> str:
    """How near a figure is to its ceiling, where less is better (times) as where more is (rates)."""
    if not m.ceiling or not m.value:
        return ""
    return f"{100 * (m.ceiling / m.value if m.unit in ('us', 'ms', 's') else m.value / m.ceiling):.0f}%"


def print_measurements(title: str, results: Results, targets: Mapping[str, Target]) -> None:
    rows = []
    for m in results.measurements.values():
        target = targets.get(m.name)
        peers = "\n".join(
            f"{peer} {quantity(value, m.unit)}" + (f" ({m.speedups[peer]:.2f}x)" if peer in m.speedups else "")
            for peer, value in m.peers.items()
        )
        ceiling = quantity(m.ceiling, m.unit) if m.ceiling else ""
        reached = [target.text(m.unit), target.verdict(m)] if target else ["", ""]
        rows.append([m.name, quantity(m.value, m.unit), ceiling, of_ceiling(m), *reached, peers])
    columns = ["measurement", "ours", "ceiling", "of it", "to reach", "", "peers (how much faster ours is)"]
    print_table(title, columns, rows)


# The command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", help="cuda, cuda:1, cpu (a GPU if there is one)")
    p.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; no results are written")
    p.add_argument("--results", type=Path, help=f"folder of the results (default {RESULTS.relative_to(ROOT)})")
    p.add_argument("--commit", help="the commit to note in the results (default: git's, of this folder)")
    return p


def open_results(args: argparse.Namespace, device: torch.device, keep: bool = True) -> Results:
    """The results file; nothing is written when `keep` is false or in a quick run, unless --results was given."""
    folder = args.results or (RESULTS if keep and not args.quick else None)
    return Results(device, folder, args.commit)
