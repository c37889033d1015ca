// Entry point of the tangent, compiled once per instruction set.
#include "dense_tangent.h"
#include "neighborhood_tangent.h"
#include "windows.h"

namespace natten_ext::NATTEN_EXT_ISA {

void tangent(const Arguments& a) {
  for_each_window(a, kTangent, [&](auto number, HeadRange heads, bool dense) {
    using T = decltype(number);
    dense ? dense_tangent<T>(a, heads) : neighborhood_tangent<T>(a, heads);
  });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
