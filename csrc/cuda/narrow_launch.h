// Which heads the kernels for windows of 7 x 7 keys take (narrow.h), and their launches. On the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "launch.h"
#include "narrow_frame.h"

namespace natten_ext::cuda {

// The widths of heads that there are kernels for.
template <class M>
struct NarrowDims : std::integer_sequence<int, 8, 16, 32> {};

template <class Kernel>
NATTEN_EXT_KERNEL(Kernel::Tile::kThreads, Kernel::kBlocksAtATime) narrow_kernel(NATTEN_EXT_PARAMETER(NarrowParams) p) {
  Kernel::run(p);
}

// Fills in tensors and sizes, where tables are as large as windows of `kernel` x `kernel` or larger. `RowNumbers`: of each query
// (rows.h). False: kernels that are given NarrowParams can't take them.
template <class Element, int RowNumbers>
bool prepare_tensors(NarrowParams& n, const Params& p, int kernel) {
  constexpr int kSize = sizeof(Element);
  if (p.heads > UINT16_MAX) return false;
  bool fits = int64_t{p.batch} * p.heads <= INT32_MAX;
  const auto steps_of = [&](const Rows& t, int size) {
    const auto bytes = [&](int64_t elements) {
      fits &= elements >= 0 && elements <= INT32_MAX / size;
      return static_cast<uint32_t>(elements * size);
    };
    return ByteRows{static_cast<unsigned char*>(t.data), bytes(t.batch), bytes(t.head), bytes(t.y), bytes(t.x)};
  };
  const auto steps = [&](const Rows& t) { return steps_of(t, kSize); };
  n.query = steps(p.query), n.key = steps(p.key), n.value = steps(p.value), n.output = steps(p.output);
  n.grad_output = steps(p.grad_output);
  n.cot_query = steps(p.cot_query), n.cot_key = steps(p.cot_key), n.cot_value = steps(p.cot_value);
  n.grad_query = steps(p.grad_query), n.grad_key = steps(p.grad_key), n.grad_value = steps(p.grad_value);
  n.grad_grad_output = steps(p.grad_grad_output);
  const int64_t rows = p.queries.count;
  if (RowNumbers > 0) n.row_numbers = steps_of({p.row_numbers, p.heads * rows, 0, p.queries.width, 1, rows}, RowNumbers * sizeof(float));
  if (!fits) return false;
  n.bias = p.bias;
  if (p.bias.data != nullptr) {
    // The table is as large as the largest window of all heads; offset zero is in its middle.
    const int64_t first = (p.table_rows / 2 - kernel + 1) * p.bias.y + (p.table_columns / 2 - kernel + 1) * p.bias.x;
    n.bias.data = static_cast<char*>(p.bias.data) + first * (p.bias.is_float ? 4 : kSize);
  }
  n.base = p.base, n.log_sum = p.log_sum, n.natural_lse = p.natural_lse;
  n.grad_lse = p.grad_lse, n.grad_grad_lse = p.grad_grad_lse;
  n.table_rows = p.table_rows, n.table_columns = p.table_columns;
  n.scale = static_cast<float>(p.scale), n.factor = n.scale * kLog2E<float>, n.inverse_factor = 1 / n.factor;
  n.most_log_sum = std::min(1024.0f, kMostInParts<Element> * std::fabs(n.factor));
  n.head_bytes = p.head_dim * kSize;
  n.height = p.queries.height, n.width = p.queries.width, n.heads = p.heads;
  return true;
}

// Fills in all but the heads, for heads with the window `w`. False: kernels for narrow windows can't take them.
template <class Element, int RowNumbers>
bool prepare_narrow(NarrowParams& n, const Params& p, const Window& w) {
  if (p.kind != Kind::neighborhood || p.l2 || p.vector_bytes != 16 || p.output_vector_bytes != 16) return false;
  if (w.kernel_y != kNarrowKernel || w.kernel_x != kNarrowKernel) return false;
  if (!prepare_tensors<Element, RowNumbers>(n, p, kNarrowKernel)) return false;
  n.dilation_y = w.dilation_y, n.dilation_x = w.dilation_x;
  n.by_dilation_y = Divisor(w.dilation_y), n.by_dilation_x = Divisor(w.dilation_x);
  return true;
}

// What the double backward must have been given, and must not: kernels for narrow windows leave out nothing.
inline bool narrow_double_backward_takes(const Params& p) {
  return p.cot_query.data != nullptr && p.cot_key.data != nullptr && p.cot_value.data != nullptr && p.cot_bias.data == nullptr &&
         !p.tangents_only;
}

template <class M, template <class, int, bool> class Kernel, int Dim, bool Whole>
bool launch_narrow_heads(const Params& p, NarrowParams n, Context& context) {
  using K = Kernel<M, Dim, Whole>;
  using Tile = typename K::Tile;
  n.tiles_y = static_cast<int>(divide_up(divide_up(n.height, n.dilation_y), Tile::kHeight));
  n.tiles_x = static_cast<int>(Whole ? divide_up(n.dilation_x, Tile::kClasses) : divide_up(divide_up(n.width, n.dilation_x), Tile::kWidth));
  n.by_tiles_y = Divisor(n.tiles_y), n.by_tiles_x = Divisor(n.tiles_x), n.by_launch_heads = Divisor(n.launch_heads);
  const bool gradient = K::kTableGradient && p.table_gradient;
  const int64_t tiles = int64_t{n.tiles_y} * n.tiles_x * n.dilation_y * (Whole ? 1 : n.dilation_x) * p.batch;
  if (tiles * n.launch_heads > INT32_MAX || K::kSharedOfOrder > static_cast<uint32_t>(context.shared_limit)) return false;
  n.tiles = static_cast<int>(tiles);
  n.blocks_per_head = gradient ? std::min(n.tiles, std::max(1, context.table_blocks / n.launch_heads)) : n.tiles;
  const int64_t table = int64_t{p.table_rows} * p.table_columns;
  if (gradient) n.table_partials = context.allocate(n.blocks_per_head * n.launch_heads * table * sizeof(float));
  launch(narrow_kernel<K>, n.launch_heads * n.blocks_per_head, 1, Tile::kThreads, K::kShared, n, context);
  for (int i = 0; i < n.launch_heads && gradient; ++i) {
    launch_reduction<M>(p, static_cast<float*>(n.table_partials) + i * table, n.blocks_per_head, n.head[i], 1, n.launch_heads, context);
  }
  return true;
}

// Launches the heads that these kernels can take, those with the same window together. Returns the others.
template <class M, template <class, int, bool> class Kernel, class Dims>
std::vector<HeadRange> launch_narrow(const Params& p, const std::vector<Window>& windows, Context& context, Dims dims) {
  const auto start = [&](const Window& w, NarrowParams& n) {
    if (!prepare_narrow<typename M::Element, Kernel<M, 8, false>::kRowNumbers>(n, p, w)) return false;
    const bool whole = divide_up(n.height, w.dilation_y) <= 8 && divide_up(n.width, w.dilation_x) <= 8;
    bool done = false;
    with_padded(p.head_dim, dims, [&]<int Dim>() {
      done = whole ? launch_narrow_heads<M, Kernel, Dim, true>(p, n, context) : launch_narrow_heads<M, Kernel, Dim, false>(p, n, context);
    });
    return done;
  };
  std::vector<bool> seen(p.heads), left(p.heads);
  for (int first = 0; first < p.heads; ++first) {
    if (seen[first]) continue;
    NarrowParams n{};
    for (int head = first; head < p.heads && n.launch_heads < kMaxHeads; ++head) {
      if (seen[head] || !(windows[head] == windows[first])) continue;
      seen[head] = true;
      n.head[n.launch_heads++] = static_cast<uint16_t>(head);
    }
    if (start(windows[first], n)) continue;
    for (int i = 0; i < n.launch_heads; ++i) left[n.head[i]] = true;
  }
  std::vector<HeadRange> others;
  for (int head = 0; head < p.heads; ++head) {
    if (!left[head]) continue;
    if (head > 0 && left[head - 1]) others.back().last = head + 1;
    else others.push_back({head, head + 1});
  }
  return others;
}

}  // namespace natten_ext::cuda
