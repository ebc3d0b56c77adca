"""Fixtures: the backends that every test of values runs on, and helpers to compare bit for bit."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import (  # noqa: F401
    CPU_BACKENDS,
    EMULATOR_VARIABLE,
    KERNELS,
    ROOT,
    Backend,
    Unavailable,
    built_emulator,
    using,
)

from kvcache_ext import StreamingKVCacheFp16, build_info

EMULATED_MULTIPROCESSORS = 6  # as in tests/emulator/emulator.cpp
HAS_GPU = build_info.with_cuda and torch.cuda.is_available()


@pytest.fixture(autouse=True)
def gradient_mode() -> Iterator[None]:
    """As it was: a benchmark's main() turns gradients off for the whole process."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


@pytest.fixture(scope="session")
def emulator_library() -> Path:
    """The GPU kernels' own source, compiled to run on a CPU (tests/emulator)."""
    if EMULATOR_VARIABLE in os.environ:
        return Path(os.environ[EMULATOR_VARIABLE])
    try:
        return built_emulator()
    except Unavailable as reason:
        pytest.skip(str(reason))


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if HAS_GPU else "none: what needs one is left out"
    return f"kvcache_ext: {build_info.reason}; GPU: {gpu}"


# Which tests run. Without --all some are left out, and a last line says so.

EMULATED_SHARE = 4  # of the emulated kernels' cases of a test one in so many runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="also what `make test` leaves out: long tests, most emulated cases"
    )


def left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """Long tests, and of each test's cases on the emulated GPU kernels all but every fourth, the first included.

    `@pytest.mark.long("emulated")`: long for the emulated kernels alone.
    """
    out = set()
    counts: dict[str, int] = {}
    for item in items:
        emulated = "emulated" in item.nodeid.partition("[")[2]
        mark = item.get_closest_marker("long")
        if mark is not None and (emulated or not mark.args):
            out.add(item)
        elif emulated:
            name = item.nodeid.partition("[")[0]
            if counts.get(name, 0) % EMULATED_SHARE != 0:
                out.add(item)
            counts[name] = counts.get(name, 0) + 1
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.all or config.option.keyword or any("::" in argument for argument in config.args):
        return
    out = left_out(items)
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]
    config.stash[LEFT_OUT] = len(out)


LEFT_OUT = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: to the process that prints
        session.config.workeroutput["left out"] = session.config.stash.get(LEFT_OUT, 0)
        session.config.workeroutput["notes"] = NOTES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    node.config.stash[LEFT_OUT] = max(node.config.stash.get(LEFT_OUT, 0), output.get("left out", 0))
    NOTES.extend(output.get("notes", []))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(len(os.sched_getaffinity(0)), 14)


NOTES: list[str] = []  # what tests have to say, printed at the end


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for note in NOTES:
        terminalreporter.write_line(note)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line: what was not run."""
    if hasattr(config, "workeroutput") or config.option.collectonly:
        return
    missing = []
    if config.stash.get(LEFT_OUT, 0):
        count = config.stash[LEFT_OUT]
        missing.append(f"{count:,} long tests and cases of emulated kernels (`make test-all` runs them)")
    if not HAS_GPU:
        missing.append("what needs a GPU (`make test` on a machine that has one)")
    if missing:
        print(f"not run: {'; '.join(missing)}")


BACKENDS = [*CPU_BACKENDS] + ([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else [])
DEVICES = ["cpu"] + ([pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else [])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each implementation in turn: the CPU's instruction sets, the GPU kernels emulated on the CPU, and the GPU."""
    emulator = request.getfixturevalue("emulator_library") if request.param == "emulated" else None
    sm90 = zlib.crc32(request.node.nodeid.encode()) % 2 == 0  # some tests try one kernel, others another
    with contextlib.ExitStack() as stack:
        try:
            chosen = stack.enter_context(using(request.param, emulator, sm90))
        except Unavailable as reason:
            pytest.skip(str(reason))
        yield chosen


