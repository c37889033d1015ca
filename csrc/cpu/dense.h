// Shared parts of the dense kernels: jobs, blocks, packed operands.
//
// A job is one (batch, window, head): all its queries meet all its keys. Windows are those of full and grid
// attention, and small residue classes of neighborhood attention, where a mask costs less than to follow the windows
// one by one. Blocks of scores are held transposed, [key][query lane], so that the softmax runs down the rows with one
// query per lane and never crosses lanes.
#pragma once

#include "../geometry.h"
#include "gemm.h"
#include "origin.h"

namespace natten_ext::NATTEN_EXT_ISA {

//
// Where heads share a key head, the query-centred orders take them one by one, and the gradient orders all of them in one
// job, one member after the other: each adds to the same sums of keys and values.
struct DenseJob {
  int64_t batch = -1, head = 0, key_head = 0;  // no job; of several heads the first
  int64_t z0, y0, x0, step_z, step_y, step_x;  // the window's first position, and the distance to the next
  int64_t height;                              // of the window

  int64_t head_of(const View& v) const { return v.of_keys ? key_head : head; }
  bool same_keys(DenseJob other) const {
    other.head = head;
    return *this == other;
  }
  DenseJob of_head(int64_t other) const {
    DenseJob job = *this;
    job.head = other;
    return job;
  }

 private:
  bool operator==(const DenseJob&) const = default;
};

// Sizes and block sizes that all jobs of a range of heads share.
template <class T>
struct DensePlan {
  DensePlan(const Problem& p, HeadRange heads, int64_t block_queries_at_most, int64_t block_keys_at_most)
      : heads(heads), problem(p), masked(p.kind == Kind::neighborhood), channels(p.head_dim) {
    if (p.kind == Kind::full) {
      window_x = p.width;
    } else if (p.kind == Kind::grid) {
      window_z = p.window_z, window_y = p.window_y, window_x = p.window_x;
      windows_z = p.depth / window_z, windows_y = p.height / window_y, windows_x = p.width / window_x;
    } else {
      const HeadWindow& w = head_window();
      windows_z = w.z.dilation, windows_y = w.y.dilation, windows_x = w.x.dilation;
      window_z = p.depth / windows_z, window_y = p.height / windows_y, window_x = p.width / windows_x;
    }
    queries = window_z * window_y * window_x;
    keys = p.kind == Kind::full ? p.key_width : queries;
    key_window_x = p.kind == Kind::full ? p.key_width : window_x;
    padded = round_up_to_lanes<T>(channels);
    shared = p.shared();
    jobs_per_head = p.batch * windows_z * windows_y * windows_x;
    block_queries = query_block(block_queries_at_most);
    block_keys = even_block(keys, block_keys_at_most);
    table_width = masked ? round_up_to_lanes<T>(queries) : p.table_width();
    table_size = masked ? keys * table_width : p.table_size();
  }

  // A job, or a part of it.
  Attention attention(int64_t some_queries, int64_t some_keys) const {
    return {double(some_queries), double(some_keys), double(channels), kLanes<T>, sizeof(T)};
  }
  // Nanoseconds of a whole job.
  double cost(const OrderCost& order) const {
    const Attention all = attention(queries, keys);
    return all.scores(order.products) + all.rows(order.tensors);
  }

  // The window of all heads of neighborhood attention.
  const HeadWindow& head_window() const { return problem.windows[heads.first]; }

  DenseJob job(int64_t head, int64_t index) const {
    const int64_t line = index / windows_x, plane = line / windows_y, x = index % windows_x, y = line % windows_y;
    const int64_t batch = windows_z == 1 ? plane : plane / windows_z, z = windows_z == 1 ? 0 : plane % windows_z;
    const int64_t key_head = head / shared;
    if (masked) return {batch, head, key_head, z, y, x, windows_z, windows_y, windows_x, window_y};
    return {batch, head, key_head, z * window_z, y * window_y, x * window_x, 1, 1, 1, window_y};
  }

  // The heads of keys and values.
  HeadRange key_heads() const { return heads.of_keys(shared); }

  HeadRange heads;
  const Problem& problem;
  bool masked;  // a neighborhood, whose windows the tables mask
  int64_t channels, padded, window_z = 1, window_y = 1, window_x = 1, windows_z = 1, windows_y = 1, windows_x = 1;
  int64_t shared, queries, keys, key_window_x;
  int64_t jobs_per_head, block_queries, block_keys, table_width, table_size;

