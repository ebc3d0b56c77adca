// Every kernel over many shapes without torch, for sanitizers (`make sanitize`): on a GPU under compute-sanitizer, on a
// CPU under AddressSanitizer and UndefinedBehaviorSanitizer (see sanitize_device.h). What a call reads or writes lies
// at an end of a buffer, so that a step too far is one out of it. Values are the other tests' affair; here it is only
// asked that launches succeed, and that answers are finite: on a CPU all of them, on a GPU, where looking would end the
// overlap of launches, the last of each FP32 shape.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>

#include "sanitize_device.h"

namespace {

struct Shape {
  int64_t layers, batch, positions, sinks, heads, head_dim, group;
  int64_t longest = 16;  // rows of an attention call; more than 16: attention of prompts, and nothing else
};

// How the rows of a call's tensors lie.
enum class Form {
  plain,   // [.., T, H, D]
  htd,     // [.., H, T, D], as model code has them
  spaced,  // with gaps of odd sizes: nothing is aligned to more than its elements
  one_row  // one position for all of them, with a stride of 0
};

struct Layout {
  int64_t layer, batch, row, head;  // strides
  int64_t extent;                   // elements from the first to the last

  static Layout of(Form form, int64_t layers, int64_t batch, int64_t rows, int64_t heads, int64_t head_dim) {
    Layout l{};
    const int64_t gap = form == Form::spaced ? 1 : 0;
    l.head = form == Form::htd ? rows * head_dim : head_dim + 2 * gap;
    l.row = form == Form::htd ? head_dim : form == Form::one_row ? 0 : heads * l.head + gap;
    l.batch = form == Form::one_row ? heads * head_dim : rows * heads * (head_dim + 2 * gap) + rows * gap + 2 * gap;
    l.layer = l.batch * batch + gap;
    l.extent = (layers - 1) * l.layer + (batch - 1) * l.batch + (rows - 1) * l.row + (heads - 1) * l.head + head_dim;
    return l;
  }
  template <typename Pointer>
  kvc::Rows<Pointer> rows(Pointer data) const {
    return {data, layer, batch, row, head};
  }
};

bool is_finite(const char* data, int64_t i, kvc::DType dtype) {
  if (dtype == kvc::DType::f32) {
    float x;
    std::memcpy(&x, data + 4 * i, 4);
    return std::isfinite(x);
  }
  uint16_t x;
  std::memcpy(&x, data + 2 * i, 2);
  const uint16_t exponent = dtype == kvc::DType::f16 ? 0x7c00 : 0x7f80;
  return (x & exponent) != exponent;
}

// `size` places of a buffer: the last ones and the first ones in turn.
class Places {
 public:
  explicit Places(int64_t bytes) : buffer_(bytes) {}
  char* take(int64_t bytes) {
    if (bytes > static_cast<int64_t>(buffer_.size)) fail("Places", "too many bytes");
    at_end_ = !at_end_;
    return at_end_ ? buffer_.data + (buffer_.size - static_cast<size_t>(bytes)) : buffer_.data;
  }
  Buffer<char>& buffer() { return buffer_; }

 private:
  Buffer<char> buffer_;
  bool at_end_ = false;
};

class Case {
 public:
  // `brief`: with fewer of the calls that take racecheck long, for whose shape enough blocks run without.
  Case(const Shape& shape, kvc::DType type, bool brief)
      : s(shape),
        dtype(type),
        most_rows(brief ? 2 : 16),
        entries(s.layers * s.batch),
        keys(entries * s.positions * s.heads * s.head_dim),
        values(entries * s.positions * s.heads * s.head_dim),
        state(3 * entries),
        other_slots(s.sinks + (s.positions - s.sinks + 1) / 2),
        other_keys(other_entries() * other_slots * s.heads * s.head_dim),
        other_values(other_entries() * other_slots * s.heads * s.head_dim),
        other_state(3 * other_entries()),
        overflows(s.layers),
        workspace(kvc::kWorkspaceWords + 132 * 16 * 514),
        numbers(most_elements() * kvc::dtype_size(dtype)),
        more_numbers(most_elements() * kvc::dtype_size(dtype)),
        key_out(most_elements() * 4),
        value_out(most_elements() * kvc::dtype_size(dtype)),
        lse(s.batch * s.longest * s.heads * s.group * 4),
        lengths(s.batch),
        short_lengths(s.batch),
        sources(s.batch),
        short_sources(s.batch),
        destinations(s.batch),
        indices(s.batch * 64),
        tag(1),
        failure(1) {
    set_bytes(tag.data, 0, sizeof(int64_t));
    set_bytes(failure.data, 0, sizeof(uint32_t));
    set_bytes(overflows.data, 0, overflows.size * sizeof(int64_t));
    // A cache's workspace starts as zeros, and whole vectors of it are copied of which parts mean nothing. On a CPU
    // all but the tickets stays NaN, which must not reach an answer.
    set_bytes(workspace.data, 0, (kOnHost ? static_cast<size_t>(kvc::kWorkspaceWords) : workspace.size) * 4);
    take_share(1, 0);
    fill(numbers.buffer(), false);
    fill(more_numbers.buffer(), false);
  }

