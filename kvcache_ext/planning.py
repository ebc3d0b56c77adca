"""`python -m kvcache_ext plan`: what a cache and a model's weights take together, as a table.

`--config` has transformers read a config.json, so that the plan is that of `Fp16Cache.for_model`. A plan is wanted
first of all, though: before weights are downloaded, on machines without transformers or with one that is too old for
the model. There config_names.py reads it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import memory
from .config_names import Shape, read_config

GB = memory.GB
USUAL_GPUS = (16, 24, 40, 48, 80, 141)  # GB


def _positive(text: str) -> int:
    value = int(text.replace("_", "").replace(",", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value.bit_length() > 63:
        raise argparse.ArgumentTypeError("must fit in 64 bits")
    return value


def _gigabytes(text: str) -> int:
    value = float(text)
    if not 0 <= value < 1e9:  # no NaN either
        raise argparse.ArgumentTypeError(f"must be a number of GB (10^9 bytes) that is not negative, got {text}")
    return round(value * GB)


_positive.__name__ = "int"  # argparse names it: invalid int value: 'x'
_gigabytes.__name__ = "number"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="DIR", help="a model's folder, or its config.json")
    parser.add_argument("--layers", type=_positive, help="layers of the model")
    parser.add_argument("--heads", type=_positive, help="key/value heads (fewer than a grouped-query model's heads)")
    parser.add_argument("--head-dim", type=_positive, help="elements of a head")
    parser.add_argument("--positions", type=_positive, help="positions to hold (default: what the config is made for)")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences (default: 1)")
    parser.add_argument(
        "--weights-gb", type=_gigabytes, metavar="GB", help="the model's weights, 10^9 bytes (default: none counted)"
    )
    into = parser.add_mutually_exclusive_group()
    into.add_argument("--free-gb", type=_gigabytes, metavar="GB", help="memory to fit into, 10^9 bytes")
    into.add_argument("--device", help="the device whose free memory to fit into (default: a GPU, else the CPU)")


def _shape(chosen: argparse.Namespace) -> Shape:
    """From the config, where there is one; options go before what it says."""
    read = None if chosen.config is None else read_config(chosen.config)
    numbers: dict[str, int] = {}
    for name in ("layers", "heads", "head_dim", "positions"):
        value = getattr(chosen, name)
        if value is None and read is not None:
            value = getattr(read, name)
        if value is None:
            hint = "" if name == "positions" and read is not None else ", or --config"
            raise ValueError(f"plan: --{name.replace('_', '-')} is missing{hint}")
        numbers[name] = value
    return Shape(**numbers, remarks=[] if read is None else read.remarks)


@dataclass(frozen=True)
class LayersAlike:
    """Layers that one `StreamingKVCacheFp16` of an `Fp16Cache` holds."""

    layers: int
    positions: int
    heads: int
    head_dim: int
    window: int | None

    @property
    def words(self) -> str:
        window = "" if self.window is None else f" with a window of {self.window:,}"
        return f"{self.layers} of {self.heads} key/value heads of {self.head_dim}{window}"


@dataclass(frozen=True)
class ModelPlan:
    """`memory.Plan` for the `Fp16Cache` of a model, whose layers may differ."""

    alike: Callable[[int], list[LayersAlike]]  # for so many positions
    max_positions: int
    batch_size: int
    device: torch.device | None
    free_bytes: int | None
    weights_bytes: int

    def _plans(self, positions: int, batch: int) -> list[memory.Plan]:
        return [
            memory.plan(a.layers, a.positions, a.heads, a.head_dim, batch, device=self.device, free=0)
            for a in self.alike(positions)
        ]

    @property
    def cache_bytes(self) -> int:
        return sum(plan.cache_bytes for plan in self._plans(self.max_positions, self.batch_size))

    @property
    def fp32_bytes(self) -> int:
        return 2 * self.cache_bytes

    @property
    def beside_bytes(self) -> int:
        return sum(plan.beside_bytes for plan in self._plans(self.max_positions, self.batch_size))

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.beside_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.free_bytes is None else self.total_bytes + self.weights_bytes <= self.free_bytes

    def _largest(self, total_bytes: Callable[[int], int]) -> int | None:
        """The largest number with so many bytes at most; None: any number."""
        if self.free_bytes is None:
            return None
        room = self.free_bytes - self.weights_bytes
        low, high = 0, 1 << 40
        if total_bytes(high) <= room:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total_bytes(middle) <= room else (low, middle)
        return low

    @property
    def largest_max_positions(self) -> int | None:
        return self._largest(lambda positions: sum(p.total_bytes for p in self._plans(positions, self.batch_size)))

    @property
    def largest_batch_size(self) -> int | None:
        return self._largest(lambda batch: sum(p.total_bytes for p in self._plans(self.max_positions, batch)))


@dataclass(frozen=True)
class ReadModel:
    """A config.json as transformers reads it."""

    alike: Callable[[int], list[LayersAlike]]
    positions: int | None
    remarks: list[str]


def _read_by_transformers(path: Path) -> ReadModel | str | None:
    """None: it cannot. Text: it can, but an `Fp16Cache` cannot hold the model."""
    try:
        from .integrations.transformers.planned import layers_of_config

        layers, positions = layers_of_config(path if path.is_file() else path / "config.json")
    except NotImplementedError as error:
        return f"{error} (the figures are of a StreamingKVCacheFp16)"
    except Exception:  # no transformers, or whatever it raises where it does not know the model
        return None

    def alike(positions: int) -> list[LayersAlike]:
        groups = Counter(plan.group for plan in layers(positions) if plan.attends)
        return [
            LayersAlike(count, ring, heads, head_dim, window)
            for (_, ring, heads, head_dim, window), count in groups.items()
        ]

    states = sum(plan.states > 0 for plan in layers(1))
    remark = f"{states} layers keep recurrent or convolutional states, which are not counted"
    return ReadModel(alike, positions, [remark] if states else [])


def _budget(planned: memory.Plan | ModelPlan, where: str, weights_given: bool) -> list[tuple[str, str, str]]:
    """Rows of the table: what, GB, a remark."""

    def gb(size: int) -> str:
        return f"{size / GB:,.2f} GB" if size == 0 or size >= GB // 100 else f"{size / 1e6:,.2f} MB"

    def most(number: int | None) -> str:
        return "any" if number is None else f"{number:,}"

    both = planned.weights_bytes + planned.total_bytes
    rows = [
        ("weights", gb(planned.weights_bytes), "" if weights_given else "not given: --weights-gb"),
        ("cache, keys and values (FP16)", gb(planned.cache_bytes), f"in FP32: {gb(planned.fp32_bytes)}"),
        ("beside it: state, workspace", gb(planned.beside_bytes), ""),
        ("total", gb(both), f"with a cache in FP32: {gb(both + planned.cache_bytes)}"),
    ]
    if planned.free_bytes is not None:
        verdict = "fits" if planned.fits else f"does not fit: {gb(both - planned.free_bytes)} too much"
        rows += [
            ("free" + where, gb(planned.free_bytes), verdict),
            ("most positions that fit", most(planned.largest_max_positions), f"for a batch of {planned.batch_size:,}"),
            ("largest batch that fits", most(planned.largest_batch_size), f"of {planned.max_positions:,} positions"),
        ]
    return rows


def _device(name: str) -> torch.device:
    """A CUDA device that is there, or the CPU. No CUDA build of this package is needed to plan for a GPU."""
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"plan: --device {name} cannot be used, --free-gb needs none: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"plan: --device must be a CUDA device or cpu, got {name}")
    return device


def print_plan(chosen: argparse.Namespace) -> None:
    """Prints the budget table.

    Raises:
        ValueError: an option or the config is wrong.
    """
    by_numbers = chosen.config is None or chosen.layers or chosen.heads or chosen.head_dim
    read = None if by_numbers else _read_by_transformers(chosen.config)
    shape = None if isinstance(read, ReadModel) else _shape(chosen)
    device, where = None, ""
    if chosen.free_gb is None:
        device = _device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        where = f" on {device}"
    batch = "" if chosen.batch == 1 else f"{chosen.batch:,} sequences of "
    planned: memory.Plan | ModelPlan
    if shape is None:
        assert isinstance(read, ReadModel)
        positions = chosen.positions or read.positions
        if positions is None:
            raise ValueError("plan: --positions is missing")
        free = memory.free_bytes(device) if device is not None else chosen.free_gb
        planned = ModelPlan(read.alike, positions, chosen.batch, device, free, chosen.weights_gb or 0)
        groups = read.alike(positions)
        words = ", ".join(group.words for group in groups)
        print(f"{sum(group.layers for group in groups)} layers, {batch}{positions:,} positions: {words}")
        head_dims, remarks = {group.head_dim for group in groups}, read.remarks
    else:
        planned = memory.plan(
            shape.layers,
            shape.positions or 1,
            shape.heads,
            shape.head_dim,
            chosen.batch,
            device=device,
            free=chosen.free_gb,
            weights_bytes=chosen.weights_gb or 0,
        )
        print(
            f"{planned.num_layers} layers, {batch}{planned.max_positions:,} positions, "
            f"{planned.num_heads} key/value heads of {planned.head_dim}"
        )
        head_dims = {planned.head_dim}
        remarks = [*([read] if isinstance(read, str) else []), *shape.remarks]
    rows = _budget(planned, where, chosen.weights_gb is not None)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, figure, remark in rows:
        print(f"  {name:<{widths[0]}}  {figure:>{widths[1]}}  {remark}".rstrip())
    total = planned.weights_bytes + planned.total_bytes
    sizes = ", ".join(f"{size} GB {'yes' if total <= size * GB else 'no'}" for size in USUAL_GPUS)
    print(f"  fits on an empty GPU of: {sizes}")
    print("  note: activations, other tensors and the CUDA context need room of their own")
    for head_dim in sorted(head_dims):
        if not memory.attention_serves(head_dim):
            print(f"  note: attend needs a head_dim of a multiple of 8, at most 512; {head_dim} can only be read")
    for remark in remarks:
        print(f"  note: {remark}")
