#include "backend.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

namespace kvc {
namespace {

// A function of the loaded library, one for each op's struct. It returns 0 or an error number.
template <typename Params>
int (*loaded_op)(const Params*) = nullptr;

template <typename Params>
void run_loaded(const Params& params, c10::Device) {
  const int error = loaded_op<Params>(&params);
  TORCH_CHECK(error == 0, "the loaded CPU ops failed with error ", error);
}

void attend_loaded(const AttendParams& p, c10::Device device) {
  run_loaded(p, device);
  if (appends_after_attention(p)) run_loaded(p.append, device);
}

constexpr Backend kLoadedBackend = {
    .append = run_loaded<AppendParams>,
    .gather = run_loaded<GatherParams>,
    .attend = attend_loaded,
    .copy_sequences = run_loaded<CopySequencesParams>,
    .copy_from = run_loaded<CopyFromParams>,
    .truncate = run_loaded<TruncateParams>,
    .merge = run_loaded<MergeParams>,
    .graph_capture = [](c10::Device) -> uint64_t { return 0; },
};

template <typename Params>
void load_op(void* library, const char* name) {
  loaded_op<Params> = reinterpret_cast<int (*)(const Params*)>(dlsym(library, name));
  TORCH_CHECK(loaded_op<Params> != nullptr, "load_cpu_ops: the library lacks ", name);
}

const Backend* cpu_backend = &kCpuBackend;

// Null: this build has none for the device.
const Backend* find_backend(c10::Device device) {
  if (device.is_cpu()) return cpu_backend;
#if defined(KVC_WITH_CUDA)
  if (device.is_cuda()) return &kCudaBackend;
#endif
  return nullptr;
}

}  // namespace

const Backend& backend_of(const char* op, c10::Device device) {
  const Backend* backend = find_backend(device);
  TORCH_CHECK_VALUE(backend != nullptr, op, ": the cache must be on a device that this build supports, got ", device);
  return *backend;
}

uint64_t graph_capture(c10::Device device) {
  const Backend* backend = find_backend(device);
  return backend == nullptr ? 0 : backend->graph_capture(device);
}

void load_cpu_ops(const char* path) {
  cpu_backend = &kCpuBackend;
  if (path[0] == '\0') return;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "load_cpu_ops: ", dlerror());
  load_op<AppendParams>(library, "kvc_append");
  load_op<GatherParams>(library, "kvc_gather");
  load_op<AttendParams>(library, "kvc_attend");
  load_op<CopySequencesParams>(library, "kvc_copy_sequences");
  load_op<CopyFromParams>(library, "kvc_copy_from");
  load_op<TruncateParams>(library, "kvc_truncate");
  load_op<MergeParams>(library, "kvc_merge");
  cpu_backend = &kLoadedBackend;
}

}  // namespace kvc
