// Where the windows of neighborhood attention lie, in vectors.
//
// Inside a residue class the dilation is 1. Rows are held transposed, one query (or key) per lane, so that every product is
// made of whole vectors, in one of two ways:
// - [channel][x], lanes being adjacent positions of one class: a vector of queries at x meets key j of its windows in one
//   (unaligned) load at start(x) + j, followed by a permutation where they do not move with every query;
// - interleaved, [channel][x][lane], lanes being one position of several classes, of one shape and one window, be they of
//   several heads or batch elements or of one: key j is the vector at start(x) + j.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../geometry.h"
#include "kernels.h"
#include "simd.h"

namespace natten_ext::NATTEN_EXT_ISA {

// Rows that are worked on together: three of them fill 16 registers with accumulators.
constexpr int kGroup = 3;
// Blocks of queries in a strip, at most.
constexpr int64_t kStrip = 8;

using Range = ClassKeys<int64_t>;

// One axis of a class, and the window on it; positions are counted from `offset`.
struct ClassAxis {
  int64_t length = 0;
  AxisWindow window;
  int64_t offset = 0;

  bool operator==(const ClassAxis&) const = default;
  Range keys(int64_t query) const {
    if (window.sliding()) {  // spares a division
      const int64_t start = class_window_start(query + offset, length, window.kernel) - offset;
      return {start, start + window.kernel};
    }
    const Range keys = class_keys(query + offset, length, window.kernel, window.stride, window.causal);
    return {keys.start - offset, keys.end - offset};
  }
  // The queries that see any of these keys, of an axis counted from its start.
  Range attending(Range some) const {
    Range queries = some;
    while (queries.start > 0 && keys(queries.start - 1).end > some.start) --queries.start;
    while (queries.end < length && keys(queries.end).start < some.end) ++queries.end;
    return queries;
  }
};

// The part of the x axis that a job works on: the positions that it holds, numbered from zero, and which of them are
// queries that it computes and queries and keys whose results it writes. The last two begin and end at whole vectors, of
// any instruction set, or with the class.
struct Columns {
  ClassAxis axis;
  int64_t count = 0;
  Range queries{0, 0}, owned{0, 0};

  bool operator==(const Columns& other) const {
    const auto equal = [](Range a, Range b) { return a.start == b.start && a.end == b.end; };
    return axis == other.axis && count == other.count && equal(queries, other.queries) && equal(owned, other.owned);
  }
};

// How a vector of queries reads key j of its windows.
enum class Reading {
  straight,  // adjacent keys
  permuted,  // keys of one vector
  split,     // keys of two vectors
  masked,    // adjacent keys, of which some queries do not see some
  interleaved,
};

// A vector of queries: adjacent ones on the x axis, or one of each interleaved class. Places in rows are those of numbers.
template <class T>
struct QueryBlock {
  int64_t start;          // key 0 of the first query
  Reading reading;
  Integers<T> shift;      // permuted, split: where in its vector a lane finds its key
  Integers<T> second;     // split: lanes that read the second vector, all ones, which lies
  int64_t jump;           //   so far from the first
  const T* seen;          // masked: all ones where a query sees key j, [kx][lanes]
  int64_t table;          // which expanded table it uses
};

// A vector of keys, likewise: which queries attend them, as distances query - key in positions.
struct KeyBlock {
  int64_t first, count;  // distances first, first + 1, ... first + count - 1
  bool regular;          // every key is attended at all of them, by key (centre - distance) of the window
  int64_t index;         // otherwise: where its [count][lanes] positions in a row of weights begin
};

// The windows of one kernel in classes of one size. Blocks cover `padded` numbers, positions are numbered from the first one
// held.
//
// A window on the x axis has kx keys for each lane. Where windows end with their queries (causal), key j of a query is
// query - kx + 1 + j, and the first ones are none of its keys if the window is cut short; otherwise queries past the class
// repeat the last one's.
template <class T>
class ClassGeometry {
 public:
  static constexpr int L = kLanes<T>;
  // The offset of lanes past the class, and of keys that a query does not see.
  static constexpr int32_t kNoQuery = std::numeric_limits<int32_t>::min(), kNoKey = kNoQuery + 1;

