// The two products that every kernel is made of, for a warp's 16 own rows and a unit of two blocks of staged rows:
//
//   scores      c[i][j] += own[i] . staged[j]
//   accumulate  acc[i]  += sum over j of weights[i][j] * staged[j]
//
// and the sums of the weights that the second sees (WeightSums).
//
// Results lie as in the matrix units' fragments in every mode (arch.h): of block b, a lane has c[b][2h + e] for its
// own rows h = 0, 1 and the block's columns 2 (lane % 4) + e. On the matrix units the weights of one product are the
// left operand of the next without leaving their registers.
#pragma once

#include "units.h"

namespace natten_ext::cuda {

template <class Real>
constexpr Real kInfinity = static_cast<Real>(__builtin_huge_val());

// The weight of a pair that does not exist. Weights of pairs are never this zero, but +0.
template <class Real>
constexpr Real kMasked = Real(-0.0);

template <class Real>
using Scores = Real[2][4];

template <class Real, int N>
NATTEN_EXT_DEVICE void clear(Real (&c)[N][4]) {
  NATTEN_EXT_UNROLL
  for (int i = 0; i < 4 * N; ++i) c[i / 4][i % 4] = 0;
}

// A float as two TF32 numbers: the nearest one, and what that leaves, exactly. The units ignore the low 13 bits, so of `low` they
// see 11 bits. Every product with an infinity or NaN is NaN, or with what rounds to infinity.
NATTEN_EXT_DEVICE void split(uint32_t& high, uint32_t& low) {
  const float whole = from_bits(high);
  high = (high + 0x1000u) & 0xffffe000u;
  low = bits_of(whole - from_bits(high));
}

// Makes operands of the matrix units from x[0], where that has elements.
template <class M, int N>
NATTEN_EXT_DEVICE void make_operands(uint32_t (&x)[M::kParts][N]) {
  NATTEN_EXT_UNROLL
  for (int i = 0; i < N; ++i) {
    if constexpr (M::kSplit) split(x[0][i], x[1][i]);
    else if constexpr (sizeof(typename M::Element) == 4) x[0][i] = round_to_tf32(x[0][i]);
  }
}

// big += a b, with registers `i` and on of b. Of split operands that is the product of their high parts; `small` gets those of high
// and low ones. Low times low is less than a float's rounding.
template <class M, int N>
NATTEN_EXT_DEVICE void multiply_parts(float (&big)[4], float (&small)[4], const uint32_t (&a)[M::kParts][4],
                                      const uint32_t (&b)[M::kParts][N], int i) {
  using Element = typename M::Element;
  if constexpr (M::kSplit) {
    multiply<Element>(small, a[1], b[0][i], b[0][i + 1]);
    multiply<Element>(small, a[0], b[1][i], b[1][i + 1]);
  }
  multiply<Element>(big, a[0], b[0][i], b[0][i + 1]);
}

// Own rows as the left operand. Held: in registers, otherwise read again from the tile for every unit.
template <class M, int Dim, bool Held = false>
struct LeftRows {
  // A product's depth is 32 bytes of a row; rows of eight 16-bit channels are half of that.
  static constexpr int kBytes = Dim * static_cast<int>(sizeof(typename M::Element));
  static constexpr int kSteps = kBytes < 32 ? 1 : kBytes / 32, kRegisters = kBytes < 32 ? 2 : 4;
  using Fragment = uint32_t[M::kParts][kRegisters];
  Shared address[2];  // on the matrix units the lane's row of ldmatrix, otherwise rows g and g + 8
  Fragment fragments[Held ? kSteps : 1];

  // `slots.slot_of(row)` tells where rows 0 to 15 lie.
  template <class Slots>
  NATTEN_EXT_DEVICE LeftRows(Shared tile, const Slots& slots) {
    const int lane = thread_index() % kWarp;
    if constexpr (M::kTensor) {
      address[0] = tile + slots.slot_of(lane % 16) * kPitch<M, Dim> + lane / 16 * 16;
    } else {
      address[0] = tile + slots.slot_of(lane / 4) * kPitch<M, Dim>;
      address[1] = tile + slots.slot_of(lane / 4 + 8) * kPitch<M, Dim>;
    }
  }
  // Once the tile has arrived.
  NATTEN_EXT_DEVICE void load() {
    if constexpr (Held) {
      NATTEN_EXT_UNROLL
      for (int k = 0; k < kSteps; ++k) read(fragments[k], k);
    }
  }
  // Where row g or g + 8 begins.
  NATTEN_EXT_DEVICE Shared row(int h) const {
    if constexpr (M::kTensor) return shuffle(address[0], thread_index() % kWarp / 4 + 8 * h);
    else return address[h];
  }
  // The fragment of a step; `room` is where it is read to.
  NATTEN_EXT_DEVICE const Fragment& step(int k, Fragment& room) const {
    if constexpr (Held) return fragments[k];
    read(room, k);
    return room;
  }

