// From the arguments of an operator to the launches of its kernels, on the host. Knows nothing of torch: library.cpp calls
// this with torch's tensors, benchmarks/gpu/every_kernel.cpp without.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../arguments.h"
#include "entry.h"

namespace natten_ext::cuda {

// The last row of a sequence's map may be short: see params.h.
inline Map sequence_map(int64_t tokens) {
  require(tokens <= INT32_MAX - kBlock, "a sequence may have at most 2^31 - 9 tokens");
  return {1, static_cast<int>((tokens + kBlock - 1) / kBlock), kBlock, static_cast<int>(tokens)};
}

// The map axes as kernels see them: those of length 1 come first, so that a line is one wherever it lies.
class Axes {
 public:
  explicit Axes(const Problem& p) {
    const int64_t lengths[3] = {p.depth, p.height, p.width};
    std::stable_partition(order_.begin(), order_.end(), [&](int axis) { return lengths[axis] == 1; });
  }
  template <class T>
  std::array<T, 3> operator()(const T& z, const T& y, const T& x) const {
    const T* given[3] = {&z, &y, &x};
    return {*given[order_[0]], *given[order_[1]], *given[order_[2]]};
  }

 private:
  std::array<int, 3> order_{0, 1, 2};
};

inline Rows rows_of(const View& v, const Axes& axes, bool sequence) {
  const auto [z, y, x] = axes(v.z, v.y, v.x);
  return {v.data, v.batch, z, sequence ? x * kBlock : y, x, v.head};
}

inline Table table_of(const View& v, const Axes& axes) {
  const auto [z, y, x] = axes(v.z, v.y, v.x);
  return {v.data, v.head, z, y, x, v.dtype == DType::float32};
}

// Windows of a head, as far as there are any.
inline HeadWindow window_of(const Problem& p, int64_t head, const Axes& axes) {
  HeadWindow w{};
  if (p.kind == Kind::grid) w = {{p.window_z, 1, p.window_z}, {p.window_y, 1, p.window_y}, {p.window_x, 1, p.window_x}};
  if (p.kind == Kind::neighborhood) w = p.windows[head];
  const auto [z, y, x] = axes(w.z, w.y, w.x);
  return {z, y, x};
}

// Whether a problem is one for the general kernels. So are lines, for their tiles, heads that share key heads, and maps whose
// sizes the others can't hold.
inline bool is_general(const Problem& p) {
  if (p.kind == Kind::full) return false;
  const auto [depth, height, width] = Axes(p)(p.depth, p.height, p.width);
  return p.general() || p.shared() > 1 || height == 1 || height > UINT16_MAX || width > UINT16_MAX;
}

inline int element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The widest access that the address, the strides and the length of every row allow.
inline int vector_bytes(const Problem& p, std::initializer_list<const View*> views) {
  int64_t all = 16;
  for (const View* v : views) {
    if (!*v) continue;
    const int64_t size = element_size(v->dtype);
    all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(v->data)) | p.head_dim * size;
    for (const int64_t stride : {v->batch, v->z, v->y, v->x, v->head}) all |= stride * size;
  }
  return static_cast<int>(all & -all);
}

// A problem as kernels are given it.
template <bool General>
struct KernelArguments {
  Params params{};
  std::vector<WindowOf<General>> windows;

