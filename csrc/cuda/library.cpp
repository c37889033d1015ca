// The `cuda` backend as torch sees it: the operators, and the way from their arguments to launches. The emulator's
// library is this file too, on CPU tensors and with a few operators of its own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <vector>

#include "../operators.h"
#include "entry.h"

namespace natten_ext::cuda {
namespace {

// The last row of a sequence's map may be short: see params.h.
Map sequence_map(int64_t tokens) {
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

Rows rows_of(const View& v, const Axes& axes, bool sequence) {
  const auto [z, y, x] = axes(v.z, v.y, v.x);
  return {v.data, v.batch, z, sequence ? x * kBlock : y, x, v.head};
}

Table table_of(const View& v, const Axes& axes) {
  const auto [z, y, x] = axes(v.z, v.y, v.x);
  return {v.data, v.head, z, y, x, v.dtype == DType::float32};
}

// Windows of a head, as far as there are any.
HeadWindow window_of(const Problem& p, int64_t head, const Axes& axes) {
  HeadWindow w{};
  if (p.kind == Kind::grid) w = {{p.window_z, 1, p.window_z}, {p.window_y, 1, p.window_y}, {p.window_x, 1, p.window_x}};
  if (p.kind == Kind::neighborhood) w = p.windows[head];
  const auto [z, y, x] = axes(w.z, w.y, w.x);
  return {z, y, x};
}

// Whether a problem is one for the general kernels. So are lines, for their tiles, and maps whose sizes the others can't hold.
bool is_general(const Problem& p) {
  if (p.kind == Kind::full) return false;
  const auto [depth, height, width] = Axes(p)(p.depth, p.height, p.width);
  return p.general() || height == 1 || height > UINT16_MAX || width > UINT16_MAX;
}

int element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The widest access that the address, the strides and the length of every row allow.
int vector_bytes(const Problem& p, std::initializer_list<const View*> views) {
  int64_t all = 16;
  for (const View* v : views) {
    if (!*v) continue;
    const int64_t size = element_size(v->dtype);
    all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(v->data)) | p.head_dim * size;
    for (const int64_t stride : {v->batch, v->z, v->y, v->x, v->head}) all |= stride * size;
  }
  return static_cast<int>(all & -all);
}

Context context_of(const Tensor& like);
void note_workspace(Context& context, void* data, size_t bytes);

template <bool General>
struct Launcher {
  Params params{};
  std::vector<WindowOf<General>> windows;
  Context context;
  std::vector<Tensor> workspace;
  Tensor like;  // where workspace is allocated

  Launcher(const Arguments& a, const Tensor& like) : like(like) {
    const Problem& p = a.problem;
    const bool sequence = p.kind == Kind::full;
    const Axes axes(p);
    params.kind = p.kind;
    params.batch = static_cast<int>(p.batch);
    params.heads = static_cast<int>(p.heads);
    params.head_dim = static_cast<int>(p.head_dim);
    params.l2 = p.l2;
    params.scale = p.dot_scale();
    require(p.batch <= INT32_MAX && p.heads <= INT32_MAX, "batch and heads must be less than 2^31");
    if (sequence) {
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
    context = context_of(like);
    context.allocate = [this](size_t bytes) { return allocate(bytes); };
    note_memory(a);
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

  void* allocate(size_t bytes) {
    const auto byte = torch::headeronly::ScalarType::Byte;
    workspace.push_back(new_result(like, {static_cast<int64_t>(bytes)}, byte));
    void* data = workspace.back().mutable_data_ptr();
    note_workspace(context, data, bytes);
    return data;
  }

  template <class Real>
  void allocate_row_numbers(size_t count) {
    params.row_numbers = allocate(count * sizeof(Real) * params.batch * params.heads * params.queries.count);
  }

  void note_memory(const Arguments& a);
};

#if defined(NATTEN_EXT_EMULATOR)

// What the largest consumer GPUs give a block, so that tests see the smallest pieces; or what tests ask for.
int emulated_shared_limit = 99 * 1024, emulated_table_blocks = kTableBlocks;

Context context_of(const Tensor&) { return {emulated_shared_limit, emulated_table_blocks, nullptr, {}, {}}; }

int shared_limit_of(int64_t) { return emulated_shared_limit; }

void note_workspace(Context& context, void* data, size_t bytes) {
  std::memset(data, 0xff, bytes);
  context.memory.push_back({data, bytes, true});
}

template <bool General>
void Launcher<General>::note_memory(const Arguments& a) {
  const Problem& p = a.problem;
  const auto note = [&](const View& v, bool written, int64_t width) {
    if (!v) return;
    const int64_t last = (p.batch - 1) * v.batch + (p.depth - 1) * v.z + (p.height - 1) * v.y + (width - 1) * v.x +
                         (p.heads - 1) * v.head;
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

bool on_device(const Tensor& t) { return t.is_cpu(); }
void poison(Tensor& t) { std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size()); }
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
};

#else

int shared_limit_of(int64_t device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device)),
        "shared memory of the GPU");
  return limit;
}

Context context_of(const Tensor& like) {
  const int device = like.get_device_index();
  const int limit = shared_limit_of(device);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("natten_ext: torch gave no current CUDA stream");
  }
  return {limit, kTableBlocks, stream, {}};
}

