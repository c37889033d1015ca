// Entry point of the backward, compiled once per instruction set.
#include "dense_backward.h"
#include "neighborhood_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
static void run(const Arguments& a) {
  for (const HeadRange& heads : a.problem.head_ranges()) {
    const bool windows = a.problem.kind == Kind::neighborhood && !is_dense(a.problem, a.problem.windows[heads.first]);
    windows ? neighborhood_backward<T>(a, heads) : dense_backward<T>(a, heads);
  }
}

void backward(const Arguments& a) { a.query.dtype == DType::float64 ? run<double>(a) : run<float>(a); }

}  // namespace natten_ext::NATTEN_EXT_ISA
