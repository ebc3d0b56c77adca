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
from functools import cache
from pathlib import Path

import torch

from . import memory, planning_gpus
from .config_names import Shape, read_config
from .memory import LayerShape, shown_gb
from .multi_gpu import MOST_LAYERS, LayersOf, layers_alike

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
    parser.add_argument("--gpus", type=_positive, metavar="N", help="several GPUs: what each takes, in three ways")
    parser.add_argument(
        "--gpu-gb",
        type=_gigabytes,
        metavar="GB",
        help="memory of each of them, 10^9 bytes (default: what they have free)",
    )


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
class Model:
    """What is planned for: the layers of a model.

    `words` names them, behind a number of positions. `remarks` say what the plan leaves out or counts too much.
    `why_not_by_heads`: as `plan_model_on_gpus` takes it.
    """

    layers: LayersOf
    positions: int
    words: str
    remarks: list[str]
    why_not_by_heads: str | None = None

    def held(self) -> list[LayerShape]:
        """The layers that have keys and values."""
        return [layer for layer in self.layers(self.positions) if layer is not None]


@dataclass(frozen=True)
class ModelPlan:
    """`memory.Plan` for the cache of a model, whose layers may differ."""

    layers: LayersOf
    max_positions: int
    batch_size: int
    device: torch.device | None
    free_bytes: int | None
    weights_bytes: int

    def _plans(self, positions: int, batch: int) -> list[memory.Plan]:
        return memory.plans_of_layers(self.layers(positions), batch, device=self.device)

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
        """The largest number that fits; None: any does, or free memory is not known."""
        if self.free_bytes is None:
            return None
        return memory.largest_that_fits(total_bytes, self.free_bytes - self.weights_bytes)

    @property
    def largest_max_positions(self) -> int | None:
        return self._largest(lambda positions: sum(p.total_bytes for p in self._plans(positions, self.batch_size)))

    @property
    def largest_batch_size(self) -> int | None:
        return self._largest(lambda batch: sum(p.total_bytes for p in self._plans(self.max_positions, batch)))


@dataclass(frozen=True)
class ReadModel:
    """A config.json as transformers reads it."""

    layers: LayersOf
    positions: int | None
    remarks: list[str]
    why_not_by_heads: str | None


def _read_by_transformers(path: Path) -> ReadModel | str | None:
    """None: it cannot. Text: it can, but an `Fp16Cache` cannot hold the model."""
    try:
        from .integrations.transformers.planned import model_of_config

        found = model_of_config(path if path.is_file() else path / "config.json")
    except NotImplementedError as error:
        return f"{error} (the figures are of a StreamingKVCacheFp16)"
    except Exception:  # no transformers, or whatever it raises where it does not know the model
        return None

    @cache
    def shapes(positions: int) -> list[LayerShape | None]:
        return [
            LayerShape(plan.max_positions, plan.heads, plan.head_dim, plan.window) if plan.attends else None
            for plan in found.layers(positions)
        ]

    states = sum(plan.states > 0 for plan in found.layers(1))
    remark = f"{states} layers keep recurrent or convolutional states, which are not counted"
    return ReadModel(shapes, found.positions, [remark] if states else [], found.why_not_by_heads)


def _model(chosen: argparse.Namespace) -> Model:
    """Of the config or the numbers; numbers go before what the config says."""
    by_numbers = chosen.config is None or chosen.layers or chosen.heads or chosen.head_dim
    read = None if by_numbers else _read_by_transformers(chosen.config)
    if isinstance(read, ReadModel):
        positions = chosen.positions or read.positions
        if positions is None:
            raise ValueError("plan: --positions is missing")
        alike = Counter(layer for layer in read.layers(positions) if layer is not None)
        groups = [
            f"{count} of {shape.heads} key/value heads of {shape.head_dim}"
            + ("" if shape.window is None else f" with a window of {shape.window:,}")
            for shape, count in alike.items()
        ]
        return Model(read.layers, positions, f": {', '.join(groups)}", read.remarks, read.why_not_by_heads)
    shape = _shape(chosen)
    if shape.layers > MOST_LAYERS:
        raise ValueError(f"plan: --layers must be at most {MOST_LAYERS:,}, got {shape.layers:,}")
    return Model(
        layers_alike(shape.layers, shape.heads, shape.head_dim),
        shape.positions or 1,
        f", {shape.heads} key/value heads of {shape.head_dim}",
        [*([read] if isinstance(read, str) else []), *shape.remarks],
    )


def _budget(planned: ModelPlan, where: str, weights_given: bool) -> list[tuple[str, str, str]]:
    """Rows of the table: what, GB, a remark."""

    def most(number: int | None) -> str:
        return "any" if number is None else f"{number:,}"

    both = planned.weights_bytes + planned.total_bytes
    rows = [
        ("weights", shown_gb(planned.weights_bytes), "" if weights_given else "not given: --weights-gb"),
        ("cache, keys and values (FP16)", shown_gb(planned.cache_bytes), f"in FP32: {shown_gb(planned.fp32_bytes)}"),
        ("beside it: state, workspace", shown_gb(planned.beside_bytes), ""),
        ("total", shown_gb(both), f"with a cache in FP32: {shown_gb(both + planned.cache_bytes)}"),
    ]
    if planned.free_bytes is not None:
        verdict = "fits" if planned.fits else f"does not fit: {shown_gb(both - planned.free_bytes)} too much"
        rows += [
            ("free" + where, shown_gb(planned.free_bytes), verdict),
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


def _budget_of_one(chosen: argparse.Namespace, model: Model) -> list[str]:
    """The table for one GPU, or for the CPU."""
    device, where, free = None, "", chosen.free_gb
    if free is None:
        device = _device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        where, free = f" on {device}", memory.free_bytes(device)
    planned = ModelPlan(model.layers, model.positions, chosen.batch, device, free, chosen.weights_gb or 0)
    rows = _budget(planned, where, chosen.weights_gb is not None)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"  {name:<{widths[0]}}  {figure:>{widths[1]}}  {remark}".rstrip() for name, figure, remark in rows]
    total = planned.weights_bytes + planned.total_bytes
    sizes = ", ".join(f"{size} GB {'yes' if total <= size * GB else 'no'}" for size in USUAL_GPUS)
    return [*lines, f"  fits on an empty GPU of: {sizes}"]


def print_plan(chosen: argparse.Namespace) -> None:
    """Prints the budget table; with `--gpus`, that of several GPUs.

    Raises:
        ValueError: an option or the config is wrong.
    """
    planning_gpus.check_options(chosen)
    model = _model(chosen)
    held = model.held()
    batch = "" if chosen.batch == 1 else f"{chosen.batch:,} sequences of "
    headline = f"{len(held)} layers, {batch}{model.positions:,} positions{model.words}"
    if chosen.gpus is None:
        lines = [headline, *_budget_of_one(chosen, model)]
    else:
        planned = planning_gpus.plan(chosen, model.layers, model.positions, model.why_not_by_heads)
        lines = [headline, *planning_gpus.lines(planned, chosen.weights_gb is not None)]
    print("\n".join(lines))
    print("  note: activations, other tensors and the CUDA context need room of their own")
    head_dims = {layer.head_dim for layer in held}
    for head_dim in sorted(head_dims):
        if not memory.attention_serves(head_dim):
            print(f"  note: attend needs a head_dim of a multiple of 8, at most 512; {head_dim} can only be read")
    for remark in model.remarks:
        print(f"  note: {remark}")
