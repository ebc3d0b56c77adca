"""What the machine can do at most, measured in the same run as whatever is held against it.

On a GPU the ceilings are plain CUDA kernels that torch compiles at run time: loops over contiguous memory without any
bookkeeping, and an empty kernel; or torch's own op, where that is faster or they cannot be compiled. On a CPU the
ceiling is memcpy on every thread.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    Measurement,
    Results,
    Work,
    compare,
    cpu_sampler,
    eager_sampler,
    fill_random,
    free_bytes,
    graph_sampler,
    host_sampler,
    on_gpu,
)
from torch import Tensor

ROUNDS = 9
EMPTY_LAUNCHES = 1024  # in a graph

# Every thread has kUnroll 16-byte accesses under way; neighbouring threads access neighbouring 16 bytes.
KERNELS = r"""
constexpr int kThreads = 256, kUnroll = 4;

extern "C" __global__ void empty() {}

extern "C" __global__ void __launch_bounds__(kThreads) read_only(const uint4* in, unsigned* out, int count) {
  const int start = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  uint4 v[kUnroll];
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    v[u] = start + u * kThreads < count ? in[start + u * kThreads] : make_uint4(0, 0, 0, 0);
  }
  unsigned mixed = 0;
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) mixed += (v[u].x ^ v[u].y) + (v[u].z ^ v[u].w);
  if (mixed == 0x9e3779b9u) *out = mixed;  // next to never, but the compiler cannot know
}

extern "C" __global__ void __launch_bounds__(kThreads) copy(const uint4* in, uint4* out, int count) {
  const int start = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  uint4 v[kUnroll];
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (start + u * kThreads < count) v[u] = in[start + u * kThreads];
  }
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (start + u * kThreads < count) out[start + u * kThreads] = v[u];
  }
}

__device__ __forceinline__ unsigned two_halves(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

extern "C" __global__ void __launch_bounds__(kThreads) narrow(const float4* in, uint4* out, int count) {
  const int start = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  float4 low[kUnroll], high[kUnroll];
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = start + u * kThreads;
    if (i < count) {
      low[u] = in[2ll * i];
      high[u] = in[2ll * i + 1];
    }
  }
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = start + u * kThreads;
    if (i < count) {
      out[i] = make_uint4(two_halves(low[u].x, low[u].y), two_halves(low[u].z, low[u].w),
                          two_halves(high[u].x, high[u].y), two_halves(high[u].z, high[u].w));
    }
  }
}

__device__ __forceinline__ float one_float(unsigned half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(half)));
  return value;
}

extern "C" __global__ void __launch_bounds__(kThreads) widen(const uint2* in, float4* out, int count) {
  const int start = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  uint2 v[kUnroll];
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = start + u * kThreads;
    if (i < count) v[u] = in[i];
  }
  #pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = start + u * kThreads;
    if (i < count) {
      out[i] = make_float4(one_float(v[u].x & 0xffff), one_float(v[u].x >> 16), one_float(v[u].y & 0xffff),
                           one_float(v[u].y >> 16));
    }
  }
}
"""
KERNEL_TILE = 256 * 4  # vectors a block
MOST_VECTORS = 1 << 30  # of 16 bytes, of a launch: they are counted in 32 bits

# Launching from C, as an extension does: a Python loop would add its own time to every launch.
LAUNCHER = r"""
typedef unsigned int u;
typedef int (*Launch)(void*, u, u, u, u, u, u, u, void*, void**, void**);

