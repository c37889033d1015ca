// The three operators on the stable ABI, the same for every compiled backend: they check operands, allocate results and
// call the backend's kernels. A backend is an object with
//
//   const char* device;                  "the CPU", for messages
//   bool holds(const Tensor&)            whether a tensor is on that device
//   bool takes(DType)                    whether there are kernels for it
//   void allocated(Tensor&)              told of every result
//   void forward, backward, double_backward(const Arguments&)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

// Of torch 2.13 and later; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace natten_ext::operators {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool condition, const std::string& rule) {
  if (!condition) throw std::runtime_error("natten_ext: " + rule);
}

inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: return std::nullopt;
  }
}

template <class Backend>
DType checked_dtype(const Backend& backend, const Tensor& t, const char* name) {
  const std::optional<DType> dtype = dtype_of(t);
  require(dtype && backend.takes(*dtype), std::string(name) + " has a dtype that " + backend.device + " has no kernels for");
  return *dtype;
}

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// A sequence or map; `query` gives the number of dimensions.
template <class Backend>
View view(const Backend& backend, const Tensor& t, const char* name) {
  const int64_t n = t.dim();
  require(backend.holds(t), std::string(name) + " must be on " + backend.device);
  require(t.size(n - 1) <= 1 || t.stride(n - 1) == 1, std::string(name) + " must have contiguous channels");
  return {t.mutable_data_ptr(), checked_dtype(backend, t, name), t.stride(0), n == 5 ? t.stride(1) : 0, t.stride(n - 3),
          t.stride(n - 2)};
}

template <class Backend>
View table_view(const Backend& backend, const std::optional<Tensor>& t, const char* name) {
  if (!t) return {};
  require(backend.holds(*t) && t->dim() == 3, std::string(name) + " must be (heads, rows, columns) on " + backend.device);
  return {t->mutable_data_ptr(), checked_dtype(backend, *t, name), 0, t->stride(1), t->stride(2), t->stride(0)};
}

// Everything the three orders share. `bias` may be absent.
template <class Backend>
Arguments arguments(const Backend& backend, const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
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
  require(p.key_width > 0 && p.heads > 0 && p.head_dim >= 1 && p.head_dim <= 256,
          "there must be a key, a head, and head_dim from 1 to 256");
  a.query = view(backend, query, "query");
  a.key = view(backend, key, "key");
  a.value = view(backend, value, "value");
  require(a.key.dtype == a.query.dtype && a.value.dtype == a.query.dtype, "query, key and value must have one dtype");
  a.bias = table_view(backend, bias, "bias");
  if (bias) {
    require(p.kind != Kind::full, "full attention takes no bias");
    require(sizes(*bias) == std::vector<int64_t>{p.heads, p.table_height(), p.table_width()}, "bias has the wrong shape");
    require(a.bias.dtype == a.query.dtype || a.bias.dtype == DType::float32, "bias must have the query's dtype or float32");
  }
  return a;
}

// A tensor that must look like another, or be absent.
template <class Backend>
View like(const Backend& backend, const std::optional<Tensor>& t, const Tensor& other, const char* name) {
  if (!t) return {};
  require(sizes(*t) == sizes(other) && t->scalar_type() == other.scalar_type(),
          std::string(name) + " must have the shape and dtype of its operand");
  return view(backend, *t, name);
}

inline ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> lse_sizes(const Tensor& query) {
  std::vector<int64_t> s = sizes(query);
  const int64_t heads = s[s.size() - 2];
  s.resize(s.size() - 2);
  s.insert(s.begin() + 1, heads);
  s.insert(s.begin(), 2);
  return s;
}

// `new_empty`, whose own exception holds no reason.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) try {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
} catch (const std::runtime_error&) {
  std::string sizes;
  for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  const bool known = torch_exception_get_what_without_backtrace != nullptr;
  const char* reason = known ? torch_exception_get_what_without_backtrace() : "most likely out of memory";
  throw std::runtime_error("natten_ext: cannot allocate a result of shape (" + sizes + "): " + reason);
}

template <class Backend>
Tensor new_contiguous(const Backend& backend, const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor result = new_result(like, shape, dtype);
  backend.allocated(result);
  return result;
}

// An output of the shape and dtype of `operand`, or an empty tensor if it is not needed.
template <class Backend>
Tensor gradient(const Backend& backend, bool needed, const std::optional<Tensor>& operand, const Tensor& query) {
  return needed && operand ? new_contiguous(backend, query, sizes(*operand), operand->scalar_type())
                           : new_contiguous(backend, query, {0}, query.scalar_type());
}
template <class Backend>
View gradient_view(const Backend& backend, bool needed, const Tensor& t, const char* name) {
  return needed ? view(backend, t, name) : View{};
}

template <class Backend>
void set_saved(const Backend& backend, Arguments& a, const Tensor& query, const Tensor& grad_output, const Tensor& output, const Tensor& lse) {
  a.grad_output = like(backend, grad_output, query, "grad_output");
  a.output = like(backend, output, query, "output");
  require(backend.holds(lse), std::string("lse must be on ") + backend.device);
  require(lse.is_contiguous() && sizes(lse) == lse_sizes(query) && lse.scalar_type() == lse_dtype(query),
          "lse must be contiguous (2, batch, heads, tokens) in the compute type");
  a.lse = lse.mutable_data_ptr();
}

