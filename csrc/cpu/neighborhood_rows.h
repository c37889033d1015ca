// What the neighborhood kernels hold in working memory: transposed rows of the operands, and expanded tables.
#pragma once

#include <map>

#include "neighborhood_jobs.h"
#include "origin.h"

namespace natten_ext::NATTEN_EXT_ISA {

// A few rows [channel][x] of a few planes: a ring over the rows of a class, and one over its planes. Margins stay zero.
template <class T>
class RowRing {
 public:
  void resize(int64_t planes, int64_t rows, int64_t channels, const ClassGeometry<T>& g) {
    const int64_t size = planes * rows * channels * g.row_stride;
    if (size > capacity_) buffer_ = Buffer<T>(capacity_ = size);
    planes_ = planes;
    rows_ = rows;
    channels_ = channels;
    stride_ = g.row_stride;
    margin_ = g.margin;
    std::fill(buffer_.data(), buffer_ + size, T(0));
  }
  // Channel 0 at x = 0.
  T* row(Row row) const {
    const int64_t plane = planes_ > 1 ? row.z % planes_ * rows_ : 0;
    return buffer_ + (plane + row.y % rows_) * channels_ * stride_ + margin_;
  }
  int64_t planes() const { return planes_; }
  int64_t rows() const { return rows_; }
  int64_t stride() const { return stride_; }
  void clear(Row which) {
    T* begin = row(which) - margin_;
    std::fill(begin, begin + channels_ * stride_, T(0));
  }

 private:
  Buffer<T> buffer_;
  int64_t capacity_ = 0, planes_ = 1, rows_ = 1, channels_ = 0, stride_ = 0, margin_ = 0;
};

// Moves rows of a tensor to and from [channel][x].
template <class T>
class RowTransposer {
 public:
  static constexpr int L = kLanes<T>;

  explicit RowTransposer(int64_t channels)
      : channels_(channels), padded_(round_up_to_lanes<T>(channels)), rows_(L * padded_) {
    std::fill(rows_.data(), rows_ + L * padded_, T(0));
  }
  // A row of the tensor, less `origin` ([channel][lane], none if null), times `factor`.
  void load(T* target, int64_t stride, const View& v, const NeighborhoodJob& job, Row row, T factor,
            const T* origin = nullptr) const {
    int64_t at[L];
    job.lane_offsets<L>(v, row, 0, at);
    const int64_t step = job.block_step<L>(v), end = job.blocks<L>({0, job.columns.count}).end;
    for (int64_t b = 0; b < end; ++b) {
      const int64_t lanes = job.interleaved ? L : std::min<int64_t>(L, job.columns.count - b * L);
      const auto finish = [&](const Vector<T>* square, int64_t c, int64_t n) __attribute__((always_inline)) {
        for (int64_t i = 0; i < n; ++i) {
          const Vector<T> counted = origin != nullptr ? square[i] - NATTEN_EXT_ISA::load(origin + (c + i) * L) : square[i];
          store(target + (c + i) * stride + b * L, counted * factor);
        }
      };
      // Whole squares come straight from the tensor, the rest by way of staged rows.
      const int64_t whole = lanes == L ? channels_ / L * L : 0;
      Vector<T> square[L];
      visit_numbers<T>(v, b * step, [&](const auto* numbers) __attribute__((always_inline)) {
        for (int64_t i = 0; whole > 0 && i < L; ++i) prefetch_row(numbers + at[i] + 3 * step, channels_);
        for (int64_t c = 0; c < whole; c += L) {
          load_transposed<T>([&](int r) __attribute__((always_inline)) { return numbers + at[r] + c; }, square);
          finish(square, c, L);
        }
      });
      if (whole == channels_) continue;
      for (int64_t lane = 0; lane < L; ++lane) {
        T* staged = rows_ + lane * padded_;
        if (lane < lanes) load_row<T>(staged, v, at[lane] + b * step + whole, channels_ - whole, 1);
        else std::fill_n(staged, channels_, T(0));
      }
      for (int64_t c = whole; c < channels_; c += L) {
        load_transposed<T>(rows_ + c - whole, padded_, square);
        finish(square, c, std::min<int64_t>(L, channels_ - c));
      }
    }
  }
  // One block of queries or keys, from source[channel][stride], each lane times its factor.
  void unload(const T* source, int64_t stride, const View& v, const NeighborhoodJob& job, Row row, int64_t b,
              Vector<T> factors) const {
    int64_t at[L];
    job.lane_offsets<L>(v, row, b, at);
    const int64_t lanes = job.lanes<L>(b);
    T factor[L];
    store(factor, factors);
    visit_numbers<T>(v, 0, [&](auto* to) __attribute__((always_inline)) {
      Vector<T> square[L];
      int64_t c = 0;
      for (; c + L <= channels_; c += L) {
        load_transposed<T>(source + c * stride, stride, square);
        for (int64_t i = 0; i < lanes; ++i) store_narrow(to + at[i] + c, square[i] * factor[i]);
      }
      if (c == channels_) return;
      for (int64_t i = 0; i < channels_ - c; ++i) store(rows_ + i * L, NATTEN_EXT_ISA::load(source + (c + i) * stride));
      load_transposed<T>(rows_.data(), L, square);
      for (int64_t i = 0; i < lanes; ++i) store_first(to + at[i] + c, square[i] * factor[i], channels_ - c);
    });
  }

