// Entry point of the forward, compiled once per instruction set.
#include "dense_forward.h"
#include "log_sum_exp.h"
#include "neighborhood_forward.h"
#include "windows.h"

namespace natten_ext::NATTEN_EXT_ISA {

void forward(const Arguments& a) {
  for_each_window(a, kForward, [&](auto number, HeadRange heads, bool dense) {
    using T = decltype(number);
    dense ? dense_forward<T>(a, heads) : neighborhood_forward<T>(a, heads);
  });
  if (a.natural_lse) a.query.dtype == DType::float64 ? natural_lse<double>(a) : natural_lse<float>(a);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
