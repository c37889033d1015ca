// Which sequences the kernels for short ones take (short.h), and their launches. On the host.
#pragma once

#include "narrow_launch.h"
#include "short.h"

namespace natten_ext::cuda {

// The widths of heads that there are kernels for.
template <class M>
struct ShortDims : std::integer_sequence<int, 32, 64, 96> {};

template <class Kernel>
NATTEN_EXT_KERNEL(Kernel::Tile::kThreads, Kernel::kBlocksAtATime) short_kernel(NATTEN_EXT_PARAMETER(ShortParams) p) {
  Kernel::run(p);
}

// Calls `use(std::type_identity<K>{}, params)` for the kernel K that takes the problem. False: none does.
template <class M, template <class, int> class Kernel, class Use>
bool with_short_kernel(const Params& p, const Context& context, Use use) {
  bool takes = false;
  with_padded(p.head_dim, ShortDims<M>{}, [&]<int Dim>() {
    using K = Kernel<M, Dim>;
    ShortParams n{};
    if (p.kind != Kind::full || p.queries.count != p.keys.count) return;
    if (p.queries.count <= kWarpRows || p.queries.count > K::Tile::kRows) return;  // one group is too little for a block
    if (p.vector_bytes != 16 || p.output_vector_bytes != 16 || K::kShared > static_cast<uint32_t>(context.shared_limit)) return;
    if (!prepare_tensors<typename M::Element, 0>(n, p, 0) || !(n.factor > 0)) return;
    n.tokens = p.queries.count, n.l2 = p.l2;
    n.by_launch_heads = Divisor(n.launch_heads = p.heads);
    takes = true;
    use(std::type_identity<K>{}, n);
  });
  return takes;
}
template <class M, template <class, int> class Kernel>
bool short_takes(const Params& p, const Context& context) {
  return with_short_kernel<M, Kernel>(p, context, [](auto, ShortParams&) {});
}
template <class M, template <class, int> class Kernel>
bool launch_short(const Params& p, Context& context) {
  return with_short_kernel<M, Kernel>(p, context, [&](auto kernel, ShortParams& n) {
    using K = typename decltype(kernel)::type;
    launch(short_kernel<K>, p.batch * p.heads, 1, K::Tile::kThreads, K::kShared, n, context);
  });
}

}  // namespace natten_ext::cuda
