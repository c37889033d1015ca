// One call of an operator: what operators.h hands to the kernels of a backend.
#pragma once

#include <cstdint>

#include "problem.h"

namespace natten_ext {

enum class DType { float32, float64, bfloat16, float16 };

// A tensor (batch, z, y, x, head, channel) of any strides but contiguous channels; a table (head, z, y, x) uses the
// same names with x as its channel. Strides count elements. No data: absent, or not asked for.
struct View {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch = 0, z = 0, y = 0, x = 0, head = 0;
  bool of_keys = false;  // whether its heads are those of keys and values, which several query heads may share
  explicit operator bool() const { return data != nullptr; }
};

// Operands of all three orders; each order reads and writes its own share.
struct Arguments {
  Problem problem;
  View query, key, value, bias;
  View output;  // written by forward, read by the others
  // (2, batch, heads, queries), contiguous, in the compute type; likewise. In base 2, first the score from which a row's
  // weights are counted (about its largest), then the logarithm of their sum.
  void* lse;
  // (batch, heads, queries), contiguous, in the compute type; no channels: x steps from query to query. In natural units.
  View natural_lse;  // written by forward: the log-sum-exp of the true scores (l2: of -s|q-k|^2)
  View grad_lse;     // its gradient
  View grad_output;
  View cot_query, cot_key, cot_value, cot_bias;  // cotangents of the first gradients
  View grad_grad_lse;  // as grad_lse: the derivative of natural_lse along the cotangents
  View grad_grad_output, grad_query, grad_key, grad_value, grad_bias;
};

}  // namespace natten_ext
