// How neighborhood attention falls into jobs, and these into rows.
//
// A job is a band of planes and of rows of queries of one residue class of one (batch, head); where rows are long, a part of
// these rows. Where heads share a key head, jobs of the gradient orders are of all of them, which take turns at each group
// of rows.
#pragma once

#include "../problem.h"
#include "cost.h"
#include "neighborhood_geometry.h"

namespace natten_ext::NATTEN_EXT_ISA {

// A row of a class: its plane, and which of the plane's rows.
struct Row {
  int64_t z, y;
};

struct NeighborhoodJob {
  int64_t batch, head, key_head;  // of several heads the first, or the one whose turn it is
  HeadWindow window;
  int64_t first_z, first_y, first_x;  // the class's first position on the map; on the x axis, the first one held
  int64_t class_depth, class_height;
  Range planes, rows;  // the band
  Columns columns;

  int64_t offset(const View& v, Row row, int64_t x) const {
    return batch * v.batch + (v.of_keys ? key_head : head) * v.head + (row.z * window.z.dilation + first_z) * v.z +
           (row.y * window.y.dilation + first_y) * v.y + (x * window.x.dilation + first_x) * v.x;
  }
  bool owns_plane(int64_t z) const { return planes.start <= z && z < planes.end; }
  bool owns_any(Row first, int64_t count) const {
    return owns_plane(first.z) && first.y < rows.end && first.y + count > rows.start;
  }
  // A block of queries at x.
  bool owns(Row row, int64_t x) const {
    return owns_plane(row.z) && rows.start <= row.y && row.y < rows.end && columns.owned.start <= x && x < columns.owned.end;
  }
  int64_t lse_offset(const Problem& p, Row row) const {
    const int64_t z = row.z * window.z.dilation + first_z, y = row.y * window.y.dilation + first_y;
    return (((batch * p.heads + head) * p.depth + z) * p.height + y) * p.width + first_x;
  }
};

// What a job of an order holds for each of its columns: of so many tensors the rows of keys that a group of rows attends, and
// so many weights of each query of a group and each of its keys.
struct ColumnMemory {
  int64_t tensors, weights;

  double bytes(const Problem& p, const HeadWindow& window, int64_t value_bytes) const {
    const int64_t rows = std::min(window.y.kernel + kGroup - 1, class_length(p.height, window.y.dilation, 0));
    const int64_t keys = window.z.kernel * window.y.kernel * window.x.kernel;
    return static_cast<double>(value_bytes * (tensors * window.z.kernel * rows * p.head_dim + weights * kGroup * keys));
  }
};
constexpr ColumnMemory kForwardMemory{2, 0}, kTangentMemory{4, 0}, kBackwardMemory{4, 2}, kDoubleBackwardMemory{6, 3};

// Nanoseconds of all heads with one window.
template <class T>
double neighborhood_cost(const Problem& p, HeadRange heads, const OrderCost& order) {
  const HeadWindow& window = p.windows[heads.first];
  const int64_t queries = p.batch * heads.count() * p.queries();
  const auto attention = [&](int64_t keys) {
    return Attention{double(queries), double(keys), double(p.head_dim), kLanes<T>, sizeof(T)};
  };
  const int64_t keys_of_query = window.z.kernel * window.y.kernel * window.x.kernel;
  return attention(keys_of_query).scores(order.products) + attention(queries).rows(order.tensors);
}

// The jobs of one head, or of any other with the same window.
class HeadJobs {
 public:
  // Bands of at most so many rows and planes, in the longest classes. `whole`: a job computes all queries that see its keys.
  HeadJobs(const Problem& p, int64_t head, int64_t band_rows, int64_t band_planes, bool whole, double column_bytes)
      : p_(p), window_(p.windows[head]), whole_(whole) {
    const auto bands = [](int64_t length, int64_t dilation, int64_t at_most) {
      return std::max<int64_t>(1, (class_length(length, dilation, 0) + at_most - 1) / at_most);
    };
    bands_z_ = bands(p.depth, window_.z.dilation, band_planes);
    bands_y_ = bands(p.height, window_.y.dilation, band_rows);
    // Parts are of one length, but for the last.
    const int64_t shortest = class_length(p.width, window_.x.dilation, window_.x.dilation - 1);
    part_ = std::max(positions_together(column_bytes) / kAlignment * kAlignment, aligned(2 * window_.x.kernel));
    parts_ = std::max<int64_t>(1, shortest / part_);
  }
  int64_t count() const {
    return p_.batch * window_.z.dilation * window_.y.dilation * window_.x.dilation * bands_z_ * bands_y_ * parts_;
  }
  NeighborhoodJob job(int64_t head, int64_t index) const {
    NeighborhoodJob job{};
    job.head = head;
    job.key_head = head / p_.shared();
    job.window = window_;
    const auto next = [&](int64_t count) {
      const int64_t result = index % count;
      index /= count;
      return result;
    };
    const int64_t band_y = next(bands_y_), band_z = next(bands_z_), part = next(parts_);
    job.first_x = next(window_.x.dilation);
    job.first_y = next(window_.y.dilation);
    job.first_z = next(window_.z.dilation);
    job.batch = index;
    job.class_depth = class_length(p_.depth, window_.z.dilation, job.first_z);
    job.class_height = class_length(p_.height, window_.y.dilation, job.first_y);
    job.planes = {band_z * job.class_depth / bands_z_, (band_z + 1) * job.class_depth / bands_z_};
    job.rows = {band_y * job.class_height / bands_y_, (band_y + 1) * job.class_height / bands_y_};
    const ClassAxis axis{class_length(p_.width, window_.x.dilation, job.first_x), window_.x};
    const int64_t first = choose_columns(axis, part, job.columns);
    job.first_x += first * window_.x.dilation;
    return job;
  }

