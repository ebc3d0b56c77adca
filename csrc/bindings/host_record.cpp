#include "host_record.h"

#include <mutex>
#include <unordered_map>

namespace kvc {
namespace {

std::mutex registry_mutex;

std::unordered_map<const void*, std::weak_ptr<HostRecord>>& registry() {
  static auto* records = new std::unordered_map<const void*, std::weak_ptr<HostRecord>>();
  return *records;
}

}  // namespace

HostRecord::HostRecord(const at::Tensor& state, int64_t sinks, int64_t ring)
    : key(state.const_data_ptr()), lengths(state, sinks, ring), launch_order(state.device()) {}

HostRecord::~HostRecord() {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(key);
  if (found != registry().end() && found->second.expired()) registry().erase(found);
}

std::shared_ptr<HostRecord> HostRecord::make(const at::Tensor& state, int64_t sinks, int64_t ring) {
  auto record = std::make_shared<HostRecord>(state, sinks, ring);
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[record->key] = record;
  return record;
}

std::shared_ptr<HostRecord> HostRecord::of(const at::Tensor& state) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(state.const_data_ptr());
  return found == registry().end() ? nullptr : found->second.lock();
}

}  // namespace kvc
