// Entry point of the backward, compiled once per instruction set.
#include "dense_backward.h"
#include "neighborhood_backward.h"
#include "windows.h"

namespace natten_ext::NATTEN_EXT_ISA {

void backward(const Arguments& a) {
  for_each_window(a, kBackward, [&](auto number, HeadRange heads, bool dense) {
    using T = decltype(number);
    dense ? dense_backward<T>(a, heads) : neighborhood_backward<T>(a, heads);
  });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
