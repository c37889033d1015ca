// Double backward of windows of 7 x 7 keys, the key-centred side: gradients of keys and values.
#include "narrow_launch.h"
#include "narrow_sides.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
struct NarrowDoubleBackwardKey : DoubleBackwardKeys<M, Dim, Whole> {
  static constexpr int kBlocksAtATime = Dim == 32 && !Whole ? 1 : Dim == 8 || (Dim == 16 && Whole) ? 3 : 2;  // on a multiprocessor
  static constexpr uint32_t kSharedOfOrder = kDoubleBackwardShared<M, Dim, Whole>;
  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) { NarrowDoubleBackwardKey::run_keys(p); }
};

template <class M>
std::vector<HeadRange> narrow_double_backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  if (!narrow_double_backward_takes(p)) return {{0, p.heads}};
  return launch_narrow<M, NarrowDoubleBackwardKey>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_double_backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