void note_workspace(Context&, void*, size_t) {}
template <bool General>
void Launcher<General>::note_memory(const Arguments&) {}

bool on_device(const Tensor& t) { return t.is_cuda(); }
void poison(Tensor&) {}
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceScope(const Tensor& t) : guard(t.get_device_index()) {}
};

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

// Bytes of shared memory that blocks of all orders need at least for heads of a dtype, and those that a GPU gives.
std::tuple<int64_t, int64_t> shared_memory(std::string dtype, int64_t head_dim, int64_t device) {
  const int dim = static_cast<int>(head_dim);
  const DType type = dtype == "float16" ? DType::float16 : dtype == "bfloat16" ? DType::bfloat16
                     : dtype == "float32" ? DType::float32 : DType::float64;
  int64_t needed = 0;
  with_mode(type, false, [&]<class M>() {  // TF32 pads to no more channels
    needed = std::max({forward_shared<M, false>(dim), backward_shared<M, false>(dim), double_backward_shared<M, false>(dim),
                       forward_shared<M, true>(dim), backward_shared<M, true>(dim), double_backward_shared<M, true>(dim)});
  });
  return {needed, shared_limit_of(device)};
}

struct CudaBackend {
  const DeviceScope scope;
  const Tensor like;
  const bool tf32;
  const char* device =
#if defined(NATTEN_EXT_EMULATOR)
      "the CPU, where CUDA is emulated";
#else
      "a CUDA device";
#endif

  CudaBackend(const Tensor& query, bool tf32) : scope(query), like(query), tf32(tf32) {}

  bool holds(const Tensor& t) const { return on_device(t) && t.get_device_index() == like.get_device_index(); }
  void allocated(Tensor& t) const { poison(t); }

  void forward(const Arguments& a) const {
    launch(a, [&]<class M, bool General>(Launcher<General>& l) { cuda::forward<M, General>(l.params, l.windows, l.context); });
  }

  void backward(const Arguments& a) const {
    launch(a, [&]<class M, bool General>(Launcher<General>& l) {
      l.template allocate_row_numbers<typename M::Real>(4);
      cuda::backward_query<M, General>(l.params, l.windows, l.context);
      if (a.grad_key || a.grad_value) cuda::backward_key<M, General>(l.params, l.windows, l.context);
    });
  }

  void double_backward(const Arguments& a) const {
    launch(a, [&]<class M, bool General>(Launcher<General>& l) {
      l.template allocate_row_numbers<typename M::Real>(8);
      cuda::double_backward_query<M, General>(l.params, l.windows, l.context);
      if (a.grad_key || a.grad_value) cuda::double_backward_key<M, General>(l.params, l.windows, l.context);
    });
  }

 private:
  // Calls `run.template operator()<Mode, General>(launcher)`.
  template <class Run>
  void launch(const Arguments& a, Run run) const {
    const auto launch_kernels = [&]<bool General>() {
      Launcher<General> launcher(a, like);
      with_mode(a.query.dtype, tf32, [&]<class M>() { run.template operator()<M, General>(launcher); });
    };
    if (is_general(a.problem)) launch_kernels.template operator()<true>();
    else launch_kernels.template operator()<false>();
  }
};

#if defined(NATTEN_EXT_EMULATOR)
void configure(int64_t order, std::string dropped_site, int64_t shared_limit, int64_t table_blocks) {
  emulator::configure(static_cast<int>(order), dropped_site);
  emulated_shared_limit = static_cast<int>(shared_limit);
  emulated_table_blocks = static_cast<int>(table_blocks);
}
std::string sites() { return emulator::sites(); }
#endif

}  // namespace
}  // namespace natten_ext::cuda

STABLE_TORCH_LIBRARY(natten_ext_cuda, m) {
  m.def("shared_memory(str dtype, int head_dim, int device) -> (int, int)");
#if defined(NATTEN_EXT_EMULATOR)
  m.def("configure(int order, str dropped_site, int shared_limit, int table_blocks) -> ()");
  m.def("sites() -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(natten_ext_cuda, CompositeExplicitAutograd, m) {
  m.impl("shared_memory", TORCH_BOX(&natten_ext::cuda::shared_memory));
  natten_ext::Operators<natten_ext::cuda::CudaBackend, bool>::implement(m, "_kernels");
#if defined(NATTEN_EXT_EMULATOR)
  m.impl("configure", TORCH_BOX(&natten_ext::cuda::configure));
  m.impl("sites", TORCH_BOX(&natten_ext::cuda::sites));
#endif
}
