// Relative position tables of the dense kernels: laid out for vectors of queries, and their gradients.
#pragma once

#include "dense.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Visits the windows of a masked plan: visit(key, query, y, x) with the place of their offset in a table, for each
// key in the window of each query.
template <class T, class Visit>
void for_each_in_windows(const DensePlan<T>& plan, const Visit& visit) {
  const HeadWindow& w = plan.head_window();
  const int64_t center_y = plan.problem.table_kernel_y() - 1, center_x = plan.problem.table_kernel_x() - 1;
  for (int64_t query = 0; query < plan.queries; ++query) {
    const int64_t y = query / plan.window_x, x = query % plan.window_x;
    const int64_t first_y = class_window_start(y, plan.window_y, w.y.kernel);
    const int64_t first_x = class_window_start(x, plan.window_x, w.x.kernel);
    for (int64_t ky = first_y; ky < first_y + w.y.kernel; ++ky) {
      for (int64_t kx = first_x; kx < first_x + w.x.kernel; ++kx) {
        visit(ky * plan.window_x + kx, query, ky - y + center_y, kx - x + center_x);
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
      const auto value = [&](int64_t y, int64_t x) {
        return view ? as(load_value<T>(view, head * view.head + y * view.y + x * view.x)) : T(0);
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

// The gradient of one head's table over the jobs of a task: added up in the layout of DenseTables, then added to a
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
    if (plan_.masked) {
      for_each_in_windows(plan_, [&](int64_t key, int64_t query, int64_t y, int64_t x) {
        partial[y * width + x] += buffer_[key * plan_.table_width + query];
      });
    } else {
      for (int64_t i = 0; i < height * width; ++i) partial[i] += buffer_[i / width * width + width - 1 - i % width];
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
