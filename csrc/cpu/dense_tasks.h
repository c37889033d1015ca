// How the dense kernels' work is handed out to threads.
#pragma once

#include "dense_tables.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Runs the kernel `make()`, whose results are rows of queries, over all jobs.
template <class T, class Make>
void run_dense_queries(const DensePlan<T>& plan, const Make& make) {
  // Long jobs are shared between threads by groups of queries; short ones pack their keys once.
  const int64_t group = plan.queries <= 512 ? plan.queries : 4 * plan.block_queries;
  const int64_t groups = (plan.queries + group - 1) / group;
  // A task is such a group, or a few short jobs. Heads vary faster than windows: they share the pages of memory.
  const int64_t heads = plan.heads.count(), jobs = heads * plan.jobs_per_head;
  const int64_t together = groups > 1 ? 1 : std::clamp<int64_t>(jobs / 64, 1, 16);
  const auto job = [&](int64_t index) { return plan.job(plan.heads.first + index % heads, index / heads); };
  for_each_task((jobs + together - 1) / together * groups, make, [&](auto& worker, int64_t task) {
    const int64_t first = task / groups * together, last = std::min(jobs, first + together);
    const int64_t begin = task % groups * group;
    for (int64_t index = first; index < last; ++index) {
      if (index + 1 < last) worker.prefetch(job(index + 1));
      worker.run(job(index), begin, std::min(plan.queries, begin + group));
    }
  });
}

// What a call of a gradient kernel works on. Gradients of queries and tables want all keys at once, those of keys and
// values all queries (which may come in several calls, in order).
struct DenseShare {
  int64_t query_begin, query_end, key_begin, key_end;
  bool want_query_side, want_key_side;
};

// Whether jobs are split so that idle threads get work. A split job's scores are computed for its queries and again for
// its keys, about one and a half times the work in all.
inline bool split_pays(int64_t jobs, int64_t threads) {
  const int64_t rounds = (jobs + threads - 1) / threads;
  return 2 * rounds * threads > 3 * jobs;
}

// Runs the gradient kernel `make(keys_at_once)` over all jobs, so that every element is summed by one thread in an
// order that does not depend on the threads, and reduces the partial gradients of the tables.
//
// A job is usually one task. A few large jobs are split where threads would be idle: first by queries, then again by
// keys. Their partial tables are those of the slices of queries, split or not.
template <class T, class Make>
void run_dense_gradients(const Arguments& a, const DensePlan<T>& plan, const Make& make) {
  const Problem& p = a.problem;
  const int64_t heads = plan.heads.count(), jobs = heads * plan.jobs_per_head;
  const bool few = jobs < 8 && plan.queries * plan.keys >= int64_t(1) << 18;
  const bool split = few && split_pays(jobs, thread_count());
  // Partial tables per head: few enough to be small beside the other gradients.
  const int64_t slices = few ? std::min<int64_t>(8, (plan.queries + plan.block_queries - 1) / plan.block_queries) : 1;
  const int64_t chunks = few ? plan.jobs_per_head : std::min<int64_t>(plan.jobs_per_head, 64);
  const int64_t parts = chunks * slices, table_size = a.grad_bias ? p.table_size() : 0;
  Buffer<T> partial(heads * parts * table_size);
  std::fill_n(partial.data(), heads * parts * table_size, T(0));
  const auto slice_begin = [](int64_t slice, int64_t slices, int64_t n, int64_t block) {
    return std::min(n, slice * ((n + slices * block - 1) / (slices * block)) * block);
  };
  const auto query_task = [&](auto& worker, int64_t task) {
    // Heads vary fastest: they share the pages of memory.
    const int64_t head = task % heads, rest = task / heads, chunk = split ? rest / slices : rest;
    const int64_t first = split ? rest % slices : 0, last = split ? first + 1 : slices;
    const int64_t end = (chunk + 1) * plan.jobs_per_head / chunks;
    for (int64_t slice = first; slice < last; ++slice) {
      worker.start(partial + (head * parts + chunk * slices + slice) * table_size);
      const int64_t query_begin = slice_begin(slice, slices, plan.queries, plan.block_queries);
      const int64_t query_end = slice_begin(slice + 1, slices, plan.queries, plan.block_queries);
      for (int64_t job = chunk * plan.jobs_per_head / chunks; job < end; ++job) {
        if (job + 1 < end) worker.prefetch(plan.job(plan.heads.first + head, job + 1));
        worker.run(plan.job(plan.heads.first + head, job), {query_begin, query_end, 0, plan.keys, true, !split});
      }
      worker.finish();
    }
  };
  for_each_task(heads * chunks * (split ? slices : 1), [&] { return make(split ? 0 : plan.keys); }, query_task);
  if (split) {
    const int64_t key_slices = std::min<int64_t>(8, (plan.keys + plan.block_keys - 1) / plan.block_keys);
    const int64_t keys_at_once = slice_begin(1, key_slices, plan.keys, plan.block_keys);
    for_each_task(
        jobs * key_slices, [&] { return make(keys_at_once); },
        [&](auto& worker, int64_t task) {
          const int64_t job = task / key_slices, slice = task % key_slices;
          const int64_t begin = slice_begin(slice, key_slices, plan.keys, plan.block_keys);
          const int64_t end = slice_begin(slice + 1, key_slices, plan.keys, plan.block_keys);
          worker.run(plan.job(plan.heads.first + job / plan.jobs_per_head, job % plan.jobs_per_head),
                     {0, plan.queries, begin, end, false, true});
        });
  }
  if (a.grad_bias) reduce_tables<T>(partial, parts, a.grad_bias, plan.heads, p);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