 private:
  NATTEN_EXT_DEVICE void read(Fragment& a, int k) const {
    load_matrices(a[0], address[0] + 32 * k);
    make_operands<M>(a);
  }
};

// `scores` in ordinary arithmetic.
template <class M, int Dim, bool Held>
NATTEN_EXT_DEVICE void ordinary_scores(Scores<typename M::Real>& c, const LeftRows<M, Dim, Held>& left, Shared staged, const Unit& unit) {
  using Element = typename M::Element;
  using Real = typename M::Real;
  constexpr int kChunk = 16 / sizeof(Element);
  struct alignas(16) Chunk {
    Real e[kChunk];
  };
  const int lane = thread_index() % kWarp;
  const Shared own_row[2] = {left.row(0), left.row(1)};
  Shared row[2][2];
  NATTEN_EXT_UNROLL
  for (int j = 0; j < 4; ++j) row[j / 2][j % 2] = staged + unit.slot_of(j / 2, lane % 4 * 2 + j % 2) * kPitch<M, Dim>;
  NATTEN_EXT_NO_UNROLL
  for (int channel = 0; channel < Dim; channel += kChunk) {
    const uint32_t at = channel * static_cast<uint32_t>(sizeof(Element));
    const Chunk own[2] = {load_shared<Chunk>(own_row[0] + at), load_shared<Chunk>(own_row[1] + at)};
    NATTEN_EXT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Chunk other = load_shared<Chunk>(row[j / 2][j % 2] + at);
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        NATTEN_EXT_UNROLL
        for (int i = 0; i < kChunk; ++i) {
          Real& sum = c[j / 2][2 * h + j % 2];
          sum = fused_multiply_add(own[h].e[i], other.e[i], sum);
        }
      }
    }
  }
}

// `careful` (see `with_care`): a product that split operands made NaN may be infinite, which ordinary arithmetic tells. The finite ones
// stay, so that all kernels have the same.
template <class M, int Dim, bool Held>
NATTEN_EXT_DEVICE void scores(Scores<typename M::Real>& c, const LeftRows<M, Dim, Held>& left, Shared staged, const Unit& unit,
                              bool careful) {
  using Element = typename M::Element;
  using Real = typename M::Real;
  const int lane = thread_index() % kWarp;
  if constexpr (!M::kTensor) {
    ordinary_scores<M, Dim>(c, left, staged, unit);
  } else if constexpr (LeftRows<M, Dim>::kRegisters == 2) {
    uint32_t room[1][2], b[2];
    load_matrices(b, staged + unit.slot_of(lane / 8 % 2, lane % 8) * kPitch<M, Dim>);
    const auto& a = left.step(0, room);
    multiply<Element>(c[0], a[0], b[0]);
    multiply<Element>(c[1], a[0], b[1]);
  } else {
    Scores<Real> ordinary, small;
    NATTEN_EXT_UNROLL
    for (int i = 0; i < 8; ++i) ordinary[i / 4][i % 4] = c[i / 4][i % 4], small[i / 4][i % 4] = 0;
    // Lanes 0 to 7 give rows of the first block at the step's first half, 8 to 15 at its second, 16 to 31 the second block's.
    const Shared row = staged + unit.slot_of(lane / 16, lane % 8) * kPitch<M, Dim> + lane / 8 % 2 * 16;
    const auto step = [&](int k) {
      typename LeftRows<M, Dim>::Fragment room, b;
      load_matrices(b[0], row + 32 * k);
      make_operands<M>(b);
      const auto& a = left.step(k, room);
      multiply_parts<M>(c[0], small[0], a, b, 0);
      multiply_parts<M>(c[1], small[1], a, b, 2);
    };
    // Registers need the number of the step. What is read again does not: fewer steps at a time compile sooner, and need
    // fewer registers.
    if constexpr (Held) {
      NATTEN_EXT_UNROLL
      for (int k = 0; k < LeftRows<M, Dim>::kSteps; ++k) step(k);
    } else {
      NATTEN_EXT_UNROLL_BY(8 / sizeof(Element))
      for (int k = 0; k < LeftRows<M, Dim>::kSteps; ++k) step(k);
    }
    if constexpr (M::kSplit) {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 8; ++i) c[i / 4][i % 4] += small[i / 4][i % 4];
      if (!careful) return;
      const auto finite = [](Real sum) { return sum * 0 == 0; };
      bool all = true;
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 8; ++i) all = all && finite(c[i / 4][i % 4]);
      if (!any_in_warp(!all)) return;
      ordinary_scores<M, Dim>(ordinary, left, staged, unit);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 8; ++i) {
        Real& sum = c[i / 4][i % 4];
        if (!finite(sum)) sum = ordinary[i / 4][i % 4];
      }
    }
  }
}

