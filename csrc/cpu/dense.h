// Shared parts of the dense kernels: jobs, blocks, packed operands, tables.
//
// A job is one (batch, window, head): all its queries meet all its keys. Windows are those of full and grid
// attention, and small residue classes of neighborhood attention, where a mask costs less than to follow the windows
// one by one. Blocks of scores are held transposed, [key][query lane], so that the softmax runs down the rows with one
// query per lane and never crosses lanes.
#pragma once

#include "../geometry.h"
#include "gemm.h"
#include "rows.h"

namespace natten_ext::NATTEN_EXT_ISA {

struct DenseJob {
  int64_t batch, head;
  int64_t y0, x0, step_y, step_x;  // the window's first position, and the distance to the next
};

// Whether a window of neighborhood attention is run here: its classes are of one size and small, and at least half of
// each is in the window of each query.
inline bool is_dense(const Problem& p, const HeadWindow& w) {
  const int64_t height = p.height / w.dilation_y, width = p.width / w.dilation_x;
  return p.height % w.dilation_y == 0 && p.width % w.dilation_x == 0 && height * width <= 128 &&
         2 * w.kernel_y * w.kernel_x >= height * width;
}

// Sizes and block sizes that all jobs of a range of heads share.
template <class T>
struct DensePlan {
  DensePlan(const Problem& p, HeadRange heads, int64_t block_queries_at_most, int64_t block_keys_at_most)
      : heads(heads), problem(p), masked(p.kind == Kind::neighborhood), channels(p.head_dim) {
    if (p.kind == Kind::full) {
      window_x = p.width;
    } else if (p.kind == Kind::grid) {
      window_y = p.window_y, window_x = p.window_x;
      windows_y = p.height / window_y, windows_x = p.width / window_x;
    } else {
      windows_y = window().dilation_y, windows_x = window().dilation_x;
      window_y = p.height / windows_y, window_x = p.width / windows_x;
    }
    queries = window_y * window_x;
    keys = p.kind == Kind::full ? p.key_width : queries;
    key_window_x = p.kind == Kind::full ? p.key_width : window_x;
    padded = round_up_to_lanes<T>(channels);
    jobs_per_head = p.batch * windows_y * windows_x;
    block_queries = query_block(block_queries_at_most);
    block_keys = even_block(keys, block_keys_at_most);
    table_width = masked ? round_up_to_lanes<T>(queries) : p.table_width();
    table_size = (masked ? keys : p.table_height()) * table_width;
  }

  // The window of all heads of neighborhood attention.
  const HeadWindow& window() const { return problem.windows[heads.first]; }

  DenseJob job(int64_t head, int64_t index) const {
    const int64_t windows = windows_y * windows_x, y = index % windows / windows_x, x = index % windows_x;
    if (masked) return {index / windows, head, y, x, windows_y, windows_x};
    return {index / windows, head, y * window_y, x * window_x, 1, 1};
  }

  HeadRange heads;
  const Problem& problem;
  bool masked;  // a neighborhood, whose windows the tables mask
  int64_t channels, padded, window_y = 1, window_x = 1, windows_y = 1, windows_x = 1, queries, keys, key_window_x;
  int64_t jobs_per_head, block_queries, block_keys, table_width, table_size;

 private:
  // Like even_block, in whole vectors. One block less, and a little larger, where that leaves fewer lanes empty.
  int64_t query_block(int64_t limit) const {
    const int64_t block = round_up_to_lanes<T>(even_block(queries, limit));
    const int64_t larger = round_up_to_lanes<T>(even_block(queries, limit + limit / 4));
    const auto lanes = [&](int64_t size) { return (queries + size - 1) / size * size; };
    return lanes(larger) < lanes(block) ? larger : block;
  }
  // Largest block size that splits n into equal blocks of at most `limit`.
  static int64_t even_block(int64_t n, int64_t limit) {
    const int64_t blocks = (n + limit - 1) / limit;
    return blocks == 0 ? 1 : (n + blocks - 1) / blocks;
  }
};

// The rows of a job's window in a tensor, one after the other.
class RowCursor {
 public:
  // At row `r` of a window that is `width` wide.
  RowCursor(const View& v, const DenseJob& job, int64_t width, int64_t r)
      : offset(job.batch * v.batch + job.head * v.head + (job.y0 + r / width * job.step_y) * v.y +
               (job.x0 + r % width * job.step_x) * v.x),
        width_(width),
        left_(width - r % width),
        step_(job.step_x * v.x),
        jump_(job.step_y * v.y - (width - 1) * step_) {}
  void operator++() {
    const bool last = --left_ == 0;
    offset += last ? jump_ : step_;
    if (last) left_ = width_;
  }

