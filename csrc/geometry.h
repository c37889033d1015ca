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

// Window of a head on one axis. Adjacent queries of a residue class modulo the dilation, `stride` of them, share the
// window of their leader.
struct AxisWindow {
  int64_t kernel = 1, dilation = 1, stride = 1;
  bool causal = false;

  bool operator==(const AxisWindow&) const = default;
  // Whether it moves with every query and has as many keys everywhere.
  bool sliding() const { return stride == 1 && !causal; }
};

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

// Keys of a query on one axis, [start, end), counted inside a residue class.
template <class Int>
struct ClassKeys {
  Int start, end;
};

// Those of the query at `position`. A window is that of the leader of its group: the middle query (of an even number the
// right one of two), or the last one where windows are causal; these end with the query itself.
template <class Int>
NATTEN_EXT_HOST_DEVICE inline ClassKeys<Int> class_keys(Int position, Int class_length, Int kernel, Int stride, bool causal) {
  const Int group = position / stride * stride, last = class_length - 1;
  Int leader = group + (causal ? stride - 1 : stride / 2);
  leader = leader > last ? last : leader;
  if (causal) return {leader < kernel ? 0 : leader - kernel + 1, position + 1};
  const Int start = class_window_start(leader, class_length, kernel);
  return {start, start + kernel};
}

// The same in positions of the axis; keys are `dilation` apart.
NATTEN_EXT_HOST_DEVICE inline ClassKeys<int64_t> axis_keys(int64_t index, int64_t length, const AxisWindow& w) {
  const int64_t residue = index % w.dilation;
  const ClassKeys<int64_t> keys =
      class_keys(index / w.dilation, class_length(length, w.dilation, residue), w.kernel, w.stride, w.causal);
  return {keys.start * w.dilation + residue, keys.end * w.dilation + residue};
}

}  // namespace natten_ext
