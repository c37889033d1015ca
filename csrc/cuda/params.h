// What a launch hands to its kernel: sizes, tensors, and how the work is cut into blocks and stages.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "arch.h"

namespace natten_ext::cuda {

constexpr int kMaxHeads = 48;  // per launch: what parameters have room for; the host starts another for the rest
constexpr int kMaxGeneralHeads = 16;  // likewise, of general neighborhoods
constexpr int kMaxTensors = 4;  // staged together
constexpr int kBlock = 8;      // adjacent keys (or queries) of a row that are worked on as one
constexpr int kWarpRows = 16;  // queries (or keys) of a warp: two rows of eight

struct Window {
  uint16_t kernel_y, kernel_x, dilation_y, dilation_x;
  bool operator==(const Window&) const = default;
};

// Division of numbers below 2^31 by a divisor that the host knows: a product and a shift.
struct Divisor {
  uint32_t magic = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int divisor) {  // on the host
    while ((1u << shift) < static_cast<uint32_t>(divisor)) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  NATTEN_EXT_DEVICE int operator()(int number) const {
    return static_cast<int>(multiply_high(2 * static_cast<uint32_t>(number), magic) >> shift);
  }
};

// How the map of a head falls into residue classes, and these into tiles.
struct Cut {
  Divisor by_tiles_y, by_tiles_x, by_dilation_y, by_dilation_x;
  int tiles_y;  // of a class
  uint16_t tiles_x;
};

// The same for general neighborhoods: of three axes, with strides and causal windows.
struct GeneralWindow {
  int kernel_z, kernel_y, kernel_x, dilation_z, dilation_y, dilation_x, stride_z, stride_y, stride_x;
  bool causal_z, causal_y, causal_x;
};
struct GeneralCut {
  Divisor by_tiles_z, by_tiles_y, by_tiles_x, by_dilation_z, by_dilation_y, by_dilation_x, by_stride_z, by_stride_y, by_stride_x;
  int tiles_z, tiles_y, tiles_x;
};

// A tensor (batch, z, y, x, head, channel). Strides count elements; channels are contiguous. No data: absent.
struct Rows {
  void* data;
  int64_t batch, z, y, x, head;
};

// A relative position table (head, z, y, x), in the element type of the maps or in float.
struct Table {
  void* data;
  int64_t head, z, y, x;
  bool is_float;
};

// Where pairs find their entries in the copy of a table that kernels read, in bytes: at the sum of their row's and their
// column's place, from the entry of offset zero on. Planes of the copy have a row and a column more, for pairs that don't
// exist. Where there is no table, one entry serves all pairs that exist.
struct TablePlaces {
  int zero;                       // place of offset zero in the copy
  int plane, row, column;         // from one to the next
  int masked_row, masked_column;  // those of pairs that don't exist
};

// A map of queries or keys. Sequences are maps of width 8 whose last row may be short: `count` positions in all.
struct Map {
  int depth, height, width, count;
};

// How a kernel cuts its work. A tile has 16 rows for each warp; the other side is staged in pieces of at most `slots`
// rows, `stages` (one or two) pieces deep.
struct Plan {
  int warps, slots, stages;
  bool wide;  // of general neighborhoods: a tile is one row of the map, see tiles.h
  int blocks_per_head;  // each works on every blocks_per_head-th tile of its head
  bool tables_shared;   // tables and their gradients fit shared memory
  uint32_t shared_bytes;

  NATTEN_EXT_HOST_DEVICE int tile_height() const { return wide ? 1 : 2 * warps; }
  NATTEN_EXT_HOST_DEVICE int tile_width() const { return wide ? 2 * warps * kBlock : kBlock; }
};

// Where things lie in a block's shared memory.
struct SharedLayout {
  uint32_t tile_bytes, piece_bytes, scalar_bytes, stage_bytes, table_bytes, gradient_bytes, diagonal_bytes;  // of one
  uint32_t stages, scalars_in_stage, diagonals, tables, gradients, total;

