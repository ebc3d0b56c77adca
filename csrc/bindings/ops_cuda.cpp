// Device-generic torch headers and the CUDA runtime alone, so that this file also compiles against a CPU build of
// torch.
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "../kernels/launch.h"
#include "devices.h"

namespace kvc {
namespace {

cudaStream_t current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl torch_device(device.type());
  return static_cast<cudaStream_t>(torch_device.getStream(device).native_handle());
}

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or torch's next launch would report it again, as its own
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error), " (", cudaGetErrorName(error),
              ")");
}

// Guard the tensors' device, launch on its current stream, check the launch.
template <typename Params>
void launch(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
            c10::Device device) {
  const c10::DeviceGuard guard(device);
  check(op, launcher(params, current_stream(device)));
}

}  // namespace

void append_cuda(const AppendParams& p, c10::Device device) { launch("append", launch_append, p, device); }
void gather_cuda(const GatherParams& p, c10::Device device) { launch("gather", launch_gather, p, device); }
void attend_cuda(const AttendParams& p, c10::Device device) {
  launch("attend", launch_attend, p, device);
  // One new position is appended in the same launch, and many see to it themselves. A few are not, as earlier queries
  // still see what they overwrite.
  if (p.appends && p.rows > 1 && !p.many) launch("append", launch_append, p.append, device);
}

void copy_sequences_cuda(const CopySequencesParams& p, c10::Device device) {
  launch("copy_sequences", launch_copy_sequences, p, device);
}

void copy_from_cuda(const CopyFromParams& p, c10::Device device) { launch("copy_from", launch_copy_from, p, device); }

void truncate_cuda(const TruncateParams& p, c10::Device device) { launch("truncate", launch_truncate, p, device); }

uint64_t capture_cuda(c10::Device device) {
  const c10::DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check("is_capturing", cudaStreamGetCaptureInfo(current_stream(device), &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id + 1;
}

}  // namespace kvc