  void run() {
    if (s.longest > 16) {
      prompts();
      shares();
      finish();
      return;
    }
    appends_and_gathers();
    if (s.head_dim % 8 == 0) {
      attention();
      of_some_sequences();
      attention_of_what_is_not_finite();
    }
    moves_of_sequences();
    moves_between_caches();
    truncations();
    shares();
    if (s.head_dim % 8 == 0) merges();
    if (s.head_dim % 8 == 0) attend({.count = 1, .appends = true});
    gather(s.positions + 4, Form::plain, false);
    finish();
    if (!kOnHost && dtype == kvc::DType::f32) look(last_answer, last_elements, dtype, "the last gather");
  }

 private:
  struct Attend {
    int64_t count;
    bool appends = false;
    int64_t layer = 0;
    bool ragged = false;
    int64_t window = 0;
    float softcap = 0;
    bool lse = true;
    bool may_read_before_wait = false;
    bool finite = true;
    Form form = Form::plain;
    bool rounds = false;
  };

  int64_t other_entries() const { return s.layers * (s.batch + 1); }

  void empty(Buffer<int64_t>& of, int64_t sinks) const {
    const size_t row = of.size / 3;
    std::vector<int64_t> start(of.size, 0);
    std::fill_n(start.begin() + static_cast<int64_t>(row), row, sinks);
    of.set(start);
  }

  // From now on the caches are that rank's, of a text that is dealt out. They are empty.
  void take_share(int64_t ranks, int64_t rank) {
    const kvc::Share share = {kvc::Divider::by(ranks), rank};
    const auto view = [&](const Buffer<uint16_t>& k, const Buffer<uint16_t>& v, const Buffer<int64_t>& of,
                          int64_t batch, int64_t slots) {
      const int64_t ring = slots - s.sinks;
      return kvc::CacheView{k.data, v.data,          of.data,     s.layers, batch,
                            slots,  s.heads,         s.head_dim,  s.sinks,  kvc::Divider::by(ring),
                            share,  s.sinks * ranks, ring * ranks};
    };
    cache = view(keys, values, state, s.batch, s.positions);
    other = view(other_keys, other_values, other_state, s.batch + 1, other_slots);
    empty(state, cache.all_sinks);
    empty(other_state, other.all_sinks);
  }

  int64_t batch() const { return chosen.entries(s.batch); }

  // Of the largest tensor of any call.
  int64_t most_elements() const {
    const auto extent = [&](int64_t layers, int64_t rows, int64_t heads) {
      return Layout::of(Form::spaced, layers, s.batch, rows, heads, s.head_dim).extent;
    };
    return std::max(
        {extent(s.layers, 3, s.heads), extent(1, s.positions + 5, s.heads), extent(1, s.longest, s.heads * s.group)});
  }

  // Numbers from -1 to 1, or of that size; with `outliers` some are beyond FP16, infinite or none.
  void fill(Buffer<char>& buffer, bool outliers) {
    const int size = kvc::dtype_size(dtype);
    std::vector<char> bytes(buffer.size);
    for (size_t i = 0; i < buffer.size / static_cast<size_t>(size); ++i) {
      float x = static_cast<float>(random_below(1 << 24)) / (1 << 23) - 1.0f;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == kvc::DType::f16) bits = 0x3800u | (bits & 0x807fu);
      if (dtype == kvc::DType::bf16) bits >>= 16;
      if (outliers && random_below(20) == 0) {
        const uint32_t inf = dtype == kvc::DType::f32 ? 0x7f800000u : dtype == kvc::DType::f16 ? 0x7c00u : 0x7f80u;
        const uint32_t large = dtype == kvc::DType::f32 ? 0x4f000000u : dtype == kvc::DType::f16 ? 0x7bffu : 0x4f00u;
        bits = random_below(3) == 0 ? large : random_below(2) == 0 ? inf : inf + 1;
      }
      std::memcpy(bytes.data() + i * static_cast<size_t>(size), &bits, static_cast<size_t>(size));
    }
    copy_in(buffer.data, bytes.data(), bytes.size());
  }

  void look(const char* data, int64_t elements, kvc::DType type, const char* what) {
    std::vector<char> copy(static_cast<size_t>(elements * kvc::dtype_size(type)));
    copy_out(copy.data(), data, copy.size());
    for (int64_t i = 0; i < elements; ++i) {
      if (!is_finite(copy.data(), i, type)) fail(what, "an answer is not finite");
    }
  }

