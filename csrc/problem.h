// One attention problem as the operators describe it: sizes, neighborhood, score.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"

namespace natten_ext {

struct HeadWindow {
  int64_t kernel_y, kernel_x, dilation_y, dilation_x;
  bool operator==(const HeadWindow&) const = default;
};

// Adjacent heads [first, last).
struct HeadRange {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// Sequences are maps of height 1. `key_width` differs from `width` only for full attention.
struct Problem {
  Kind kind;
  int64_t batch, height, width, key_width, heads, head_dim;
  int64_t window_y = 1, window_x = 1;  // grid
  std::vector<HeadWindow> windows;     // neighborhood, one per head
  bool l2;
  double scale;

  int64_t queries() const { return height * width; }
  int64_t rows() const { return batch * heads * queries(); }

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
  int64_t table_kernel_y() const { return largest(&HeadWindow::kernel_y, window_y); }
  int64_t table_kernel_x() const { return largest(&HeadWindow::kernel_x, window_x); }
  int64_t table_height() const { return 2 * table_kernel_y() - 1; }
  int64_t table_width() const { return 2 * table_kernel_x() - 1; }

 private:
  int64_t largest(int64_t HeadWindow::*member, int64_t otherwise) const {
    if (kind != Kind::neighborhood) return otherwise;
    int64_t result = 0;
    for (const HeadWindow& window : windows) result = window.*member > result ? window.*member : result;
    return result;
  }
};

// Reads the integer list into `problem`, whose sizes are set. The public functions check values; this guards
// the kernels' memory against callers that go straight to the operators.
inline void decode_neighborhood(const std::vector<int64_t>& code, Problem& problem) {
  auto require = [](bool condition, const std::string& rule) {
    if (!condition) throw std::runtime_error("natten_ext: neighborhood code: " + rule);
  };
  require(!code.empty() && code[0] >= 0 && code[0] <= 2, "must start with 0 (full), 1 (grid) or 2 (neighborhood)");
  problem.kind = static_cast<Kind>(code[0]);
  if (problem.kind == Kind::full) {
    require(code.size() == 1, "full must have no values");
  } else if (problem.kind == Kind::grid) {
    require(code.size() == 3, "grid must have 2 extents");
    problem.window_y = code[1];
    problem.window_x = code[2];
    require(code[1] > 0 && code[2] > 0 && problem.height % code[1] == 0 && problem.width % code[2] == 0,
            "the window must divide the map");
  } else if (problem.kind == Kind::neighborhood) {
    require(static_cast<int64_t>(code.size()) == 1 + 4 * problem.heads, "neighborhood must have 4 values per head");
    for (int64_t head = 0; head < problem.heads; ++head) {
      const int64_t* v = code.data() + 1 + 4 * head;
      // Quotients, because products of any two numbers may overflow.
      require(v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] > 0 && v[0] <= problem.height / v[2] && v[1] <= problem.width / v[3],
              "kernel and dilation must be positive and their product at most the map");
      problem.windows.push_back({v[0], v[1], v[2], v[3]});
    }
  }
}

}  // namespace natten_ext