  void prepare(const ClassAxis& z, const ClassAxis& y, const Columns& x, bool interleave) {
    axis_z = z, axis_y = y, columns = x, interleaved = interleave;
    step = interleaved ? L : 1;
    width = x.count, ky = y.window.kernel, kz = z.window.kernel, kx = x.axis.window.kernel;
    key_rows = kz * ky;
    ring_rows = 0;
    for (int64_t row = 0; row < y.length; ++row) {
      ring_rows = std::max(ring_rows, y.keys(std::min(row + kGroup, y.length) - 1).end - y.keys(row).start);
    }
    padded = round_up_to_lanes<T>(width * step);
    margin = interleaved ? 0 : round_up_to_lanes<T>(kx);
    row_stride = margin + padded + margin + L;
    weights_stride = kx * padded + L;
    centre = x.axis.window.causal ? kx - 1 : kx / 2;
    query_blocks.clear();
    key_blocks.clear();
    positions.clear();
    table_offsets.clear();
    for (int64_t j = 0; j < kx; ++j) table_offsets.insert(table_offsets.end(), L, static_cast<int32_t>(j - centre));
    tables = 1;
    masks = false;
    keys_.resize(width);
    for (int64_t i = x.queries.start; i < x.queries.end; ++i) keys_[i] = x.axis.keys(i);
    const int64_t of_block = L / step;
    query_blocks.resize(x.queries.start / of_block);
    for (int64_t i = x.queries.start; i < x.queries.end; i += of_block) add_query_block(i);
    fill_seen();
    key_blocks.resize(x.owned.start / of_block);
    Range queries{x.queries.start, x.queries.start};
    for (int64_t i = x.owned.start; i < x.owned.end; i += of_block) add_key_block(i, queries);
  }
  // Calls visit(begin, end) for the strips of blocks of queries that are worked on together: those that share the cache
  // lines of keys and values, or vectors of keys in the nearest cache.
  template <class Visit>
  void for_each_strip(const Visit& visit) const {
    const int64_t strip = interleaved ? kStrip : 2, end = static_cast<int64_t>(query_blocks.size());
    for (int64_t b = columns.queries.start * step / L; b < end; b += strip) visit(b, std::min(end, b + strip));
  }

  ClassAxis axis_z, axis_y;
  Columns columns;
  bool interleaved = false;
  int64_t step = 1;            // from one position to the next
  int64_t width = 0, kz = 0, ky = 0, kx = 0;
  int64_t key_rows = 0;        // rows of keys that a row of queries attends, at most
  int64_t ring_rows = 0;       // rows of keys of one plane that a group of rows attends, at most
  int64_t padded = 0, margin = 0;
  int64_t row_stride = 0;      // one channel of a row: margin, padded positions, margin
  int64_t weights_stride = 0;  // the weights of one row of queries on one row of keys: [kx][padded], then a zero
  int64_t centre = 0;          // which key of a window a query itself is, where nothing shifts it
  int64_t tables = 0;          // distinct expanded tables; number 0 is that of straight blocks amid the class
  bool masks = false;          // whether tables mask keys
  std::vector<QueryBlock<T>> query_blocks;  // those before the queries that are computed are empty
  std::vector<KeyBlock> key_blocks;         // likewise, before the keys that are owned
  std::vector<int32_t> positions;
  std::vector<int32_t> table_offsets;  // key - query of each value of a row of an expanded table, [table][kx][lanes]

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

  // Key 0 of a query.
  int64_t first_key(int64_t query) const {
    return columns.axis.window.causal ? query - kx + 1 : keys_[std::min(query, width - 1)].start;
  }

