// Entry point of the double backward, compiled once per instruction set.
#include "dense_double_backward.h"
#include "log_sum_exp.h"
#include "neighborhood_double_backward.h"
#include "windows.h"

namespace natten_ext::NATTEN_EXT_ISA {

void tangent(const Arguments&);

void double_backward(const Arguments& a) {
  // The gradients with respect to grad_output and grad_lse do not depend on them.
  if (!a.grad_query && !a.grad_key && !a.grad_value && !a.grad_bias) {
    if (a.grad_grad_output || a.grad_grad_lse) tangent(a);
  } else {
    for_each_window(a, kDoubleBackward, [&](auto number, HeadRange heads, bool dense) {
      using T = decltype(number);
      dense ? dense_double_backward<T>(a, heads) : neighborhood_double_backward<T>(a, heads);
    });
  }
  if (!a.grad_grad_lse) return;
  a.query.dtype == DType::float64 ? add_to_grad_grad_lse<double>(a) : add_to_grad_grad_lse<float>(a);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
