// From a problem to a launch, on the host: the padded head_dim, the cut into tiles and pieces, the call itself.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "entry.h"
#include "kernel.h"
#include "reduce.h"

namespace natten_ext::cuda {

#if defined(NATTEN_EXT_EMULATOR)

template <class Arguments>
void launch(void (*kernel)(Arguments), int grid_x, int grid_y, int threads, uint32_t shared_bytes, const Arguments& arguments,
            Context& context) {
  emulator::run({grid_x, grid_y, threads, shared_bytes, context.memory}, [&] { kernel(arguments); });
}

#else

template <class Arguments>
void launch(void (*kernel)(Arguments), int grid_x, int grid_y, int threads, uint32_t shared_bytes, const Arguments& arguments,
            Context& context) {
  // Always the most that a block may have: another thread may set it between this thread's setting and its launch.
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               context.shared_limit), "shared memory of a kernel");
  }
  kernel<<<dim3(grid_x, grid_y), threads, shared_bytes, static_cast<cudaStream_t>(context.stream)>>>(arguments);
  check(cudaGetLastError(), "launch of a kernel");
}

#endif

// Kernels are templates over the head_dim they pad to. Of general neighborhoods there are fewer, for the sake of the build.
template <class M, bool General>
struct HeadDims : std::integer_sequence<int, 8, 16, 32, 64, 96, 128, 256> {};
template <class M>
struct HeadDims<M, true> : std::integer_sequence<int, 16, 32, 64, 128, 256> {};
template <>
struct HeadDims<DoubleMode, false> : std::integer_sequence<int, 32, 128, 256> {};
template <>
struct HeadDims<DoubleMode, true> : HeadDims<DoubleMode, false> {};