 private:
  // Whole vectors: even blocks, or one that is a little larger.
  int64_t query_block(int64_t limit) const {
    const int64_t vectors = (queries + kLanes<T> - 1) / kLanes<T>, at_most = std::max<int64_t>(1, limit / kLanes<T>);
    return kLanes<T> * (4 * vectors <= 5 * at_most ? vectors : even_block(vectors, at_most));
  }
};

// The rows of a job's window in a tensor, one after the other.
class RowCursor {
 public:
  // At row `r` of a window that is `width` wide.
  RowCursor(const View& v, const DenseJob& job, int64_t width, int64_t r)
      : offset(job.batch * v.batch + job.head_of(v) * v.head + job.z0 * v.z + job.y0 * v.y + job.x0 * v.x),
        width_(width),
        height_(job.height),
        left_(width),
        lines_left_(height_),
        step_(job.step_x * v.x),
        jump_(job.step_y * v.y - width * step_),
        plane_jump_(job.step_z * v.z - height_ * job.step_y * v.y) {
    if (r == 0) return;  // as in small windows, where divisions take long
    const int64_t line = r / width, x = r % width, z = line / height_, y = line % height_;
    offset += z * job.step_z * v.z + y * job.step_y * v.y + x * step_;
    left_ -= x;
    lines_left_ -= y;
  }
  void operator++() {
    offset += step_;
    if (--left_ > 0) return;
    offset += jump_;
    left_ = width_;
    if (--lines_left_ > 0) return;
    offset += plane_jump_;
    lines_left_ = height_;
  }

  int64_t offset;

 private:
  int64_t width_, height_, left_, lines_left_, step_, jump_, plane_jump_;
};

// Where lse holds a job's queries; its rows are heads.
inline RowCursor lse_cursor(const Problem& p, const DenseJob& job, int64_t width, int64_t r) {
  View lse{};
  lse.batch = p.heads * p.queries(), lse.head = p.queries(), lse.z = p.height * p.width, lse.y = p.width, lse.x = 1;
  return {lse, job, width, r};
}

// Rows [first, first + count) of a window to target[count][padded], the padding zero; `origin` and `factor` as load_row.
template <class T>
void pack_rows(T* target, const View& v, const DensePlan<T>& plan, const DenseJob& job, int64_t width, int64_t first,
               int64_t count, T factor, const T* origin) {
  RowCursor row(v, job, width, first);
  for (int64_t r = 0; r < count; ++r, ++row, target += plan.padded) {
    if (plan.padded > plan.channels) store(target + plan.padded - kLanes<T>, Vector<T>{});
    load_row(target, v, row.offset, plan.channels, factor, origin);
  }
}

// The same for queries, whose rows up to whole vectors of them are zero, and transposed to [padded][lanes].
template <class T>
void pack_queries(T* rows, T* transposed, const View& v, const DensePlan<T>& plan, const DenseJob& job, int64_t first,
                  int64_t count, T factor, const T* origin = nullptr) {
  pack_rows(rows, v, plan, job, plan.window_x, first, count, factor, origin);
  const int64_t lanes = round_up_to_lanes<T>(count);
  std::fill(rows + count * plan.padded, rows + lanes * plan.padded, T(0));
  transpose(transposed, lanes, rows, plan.padded, lanes, plan.padded);
}

// Rows [first, first + count) of target, scaled.
template <class T>
void unpack_rows(const T* rows, const View& v, const DensePlan<T>& plan, const DenseJob& job, int64_t width,
                 int64_t first, int64_t count, T factor) {
  RowCursor row(v, job, width, first);
  for (int64_t r = 0; r < count; ++r, ++row) store_row(rows + r * plan.padded, v, row.offset, plan.channels, factor);
}

// Asks for the rows of a small window that is worked on next: they are too far apart for the hardware to guess.
template <class T>
void prefetch_rows(const View& v, const DensePlan<T>& plan, const DenseJob& job) {
  constexpr int64_t kAtMost = 128;
  if (!v || plan.keys > kAtMost || plan.queries > kAtMost) return;
  const int64_t value_bytes = v.dtype == DType::float64 ? 8 : v.dtype == DType::float32 ? 4 : 2;
  const int64_t rows = plan.problem.kind == Kind::full ? plan.keys : plan.queries;
  RowCursor row(v, job, plan.key_window_x, 0);
  for (int64_t r = 0; r < rows; ++r, ++row) {
    const char* data = static_cast<const char*>(v.data) + row.offset * value_bytes;
    for (int64_t byte = 0; byte < plan.channels * value_bytes; byte += 64) __builtin_prefetch(data + byte, 0, 2);
  }
}

// Key-side operand of a job, less an origin if it has one: packed once if it fits in the cache, otherwise block by block.
template <class T>
class KeyOperand {
 public:
  static constexpr int64_t kWholeAtMost = 1 << 16;

  KeyOperand(const View& view, const DensePlan<T>& plan, Origin<T>* origin = nullptr, int64_t whole_at_most = kWholeAtMost)
      : view_(view), plan_(plan), origin_(origin), whole_(plan.keys * plan.padded <= whole_at_most) {
    if (view) buffer_ = Buffer<T>((whole_ ? plan.keys : plan.block_keys) * plan.padded);
  }
  void start(const DenseJob& job) {
    if (job.same_keys(job_)) return;  // another part of the job before, or another head
    job_ = job;
    packed_ = -1;
    origin_of_job_ = origin_ == nullptr ? nullptr : origin_->at(job.batch, job.key_head);
    if (whole_ && view_) pack(0, plan_.keys);
  }
  // Rows [first, first + count), at most a block of them, [count][padded].
  const T* block(int64_t first, int64_t count) {
    if (whole_) return buffer_ + first * plan_.padded;
    if (packed_ != first) pack(first, count);
    return buffer_;
  }
  // What the rows of the job are counted from; null: zero.
  const T* origin() const { return origin_of_job_; }

