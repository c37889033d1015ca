// A frame of keys (narrow.h) as operands of products: which of its columns a lane has, how its rows are loaded, and the
// two products that kernels are made of: scores of a row, and sums of weights times rows.
#pragma once

#include "narrow.h"

namespace natten_ext::cuda {

// What a lane has of the frame: of each block and row, columns 2t and 2t + 1 (t = lane % 4) for queries g and g + 8
// (g = lane / 4), which are one column of the map. As a window is less than eight wide, a column belongs to it in one block only.
template <class Tile>
struct FrameColumns {
  static constexpr bool Whole = Tile::kWhole;
  int first;       // column of the frame where the queries' windows begin
  int shift;       // from the queries to that column
  bool second[2];  // whether the windows have the column in block 1
  bool valid[2];   // whether they have it at all
  Shared table[2]; // entries of the column in frame row 0, of the lower query

  template <bool ByKey>
  NATTEN_EXT_DEVICE FrameColumns(const NarrowGroup<Tile, ByKey>& group) {
    const uint32_t lane = narrow_lane();
    const int left = Whole ? 0 : group.x - Tile::kReach;
    const int x = lesser(group.x + static_cast<int>(lane / 4), group.width - 1);
    shift = class_window_start(x, group.width, kNarrowKernel) - x;
    first = shift + x - left;
    const int row = group.window_y - group.y + kNarrowKernel - 2;
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int column = frame_column(static_cast<int>(lane % 4 * 2) + c);
      second[c] = column >= 8;
      valid[c] = inside(column - first, kNarrowKernel);
      const int entry = valid[c] ? left + column - x + kNarrowKernel - 1 : 2 * kNarrowKernel - 1;
      table[c] = Tile::kTable + (row * Tile::kTableRow + entry) * static_cast<Shared>(sizeof(float));
    }
  }
  // Entries of frame row `row` for the lower queries. For the upper ones they are those of the row above.
  NATTEN_EXT_DEVICE void load_entries(float (&entries)[2], int row) const {
    NATTEN_EXT_UNROLL
    for (int c = 0; c < 2; ++c) entries[c] = load_shared<float>(entry(c, row, 1));
  }
  // The column of the frame that column 0 to 7 of both blocks stands for.
  NATTEN_EXT_DEVICE int frame_column(int column) const { return !Whole && column < first ? column + 8 : column; }
  // The table's entries of a frame row, for query row h.
  NATTEN_EXT_DEVICE Shared entry(int c, int row, int h) const {
    return table[c] + (row + 1 - h) * Tile::kTableRow * static_cast<Shared>(sizeof(float));
  }
};

// The frame's rows as right operands of scores: four 8 x 8 matrices at a time, one or several of which are a row. Of whole classes
// two rows may be taken as one of two `Blocks`.
template <class Tile, int Blocks = Tile::kWhole ? 1 : 2>
struct FrameScores {
  static constexpr int kChunks = Tile::kChunks, kBlocks = Blocks, kMatrices = kBlocks * kChunks;  // of a row
  static constexpr int kRowSlots = Tile::kWhole ? 8 * Blocks : Tile::kColumns;
  static constexpr int kLoads = kMatrices > 4 ? kMatrices / 4 : 1, kRowsAtATime = kMatrices < 4 ? 4 / kMatrices : 1;
  static constexpr bool kHalves = kMatrices > 4 && kChunks % 4 != 0;  // a load has two chunks of both blocks, not four of one
  Shared address;
  uint32_t words[kLoads][4];

