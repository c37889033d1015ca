// Relative position tables of the dense kernels: laid out for vectors of queries, and their gradients.
#pragma once

#include "dense.h"
#include "neighborhood_geometry.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Visits the windows of a masked plan: visit(key, query, line, x) with the place of their offset in a table, whose lines
// are those of all planes, for each key in the window of each query.
template <class T, class Visit>
void for_each_in_windows(const DensePlan<T>& plan, const Visit& visit) {
  const HeadWindow& w = plan.head_window();
  const Problem& p = plan.problem;
  const int64_t height = p.table_height();
  const int64_t center_x = p.table_kernel_x() - 1, center = (p.table_kernel_z() - 1) * height + p.table_kernel_y() - 1;
  const ClassAxis axis_z{plan.window_z, w.z}, axis_y{plan.window_y, w.y}, axis_x{plan.window_x, w.x};
  for (int64_t z = 0, query = 0; z < plan.window_z; ++z) {
    const Range in_z = axis_z.keys(z);
    for (int64_t y = 0; y < plan.window_y; ++y) {
      const Range in_y = axis_y.keys(y);
      for (int64_t x = 0; x < plan.window_x; ++x, ++query) {
        const Range in_x = axis_x.keys(x);
        for (int64_t kz = in_z.start; kz < in_z.end; ++kz) {
          for (int64_t ky = in_y.start; ky < in_y.end; ++ky) {
            const int64_t line = center + (kz - z) * height + ky - y, key = (kz * plan.window_y + ky) * plan.window_x;
            for (int64_t kx = in_x.start; kx < in_x.end; ++kx) visit(key + kx, query, line, kx - x + center_x);
          }
        }
      }
    }
  }
}

// Tables of a range of heads in the compute type, with `as` done to each value, laid out so that a vector of queries
// reads (and its gradient adds to) consecutive values. Of grid attention: the table reversed along x, where an offset
// grows with the query's x. Of a masked plan: a matrix [key][query], in which `masked` stands for the keys outside the window.
template <class T>
class DenseTables {
 public:
  DenseTables(const View& view, const DensePlan<T>& plan, T (*as)(T), T masked) : first_(plan.heads.first) {
    if (!view && !(plan.masked && masked != 0)) return;
    stride_ = plan.table_size + kLanes<T>;  // the last vector of a row may read past the table
    buffer_ = Buffer<T>(plan.heads.count() * stride_);
    for (int64_t head = plan.heads.first; head < plan.heads.last; ++head) {
      T* table = buffer_ + (head - first_) * stride_;
      std::fill(table, table + stride_, plan.masked ? masked : T(0));
      const int64_t height = plan.problem.table_height();
      const auto value = [&](int64_t line, int64_t x) {
        const int64_t z = line / height, y = line % height;
        return view ? as(load_value<T>(view, head * view.head + z * view.z + y * view.y + x * view.x)) : T(0);
      };
      if (plan.masked) {
        for_each_in_windows(plan, [&](int64_t key, int64_t query, int64_t line, int64_t x) {
          table[key * plan.table_width + query] = value(line, x);
        });
      } else {
        for (int64_t i = 0; i < plan.table_size; ++i) {
          table[i] = value(i / plan.table_width, plan.table_width - 1 - i % plan.table_width);
        }
      }
    }
  }
  // Of the scores, which are minus infinity outside the windows, and of their cotangents.
  static DenseTables scores(const View& view, const DensePlan<T>& plan) {
    return {view, plan, table_score<T>, -std::numeric_limits<T>::infinity()};
  }
  static DenseTables cotangents(const View& view, const DensePlan<T>& plan) {
    return {view, plan, [](T value) { return value; }, 0};
  }
  const T* head(int64_t head) const { return buffer_.data() == nullptr ? nullptr : buffer_ + (head - first_) * stride_; }

 private:
  Buffer<T> buffer_;
  int64_t first_, stride_ = 0;
};

// The gradients of the tables of heads that share a key head, over the jobs of a task: added up in the layout of
// DenseTables, then added to partial tables [z][y][x].
template <class T>
class DenseTableGradient {
 public:
  DenseTableGradient(const DensePlan<T>& plan, bool wanted)
      : plan_(plan), stride_(plan.table_size + kLanes<T>), buffer_(wanted ? plan.shared * stride_ : 0) {}

  // Of one of the heads; null where it is not wanted.
  T* data(int64_t member) const { return buffer_.data() == nullptr ? nullptr : buffer_ + member * stride_; }
  void start(const PartialTables<T>& partial) {
    partial_ = partial;
    if (buffer_.data() != nullptr) std::fill_n(buffer_.data(), plan_.shared * stride_, T(0));
  }
  void finish() {
    if (buffer_.data() == nullptr) return;
    for (int64_t member = 0; member < plan_.shared; ++member) finish(data(member), partial_.table(member));
  }

 private:
  void finish(const T* sums, T* partial) const {
    const int64_t width = plan_.problem.table_width(), size = plan_.problem.table_size();
    if (plan_.masked) {
      for_each_in_windows(plan_, [&](int64_t key, int64_t query, int64_t line, int64_t x) {
        partial[line * width + x] += sums[key * plan_.table_width + query];
      });
    } else {
      for (int64_t i = 0; i < size; ++i) partial[i] += sums[i / width * width + width - 1 - i % width];
    }
  }

  const DensePlan<T>& plan_;
  const int64_t stride_;
  Buffer<T> buffer_;
  PartialTables<T> partial_;
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
    const int64_t height = plan.problem.table_height();
    for (int64_t key = 0; used && key < plan.keys; ++key) {
      const int64_t x = key % plan.window_x, y = key / plan.window_x % plan.window_y, z = key / plan.window_x / plan.window_y;
      key_base_[key] = plan.masked ? key * plan.table_width
                                   : plan.table_size / 2 + (z * height + y) * plan.table_width - x;
    }
  }

  void start(int64_t first, int64_t count) {
    constexpr int L = kLanes<T>;
    count_ = count;
    for (int64_t lane = 0; lane < plan_.block_queries; ++lane) {
      const int64_t query = first + std::min(lane, count - 1);
      lane_base_[lane] = plan_.masked ? first + lane : plan_.table_size / 2 - key_base_[query];
    }
    for (int64_t lane = 0; lane < plan_.block_queries; lane += L) {
      consecutive_[lane / L] = plan_.masked || (lane + L <= count && (first + lane) % plan_.window_x + L <= plan_.window_x);
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

}  // namespace natten_ext::NATTEN_EXT_ISA