  // The block whose first query is at x.
  void add_query_block(int64_t x) {
    QueryBlock<T> block{first_key(x) * step, interleaved ? Reading::interleaved : Reading::straight, {}, {}, 0, nullptr, 0};
    for (int lane = 0; lane < L && !interleaved; ++lane) {
      const int64_t shift = first_key(x + lane) - block.start;
      block.shift[lane] = static_cast<Bits>(shift);
      if (shift != lane && block.reading == Reading::straight) block.reading = Reading::permuted;
      if (shift < L) continue;
      // Shifts grow, and where one leaves the first vector, those that follow are less than a vector further: either
      // groups of queries with one window are shorter than a vector, or no third one follows.
      if (block.jump == 0) block.jump = shift;
      block.reading = Reading::split;
      block.second[lane] = -1;
      block.shift[lane] -= static_cast<Bits>(block.jump);
    }
    std::vector<int32_t> offsets;
    for (int64_t j = 0; j < kx; ++j) {
      for (int lane = 0; lane < L; ++lane) {
        const int64_t query = interleaved ? x : x + lane, key = first_key(query) + j;
        const bool seen = query >= width || (keys_[query].start <= key && key < keys_[query].end);
        offsets.push_back(query >= width ? kNoQuery : seen ? static_cast<int32_t>(key - query) : kNoKey);
        masks = masks || !seen;
        if (!seen && key >= 0) block.reading = Reading::masked;  // margins are zero
      }
    }
    block.table = table_of(offsets);
    query_blocks.push_back(block);
  }

  // The number of the expanded table with these offsets.
  int64_t table_of(const std::vector<int32_t>& offsets) {
    for (int64_t table = 0; table < tables; ++table) {
      if (std::equal(offsets.begin(), offsets.end(), table_offsets.begin() + table * kx * L)) return table;
    }
    table_offsets.insert(table_offsets.end(), offsets.begin(), offsets.end());
    return tables++;
  }

  void fill_seen() {
    seen_.clear();
    for (int32_t offset : table_offsets) {
      const Bits bits = offset == kNoKey ? 0 : -1;
      seen_.emplace_back();
      std::memcpy(&seen_.back(), &bits, sizeof bits);
    }
    for (QueryBlock<T>& block : query_blocks) block.seen = seen_.data() + block.table * kx * L;
  }

  // `queries` are those that see key x - 1, and then those that see the block's last key.
  void add_key_block(int64_t x, Range& queries) {
    Range seen_by[L];
    int64_t first = kx, last = -kx;
    for (int lane = 0; lane < L; ++lane) {
      const int64_t key = interleaved ? x : x + lane;
      while (key < width && keys_[queries.start].end <= key) ++queries.start;
      while (queries.end < columns.queries.end && keys_[queries.end].start <= key) ++queries.end;
      seen_by[lane] = key < width ? queries : Range{0, 0};
      if (key >= width) continue;
      first = std::min(first, queries.start - key);
      last = std::max(last, queries.end - 1 - key);
    }
    const auto visit = [&](const auto& hit) {
      for (int64_t distance = first; distance <= last; ++distance) {
        for (int lane = 0; lane < L; ++lane) {
          const int64_t key = interleaved ? x : x + lane, query = key + distance;
          const bool attended = seen_by[lane].start <= query && query < seen_by[lane].end;
          hit(attended, query * step + (interleaved ? lane : 0), attended ? key - first_key(query) : 0, distance);
        }
      }
    };
    KeyBlock block{first, last - first + 1, true, static_cast<int64_t>(positions.size())};
    visit([&](bool attended, int64_t, int64_t j, int64_t distance) {
      block.regular = block.regular && attended && j == centre - distance;
    });
    if (!block.regular) {
      visit([&](bool attended, int64_t place, int64_t j, int64_t) {
        positions.push_back(static_cast<int32_t>(attended ? j * padded + place : kx * padded));
      });
    }
    key_blocks.push_back(block);
  }

  std::vector<Range> keys_;  // on the x axis
  std::vector<T> seen_;      // as table_offsets, for QueryBlock::seen
};

}  // namespace natten_ext::NATTEN_EXT_ISA
