// Which grids the kernels for windows of 16 x 16 positions take (grid.h), and their launches. On the host.
#pragma once

#include "grid.h"
#include "narrow_launch.h"

namespace natten_ext::cuda {

// The widths of heads that there are kernels for.
template <class M>
struct GridDims : std::integer_sequence<int, 8, 16, 32, 64, 80, 96> {};
template <class M>
struct GridBackwardDims : std::integer_sequence<int, 8, 16> {};
template <class M>
struct GridWideBackwardDims : std::integer_sequence<int, 64, 80, 96> {};
template <class M>
struct GridDoubleBackwardDims : std::integer_sequence<int, 8, 16, 72, 96> {};

// Fills in all but the heads. False: kernels for grids can't take the problem.
template <class Element, int RowNumbers>
bool prepare_grid(NarrowParams& n, const Params& p, const Window& w) {
  if (p.kind != Kind::grid || p.l2 || w.kernel_y != kGridWindow || w.kernel_x != kGridWindow) return false;
  if (p.queries.height % kGridWindow != 0 || p.queries.width % kGridWindow != 0) return false;
  // Rows have whole chunks, or four channels.
  const int least = p.head_dim == 4 ? 8 : 16;
  if (p.vector_bytes < least || p.output_vector_bytes < least) return false;
  if (!prepare_tensors<Element, RowNumbers>(n, p, kGridWindow)) return false;
  n.tiles_y = n.height / kGridWindow, n.tiles_x = n.width / kGridWindow;
  n.by_tiles_y = Divisor(n.tiles_y), n.by_tiles_x = Divisor(n.tiles_x);
  const int64_t windows = int64_t{p.batch} * n.tiles_y * n.tiles_x;
  if (windows > INT32_MAX) return false;
  n.tiles = static_cast<int>(windows);
  return true;
}

// Calls `use(std::type_identity<K>{}, params)` for the kernel K that takes the problem, with all but the heads filled in. False: none does.
template <class M, template <class, int> class Kernel, class Use, class Dims>
bool with_grid_kernel(const Params& p, const std::vector<Window>& windows, const Context& context, Dims dims, Use use) {
  bool takes = false;
  with_padded(p.head_dim, dims, [&]<int Dim>() {
    using K = Kernel<M, Dim>;
    NarrowParams n{};
    if (p.head_dim == 4 && Dim != 8) return;  // half of a chunk
    if (K::kShared > static_cast<uint32_t>(context.shared_limit)) return;
    if (!prepare_grid<typename M::Element, K::kRowNumbers>(n, p, windows[0])) return;
    takes = true;
    use(std::type_identity<K>{}, n);
  });
  return takes;
}
template <class M, template <class, int> class Kernel, class Dims>
bool grid_takes(const Params& p, const std::vector<Window>& windows, const Context& context, Dims dims) {
  return with_grid_kernel<M, Kernel>(p, windows, context, dims, [](auto, NarrowParams&) {});
}

// Launches all heads, as many at a time as parameters have room for. Blocks work on several windows of a head; those that sum
// a table's gradient on more, so that fewer sums are added. False: no kernel takes the problem.
template <class M, template <class, int> class Kernel, class Dims>
bool launch_grid(const Params& p, const std::vector<Window>& windows, Context& context, Dims dims) {
  return with_grid_kernel<M, Kernel>(p, windows, context, dims, [&](auto kernel, NarrowParams& n) {
    using K = typename decltype(kernel)::type;
    const bool gradient = K::kTableGradient && p.table_gradient;
    const int most = K::kTableGradient ? context.table_blocks / 4 : context.table_blocks;
    for (int first = 0; first < p.heads; first += n.launch_heads) {
      n.launch_heads = std::min(p.heads - first, kMaxHeads);
      n.by_launch_heads = Divisor(n.launch_heads);
      for (int i = 0; i < n.launch_heads; ++i) n.head[i] = static_cast<uint16_t>(first + i);
      n.blocks_per_head = std::min(n.tiles, std::max(1, most / n.launch_heads));
      const int64_t table = int64_t{p.table_rows} * p.table_columns;
      if (gradient) n.table_partials = context.allocate(n.blocks_per_head * n.launch_heads * table * sizeof(float));
      launch(narrow_kernel<K>, n.launch_heads * n.blocks_per_head, 1, K::Tile::kThreads, K::kShared, n, context);
      if (gradient) launch_reduction<M>(p, n.table_partials, n.blocks_per_head, first, n.launch_heads, n.launch_heads, context);
    }
  });
}

}  // namespace natten_ext::cuda
