// The fibers behind cuda_runtime.h, and the GPU ops as functions that kvcache_ext._C.load_cpu_ops() can load.
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "hopper.cuh"
#include "launch.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr char kPoison = '\xff';  // makes NaN
enum class Waiting { no, block, warps, warp, until, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Waiting waiting = Waiting::no;
  uint64_t brought = 0;
  const std::function<bool()>* ready = nullptr;  // what it waits for with Waiting::until
  Copies copies;
  Products products;
  Operands operands[2];
  unsigned operand_sets = 0;
  unsigned group = 0;  // threads of the barrier that it waits for
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
unsigned current;
const std::function<void()>* running;
bool another_warp;  // is to run now
std::vector<uint64_t> warp_values;
std::vector<char> shared_memory;  // has room for what a launch asks for, and what moves its begin
size_t shared_bytes = 0;          // that the launch asked for
size_t shared_begin = 0;          // from shared_base() on: what a block has beside may move it
Hopper hopper;
std::vector<std::function<void()>> actions;  // to be done later
uint32_t random_state = 12345;

// The state [2, L, B] of a launch that may begin before the one before is done: true, and while that one runs.
int64_t* guessed_state = nullptr;
int64_t guessed_entries = 0;
int64_t guessed_positions = 0;
int64_t guessed_sinks = 0;
std::vector<int64_t> true_state;

std::vector<unsigned> shuffled(unsigned n) {
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  for (unsigned i = n; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

void fiber_main() {
  (*running)();
  fibers[current].waiting = Waiting::done;
  swapcontext(&fibers[current].context, &scheduler);
}

void wait(Waiting kind) {
  const unsigned self = current;
  fibers[self].waiting = kind;
  swapcontext(&fibers[self].context, &scheduler);
}

// Lets go of the threads from `begin` to `end` if each of them waits for `kind` (or is done).
void release(unsigned begin, unsigned end, Waiting kind) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waiting != kind && fibers[i].waiting != Waiting::done) return;
  }
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waiting == kind) fibers[i].waiting = Waiting::no;
    if (kind == Waiting::warp) warp_values[i] = fibers[i].brought;
  }
}

// Looks each time anew: a phase of a barrier that ends twice while somebody waits for it is missed, as on a GPU.
bool is_ready(const Fiber& f) { return f.waiting == Waiting::no || (f.waiting == Waiting::until && (*f.ready)()); }

bool can_run(unsigned begin) {  // a lane of the warp that begins there
  for (unsigned i = begin; i < begin + 32; ++i) {
    if (is_ready(fibers[i])) return true;
  }
  return false;
}

void do_an_action() {
  const size_t i = random_below(static_cast<uint32_t>(actions.size()));
  const std::function<void()> action = actions[i];
  actions.erase(actions.begin() + static_cast<std::ptrdiff_t>(i));
  action();
}

unsigned any_warp_that_can_run(unsigned warps) {  // `warps` if there is none
  const unsigned first = random_below(warps);
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = (first + i) % warps;
    if (can_run(32 * warp)) return warp;
  }
  return warps;
}

void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  warp_values.assign(threads, 0);
  std::fill(shared_memory.begin(), shared_memory.end(), kPoison);
  hopper = {};
  hopper.seen.assign(shared_begin + shared_bytes, kPoison);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    f.waiting = Waiting::no;
    f.copies = {};
    f.products = {};
    f.operand_sets = 0;
    makecontext(&f.context, fiber_main, 0);
  }
  // Warps run as chance has it, some until nothing but a barrier holds them: what a barrier is missing for shows.
  const unsigned warps = threads / 32;
  for (;;) {
    const unsigned warp = any_warp_that_can_run(warps);
    const bool ended = std::all_of(fibers.begin(), fibers.begin() + threads,
                                   [](const Fiber& f) { return f.waiting == Waiting::done; });
    if (ended && !actions.empty()) stop("a block ends before a bulk copy that it asked for");
    if (!actions.empty() && (warp == warps || random_below(8) == 0)) {
      do_an_action();
      continue;
    }
    if (warp == warps) break;
    const unsigned begin = 32 * warp;
    another_warp = false;
    for (unsigned steps = random_below(2) == 0 ? UINT_MAX : 1 + random_below(8);
         steps > 0 && !another_warp && can_run(begin); --steps) {
      for (const unsigned lane : shuffled(32)) {
        Fiber& f = fibers[begin + lane];
        if (!is_ready(f)) continue;
        f.waiting = Waiting::no;
        current = begin + lane;
        threadIdx = dim3(current);
        swapcontext(&scheduler, &f.context);
      }
      release(begin, begin + 32, Waiting::warp);
      const Fiber& first = fibers[begin];
      if (first.waiting == Waiting::warps) {
        const unsigned of_group = begin / first.group * first.group;
        release(of_group, of_group + first.group, Waiting::warps);
      }
    }
    release(0, threads, Waiting::block);
  }
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].waiting != Waiting::done) stop("a thread waits for a barrier that another one never reaches");
    if (!fibers[i].products.under_way.empty()) stop("a thread ends with products that it did not wait for");
  }
  check_hopper(threads);
  for (const auto& [address, barrier] : hopper.barriers) {
    if (barrier.bytes != 0) stop("a block ends that expects other bytes than bulk copies brought");
  }
  const auto past = shared_memory.begin() + (dynamic_shared() - shared_memory.data()) + shared_bytes;
  if (std::any_of(past, shared_memory.end(), [](char c) { return c != kPoison; })) {
    stop("a block writes past the end of its shared memory");
  }
}

}  // namespace