  explicit KernelArguments(const Arguments& a) {
    const Problem& p = a.problem;
    const bool sequence = p.kind == Kind::full;
    const Axes axes(p);
    params.kind = p.kind;
    params.batch = static_cast<int>(p.batch);
    params.heads = static_cast<int>(p.heads);
    params.sharing = static_cast<int>(p.shared());
    params.head_dim = static_cast<int>(p.head_dim);
    params.l2 = p.l2;
    params.scale = p.dot_scale();
    require(p.batch <= INT32_MAX && p.heads <= INT32_MAX, "batch and heads must be less than 2^31");
    if (sequence) {
      require(p.shared() == 1, "full attention needs a head of keys for every head");
      params.queries = sequence_map(p.width);
      params.keys = sequence_map(p.key_width);
    } else {
      require(p.queries() <= INT32_MAX, "a map may have at most 2^31 - 1 positions");
      const auto [depth, height, width] = axes(p.depth, p.height, p.width);
      params.queries = params.keys = {static_cast<int>(depth), static_cast<int>(height), static_cast<int>(width),
                                      static_cast<int>(p.queries())};
    }
    for (int64_t head = 0; head < p.heads; ++head) windows.push_back(window(window_of(p, head, axes)));
    if (a.bias || a.cot_bias) {
      const auto [planes, rows, columns] = axes(p.table_depth(), p.table_height(), p.table_width());
      params.table_planes = static_cast<int>(planes);
      params.table_rows = static_cast<int>(rows);
      params.table_columns = static_cast<int>(columns);
    }
    const auto rows = [&](const View& v) { return rows_of(v, axes, sequence); };
    const auto table_of = [&](const View& v) { return cuda::table_of(v, axes); };
    params.query = rows(a.query), params.key = rows(a.key), params.value = rows(a.value);
    params.output = rows(a.output), params.grad_output = rows(a.grad_output);
    params.cot_query = rows(a.cot_query), params.cot_key = rows(a.cot_key), params.cot_value = rows(a.cot_value);
    params.grad_query = rows(a.grad_query), params.grad_key = rows(a.grad_key), params.grad_value = rows(a.grad_value);
    params.grad_grad_output = rows(a.grad_grad_output);
    params.bias = table_of(a.bias), params.cot_bias = table_of(a.cot_bias), params.grad_bias = table_of(a.grad_bias);
    params.table_gradient = static_cast<bool>(a.grad_bias);
    params.tangents_only = !a.grad_query && !a.grad_key && !a.grad_value && !a.grad_bias;
    const size_t real = a.query.dtype == DType::float64 ? 8 : 4;
    params.base = a.lse;
    params.log_sum = static_cast<char*>(a.lse) + p.rows() * real;
    params.natural_lse = a.natural_lse.data;
    params.grad_lse = a.grad_lse.data, params.grad_grad_lse = a.grad_grad_lse.data;
    params.vector_bytes = vector_bytes(p, {&a.query, &a.key, &a.value, &a.output, &a.grad_output, &a.cot_query,
                                           &a.cot_key, &a.cot_value});
    params.output_vector_bytes =
        vector_bytes(p, {&a.output, &a.grad_query, &a.grad_key, &a.grad_value, &a.grad_grad_output});
  }

  static WindowOf<General> window(const HeadWindow& w) {
    const auto number = [](int64_t size) { return static_cast<decltype(WindowOf<General>::kernel_y)>(size); };
    if constexpr (General) {
      return {number(w.z.kernel), number(w.y.kernel), number(w.x.kernel),
              number(w.z.dilation), number(w.y.dilation), number(w.x.dilation),
              number(w.z.stride), number(w.y.stride), number(w.x.stride), w.z.causal, w.y.causal, w.x.causal};
    } else {
      return {number(w.y.kernel), number(w.x.kernel), number(w.y.dilation), number(w.x.dilation)};
    }
  }
};

#if defined(NATTEN_EXT_EMULATOR)
// What kernels may touch.
inline void note_memory(Context& context, const Arguments& a) {
  const Problem& p = a.problem;
  const auto note = [&](const View& v, bool written, int64_t width) {
    if (!v) return;
    const int64_t last = (p.batch - 1) * v.batch + (p.depth - 1) * v.z + (p.height - 1) * v.y + (width - 1) * v.x +
                         ((v.of_keys ? p.key_heads : p.heads) - 1) * v.head;
    context.memory.push_back({v.data, static_cast<size_t>((last + p.head_dim) * element_size(v.dtype)), written});
  };
  const auto note_table = [&](const View& v, bool written) {
    if (!v) return;
    const int64_t last = (p.heads - 1) * v.head + (p.table_depth() - 1) * v.z + (p.table_height() - 1) * v.y +
                         (p.table_width() - 1) * v.x;
    context.memory.push_back({v.data, static_cast<size_t>((last + 1) * element_size(v.dtype)), written});
  };
  for (const View* v : {&a.query, &a.grad_output, &a.cot_query}) note(*v, false, p.width);
  for (const View* v : {&a.key, &a.value, &a.cot_key, &a.cot_value}) note(*v, false, p.key_width);
  for (const View* v : {&a.output, &a.grad_query, &a.grad_grad_output}) note(*v, true, p.width);
  for (const View* v : {&a.grad_key, &a.grad_value}) note(*v, true, p.key_width);
  for (const View* v : {&a.bias, &a.cot_bias}) note_table(*v, false);
  note_table(a.grad_bias, true);
  const size_t real = a.query.dtype == DType::float64 ? 8 : 4;
  const size_t numbers = static_cast<size_t>(p.rows()) * real;
  context.memory.push_back({a.lse, 2 * numbers, true});
  for (const View* v : {&a.natural_lse, &a.grad_lse, &a.grad_grad_lse}) {
    if (*v) context.memory.push_back({v->data, numbers, v != &a.grad_lse});
  }
}
#endif

