// Shows what compute-sanitizer's racecheck makes of barriers that only some of a block's warps pass: two pairs of warps
// pass their own so many times, then exchange a value behind a barrier of the whole block. There is no race, and
// racecheck reports one whenever the two numbers differ (docs/reliability.md, which this is the evidence for):
//
//   nvcc -arch=native -lineinfo -o racecheck_barriers tests/racecheck_barriers.cu
//   compute-sanitizer --tool racecheck ./racecheck_barriers 3 3    # 0 hazards
//   compute-sanitizer --tool racecheck ./racecheck_barriers 3 1    # 1 hazard
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kPair = 64;

__global__ void exchange(int first, int second, float* out) {
  __shared__ float own[2][kPair];
  __shared__ float all[2 * kPair];
  const unsigned thread = threadIdx.x;
  const unsigned pair = thread / kPair;
  const auto sync_pair = [&] { asm volatile("bar.sync %0, 64;\n" ::"r"(pair + 1) : "memory"); };
  float x = static_cast<float>(thread);
  for (int turn = pair == 0 ? first : second; turn > 0; --turn) {
    own[pair][thread % kPair] = x;
    sync_pair();
    x += own[pair][(thread + 32) % kPair];
    sync_pair();
  }
  all[thread] = x;
  __syncthreads();
  out[thread] = x + all[(thread + kPair) % (2 * kPair)];
}

}  // namespace

int main(int argc, char** argv) {
  const int first = argc > 1 ? std::atoi(argv[1]) : 3;
  const int second = argc > 2 ? std::atoi(argv[2]) : 1;
  float* out = nullptr;
  cudaError_t error = cudaMalloc(&out, 2 * kPair * sizeof(float));
  if (error == cudaSuccess) {
    exchange<<<1, 2 * kPair>>>(first, second, out);
    error = cudaDeviceSynchronize();
  }
  std::printf("%d and %d turns: %s\n", first, second, cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 1;
}
