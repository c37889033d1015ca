// The `cpu` backend as torch sees it: operators on the stable ABI, which check operands, allocate results, and
// call the kernels of the best instruction set of this machine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace natten_ext {

#define NATTEN_EXT_DECLARE(isa)             \
  namespace isa {                           \
  void forward(const Arguments&);           \
  void backward(const Arguments&);          \
  void double_backward(const Arguments&);   \
  }
NATTEN_EXT_DECLARE(baseline)
#if defined(NATTEN_EXT_X86)
NATTEN_EXT_DECLARE(avx2)
NATTEN_EXT_DECLARE(avx512)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Variant {
  const char* name;
  bool supported;
  Kernels kernels;
};

// Best first. NATTEN_EXT_CPU_ISA takes a lesser one.
std::vector<Variant> variants() {
  std::vector<Variant> result;
#if defined(NATTEN_EXT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  result.push_back({"avx512", avx512, {avx512::forward, avx512::backward, avx512::double_backward}});
  result.push_back({"avx2", avx2, {avx2::forward, avx2::backward, avx2::double_backward}});
#endif
  result.push_back({"baseline", true, {baseline::forward, baseline::backward, baseline::double_backward}});
  return result;
}

const Variant& variant() {
  static const Variant chosen = [] {
    const char* wanted = std::getenv("NATTEN_EXT_CPU_ISA");
    std::string known;
    for (const Variant& v : variants()) {
      if (wanted == nullptr || *wanted == '\0' ? v.supported : wanted == std::string(v.name)) {
        if (!v.supported) throw std::runtime_error(std::string("NATTEN_EXT_CPU_ISA: this machine has no ") + v.name);
        return v;
      }
      known += std::string(known.empty() ? "" : ", ") + v.name;
    }
    throw std::runtime_error(std::string("NATTEN_EXT_CPU_ISA must be one of ") + known + ", got " + wanted);
  }();
  return chosen;
}

void require(bool condition, const std::string& rule) {
  if (!condition) throw std::runtime_error("natten_ext: " + rule);
}

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw std::runtime_error(std::string("natten_ext: ") + name + " must be float32, float64 or bfloat16");
  }
}

std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// A sequence or map; `query` gives the number of dimensions.
View view(const Tensor& t, const char* name) {
  const int64_t n = t.dim();
  require(t.is_cpu(), std::string(name) + " must be on the CPU");
  require(t.size(n - 1) <= 1 || t.stride(n - 1) == 1, std::string(name) + " must have contiguous channels");
  return {t.mutable_data_ptr(), dtype_of(t, name), t.stride(0), n == 5 ? t.stride(1) : 0, t.stride(n - 3), t.stride(n - 2)};
}

View table_view(const std::optional<Tensor>& t, const char* name) {
  if (!t) return {};
  require(t->is_cpu() && t->dim() == 3, std::string(name) + " must be a CPU tensor (heads, rows, columns)");
  return {t->mutable_data_ptr(), dtype_of(*t, name), 0, t->stride(1), t->stride(2), t->stride(0)};
}

// Everything the three orders share. `bias` may be absent.
Arguments arguments(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& neighborhood, bool l2, double scale) {
  const int64_t n = query.dim();
  require(n == 4 || n == 5, "query must have 4 or 5 dimensions");
  require(key.dim() == n && value.dim() == n, "key and value must have the query's dimensions");
  Arguments a{};
  Problem& p = a.problem;
  p.batch = query.size(0);
  p.height = n == 5 ? query.size(1) : 1;
  p.width = query.size(n - 3);
  p.key_width = key.size(n - 3);
  p.heads = query.size(n - 2);
  p.head_dim = query.size(n - 1);
  p.l2 = l2;
  p.scale = scale;
  decode_neighborhood(neighborhood, p);
  std::vector<int64_t> expected = sizes(query);
  require((p.kind == Kind::full) == (n == 4), "full attention takes sequences, the others maps");
  expected[n - 3] = p.key_width;
  require(sizes(key) == expected && sizes(value) == expected, "key and value must match the query");
  require(p.kind == Kind::full || p.key_width == p.width, "key and value must have the query's map");
  require(p.key_width > 0 && p.head_dim >= 1 && p.head_dim <= 256, "there must be a key, and head_dim from 1 to 256");
  a.query = view(query, "query");
  a.key = view(key, "key");
  a.value = view(value, "value");
  require(a.key.dtype == a.query.dtype && a.value.dtype == a.query.dtype, "query, key and value must have one dtype");
  a.bias = table_view(bias, "bias");
  if (bias) {
    require(p.kind != Kind::full, "full attention takes no bias");
    require(sizes(*bias) == std::vector<int64_t>{p.heads, p.table_height(), p.table_width()}, "bias has the wrong shape");
  }
  return a;
}

