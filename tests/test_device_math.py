"""The arithmetic that GPU and CPU kernels share (csrc/kernels/*.h), compiled for the CPU and held against plain C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import KERNELS

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <random>

#include "convert.h"
#include "divide.h"
#include "ring.h"
#ifdef WITH_CUDA_FP16
#include <cuda_fp16.h>
#endif

using namespace kvc;

#define CHECK(condition)                                        \
  do {                                                          \
    if (!(condition)) {                                         \
      std::printf("line %d: %s\n", __LINE__, #condition);       \
      std::exit(1);                                             \
    }                                                           \
  } while (0)

int main() {
  std::mt19937_64 random(1);
  // Division: every small divisor, the edges, and random ones of every size.
  for (int i = 0; i < 2000000; ++i) {
    const uint32_t d = i < 5000 ? i + 1 : static_cast<uint32_t>(random() >> (33 + random() % 31)) + 1;
    const FastDivider fast = FastDivider::by(d);
    const uint32_t any = static_cast<uint32_t>(random() >> 33);
    for (const uint32_t n : {0u, 1u, d - 1, d, d + 1, 2 * d - 1, any, 0x7fffffffu}) {
      if (n < 0x80000000u) CHECK(fast(n) == n / d);
    }
    const int64_t wide_d = static_cast<int64_t>(random() >> (1 + random() % 62)) + (i < 5000 ? 1 : 0);
    if (wide_d == 0) continue;
    const Divider wide = Divider::by(wide_d);
    const int64_t some = static_cast<int64_t>(random() >> 1);
    for (const int64_t n : {int64_t{0}, wide_d - 1, wide_d, some, some / wide_d * wide_d, INT64_MAX}) {
      CHECK(wide.div(n) == n / wide_d);
      CHECK(wide.mod(n) == n % wide_d);
    }
  }
  // Slots: a plan's answer for every row is where a loop that appends one by one puts it.
  for (int positions = 1; positions <= 7; ++positions) {
    for (int sinks = 0; sinks < positions; ++sinks) {
      CacheView c{};
      c.positions = positions;
      c.sinks = sinks;
      c.ring = Divider::by(positions - sinks);
      for (int seen = 0; seen < 25; ++seen) {
        for (int rows = 0; rows < 20; ++rows) {
          for (int appended = 0; appended <= rows; ++appended) {
            int64_t last_row_of_slot[8];
            for (auto& row : last_row_of_slot) row = -1;
            for (int j = 0; j < appended; ++j) {
              const int p = seen + j;
              last_row_of_slot[p < sinks ? p : sinks + (p - sinks) % (positions - sinks)] = rows - appended + j;
            }
            const AppendPlan plan = AppendPlan::make(seen, rows, appended, c);
            for (int row = 0; row < rows; ++row) {
              int64_t want = row < rows - appended ? kPadding : kNoSlot;
              for (int s = 0; s < positions; ++s) {
                if (last_row_of_slot[s] == row) want = s;
              }
              CHECK(plan.slot(row) == want);
            }
          }
        }
      }
    }
  }
  // Conversions: every FP16 pattern there and back, and against CUDA's own host function where a toolkit has one.
  for (uint32_t h = 0; h < 65536; ++h) {
    const float x = half_to_float(static_cast<uint16_t>(h));
    if (x == x) CHECK(float_to_half(x) == h);
  }
#ifdef WITH_CUDA_FP16
  for (uint64_t u = 0; u < (uint64_t{1} << 32); u += 251) {
    const float x = bits_float(static_cast<uint32_t>(u));
    const __half_raw want = static_cast<__half_raw>(__float2half_rn(x));
    if (x == x) CHECK(float_to_half(x) == want.x);
  }
#endif
  std::puts("all equal");
}
"""


@pytest.mark.parametrize("sanitize", [False, True])
def test_shared_arithmetic(tmp_path: Path, sanitize: bool) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "math.cpp", tmp_path / "math"
    source.write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O2", "-Wall", f"-I{KERNELS}", str(source), "-o", str(program)]
    if sanitize:
        command += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
        tops = [line.split("=", 1)[1] for line in listing.stderr.splitlines() if line.startswith("#$ TOP=")]
        if tops and (Path(tops[0]) / "include" / "cuda_fp16.h").is_file():
            command += ["-DWITH_CUDA_FP16", f"-isystem{Path(tops[0]) / 'include'}"]
    subprocess.run(command, check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=False).stdout == "all equal\n"
