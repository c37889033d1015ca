// Backward of windows of 7 x 7 keys, the key-centred side: gradients of keys and values.
#include "narrow_launch.h"
#include "narrow_sides.h"

namespace natten_ext::cuda {

template <class M, int Dim, bool Whole>
struct NarrowBackwardKey : BackwardKeys<M, Dim, Whole> {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocksAtATime = Dim == 32 ? 1 : 2;
#else
  static constexpr int kBlocksAtATime = 2;
#endif
  static constexpr uint32_t kSharedOfOrder = kBackwardShared<M, Dim, Whole>;
  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) { NarrowBackwardKey::run_keys(p); }
};

template <class M>
std::vector<HeadRange> narrow_backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  return launch_narrow<M, NarrowBackwardKey>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
