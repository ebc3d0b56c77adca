"""The emulator's sm_90a: bulk copies, barriers, products of warpgroups; what it says of kernels that misuse them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import KERNELS, ROOT

# One warpgroup loads, another multiplies: scores of 64 queries with tiles of keys, and their sums with the values, as
# the kernel for many queries has it, without softmax.
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <random>

#include "hopper.cuh"
#include "launch.h"
#include "tensor_map.h"

namespace kvc {  // which emulator.cpp calls, and this program does not
cudaError_t launch_append(const AppendParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_gather(const GatherParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_attend(const AttendParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_copy_sequences(const CopySequencesParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_copy_from(const CopyFromParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_truncate(const TruncateParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_merge(const MergeParams&, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace kvc
using namespace kvc;

constexpr int kKeys = 64, kTiles = 5, kStages = 2, kPanel = 128 * kKeys, kDim = 128;
constexpr int kTile = 2 * kPanel, kQueriesBytes = 2 * 128 * 64;

struct Shared {
  uint64_t full[kStages], empty[kStages];
};
constexpr int kBytes = 1024 + kQueriesBytes + 2 * kStages * kTile + sizeof(Shared);

int fault = 0;  // what the kernel does wrong
#define UNLESS(number, ...) do { if (fault != number) { __VA_ARGS__; } } while (0)

__global__ void kernel(const uint16_t* queries, CUtensorMap keys, CUtensorMap values, int head, int row0, float* out) {
  KVC_DYNAMIC_SHARED(bytes);
  char* const at = bytes + (1024 - shared_address(bytes) % 1024) % 1024 + (fault == 1 ? 16 : 0);
  Shared& shared = *reinterpret_cast<Shared*>(at + kQueriesBytes + 2 * kStages * kTile);
  char* const tiles = at + kQueriesBytes;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared.full + i, 1);
      init_barrier(shared.empty + i, fault == 2 ? 3 : 4);
    }
    UNLESS(3, show_barriers());
  }
  UNLESS(4, __syncthreads());
  if (thread < 128) {
    give_registers<40>();
    if (thread != 0) return;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages;
      UNLESS(5, wait_barrier(shared.empty + stage, tile / kStages % 2 ^ 1));
      arrive_and_expect(shared.full + stage, 2 * kTile - (fault == 6 ? 2 : 0));
      for (int panel = 0; panel < 2; ++panel) {
        char* to = tiles + 2 * stage * kTile + panel * kPanel;
        copy_box(to, &keys, shared.full + stage, 64 * panel, head, row0 + tile * kKeys, 1);
        copy_box(to + kTile, &values, shared.full + stage, 64 * panel, head, row0 + tile * kKeys, 1);
      }
    }
    return;
  }
  take_registers<240>();
  const int own = thread - 128;
  for (int i = own; i < 64 * kDim; i += 128) {
    const int row = i / kDim, d = i % kDim;
    const uint32_t place = d / 64 * 64 * 128 + row * 128 + d % 64 * 2;
    *reinterpret_cast<uint16_t*>(at + (place ^ (row % 8) << 4)) = queries[i];
  }
  UNLESS(7, fence_for_products());
  UNLESS(8, sync_threads(3, 128));
  FragmentC sums[kDim / 8] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    const char* tile_keys = tiles + 2 * stage * kTile;
    UNLESS(9, wait_barrier(shared.full + stage, tile / kStages % 2));
    FragmentC scores[kKeys / 8];
    UNLESS(10, begin_products());
    for (int k = 0; k < kDim / 16; ++k) {
      if (fault == 11 && threadIdx.x / 32 == 6 && tile == 3) continue;
      multiply_add_rows(scores, operand_after(operand_at(at, 0), k / 4 * 64 * 128 + k % 4 * 32),
                        operand_after(operand_at(tile_keys, 0), k / 4 * kPanel + k % 4 * 32), k > 0);
    }
    end_products();
    UNLESS(12, wait_for_products<0>());
    hold_products(scores);
    FragmentA rounded[kKeys / 16];
    for (int n = 0; n < kKeys / 16; ++n) {
      for (int j = 0; j < 4; ++j) {
        const FragmentC& from = scores[2 * n + j / 2];
        rounded[n].x[j] = float_to_half(from.x[j % 2 * 2]) |
                          static_cast<uint32_t>(float_to_half(from.x[j % 2 * 2 + 1])) << 16;
      }
    }
    begin_products();
    for (int n = 0; n < kKeys / 16; ++n) {
      multiply_add_columns(sums, rounded[n], operand_after(operand_at(tile_keys + kTile, kPanel), n * 16 * 128), true);
    }
    end_products();
    if (fault == 13) {
      if (own % 32 == 0) arrive(shared.empty + stage);
      wait_for_products<0>();
    } else {
      wait_for_products<0>();
      hold_products(sums);
      if (own % 32 == 0 && !(fault == 14 && own == 32)) arrive(shared.empty + stage);
    }
  }
  const int lane = own % 32, row = own / 32 * 16 + lane / 4;
  for (int i = 0; i < kDim / 8; ++i) {
    for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * kDim + 8 * i + lane % 4 * 2 + e % 2] = sums[i].x[e];
  }
  if (fault == 15) sync_threads(4, 256);
  if (fault == 16) sync_threads(4, own < 32 ? 128 : 96);
}

int main(int, char** arguments) {
  fault = std::atoi(arguments[1]);
  emulator::gpu = {9, 0, 232448};
  constexpr int kLayers = 2, kBatch = 3, kHeads = 2, kPositions = 350;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> keys(kLayers * kBatch * kPositions * kHeads * kDim + 8), values = keys, queries(64 * kDim + 8);
  for (auto* all : {&keys, &values, &queries}) {
    for (uint16_t& x : *all) x = float_to_half(normal(random) * 0.25f);
  }
  const auto aligned = [](std::vector<uint16_t>& v) {
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
  };
  CacheView cache = {};
  cache.k_cache = aligned(keys);
  cache.v_cache = aligned(values);
  cache.layers = kLayers, cache.batch = kBatch, cache.positions = kPositions, cache.heads = kHeads;
  cache.head_dim = kDim;
  if (!tensor_maps_serve(cache)) return 2;
  CacheView other = cache;
  other.head_dim = 12;
  if (tensor_maps_serve(other)) return 3;
  other = cache;
  other.positions = int64_t{1} << 31;
  if (tensor_maps_serve(other)) return 4;
  double worst = 0;
  for (int turn = 0; turn < 60 && worst < 1e-2; ++turn) {
    const int row0 = turn % 70, head = turn % 2, layer = turn / 2 % 2;  // the last ones reach past the end
    CUtensorMap key_map, value_map;
    if (make_tensor_map(&key_map, cache, cache.k_cache, layer, kKeys) != cudaSuccess) return 5;
    if (make_tensor_map(&value_map, cache, cache.v_cache, layer, kKeys) != cudaSuccess) return 6;
    std::vector<float> out(64 * kDim);
    cudaLaunchConfig_t config;
    config.gridDim = dim3(1), config.blockDim = dim3(256), config.dynamicSmemBytes = kBytes;
    const cudaError_t error =
        cudaLaunchKernelEx(&config, kernel, queries.data(), key_map, value_map, head, row0, out.data());
    if (error != cudaSuccess) return 7;
    std::vector<double> want(64 * kDim);
    for (int q = 0; q < 64; ++q) {
      for (int row = row0; row < row0 + kTiles * kKeys && row < kPositions; ++row) {
        const int64_t at = ((int64_t{layer} * kBatch + 1) * kPositions + row) * kHeads * kDim + head * kDim;
        double score = 0;
        for (int d = 0; d < kDim; ++d) {
          score += half_to_float(queries[q * kDim + d]) * half_to_float(cache.k_cache[at + d]);
        }
        score = half_to_float(float_to_half(static_cast<float>(score)));
        for (int d = 0; d < kDim; ++d) want[q * kDim + d] += score * half_to_float(cache.v_cache[at + d]);
      }
    }
    for (size_t i = 0; i < want.size(); ++i) {
      worst = std::fmax(worst, std::isnan(out[i]) ? 1e9 : std::fabs(out[i] - want[i]));
    }
  }
  std::printf("%g\n", worst);
  return worst < 1e-2 ? 0 : 1;
}
"""

