// Entry point of the forward, compiled once per instruction set.
#include "dense_forward.h"
#include "neighborhood_forward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
static void run(const Arguments& a) {
  for (const HeadRange& heads : a.problem.head_ranges()) {
    const bool windows = a.problem.kind == Kind::neighborhood && !is_dense(a.problem, a.problem.windows[heads.first]);
    windows ? neighborhood_forward<T>(a, heads) : dense_forward<T>(a, heads);
  }
}

void forward(const Arguments& a) { a.query.dtype == DType::float64 ? run<double>(a) : run<float>(a); }

}  // namespace natten_ext::NATTEN_EXT_ISA