  // On a CPU: what a call is to write is NaN before it, and finite after it.
  void poison(char* data, const Layout& layout, kvc::DType type) {
    if (kOnHost) set_bytes(data, 0xff, static_cast<size_t>(layout.extent * kvc::dtype_size(type)));
  }
  void look(const char* data, const Layout& l, int64_t rows, int64_t heads, kvc::DType type, const char* what) {
    const int64_t count = kOnHost ? batch() * rows * heads : 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = i / (rows * heads) * l.batch + i / heads % rows * l.row + i % heads * l.head;
      look(data + offset * kvc::dtype_size(type), s.head_dim, type, what);
    }
  }

  const void* input(Places& from, const Layout& layout) { return from.take(layout.extent * kvc::dtype_size(dtype)); }

  kvc::AppendParams append_params(int64_t layer, int64_t layers, int64_t count, Form form, bool ragged) {
    const Layout layout = Layout::of(form, layers, batch(), count, s.heads, s.head_dim);
    kvc::AppendParams p{};
    p.cache = cache;
    p.overflow_counts = overflows.data;
    p.first_layer = layer;
    p.layer_count = layers;
    p.rows = count;
    p.key = layout.rows(input(numbers, layout));
    p.value = layout.rows(input(more_numbers, layout));
    p.dtype = dtype;
    p.saturate = saturate;
    p.sequences = chosen;
    if (ragged) {
      std::vector<int64_t> of_each(static_cast<size_t>(batch()));
      for (size_t i = 0; i < of_each.size(); ++i) {
        const int64_t step = count > 16 ? count / 2 + 1 : 1;  // of a prompt some sequence has most
        const int64_t start = count > 16 ? count - 1 : 0;
        of_each[i] = (start + static_cast<int64_t>(i) * step) % (count + 3) - 1;
      }
      if (random_below(2) == 0) {
        p.new_lengths = {short_lengths.set({of_each.begin(), of_each.end()}), true};
      } else {
        p.new_lengths = {lengths.set(of_each), false};
      }
    }
    return p;
  }

  void append(int64_t layer, int64_t layers, int64_t count, Form form = Form::plain, bool ragged = false) {
    run_op(append_params(layer, layers, count, form, ragged));
  }

  void attend(const Attend& a) {
    const int64_t query_heads = s.heads * s.group;
    const Layout layout = Layout::of(a.form, 1, batch(), a.count, query_heads, s.head_dim);
    kvc::AttendParams p{};
    p.cache = cache;
    p.layer = a.layer;
    p.rows = a.count;
    p.query_heads = query_heads;
    p.query = layout.rows(input(numbers, layout));
    p.out_dtype = cache.share.is_all() ? dtype : kvc::DType::f32;
    char* out = key_out.take(layout.extent * kvc::dtype_size(p.out_dtype));
    poison(out, layout, p.out_dtype);
    p.out = layout.rows(static_cast<void*>(out));
    if (a.lse) p.lse = reinterpret_cast<float*>(lse.take(batch() * a.count * query_heads * 4));
    p.dtype = dtype;
    p.scale = 0.1f;
    p.softcap = a.softcap;
    p.window = a.window;
    p.rounds = a.rounds;
    p.may_read_before_wait = a.may_read_before_wait;
    p.appends = a.appends;
    if (a.appends) p.append = append_params(a.layer, 1, a.count, a.form, a.ragged);
    p.sequences = chosen;
    p.use_workspace(workspace.data, static_cast<int64_t>(workspace.size));
    run_op(p);
    if (a.finite) look(out, layout, a.count, query_heads, p.out_dtype, "attend");
  }

  void gather(int64_t count, Form form, bool by_index) {
    const Layout layout = Layout::of(form, 1, batch(), count, s.heads, s.head_dim);
    kvc::GatherParams p{};
    p.cache = cache;
    p.layer = s.layers - 1;
    p.rows = count;
    p.start = -2;
    if (by_index) {  // for each sequence its own, some of them out of range
      const int64_t stride = 1 + random_below(2);
      std::vector<int64_t> some(static_cast<size_t>((batch() - 1) * 64 + (count - 1) * stride + 1));
      for (int64_t& index : some)
        index = static_cast<int64_t>(random_below(static_cast<uint32_t>(s.positions + 6))) - 3;
      p.indices = indices.set(some);
      p.indices_stride = stride;
      p.indices_batch_stride = 64;
    }
    last_elements = layout.extent;
    char* outs[2] = {key_out.take(layout.extent * kvc::dtype_size(dtype)),
                     value_out.take(layout.extent * kvc::dtype_size(dtype))};
    last_answer = outs[0];
    for (char* out : outs) poison(out, layout, dtype);
    p.key = layout.rows(static_cast<void*>(outs[0]));
    p.value = layout.rows(static_cast<void*>(outs[1]));
    p.dtype = dtype;
    p.sequences = chosen;
    run_op(p);
    for (char* out : outs) look(out, layout, count, s.heads, dtype, "gather");
  }

  void appends_and_gathers() {
    if (s.head_dim % 8 == 0) attend({.count = 1});  // nothing is held
    append(0, s.layers, 1);
    append(0, 1, 7, Form::htd);
    append(s.layers - 1, 1, 5, Form::spaced);
    append(0, s.layers, 3, Form::plain, true);
    append(0, s.layers, 2, Form::spaced, true);
    for (const Form form : {Form::plain, Form::htd, Form::spaced}) {
      gather(kvc::imin(s.positions, 32), form, true);
      gather(s.positions + 4, form, false);
    }
    append(0, s.layers, 3, Form::one_row);
  }

  void attention() {
    for (const int64_t count : {1, 2, 5, 16}) {
      if (count > most_rows) continue;
      attend({.count = count});
      attend({.count = count, .appends = true, .ragged = count != 2, .window = count == 2 ? 3 : 0});
      attend({.count = count, .appends = true, .softcap = 2, .lse = false, .form = Form::spaced});
    }
    append(0, 1, s.positions / 2 + 3);
    append(0, 1, s.positions + 5, Form::htd);
    append(0, 1, s.positions + 1, Form::spaced, true);
    for (int i = 0; i < (kEmulated || most_rows < 16 ? 4 : 20); ++i) attend({.count = 1, .appends = true});
    // Layers in turn, as in a model: each is left alone by the launch before.
    if (s.layers > 1) attend({.count = 1, .appends = true});
    for (int i = 0; i < 10 && s.layers > 1; ++i) {
      attend({.count = i % 4 == 3 ? 2 : 1,
              .appends = i % 4 != 3 && i % 3 != 0,
              .layer = (i + 1) % s.layers,
              .may_read_before_wait = true});
    }
    attend({.count = most_rows, .appends = true, .ragged = true, .window = 9});
    attend({.count = 3, .window = 5, .softcap = 1, .form = Form::htd});
  }

  // Calls with as many rows as a prompt has: onto nothing, onto more than they have, around a ring, and longer than it.
  void prompts() {
    for (const bool rounds : {false, true}) {
      reset_all();
      for (const int64_t count : {17, 70, 130}) {
        if (count > s.longest) continue;
        attend({.count = count, .rounds = rounds});  // of the first call nothing is held
        attend({.count = count, .appends = true, .window = count == 17 ? 0 : 9, .rounds = rounds});
        attend({.count = count, .appends = true, .ragged = true, .form = Form::htd, .rounds = rounds});
      }
      append(0, 1, s.positions / 2 + 3);
      attend({.count = s.longest, .window = 40, .softcap = 2, .lse = false, .form = Form::spaced, .rounds = rounds});
      attend({.count = 70, .appends = true, .softcap = 2, .lse = false, .form = Form::spaced, .rounds = rounds});
      append(0, 1, s.positions + 1);
      attend({.count = 17, .appends = true, .ragged = true, .window = 5, .form = Form::one_row, .rounds = rounds});
      truncate(false, s.positions / 3, {}, {});  // held in the middle of a ring
      attend({.count = 70, .rounds = rounds});
      attend({.count = 17, .appends = true, .rounds = rounds});
      attend({.count = 1, .appends = true});  // a step after it
      const std::vector<int64_t> some{s.batch - 1, -1};
      const int64_t entries_of = s.batch > 1 ? 2 : 1;
      chosen = {{sources.set({some.begin(), some.begin() + entries_of}), false}, entries_of};
      attend({.count = 70, .rounds = rounds});
      attend({.count = 70, .appends = true, .ragged = rounds, .rounds = rounds});
      chosen = {};
    }
    for (const bool keys_too : {false, true}) {
      fill(keys_too ? numbers.buffer() : more_numbers.buffer(), true);
      for (const bool policy : {false, true}) {
        saturate = policy;
        attend({.count = 70, .appends = true, .finite = false});
        attend({.count = 17, .window = 30, .finite = false});
      }
    }
  }

  // About the last sequence alone, and one that is none.
  void of_some_sequences() {
    std::vector<int64_t> some{s.batch - 1};
    if (s.batch > 1) some.push_back(-1);
    for (const bool are_32_bit : {false, true}) {
      const void* numbers_of = are_32_bit ? static_cast<const void*>(short_sources.set({some.begin(), some.end()}))
                                          : static_cast<const void*>(sources.set(some));
      chosen = {{numbers_of, are_32_bit}, static_cast<int64_t>(some.size())};
      append(0, s.layers, 1);
      append(0, 1, s.positions / 2 + 3, Form::htd, true);
      for (const int64_t count : {1, 5}) {
        attend({.count = count});
        attend({.count = count, .appends = true});
      }
      gather(s.positions + 4, Form::plain, false);
      gather(kvc::imin(s.positions, 32), Form::plain, true);
    }
    chosen = {};
  }

  // Values that are not finite have a path of their own; overflows are counted.
  void attention_of_what_is_not_finite() {
    // Values alone, so that scores are finite.
    fill(more_numbers.buffer(), true);
    append(0, 1, s.positions + 2);
    for (const int64_t count : {1, 5}) {
      attend({.count = kvc::imin(count, most_rows), .appends = true, .finite = false});
      attend({.count = kvc::imin(count, most_rows), .window = 4, .finite = false});
    }
    fill(numbers.buffer(), true);
    for (const bool policy : {false, true}) {
      saturate = policy;
      append(0, 1, 9);
      append(0, 1, s.positions + 3, Form::htd);
      for (const int64_t count : {1, 5}) {
        attend({.count = kvc::imin(count, most_rows), .appends = true, .finite = false});
      }
      attend({.count = kvc::imin(7, most_rows), .window = 4, .finite = false});
    }
    fill(numbers.buffer(), false);
    fill(more_numbers.buffer(), false);
    append(0, 1, s.positions + 5);  // again all of the ring, and with it...
    reset_all();                    // ...the sinks, which are not in it
    append(0, s.layers, 3);
    append(0, 1, s.positions);
  }

  void copy(const std::vector<int64_t>& from, const std::vector<int64_t>* to, bool are_32_bit) {
    kvc::CopySequencesParams p{};
    p.cache = cache;
    p.sources = are_32_bit ? kvc::Integers{short_sources.set({from.begin(), from.end()}), true}
                           : kvc::Integers{sources.set(from), false};
    if (to != nullptr) p.destinations = {destinations.set(*to), false};
    p.count = static_cast<int64_t>(from.size());
    run_op(p);
  }

  void moves_of_sequences() {
    std::vector<int64_t> from(static_cast<size_t>(s.batch)), to(static_cast<size_t>(s.batch));
    // Each becomes the next one: a cycle of all.
    for (int64_t b = 0; b < s.batch; ++b) from[static_cast<size_t>(b)] = (b + 1) % s.batch;
    copy(from, nullptr, false);
    // Pairs change places: cycles of two.
    for (int64_t b = 0; b < s.batch; ++b) from[static_cast<size_t>(b)] = (b ^ 1) < s.batch ? b ^ 1 : b;
    copy(from, nullptr, true);
    // Into places named from the last to the first, some out of range.
    for (int64_t b = 0; b < s.batch; ++b) to[static_cast<size_t>(b)] = b % 5 == 4 ? s.batch + b : s.batch - 1 - b;
    copy(from, &to, false);
    copy({s.batch - 1}, &to, true);
    // All become the first, but for one that is out of range.
    for (int64_t b = 0; b < s.batch; ++b) from[static_cast<size_t>(b)] = b == 1 ? s.batch : 0;
    copy(from, nullptr, false);
    if (s.head_dim % 8 == 0) attend({.count = 1, .appends = true});
  }

  void copy_between(const kvc::CacheView& from, const kvc::CacheView& to, const std::vector<int64_t>& src,
                    const std::vector<int64_t>& dst, bool are_32_bit) {
    kvc::CopyFromParams p{};
    p.cache = to;
    p.source = from;
    p.sources = are_32_bit ? kvc::Integers{short_sources.set({src.begin(), src.end()}), true}
                           : kvc::Integers{sources.set(src), false};
    p.destinations = {destinations.set(dst), false};
    p.count = static_cast<int64_t>(src.size());
    run_op(p);
  }

  // Into a cache of about half the ring and one sequence more, and back.
  void moves_between_caches() {
    const size_t count = static_cast<size_t>(s.batch);
    std::vector<int64_t> from(count), to(count);
    for (int64_t b = 0; b < s.batch; ++b) {
      from[static_cast<size_t>(b)] = b % 5 == 4 ? -1 : b;
      to[static_cast<size_t>(b)] = b % 7 == 6 ? s.batch + 1 : s.batch - b;
    }
    copy_between(cache, other, from, to, false);
    copy_between(cache, other, {s.batch - 1}, {0}, true);
    for (int64_t b = 0; b < s.batch; ++b) {
      from[static_cast<size_t>(b)] = b % 2 == 0 ? s.batch : 0;
      to[static_cast<size_t>(b)] = b;
    }
    copy_between(other, cache, from, to, true);
    gather(kvc::imin(s.positions, 32), Form::plain, true);
    append(0, s.layers, 3);
    append(0, 1, s.positions / 2 + 1);
    gather(s.positions + 4, Form::plain, false);
    if (s.head_dim % 8 == 0) attend({.count = 1, .appends = true});
  }

  void truncate(bool resets, int64_t length, kvc::Integers lengths_of, kvc::ChosenSequences of, bool newest = false) {
    run_op(kvc::TruncateParams{state.data, s.layers, s.batch, cache.all_sinks, resets, newest, length, lengths_of, of});
  }
  void reset_all() { truncate(true, 0, {}, {}); }

  void truncations() {
    std::vector<int64_t> of_each(static_cast<size_t>(s.batch));
    for (int64_t b = 0; b < s.batch; ++b) of_each[static_cast<size_t>(b)] = b % 7 == 6 ? -b : s.positions / 3 + b;
    truncate(false, 0, {sources.set(of_each)}, {});
    truncate(false, 0, {short_sources.set({of_each.begin(), of_each.end()}), true}, {});
    gather(kvc::imin(s.positions, 32), Form::plain, true);
    truncate(false, 2, {}, {}, true);
    for (int64_t& n : of_each) n = n % 5 - 1;
    truncate(false, 0, {sources.set(of_each)}, {}, true);
    truncate(false, s.positions / 4, {}, {});
    const std::vector<int64_t> one{s.batch - 1};
    truncate(false, 0, {sources.set({1})}, {{destinations.set(one)}, 1});
    if (s.batch > 1) truncate(true, 0, {}, {{destinations.set(one)}, 1});
  }

  // What a rank stores, reads and answers of a text that is dealt out to several.
  void shares() {
    fill(numbers.buffer(), false);
    fill(more_numbers.buffer(), false);
    for (const int64_t ranks : {2, 3}) {
      const int64_t rank = random_below(static_cast<uint32_t>(ranks));
      take_share(ranks, rank);
      if (s.longest > 16) {
        prompts_of_a_share();
        continue;
      }
      for (const Form form : {Form::plain, Form::spaced}) {
        append(0, s.layers, 1);
        append(0, 1, 2 * ranks + 1, form, form == Form::spaced);
        gather(s.positions + 4, form, false);
        gather(kvc::imin(s.positions, 32), form, true);
      }
      append(0, 1, s.positions + 5, Form::htd);
      if (s.head_dim % 8 == 0) attention_of_a_share();
      const std::vector<int64_t> from(static_cast<size_t>(s.batch), s.batch - 1);
      copy(from, nullptr, false);
      copy_between(cache, other, {s.batch - 1}, {0}, false);
      copy_between(other, cache, {0}, {0}, true);
      truncate(false, s.positions / 2, {}, {});
      append(0, s.layers, 3);
      gather(s.positions + 4, Form::plain, false);
    }
    take_share(1, 0);
    append(0, s.layers, 3);
    append(0, 1, s.positions);
  }

  void attention_of_a_share() {
    for (const int64_t count : {1, 2, 5, 16}) {
      if (count > most_rows) continue;
      attend({.count = count});
      for (int i = 0; i < (count == 1 ? 4 : 1); ++i) attend({.count = count, .appends = true});
      attend({.count = count, .appends = true, .ragged = true, .window = 3, .form = Form::spaced});
    }
  }

  void prompts_of_a_share() {
    for (const int64_t count : {17, 70}) {
      attend({.count = count});
      attend({.count = count, .appends = true, .rounds = count == 17});
      attend({.count = count, .appends = true, .ragged = true, .window = 9, .form = Form::htd});
    }
    append(0, 1, s.positions + 5);
    attend({.count = s.longest, .appends = true, .softcap = 2, .lse = false});
    attend({.count = 1, .appends = true});
  }

  // What ranks answer becomes one answer: gathered, and exchanged.
  void merges() {
    const int64_t count = kvc::imin(3, most_rows);
    const int64_t rows = s.batch * count * s.heads * s.group;
    for (const int64_t ranks : {1, 2, 3}) {
      for (const Form form : {Form::plain, Form::htd, Form::spaced}) {
        merge_gathered(ranks, count, rows, form);
        if (kExchanges && ranks > 1) merge_exchanged(ranks, count, rows, form);
      }
    }
  }

  // Numbers that answers and LSEs can be, the last of a buffer.
  float* random_floats(Buffer<float>& buffer) {
    std::vector<float> floats(buffer.size);
    for (float& x : floats) x = static_cast<float>(random_below(2000)) / 1000.0f - 1.0f;
    return buffer.set(floats);
  }

  kvc::MergeParams merge_params(int64_t ranks, int64_t count, int64_t rows, Form form) {
    const int64_t query_heads = s.heads * s.group;
    const Layout layout = Layout::of(form, 1, s.batch, count, query_heads, s.head_dim);
    kvc::MergeParams p{};
    p.rows = rows;
    p.head_dim = s.head_dim;
    p.ranks = ranks;
    char* out = value_out.take(layout.extent * kvc::dtype_size(dtype));
    poison(out, layout, dtype);
    p.out = layout.rows(static_cast<void*>(out));
    p.dtype = dtype;
    if (form != Form::htd) p.lse = reinterpret_cast<float*>(lse.take(rows * 4));
    p.query_heads = kvc::FastDivider::by(static_cast<uint32_t>(query_heads));
    p.positions = kvc::FastDivider::by(static_cast<uint32_t>(count));
    p.failure = failure.data;
    p.state = state.data;
    p.layer = s.layers - 1;
    p.layers = s.layers;
    p.batch = s.batch;
    p.tag = tag.data;
    return p;
  }

  void look_at_merged(const kvc::MergeParams& p, int64_t count, Form form) {
    const Layout layout = Layout::of(form, 1, s.batch, count, s.heads * s.group, s.head_dim);
    look(static_cast<const char*>(p.out.data), layout, count, s.heads * s.group, dtype, "merge");
    uint32_t failed = 0;
    if (kOnHost) copy_out(&failed, failure.data, sizeof(failed));
    if (failed != 0) fail("merge", "ranks differ that are the same");
  }

  void merge_gathered(int64_t ranks, int64_t count, int64_t rows, Form form) {
    kvc::MergeParams p = merge_params(ranks, count, rows, form);
    const int64_t behind = (rows * (s.head_dim + 1) + 1) / 2 * 2;
    p.part_stride = behind + 4 * s.batch + 2;
    Buffer<float> parts(ranks * p.part_stride);
    float* const data = random_floats(parts);
    std::vector<int64_t> of_state(static_cast<size_t>(3 * entries));
    copy_out(of_state.data(), state.data, of_state.size() * sizeof(int64_t));
    std::vector<int64_t> lengths_of(static_cast<size_t>(2 * s.batch + 1), 0);
    const auto layer = of_state.begin() + p.layer * s.batch;
    std::copy_n(layer, s.batch, lengths_of.begin());
    std::copy_n(layer + entries, s.batch, lengths_of.begin() + s.batch);
    for (int64_t r = 0; r < ranks; ++r) {
      copy_in(data + r * p.part_stride + behind, lengths_of.data(), lengths_of.size() * sizeof(int64_t));
    }
    p.answers = data;
    p.lses = data + rows * s.head_dim;
    p.lengths = reinterpret_cast<const int64_t*>(data + behind);
    run_op(p);
    finish();
    look_at_merged(p, count, form);
  }

  // Every rank sends, then every rank receives; in two launches where the inboxes are small.
  void merge_exchanged(int64_t ranks, int64_t count, int64_t rows, Form form) {
    const int64_t rows_at_once = form == Form::spaced ? (rows + 1) / 2 : rows;
    const int64_t lines = rows_at_once * (s.head_dim / 2 + 1);
    const int64_t words = 2 * ranks * lines * 4;
    Buffer<uint32_t> inboxes(ranks * words);
    Buffer<uint32_t> controls(2 * ranks * 3);
    Buffer<float> answers(rows * s.head_dim);
    Buffer<float> lses(rows);
    set_bytes(inboxes.data, 0, inboxes.size * 4);
    set_bytes(controls.data, 0, controls.size * 4);
    kvc::MergeParams p = merge_params(ranks, count, rows, form);
    p.answers = random_floats(answers);
    p.lses = random_floats(lses);
    p.exchange.lines = lines;
    p.exchange.timeout_ns = 1000000000;
    for (int64_t r = 0; r < ranks; ++r) p.exchange.inboxes[r] = inboxes.data + r * words;
    for (const bool sends : {true, false}) {
      p.exchange.sends = sends;
      p.exchange.receives = !sends;
      for (p.rank = 0; p.rank < ranks; ++p.rank) {
        p.exchange.control = controls.data + 3 * (2 * p.rank + (sends ? 0 : 1));
        for (p.first_row = 0; p.first_row < rows; p.first_row += rows_at_once) {
          p.rows = kvc::imin(rows_at_once, rows - p.first_row);
          run_op(p);
        }
      }
    }
    finish();
    look_at_merged(p, count, form);
  }

  Shape s;
  kvc::DType dtype;
  int64_t most_rows;  // of a call about all sequences
  int64_t entries;
  Buffer<uint16_t> keys, values;  // never initialised as a whole
  Buffer<int64_t> state;
  int64_t other_slots;  // of another cache, of one sequence more
  Buffer<uint16_t> other_keys, other_values;
  Buffer<int64_t> other_state;
  Buffer<int64_t> overflows;
  Buffer<float> workspace;
  Places numbers, more_numbers, key_out, value_out, lse;
  Buffer<int64_t> lengths;
  Buffer<int32_t> short_lengths;
  Buffer<int64_t> sources;
  Buffer<int32_t> short_sources;
  Buffer<int64_t> destinations, indices;
  Buffer<int64_t> tag;
  Buffer<uint32_t> failure;
  kvc::CacheView cache, other;
  kvc::ChosenSequences chosen;
  bool saturate = true;
  const char* last_answer = nullptr;
  int64_t last_elements = 0;
};

}  // namespace

