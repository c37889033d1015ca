// Entry point of the double backward, compiled once per instruction set.
#include "dense_double_backward.h"
#include "neighborhood_double_backward.h"

namespace natten_ext::NATTEN_EXT_ISA {

void tangent(const Arguments&);

void double_backward(const Arguments& a) {
  // The gradient with respect to grad_output does not depend on it.
  if (!a.grad_query && !a.grad_key && !a.grad_value && !a.grad_bias) {
    if (a.grad_grad_output) tangent(a);
    return;
  }
  for_each_window(a, [&](auto number, HeadRange heads, bool dense) {
    using T = decltype(number);
    dense ? dense_double_backward<T>(a, heads) : neighborhood_double_backward<T>(a, heads);
  });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
