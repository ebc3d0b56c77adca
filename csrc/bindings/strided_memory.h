// The memory that the elements of a tensor lie in, and whether two tensors share any of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace kvc {

// The elements of a tensor, as runs of contiguous bytes. The tensor must outlive this object, which points to it.
class StridedMemory {
 public:
  StridedMemory() = default;  // none
  explicit StridedMemory(const at::Tensor& t) {
    if (t.numel() == 0) return;
    tensor_ = t.unsafeGetTensorImpl();
    int64_t last = 0;
    const at::IntArrayRef sizes = t.sizes();
    const at::IntArrayRef strides = t.strides();
    for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
    begin_ = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    end_ = begin_ + static_cast<uintptr_t>(last + 1) * t.element_size();
  }

  // Is some byte part of an element of both? Views that only interleave share none. In nearly every call the two ranges
  // from first to last element do not meet, and no more than that is compared.
  bool shares_with(const StridedMemory& other) const {
    return begin_ < other.end_ && other.begin_ < end_ && runs_meet(other);
  }

  // Is some byte part of two elements of this tensor, as in an expanded one?
  bool shares_within() const { return tensor_ != nullptr && !tensor_->is_contiguous() && runs_meet_within(); }

 private:
  bool runs_meet(const StridedMemory& other) const;
  bool runs_meet_within() const;

  const c10::TensorImpl* tensor_ = nullptr;
  uintptr_t begin_ = 0;  // of the first element
  uintptr_t end_ = 0;    // past the last; equal to `begin_` where there are no elements
};

}  // namespace kvc