void begin_previous_launch() {
  if (guessed_state == nullptr) return;
  true_state.assign(guessed_state, guessed_state + 2 * guessed_entries);
  for (int64_t i = 0; i < 2 * guessed_entries; ++i) {
    // Often one of the two numbers of a sequence alone has been written.
    if (random_below(2) == 0) continue;
    guessed_state[i] =
        random_below(static_cast<uint32_t>(3 * guessed_positions) + 1) + (i < guessed_entries ? 0 : guessed_sinks);
  }
}

void end_previous_launch() {
  if (true_state.empty()) return;
  std::copy(true_state.begin(), true_state.end(), guessed_state);
  true_state.clear();
}

uint32_t random_below(uint32_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<uint32_t>((static_cast<uint64_t>(random_state) * n) >> 32);
}

Copies& copies_of_thread() { return fibers[current].copies; }

Hopper& hopper_of_block() { return hopper; }
Products& products_of_thread() { return fibers[current].products; }

// Shared memory begins anywhere that is a multiple of 128: what a kernel aligns further must have room for that.
void set_dynamic_shared(size_t bytes) {
  shared_bytes = bytes;
  shared_begin = 128 * random_below(8);
  shared_memory.resize(1024 + shared_begin + bytes + 128);
}

size_t dynamic_shared_bytes() { return shared_bytes; }

char* shared_base() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(shared_memory.data());
  return reinterpret_cast<char*>((start + 1023) / 1024 * 1024);
}

char* dynamic_shared() { return shared_base() + shared_begin; }

const Operands* warp_operands(const Operands& mine) {
  static Operands of_warp[32];  // read before the next lane runs
  Fiber& self = fibers[current];
  const unsigned set = self.operand_sets++ % 2;
  self.operands[set] = mine;
  warp_exchange(0);
  const unsigned first = current / 32 * 32;
  for (unsigned i = 0; i < 32; ++i) of_warp[i] = fibers[first + i].operands[set];
  return of_warp;
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  running = &kernel;
  for (const unsigned b : shuffled(grid.x)) {
    blockIdx = dim3(b);
    begin_previous_launch();
    run_block(block.x);
  }
}

struct Guess {
  explicit Guess(const kvc::CacheView& cache) {
    guessed_state = cache.state;
    guessed_entries = cache.layers * cache.batch;
    guessed_positions = cache.all_sinks + cache.all_ring;
    guessed_sinks = cache.all_sinks;
  }
  ~Guess() { guessed_state = nullptr; }
};

void stop(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  std::abort();
}

void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) stop("an access at a misaligned address");
}

void wait_until(const std::function<bool()>& ready) {
  if (ready()) return;
  fibers[current].ready = &ready;
  wait(Waiting::until);
}

void give_way() {
  static const std::function<bool()> at_once = [] { return true; };
  if (random_below(4) != 0) return;
  another_warp = true;
  fibers[current].ready = &at_once;
  wait(Waiting::until);
}

void do_later(const std::function<void()>& action) { actions.push_back(action); }

void block_barrier() { wait(Waiting::block); }

void warps_barrier(unsigned warps) {
  fibers[current].group = 32 * warps;
  wait(Waiting::warps);
}

const uint64_t* warp_exchange(uint64_t value) {
  const unsigned self = current;
  fibers[self].brought = value;
  wait(Waiting::warp);
  return warp_values.data() + self / 32 * 32;
}

// The smallest shared memory that GPUs since sm_80 have; kvc_emulate_sm90 gives what the kernels for sm_90a need. Few
// multiprocessors, so that small tests fill them and large ones do not take for ever.
Gpu gpu = {8, 6, 101376, 6};

}  // namespace emulator

extern "C" {
void kvc_emulate_sm90(bool sm90) {
  emulator::gpu = sm90 ? emulator::Gpu{9, 0, 232448, 6} : emulator::Gpu{8, 6, 101376, 6};
}
void kvc_emulate_multiprocessors(int count) { emulator::gpu.multiprocessors = count; }
int kvc_append(const kvc::AppendParams* p) {
  const emulator::Guess guess(p->cache);
  return kvc::launch_append(*p, nullptr);
}
int kvc_gather(const kvc::GatherParams* p) {
  const emulator::Guess guess(p->cache);
  return kvc::launch_gather(*p, nullptr);
}
int kvc_attend(const kvc::AttendParams* p) {
  // Where the state may be read before the wait, it is not to be guessed. That is so every other time where the capture
  // of a graph could know it.
  kvc::AttendParams q = *p;
  if (p->many) {
    const emulator::Guess guess(p->cache);
    return kvc::launch_attend(*p, nullptr);
  }
  const bool plain =
      q.sequences.indices.data == nullptr && (!q.appends || (q.rows == 1 && q.append.new_lengths.data == nullptr));
  q.may_read_before_wait = plain && emulator::random_below(2) == 0;
  if (q.may_read_before_wait) return kvc::launch_attend(q, nullptr);
  const emulator::Guess guess(p->cache);
  return kvc::launch_attend(q, nullptr);
}
int kvc_copy_sequences(const kvc::CopySequencesParams* p) { return kvc::launch_copy_sequences(*p, nullptr); }
int kvc_copy_from(const kvc::CopyFromParams* p) { return kvc::launch_copy_from(*p, nullptr); }
int kvc_merge(const kvc::MergeParams* p) { return kvc::launch_merge(*p, nullptr); }
int kvc_truncate(const kvc::TruncateParams* p) { return kvc::launch_truncate(*p, nullptr); }
}