  // `region`: of keys or of values. `one`: a load has one row only, so that it can be the frame's last.
  NATTEN_EXT_DEVICE FrameScores(Shared region, uint32_t frame, bool one = false) {
    const uint32_t lane = narrow_lane(), matrix = lane / 8;
    const uint32_t row = kRowsAtATime > 1 && one ? 0 : matrix / kMatrices, block = matrix / (kHalves ? 2 : kChunks) % kBlocks, chunk = matrix % (kHalves ? 2 : kChunks);
    address = region + Tile::place(frame + row * kRowSlots + block * 8 + lane % 8, chunk);
  }
  // Loads frame row `row`, and what else comes with it.
  NATTEN_EXT_DEVICE void load(int row) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int further = kHalves ? 2 * i : 4 * i % kChunks, block = kHalves ? 0 : 4 * i / kChunks;
      load_matrices(words[i], Tile::further(address, further) + (row * kRowSlots + block * 8) * Tile::kBytes);
    }
  }
  // A chunk of 8 rows of a block, `row` rows after the one that was asked for.
  NATTEN_EXT_DEVICE uint32_t word(int row, int block, int chunk) const {
    const int matrix = kHalves ? chunk / 2 * 4 + block * 2 + chunk % 2 : (row * kBlocks + block) * kChunks + chunk;
    return words[matrix / 4][matrix % 4];
  }
};

// The frame's rows as right operands of results. A product is 16 deep: a row of two blocks, or two rows of one.
template <class Tile>
struct FrameResults {
  static constexpr int kChunks = Tile::kChunks, kSlots = Tile::kWhole ? 16 : Tile::kColumns;  // kSlots: from one product's rows to the next
  static constexpr int kLoads = kChunks > 2 ? kChunks / 2 : 1, kProductsAtATime = kChunks < 2 ? 2 : 1;
  Shared address;
  uint32_t words[kLoads][4];

  NATTEN_EXT_DEVICE FrameResults(Shared region, uint32_t frame) {
    const uint32_t lane = narrow_lane(), matrix = lane / 8;
    const uint32_t product = matrix / 2 / kChunks, chunk = matrix / 2 % kChunks, half = matrix % 2;
    address = region + Tile::place(frame + product * kSlots + half * 8 + lane % 8, chunk);
  }
  NATTEN_EXT_DEVICE void load(int product) {
    NATTEN_EXT_UNROLL
    for (int i = 0; i < kLoads; ++i) load_matrices_transposed(words[i], Tile::further(address, 2 * i) + product * kSlots * Tile::kBytes);
  }
  // Half of the rows in 8 channels, for a product not before the one that was asked for.
  NATTEN_EXT_DEVICE uint32_t word(int product, int chunk, int half) const {
    const int matrix = (product % kProductsAtATime * kChunks + chunk) * 2 + half;
    return words[matrix / 4][matrix % 4];
  }
};

// Own rows as left operands.
template <class M, class Tile>
struct NarrowLeft {
  static constexpr int Dim = Tile::kDim;
  static constexpr int kSteps = Dim > 8 ? Dim / 16 : 1, kRegisters = Dim > 8 ? 4 : 2;
  uint32_t a[kSteps][kRegisters];

  // Loads the rows of a group that lie from `slot` on.
  NATTEN_EXT_DEVICE void load(uint32_t slot) {
    const uint32_t lane = narrow_lane();
    load_from(Tile::kOwn + Tile::place(slot + lane % 16, lane / 16 % (Dim / 8)));
  }
  // `address`: of chunk lane / 16 of row lane % 16.
  NATTEN_EXT_DEVICE void load_from(Shared address) {
    NATTEN_EXT_UNROLL
    for (int k = 0; k < kSteps; ++k) load_matrices(a[k], Tile::further(address, 2 * k));
  }
  // c += a b for 8 right rows; `word(chunk)`: their chunks.
  template <class Word>
  NATTEN_EXT_DEVICE void multiply_rows(float (&c)[4], Word word) const {
    using Element = typename M::Element;
    if constexpr (Dim == 8) {
      multiply<Element>(c, a[0], word(0));
    } else {
      NATTEN_EXT_UNROLL
      for (int k = 0; k < kSteps; ++k) multiply<Element>(c, a[k], word(2 * k), word(2 * k + 1));
    }
  }
  // c = start + a b.
  template <class Word>
  NATTEN_EXT_DEVICE void multiply_rows_from(float (&c)[4], const float (&start)[4], Word word) const {
    using Element = typename M::Element;
    if constexpr (Dim == 8) {
      multiply_from<Element>(c, start, a[0], word(0));
    } else {
      multiply_from<Element>(c, start, a[0], word(0), word(1));
      NATTEN_EXT_UNROLL
      for (int k = 1; k < kSteps; ++k) multiply<Element>(c, a[k], word(2 * k), word(2 * k + 1));
    }
  }
};