  // All of a row that the job owns, from source[channel][stride].
  void unload_row(const T* source, int64_t stride, const View& v, const NeighborhoodJob& job, Row row, T factor) const {
    const Range blocks = job.blocks<L>(job.columns.owned);
    for (int64_t b = blocks.start; b < blocks.end; ++b) unload(source + b * L, stride, v, job, row, b, broadcast(factor));
  }

 private:
  int64_t channels_, padded_;
  Buffer<T> rows_;
};

// Tables of one head, or of interleaved ones, expanded to vectors:
// [table][key plane - query plane][key row - query row][kx][lanes].
template <class T>
class ExpandedTable {
 public:
  static constexpr int L = kLanes<T>;

  void resize(const ClassGeometry<T>& g) {
    kz_ = g.kz, ky_ = g.ky, row_size_ = g.kx * L;
    size_ = g.tables * (2 * kz_ - 1) * (2 * ky_ - 1) * row_size_;
    if (size_ > capacity_) buffer_ = Buffer<T>(capacity_ = size_);
  }
  bool empty() const { return size_ == 0; }
  void clear() { std::fill(buffer_.data(), buffer_ + size_, T(0)); }
  // [kx][lanes] of a query block for keys that far from the query, followed by those of the next row.
  T* row(int64_t table, Row distance) const {
    return buffer_ + ((table * (2 * kz_ - 1) + distance.z + kz_ - 1) * (2 * ky_ - 1) + distance.y + ky_ - 1) * row_size_;
  }
  // The same for the first row of keys that row r of a group attends in a plane.
  T* row(int64_t table, const RowGroup& group, int r, int64_t plane) const {
    return row(table, {plane - group.z, group.keys[r].start - (group.y + r)});
  }

