// Entry point of the backward, compiled once per instruction set.
#include "dense_backward.h"
#include "neighborhood_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T>
static void run(const Arguments& a) {
  a.problem.kind == Kind::neighborhood ? neighborhood_backward<T>(a) : dense_backward<T>(a);
}

void backward(const Arguments& a) { a.query.dtype == DType::float64 ? run<double>(a) : run<float>(a); }

}  // namespace natten_ext::NATTEN_EXT_ISA