// Adds products of own rows and a row of the frame.
template <class M, class Tile, int Blocks>
NATTEN_EXT_DEVICE void add_frame_products(float (&c)[Blocks][4], const NarrowLeft<M, Tile>& left, const FrameScores<Tile>& rows, int row) {
  NATTEN_EXT_UNROLL
  for (int b = 0; b < Blocks; ++b) left.multiply_rows(c[b], [&](int chunk) { return rows.word(row, b, chunk); });
}

// The sum of one or two such products, both blocks folded into one. `begin(c, block, word)` forms the first one, from wherever it starts.
template <class M, class Tile, class Begin, class... More>
NATTEN_EXT_DEVICE void folded_products(float (&s)[4], Begin begin, const FrameScores<Tile>& rows, int row, const FrameColumns<Tile>& columns,
                                       const More&... more) {
  constexpr int kBlocks = FrameScores<Tile>::kBlocks;
  float c[kBlocks][4];
  NATTEN_EXT_UNROLL
  for (int b = 0; b < kBlocks; ++b) begin(c[b], b, [&](int chunk) { return rows.word(row, b, chunk); });
  if constexpr (sizeof...(More) > 0) add_frame_products<M, Tile>(c, more..., row);
  NATTEN_EXT_UNROLL
  for (int e = 0; e < 4; ++e) s[e] = columns.second[e % 2] ? c[kBlocks - 1][e] : c[0][e];
}
// From zero,
template <class M, class Tile, class... More>
NATTEN_EXT_DEVICE void frame_products(float (&s)[4], const NarrowLeft<M, Tile>& left, const FrameScores<Tile>& rows, int row,
                                      const FrameColumns<Tile>& columns, const More&... more) {
  const auto begin = [&](float (&c)[4], int, auto word) {
    NATTEN_EXT_UNROLL
    for (float& sum : c) sum = 0;
    left.multiply_rows(c, word);
  };
  folded_products<M, Tile>(s, begin, rows, row, columns, more...);
}
// and from numbers of the left rows.
template <class M, class Tile>
NATTEN_EXT_DEVICE void frame_products_from(float (&s)[4], const float (&start)[4], const NarrowLeft<M, Tile>& left, const FrameScores<Tile>& rows,
                                           int row, const FrameColumns<Tile>& columns) {
  folded_products<M, Tile>(s, [&](float (&c)[4], int, auto word) { left.multiply_rows_from(c, start, word); }, rows, row, columns);
}

// Sums over the frame of weights times rows, in `acc` or in another's; `Totals`: and of the weights, rounded as in the products.
template <class M, class Tile, bool Totals>
struct FrameSums {
  using Element = typename M::Element;
  using Columns = FrameColumns<Tile>;
  using Rows = FrameResults<Tile>;
  static constexpr int kChunks = Tile::kChunks, kFrameRows = NarrowGroup<Tile>::kFrameRows;
  float acc[kChunks][4];
  float totals[4];

  NATTEN_EXT_DEVICE void clear_all() {
    clear(acc);
    NATTEN_EXT_UNROLL
    for (float& total : totals) total = 0;
  }

  // Adds frame row r, in order. Of whole classes two rows are one product, and the last row is half of one.
  NATTEN_EXT_DEVICE void add(Rows& rows, int r, const float (&weights)[4], const Columns& columns) { add_to(acc, rows, r, weights, columns); }
  NATTEN_EXT_DEVICE void add_to(float (&acc)[kChunks][4], Rows& rows, int r, const float (&weights)[4], const Columns& columns) {
    add_row_to<false>(acc, rows, r, {pack<Element>(weights[0], weights[1]), pack<Element>(weights[2], weights[3])}, columns);
  }
  // `Loaded`: by other sums, which have just added the same row.
  template <bool Loaded>
  NATTEN_EXT_DEVICE void add_row_to(float (&acc)[kChunks][4], Rows& rows, int r, const uint32_t (&packed)[2], const Columns& columns) {
    if constexpr (Tile::kWhole) {
      if (r % 2 == 0) {
        above[0] = packed[0], above[1] = packed[1];
        if (r + 1 < kFrameRows) return;
      }
      if (!Loaded && r / 2 % Rows::kProductsAtATime == 0) rows.load(r / 2);
      if (r % 2 == 0) {
        add_product(acc, above, [&](int n, int half) { return rows.word(r / 2, n, half); });
      } else {
        const uint32_t left[4] = {above[0], above[1], packed[0], packed[1]};
        add_product(acc, left, [&](int n, int half) { return rows.word(r / 2, n, half); });
      }
    } else {
      if (!Loaded && r % Rows::kProductsAtATime == 0) rows.load(r);
      const uint32_t second = (columns.second[0] ? 0xffffu : 0) | (columns.second[1] ? 0xffff0000u : 0);
      const uint32_t left[4] = {packed[0] & ~second, packed[1] & ~second, packed[0] & second, packed[1] & second};
      add_product(acc, left, [&](int n, int half) { return rows.word(r, n, half); });
    }
  }