  // Calls visit(value, lane, i) for each value, with its index in the lane's table, or masked(value) where a query does not see
  // the key.
  template <class Visit, class Masked>
  void for_each(const ClassGeometry<T>& g, const Problem& p, const Visit& visit, const Masked& masked) const {
    const int64_t center_z = p.table_kernel_z() - 1, center_y = p.table_kernel_y() - 1, center_x = p.table_kernel_x() - 1;
    const int64_t height = p.table_height(), width = p.table_width();
    for (int64_t table = 0; table < g.tables; ++table) {
      const int32_t* offsets = g.table_offsets.data() + table * row_size_;
      for (int64_t dz = 1 - kz_; dz < kz_; ++dz) {
        for (int64_t dy = 1 - ky_; dy < ky_; ++dy) {
          T* values = row(table, {dz, dy});
          const int64_t centre = ((dz + center_z) * height + dy + center_y) * width + center_x;
          for (int64_t i = 0; i < row_size_; ++i) {
            if (offsets[i] == g.kNoKey) masked(values[i]);
            else if (offsets[i] != g.kNoQuery) visit(values[i], i % L, centre + offsets[i]);
          }
        }
      }
    }
  }
  // With the values of the job's heads (zeros without a table), `as` done to each, and what stands for keys that are not seen.
  template <class As>
  void fill(const ClassGeometry<T>& g, const Problem& p, const View& bias, const NeighborhoodJob& job, const As& as, T not_seen) {
    resize(g);
    clear();
    const int64_t size = p.table_size(), height = p.table_height(), width = p.table_width();
    const int64_t tables = job.interleaved ? L : 1, of_lane = job.interleaved ? size : 0;
    Buffer<T> values(bias ? tables * size : 0);
    for (int64_t i = 0; bias && i < tables * size; ++i) {
      const int64_t x = i % width, y = i / width % height, z = i / width / height % p.table_depth();
      values[i] = as(load_value<T>(bias, job.classes[i / size].head * bias.head + z * bias.z + y * bias.y + x * bias.x));
    }
    const auto read = [&](T& value, int64_t lane, int64_t i) {
      if (bias) value = values[lane * of_lane + i];
    };
    for_each(g, p, read, [&](T& value) { value = not_seen; });
  }

 private:
  Buffer<T> buffer_;
  int64_t capacity_ = 0, size_ = 0, row_size_ = 0, kz_ = 0, ky_ = 0;
};

// What all orders hold of the queries and keys of a job, row by row, counted from the places in origin.h.
//
// For l2 there is one more channel: 1 for queries and -s|k|^2 for keys, so that it joins the product q.k.
template <class T>
class NeighborhoodRows {
 public:
  static constexpr int L = kLanes<T>;

  // `about_origin`: whether values are counted from there, which the sum of the weights must be zero for.
  NeighborhoodRows(const Arguments& a, int64_t extra_query_channels, bool about_origin)
      : a_(a),
        about_origin_(about_origin),
        key_origin_(a.key, a.problem, {0, a.problem.key_heads}),
        value_origin_(a.value, a.problem, {0, a.problem.key_heads}),
        key_origins_(a.problem.head_dim * L),
        value_origins_(a.problem.head_dim * L),
        transposer(a.problem.head_dim),
        channels(a.problem.head_dim),
        score_channels(channels + (a.problem.l2 ? 1 : 0)),
        query_channels(score_channels + extra_query_channels),
        query_scale(T(a.problem.dot_scale()) * kLog2E<T>) {}

  // Whether a job has another geometry than the last one.
  bool differs(const NeighborhoodJob& other) const {
    return geometry.axis_z.length != other.class_depth || geometry.axis_y.length != other.class_height ||
           !(geometry.columns == other.columns);
  }
  // Whether lanes have other tables: other heads' or of another geometry.
  bool tables_differ(const NeighborhoodJob& other) const {
    return differs(other) || job.first().head != other.first().head || job.count != other.count;
  }
  // Sets the job; returns whether its geometry differs.
  bool start(const NeighborhoodJob& new_job) {
    const bool changed = differs(new_job);
    job = new_job;
    if (changed) {
      tables_.clear();
      const HeadWindow& window = job.window;
      geometry.prepare({job.class_depth, window.z}, {job.class_height, window.y}, job.columns, job.interleaved);
      resize_queries(query, query_channels);
      resize_keys(key, score_channels);
      resize_keys(value, channels);
    }
    keys_of_ = -1;
    for (int64_t lane = 0; lane < L; ++lane) {
      const HeadClass& c = job.classes[job.interleaved ? lane : 0];
      const auto spread = [&](Origin<T>& origin, T* to) {
        const T* from = origin.at(c.batch, c.key_head);
        for (int64_t i = 0; i < channels; ++i) to[i * L + lane] = from[i];
      };
      spread(key_origin_, key_origins_);
      if (about_origin_) spread(value_origin_, value_origins_);
    }
    return changed;
  }