@pytest.fixture
def emulated_multiprocessors(backend: Backend, request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """How many the emulated GPU has until the test ends: more than usual. Of other backends nothing changes."""
    if not backend.slow:
        yield lambda count: None
        return
    emulator = ctypes.CDLL(str(request.getfixturevalue("emulator_library")))
    yield emulator.kvc_emulate_multiprocessors
    emulator.kvc_emulate_multiprocessors(EMULATED_MULTIPROCESSORS)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is, with the implementation that it uses by itself."""
    return torch.device(request.param, torch.cuda.current_device() if request.param == "cuda" else None)


@pytest.fixture
def gigabytes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests that take gigabytes of a GPU: one at a time, whatever the processes (`-n`), and given back at once."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    with open((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gigabytes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


# For models of transformers (llms.py)


@pytest.fixture
def models(device: torch.device) -> Callable[[str], Any]:
    """Models by family, each made once."""
    from llms import model_of

    return lambda family: model_of(family, device)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Work this small is slower on several, and far slower where others use them too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def counted() -> Iterator[dict[str, int]]:
    from llms import NEAR_TIE

    counts = {"tokens": 0, "near ties": 0}
    yield counts
    NOTES.append(
        f"token identity with a DynamicCache that rounds to FP16: {counts['tokens']} tokens compared, "
        f"{counts['near ties']} sequences parted at near ties (FP64: within {NEAR_TIE})"
    )


needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU, or a CPU build")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor on the CPU, with every NaN made the same one: its payload is nobody's promise."""
    t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t).cpu().contiguous()
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    differing = (bits(got) != bits(want)).nonzero()
    assert len(differing) == 0, f"{len(differing)} elements differ, the first at {differing[0].tolist()}"


def assert_same_kinds(got: torch.Tensor, want: torch.Tensor) -> None:
    """NaN, either infinity and finite numbers in the same places; those about the same."""
    got, want = got.cpu().double(), want.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(want))
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-4)


def poison(cache: StreamingKVCacheFp16) -> None:
    """Fills the whole storage with NaN, so that whatever reads a slot that was not written shows."""
    cache.k_cache.fill_(float("nan"))
    cache.v_cache.fill_(float("nan"))


def make_cache(device: torch.device | Backend, **arguments: object) -> StreamingKVCacheFp16:
    """A poisoned cache; small unless told otherwise."""
    on = device.device if isinstance(device, Backend) else device
    shape = {"num_layers": 2, "max_positions": 8, "num_heads": 2, "head_dim": 8} | arguments
    cache = StreamingKVCacheFp16(**shape, device=on)  # type: ignore[arg-type]
    poison(cache)
    return cache


def as_tensor(numbers: int | list[int] | torch.Tensor) -> torch.Tensor:
    """On the CPU, for the reference."""
    return numbers.cpu() if isinstance(numbers, torch.Tensor) else torch.tensor(numbers, dtype=torch.int64)