 private:
  void pack(int64_t first, int64_t count) {
    pack_rows<T>(buffer_, view_, plan_, job_, plan_.key_window_x, first, count, 1, origin_of_job_);
    packed_ = first;
  }

  View view_;
  const DensePlan<T>& plan_;
  Origin<T>* origin_;
  const T* origin_of_job_ = nullptr;
  bool whole_;
  Buffer<T> buffer_;
  DenseJob job_{};
  int64_t packed_ = -1;  // first row of the block at hand
};

// Key-side gradient of a job, added up over the blocks of queries: in working memory, or, where a job is large,
// straight in the output if that has the compute type and whole vectors per row.
template <class T>
class KeyGradient {
 public:
  static constexpr int64_t kBufferAtMost = 1 << 17;

  static bool in_place(const View& view, const DensePlan<T>& plan) {
    const bool same = view.dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64);
    const bool one_line = plan.keys == plan.key_window_x && plan.windows_z * plan.windows_y * plan.windows_x == 1;
    return same && one_line && plan.channels == plan.padded && plan.keys * plan.padded > kBufferAtMost;
  }
  KeyGradient(const View& view, const DensePlan<T>& plan, int64_t keys)
      : view_(view), plan_(plan), in_place_(in_place(view, plan)), stride_(in_place_ ? view.x : plan.padded) {
    if (view && !in_place_) buffer_ = Buffer<T>(keys * plan.padded);
  }
  explicit operator bool() const { return static_cast<bool>(view_); }
  // Keys [first, last) of the job.
  void start(const DenseJob& job, int64_t first) {
    job_ = job;
    first_ = first;
  }
  T* row(int64_t key) {
    if (in_place_) return static_cast<T*>(view_.data) + RowCursor(view_, job_, plan_.key_window_x, key).offset;
    return buffer_ + (key - first_) * plan_.padded;
  }
  int64_t stride() const { return stride_; }
  void finish(int64_t last, T factor) {
    if (!in_place_) {
      unpack_rows<T>(buffer_, view_, plan_, job_, plan_.key_window_x, first_, last - first_, factor);
    } else if (factor != 1) {
      for (int64_t key = first_; key < last; ++key) {
        T* values = row(key);
        for (int64_t c = 0; c < plan_.channels; ++c) values[c] *= factor;
      }
    }
  }

 private:
  View view_;
  const DensePlan<T>& plan_;
  bool in_place_;
  int64_t stride_;
  Buffer<T> buffer_;
  DenseJob job_{};
  int64_t first_ = 0;
};

// sum over channels of a[c] * b[c]
template <class T>
NATTEN_EXT_INLINE T dot_row(const T* a, const T* b, int64_t n) {
  constexpr int L = kLanes<T>;
  Vector<T> sum{};
  int64_t c = 0;
  for (; c + L <= n; c += L) sum += load(a + c) * load(b + c);
  T result = horizontal_sum<T>(sum);
  for (; c < n; ++c) result += a[c] * b[c];
  return result;
}

template <class T>
NATTEN_EXT_INLINE T sum_row(const T* a, int64_t n) {
  constexpr int L = kLanes<T>;
  Vector<T> sum{};
  int64_t c = 0;
  for (; c + L <= n; c += L) sum += load(a + c);
  T result = horizontal_sum<T>(sum);
  for (; c < n; ++c) result += a[c];
  return result;
}

// out[lane] = sum over channels of a[c][lane] * b[c][lane], for a block of queries, added up as gemm adds up a product of
// the block: where all of a row's weight is on one key, the mean of its products is that product to the last bit.
template <class T>
void dot_lanes(T* out, const T* a, const T* b, int64_t channels, int64_t lanes) {
  constexpr int L = kLanes<T>;
  for (int64_t lane = 0; lane < lanes; lane += L) {
    Vector<T> sum{};
    for (int64_t c = 0; c < channels; ++c) sum += load(a + c * lanes + lane) * load(b + c * lanes + lane);
    store(out + lane, sum);
  }
}

// row[c] -= factor * other[c]
template <class T>
NATTEN_EXT_INLINE void subtract_row(T* row, const T* other, T factor, int64_t n) {
  for (int64_t c = 0; c < n; ++c) row[c] -= factor * other[c];
}

// -s|k|^2 in units of log2, for each key of a block.
template <class T>
void l2_key_bias(T* bias, const T* key, int64_t keys, const DensePlan<T>& plan, double scale) {
  for (int64_t j = 0; j < keys; ++j) {
    const T* row = key + j * plan.padded;
    bias[j] = T(-scale) * kLog2E<T> * dot_row(row, row, plan.channels);
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
