// Double backward of windows of 7 x 7 keys, the key-centred side: gradients of keys and values.
#include "narrow_keys.h"
#include "narrow_launch.h"

namespace natten_ext::cuda {

// A tile must have 16 rows: of 12 or 13 rows all see the keys in the middle.
template <int Dim, bool Whole>
using DoubleBackwardKeyTile = NarrowTile<Dim, Whole, Dim == 32 && !Whole ? 8 : 4, Dim == 32 ? 2 : 4>;

template <class M, int Dim, bool Whole>
struct NarrowDoubleBackwardKey : NarrowKeys<M, DoubleBackwardKeyTile<Dim, Whole>, true, !(Dim == 16 && Whole)> {
  static constexpr int kBlocksAtATime = Dim == 32 && !Whole ? 1 : Dim == 8 || (Dim == 16 && Whole) ? 3 : 2;  // on a multiprocessor
  NATTEN_EXT_DEVICE static void run(const NarrowParams& p) { NarrowDoubleBackwardKey::run_keys(p); }
};

template <class M>
std::vector<HeadRange> narrow_double_backward_key(const Params& p, const std::vector<Window>& windows, Context& context) {
  if (!narrow_double_backward_takes(p)) return {{0, p.heads}};
  return launch_narrow<M, NarrowDoubleBackwardKey>(p, windows, context, NarrowDims<M>{});
}

template std::vector<HeadRange> narrow_double_backward_key<NATTEN_EXT_MODE>(const Params&, const std::vector<Window>&, Context&);

}  // namespace natten_ext::cuda
