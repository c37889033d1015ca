// What work costs a thread, and how it is best split between threads: one model behind all of the kernels' choices.
//
// Times are nanoseconds, of one core of 2020 or later, right to a factor of two or so. They decide who does what and never
// how numbers are added up: results do not depend on them or on the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace natten_ext {

// Until other threads begin and the last of them is waited for; and each further one.
constexpr double kStart = 8e3, kFurtherThread = 500;
// A row of channels moved between a tensor and working memory, beside its bytes.
constexpr double kRow = 8, kBytesPerNanosecond = 8;
// Tasks of many small jobs take about so long: enough to be worth handing out, and for their memory to stay in the cache.
constexpr double kTask = 2e4;
// Bytes that a core reads again and again at little cost, be it from a cache that it shares.
constexpr double kCache = 2 << 20;
constexpr double kUnknown = std::numeric_limits<double>::infinity();

// Multiply-adds and exponentials per nanosecond.
struct Pace {
  double products, exponentials;
};
constexpr Pace pace(int64_t lanes) { return {2.5 * lanes, 0.25 * lanes}; }

// What an order of differentiation takes: products per pair and channel, in all, and where its results of queries and of
// keys are computed apart; tensors whose rows it reads or writes; sums per query that the latter take from the former.
struct OrderCost {
  double products, query_products, key_products, tensors;
  int64_t sums;
};
constexpr OrderCost kForwardCost{2, 2, 0, 4, 0};
constexpr OrderCost kTangentCost{5, 5, 0, 8, 0};
constexpr OrderCost kBackwardCost{5, 3, 4, 8, 1};
constexpr OrderCost kDoubleBackwardCost{12, 9, 8, 12, 4};

// So many queries against so many keys.
struct Attention {
  double queries, keys, channels;
  int64_t lanes, value_bytes;

  double scores(double products) const {
    const Pace p = pace(lanes);
    return queries * keys * (products * channels / p.products + 1 / p.exponentials);
  }
  // Rows of so many tensors, half of them of queries.
  double rows(double tensors) const {
    return tensors * (queries + keys) / 2 * (kRow + channels * value_bytes / kBytesPerNanosecond);
  }
};

// How many threads finish that work the earliest.
inline int64_t worthwhile_threads(double nanoseconds, int64_t threads) {
  if (threads <= 1 || nanoseconds == kUnknown) return threads;
  const double best = std::clamp<double>(std::floor(std::sqrt(nanoseconds / kFurtherThread)), 2, threads);
  return nanoseconds / best + kStart + (best - 2) * kFurtherThread < nanoseconds ? static_cast<int64_t>(best) : 1;
}

// How many small jobs make a task.
inline int64_t jobs_per_task(double job, int64_t jobs, int64_t threads) {
  const int64_t balanced = std::max<int64_t>(1, jobs / (4 * threads));
  return std::clamp<int64_t>(static_cast<int64_t>(kTask / job), 1, balanced);
}

// How many blocks of a job's queries make a task, where each task of a job costs `again` (its keys are brought once more).
inline int64_t blocks_per_task(int64_t jobs, int64_t blocks, double block, double again, int64_t threads) {
  int64_t best = blocks;
  double least = kUnknown;
  for (int64_t size = blocks; size > 0 && jobs < 8 * threads; --size) {
    const int64_t tasks = jobs * ((blocks + size - 1) / size);
    const double time = static_cast<double>((tasks + threads - 1) / threads) * (again + static_cast<double>(size) * block);
    if (time < 0.97 * least) least = time, best = size;
  }
  return best;
}

// Adjacent positions of a row of neighborhood attention that are worked on at a time, each with so many bytes that are read
// again and again. Parts of a row overlap: short ones compute much twice.
inline int64_t positions_together(double bytes, int64_t least) {
  return static_cast<int64_t>(std::clamp(kCache / bytes, double(least), 512.0));
}

// A job that is split is done in equal pieces for its queries, and then again for its keys, in place of one task `whole`.
struct SplitJob {
  double whole, of_queries, of_keys;
  int64_t query_pieces, key_pieces;
};

// How many of some equal jobs to split so that no thread is idle: the others go first, then the pieces.
inline int64_t jobs_to_split(int64_t jobs, const SplitJob& job, int64_t threads) {
  const auto rounds = [](int64_t tasks, int64_t threads) { return static_cast<double>((tasks + threads - 1) / threads); };
  const double query_piece = job.of_queries / job.query_pieces, key_piece = job.of_keys / job.key_pieces;
  int64_t best = 0;
  double least = kUnknown;
  for (int64_t split = 0; split <= std::min(jobs, threads); ++split) {
    const int64_t whole = jobs - split, late = whole % threads;  // threads with one whole job more than the others
    const double early_end = static_cast<double>(whole / threads) * job.whole, end = rounds(whole, threads) * job.whole;
    double time = early_end + rounds(split * job.query_pieces, threads - late) * query_piece;
    if (time > end + query_piece) {  // the late ones take some as well: at most
      time = (whole * job.whole + split * job.of_queries + (threads - 1) * query_piece) / threads;
    }
    time = std::max(time, end);
    if (split > 0) time += rounds(split * job.key_pieces, threads) * key_piece + kStart;
    if (time < 0.97 * least) least = time, best = split;
  }
  return best;
}

}  // namespace natten_ext