// Weights as the matrix units take them: a left operand 16 deep in half precision, and of block b, 8 deep, in TF32. There
// the depth of a product may be in any order: t stands for column 2t, and t + 4 for 2t + 1.
template <class Element>
NATTEN_EXT_DEVICE void pack_weights(uint32_t (&a)[4], const Scores<float>& weights) {
  NATTEN_EXT_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = pack<Element>(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
}
template <class M>
NATTEN_EXT_DEVICE void weights_of_block(uint32_t (&a)[M::kParts][4], const Scores<float>& weights, int b) {
  NATTEN_EXT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int e = i % 2 * 2 + i / 2;
    a[0][i] = bits_of(b ? weights[1][e] : weights[0][e]);
  }
  make_operands<M>(a);
}

// `value` as an operand of a product.
template <class M>
NATTEN_EXT_DEVICE typename M::Real as_operand(typename M::Real value) {
  using Element = typename M::Element;
  if constexpr (M::kTensor && !M::kSplit && sizeof(Element) == 4) return from_bits(round_to_tf32(bits_of(value)));
  else return widen(narrow<Element>(value));
}

// `accumulate` in ordinary arithmetic, which leaves out what is masked: zero times NaN is NaN.
template <class M, int Dim, int Channels>
NATTEN_EXT_DEVICE void accumulate_valid(typename M::Real (&acc)[Channels / 8][4], const Scores<typename M::Real>& weights,
                                        Shared staged, const Unit& unit) {
  using Element = typename M::Element;
  using Real = typename M::Real;
  struct alignas(2 * sizeof(Element)) Pair {
    Element e[2];
  };
  [[maybe_unused]] constexpr int kColumns = M::kTensor ? 1 : 4;  // at a time: where it is the exception, code is kept small
  const int lane = thread_index() % kWarp;
  NATTEN_EXT_NO_UNROLL
  for (int t = 0; t < 4; ++t) {  // the lane of the four that has columns 2t and 2t + 1
    NATTEN_EXT_UNROLL_BY(kColumns)
    for (int j = 0; j < 4; ++j) {
      const int b = j / 2, e = j % 2;
      Real weight[2];
      bool valid[2];
      NATTEN_EXT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Real even = b ? weights[1][2 * h] : weights[0][2 * h], odd = b ? weights[1][2 * h + 1] : weights[0][2 * h + 1];
        weight[h] = shuffle(e ? odd : even, lane / 4 * 4 + t);
        valid[h] = !is_negative_zero(weight[h]);
        weight[h] = as_operand<M>(weight[h]);
      }
      const Shared row = staged + unit.slot_of(b, 2 * t + e) * kPitch<M, Dim> + lane % 4 * static_cast<uint32_t>(sizeof(Pair));
      NATTEN_EXT_UNROLL
      for (int n = 0; n < Channels / 8; ++n) {
        const Pair other = load_shared<Pair>(row + 8 * n * static_cast<uint32_t>(sizeof(Element)));
        NATTEN_EXT_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (valid[i / 2]) acc[n][i] = fused_multiply_add(weight[i / 2], widen(other.e[i % 2]), acc[n][i]);
        }
      }
    }
  }
}

// `staged` points at the first channel of the Channels that `acc` holds. `careful`: see `with_care`.
template <class M, int Dim, int Channels>
NATTEN_EXT_DEVICE void accumulate(typename M::Real (&acc)[Channels / 8][4], const Scores<typename M::Real>& weights, Shared staged,
                                  const Unit& unit, bool careful) {
  using Element = typename M::Element;
  if (!M::kTensor || careful) return accumulate_valid<M, Dim, Channels>(acc, weights, staged, unit);
  const int lane = thread_index() % kWarp;
  if constexpr (M::kTensor && sizeof(Element) == 2) {
    uint32_t a[4];
    pack_weights<Element>(a, weights);
    const Shared row = staged + unit.slot_of(lane / 8 % 2, lane % 8) * kPitch<M, Dim> + lane / 16 * 16;
    NATTEN_EXT_UNROLL
    for (int n = 0; n < Channels / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, row + 32 * n);
      multiply<Element>(acc[2 * n], a, b[0], b[1]);
      multiply<Element>(acc[2 * n + 1], a, b[2], b[3]);
    }
    if constexpr (Channels == 8) {
      uint32_t b[2];
      load_matrices_transposed(b, row);
      multiply<Element>(acc[0], a, b[0], b[1]);
    }
  } else if constexpr (M::kTensor) {
    NATTEN_EXT_NO_UNROLL
    for (int b = 0; b < 2; ++b) {
      uint32_t a[M::kParts][4];
      weights_of_block<M>(a, weights, b);
      const uint32_t channel = lane / 4 * 4;
      const Shared even = staged + unit.slot_of(b, lane % 4 * 2) * kPitch<M, Dim> + channel;
      const Shared odd = staged + unit.slot_of(b, lane % 4 * 2 + 1) * kPitch<M, Dim> + channel;
      NATTEN_EXT_UNROLL
      for (int n = 0; n < Channels / 8; ++n) {
        uint32_t other[M::kParts][2];
        other[0][0] = load_shared<uint32_t>(even + 32 * n);
        other[0][1] = load_shared<uint32_t>(odd + 32 * n);
        make_operands<M>(other);
        if constexpr (M::kSplit) {
          // The units truncate: over thousands of keys that would add up.
          float sum[4] = {0, 0, 0, 0};
          multiply_parts<M>(sum, sum, a, other, 0);
          NATTEN_EXT_UNROLL
          for (int i = 0; i < 4; ++i) acc[n][i] += sum[i];
        } else {
          multiply_parts<M>(acc[n], acc[n], a, other, 0);
        }
      }
    }
  }
}

