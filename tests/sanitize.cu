// Every kernel over many shapes without torch, for compute-sanitizer (`make sanitize`): buffers come straight from
// cudaMalloc, so that reading what nobody wrote, or past an end, is seen. Values are the other tests' affair; here it
// is only asked that launches succeed and that the last answer of each FP32 shape is finite.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/kernels/launch.h"
#include "../csrc/kernels/layout.h"

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("sanitize: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t size;
  explicit Buffer(size_t n) : size(n) { check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc"); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  void set(const std::vector<T>& from) {
    check(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void zero() { check(cudaMemset(data, 0, size * sizeof(T)), "cudaMemset"); }
  void get(std::vector<T>& to) const {
    check(cudaMemcpy(to.data(), data, to.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
};

uint32_t random_state = 1;
float random_float() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(random_state >> 8) / (1 << 23) - 1.0f;
}

struct Shape {
  int64_t layers, batch, positions, sinks, heads, head_dim, group;
};

void run(const Shape& s, kvc::DType dtype) {
  const int64_t entries = s.layers * s.batch;
  const size_t cache_elements = static_cast<size_t>(entries * s.positions * s.heads * s.head_dim);
  Buffer<uint16_t> keys(cache_elements), values(cache_elements);  // never initialised as a whole
  Buffer<int64_t> state(3 * entries), overflows(s.layers), lengths(s.batch);
  std::vector<int64_t> start(3 * entries, 0);
  for (int64_t i = 0; i < entries; ++i) start[entries + i] = s.sinks;
  state.set(start);
  overflows.zero();
  const kvc::CacheView cache{keys.data,   values.data, state.data, s.layers, s.batch,
                             s.positions, s.heads,     s.head_dim, s.sinks,  kvc::Divider::by(s.positions - s.sinks)};

  const int64_t most = s.positions + 5;
  const size_t input_elements = static_cast<size_t>(s.layers * s.batch * most * s.heads * s.group * s.head_dim);
  Buffer<float> input(input_elements), output(2 * input_elements),
      lse(static_cast<size_t>(s.batch * 16 * s.heads * s.group));
  std::vector<float> numbers(input_elements);
  for (float& x : numbers) {
    x = random_float();
    if (dtype != kvc::DType::f32) {  // two 16-bit numbers of about that size
      const uint32_t half = dtype == kvc::DType::f16 ? 0x3800u : 0x3f00u;
      const uint32_t bits = half | half << 16 | (random_state >> 9 & 0x007f007fu);
      static_assert(sizeof bits == sizeof x, "");
      __builtin_memcpy(&x, &bits, sizeof x);
    }
  }
  input.set(numbers);

  kvc::ChosenSequences chosen;
  const auto rows = [&](int64_t count, int64_t heads, bool htd) {
    const int64_t row = htd ? s.head_dim : heads * s.head_dim;
    const int64_t head = htd ? count * s.head_dim : s.head_dim;
    const int64_t sequence = count * heads * s.head_dim;
    return kvc::Rows<const void*>{input.data, s.batch * sequence, sequence, row, head};
  };
  const auto append_params = [&](int64_t layer, int64_t layers, int64_t count, bool htd, bool ragged) {
    return kvc::AppendParams{cache,
                             overflows.data,
                             layer,
                             layers,
                             count,
                             rows(count, s.heads, htd),
                             rows(count, s.heads, htd),
                             dtype,
                             ragged ? lengths.data : nullptr,
                             false,
                             true,
                             chosen};
  };
  const auto append = [&](int64_t layer, int64_t layers, int64_t count, bool htd, bool ragged) {
    std::vector<int64_t> of_each(static_cast<size_t>(s.batch));
    for (size_t i = 0; i < of_each.size(); ++i) of_each[i] = static_cast<int64_t>(i) % (count + 1);
    lengths.set(of_each);
    check(kvc::launch_append(append_params(layer, layers, count, htd, ragged), nullptr), "append");
  };
  Buffer<float> workspace(1024 + 132 * 16 * 514);
  workspace.zero();
  bool settled = false;
  const auto attend = [&](int64_t layer, int64_t count, bool appends, bool ragged, int64_t window) {
    kvc::AttendParams p{};
    p.settled = settled;
    p.cache = cache;
    p.layer = layer;
    p.rows = count;
    p.query_heads = s.heads * s.group;
    p.query = rows(count, p.query_heads, false);
    p.out = {output.data, 0, p.query.batch_stride, p.query.row_stride, p.query.head_stride};
    p.lse = lse.data;
    p.dtype = dtype;
    p.scale = 0.1f;
    p.window = window;
    p.appends = appends;
    p.append = append_params(layer, 1, count, false, ragged);
    p.sequences = chosen;
    p.partials = workspace.data + 1024;
    p.tickets = reinterpret_cast<uint32_t*>(workspace.data);
    p.partial_floats = static_cast<int64_t>(workspace.size) - 1024;
    check(kvc::launch_attend(p, nullptr), "attend");
    if (appends && count > 1) check(kvc::launch_append(p.append, nullptr), "append");
  };
  const auto gather = [&](int64_t count, const int64_t* indices) {
    kvc::GatherParams p{};
    p.cache = cache;
    p.rows = count;
    p.start = -2;
    p.indices = indices;
    p.indices_stride = 1;
    const int64_t row = s.heads * s.head_dim;
    p.key = {output.data, 0, count * row, row, s.head_dim};
    p.value = {output.data + input_elements, 0, count * row, row, s.head_dim};
    p.dtype = dtype;
    p.sequences = chosen;
    check(kvc::launch_gather(p, nullptr), "gather");
  };

  attend(0, 1, false, false, 0);  // nothing is held
  append(0, s.layers, 1, false, false);
  append(0, 1, 7, true, false);
  append(0, s.layers, 3, false, true);
  for (const int64_t count : {1, 2, 5, 16}) {
    attend(0, count, false, false, 0);
    attend(0, count, true, count == 5, count == 2 ? 3 : 0);
  }
  append(0, 1, s.positions / 2 + 3, false, false);
  append(0, 1, s.positions + 5, true, false);
  for (int i = 0; i < 20; ++i) attend(0, 1, true, false, 0);
  // Layers in turn, as in a model: each is left alone by the launch before.
  settled = s.layers > 1;
  for (int i = 0; i < 10; ++i) attend((i + 1) % s.layers, 1, i % 3 != 0, false, 0);
  settled = false;
  attend(0, 16, true, true, 9);
  Buffer<int64_t> indices(64);
  std::vector<int64_t> some(64);
  for (size_t i = 0; i < some.size(); ++i) some[i] = static_cast<int64_t>(i * 7 % 40) - 3;
  indices.set(some);
  gather(kvc::imin(s.positions, 64), indices.data);
  gather(s.positions + 4, nullptr);
  // Each sequence becomes the next one, then all become the first; an index that is out of range; a cycle of two.
  Buffer<int64_t> sources(s.batch), destinations(s.batch);
  std::vector<int64_t> of_each(static_cast<size_t>(s.batch));
  const auto copy = [&](int64_t count, bool reorders) {
    sources.set(of_each);
    check(kvc::launch_copy_sequences({cache, {sources.data}, {reorders ? nullptr : destinations.data}, count}, nullptr),
          "copy_sequences");
  };
  for (int64_t b = 0; b < s.batch; ++b) of_each[b] = b;
  destinations.set(of_each);
  for (int64_t b = 0; b < s.batch; ++b) of_each[b] = (b + 1) % s.batch;
  copy(s.batch, true);
  if (s.batch > 1) copy(1, false);
  for (int64_t b = 0; b < s.batch; ++b) of_each[b] = b == 1 ? s.batch : 0;
  copy(s.batch, true);
  attend(0, 1, true, false, 0);
  // About the last sequence alone, and one that is none.
  for (int64_t b = 0; b < s.batch; ++b) of_each[b] = b == 0 ? s.batch - 1 : -1;
  sources.set(of_each);
  chosen = {{sources.data}, s.batch > 1 ? 2 : 1};
  append(0, s.layers, 1, false, false);
  append(0, 1, s.positions / 2 + 3, true, true);
  for (const int64_t count : {1, 5}) {
    attend(0, count, false, false, 0);
    attend(0, count, true, false, 0);
  }
  gather(s.positions + 4, nullptr);
  chosen = {};
  for (int64_t b = 0; b < s.batch; ++b) of_each[b] = s.positions / 3 + b;
  sources.set(of_each);
  const auto truncate = [&](bool resets, int64_t length, kvc::Integers of, int64_t count) {
    kvc::TruncateParams p{state.data, s.layers, s.batch, s.sinks, resets, length, of, {}};
    if (count < s.batch) p.sequences = {{destinations.data}, count};
    check(kvc::launch_truncate(p, nullptr), "truncate");
  };
  truncate(false, 0, {sources.data}, s.batch);
  truncate(false, s.positions / 3, {}, s.batch);
  if (s.batch > 1) truncate(true, 0, {}, 1);
  attend(0, 1, true, false, 0);
  check(cudaDeviceSynchronize(), "the kernels");
  if (dtype == kvc::DType::f32) {
    std::vector<float> answer(static_cast<size_t>(s.batch * s.heads * s.group * s.head_dim));
    output.get(answer);
    for (const float x : answer) {
      if (!std::isfinite(x)) {
        std::printf("sanitize: an answer is not finite\n");
        std::exit(1);
      }
    }
  }
}

}  // namespace

// With an argument: that many of the shapes, in FP32 alone (racecheck takes minutes for all).
int main(int argc, char** argv) {
  const Shape shapes[] = {
      {2, 1, 64, 0, 2, 64, 1},   {1, 3, 100, 4, 1, 128, 4}, {1, 2, 33, 1, 3, 80, 2},
      {1, 1, 700, 2, 4, 128, 1}, {1, 1, 50, 0, 1, 256, 8},  {1, 1, 40, 3, 2, 512, 3},
      {1, 2, 300, 0, 1, 96, 16}, {3, 1, 20, 19, 2, 8, 1},   {1, 150, 40, 0, 1, 16, 1},
  };
  const int most = argc > 1 ? std::atoi(argv[1]) : 1000;
  int count = 0;
  for (const Shape& shape : shapes) {
    for (const kvc::DType dtype : {kvc::DType::f32, kvc::DType::f16, kvc::DType::bf16}) {
      if (count == most) break;
      if (argc > 1 && dtype != kvc::DType::f32) continue;
      run(shape, dtype);
      ++count;
    }
  }
  std::printf("sanitize: %d shapes and dtypes ran\n", count);
}
