// What is taken off products of queries, for windows of 7 x 7 keys: of scores the log-sum-exp, of dP D, and in the double backward r of X
// and t of G. Nothing is taken off pair by pair: on the query-centred side products start at these numbers; to the key-centred side
// they come as further channels of the staged rows.
#pragma once

#include "narrow_frame.h"

namespace natten_ext::cuda {

NATTEN_EXT_DEVICE bool is_nan(float number) { return number != number; }
// Not of NaN.
NATTEN_EXT_DEVICE bool within(float number, float most) { return magnitude(number) <= most; }

// Eight channels with two numbers in three parts each, whose sum a float's 24 bits. Parts of the first are in even channels, of the
// second in odd ones. Where a number is too large for that, all is NaN, so that results are computed once more with care; for
// this three exact numbers follow the first word.
template <class Element>
struct alignas(16) NumberParts {
  static constexpr uint32_t kExact = 0xffffffff;  // NaN twice
  uint32_t words[4];

  NATTEN_EXT_DEVICE static NumberParts of(float first, float second) {
    NumberParts parts;
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 3; ++i) {
      parts.words[i] = pack<Element>(first, second);
      first -= parts.part(i, 0);
      second -= parts.part(i, 1);
    }
    parts.words[3] = 0;
    return parts;
  }
  NATTEN_EXT_DEVICE static NumberParts exactly(float a, float b, float c) { return {{kExact, bits_of(a), bits_of(b), bits_of(c)}}; }
  NATTEN_EXT_DEVICE static bool fits(float number) { return within(number, kMostInParts<Element>); }

  NATTEN_EXT_DEVICE bool is_exact() const { return words[0] == kExact; }
  NATTEN_EXT_DEVICE float exact(int i) const { return from_bits(words[1 + i]); }
  NATTEN_EXT_DEVICE float number(int which) const { return part(0, which) + part(1, which) + part(2, which); }
  // What picks the first number or the second: two of eight channels.
  NATTEN_EXT_DEVICE static uint32_t picking(int which) { return which == 0 ? pack<Element>(1, 0) : pack<Element>(0, 1); }

 private:
  NATTEN_EXT_DEVICE float part(int i, int which) const { return widen(Element{static_cast<uint16_t>(words[i] >> 16 * which)}); }
};

// Own rows of keys as left operands, and what picks the first or the second of queries' two numbers: so products start at these.
template <class M, class Tile>
struct PickingLeft : NarrowLeft<M, Tile> {
  using Element = typename M::Element;
  static constexpr int Dim = Tile::kDim;
  uint32_t picking[Dim == 8 ? 4 : 2];  // behind rows of 8 channels there is room in the same operand

  // `pick`: address of 8 channels (NumberParts::picking). From shared memory, so that the compiler takes registers for different
  // numbers: it would copy equal ones each time.
  NATTEN_EXT_DEVICE void load(uint32_t slot, Shared pick) {
    if constexpr (Dim == 8) {
      const uint32_t lane = narrow_lane();
      load_matrices(picking, lane < 16 ? Tile::kOwn + Tile::place(slot + lane, 0) : pick);
      this->a[0][0] = picking[0], this->a[0][1] = picking[1];
    } else {
      NarrowLeft<M, Tile>::load(slot);
      load_matrices(picking, pick);
    }
  }
  // c = number + a b for 8 right rows; `number`: the parts of theirs.
  template <class Word>
  NATTEN_EXT_DEVICE void multiply_rows_and_number(float (&c)[4], uint32_t number, Word word) const {
    NATTEN_EXT_UNROLL
    for (float& sum : c) sum = 0;
    if constexpr (Dim == 8) {
      multiply<Element>(c, picking, word(0), number);
    } else {
      multiply<Element>(c, picking, number);
      this->multiply_rows(c, word);
    }
  }
};

// Rows as right operands of scores, of `Blocks` blocks, and numbers of theirs. Those of rows of 8 channels come with them, since an operand
// is two adjacent registers.
template <class Tile, int Blocks>
struct NumberedRows {
  static constexpr bool kTogether = Tile::kDim == 8;
  static constexpr int kRowSlots = FrameScores<Tile, Blocks>::kRowSlots;
  static constexpr uint32_t kNumberBytes = 16;
  FrameScores<Tile, Blocks> rows;
  Shared numbers_at;
  uint32_t numbers[kTogether ? 4 : 2];  // with the rows of each block before its own

  // `region`, `numbers`: of rows and of parts, whose slots are the same.
  NATTEN_EXT_DEVICE NumberedRows(Shared region, Shared numbers, uint32_t frame) : rows(region, frame) {
    const uint32_t lane = narrow_lane(), matrix = lane / 8, block = kTogether ? matrix / 2 : matrix % 2;
    numbers_at = (kTogether && matrix % 2 == 0 ? region : numbers) + (frame + 8 * block + lane % 8) * kNumberBytes;
  }
  NATTEN_EXT_DEVICE void load(int row) {
    if constexpr (!kTogether) rows.load(row);
    load_matrices(numbers, numbers_at + row * kRowSlots * kNumberBytes);
  }
  // Without numbers, if these are loaded apart.
  NATTEN_EXT_DEVICE void load_rows(int row) {
    if constexpr (kTogether) load(row);
    else rows.load(row);
  }
  NATTEN_EXT_DEVICE uint32_t word(int block, int chunk) const { return kTogether ? numbers[2 * block] : rows.word(0, block, chunk); }
  NATTEN_EXT_DEVICE uint32_t number(int block) const { return kTogether ? numbers[2 * block + 1] : numbers[block]; }
};

// Where a query's scores start; NaN if the two parts of its log-sum-exp must be taken off one by one. Of a query without weights, whose
// log-sum-exp is infinite, minus infinity.
NATTEN_EXT_DEVICE float start_of_scores(const NarrowParams& p, float base, float log_sum) {
  const float lse = base + log_sum;
  const bool fits = within(lse, p.most_log_sum) || lse == kInfinity<float>;
  return fits ? -lse * p.inverse_factor : from_bits(0x7fffffff);
}

}  // namespace natten_ext::cuda