  // Make room for the queries of a group, and for the keys that it attends.
  void resize_queries(RowRing<T>& ring, int64_t channels) const { ring.resize(1, kGroup, channels, geometry); }
  void resize_keys(RowRing<T>& ring, int64_t channels) const {
    ring.resize(geometry.kz, geometry.ring_rows, channels, geometry);
  }

  // The heads' tables as scores, which are minus infinity for keys that a query does not see; null without any of these.
  const ExpandedTable<T>* table() {
    if (!a_.bias && !geometry.masks) return nullptr;
    ExpandedTable<T>& filled = tables_[a_.bias ? job.first().head : 0];
    if (filled.empty()) {
      filled.fill(geometry, a_.problem, a_.bias, job, table_score<T>, -std::numeric_limits<T>::infinity());
    }
    return &filled;
  }

  void load_queries(const RowGroup& group) {
    for (int r = 0; r < group.count; ++r) {
      const Row row = group.row(r);
      transposer.load(query.row(row), query.stride(), a_.query, job, row, query_scale, a_.problem.l2 ? key_origin() : nullptr);
      if (a_.problem.l2) fill_ones(query.row(row) + channels * query.stride());
    }
  }

  // Brings in the rows of keys up to those of the group, whose plane is walked from the top; visit(row) may load more of
  // each new row.
  template <class Visit>
  void load_keys(const RowGroup& group, const Visit& visit) {
    if (keys_of_ != group.z) next_key_ = -1;
    keys_of_ = group.z;
    for (int64_t z = group.planes.start; z < group.planes.end; ++z) {
      for (int64_t y = std::max(next_key_, group.first()); y < group.last(); ++y) {
        const Row row{z, y};
        transposer.load(key.row(row), key.stride(), a_.key, job, row, 1, key_origin());
        transposer.load(value.row(row), value.stride(), a_.value, job, row, 1, value_origin());
        if (a_.problem.l2) key_products(key.row(row), key.row(row), key.row(row), -a_.problem.scale * kLog2E<double>);
        visit(row);
      }
    }
    next_key_ = std::max(next_key_, group.last());
  }

  // The two parts of the log-sum-exp, see dense_saved.h: numbers per query of the compute type.
  View lse_part(int part) const {
    const Problem& p = a_.problem;
    View v;
    v.data = static_cast<T*>(a_.lse) + part * p.rows();
    v.x = 1, v.y = p.width, v.z = v.y * p.height, v.head = v.z * p.depth, v.batch = v.head * p.heads;
    return v;
  }
  // Block b of a row of such numbers.
  void store_lanes(const View& numbers, Row row, int64_t b, Vector<T> values) const {
    int64_t at[L];
    job.lane_offsets<L>(numbers, row, b, at);
    const int64_t n = job.lanes<L>(b);
    for (int64_t lane = 0; lane < n; ++lane) static_cast<T*>(numbers.data)[at[lane]] = values[lane];
  }
  // A whole row of them, `otherwise` where there is no query.
  void load_lanes(T* to, const View& numbers, Row row, T otherwise) const {
    int64_t at[L];
    const int64_t end = geometry.padded / L;
    for (int64_t b = 0; b < end; ++b) {
      job.lane_offsets<L>(numbers, row, b, at);
      const int64_t n = job.lanes<L>(b);
      for (int64_t lane = 0; lane < n; ++lane) to[b * L + lane] = static_cast<const T*>(numbers.data)[at[lane]];
      std::fill_n(to + b * L + n, L - n, otherwise);
    }
  }
  // One channel of a row of queries.
  void fill_ones(T* channel) const { std::fill_n(channel, geometry.width * geometry.step, T(1)); }

  // [channel][lane].
  const T* key_origin() const { return key_origins_; }
  const T* value_origin() const { return about_origin_ ? value_origins_.data() : nullptr; }

  // The extra channel of `target`: factor times the product of two rows, per key.
  void key_products(T* target, const T* a, const T* b, double factor) const {
    const int64_t stride = key.stride();
    for (int64_t x = 0; x < geometry.padded; x += kLanes<T>) {
      Vector<T> sum{};
      for (int64_t c = 0; c < channels; ++c) sum += NATTEN_EXT_ISA::load(a + c * stride + x) * NATTEN_EXT_ISA::load(b + c * stride + x);
      store(target + channels * stride + x, sum * T(factor));
    }
  }