// A tensor that must look like another, or be absent.
View like(const std::optional<Tensor>& t, const Tensor& other, const char* name) {
  if (!t) return {};
  require(sizes(*t) == sizes(other) && t->scalar_type() == other.scalar_type(),
          std::string(name) + " must have the shape and dtype of its operand");
  return view(*t, name);
}

ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> lse_sizes(const Tensor& query) {
  std::vector<int64_t> s = sizes(query);
  const int64_t heads = s[s.size() - 2];
  s.resize(s.size() - 2);
  s.insert(s.begin() + 1, heads);
  return s;
}

Tensor new_contiguous(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

// An output of the shape and dtype of `operand`, or an empty tensor if it is not needed.
Tensor gradient(bool needed, const std::optional<Tensor>& operand, const Tensor& query) {
  return needed && operand ? new_contiguous(query, sizes(*operand), operand->scalar_type())
                           : new_contiguous(query, {0}, query.scalar_type());
}
View gradient_view(bool needed, const Tensor& t, const char* name) { return needed ? view(t, name) : View{}; }

void set_saved(Arguments& a, const Tensor& query, const Tensor& grad_output, const Tensor& output, const Tensor& lse) {
  a.grad_output = like(grad_output, query, "grad_output");
  a.output = like(output, query, "output");
  require(lse.is_contiguous() && sizes(lse) == lse_sizes(query) && lse.scalar_type() == lse_dtype(query),
          "lse must be contiguous (batch, heads, tokens) in the compute type");
  a.lse = lse.mutable_data_ptr();
}

// Whether there is nothing to attend; results are then zeros.
bool no_queries(const Problem& p) { return p.batch * p.queries() == 0; }

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                   std::vector<int64_t> neighborhood, bool l2, double scale) {
  Arguments a = arguments(query, key, value, bias, neighborhood, l2, scale);
  Tensor output = new_contiguous(query, sizes(query), query.scalar_type());
  Tensor lse = new_contiguous(query, lse_sizes(query), lse_dtype(query));
  a.output = view(output, "output");
  a.lse = lse.mutable_data_ptr();
  if (!no_queries(a.problem)) variant().kernels.forward(a);
  return {output, lse};
}

