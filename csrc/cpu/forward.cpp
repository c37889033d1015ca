// Entry point of the forward, compiled once per instruction set.
#include "dense_forward.h"
#include "neighborhood_forward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
static void run(const Arguments& a) {
  a.problem.kind == Kind::neighborhood ? neighborhood_forward<T>(a) : dense_forward<T>(a);
}

void forward(const Arguments& a) { a.query.dtype == DType::float64 ? run<double>(a) : run<float>(a); }

}  // namespace natten_ext::NATTEN_EXT_ISA