// Arguments: "fp32" leaves out the other dtypes, and what takes long (of many sequences, calls with many rows);
// "3/8" runs number 3 (from 0) of eight parts of the shapes; the name of an instruction set chooses it (on a CPU).
int main(int argc, char** argv) {
  // layers, batch, positions, sinks, heads, head_dim, group. One query to a KV head has a kernel of its own; group and
  // count choose among the others' sizes.
  std::vector<Shape> shapes = {
      {2, 1, 64, 0, 2, 64, 1},  {2, 3, 60, 4, 1, 128, 4}, {2, 2, 33, 1, 3, 80, 2},  {2, 1, 90, 2, 2, 120, 1},
      {2, 1, 50, 0, 1, 256, 8}, {2, 1, 24, 3, 2, 512, 3}, {1, 2, 40, 0, 1, 96, 16}, {3, 1, 20, 19, 2, 8, 1},
      {1, 20, 6, 0, 1, 16, 1},   // many sequences for copy_sequences to move at a time
      {2, 2, 30, 2, 1, 248, 1},  // a single query of a large head
      {1, 3, 37, 5, 3, 7, 1},    // nothing is aligned, and there is no attention
      {1, 2, 9, 0, 1, 1, 1},     // a row of one element
      {1, 1, 300, 1, 1, 16, 2},  // several blocks share a head's positions
  };
  // Prompts: calls of up to 70 and 130 rows.
  const Shape prompt_shapes[] = {
      {1, 1, 90, 2, 1, 64, 1, 70},  {2, 2, 80, 0, 1, 128, 1, 70}, {1, 1, 60, 3, 1, 256, 1, 70},
      {1, 1, 40, 0, 1, 512, 1, 70}, {1, 1, 48, 5, 1, 72, 3, 70},
  };
  const Shape long_prompt_shapes[] = {
      {1, 2, 200, 2, 2, 64, 4, 130}, {2, 1, 150, 0, 1, 128, 4, 130}, {1, 1, 100, 4, 1, 256, 4, 70},
      {1, 2, 60, 0, 1, 512, 4, 70},  {1, 1, 150, 3, 1, 136, 8, 70},  {1, 1, 300, 0, 3, 64, 1, 130},
  };
  shapes.insert(shapes.end(), std::begin(prompt_shapes), std::end(prompt_shapes));
  const Shape long_shapes[] = {
      {2, 1, 700, 2, 4, 128, 1}, {1, 2, 300, 0, 1, 96, 16}, {1, 1, 200, 0, 1, 512, 3},
      {1, 150, 40, 0, 1, 16, 1}, {1, 1, 2300, 1, 1, 8, 1},  // sums over more than a piece of rows
      {1, 1, 600, 0, 1, 256, 1},                            // more parts than are merged at a time
  };
  // More parts of several queries than are merged at a time.
  const Shape slow_shape = {1, 1, 4096, 0, 1, 64, 16};
  // What matters to a GPU alone: appends of many vectors; more KV heads than it has room for blocks, so that blocks are
  // small, of either size, and nothing is split; blocks of 16 queries; so many partials that they are merged in groups
  // first.
  const Shape wide_shapes[] = {
      {1, 1, 300, 0, 32, 128, 1},  {1, 70, 20, 0, 4, 64, 1},   {1, 70, 20, 2, 4, 128, 2},  {1, 70, 12, 0, 4, 256, 2},
      {1, 70, 12, 0, 4, 512, 2},   {1, 140, 20, 0, 8, 16, 1},  {1, 40, 20, 0, 4, 128, 8},  {1, 70, 12, 0, 4, 128, 8},
      {1, 120, 12, 0, 4, 128, 4},  {1, 64, 40, 1, 2, 96, 16},  {1, 64, 20, 0, 2, 256, 16}, {1, 70, 12, 0, 4, 256, 8},
      {1, 2, 3500, 0, 4, 128, 16}, {1, 1, 1600, 0, 1, 256, 8},
  };
  bool fp32 = false;
  size_t part = 0;
  size_t parts = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "fp32") == 0) {
      fp32 = true;
      continue;
    }
    if (std::sscanf(argv[i], "%zu/%zu", &part, &parts) == 2 && part < parts) continue;
