// The GPU's backend. It includes torch's device-generic headers and the CUDA runtime only, so that it also compiles
// against a CPU build of torch.
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "../kernels/launch.h"
#include "backend.h"

namespace kvc {
namespace {

cudaStream_t current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl torch_device(device.type());
  return static_cast<cudaStream_t>(torch_device.getStream(device).native_handle());
}

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // clears it; else torch's next launch would report it as its own
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error), " (", cudaGetErrorName(error),
              ")");
}

// Guards the tensors' device, launches on its current stream, checks the launch.
template <typename Params>
void launch(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
            c10::Device device) {
  const c10::DeviceGuard guard(device);
  check(op, launcher(params, current_stream(device)));
}

void append(const AppendParams& p, c10::Device device) { launch("append", launch_append, p, device); }

void gather(const GatherParams& p, c10::Device device) { launch("gather", launch_gather, p, device); }

void attend(const AttendParams& p, c10::Device device) {
  launch("attend", launch_attend, p, device);
  if (appends_after_attention(p)) append(p.append, device);
}

void copy_sequences(const CopySequencesParams& p, c10::Device device) {
  launch("copy_sequences", launch_copy_sequences, p, device);
}

void copy_from(const CopyFromParams& p, c10::Device device) { launch("copy_from", launch_copy_from, p, device); }

void truncate(const TruncateParams& p, c10::Device device) { launch("truncate", launch_truncate, p, device); }

void merge(const MergeParams& p, c10::Device device) { launch("merge", launch_merge, p, device); }

uint64_t capture_of_stream(c10::Device device) {
  const c10::DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check("is_capturing", cudaStreamGetCaptureInfo(current_stream(device), &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id + 1;
}

}  // namespace

const Backend kCudaBackend = {
    .append = append,
    .gather = gather,
    .attend = attend,
    .copy_sequences = copy_sequences,
    .copy_from = copy_from,
    .truncate = truncate,
    .merge = merge,
    .graph_capture = capture_of_stream,
};

}  // namespace kvc