// Sums of the own rows' weights, rounded as in `accumulate`: on the matrix units a product with ones, but for split weights.
template <class M>
struct WeightSums {
  using Real = typename M::Real;
  static constexpr bool kOrdinary = !M::kTensor || M::kSplit;
  Real sum[2] = {0, 0};

  NATTEN_EXT_DEVICE void add(const Scores<Real>& weights) {
    using Element = typename M::Element;
    Real c[4] = {0, 0, 0, 0};
    if constexpr (M::kTensor && sizeof(Element) == 2) {
      uint32_t a[4];
      pack_weights<Element>(a, weights);
      const uint32_t ones = pack<Element>(1, 1);
      multiply<Element>(c, a, ones, ones);
    } else if constexpr (!kOrdinary) {
      NATTEN_EXT_UNROLL
      for (int b = 0; b < 2; ++b) {
        uint32_t a[1][4];
        weights_of_block<M>(a, weights, b);
        multiply<Element>(c, a[0], bits_of(1), bits_of(1));
      }
    } else {
      NATTEN_EXT_UNROLL
      for (int i = 0; i < 8; ++i) c[i % 4 / 2 * 2] += weights[i / 4][i % 4];
    }
    sum[0] += c[0];
    sum[1] += c[2];
  }
  // Once all are added: of the lane's own row h.
  NATTEN_EXT_DEVICE Real operator[](int h) const {
    Real total = sum[h];
    if constexpr (kOrdinary) {
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
    }
    return total;
  }
};

// 16 rows as a unit; `slots` as for LeftRows. Rows 0 to 7 are adjacent, and so are 8 to 15.
template <class Slots>
NATTEN_EXT_DEVICE Unit unit_of_rows(const Slots& slots) {
  Unit unit{};
  unit.slot[0] = slots.slot_of(0), unit.slot[1] = slots.slot_of(8);
  unit.last_slot = slots.slot_of(15);
  return unit;
}

// Dot products a_r . b_r of 16 rows of two tensors, to the bit those that `scores` has for them; a lane gets rows g and
// g + 8.
template <class M, int Dim, class Slots>
NATTEN_EXT_DEVICE void row_products(typename M::Real (&products)[2], Shared a, Shared b, const Slots& slots) {
  using Real = typename M::Real;
  const int lane = thread_index() % kWarp;
  if constexpr (M::kTensor) {
    Scores<Real> c;
    clear(c);
    scores<M, Dim>(c, LeftRows<M, Dim>(a, slots), b, unit_of_rows(slots), true);
    const int g = lane / 4;  // row g of the diagonal has column g, that of lane g / 2 of the four
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) products[h] = shuffle(g % 2 ? c[h][2 * h + 1] : c[h][2 * h], 4 * g + g / 2);
  } else {
    constexpr int kChunk = 16 / sizeof(Real);
    struct alignas(16) Chunk {
      Real e[kChunk];
    };
    const uint32_t row = slots.slot_of(lane % kWarpRows) * kPitch<M, Dim>;
    Real sum = 0;
    NATTEN_EXT_NO_UNROLL
    for (int channel = 0; channel < Dim; channel += kChunk) {
      const uint32_t at = row + channel * static_cast<uint32_t>(sizeof(Real));
      const Chunk left = load_shared<Chunk>(a + at), right = load_shared<Chunk>(b + at);
      NATTEN_EXT_UNROLL
      for (int i = 0; i < kChunk; ++i) sum = fused_multiply_add(left.e[i], right.e[i], sum);
    }
    NATTEN_EXT_UNROLL
    for (int h = 0; h < 2; ++h) products[h] = shuffle(sum, lane / 4 + 8 * h);
  }
}

}  // namespace natten_ext::cuda
