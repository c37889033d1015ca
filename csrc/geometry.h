// Which keys a query attends: the kinds of neighborhood, and the rule on one axis. The one C++ definition, shared by every
// compiled backend.
// The Python twin is natten_ext/geometry.py; tests/operators holds the two together.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NATTEN_EXT_HOST_DEVICE __host__ __device__
#else
#define NATTEN_EXT_HOST_DEVICE
#endif

namespace natten_ext {

// Leading code of the integer list that natten_ext.geometry encodes.
enum class Kind { full = 0, grid = 1, neighborhood = 2 };

// Number of positions of an axis in one residue class modulo the dilation.
NATTEN_EXT_HOST_DEVICE inline int64_t class_length(int64_t length, int64_t dilation, int64_t residue) {
  return (length - residue + dilation - 1) / dilation;
}

// First key of the window of the query at `position`, both counted inside a residue class: centred on the
// query (for even kernels one key more on the left) and shifted inward at the borders.
template <class Int>
NATTEN_EXT_HOST_DEVICE inline Int class_window_start(Int position, Int class_length, Int kernel) {
  Int start = position - kernel / 2;
  const Int last = class_length - kernel;
  start = start < 0 ? 0 : start;
  return start > last ? last : start;
}

// The same in positions of the axis.
NATTEN_EXT_HOST_DEVICE inline int64_t window_start(int64_t index, int64_t length, int64_t kernel, int64_t dilation) {
  const int64_t residue = index % dilation;
  const int64_t start = class_window_start(index / dilation, class_length(length, dilation, residue), kernel);
  return start * dilation + residue;
}

}  // namespace natten_ext
