// The operators of a compiled backend on the stable ABI: they check operands, allocate results and call the kernels.
// An order's operands are written here once, and declared to torch by natten_ext/orders.py, in the same order.
//
// A backend is a class for one call with
//
//   Backend(const Tensor& query, Options...)   Options are of what the operators of this backend take after the others
//   const char* device                         "the CPU", for messages
//   bool holds(const Tensor&)                  whether a tensor is on that device
//   void allocated(Tensor&)                    told of every result
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

namespace natten_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch lets None through.
inline const Tensor& given(const Tensor& t, const std::string& name) {
  require(t.defined(), name + " must be a tensor, got None");
  return t;
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

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// (batch, heads, *tokens)
inline std::vector<int64_t> row_sizes(const Tensor& query) {
  std::vector<int64_t> s = sizes(query);
  const int64_t heads = s[s.size() - 2];
  s.resize(s.size() - 2);
  s.insert(s.begin() + 1, heads);
  return s;
}

inline std::vector<int64_t> lse_sizes(const Tensor& query) {
  std::vector<int64_t> s = row_sizes(query);
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

// One call of an operator: the arguments of the kernels, from checked operands and new results.
template <class Backend>
class Call {
 public:
  // What the orders have in common. The neighborhood is an integer code, see problem.h.
  template <class... Options>
  Call(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
       const std::vector<int64_t>& neighborhood, bool l2, double scale, Options... options)
      : query_(given(query, "query")), backend_(query, options...) {
    const int64_t n = query.dim();
    require(n >= 4 && n <= 6, "query must have 4 to 6 dimensions");
    require(given(key, "key").dim() == n && given(value, "value").dim() == n,
            "key and value must have the query's dimensions");
    Problem& p = arguments.problem;
    p.batch = query.size(0);
    p.depth = n == 6 ? query.size(1) : 1;
    p.height = n >= 5 ? query.size(n - 4) : 1;
    p.width = query.size(n - 3);
    p.key_width = key.size(n - 3);
    p.heads = query.size(n - 2);
    p.key_heads = key.size(n - 2);
    p.head_dim = query.size(n - 1);
    p.l2 = l2;
    p.scale = scale;
    require(p.key_heads > 0 && p.heads % p.key_heads == 0, "key must have heads that divide the query's");
    decode_neighborhood(neighborhood, p);
    std::vector<int64_t> expected = sizes(query);
    require(p.kind != Kind::full || n == 4, "full attention takes sequences");
    expected[n - 3] = p.key_width;
    expected[n - 2] = p.key_heads;
    require(sizes(key) == expected && sizes(value) == expected, "key and value must match the query");
    require(p.kind == Kind::full || p.key_width == p.width, "key and value must have the query's map");
    require(p.key_width > 0 && p.heads > 0 && p.head_dim >= 1 && p.head_dim <= 256,
            "there must be a key, a head, and head_dim from 1 to 256");
    Arguments& a = arguments;
    a.query = rows(query, "query");
    a.key = rows(key, "key");
    a.value = rows(value, "value");
    require(a.key.dtype == a.query.dtype && a.value.dtype == a.query.dtype, "query, key and value must have one dtype");
    if (!bias) return;
    require(p.kind != Kind::full, "full attention takes no bias");
    std::vector<int64_t> table{p.table_depth(), p.table_height(), p.table_width()};
    table.erase(table.begin(), table.end() - (n - 3));  // one axis per map axis
    table.insert(table.begin(), p.heads);
    require(sizes(*bias) == table, "bias has the wrong shape");
    a.bias = rows(*bias, "bias");
    require(a.bias.dtype == a.query.dtype || a.bias.dtype == DType::float32, "bias must have the query's dtype or float32");
  }

  // A tensor that must look like another, or be absent.
  View like(const std::optional<Tensor>& t, const std::optional<Tensor>& other, const char* name) {
    if (!t) return {};
    require(other && sizes(given(*t, name)) == sizes(*other) && t->scalar_type() == other->scalar_type(),
            std::string(name) + " must have the shape and dtype of its operand");
    return rows(*t, name);
  }

  // Where the forward writes and the other orders read.
  void set_output(const Tensor& output, const Tensor& lse) {
    arguments.output = like(output, query_, "output");
    require(backend_.holds(given(lse, "lse")), std::string("lse must be on ") + backend_.device);
    require(lse.is_contiguous() && sizes(lse) == lse_sizes(query_) && lse.scalar_type() == lse_dtype(query_),
            "lse must be contiguous (2, batch, heads, tokens) in the compute type");
    arguments.lse = lse.mutable_data_ptr();
  }

  // A number per row of scores, in the compute type, or none.
  View row_numbers(const std::optional<Tensor>& t, const char* name) {
    if (!t) return {};
    require(backend_.holds(given(*t, name)), std::string(name) + " must be on " + backend_.device);
    require(sizes(*t) == row_sizes(query_) && t->scalar_type() == lse_dtype(query_),
            std::string(name) + " must be (batch, heads, tokens) in the compute type");
    if (!t->is_contiguous()) copies_.push_back(torch::stable::contiguous(*t));
    const Problem& p = arguments.problem;
    const DType dtype = lse_dtype(query_) == ScalarType::Double ? DType::float64 : DType::float32;
    void* data = (t->is_contiguous() ? *t : copies_.back()).mutable_data_ptr();
    return {data, dtype, p.heads * p.queries(), p.height * p.width, p.width, 1, p.queries()};
  }

  Tensor new_row_numbers(bool needed, View& view) {
    if (!needed) return new_tensor({0}, query_.scalar_type());
    Tensor result = new_tensor(row_sizes(query_), lse_dtype(query_));
    view = row_numbers(result, "a result");
    return result;
  }

  Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
    Tensor result = new_result(query_, shape, dtype);
    backend_.allocated(result);
    return result;
  }

  // A result of the shape and dtype of `operand`, and its view; an empty tensor if it is not needed.
  Tensor gradient(bool needed, const std::optional<Tensor>& operand, View& view) {
    if (!needed || !operand) return new_tensor({0}, query_.scalar_type());
    Tensor result = new_tensor(sizes(*operand), operand->scalar_type());
    view = rows(result, "a gradient");
    return result;
  }

  // Runs the kernels and returns the results, which are zeros where there is nothing to attend.
  template <class... Results>
  std::tuple<Results...> run(void (Backend::*order)(const Arguments&) const, Results... results) {
    Arguments& a = arguments;
    for (View* v : {&a.key, &a.value, &a.cot_key, &a.cot_value, &a.grad_key, &a.grad_value}) v->of_keys = true;
    if (a.problem.batch * a.problem.queries() == 0) (torch::stable::zero_(results), ...);
    else (backend_.*order)(a);
    return {results...};
  }

  // A sequence, map or table. Kernels want contiguous channels; anything else (say an expanded gradient) is copied.
  View rows(const Tensor& t, const std::string& name) {
    const int64_t n = t.dim();
    require(backend_.holds(t), name + " must be on " + backend_.device);
    const std::optional<DType> dtype = dtype_of(t);
    require(dtype.has_value(), name + " has a dtype that " + backend_.device + " has no kernels for");
    if (t.size(n - 1) > 1 && t.stride(n - 1) != 1 && t.numel() > 0) {
      copies_.push_back(torch::stable::contiguous(t));
      return rows(copies_.back(), name);
    }
    void* data = t.mutable_data_ptr();
    const bool table = n < query_.dim();
    if (table) {
      return {data, *dtype, 0, n == 4 ? t.stride(1) : 0, n >= 3 ? t.stride(n - 2) : 0, t.stride(n - 1), t.stride(0)};
    }
    const int64_t z = n == 6 ? t.stride(1) : 0, y = n >= 5 ? t.stride(n - 4) : 0;
    return {data, *dtype, t.stride(0), z, y, t.stride(n - 3), t.stride(n - 2)};
  }

  Arguments arguments{};

 private:
  const Tensor query_;
  const Backend backend_;
  std::vector<Tensor> copies_;
};

// `needs` says which results to compute.
inline void check_needs(const std::vector<bool>& needs, size_t count) {
  require(needs.size() == count, "needs must have " + std::to_string(count) + " entries, one per gradient, got " +
                                     std::to_string(needs.size()));
}

// natten_ext.orders.INTERFACE of the sources that this was built from.
inline int64_t interface() { return NATTEN_EXT_INTERFACE; }

template <class Backend, class... Options>
struct Operators {
  static std::tuple<Tensor, Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                                    std::vector<int64_t> neighborhood, bool l2, double scale,
                                                    bool return_lse, Options... options) {
    Call<Backend> call(query, key, value, bias, neighborhood, l2, scale, options...);
    Tensor output = call.new_tensor(sizes(query), query.scalar_type());
    Tensor lse = call.new_tensor(lse_sizes(query), lse_dtype(query));
    call.set_output(output, lse);
    Tensor natural_lse = call.new_row_numbers(return_lse, call.arguments.natural_lse);
    return call.run(&Backend::forward, output, lse, natural_lse);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      Tensor grad_output, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
      std::optional<Tensor> bias, Tensor output, Tensor lse, std::vector<int64_t> neighborhood, bool l2, double scale,
      std::vector<bool> needs, Options... options) {
    Call<Backend> call(query, key, value, bias, neighborhood, l2, scale, options...);
    Arguments& a = call.arguments;
    call.set_output(output, lse);
    a.grad_output = call.like(grad_output, query, "grad_output");
    a.grad_lse = call.row_numbers(grad_lse, "grad_lse");
    check_needs(needs, 4);
    Tensor grad_query = call.gradient(needs[0], query, a.grad_query), grad_key = call.gradient(needs[1], key, a.grad_key);
    Tensor grad_value = call.gradient(needs[2], value, a.grad_value);
    Tensor grad_bias = call.gradient(needs[3], bias, a.grad_bias);
    return call.run(&Backend::backward, grad_query, grad_key, grad_value, grad_bias);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
      std::optional<Tensor> cot_query, std::optional<Tensor> cot_key, std::optional<Tensor> cot_value,
      std::optional<Tensor> cot_bias, Tensor grad_output, std::optional<Tensor> grad_lse, Tensor query, Tensor key,
      Tensor value, std::optional<Tensor> bias, Tensor output, Tensor lse, std::vector<int64_t> neighborhood, bool l2,
      double scale, std::vector<bool> needs, Options... options) {
    Call<Backend> call(query, key, value, bias, neighborhood, l2, scale, options...);
    Arguments& a = call.arguments;
    call.set_output(output, lse);
    a.grad_output = call.like(grad_output, query, "grad_output");
    a.grad_lse = call.row_numbers(grad_lse, "grad_lse");
    a.cot_query = call.like(cot_query, query, "cot_query");
    a.cot_key = call.like(cot_key, key, "cot_key");
    a.cot_value = call.like(cot_value, value, "cot_value");
    a.cot_bias = call.like(cot_bias, bias, "cot_bias");
    check_needs(needs, 6);
    Tensor grad_grad_output = call.gradient(needs[0], grad_output, a.grad_grad_output);
    Tensor grad_grad_lse = call.new_row_numbers(needs[1], a.grad_grad_lse);
    Tensor grad_query = call.gradient(needs[2], query, a.grad_query), grad_key = call.gradient(needs[3], key, a.grad_key);
    Tensor grad_value = call.gradient(needs[4], value, a.grad_value);
    Tensor grad_bias = call.gradient(needs[5], bias, a.grad_bias);
    return call.run(&Backend::double_backward, grad_grad_output, grad_grad_lse, grad_query, grad_key, grad_value,
                    grad_bias);
  }

  // Registers them under their names and a suffix.
  template <class Library>
  static void implement(Library& m, const std::string& suffix = "") {
    m.impl("interface", TORCH_BOX(&natten_ext::interface));
    m.impl(("forward" + suffix).c_str(), TORCH_BOX(&Operators::forward));
    m.impl(("backward" + suffix).c_str(), TORCH_BOX(&Operators::backward));
    m.impl(("double_backward" + suffix).c_str(), TORCH_BOX(&Operators::double_backward));
  }
};

}  // namespace natten_ext
