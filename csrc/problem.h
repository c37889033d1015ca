// One attention problem as the operators describe it: sizes, neighborhood, score.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"

namespace natten_ext {

inline void require(bool condition, const std::string& rule) {
  if (!condition) throw std::runtime_error("natten_ext: " + rule);
}

struct HeadWindow {
  AxisWindow z, y, x;
  bool operator==(const HeadWindow&) const = default;
};

// Adjacent heads [first, last).
struct HeadRange {
  int64_t first, last;
  int64_t count() const { return last - first; }
  // Those of the keys, where so many heads share one.
  HeadRange of_keys(int64_t shared) const { return {first / shared, last / shared}; }
};

// Maps of two axes have a depth of 1, sequences a height of 1 as well. `key_width` differs from `width` only for full
// attention. Adjacent heads, whose windows are equal, share a head of keys and values.
struct Problem {
  Kind kind;
  int64_t batch, depth, height, width, key_width, heads, key_heads, head_dim;
  int64_t window_z = 1, window_y = 1, window_x = 1;  // grid
  std::vector<HeadWindow> windows;                   // neighborhood, one per head
  bool l2;
  double scale;

  int64_t queries() const { return depth * height * width; }
  int64_t rows() const { return batch * heads * queries(); }
  // Heads that share a key head.
  int64_t shared() const { return heads / key_heads; }

  // Whether it has more than windows that slide on two map axes: a third axis, a stride or causal windows.
  bool general() const {
    for (const HeadWindow& w : windows) {
      if (!w.y.sliding() || !w.x.sliding()) return true;
    }
    return depth > 1;
  }

  // Factor of q.k: -s|q-k|^2 is 2s q.k - s|k|^2 up to a constant of the row.
  double dot_scale() const { return l2 ? 2 * scale : scale; }

  // Ranges of heads that share a window; all heads if the kind has no windows.
  std::vector<HeadRange> head_ranges() const {
    std::vector<HeadRange> ranges;
    for (int64_t head = 0; head < heads; ++head) {
      const bool same = head > 0 && (windows.empty() || windows[head] == windows[head - 1]);
      if (same) ranges.back().last = head + 1;
      else ranges.push_back({head, head + 1});
    }
    return ranges;
  }

  // Largest kernel over the heads, which sizes the relative position table.
  int64_t table_kernel_z() const { return largest(&HeadWindow::z, window_z); }
  int64_t table_kernel_y() const { return largest(&HeadWindow::y, window_y); }
  int64_t table_kernel_x() const { return largest(&HeadWindow::x, window_x); }
  int64_t table_depth() const { return 2 * table_kernel_z() - 1; }
  int64_t table_height() const { return 2 * table_kernel_y() - 1; }
  int64_t table_width() const { return 2 * table_kernel_x() - 1; }
  int64_t table_size() const { return table_depth() * table_height() * table_width(); }

 private:
  int64_t largest(AxisWindow HeadWindow::*axis, int64_t otherwise) const {
    if (kind != Kind::neighborhood) return otherwise;
    int64_t result = 0;
    for (const HeadWindow& window : windows) result = (window.*axis).kernel > result ? (window.*axis).kernel : result;
    return result;
  }
};

// Reads the integer list into `problem`, whose sizes are set. The public functions check values; this guards
// the kernels' memory against callers that go straight to the operators.
inline void decode_neighborhood(const std::vector<int64_t>& code, Problem& problem) {
  const auto require = [](bool condition, const std::string& rule) {
    natten_ext::require(condition, "neighborhood code: " + rule);
  };
  require(!code.empty() && code[0] >= 0 && code[0] <= 2, "must start with 0 (full), 1 (grid) or 2 (neighborhood)");
  problem.kind = static_cast<Kind>(code[0]);
  if (problem.kind == Kind::full) {
    require(code.size() == 1, "full must have no values");
  } else if (problem.kind == Kind::grid) {
    require(code.size() == 4, "grid must have 3 extents");
    problem.window_z = code[1];
    problem.window_y = code[2];
    problem.window_x = code[3];
    require(code[1] > 0 && code[2] > 0 && code[3] > 0 && problem.depth % code[1] == 0 && problem.height % code[2] == 0 &&
                problem.width % code[3] == 0,
            "the window must divide the map");
  } else if (problem.kind == Kind::neighborhood) {
    require(static_cast<int64_t>(code.size()) == 1 + 12 * problem.heads, "neighborhood must have 12 values per head");
    const auto axis = [&](const int64_t* v, int64_t length) {
      // A quotient, because products of any two numbers may overflow.
      require(v[0] > 0 && v[1] > 0 && v[0] <= length / v[1], "kernel and dilation must be positive and their product at most the map");
      require(v[2] > 0 && v[2] <= v[0] && (v[3] == 0 || v[3] == 1), "stride must be from 1 to the kernel, causal 0 or 1");
      return AxisWindow{v[0], v[1], v[2], v[3] == 1};
    };
    for (const int64_t* v = code.data() + 1; v < code.data() + code.size(); v += 12) {
      problem.windows.push_back({axis(v, problem.depth), axis(v + 4, problem.height), axis(v + 8, problem.width)});
    }
    for (const HeadRange& range : problem.head_ranges()) {
      require(range.first % problem.shared() == 0, "heads that share a key head must have one window");
    }
  }
}

}  // namespace natten_ext