// `needs`: one bit per gradient, in the order of the results.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                                                    std::optional<Tensor> bias, Tensor output, Tensor lse,
                                                    std::vector<int64_t> neighborhood, bool l2, double scale,
                                                    int64_t needs) {
  Arguments a = arguments(query, key, value, bias, neighborhood, l2, scale);
  set_saved(a, query, grad_output, output, lse);
  const bool need_bias = (needs & 8) && bias;
  Tensor grad_query = gradient(needs & 1, query, query), grad_key = gradient(needs & 2, key, query);
  Tensor grad_value = gradient(needs & 4, value, query), grad_bias = gradient(need_bias, bias, query);
  a.grad_query = gradient_view(needs & 1, grad_query, "grad_query");
  a.grad_key = gradient_view(needs & 2, grad_key, "grad_key");
  a.grad_value = gradient_view(needs & 4, grad_value, "grad_value");
  if (need_bias) a.grad_bias = table_view(grad_bias, "grad_bias");
  if (no_queries(a.problem)) {
    for (Tensor* gradient : {&grad_query, &grad_key, &grad_value, &grad_bias}) torch::stable::zero_(*gradient);
  } else {
    variant().kernels.backward(a);
  }
  return {grad_query, grad_key, grad_value, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    std::optional<Tensor> cot_query, std::optional<Tensor> cot_key, std::optional<Tensor> cot_value,
    std::optional<Tensor> cot_bias, Tensor grad_output, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> bias, Tensor output, Tensor lse, std::vector<int64_t> neighborhood, bool l2, double scale,
    int64_t needs) {
  Arguments a = arguments(query, key, value, bias, neighborhood, l2, scale);
  set_saved(a, query, grad_output, output, lse);
  a.cot_query = like(cot_query, query, "cot_query");
  a.cot_key = like(cot_key, key, "cot_key");
  a.cot_value = like(cot_value, value, "cot_value");
  if (cot_bias) {
    require(bias && sizes(*cot_bias) == sizes(*bias), "cot_bias must have the shape of bias");
    a.cot_bias = table_view(cot_bias, "cot_bias");
  }
  const bool need_bias = (needs & 16) && bias;
  Tensor grad_grad_output = gradient(needs & 1, grad_output, query), grad_query = gradient(needs & 2, query, query);
  Tensor grad_key = gradient(needs & 4, key, query), grad_value = gradient(needs & 8, value, query);
  Tensor grad_bias = gradient(need_bias, bias, query);
  a.grad_grad_output = gradient_view(needs & 1, grad_grad_output, "grad_grad_output");
  a.grad_query = gradient_view(needs & 2, grad_query, "grad_query");
  a.grad_key = gradient_view(needs & 4, grad_key, "grad_key");
  a.grad_value = gradient_view(needs & 8, grad_value, "grad_value");
  if (need_bias) a.grad_bias = table_view(grad_bias, "grad_bias");
  if (no_queries(a.problem)) {
    for (Tensor* gradient : {&grad_grad_output, &grad_query, &grad_key, &grad_value, &grad_bias}) {
      torch::stable::zero_(*gradient);
    }
  } else {
    variant().kernels.double_backward(a);
  }
  return {grad_grad_output, grad_query, grad_key, grad_value, grad_bias};
}

std::string instruction_set() { return variant().name; }

}  // namespace

void parallel_tasks(int64_t count, void (*worker)(void*, int64_t (*)(void*), void*), void* context) {
  struct Queue {
    std::atomic<int64_t> next{0};
    int64_t count;
  } queue{{0}, count};
  const auto next = [](void* opaque) -> int64_t {
    Queue& q = *static_cast<Queue*>(opaque);
    const int64_t index = q.next.fetch_add(1, std::memory_order_relaxed);
    return index < q.count ? index : -1;
  };
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(context, next, &queue);
  });
}

}  // namespace natten_ext

STABLE_TORCH_LIBRARY(natten_ext_cpu, m) {
  const std::string common = "Tensor query, Tensor key, Tensor value, Tensor? bias";
  const std::string choices = "int[] neighborhood, bool l2, float scale";
  m.def(("forward(" + common + ", " + choices + ") -> (Tensor, Tensor)").c_str());
  m.def(("backward(Tensor grad_output, " + common + ", Tensor output, Tensor lse, " + choices +
         ", int needs) -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def(("double_backward(Tensor? cot_query, Tensor? cot_key, Tensor? cot_value, Tensor? cot_bias, Tensor grad_output, " +
         common + ", Tensor output, Tensor lse, " + choices +
         ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(natten_ext_cpu, CompositeExplicitAutograd, m) {
  m.impl("forward", TORCH_BOX(&natten_ext::forward));
  m.impl("backward", TORCH_BOX(&natten_ext::backward));
  m.impl("double_backward", TORCH_BOX(&natten_ext::double_backward));
  m.impl("instruction_set", TORCH_BOX(&natten_ext::instruction_set));
}
