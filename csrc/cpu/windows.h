// Which of the kernels each window goes to.
#pragma once

#include "neighborhood_jobs.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Whether the dense kernels can take a window of neighborhood attention: its classes are of one size and small, and at least
// half of each is in the window of each query.
inline bool is_dense(const Problem& p, const HeadWindow& w) {
  const int64_t positions = (p.depth / w.z.dilation) * (p.height / w.y.dilation) * (p.width / w.x.dilation);
  return p.depth % w.z.dilation == 0 && p.height % w.y.dilation == 0 && p.width % w.x.dilation == 0 && positions <= 128 &&
         2 * w.z.kernel * w.y.kernel * w.x.kernel >= positions;
}

// Calls run(compute type, heads, whether the dense kernels take them) for each range of heads with one window.
template <class Run>
void for_each_window(const Arguments& a, const NeighborhoodOrder& order, const Run& run) {
  const Problem& p = a.problem;
  for (const HeadRange& heads : p.head_ranges()) {
    const auto choose = [&](auto number) {
      using T = decltype(number);
      const bool windows = p.kind == Kind::neighborhood &&
                           (!is_dense(p, p.windows[heads.first]) || interleaved_jobs<T>(p, heads, order));
      run(number, heads, !windows);
    };
    a.query.dtype == DType::float64 ? choose(double{}) : choose(float{});
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
