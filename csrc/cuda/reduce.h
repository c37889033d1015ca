// The sum of the blocks' partial table gradients, in an order that depends on nothing but their number.
#pragma once

#include "kernel.h"

namespace natten_ext::cuda {

constexpr int kReductionThreads = 8 * kWarp;

struct TableSums {
  const void* partials;  // (count, heads, size) in Real, from the first head's on that are summed
  int count, size, first_head, heads;
  void* table;  // (all heads, size), contiguous
  bool is_float;
};

// One block per 32 entries of a head's table (block_y); each warp sums every eighth partial.
template <class Element, class Real>
NATTEN_EXT_KERNEL(kReductionThreads, 1) reduce_tables(NATTEN_EXT_PARAMETER(TableSums) sums) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int entry = block_x() * kWarp + lane;
  Real sum = 0;
  if (entry < sums.size) {
    for (int i = warp; i < sums.count; i += kReductionThreads / kWarp) {
      sum += load_global(static_cast<const Real*>(sums.partials) + (int64_t{i} * sums.heads + block_y()) * sums.size + entry);
    }
  }
  store_shared(thread_index() * static_cast<Shared>(sizeof(Real)), sum);
  sync_block();
  if (warp != 0 || entry >= sums.size) return;
  sum = 0;
  for (int w = 0; w < kReductionThreads / kWarp; ++w) {
    sum += load_shared<Real>((w * kWarp + lane) * static_cast<Shared>(sizeof(Real)));
  }
  const int64_t to = int64_t{sums.first_head + block_y()} * sums.size + entry;
  if (sums.is_float) store_global(static_cast<float*>(sums.table) + to, static_cast<float>(sum));
  else store_global(static_cast<Element*>(sums.table) + to, narrow<Element>(sum));
}

}  // namespace natten_ext::cuda
