#include "cache_tensors.h"

#include <c10/util/Exception.h>

#include <array>
#include <utility>

#include "checks.h"

namespace kvc {
namespace {

void check_own_tensor(const char* op, const char* name, const at::Tensor& t) {
  check_dense(op, name, t);
  check_memory(op, name, t);
}

CacheView view_of(const CacheTensors& t) {
  const int64_t positions = t.k_cache.size(2);
  return {
      .k_cache = static_cast<uint16_t*>(t.k_cache.data_ptr()),
      .v_cache = static_cast<uint16_t*>(t.v_cache.data_ptr()),
      .state = t.state.data_ptr<int64_t>(),
      .layers = t.k_cache.size(0),
      .batch = t.k_cache.size(1),
      .positions = positions,
      .heads = t.k_cache.size(3),
      .head_dim = t.k_cache.size(4),
      .sinks = t.sink_positions,
      .ring = Divider::by(positions - t.sink_positions),
      .share = {Divider::by(t.ranks), t.rank},
      .all_sinks = t.sink_positions * t.ranks,
      .all_ring = (positions - t.sink_positions) * t.ranks,
  };
}

}  // namespace

CheckedCache::CheckedCache(const char* op, CacheTensors of) : tensors(std::move(of)) {
  const CacheTensors& t = tensors;
  check_own_tensor(op, "k_cache", t.k_cache);
  check_own_tensor(op, "v_cache", t.v_cache);
  check_own_tensor(op, "state", t.state);
  TORCH_CHECK_TYPE(t.k_cache.scalar_type() == at::kHalf && t.v_cache.scalar_type() == at::kHalf, op,
                   ": k_cache and v_cache must be torch.float16, got ", dtype_name(t.k_cache.scalar_type()), " and ",
                   dtype_name(t.v_cache.scalar_type()));
  TORCH_CHECK_VALUE(t.k_cache.dim() == 5 && t.k_cache.sizes() == t.v_cache.sizes() && t.k_cache.is_contiguous() &&
                        t.v_cache.is_contiguous(),
                    op,
                    ": k_cache and v_cache must be contiguous and of one shape [layers, batch_size, "
                    "max_positions, num_heads, head_dim], got ",
                    shape_text(t.k_cache.sizes()), " and ", shape_text(t.v_cache.sizes()));
  const int64_t layers = t.k_cache.size(0);
  const int64_t batch = t.k_cache.size(1);
  const int64_t positions = t.k_cache.size(2);
  TORCH_CHECK_VALUE(t.k_cache.numel() > 0, op, ": k_cache must not be empty, got ", shape_text(t.k_cache.sizes()));
  TORCH_CHECK_TYPE(t.state.scalar_type() == at::kLong, op, ": state must be torch.int64, got ",
                   dtype_name(t.state.scalar_type()));
  const std::array<int64_t, 3> state_sizes = {3, layers, batch};
  TORCH_CHECK_VALUE(t.state.sizes() == at::IntArrayRef(state_sizes) && t.state.is_contiguous(), op,
                    ": state must be contiguous and [3, ", layers, ", ", batch, "], got ", shape_text(t.state.sizes()));
  TORCH_CHECK_VALUE(t.v_cache.device() == device() && t.state.device() == device(), op,
                    ": k_cache, v_cache and state must be on one device, got ", device(), ", ", t.v_cache.device(),
                    " and ", t.state.device());
  if (t.overflow_counts.defined()) {
    check_own_tensor(op, "overflow_counts", t.overflow_counts);
    TORCH_CHECK_TYPE(t.overflow_counts.scalar_type() == at::kLong, op, ": overflow_counts must be torch.int64, got ",
                     dtype_name(t.overflow_counts.scalar_type()));
    TORCH_CHECK_VALUE(t.overflow_counts.dim() == 1 && t.overflow_counts.size(0) == layers &&
                          t.overflow_counts.is_contiguous() && t.overflow_counts.device() == device(),
                      op, ": overflow_counts must be contiguous, [", layers, "] and on ", device(), ", got ",
                      shape_text(t.overflow_counts.sizes()), " on ", t.overflow_counts.device());
  }
  TORCH_CHECK_VALUE(t.sink_positions >= 0 && t.sink_positions < positions, op,
                    ": sink_positions must be from 0 to max_positions - 1 = ", positions - 1, ", got ",
                    t.sink_positions);
  TORCH_CHECK_VALUE(t.rank >= 0 && t.rank < t.ranks, op, ": rank must be from 0 to ", t.ranks - 1, ", got ", t.rank);
  view = view_of(t);
  keys = StridedMemory(t.k_cache);
  values = StridedMemory(t.v_cache);
  state = StridedMemory(t.state);
  if (t.overflow_counts.defined()) overflow_counts = StridedMemory(t.overflow_counts);
}

}  // namespace kvc
