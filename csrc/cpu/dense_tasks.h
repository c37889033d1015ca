// How the dense kernels' work is handed out to threads; what decides it is the model in cost.h.
#pragma once

#include "dense_tables.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Runs the kernel `make()`, whose results are rows of queries, over all jobs.
template <class T, class Make>
void run_dense_queries(const DensePlan<T>& plan, const OrderCost& order, const Make& make) {
  const int64_t heads = plan.heads.count(), jobs = heads * plan.jobs_per_head, threads = thread_count();
  const double cost = plan.cost(order);
  // Long jobs are shared between threads by groups of queries.
  const int64_t blocks = (plan.queries + plan.block_queries - 1) / plan.block_queries;
  const double block = plan.attention(std::min(plan.queries, plan.block_queries), plan.keys).scores(order.products);
  const double again = plan.attention(0, plan.keys).rows(order.tensors);
  const int64_t group = plan.block_queries * blocks_per_task(jobs, blocks, block, again, threads);
  const int64_t groups = (plan.queries + group - 1) / group;
  // A task is such a group, or a few short jobs. Heads vary faster than windows: they share the pages of memory.
  const int64_t together = groups > 1 ? 1 : jobs_per_task(cost, jobs, threads);
  const auto job = [&](int64_t index) { return plan.job(plan.heads.first + index % heads, index / heads); };
  const auto task = [&](auto& worker, int64_t number) {
    const int64_t first = number / groups * together, last = std::min(jobs, first + together);
    const int64_t begin = number % groups * group;
    for (int64_t index = first; index < last; ++index) {
      if (index + 1 < last) worker.prefetch(job(index + 1));
      worker.run(job(index), begin, std::min(plan.queries, begin + group));
    }
  };
  for_each_task((jobs + together - 1) / together * groups, make, task, static_cast<double>(jobs) * cost);
}

// What a call of a gradient kernel works on, for each head of the job. Gradients of queries and tables want all keys at
// once, those of keys and values all queries (which may come in several calls, in order).
template <class T>
struct DenseShare {
  int64_t query_begin, query_end, key_begin, key_end;
  bool want_query_side, want_key_side;
  T* sums = nullptr;  // [head][sum][query] of the job: left by the call that wants the query side for those that want the other
};

// How the jobs of a gradient kernel fall into parts, which does not depend on the threads: a part adds up its share of a
// head's table gradient by itself.
template <class T>
struct DenseParts {
  DenseParts(const Arguments& a, const DensePlan<T>& plan, const OrderCost& order) {
    const Problem& p = a.problem;
    const double cost = plan.shared * plan.cost(order);
    const int64_t heads = plan.key_heads().count(), jobs = plan.jobs_per_head;
    const auto blocks = [](int64_t n, int64_t block) { return (n + block - 1) / block; };
    table_size = a.grad_bias ? p.table_size() : 0;
    // Few jobs may be split; their slices of queries are parts as well.
    few = heads * jobs <= 32 && cost >= 5 * kTask && plan.keys > plan.block_keys && plan.queries > plan.block_queries;
    query_slices = few ? std::min<int64_t>(8, blocks(plan.queries, plan.block_queries)) : 1;
    key_slices = few ? std::min<int64_t>(8, blocks(plan.keys, plan.block_keys)) : 1;
    chunks = few ? jobs : std::min<int64_t>(jobs, 64);
    if (table_size > 0) {  // as long as partial tables are small beside the other gradients
      const int64_t most = std::max<int64_t>(1, 3 * jobs * plan.queries * plan.channels / (16 * table_size));
      query_slices = std::clamp<int64_t>(most / chunks, 1, query_slices);
      if (!few) chunks = std::min(chunks, most);
    } else if (!few) {
      chunks = std::clamp<int64_t>(static_cast<int64_t>(double(jobs) * cost / kTask), std::min<int64_t>(jobs, 64), jobs);
    }
    // Tasks take several heads of small jobs, some windows of each at a time: heads share the pages of memory.
    stretch = std::max<int64_t>(1, static_cast<int64_t>(kTask / cost));
    heads_at_once = stretch > 1 ? std::clamp<int64_t>(heads * chunks / 32, 1, heads) : 1;
  }
  // Where a slice of n rows begins, in whole blocks.
  static int64_t slice_begin(int64_t slice, int64_t slices, int64_t n, int64_t block) {
    return std::min(n, slice * ((n + slices * block - 1) / (slices * block)) * block);
  }

  bool few;
  int64_t table_size, chunks, query_slices, key_slices, stretch, heads_at_once;
};