#if !defined(__CUDACC__) && !defined(SANITIZE_EMULATED)
    if (kvc::cpu::select_instruction_set(argv[i])) continue;
    std::printf("sanitize: this CPU has no %s\n", argv[i]);
    return 2;
#else
    fail(argv[i], "no such argument");
#endif
  }
  if (!kEmulated) {
    shapes.insert(shapes.end(), std::begin(long_shapes), std::end(long_shapes));
    shapes.insert(shapes.end(), std::begin(long_prompt_shapes), std::end(long_prompt_shapes));
  }
  if (!kOnHost) shapes.insert(shapes.end(), std::begin(wide_shapes), std::end(wide_shapes));
  if (!kOnHost && !fp32) shapes.push_back(slow_shape);
  int count = 0;
  for (size_t i = part; i < shapes.size(); i += parts) {
    const Shape& shape = shapes[i];
    for (const kvc::DType dtype : {kvc::DType::f32, kvc::DType::f16, kvc::DType::bf16}) {
      if (fp32 && dtype != kvc::DType::f32) continue;
      std::printf("sanitize: %lld x %lld x %lld positions, %lld heads of %lld, %lld queries each, dtype %d\n",
                  static_cast<long long>(shape.layers), static_cast<long long>(shape.batch),
                  static_cast<long long>(shape.positions), static_cast<long long>(shape.heads),
                  static_cast<long long>(shape.head_dim), static_cast<long long>(shape.group), static_cast<int>(dtype));
      std::fflush(stdout);  // it says where a sanitizer is, should it take long or fail
      Case(shape, dtype, fp32 && !kOnHost && shape.batch * shape.heads > 100).run();
      ++count;
    }
  }
  std::printf("sanitize: %d shapes and dtypes ran\n", count);
}