FAULTS = {  # number: what it is, and what the emulator says, where that is not a wrong answer
    1: ("panels begin 16 bytes late", "no multiple of 1,024 bytes"),
    2: ("a barrier of too few arrivals", ""),
    3: ("no show_barriers", "nobody has shown"),
    4: ("no barrier behind init_barrier", "nobody initialised"),
    5: ("no wait for an empty stage", ""),
    6: ("bytes announced that do not come", "never reaches"),
    7: ("no fence behind stores of an operand", ""),
    8: ("no barrier behind stores of an operand", ""),
    9: ("no wait for a full stage", ""),
    10: ("no begin_products", "without begin_products"),
    11: ("a warp leaves out a product", "products"),
    12: ("no wait for scores", ""),
    13: ("a stage given back before its products are done", ""),
    14: ("a warp never gives a stage back", "never reaches"),
    15: ("a named barrier that half of its threads reach", "never reaches"),
    16: ("a named barrier of 96 and of 128 threads", "different numbers"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulator with")
    folder = tmp_path_factory.mktemp("hopper")
    (folder / "program.cu").write_text(PROGRAM)
    emulator = ROOT / "tests" / "emulator"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", f"-I{emulator}", f"-I{KERNELS}"]
    command += ["-x", "c++", str(folder / "program.cu"), str(emulator / "emulator.cpp")]
    subprocess.run([*command, str(KERNELS / "tensor_map.cu"), "-o", str(folder / "program")], check=True)
    return folder / "program"


def run(program: Path, fault: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), str(fault)], capture_output=True, text=True, timeout=300)


def test_sm90a(program: Path) -> None:
    """Bulk copies past the end of a cache too, of each layer, head and sequence; limits of tensor maps."""
    done = run(program, 0)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fault", FAULTS, ids=lambda number: FAULTS[number][0].replace(" ", "_"))
def test_faults_are_noticed(program: Path, fault: int) -> None:
    done = run(program, fault)
    assert done.returncode != 0
    assert FAULTS[fault][1] in done.stderr