  int64_t offset;

 private:
  int64_t width_, left_, step_, jump_;
};

// Where lse holds a job's queries; its rows are heads.
inline RowCursor lse_cursor(const Problem& p, const DenseJob& job, int64_t width, int64_t r) {
  View lse{};
  lse.batch = p.heads * p.height * p.width, lse.head = p.height * p.width, lse.y = p.width, lse.x = 1;
  return {lse, job, width, r};
}

// Rows [first, first + count) of a window to target[count][padded], the padding zero.
template <class T>
void pack_rows(T* target, const View& v, const DensePlan<T>& plan, const DenseJob& job, int64_t width, int64_t first,
               int64_t count, T factor) {
  RowCursor row(v, job, width, first);
  for (int64_t r = 0; r < count; ++r, ++row, target += plan.padded) {
    load_row(target, v, row.offset, plan.channels, factor);
    for (int64_t c = plan.channels; c < plan.padded; ++c) target[c] = 0;
  }
}

// The same for queries, whose rows up to the block's lanes are zero, and transposed to [padded][lanes].
template <class T>
void pack_queries(T* rows, T* transposed, const View& v, const DensePlan<T>& plan, const DenseJob& job, int64_t first,
                  int64_t count, T factor) {
  pack_rows(rows, v, plan, job, plan.window_x, first, count, factor);
  std::fill(rows + count * plan.padded, rows + plan.block_queries * plan.padded, T(0));
  transpose(transposed, plan.block_queries, rows, plan.padded, plan.block_queries, plan.padded);
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

// Key-side operand of a job: packed once if it fits in the cache, otherwise block by block.
template <class T>
class KeyOperand {
 public:
  static constexpr int64_t kWholeAtMost = 1 << 16;

  KeyOperand(const View& view, const DensePlan<T>& plan)
      : view_(view), plan_(plan), whole_(plan.keys * plan.padded <= kWholeAtMost) {
    if (view) buffer_ = Buffer<T>((whole_ ? plan.keys : plan.block_keys) * plan.padded);
  }
  void start(const DenseJob& job) {
    job_ = job;
    if (whole_ && view_) pack_rows<T>(buffer_, view_, plan_, job_, plan_.key_window_x, 0, plan_.keys, 1);
  }
  // Rows [first, first + count), at most a block of them, [count][padded].
  const T* block(int64_t first, int64_t count) {
    if (whole_) return buffer_ + first * plan_.padded;
    pack_rows<T>(buffer_, view_, plan_, job_, plan_.key_window_x, first, count, 1);
    return buffer_;
  }

 private:
  View view_;
  const DensePlan<T>& plan_;
  bool whole_;
  Buffer<T> buffer_;
  DenseJob job_{};
};

// Key-side gradient of a job, added up over the blocks of queries: in working memory, or, where a job is large,
// straight in the output if that has the compute type and whole vectors per row.
template <class T>
class KeyGradient {
 public:
  static constexpr int64_t kBufferAtMost = 1 << 17;

  static bool in_place(const View& view, const DensePlan<T>& plan) {
    const bool same = view.dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64);
    return same && plan.windows_y * plan.windows_x == 1 && plan.window_y == 1 && plan.channels == plan.padded &&
           plan.keys * plan.padded > kBufferAtMost;
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

// Visits the windows of a masked plan: visit(key, query, y, x) with the place of their offset in a table, for each
// key in the window of each query.
template <class T, class Visit>
void for_each_in_windows(const DensePlan<T>& plan, const Visit& visit) {
  const HeadWindow& w = plan.window();
  const int64_t center_y = plan.problem.table_kernel_y() - 1, center_x = plan.problem.table_kernel_x() - 1;
  for (int64_t query = 0; query < plan.queries; ++query) {
    const int64_t y = query / plan.window_x, x = query % plan.window_x;
    const int64_t first_y = class_window_start(y, plan.window_y, w.kernel_y);
    const int64_t first_x = class_window_start(x, plan.window_x, w.kernel_x);
    for (int64_t ky = first_y; ky < first_y + w.kernel_y; ++ky) {
      for (int64_t kx = first_x; kx < first_x + w.kernel_x; ++kx) {
        visit(ky * plan.window_x + kx, query, ky - y + center_y, kx - x + center_x);
      }
    }
  }
}

// Tables of a range of heads in the compute type, times `factor`, laid out so that a vector of queries reads (and its
// gradient adds to) consecutive values. Of grid attention: the table reversed along x, where an offset grows with the
// query's x. Of a masked plan: a matrix [key][query], in which `masked` stands for the keys outside the window.
template <class T>
class DenseTables {
 public:
  // Score of a masked key: its exponential vanishes.
  static constexpr T kMasked = T(-1e30);

  DenseTables(const View& view, const DensePlan<T>& plan, T factor, T masked) : first_(plan.heads.first) {
    if (!view && !(plan.masked && masked != 0)) return;
    stride_ = plan.table_size + kLanes<T>;  // the last vector of a row may read past the table
    buffer_ = Buffer<T>(plan.heads.count() * stride_);
    for (int64_t head = plan.heads.first; head < plan.heads.last; ++head) {
      T* table = buffer_ + (head - first_) * stride_;
      std::fill(table, table + stride_, plan.masked ? masked : T(0));
      const auto value = [&](int64_t y, int64_t x) {
        return view ? load_value<T>(view, head * view.head + y * view.y + x * view.x) * factor : T(0);
      };
      if (plan.masked) {
        for_each_in_windows(plan, [&](int64_t key, int64_t query, int64_t y, int64_t x) {
          table[key * plan.table_width + query] = value(y, x);
        });
      } else {
        for (int64_t i = 0; i < plan.table_size; ++i) {
          table[i] = value(i / plan.table_width, plan.table_width - 1 - i % plan.table_width);
        }
      }
    }
  }
  const T* head(int64_t head) const { return buffer_.data() == nullptr ? nullptr : buffer_ + (head - first_) * stride_; }

 private:
  Buffer<T> buffer_;
  int64_t first_, stride_ = 0;
};

// The gradient of one head's table over the jobs of a task: added up in the layout of DenseTables, then written to a
// partial table [y][x].
template <class T>
class DenseTableGradient {
 public:
  DenseTableGradient(const DensePlan<T>& plan, bool wanted)
      : plan_(plan), buffer_(wanted ? plan.table_size + kLanes<T> : 0) {}

  T* data() const { return buffer_.data(); }
  void start() {
    if (data() != nullptr) std::fill_n(data(), plan_.table_size + kLanes<T>, T(0));
  }
  void finish(T* partial) {
    if (data() == nullptr) return;
    const int64_t width = plan_.problem.table_width(), height = plan_.problem.table_height();
    std::fill_n(partial, height * width, T(0));
    if (plan_.masked) {
      for_each_in_windows(plan_, [&](int64_t key, int64_t query, int64_t y, int64_t x) {
        partial[y * width + x] += buffer_[key * plan_.table_width + query];
      });
    } else {
      for (int64_t i = 0; i < height * width; ++i) partial[i] = buffer_[i / width * width + width - 1 - i % width];
    }
  }

 private:
  const DensePlan<T>& plan_;
  Buffer<T> buffer_;
};

// Where a block of queries finds its values in a table of DenseTables: index(key, lane) = key_base + lane_base[lane].
template <class T>
class TableIndex {
 public:
  TableIndex(const DensePlan<T>& plan, bool used)
      : plan_(plan),
        key_base_(used ? plan.keys : 0),
        lane_base_(plan.block_queries),
        consecutive_(plan.block_queries / kLanes<T>) {
    for (int64_t key = 0; used && key < plan.keys; ++key) {
      const int64_t y = key / plan.window_x, x = key % plan.window_x;
      key_base_[key] = plan.masked ? key * plan.table_width
                                   : (y + plan.window_y - 1) * plan.table_width + plan.window_x - 1 - x;
    }
  }

  void start(int64_t first, int64_t count) {
    constexpr int L = kLanes<T>;
    count_ = count;
    for (int64_t lane = 0; lane < plan_.block_queries; ++lane) {
      const int64_t query = first + std::min(lane, count - 1);
      lane_base_[lane] = plan_.masked ? first + lane : query % plan_.window_x - query / plan_.window_x * plan_.table_width;
    }
    for (int64_t lane = 0; lane < plan_.block_queries; lane += L) {
      const int64_t valid = std::min<int64_t>(L, count - lane);
      consecutive_[lane / L] = plan_.masked || (valid > 0 && (first + lane) % plan_.window_x + valid <= plan_.window_x);
    }
  }
  NATTEN_EXT_INLINE Vector<T> read(const T* table, int64_t key, int64_t lane) const {
    constexpr int L = kLanes<T>;
    table += key_base_[key];
    if (consecutive_[lane / L]) return load(table + lane_base_[lane]);
    Vector<T> result{};
    for (int i = 0; i < L; ++i) result[i] = table[lane_base_[lane + i]];
    return result;
  }
  // Lanes past the block's queries must hold zero where a vector is consecutive.
  NATTEN_EXT_INLINE void add(T* table, int64_t key, int64_t lane, Vector<T> value) const {
    constexpr int L = kLanes<T>;
    table += key_base_[key];
    if (consecutive_[lane / L]) {
      T* target = table + lane_base_[lane];
      store(target, load(target) + value);
    } else {
      for (int i = 0; i < L && lane + i < count_; ++i) table[lane_base_[lane + i]] += value[i];
    }
  }

 private:
  const DensePlan<T>& plan_;
  Buffer<int64_t> key_base_, lane_base_;
  Buffer<bool> consecutive_;
  int64_t count_ = 0;
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

// -s|k|^2 in units of log2, for each key of a block.
template <class T>
void l2_key_bias(T* bias, const T* key, int64_t keys, const DensePlan<T>& plan, double scale) {
  for (int64_t j = 0; j < keys; ++j) {
    const T* row = key + j * plan.padded;
    bias[j] = T(-scale) * kLog2E<T> * dot_row(row, row, plan.channels);
  }
}

// What a call of a gradient kernel works on. Gradients of queries and tables want all keys at once, those of keys and
// values all queries.
struct DenseShare {
  int64_t query_begin, query_end, key_begin, key_end;
  bool want_query_side, want_key_side;
};

// Runs the gradient kernel `make(keys_at_once)` over all jobs, so that every element is summed by one thread in an
// order that does not depend on the threads, and reduces the partial gradients of the tables.
//
// A job is usually one task. A few large jobs are split instead: first by queries, then again by keys, which
// computes the scores twice but keeps every thread busy.
template <class T, class Make>
void run_dense_gradients(const Arguments& a, const DensePlan<T>& plan, const Make& make) {
  const Problem& p = a.problem;
  const int64_t jobs = plan.heads.count() * plan.jobs_per_head;
  const bool split = jobs < 8 && plan.queries * plan.keys >= int64_t(1) << 18;
  // Partial tables per head: few enough to be small beside the other gradients.
  const int64_t slices = split ? std::min<int64_t>(8, (plan.queries + plan.block_queries - 1) / plan.block_queries) : 1;
  const int64_t chunks = split ? plan.jobs_per_head : std::min<int64_t>(plan.jobs_per_head, 64);
  const int64_t parts = chunks * slices, table_size = p.table_height() * p.table_width();
  Buffer<T> partial(a.grad_bias ? plan.heads.count() * parts * table_size : 0);
  const auto slice_begin = [](int64_t slice, int64_t slices, int64_t n, int64_t block) {
    return std::min(n, slice * ((n + slices * block - 1) / (slices * block)) * block);
  };
  const auto query_task = [&](auto& worker, int64_t task) {
    // Heads vary fastest: they share the pages of memory.
    const int64_t head = task % plan.heads.count(), part = task / plan.heads.count();
    const int64_t chunk = part / slices, slice = part % slices;
    worker.table_gradient.start();
    const int64_t query_begin = slice_begin(slice, slices, plan.queries, plan.block_queries);
    const int64_t query_end = slice_begin(slice + 1, slices, plan.queries, plan.block_queries);
    const int64_t end = (chunk + 1) * plan.jobs_per_head / chunks;
    for (int64_t job = chunk * plan.jobs_per_head / chunks; job < end; ++job) {
      if (job + 1 < end) worker.prefetch(plan.job(plan.heads.first + head, job + 1));
      worker.run(plan.job(plan.heads.first + head, job), {query_begin, query_end, 0, plan.keys, true, !split});
    }
    worker.table_gradient.finish(partial + (head * parts + part) * table_size);
  };
  for_each_task(plan.heads.count() * parts, [&] { return make(split ? 0 : plan.keys); }, query_task);
  if (split) {
    const int64_t key_slices = std::min<int64_t>(8, (plan.keys + plan.block_keys - 1) / plan.block_keys);
    const int64_t keys_at_once = slice_begin(1, key_slices, plan.keys, plan.block_keys);
    for_each_task(
        jobs * key_slices, [&] { return make(keys_at_once); },
        [&](auto& worker, int64_t task) {
          const int64_t job = task / key_slices, slice = task % key_slices;
          const int64_t begin = slice_begin(slice, key_slices, plan.keys, plan.block_keys);
          const int64_t end = slice_begin(slice + 1, key_slices, plan.keys, plan.block_keys);
          worker.run(plan.job(plan.heads.first + job / plan.jobs_per_head, job % plan.jobs_per_head),
                     {0, plan.queries, begin, end, false, true});
        });
  }
  if (a.grad_bias) reduce_tables<T>(partial, parts, a.grad_bias, plan.heads, p.table_height(), p.table_width());
}

}  // namespace natten_ext::NATTEN_EXT_ISA
