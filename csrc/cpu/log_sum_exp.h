// The log-sum-exp of the true scores, and its derivative along tangents. What the other kernels leave out of a row of
// scores since it is constant along the row is added here: with m the origin of the keys,
//   dot: s q.m      l2: -s|q-m|^2      and along gQ: s gQ.m      -2s gQ.(q-m)
#pragma once

#include "dense.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Calls write(index of the row, constant) for each row of scores, with the constant's derivative along `cot_query` or,
// where that is null, the constant itself.
template <class T, class Write>
void for_each_row_constant(const Arguments& a, const View* cot_query, const Write& write) {
  struct Worker {
    Origin<T> origin;
    Buffer<T> query, along;
  };
  const Problem& p = a.problem;
  const int64_t n = p.head_dim;
  const double factor = p.l2 ? -p.scale * (cot_query != nullptr ? 2 : 1) : p.scale;
  const auto make = [&] { return Worker{Origin<T>(a.key, p, {0, p.key_heads}), Buffer<T>(n), Buffer<T>(n)}; };
  for_each_task(p.batch * p.heads, make, [&](Worker& worker, int64_t task) {
    const int64_t batch = task / p.heads, head = task % p.heads;
    const T* origin = worker.origin.at(batch, head / p.shared());
    const auto at = [&](const View& v, int64_t i) {
      const int64_t z = i / p.width / p.height, y = i / p.width % p.height, x = i % p.width;
      return batch * v.batch + head * v.head + z * v.z + y * v.y + x * v.x;
    };
    for (int64_t i = 0; i < p.queries(); ++i) {
      load_row<T>(worker.query, a.query, at(a.query, i), n, 1, p.l2 ? origin : nullptr);
      if (cot_query != nullptr) load_row<T>(worker.along, *cot_query, at(*cot_query, i), n, 1);
      const T* along = cot_query != nullptr ? worker.along : worker.query;
      write(task * p.queries() + i, factor * dot_row<T>(along, p.l2 ? worker.query.data() : origin, n));
    }
  });
}

template <class T>
void natural_lse(const Arguments& a) {
  const T* base = static_cast<const T*>(a.lse);
  const T* log_sum = base + a.problem.rows();
  T* result = static_cast<T*>(a.natural_lse.data);
  for_each_row_constant<T>(a, nullptr, [&](int64_t row, double constant) {
    // Without any key; the logarithm is that of a sum of NaN then.
    const bool none = base[row] == -std::numeric_limits<T>::infinity();
    result[row] = none ? base[row] : T((double(base[row]) + double(log_sum[row])) * kLn2<double> + constant);
  });
}

// Adds what the mean of X lacks.
template <class T>
void add_to_grad_grad_lse(const Arguments& a) {
  T* result = static_cast<T*>(a.grad_grad_lse.data);
  if (a.cot_query) for_each_row_constant<T>(a, &a.cot_query, [&](int64_t row, double constant) { result[row] += T(constant); });
}

}  // namespace natten_ext::NATTEN_EXT_ISA
