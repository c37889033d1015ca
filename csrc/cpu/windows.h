// Which of the kernels each window goes to.
#pragma once

#include "neighborhood_jobs.h"

namespace natten_ext::NATTEN_EXT_ISA {

// The share of each class of neighborhood attention that is in the window of each query, if its classes are of one size and so
// small that the dense kernels can take them, otherwise 0.
inline double share_of_class(const Problem& p, const HeadWindow& w) {
  const int64_t positions = (p.depth / w.z.dilation) * (p.height / w.y.dilation) * (p.width / w.x.dilation);
  const bool one_size = p.depth % w.z.dilation == 0 && p.height % w.y.dilation == 0 && p.width % w.x.dilation == 0;
  if (!one_size || positions > 128) return 0;
  return static_cast<double>(w.z.kernel * w.y.kernel * w.x.kernel) / static_cast<double>(positions);
}

// Whether the dense kernels take heads with one window. Their sums are in another order, so this must depend neither on the
// threads nor on how many images there are. The forward is faster by interleaved classes, where one image fills vectors.
template <class T>
bool is_dense(const Problem& p, HeadRange heads, const NeighborhoodOrder& order) {
  if (p.kind != Kind::neighborhood) return true;
  if (share_of_class(p, p.windows[heads.first]) < 0.5) return false;
  if (order.whole) return true;
  Problem one = p;
  one.batch = 1;
  return !interleaved_jobs<T>(one, heads, order);
}

// Calls run(compute type, heads, whether the dense kernels take them) for each range of heads with one window.
template <class Run>
void for_each_window(const Arguments& a, const NeighborhoodOrder& order, const Run& run) {
  const Problem& p = a.problem;
  for (const HeadRange& heads : p.head_ranges()) {
    const auto choose = [&](auto number) { run(number, heads, is_dense<decltype(number)>(p, heads, order)); };
    a.query.dtype == DType::float64 ? choose(double{}) : choose(float{});
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