  // The l2 term of one block of a gradient of the queries of the tensor that `packed` holds, in units of `gradient`:
  // gradient[c] -= sums q[c]. The sums vanish but for rounding, see BackwardQueries::subtract_own.
  void subtract_own(T* gradient, const T* packed, Vector<T> sums) const {
    if (!std::isnormal(query_scale)) return;
    sums /= query_scale;
    for (int64_t c = 0; c < channels; ++c) {
      T* target = gradient + c * kLanes<T>;
      store(target, NATTEN_EXT_ISA::load(target) - sums * NATTEN_EXT_ISA::load(packed + c * query.stride()));
    }
  }

  // The same for dot, where keys are counted from their origin: gradient[c] += sums m[c].
  void add_origin(T* gradient, Vector<T> sums) const {
    for (int64_t i = 0; i < channels * L; i += L) {
      store(gradient + i, NATTEN_EXT_ISA::load(gradient + i) + sums * NATTEN_EXT_ISA::load(key_origins_ + i));
    }
  }

  // gradient[c][x] -= a log2(e) * sums[x] * keys[c][x] of one row: the l2 term of a key gradient.
  void subtract_keys(T* gradient, const T* sums, Row row, const RowRing<T>& keys) const {
    const int64_t stride = keys.stride();
    const T* from = keys.row(row);
    for (int64_t x = 0; x < geometry.padded; x += kLanes<T>) {
      const Vector<T> factor = NATTEN_EXT_ISA::load(sums + x) * query_scale;
      for (int64_t c = 0; c < channels; ++c) {
        T* target = gradient + c * stride + x;
        store(target, NATTEN_EXT_ISA::load(target) - factor * NATTEN_EXT_ISA::load(from + c * stride + x));
      }
    }
  }

 private:
  const Arguments& a_;
  const bool about_origin_;
  int64_t keys_of_ = -1, next_key_ = -1;  // whose keys are here: of this plane of queries, up to this row
  Origin<T> key_origin_, value_origin_;
  Buffer<T> key_origins_, value_origins_;  // the job's, [channel][lane]
  std::map<int64_t, ExpandedTable<T>> tables_;  // by head, of interleaved ones by the first

 public:
  const RowTransposer<T> transposer;
  const int64_t channels, score_channels, query_channels;
  const T query_scale;
  NeighborhoodJob job{};
  ClassGeometry<T> geometry;
  RowRing<T> query, key, value;  // queries times a log2(e)
};

// Calls visit(group) for the rows of queries, plane by plane.
template <class T, class Visit>
void for_each_group(const ClassGeometry<T>& g, Range planes, Range rows, const Visit& visit) {
  for (int64_t z = planes.start; z < planes.end; ++z) {
    for (int64_t y = rows.start; y < rows.end; y += kGroup) visit(RowGroup(g, z, y, rows.end));
  }
}

// Runs the kernel `make()`, whose results are rows of queries, over the jobs of heads with one window.
template <class T, class Make>
void run_neighborhood_queries(const Problem& p, HeadRange heads, const NeighborhoodOrder& order, const Make& make) {
  const double cost = neighborhood_cost<T>(p, heads, order.cost);
  const int64_t threads = worthwhile_threads(cost, thread_count());
  if (const std::optional<InterleavedJobs> jobs = interleaved_jobs<T>(p, heads, order, threads)) {
    return for_each_task(jobs->count(), make, [&](auto& worker, int64_t number) { worker.run(jobs->job(number)); }, cost);
  }
  const HeadJobs jobs(p, heads.first, band_sizes<T>(p, heads, order));
  // Heads vary fastest: they share the pages of memory.
  const auto task = [&](auto& worker, int64_t number) {
    worker.run(jobs.job(heads.first + number % heads.count(), number / heads.count()));
  };
  for_each_task(heads.count() * jobs.count(), make, task, cost);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