int launch_many(Launch launch, void* kernel, void* stream, int count) {
  int error = 0;
  for (int i = 0; i < count && error == 0; ++i) error = launch(kernel, 1, 1, 1, 1, 1, 1, 0, stream, 0, 0);
  return error;
}
"""


@dataclass
class Ceilings:
    """Rates in bytes read plus written a second; launches in seconds. None: not measured on this device."""

    copy: float
    narrow: float  # FP32 -> FP16
    widen: float  # FP16 -> FP32
    read: float | None = None
    launch_in_graph: float | None = None
    launch_on_host: float | None = None
    peers: dict[str, dict[str, float]] = field(default_factory=dict)  # torch's own ops for the same work
    how: dict[str, str] = field(default_factory=dict)

    def append(self, dtype: torch.dtype) -> float:
        return self.narrow if dtype == torch.float32 else self.copy

    def record(self, results: Results) -> None:
        """Writes them down as measurements of their own."""
        rates = {"copy": self.copy, "read": self.read, "fp32_to_fp16": self.narrow, "fp16_to_fp32": self.widen}
        for name, rate in rates.items():
            if rate is not None:
                peers = {peer: value / 1e12 for peer, value in self.peers.get(name, {}).items()}
                config = {"how": self.how[name]}
                results.add(Measurement(f"ceiling/{name}", rate / 1e12, "TB/s", peers=peers, config=config))
        for name, seconds in {"launch/graph": self.launch_in_graph, "launch/host": self.launch_on_host}.items():
            if seconds is not None:
                results.add(Measurement(f"ceiling/{name}", seconds * 1e6, "us", config={"how": self.how[name]}))


def measure(device: torch.device, quick: bool = False) -> Ceilings:
    return _measure_gpu(device, quick) if on_gpu(device) else _measure_cpu(device, quick)


def read_rate(device: torch.device, quick: bool) -> float:
    """Bytes a second that can be read at most, where that alone is wanted."""
    if not on_gpu(device):
        return measure(device, True).copy / 2  # of a copy, half is reading
    size = 1 << (28 if quick else 32)
    while True:  # smaller where another program has the memory
        try:
            source = fill_random(torch.empty(size // 4, device=device))
            break
        except torch.OutOfMemoryError:
            size //= 2
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    read = plain_kernel("read_only", size // 16, source, sink)
    sampler = graph_sampler(read if read is not None else lambda: source.sum())
    return size / compare({"": sampler}, 3 if quick else ROUNDS)[""].seconds


def matmul_rate(device: torch.device, dtype: torch.dtype, quick: bool, results: Results) -> float:
    """FLOP a second of torch's product of two square matrices of this dtype; also written down as a measurement."""
    rows = (512 if quick else 8_192) if on_gpu(device) else (256 if quick else 2_048)
    a, b = (fill_random(torch.empty(rows, rows, dtype=dtype, device=device)) for _ in range(2))
    out = torch.empty_like(a)

    def work() -> object:
        return torch.mm(a, b, out=out)

    sampler = eager_sampler(work) if on_gpu(device) else cpu_sampler(work)
    rate = 2 * rows**3 / compare({"": sampler}, 3 if quick else ROUNDS)[""].seconds
    name = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    config = {"how": f"torch.mm of [{rows:,}, {rows:,}]"}
    results.add(Measurement(f"ceiling/matmul/{name}", rate / 1e12, "TFLOP/s", config=config))
    return rate


# A CPU