  NATTEN_EXT_DEVICE Shared own(int tensor) const { return tensor * tile_bytes; }
  NATTEN_EXT_DEVICE Shared rows(int stage, int tensor) const { return stages + stage * stage_bytes + tensor * piece_bytes; }
  NATTEN_EXT_DEVICE Shared scalars(int stage, int which) const {
    return stages + stage * stage_bytes + scalars_in_stage + which * scalar_bytes;
  }
  NATTEN_EXT_DEVICE Shared table(int which) const { return tables + which * table_bytes; }
  NATTEN_EXT_DEVICE Shared diagonal(int warp) const { return diagonals + warp * diagonal_bytes; }
  NATTEN_EXT_DEVICE Shared gradient(int warp) const { return gradients + warp * gradient_bytes; }
};

// What kernels of all neighborhoods are given.
struct Params {
  Kind kind;
  int batch, heads, head_dim;
  int first_head, launch_heads;  // in key-centred kernels heads are those of keys
  Map queries, keys;
  bool l2;
  double scale;                // a: factor of q.k
  int vector_bytes;            // widest copy that every staged row allows: 16, 8, 4 or 2
  int output_vector_bytes;     // the same for results
  int table_planes, table_rows, table_columns;

  Rows query, key, value, output;
  Rows grad_output, cot_query, cot_key, cot_value;
  Rows grad_query, grad_key, grad_value, grad_grad_output;
  Table bias, cot_bias, grad_bias;
  bool table_gradient;
  bool tangents_only;  // a double backward that is asked for dO_bar and r, and for no gradient: it needs neither dP nor G
  // Per kernel, from the tensors above: what is staged once per tile and once per piece.
  Rows own[kMaxTensors], staged[kMaxTensors];
  void *base, *log_sum;  // (batch, heads, queries) in Real: the two parts of L of docs/double_backward.md
  void *natural_lse, *grad_lse, *grad_grad_lse;  // likewise, of Arguments; null: absent, or not asked for
  void* row_numbers;     // (batch, heads, queries, numbers) in Real, see rows.h
  void* table_partials;  // (partials, launch_heads, table) in Real
  Plan plan;
  // What `launch_padded` finds out, so that blocks don't: they divide nothing, and this takes none of their registers.
  SharedLayout shared;
  TablePlaces table_places;
  int short_row, short_columns;  // of the staged sequence: the last row, if it has fewer columns; -1: none has
  bool wide_copies;  // all staged rows allow copies of 16 bytes, and their strides in bytes, dilation included, fit 31 bits
  Divisor by_launch_heads, by_table_rows, by_table_columns;
  int sharing;  // heads to a key head: one, but for general neighborhoods
};

// And the windows. `General`: of three map axes, strides and causal windows; otherwise two axes on which windows slide, grid and
// full attention.
template <bool General>
struct ParamsOf : Params {
  static constexpr int kHeads = kMaxHeads;
  Divisor by_kernel_y, by_kernel_x;  // of grid, where all heads are alike
  Window windows[kHeads];
  Cut cuts[kHeads];
};
template <>
struct ParamsOf<true> : Params {
  static constexpr int kHeads = kMaxGeneralHeads;
  Divisor by_sharing;
  GeneralWindow windows[kHeads];
  GeneralCut cuts[kHeads];
};
static_assert(sizeof(ParamsOf<false>) <= 4096 && sizeof(ParamsOf<true>) <= 4096, "older drivers take no more parameters");

template <bool General>
using WindowOf = std::remove_extent_t<decltype(ParamsOf<General>::windows)>;

// What a kernel computes in. Products: of the matrix units, that make one product. 0: none, it is made in ordinary arithmetic;
// 1: one, of operands as the units have them (float: rounded to TF32); 3: of floats that are split in two (`split` in products.h).
template <class ElementType, class RealType, int Products>
struct Mode {
  using Element = ElementType;
  using Real = RealType;
  static constexpr bool kTensor = Products > 0, kSplit = Products == 3;
  static constexpr int kParts = kSplit ? 2 : 1;  // of an operand
};
using HalfMode = Mode<Half, float, 1>;
using BfloatMode = Mode<Bfloat, float, 1>;
using Tf32Mode = Mode<float, float, 1>;
using FloatMode = Mode<float, float, 3>;
using DoubleMode = Mode<double, double, 0>;

// Bytes from one staged row of `Dim` channels, the padded head_dim, to the next: an odd number of sixteens, so that eight rows lie in different banks.
template <class M, int Dim>
constexpr uint32_t kPitch = Dim * sizeof(typename M::Element) / 16 % 2 == 1 ? Dim * sizeof(typename M::Element)
                                                                           : Dim * sizeof(typename M::Element) + 16;

}  // namespace natten_ext::cuda