class Twin:
    """A cache and its reference: each call is made on both, and `check` compares all there is, bit for bit."""

    def __init__(self, device: torch.device | Backend, **arguments: object) -> None:
        from kvcache_ext import reference

        self.reference = reference
        self.cache = make_cache(device, **arguments)
        self.k_cache = self.cache.k_cache.cpu().clone()
        self.v_cache = self.cache.v_cache.cpu().clone()
        self.state = torch.zeros((3, self.cache.num_layers, self.cache.batch_size), dtype=torch.int64)
        self.state[1] = self.cache.sink_positions
        self.overflow_counts = torch.zeros(self.cache.num_layers, dtype=torch.int64)

    @property
    def _settings(self) -> dict[str, object]:
        return {"sink_positions": self.cache.sink_positions, "saturate": self.cache.overflow == "saturate"}

    def append(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        new_lengths: torch.Tensor | None = None,
        sequences: list[int] | torch.Tensor | None = None,
    ) -> None:
        """`key`, `value`: `[B, T, H, D]` on the cache's device, any strides."""
        self.cache.append(layer, key, value, new_lengths=new_lengths, sequences=sequences)
        self.reference.append(
            self.k_cache,
            self.v_cache,
            self.state,
            self.overflow_counts,
            layer,
            key.cpu(),
            value.cpu(),
            None if new_lengths is None else new_lengths.cpu(),
            sequences=None if sequences is None else as_tensor(sequences),
            **self._settings,
        )

    def append_all(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_lengths: torch.Tensor | None = None,
        sequences: list[int] | torch.Tensor | None = None,
    ) -> None:
        self.cache.append_all(keys, values, new_lengths=new_lengths, sequences=sequences)
        self.reference.append_all(
            self.k_cache,
            self.v_cache,
            self.state,
            self.overflow_counts,
            keys.cpu(),
            values.cpu(),
            None if new_lengths is None else new_lengths.cpu(),
            sequences=None if sequences is None else as_tensor(sequences),
            **self._settings,
        )

    def truncate(self, n: int | list[int] | torch.Tensor, sequences: list[int] | torch.Tensor | None = None) -> None:
        self.cache.truncate(n, sequences=sequences)
        self.reference.truncate(
            self.state,
            n if isinstance(n, int) else as_tensor(n),
            sequences=None if sequences is None else as_tensor(sequences),
            sink_positions=self.cache.sink_positions,
        )

    def drop_newest(self, n: int | list[int] | torch.Tensor, sequences: list[int] | torch.Tensor | None = None) -> None:
        self.cache.drop_newest(n, sequences=sequences)
        self.reference.truncate(
            self.state,
            n if isinstance(n, int) else as_tensor(n),
            sequences=None if sequences is None else as_tensor(sequences),
            sink_positions=self.cache.sink_positions,
            newest=True,
        )

    def reset(self, sequences: list[int] | torch.Tensor | None = None) -> None:
        self.cache.reset(sequences)
        chosen = None if sequences is None else as_tensor(sequences)
        self.reference.reset(self.state, chosen, sink_positions=self.cache.sink_positions)

    def _copy(self, sources: torch.Tensor, destinations: torch.Tensor | None) -> None:
        self.reference.copy_sequences(
            self.k_cache, self.v_cache, self.state, sources, destinations, sink_positions=self.cache.sink_positions
        )

    def reorder(self, batch_indices: list[int] | torch.Tensor) -> None:
        self.cache.reorder(batch_indices)
        self._copy(as_tensor(batch_indices), None)

    def copy_sequence(self, src: int | list[int] | torch.Tensor, dst: int | list[int] | torch.Tensor) -> None:
        self.cache.copy_sequence(src, dst)
        self._copy(as_tensor(src).view(-1), as_tensor(dst).view(-1))

    def copy_from(self, source: Twin, src: int | list[int] | torch.Tensor, dst: int | list[int] | torch.Tensor) -> None:
        """`copy_sequence` with another twin's cache as `source`."""
        self.cache.copy_sequence(src, dst, source=source.cache)
        self.reference.copy_from(
            self.k_cache,
            self.v_cache,
            self.state,
            source.k_cache,
            source.v_cache,
            source.state,
            as_tensor(src).view(-1),
            as_tensor(dst).view(-1),
            sink_positions=self.cache.sink_positions,
        )

    def clear(self) -> None:
        self.cache.clear()
        self.reference.clear(self.state, self.overflow_counts, sink_positions=self.cache.sink_positions)

    def held(self, layer: int, sequence: int) -> list[int]:
        return self.reference.held_positions(
            int(self.state[0, layer, sequence]), int(self.state[1, layer, sequence]), self.cache.sink_positions
        )

    def gather(
        self,
        layer: int,
        indices: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        sequences: list[int] | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """What the reference answers, in the cache's own shape."""
        keys, values = self.reference.gather(
            self.k_cache,
            self.v_cache,
            self.state,
            layer,
            indices.cpu(),
            sink_positions=self.cache.sink_positions,
            dtype=dtype,
            sequences=None if sequences is None else as_tensor(sequences),
        )
        return (keys[0], values[0]) if len(keys) == 1 else (keys, values)

    def check(self) -> None:
        """Storage (untouched slots too), state, counters, lengths, and all that can be read back."""
        cache = self.cache
        assert_same_bits(cache.k_cache, self.k_cache)
        assert_same_bits(cache.v_cache, self.v_cache)
        assert torch.equal(cache.tensors.state.cpu(), self.state)
        assert torch.equal(cache.overflow_counts().cpu(), self.overflow_counts)
        held = [[len(self.held(layer, b)) for b in range(cache.batch_size)] for layer in range(cache.num_layers)]
        assert len(cache) == min(map(min, held))
        assert cache.lengths() == [min(of_sequence) for of_sequence in zip(*held, strict=True)]
        assert cache.device_lengths().tolist() == held
        assert cache.is_empty() == (len(cache) == 0)
        assert cache.position == int(self.state[0].max())
        for layer in range(cache.num_layers):
            everything = torch.arange(max(held[layer]))
            for got, want in zip(cache.get_valid_f32(layer), self.gather(layer, everything), strict=True):
                assert_same_bits(got.cpu(), want)