 private:
  static constexpr int64_t kAlignment = 16;  // lanes of the longest vector
  static int64_t aligned(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

  // Returns the first position that is held.
  int64_t choose_columns(const ClassAxis& axis, int64_t part, Columns& columns) const {
    const auto widened = [&](Range r) {
      return Range{r.start / kAlignment * kAlignment, std::min(aligned(r.end), axis.length)};
    };
    const Range owned{part * part_, part + 1 < parts_ ? (part + 1) * part_ : axis.length};
    const Range queries = whole_ ? widened(axis.attending(owned)) : owned;
    const Range held = widened({std::min(queries.start, axis.keys(queries.start).start),
                                std::max(queries.end, axis.keys(queries.end - 1).end)});
    columns.axis = axis;
    columns.count = held.end - held.start;
    columns.queries = {queries.start - held.start, queries.end - held.start};
    columns.owned = {owned.start - held.start, owned.end - held.start};
    // Parts amid a class get one geometry: the borders are brought as near as they make no difference.
    const int64_t stride = axis.window.stride, far = axis.window.kernel + stride;
    const int64_t moved = held.start > far ? (held.start - far) / stride * stride : 0;
    columns.axis.offset = held.start - moved;
    columns.axis.length = std::min(axis.length - moved, columns.axis.offset + columns.count + 2 * far);
    return held.start;
  }

  const Problem& p_;
  HeadWindow window_;
  const bool whole_;
  int64_t bands_z_, bands_y_, part_, parts_;
};

// Blocks of queries that are worked on together: they share the cache lines of keys and values.
constexpr int64_t kStrip = 2;

// Up to kGroup adjacent rows of queries of a plane, and the rows of keys that they attend: in each of the planes those of
// a box. Rows of one plane are named by their y.
struct RowGroup {
  template <class T>
  RowGroup(const ClassGeometry<T>& g, int64_t z, int64_t y, int64_t end)
      : z(z), y(y), count(static_cast<int>(std::min<int64_t>(kGroup, end - y))), planes(g.axis_z.keys(z)) {
    for (int r = 0; r < count; ++r) keys[r] = g.axis_y.keys(y + r);
  }
  Row row(int r) const { return {z, y + r}; }
  int64_t first() const { return keys[0].start; }
  int64_t last() const { return keys[count - 1].end; }  // one past
  bool attends(int r, int64_t key) const { return keys[r].start <= key && key < keys[r].end; }
  // The rows of queries that attend a row of keys are adjacent: [first, last).
  int first_attending(int64_t key) const {
    int r = 0;
    while (r < count && !attends(r, key)) ++r;
    return r;
  }
  int last_attending(int64_t key) const {
    int r = count;
    while (r > 0 && !attends(r - 1, key)) --r;
    return r;
  }
  // Rows of keys that row r attends in a plane, and in all.
  int64_t rows(int r) const { return keys[r].end - keys[r].start; }
  int64_t key_rows(int r) const { return (planes.end - planes.start) * rows(r); }
  // Where a row of keys stands among those.
  int64_t place(int r, Row key) const { return (key.z - planes.start) * rows(r) + key.y - keys[r].start; }

  int64_t z, y;
  int count;
  Range planes;
  Range keys[kGroup];  // rows of keys of each row of queries
};

// Calls visit(row) for each row of keys that a group attends.
template <class Visit>
NATTEN_EXT_INLINE void for_each_key_row(const RowGroup& group, const Visit& visit) {
  for (int64_t z = group.planes.start; z < group.planes.end; ++z) {
    for (int64_t y = group.first(); y < group.last(); ++y) visit(Row{z, y});
  }
}

}  // namespace natten_ext::NATTEN_EXT_ISA
