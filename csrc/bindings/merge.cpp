#include "merge.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "backend.h"
#include "checks.h"

namespace kvc {
namespace {

constexpr const char* kOp = "merge";

uint32_t mixed(uint32_t a, int64_t b) { return (a ^ static_cast<uint32_t>(b)) * 0x9e3779b1u; }

MergeParams merge_params(const CheckedCache& cache, int64_t layer, const MergeTensors& to,
                         const ChosenSequences& sequences) {
  const CacheView& c = cache.view;
  check_layer(kOp, layer, c);
  const QueryShape shape = checked_query_shape(kOp, to.out, c, sequences.entries(c.batch));
  MergeParams p = {};
  p.rows = to.out.numel() / c.head_dim;
  p.head_dim = c.head_dim;
  p.ranks = c.share.ranks.divisor;
  p.rank = c.share.rank;
  p.out = checked_rows(kOp, "out", to.out, c.head_dim);
  p.dtype = kernel_dtype(kOp, "out", to.out.scalar_type());
  p.lse = to.lse.defined() ? to.lse.data_ptr<float>() : nullptr;
  p.query_heads = FastDivider::by(static_cast<uint32_t>(shape.heads));
  p.positions = FastDivider::by(static_cast<uint32_t>(std::max<int64_t>(shape.positions, 1)));
  p.state = c.state;
  p.tag = to.tag.const_data_ptr<int64_t>();
  p.layer = layer;
  p.layers = c.layers;
  p.batch = c.batch;
  p.sequences = sequences;
  for (const int64_t number : {to.call, layer, shape.heads, shape.positions, sequences.entries(c.batch)}) {
    p.call = mixed(p.call, number);
  }
  TORCH_CHECK_VALUE(p.rows < int64_t{1} << 31, kOp, ": a call must have fewer than 2^31 queries, got ", p.rows);
  return p;
}

// In several launches, each of at most so many rows.
void run(const CheckedCache& cache, MergeParams p, int64_t most_rows) {
  const Backend& backend = backend_of(kOp, cache.device());
  const int64_t rows = p.rows;
  for (p.first_row = 0; p.first_row < rows; p.first_row += most_rows) {
    p.rows = std::min(most_rows, rows - p.first_row);
    backend.merge(p, cache.device());
  }
}

}  // namespace

ExchangeMemory::ExchangeMemory(const std::vector<uint64_t>& inboxes, int64_t lines, at::Tensor of_device,
                               at::Tensor of_host, double timeout_s, bool sends, bool receives)
    : control(std::move(of_device)), failure(std::move(of_host)) {
  TORCH_CHECK_VALUE(inboxes.size() <= Exchange::kMostRanks, kOp, ": at most ", Exchange::kMostRanks,
                    " ranks can exchange answers through shared memory, got ", inboxes.size());
  for (size_t r = 0; r < inboxes.size(); ++r) exchange.inboxes[r] = reinterpret_cast<uint32_t*>(inboxes[r]);
  exchange.lines = lines;
  exchange.control = reinterpret_cast<uint32_t*>(control.data_ptr<int32_t>());
  exchange.timeout_ns = static_cast<int64_t>(1e9 * timeout_s);
  exchange.sends = sends;
  exchange.receives = receives;
}

void merge_exchanged(const CheckedCache& cache, int64_t layer, const at::Tensor& answers, const at::Tensor& lses,
                     const MergeTensors& to, const IntegerList& sequences, const ExchangeMemory& memory) {
  MergeParams p = merge_params(cache, layer, to, chosen_sequences(kOp, cache, sequences));
  TORCH_CHECK_VALUE(answers.is_contiguous() && lses.is_contiguous() && answers.numel() == p.rows * p.head_dim &&
                        lses.numel() == p.rows,
                    kOp, ": answers and LSEs must be contiguous and as many as the queries");
  p.answers = answers.const_data_ptr<float>();
  p.lses = lses.const_data_ptr<float>();
  p.failure = reinterpret_cast<uint32_t*>(memory.failure.data_ptr<int32_t>());
  p.exchange = memory.exchange;
  run(cache, p, p.exchange.most_rows(p.head_dim));
}

void merge_gathered(const CheckedCache& cache, int64_t layer, const at::Tensor& gathered, const MergeTensors& to,
                    const IntegerList& sequences, const at::Tensor& failure) {
  MergeParams p = merge_params(cache, layer, to, chosen_sequences(kOp, cache, sequences));
  const int64_t behind = (p.rows * (p.head_dim + 1) + 1) / 2 * 2;
  TORCH_CHECK_VALUE(gathered.dim() == 2 && gathered.is_contiguous() && gathered.size(0) == p.ranks &&
                        gathered.size(1) == behind + 4 * p.batch + 2,
                    kOp, ": gathered must be contiguous and [", p.ranks, ", ", behind + 4 * p.batch + 2, "], got ",
                    shape_text(gathered.sizes()));
  const float* data = gathered.const_data_ptr<float>();
  p.answers = data;
  p.lses = data + p.rows * p.head_dim;
  p.lengths = reinterpret_cast<const int64_t*>(data + behind);
  p.part_stride = gathered.size(1);
  p.failure = reinterpret_cast<uint32_t*>(failure.data_ptr<int32_t>());
  run(cache, p, (int64_t{1} << 30) / p.head_dim);
}

}  // namespace kvc
