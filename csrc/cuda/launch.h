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

// Kernels are templates over the head_dim they pad to.
template <class M>
struct HeadDims : std::integer_sequence<int, 8, 16, 32, 64, 96, 128, 256> {};
template <>
struct HeadDims<FloatMode> : std::integer_sequence<int, 8, 16, 32, 64, 128, 256> {};
template <>
struct HeadDims<DoubleMode> : std::integer_sequence<int, 32, 128, 256> {};

template <class M, template <class, int> class Kernel, int Dim>
NATTEN_EXT_KERNEL(kThreads, (Kernel<M, Dim>::kBlocks)) attention_kernel(NATTEN_EXT_PARAMETER(Params) p) {
  Kernel<M, Dim>::run(p);
}

// Largest number of partners of `tile` adjacent rows on one axis, roughly: it only sizes stages.
inline int64_t halo_extent(Kind kind, int64_t tile, int64_t kernel, int64_t length) {
  if (kind == Kind::full) return length;
  if (kind == Kind::neighborhood) return std::min(length, tile + kernel - 1);
  return std::min(length, kernel % tile == 0 || tile % kernel == 0 ? std::max(tile, kernel) : (tile / kernel + 2) * kernel);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of the head that has most.
inline int64_t largest_tile_count(const Params& p, bool by_key) {
  const Map& own = by_key ? p.keys : p.queries;
  int64_t most = 0;
  for (int h = 0; h < p.launch_heads; ++h) {
    const Window& w = p.windows[h];
    most = std::max(most, int64_t{p.batch} * w.dilation_y * w.dilation_x *
                              divide_up(divide_up(own.height, w.dilation_y), 2 * p.plan.warps) *
                              divide_up(divide_up(own.width, w.dilation_x), kBlock));
  }
  return most;
}

// Fills in what the blocks need not find out, once the plan is made.
inline void prepare_blocks(Params& p, bool by_key, int element_size, int real_size) {
  const Map &own = by_key ? p.keys : p.queries, &other = by_key ? p.queries : p.keys;
  const int row = (p.table_columns + 1) * real_size, zero_y = p.table_rows / 2, zero_x = p.table_columns / 2;
  p.table_places = {0, 0, 0, real_size, real_size};
  if (p.table_rows > 0) {
    p.table_places = {zero_y * row + zero_x * real_size, row, real_size, (p.table_rows - zero_y) * row,
                      (p.table_columns - zero_x) * real_size};
  }
  const int missing = other.height * other.width - other.count;
  p.short_row = missing > 0 ? other.height - 1 : -1;
  p.short_columns = other.width - missing;
  p.by_launch_heads = Divisor(p.launch_heads);
  p.by_table_columns = Divisor(p.table_columns + 1);
  p.by_kernel_y = Divisor(p.windows[0].kernel_y);
  p.by_kernel_x = Divisor(p.windows[0].kernel_x);
  p.wide_copies = p.vector_bytes == 16;
  for (int h = 0; h < p.launch_heads; ++h) {
    const Window& w = p.windows[h];
    const int64_t tiles_y = divide_up(divide_up(own.height, w.dilation_y), 2 * p.plan.warps);
    const int64_t tiles_x = divide_up(divide_up(own.width, w.dilation_x), kBlock);
    p.cuts[h] = {Divisor(tiles_y), Divisor(tiles_x), Divisor(w.dilation_y), Divisor(w.dilation_x), static_cast<int>(tiles_y),
                 static_cast<uint16_t>(tiles_x)};
    for (const auto* tensors : {&p.own, &p.staged}) {
      for (const Rows& t : *tensors) {
        for (const int64_t step : {t.batch, t.head, t.y * w.dilation_y, t.x * w.dilation_x}) {
          p.wide_copies &= step >= 0 && step <= INT32_MAX / element_size;
        }
      }
    }
  }
}

// K::kOwn: tensors of the tile; K::kStaged: tensors of a piece; K::kScalars: numbers per staged row; K::kTables: tables read,
// with a row and a column more (TablePlaces); `gradient`: whether a table gradient is summed.
template <class K, uint32_t Pitch>
SharedLayout layout_of(const Plan& plan, bool gradient, int table_rows, int table_columns) {
  constexpr uint32_t kReal = sizeof(typename K::Real);
  const auto bytes_of = [](int64_t numbers) { return static_cast<uint32_t>(divide_up(numbers * kReal, 16) * 16); };
  SharedLayout l;
  l.tile_bytes = plan.warps * kWarpRows * Pitch;
  l.piece_bytes = plan.slots * Pitch;
  l.scalar_bytes = bytes_of(plan.slots);
  l.scalars_in_stage = K::kStaged * l.piece_bytes;
  l.stage_bytes = l.scalars_in_stage + K::kScalars * l.scalar_bytes;
  l.table_bytes = bytes_of(table_rows > 0 ? (table_rows + 1) * (table_columns + 1) : 3);
  l.gradient_bytes = bytes_of(table_rows * table_columns);
  l.diagonal_bytes = bytes_of(kDiagonal);
  l.stages = K::kOwn * l.tile_bytes;
  l.diagonals = l.stages + plan.stages * l.stage_bytes;
  l.tables = l.diagonals + (gradient ? plan.warps * l.diagonal_bytes : 0);
  l.gradients = l.tables + (plan.tables_shared ? K::kTables * l.table_bytes : 0);
  l.total = l.gradients + (plan.tables_shared && gradient ? plan.warps * l.gradient_bytes : 0);
  return l;
}

// Chooses warps, stages and slots: the largest tile whose halo fits beside it, for at least two blocks on a
// multiprocessor where possible.
template <class M, template <class, int> class Kernel, int Dim>
Plan plan_of(const Params& p, const Context& context) {
  using K = Kernel<M, Dim>;
  const int shared_limit = context.shared_limit;
  const bool gradient = K::kTableGradient && p.table_gradient;
  const Map& other = K::kByKey ? p.queries : p.keys;
  const auto bytes = [&](const Plan& plan) {
    return layout_of<K, kPitch<M, Dim>>(plan, gradient, p.table_rows, p.table_columns).total;
  };
  for (const bool tables_shared : {true, false}) {
    // A multiprocessor has the limit of one block and kReserved, and keeps kReserved for each block.
    constexpr int64_t kReserved = 1024;
    for (const int64_t limit : {(int64_t{shared_limit} - kReserved) / 2, int64_t{shared_limit}}) {
      for (const int warps : {4, 2, 1}) {
        Plan plan{warps, kBlock, 1, 1, tables_shared, 0};
        int64_t halo = 1;
        for (int h = 0; h < p.launch_heads; ++h) {
          const Window& w = p.windows[h];
          const int64_t height = divide_up(other.height, w.dilation_y), width = divide_up(other.width, w.dilation_x);
          halo = std::max(halo, halo_extent(p.kind, 2 * warps, w.kernel_y, height) *
                                    halo_extent(p.kind, kBlock, w.kernel_x, width));
        }
        plan.slots = static_cast<int>(divide_up(halo, kBlock) * kBlock);
        if (plan.slots > 512 || bytes(plan) > limit) {
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

// Bytes of shared memory that a block needs at least: `plan_of` always finds a plan for them.
template <class M, template <class, int> class Kernel, int... Dims>
uint32_t least_shared(int head_dim, std::integer_sequence<int, Dims...>) {
  uint32_t bytes = 0;
  const auto layout = [&]<int Dim>() {
    using K = Kernel<M, Dim>;
    const Plan least{1, kBlock, 1, 1, false, 0};
    return layout_of<K, kPitch<M, Dim>>(least, K::kTableGradient, 0, 0).total;
  };
  ((bytes == 0 && head_dim <= Dims ? (bytes = layout.template operator()<Dims>()) : 0), ...);
  return bytes;
}

// Sums the tables' partials of `heads` heads from `first` on, where each partial has `heads_of_partial`.
template <class M>
void launch_reduction(const Params& p, const void* partials, int count, int first, int heads, int heads_of_partial, Context& context) {
  const int table = p.table_rows * p.table_columns;
  const TableSums sums{partials, count, table, first, heads_of_partial, p.grad_bias.data, p.grad_bias.is_float};
  launch(reduce_tables<typename M::Element, typename M::Real>, static_cast<int>(divide_up(table, kWarp)), heads, kReductionThreads,
         kReductionThreads * sizeof(typename M::Real), sums, context);
}

template <class M, template <class, int> class Kernel, int Dim>
void launch_padded(Params p, Context& context) {
  using K = Kernel<M, Dim>;
  const bool gradient = K::kTableGradient && p.table_gradient;
  p.table_gradient = gradient;
  K::choose_tensors(p);
  // Kernels count places in a table in 32 bits. Windows with a larger one have more than 2^24 keys.
  if (int64_t{p.table_rows + 1} * (p.table_columns + 1) > (1 << 26)) throw std::runtime_error("natten_ext: the table has 2^26 entries or more");
  p.plan = plan_of<M, Kernel, Dim>(p, context);
  p.shared = layout_of<K, kPitch<M, Dim>>(p.plan, gradient, p.table_rows, p.table_columns);
  const int64_t tiles = largest_tile_count(p, K::kByKey);
  const int64_t most = gradient ? std::max(1, context.table_blocks / p.launch_heads) : INT32_MAX / p.launch_heads;
  if (!gradient && tiles > most) throw std::runtime_error("natten_ext: too many tiles for one launch");
  p.plan.blocks_per_head = static_cast<int>(std::min(tiles, most));
  prepare_blocks(p, K::kByKey, sizeof(typename M::Element), sizeof(typename M::Real));
  const int64_t partials = p.plan.blocks_per_head * (p.plan.tables_shared ? 1 : p.plan.warps);
  const int64_t table = int64_t{p.table_rows} * p.table_columns;
  if (gradient) {
    p.table_partials = context.allocate(partials * p.launch_heads * table * sizeof(typename M::Real));
  }
  const int channel_blocks = static_cast<int>(divide_up(p.head_dim, K::kChannels));
  launch(attention_kernel<M, Kernel, Dim>, p.launch_heads * p.plan.blocks_per_head, channel_blocks, kWarp * p.plan.warps,
         p.plan.shared_bytes, p, context);
  if (gradient) launch_reduction<M>(p, p.table_partials, static_cast<int>(partials), p.first_head, p.launch_heads, p.launch_heads, context);
}

// Launches the instance for the least padded head_dim that holds the problem's, for at most kMaxHeads heads at a time.
template <class M, template <class, int> class Kernel, int... Dims>
void launch_range(Params p, const std::vector<Window>& windows, const HeadRange& heads, Context& context,
                  std::integer_sequence<int, Dims...>) {
  for (p.first_head = static_cast<int>(heads.first); p.first_head < heads.last; p.first_head += kMaxHeads) {
    p.launch_heads = std::min(kMaxHeads, static_cast<int>(heads.last) - p.first_head);
    std::copy_n(windows.begin() + p.first_head, p.launch_heads, p.windows);
    bool done = false;
    ((!done && p.head_dim <= Dims ? (launch_padded<M, Kernel, Dims>(p, context), done = true) : false), ...);
  }
}
template <class M, template <class, int> class Kernel>
void launch_all_heads(const Params& p, const std::vector<Window>& windows, Context& context) {
  launch_range<M, Kernel>(p, windows, {0, p.heads}, context, HeadDims<M>{});
}

}  // namespace natten_ext::cuda
