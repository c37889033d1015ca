// Where the rows of a tensor lie, so that kernels can compute about that place rather than about zero.
//
// A vector subtracted from all keys of a (batch, head) adds a constant to each row of scores, which softmax removes; one
// subtracted from queries and keys changes no distance (l2); one subtracted from all values adds a constant to each row
// of dP, which dP - D removes. So all passes work on k - m (l2: and on q - m), and the backward orders on v - m: sums
// whose terms cancel then round as if the tensors lay about zero.
#pragma once

#include "rows.h"

namespace natten_ext::NATTEN_EXT_ISA {

// The median, per channel, of what three times three rows spread over a (batch, head) have for medians: a few rows that
// lie far from the rest, or hold NaN or infinity, do not move it away. natten_ext/backends/origin.py does the
// same for the other backends, with the median of nine rows.
template <class T>
class Origin {
 public:
  // Of the keys or the values of some of their heads.
  Origin(const View& view, const Problem& p, HeadRange heads)
      : view_(view),
        heads_(heads),
        tokens_(p.depth * p.height * p.key_width),
        height_(p.height),
        width_(p.key_width),
        channels_(p.head_dim),
        padded_(round_up_to_lanes<T>(channels_)),
        vectors_(heads.count() * padded_),
        batch_(heads.count()),
        samples_(kSamples * padded_) {
    std::fill_n(batch_.data(), heads.count(), int64_t(-1));
    std::fill_n(samples_.data(), kSamples * padded_, T(0));
  }

  // The vector [padded channels], kept for the jobs that follow.
  const T* at(int64_t batch, int64_t head) {
    T* vector = vectors_ + (head - heads_.first) * padded_;
    if (batch_[head - heads_.first] != batch) find(vector, batch, head);
    batch_[head - heads_.first] = batch;
    return vector;
  }

 private:
  static constexpr int64_t kSamples = 9;

  void find(T* vector, int64_t batch, int64_t head) {
    for (int64_t i = 0; i < kSamples; ++i) {
      const int64_t token = (2 * i + 1) * tokens_ / (2 * kSamples);
      const int64_t z = token / width_ / height_, y = token / width_ % height_, x = token % width_;
      const int64_t row = batch * view_.batch + head * view_.head + z * view_.z + y * view_.y + x * view_.x;
      load_row<T>(samples_ + i * padded_, view_, row, channels_, 1);
    }
    for (int64_t c = 0; c < padded_; c += kLanes<T>) {
      const auto sample = [&](int64_t i) { return load(samples_ + i * padded_ + c); };
      const Vector<T> middle = median(median(sample(0), sample(1), sample(2)), median(sample(3), sample(4), sample(5)),
                                      median(sample(6), sample(7), sample(8)));
      const Vector<T> size = maximum<T>(middle, -middle);
      store(vector + c, size < kLarge<T> ? middle : Vector<T>{});
    }
  }
  // Of three values, or of those that are numbers.
  static Vector<T> median(Vector<T> a, Vector<T> b, Vector<T> c) {
    const Vector<T> low = minimum<T>(a, b), middle = maximum<T>(low, minimum<T>(maximum<T>(a, b), c));
    return middle == middle ? middle : low;
  }

  const View view_;
  const HeadRange heads_;
  const int64_t tokens_, height_, width_, channels_, padded_;
  Buffer<T> vectors_;
  Buffer<int64_t> batch_;
  Buffer<T> samples_;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