// Calls `run.template operator()<Mode>()` for what the arguments compute in.
template <class Run>
void with_mode(DType dtype, bool tf32, Run run) {
  switch (dtype) {
    case DType::float16: return run.template operator()<HalfMode>();
    case DType::bfloat16: return run.template operator()<BfloatMode>();
    case DType::float32: return tf32 ? run.template operator()<Tf32Mode>() : run.template operator()<FloatMode>();
    case DType::float64: return run.template operator()<DoubleMode>();
  }
}

// Bytes of shared memory that blocks of all orders need at least for heads of a dtype.
inline uint32_t least_shared_memory(DType dtype, int head_dim) {
  uint32_t needed = 0;
  with_mode(dtype, false, [&]<class M>() {  // TF32 pads to no more channels
    needed = std::max({forward_shared<M, false>(head_dim), backward_shared<M, false>(head_dim), double_backward_shared<M, false>(head_dim),
                       forward_shared<M, true>(head_dim), backward_shared<M, true>(head_dim), double_backward_shared<M, true>(head_dim)});
  });
  return needed;
}

// Calls `run.template operator()<Mode, General>(params, windows)`, the problem as kernels are given it.
template <class Run>
void launch_kernels(const Arguments& a, bool tf32, [[maybe_unused]] Context& context, Run run) {
#if defined(NATTEN_EXT_EMULATOR)
  note_memory(context, a);
#endif
  const auto launch = [&]<bool General>() {
    KernelArguments<General> k(a);
    with_mode(a.query.dtype, tf32, [&]<class M>() { run.template operator()<M, General>(k.params, k.windows); });
  };
  if (is_general(a.problem)) launch.template operator()<true>();
  else launch.template operator()<false>();
}

// For rows.h.
template <class M>
void* new_row_numbers(const Params& p, int count, Context& context) {
  return context.allocate(count * sizeof(typename M::Real) * p.batch * p.heads * p.queries.count);
}

inline void launch_forward(const Arguments& a, bool tf32, Context& context) {
  launch_kernels(a, tf32, context, [&]<class M, bool General>(const Params& p, const std::vector<WindowOf<General>>& windows) {
    forward<M, General>(p, windows, context);
  });
}

inline void launch_backward(const Arguments& a, bool tf32, Context& context) {
  launch_kernels(a, tf32, context, [&]<class M, bool General>(Params& p, const std::vector<WindowOf<General>>& windows) {
    p.row_numbers = new_row_numbers<M>(p, 4, context);
    backward_query<M, General>(p, windows, context);
    if (a.grad_key || a.grad_value) backward_key<M, General>(p, windows, context);
  });
}

inline void launch_double_backward(const Arguments& a, bool tf32, Context& context) {
  launch_kernels(a, tf32, context, [&]<class M, bool General>(Params& p, const std::vector<WindowOf<General>>& windows) {
    p.row_numbers = new_row_numbers<M>(p, 8, context);
    double_backward_query<M, General>(p, windows, context);
    if (a.grad_key || a.grad_value) double_backward_key<M, General>(p, windows, context);
  });
}

}  // namespace natten_ext::cuda