  // Adds both blocks of product number `product`, unfolded.
  NATTEN_EXT_DEVICE void add_blocks(const Rows& rows, int product, const float (&weights)[2][4]) { add_blocks_to(acc, rows, product, weights); }
  NATTEN_EXT_DEVICE void add_blocks_to(float (&acc)[kChunks][4], const Rows& rows, int product, const float (&weights)[2][4]) {
    uint32_t left[4];
    pack_weights<Element>(left, weights);
    add_packed_to(acc, rows, product, left);
  }
  NATTEN_EXT_DEVICE void add_packed(const Rows& rows, int product, const uint32_t (&left)[4]) { add_packed_to(acc, rows, product, left); }
  NATTEN_EXT_DEVICE void add_packed_to(float (&acc)[kChunks][4], const Rows& rows, int product, const uint32_t (&left)[4]) {
    add_product(acc, left, [&](int n, int half) { return rows.word(product, n, half); });
  }

  // A row in ordinary arithmetic, without weights that are marked as masked. `slot_of`: of columns 0 to 7, from the region on.
  template <class SlotOf>
  NATTEN_EXT_DEVICE void add_valid(Shared region, const float (&weights)[4], SlotOf slot_of) { add_valid_to(acc, region, weights, slot_of); }
  template <class SlotOf>
  NATTEN_EXT_DEVICE void add_valid_to(float (&acc)[kChunks][4], Shared region, const float (&weights)[4], SlotOf slot_of) {
    const uint32_t lane = narrow_lane();
    NATTEN_EXT_NO_UNROLL
    for (int column = 0; column < 8; ++column) {
      float weight[2];
      bool valid[2];
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int from = lane / 4 * 4 + column / 2;
        const float even = shuffle(weights[2 * h], from), odd = shuffle(weights[2 * h + 1], from);
        weight[h] = column % 2 ? odd : even;
        valid[h] = !is_negative_zero(weight[h]);
        weight[h] = as_operand<M>(weight[h]);
        if (valid[h]) totals[2 * h] += weight[h];
      }
      const Shared row = region + Tile::place(slot_of(column), 0) + lane % 4 * 4;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < kChunks; ++n) {
        struct alignas(4) Pair {
          Element e[2];
        };
        const Pair value = load_shared<Pair>(row ^ 16 * n);
        NATTEN_EXT_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (valid[e / 2]) acc[n][e] = fused_multiply_add(weight[e / 2], widen(value.e[e % 2]), acc[n][e]);
        }
      }
    }
  }

 private:
  uint32_t above[2];  // weights of the row above

  template <int Registers, class Word>
  NATTEN_EXT_DEVICE void add_product(float (&acc)[kChunks][4], const uint32_t (&left)[Registers], Word word) {
    const auto add_to = [&](float (&c)[4], uint32_t upper, uint32_t lower) {
      if constexpr (Registers == 2) multiply<Element>(c, left, upper);
      else multiply<Element>(c, left, upper, lower);
    };
    NATTEN_EXT_UNROLL
    for (int n = 0; n < kChunks; ++n) add_to(acc[n], word(n, 0), word(n, 1));
    const uint32_t ones = pack<Element>(1, 1);
    if constexpr (Totals) add_to(totals, ones, ones);
  }
};

}  // namespace natten_ext::cuda