// Whether there is nothing to attend; results are then zeros.
inline bool no_queries(const Problem& p) { return p.batch * p.queries() == 0; }

template <class Backend>
std::tuple<Tensor, Tensor> forward(const Backend& backend, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                   std::vector<int64_t> neighborhood, bool l2, double scale) {
  Arguments a = arguments(backend, query, key, value, bias, neighborhood, l2, scale);
  Tensor output = new_contiguous(backend, query, sizes(query), query.scalar_type());
  Tensor lse = new_contiguous(backend, query, lse_sizes(query), lse_dtype(query));
  a.output = view(backend, output, "output");
  a.lse = lse.mutable_data_ptr();
  if (!no_queries(a.problem)) backend.forward(a);
  return {output, lse};
}

// `needs`: one bit per gradient, in the order of the results.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Backend& backend, Tensor grad_output, Tensor query, Tensor key, Tensor value,
                                                    std::optional<Tensor> bias, Tensor output, Tensor lse,
                                                    std::vector<int64_t> neighborhood, bool l2, double scale,
                                                    int64_t needs) {
  Arguments a = arguments(backend, query, key, value, bias, neighborhood, l2, scale);
  set_saved(backend, a, query, grad_output, output, lse);
  const bool need_bias = (needs & 8) && bias;
  Tensor grad_query = gradient(backend, needs & 1, query, query), grad_key = gradient(backend, needs & 2, key, query);
  Tensor grad_value = gradient(backend, needs & 4, value, query), grad_bias = gradient(backend, need_bias, bias, query);
  a.grad_query = gradient_view(backend, needs & 1, grad_query, "grad_query");
  a.grad_key = gradient_view(backend, needs & 2, grad_key, "grad_key");
  a.grad_value = gradient_view(backend, needs & 4, grad_value, "grad_value");
  if (need_bias) a.grad_bias = table_view(backend, grad_bias, "grad_bias");
  if (no_queries(a.problem)) {
    for (Tensor* gradient : {&grad_query, &grad_key, &grad_value, &grad_bias}) torch::stable::zero_(*gradient);
  } else {
    backend.backward(a);
  }
  return {grad_query, grad_key, grad_value, grad_bias};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    const Backend& backend, std::optional<Tensor> cot_query, std::optional<Tensor> cot_key, std::optional<Tensor> cot_value,
    std::optional<Tensor> cot_bias, Tensor grad_output, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> bias, Tensor output, Tensor lse, std::vector<int64_t> neighborhood, bool l2, double scale,
    int64_t needs) {
  Arguments a = arguments(backend, query, key, value, bias, neighborhood, l2, scale);
  set_saved(backend, a, query, grad_output, output, lse);
  a.cot_query = like(backend, cot_query, query, "cot_query");
  a.cot_key = like(backend, cot_key, key, "cot_key");
  a.cot_value = like(backend, cot_value, value, "cot_value");
  if (cot_bias) {
    require(bias && sizes(*cot_bias) == sizes(*bias) && cot_bias->scalar_type() == bias->scalar_type(),
            "cot_bias must have the shape and dtype of bias");
    a.cot_bias = table_view(backend, cot_bias, "cot_bias");
  }
  const bool need_bias = (needs & 16) && bias;
  Tensor grad_grad_output = gradient(backend, needs & 1, grad_output, query), grad_query = gradient(backend, needs & 2, query, query);
  Tensor grad_key = gradient(backend, needs & 4, key, query), grad_value = gradient(backend, needs & 8, value, query);
  Tensor grad_bias = gradient(backend, need_bias, bias, query);
  a.grad_grad_output = gradient_view(backend, needs & 1, grad_grad_output, "grad_grad_output");
  a.grad_query = gradient_view(backend, needs & 2, grad_query, "grad_query");
  a.grad_key = gradient_view(backend, needs & 4, grad_key, "grad_key");
  a.grad_value = gradient_view(backend, needs & 8, grad_value, "grad_value");
  if (need_bias) a.grad_bias = table_view(backend, grad_bias, "grad_bias");
  if (no_queries(a.problem)) {
    for (Tensor* gradient : {&grad_grad_output, &grad_query, &grad_key, &grad_value, &grad_bias}) {
      torch::stable::zero_(*gradient);
    }
  } else {
    backend.double_backward(a);
  }
  return {grad_grad_output, grad_query, grad_key, grad_value, grad_bias};
}

// Declares the operators; `more` are arguments that only this backend has (", bool tf32").
template <class Library>
void define(Library& m, const std::string& more = "") {
  const std::string common = "Tensor query, Tensor key, Tensor value, Tensor? bias";
  const std::string choices = "int[] neighborhood, bool l2, float scale";
  m.def(("forward(" + common + ", " + choices + more + ") -> (Tensor, Tensor)").c_str());
  m.def(("backward(Tensor grad_output, " + common + ", Tensor output, Tensor lse, " + choices + ", int needs" + more +
         ") -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def(("double_backward(Tensor? cot_query, Tensor? cot_key, Tensor? cot_value, Tensor? cot_bias, Tensor grad_output, " +
         common + ", Tensor output, Tensor lse, " + choices + ", int needs" + more +
         ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)").c_str());
}

}  // namespace natten_ext::operators