// Runs the gradient kernel `make(keys_at_once)` over all jobs, so that every element is summed by one thread in an
// order that does not depend on the threads, and reduces the partial gradients of the tables.
//
// Where threads would be idle, some of few large jobs are split: first by queries, then again by keys.
template <class T, class Make>
void run_dense_gradients(const Arguments& a, const DensePlan<T>& plan, const OrderCost& order, const Make& make) {
  const Problem& p = a.problem;
  const DenseParts<T> parts(a, plan, order);
  // Heads are those of keys, from here on.
  const int64_t heads = plan.key_heads().count(), shared = plan.shared, jobs = heads * plan.jobs_per_head;
  const int64_t per_head = parts.chunks * parts.query_slices, table_size = parts.table_size;
  Buffer<T> partial(plan.heads.count() * per_head * table_size);
  std::fill_n(partial.data(), plan.heads.count() * per_head * table_size, T(0));
  const auto partial_of = [&](int64_t head, int64_t chunk, int64_t slice) {
    const int64_t first = head * shared * per_head + chunk * parts.query_slices + slice;
    return PartialTables<T>{partial + first * table_size, per_head * table_size};
  };
  const auto job_of = [&](int64_t head, int64_t index) { return plan.job(plan.heads.first + head * shared, index); };
  const auto query_begin = [&](int64_t slice) {
    return DenseParts<T>::slice_begin(slice, parts.query_slices, plan.queries, plan.block_queries);
  };
  const auto key_begin = [&](int64_t slice) {
    return DenseParts<T>::slice_begin(slice, parts.key_slices, plan.keys, plan.block_keys);
  };
  const double cost = shared * plan.cost(order);

  if (parts.few) {
    const Attention all = plan.attention(shared * plan.queries, plan.keys);
    const double moved = all.rows(order.tensors), of_queries = all.scores(order.query_products) + moved;
    const double of_keys = all.scores(order.key_products) + moved;
    const bool can = parts.query_slices > 1 && parts.key_slices > 1;
    const int64_t split =
        can ? jobs_to_split(jobs, {cost, of_queries, of_keys, parts.query_slices, parts.key_slices}, thread_count()) : 0;
    const int64_t whole = jobs - split;
    const int64_t sums_of_job = shared * order.sums * plan.queries;
    Buffer<T> sums(split * sums_of_job);
    const auto sums_of = [&](int64_t job) { return sums + (job - whole) * sums_of_job; };
    // Whole jobs, then slices of queries of the others.
    const auto query_task = [&](auto& worker, int64_t task) {
      const int64_t job = task < whole ? task : whole + (task - whole) / parts.query_slices;
      const int64_t first = task < whole ? 0 : (task - whole) % parts.query_slices;
      const int64_t last = task < whole ? parts.query_slices : first + 1;
      const int64_t head = job % heads, index = job / heads;
      for (int64_t slice = first; slice < last; ++slice) {
        worker.start(partial_of(head, index, slice));
        worker.run(job_of(head, index), {query_begin(slice), query_begin(slice + 1), 0, plan.keys, true, task < whole,
                                         task < whole ? nullptr : sums_of(job)});
        worker.finish();
      }
    };
    for_each_task(whole + split * parts.query_slices, [&] { return make(whole > 0 ? plan.keys : 0); }, query_task);
    const auto key_task = [&](auto& worker, int64_t task) {
      const int64_t job = whole + task / parts.key_slices, keys = task % parts.key_slices;
      // Slices of queries of all heads in turn, as in whole jobs: sums are added up in one order.
      for (int64_t slice = 0; slice < parts.query_slices; ++slice) {
        worker.run(job_of(job % heads, job / heads), {query_begin(slice), query_begin(slice + 1), key_begin(keys),
                                                      key_begin(keys + 1), false, true, sums_of(job)});
      }
    };
    for_each_task(split * parts.key_slices, [&] { return make(key_begin(1)); }, key_task);
  } else {
    const int64_t groups = (heads + parts.heads_at_once - 1) / parts.heads_at_once;
    const auto task = [&](auto& worker, int64_t number) {
      const int64_t chunk = number / groups, end = (chunk + 1) * plan.jobs_per_head / parts.chunks;
      const int64_t first_head = number % groups * parts.heads_at_once;
      const int64_t last_head = std::min(heads, first_head + parts.heads_at_once);
      for (int64_t first = chunk * plan.jobs_per_head / parts.chunks; first < end; first += parts.stretch) {
        const int64_t last = std::min(end, first + parts.stretch);
        for (int64_t head = first_head; head < last_head; ++head) {
          worker.start(partial_of(head, chunk, 0));
          for (int64_t index = first; index < last; ++index) {
            if (index + 1 < last) worker.prefetch(job_of(head, index + 1));
            worker.run(job_of(head, index), {0, plan.queries, 0, plan.keys, true, true});
          }
          worker.finish();
        }
      }
    };
    for_each_task(groups * parts.chunks, [&] { return make(plan.keys); }, task, static_cast<double>(jobs) * cost);
  }
  if (a.grad_bias) reduce_tables<T>(partial, per_head, a.grad_bias, plan.heads, p);
}

}  // namespace natten_ext::NATTEN_EXT_ISA