template <class M, template <class, int, bool> class Kernel, int Dim, bool General>
NATTEN_EXT_KERNEL(kThreads, (Kernel<M, Dim, General>::kBlocks)) attention_kernel(NATTEN_EXT_PARAMETER(ParamsOf<General>) p) {
  Kernel<M, Dim, General>::run(p);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Largest number of partners of `tile` adjacent rows on one axis, roughly: it only sizes stages.
inline int64_t halo_extent(Kind kind, int64_t tile, int64_t kernel, int64_t length) {
  if (kind == Kind::full) return length;
  if (kind == Kind::neighborhood) return std::min(length, tile + kernel - 1);
  return std::min(length, kernel % tile == 0 || tile % kernel == 0 ? std::max(tile, kernel) : (tile / kernel + 2) * kernel);
}
inline int64_t strided_halo_extent(int64_t tile, int64_t kernel, int64_t stride, int64_t length) {
  const bool aligned = tile % stride == 0 || stride % tile == 0;
  return std::min(length, kernel + (aligned ? std::max(tile - stride, int64_t{0}) : divide_up(tile - 1, stride) * stride));
}

// Positions of a class of the map, at most.
struct ClassExtents {
  int64_t depth = 1, height, width;
};
template <class AnyWindow>
ClassExtents class_extents(const Map& map, const AnyWindow& w) {
  ClassExtents extents{1, divide_up(map.height, w.dilation_y), divide_up(map.width, w.dilation_x)};
  if constexpr (std::is_same_v<AnyWindow, GeneralWindow>) extents.depth = divide_up(map.depth, w.dilation_z);
  return extents;
}

// Slots that the halo of a tile takes, or one plane of it.
template <bool General>
int64_t halo_slots(const ParamsOf<General>& p, const Plan& plan, const Map& other) {
  int64_t most = 1;
  for (int h = 0; h < p.launch_heads; ++h) {
    const auto& w = p.windows[h];
    const ClassExtents e = class_extents(other, w);
    int64_t height, width;
    if constexpr (General) {
      height = strided_halo_extent(plan.tile_height(), w.kernel_y, w.stride_y, e.height);
      width = strided_halo_extent(plan.tile_width(), w.kernel_x, w.stride_x, e.width);
    } else {
      height = halo_extent(p.kind, plan.tile_height(), w.kernel_y, e.height);
      width = halo_extent(p.kind, plan.tile_width(), w.kernel_x, e.width);
    }
    most = std::max(most, height * width);
  }
  return divide_up(most, kBlock) * kBlock;
}

// What tiles of general neighborhoods are like.
struct TileShape {
  bool wide, several_planes;
  int warps;  // more would have nothing to do
};
inline TileShape tile_shape(const ParamsOf<true>& p) {
  // Blocks of eight keys that warps walk over, in a plane of all keys: `rows` below each other and `eights` side by side.
  const auto cost = [&](const GeneralWindow& w, int64_t rows, int64_t eights) {
    const ClassExtents e = class_extents(p.queries, w);
    const int64_t height = strided_halo_extent(rows, w.kernel_y, w.stride_y, e.height);
    const int64_t width = strided_halo_extent(kBlock * eights, w.kernel_x, w.stride_x, e.width);
    return divide_up(e.height, rows) * divide_up(e.width, kBlock * eights) * height * divide_up(width, kBlock);
  };
  TileShape shape{false, false, 1};
  int64_t tall = 0, wide = 0, most = 1;
  for (int h = 0; h < p.launch_heads; ++h) {
    tall += cost(p.windows[h], 2, 1);
    wide += cost(p.windows[h], 1, 2);
    shape.several_planes |= p.windows[h].kernel_z > 1;
  }
  shape.wide = wide < tall;
  for (int h = 0; h < p.launch_heads; ++h) {
    const ClassExtents e = class_extents(p.queries, p.windows[h]);
    most = std::max(most, shape.wide ? divide_up(e.width, 2 * kBlock) : divide_up(e.height, 2));
  }
  while (shape.warps < 4 && shape.warps < most) shape.warps *= 2;
  return shape;
}
inline TileShape tile_shape(const ParamsOf<false>&) { return {false, false, 4}; }

// Tiles of the head that has most.
template <bool General>
int64_t largest_tile_count(const ParamsOf<General>& p, bool by_key) {
  int64_t most = 0;
  for (int h = 0; h < p.launch_heads; ++h) {
    const auto& w = p.windows[h];
    const ClassExtents e = class_extents(by_key ? p.keys : p.queries, w);
    int64_t planes = 1;
    if constexpr (General) planes = e.depth * w.dilation_z;
    most = std::max(most, int64_t{p.batch} * planes * w.dilation_y * w.dilation_x * divide_up(e.height, p.plan.tile_height()) *
                              divide_up(e.width, p.plan.tile_width()));
  }
  return most;
}

// Fills in what the blocks need not find out, once the plan is made.
template <bool General>
void prepare_blocks(ParamsOf<General>& p, bool by_key, int element_size, int real_size) {
  const Map &own = by_key ? p.keys : p.queries, &other = by_key ? p.queries : p.keys;
  p.table_places = {0, 0, 0, 0, real_size, real_size};
  if (p.table_rows > 0) {
    const int row = (p.table_columns + 1) * real_size, plane = (p.table_rows + 1) * row;
    const int zero_z = p.table_planes / 2, zero_y = p.table_rows / 2, zero_x = p.table_columns / 2;
    p.table_places = {zero_z * plane + zero_y * row + zero_x * real_size, plane, row, real_size,
                      (p.table_rows - zero_y) * row, (p.table_columns - zero_x) * real_size};
  }
  const int missing = other.height * other.width - other.count;
  p.short_row = missing > 0 ? other.height - 1 : -1;
  p.short_columns = other.width - missing;
  p.by_launch_heads = Divisor(p.launch_heads);
  p.by_table_rows = Divisor(p.table_rows + 1);
  p.by_table_columns = Divisor(p.table_columns + 1);
  if constexpr (General) {
    p.by_sharing = Divisor(p.sharing);
  } else {
    p.by_kernel_y = Divisor(p.windows[0].kernel_y);
    p.by_kernel_x = Divisor(p.windows[0].kernel_x);
  }
  p.wide_copies = p.vector_bytes == 16;
  for (int h = 0; h < p.launch_heads; ++h) {
    const auto& w = p.windows[h];
    const ClassExtents e = class_extents(own, w);
    const int tiles_y = static_cast<int>(divide_up(e.height, p.plan.tile_height()));
    const int tiles_x = static_cast<int>(divide_up(e.width, p.plan.tile_width()));
    int64_t planes = 0;
    if constexpr (General) {
      const int tiles_z = static_cast<int>(e.depth);
      p.cuts[h] = {Divisor(tiles_z), Divisor(tiles_y), Divisor(tiles_x),
                   Divisor(w.dilation_z), Divisor(w.dilation_y), Divisor(w.dilation_x),
                   Divisor(w.stride_z), Divisor(w.stride_y), Divisor(w.stride_x), tiles_z, tiles_y, tiles_x};
      planes = w.dilation_z;
    } else {
      p.cuts[h] = {Divisor(tiles_y), Divisor(tiles_x), Divisor(w.dilation_y), Divisor(w.dilation_x), tiles_y,
                   static_cast<uint16_t>(tiles_x)};
    }
    for (const auto* tensors : {&p.own, &p.staged}) {
      for (const Rows& t : *tensors) {
        for (const int64_t step : {t.batch, t.head, t.z * planes, t.y * w.dilation_y, t.x * w.dilation_x}) {
          p.wide_copies &= step >= 0 && step <= INT32_MAX / element_size;
        }
      }
    }
  }
}

// K::kOwn: tensors of the tile; K::kStaged: tensors of a piece; K::kScalars: numbers per staged row; K::kTables: tables read,
// with a row and a column more (TablePlaces), in key-centred kernels those of all `sharing` heads; `gradient`: whether a
// table gradient is summed.
template <class K, uint32_t Pitch>
SharedLayout layout_of(const Plan& plan, bool gradient, int table_planes, int table_rows, int table_columns, int sharing) {
  constexpr uint32_t kReal = sizeof(typename K::Real);
  const auto bytes_of = [](int64_t numbers) { return static_cast<uint32_t>(divide_up(numbers * kReal, 16) * 16); };
  SharedLayout l;
  l.tile_bytes = plan.warps * kWarpRows * Pitch;
  l.piece_bytes = plan.slots * Pitch;
  l.scalar_bytes = bytes_of(plan.slots);
  l.scalars_in_stage = K::kStaged * l.piece_bytes;
  l.stage_bytes = l.scalars_in_stage + K::kScalars * l.scalar_bytes;
  l.table_bytes = bytes_of(table_rows > 0 ? int64_t{table_planes} * (table_rows + 1) * (table_columns + 1) : 3);
  l.gradient_bytes = bytes_of(int64_t{table_planes} * table_rows * table_columns);
  l.diagonal_bytes = bytes_of(kDiagonal);
  l.stages = K::kOwn * l.tile_bytes;
  l.diagonals = l.stages + plan.stages * l.stage_bytes;
  l.tables = l.diagonals + (gradient ? plan.warps * l.diagonal_bytes : 0);
  l.gradients = l.tables + (plan.tables_shared ? K::kTables * (K::kByKey ? sharing : 1) * l.table_bytes : 0);
  l.total = l.gradients + (plan.tables_shared && gradient ? plan.warps * l.gradient_bytes : 0);
  return l;
}

constexpr int kMostSlots = 512;  // of a piece: what SlotDivisor divides exactly

// Chooses warps, stages and slots: what lets most warps be on a multiprocessor, in two blocks rather than in one, which has a tile
// twice as large.
template <class M, template <class, int, bool> class Kernel, int Dim, bool General>
Plan plan_of(const ParamsOf<General>& p, const Context& context) {
  using K = Kernel<M, Dim, General>;
  const int shared_limit = context.shared_limit;
  const bool gradient = K::kTableGradient && p.table_gradient;
  const Map& other = K::kByKey ? p.queries : p.keys;
  const auto bytes = [&](const Plan& plan) {
    return layout_of<K, kPitch<M, Dim>>(plan, gradient, p.table_planes, p.table_rows, p.table_columns, p.sharing).total;
  };
  const TileShape shape = tile_shape(p);
  for (const bool tables_shared : {true, false}) {
    // A multiprocessor has the limit of one block and kReserved, and keeps kReserved for each block.
    constexpr int64_t kReserved = 1024;
    for (int on_multiprocessor = 2 * shape.warps; on_multiprocessor >= 1; on_multiprocessor /= 2) {
      for (const int blocks : {2, 1}) {
        const int warps = on_multiprocessor / blocks;
        if (warps < 1 || warps > shape.warps) continue;
        const int64_t limit = blocks == 2 ? (int64_t{shared_limit} - kReserved) / 2 : int64_t{shared_limit};
        Plan plan{warps, kBlock, shape.several_planes ? 2 : 1, shape.wide, 1, tables_shared, 0};
        const int64_t halo = halo_slots(p, plan, other);
        plan.slots = static_cast<int>(std::min(halo, int64_t{kMostSlots}));
        if (halo > kMostSlots || bytes(plan) > limit) {
          // Several pieces, two stages; at least two units each.
          plan.stages = 2;
          for (plan.slots = 128; plan.slots > 32 && bytes(plan) > limit;) plan.slots /= 2;
          if (bytes(plan) > limit && warps == 1 && limit == shared_limit) {
            plan.stages = 1;
            while (plan.slots > kBlock && bytes(plan) > limit) plan.slots /= 2;
          }
        }
        plan.shared_bytes = static_cast<uint32_t>(bytes(plan));
        if (plan.shared_bytes <= limit) return plan;
      }
    }
  }
  throw std::runtime_error("natten_ext: head_dim " + std::to_string(p.head_dim) + " in this dtype does not fit the " +
                           std::to_string(shared_limit) + " bytes of shared memory that this GPU gives a block");
}

// Calls `use.template operator()<Dim>()` for the least padded head_dim that holds one.
template <class Use, int... Dims>
void with_padded(int head_dim, std::integer_sequence<int, Dims...>, Use use) {
  bool done = false;
  ((!done && head_dim <= Dims ? (use.template operator()<Dims>(), done = true) : false), ...);
}

// Bytes of shared memory that a block needs at least: `plan_of` always finds a plan for them.
template <class M, template <class, int, bool> class Kernel, bool General>
uint32_t least_shared(int head_dim) {
  uint32_t bytes = 0;
  with_padded(head_dim, HeadDims<M, General>{}, [&]<int Dim>() {
    using K = Kernel<M, Dim, General>;
    const Plan least{1, kBlock, 1, false, 1, false, 0};
    bytes = layout_of<K, kPitch<M, Dim>>(least, K::kTableGradient, 0, 0, 0, 1).total;
  });
  return bytes;
}

// Sums the tables' partials of `heads` heads from `first` on, where each partial has `heads_of_partial`.
template <class M>
void launch_reduction(const Params& p, const void* partials, int count, int first, int heads, int heads_of_partial, Context& context) {
  const int table = p.table_planes * p.table_rows * p.table_columns;
  const TableSums sums{partials, count, table, first, heads_of_partial, p.grad_bias.data, p.grad_bias.is_float};
  launch(reduce_tables<typename M::Element, typename M::Real>, static_cast<int>(divide_up(table, kWarp)), heads, kReductionThreads,
         kReductionThreads * sizeof(typename M::Real), sums, context);
}

template <class M, template <class, int, bool> class Kernel, int Dim, bool General>
void launch_padded(ParamsOf<General> p, Context& context) {
  using K = Kernel<M, Dim, General>;
  const bool gradient = K::kTableGradient && p.table_gradient;
  p.table_gradient = gradient;
  K::choose_tensors(p);
  // Kernels count places in a table in 32 bits. Windows with a larger one have more than 2^24 keys.
  if (int64_t{p.table_rows + 1} * (p.table_columns + 1) > (1 << 26) / std::max(p.table_planes, 1)) {
    throw std::runtime_error("natten_ext: the table has 2^26 entries or more");
  }
  p.plan = plan_of<M, Kernel, Dim>(p, context);
  p.shared = layout_of<K, kPitch<M, Dim>>(p.plan, gradient, p.table_planes, p.table_rows, p.table_columns, p.sharing);
  const int64_t tiles = largest_tile_count(p, K::kByKey);
  const int64_t most = gradient ? std::max(1, context.table_blocks / p.launch_heads) : INT32_MAX / p.launch_heads;
  if (!gradient && tiles > most) throw std::runtime_error("natten_ext: too many tiles for one launch");
  p.plan.blocks_per_head = static_cast<int>(std::min(tiles, most));
  prepare_blocks(p, K::kByKey, sizeof(typename M::Element), sizeof(typename M::Real));
  const int64_t partials = p.plan.blocks_per_head * (p.plan.tables_shared ? 1 : p.plan.warps);
  const int64_t table = int64_t{p.table_planes} * p.table_rows * p.table_columns;
  if (gradient) {
    p.table_partials = context.allocate(partials * p.launch_heads * table * sizeof(typename M::Real));
  }
  const int channel_blocks = static_cast<int>(divide_up(p.head_dim, K::kChannels));
  launch(attention_kernel<M, Kernel, Dim, General>, p.launch_heads * p.plan.blocks_per_head, channel_blocks, kWarp * p.plan.warps,
         p.plan.shared_bytes, p, context);
  if (gradient) launch_reduction<M>(p, p.table_partials, static_cast<int>(partials), p.first_head, p.launch_heads, p.launch_heads, context);
}

// Launches the kernel for a range of heads, for as many at a time as parameters have room for.
template <class M, template <class, int, bool> class Kernel, bool General>
void launch_range(const Params& problem, const std::vector<WindowOf<General>>& windows, const HeadRange& heads, Context& context) {
  ParamsOf<General> p{};
  static_cast<Params&>(p) = problem;
  for (p.first_head = static_cast<int>(heads.first); p.first_head < heads.last; p.first_head += p.launch_heads) {
    p.launch_heads = std::min(p.kHeads, static_cast<int>(heads.last) - p.first_head);
    std::copy_n(windows.begin() + p.first_head, p.launch_heads, p.windows);
    with_padded(p.head_dim, HeadDims<M, General>{}, [&]<int Dim>() { launch_padded<M, Kernel, Dim, General>(p, context); });
  }
}

// Launches the kernel for all heads but those that one for narrow windows takes: `narrow(mode)` launches it, and returns the others.
template <class M, template <class, int, bool> class Kernel, bool General, class Narrow>
void launch_all(const Params& p, const std::vector<WindowOf<General>>& windows, Context& context, Narrow narrow) {
  std::vector<HeadRange> heads{{0, p.heads}};
  if constexpr (kHasNarrow<M> && !General) heads = narrow(M{});
  for (const HeadRange& range : heads) launch_range<M, Kernel, General>(p, windows, range, context);
}

// A key-centred kernel for all heads of keys, which only general neighborhoods have their own number of.
template <class M, template <class, int, bool> class Kernel>
void launch_key_heads(const Params& p, const std::vector<GeneralWindow>& windows, Context& context) {
  std::vector<GeneralWindow> of_keys;
  for (int head = 0; head < p.heads; head += p.sharing) of_keys.push_back(windows[head]);
  launch_range<M, Kernel, true>(p, of_keys, {0, p.heads / p.sharing}, context);
}

}  // namespace natten_ext::cuda