def _measure_cpu(device: torch.device, quick: bool) -> Ceilings:
    size = (1 << 26) if quick else min(1 << 30, free_bytes(device) // 8)
    source = fill_random(torch.empty(size // 4))
    target = fill_random(torch.empty_like(source))
    threads = torch.get_num_threads()
    part = size // threads // 64 * 64

    def memcpy(start: int) -> None:  # ctypes lets go of the interpreter's lock
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, part)

    with ThreadPoolExecutor(threads) as pool:
        samplers = {
            "memcpy": cpu_sampler(lambda: list(pool.map(memcpy, range(0, part * threads, part)))),
            "torch copy_": cpu_sampler(lambda: target.copy_(source)),
        }
        timings = compare(samplers, ROUNDS)
    rates = {
        "memcpy": 2 * part * threads / timings["memcpy"].seconds,
        "torch copy_": 2 * target.nbytes / timings["torch copy_"].seconds,
    }
    best = max(rates, key=lambda name: rates[name])
    how = dict.fromkeys(("copy", "fp32_to_fp16", "fp16_to_fp32"), f"{best} of {size:,} bytes, {threads} threads")
    peers = {"copy": {"torch copy_": rates["torch copy_"]}}
    return Ceilings(rates[best], rates[best], rates[best], peers=peers, how=how)


# A GPU


@functools.cache
def _compiled(name: str) -> Any | None:
    """One of KERNELS: a `torch.cuda._utils._CudaKernel`. None where this torch or this machine cannot compile it."""
    compiler = getattr(torch.cuda, "_compile_kernel", None)
    if compiler is None:
        return None
    try:
        return compiler(KERNELS, name)
    except (RuntimeError, OSError, AttributeError, AssertionError) as error:
        print(f"The plain kernel {name!r} could not be compiled, torch's own op stands in: {str(error)[:300]}")
        return None


def _measure_gpu(device: torch.device, quick: bool) -> Ceilings:
    # 4 GiB of source on a large GPU, so that no cache helps.
    size = 1 << 28 if quick else 1 << min(32, (free_bytes(device) // 6).bit_length() - 1)
    floats = fill_random(torch.empty(size // 4, device=device))
    copied = torch.empty_like(floats)
    halves = torch.empty(size // 4, dtype=torch.float16, device=device)
    found = Ceilings(0.0, 0.0, 0.0)

    def settle(name: str, bytes_moved: int, torch_op: Work, plain: Work | None) -> float:
        """The rate of the faster of the two."""
        samplers = {"torch copy_": graph_sampler(torch_op)}
        if plain is not None:
            samplers["plain kernel"] = graph_sampler(plain)
        rates = {contender: bytes_moved / t.seconds for contender, t in compare(samplers, ROUNDS).items()}
        winner = max(rates, key=lambda contender: rates[contender])
        found.peers[name] = {"torch copy_": rates["torch copy_"]}
        found.how[name] = f"{winner}, {bytes_moved:,} bytes read and written"
        return rates[winner]

    # torch's copy_ within one dtype is a memcpy, which a graph may hand to a copy engine: slower than a kernel.
    copy = plain_kernel("copy", size // 16, floats, copied)
    if copy is not None:
        copy()
        _check_equal("copy", copied, floats)
    found.copy = settle("copy", 2 * size, lambda: copied.copy_(floats), copy)

    narrow = plain_kernel("narrow", size // 32, floats, halves)
    if narrow is not None:
        narrow()
        _check_equal("narrow", halves, floats.half())
    found.narrow = settle("fp32_to_fp16", size + size // 2, lambda: halves.copy_(floats), narrow)

    widen = plain_kernel("widen", size // 16, halves, copied)
    if widen is not None:
        copied.zero_()
        widen()
        _check_equal("widen", copied, halves.float())
    found.widen = settle("fp16_to_fp32", size + size // 2, lambda: copied.copy_(halves), widen)

    sink = torch.zeros(1, dtype=torch.int32, device=device)
    read_only = plain_kernel("read_only", size // 16, floats, sink)
    if read_only is not None:
        found.read = size / compare({"": graph_sampler(read_only)}, ROUNDS)[""].seconds
        found.how["read"] = f"plain kernel, {size:,} bytes read"

    _measure_launches(found, device)
    return found


def plain_kernel(name: str, vectors: int, source: Tensor, target: Tensor) -> Work | None:
    """A function that launches one of KERNELS over `vectors` items, or None where it cannot be compiled."""
    assert vectors <= MOST_VECTORS
    kernel = _compiled(name)
    if kernel is None:
        return None
    blocks = (vectors + KERNEL_TILE - 1) // KERNEL_TILE
    return lambda: kernel(grid=(blocks, 1, 1), block=(256, 1, 1), args=[source, target, vectors])


def _check_equal(name: str, got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        raise RuntimeError(f"the plain kernel {name!r} does not compute what torch does: its time means nothing")


def _measure_launches(ceilings: Ceilings, device: torch.device) -> None:
    """What one launch of the cheapest kernel costs: within a graph, and the host in eager mode."""
    empty = _compiled("empty")
    one = torch.zeros(1, device=device)
    what = "add_ to one element" if empty is None else "an empty kernel"

    def launch(times: int) -> None:
        for _ in range(times):
            if empty is None:
                one.add_(1)
            else:
                empty(grid=(1, 1, 1), block=(1, 1, 1))

    in_graph = graph_sampler(lambda: launch(EMPTY_LAUNCHES), EMPTY_LAUNCHES)
    ceilings.launch_in_graph = compare({"": in_graph}, ROUNDS)[""].seconds
    ceilings.how["launch/graph"] = f"{what}, one of {EMPTY_LAUNCHES} in a graph"

    from_c = None if empty is None else _launcher(empty)
    on_host = host_sampler(from_c or (lambda: launch(32)), device, 32)
    ceilings.launch_on_host = compare({"": on_host}, ROUNDS)[""].seconds
    caller = "C" if from_c else "Python, whose own time is in it"
    ceilings.how["launch/host"] = f"{what}, one of 32 launched from {caller}"


def _launcher(kernel: Any) -> Work | None:
    """Launches `kernel` 32 times from compiled C. None where there is no C compiler."""
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "launcher.c"), Path(folder, "launcher.so")
        source.write_text(LAUNCHER)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            launch_many = ctypes.CDLL(str(library)).launch_many  # stays loaded when the file has gone
            driver_launch = ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p)
        except (OSError, subprocess.CalledProcessError):
            return None
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def launch() -> None:
        error = launch_many(driver_launch, kernel.func, stream, 32)
        if error != 0:
            raise RuntimeError(f"cuLaunchKernel: error {error}")

    return launch
