// Entry point of the double backward, compiled once per instruction set.
#include "dense_double_backward.h"
#include "neighborhood_double_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
static void run(const Arguments& a) {
  for (const HeadRange& heads : a.problem.head_ranges()) {
    const bool windows = a.problem.kind == Kind::neighborhood && !is_dense(a.problem, a.problem.windows[heads.first]);
    windows ? neighborhood_double_backward<T>(a, heads) : dense_double_backward<T>(a, heads);
  }
}

void double_backward(const Arguments& a) { a.query.dtype == DType::float64 ? run<double>(a) : run<float>(a); }

}  // namespace natten_ext::NATTEN_EXT_ISA
