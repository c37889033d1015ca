// How neighborhood attention falls into jobs, and these into rows.
//
// A job is a band of planes and of rows of queries of one residue class of one (batch, head), or of as many interleaved ones
// as a vector has lanes; where rows are long, a part of these rows. Where heads share a key head, jobs of the gradient orders
// are of all of them, which take turns at each group of rows.
#pragma once

#include <optional>
#include <vector>

#include "../problem.h"
#include "cost.h"
#include "neighborhood_geometry.h"

namespace natten_ext::NATTEN_EXT_ISA {

// A row of a class: its plane, and which of the plane's rows.
struct Row {
  int64_t z, y;
};

// One residue class of one (batch, head).
struct HeadClass {
  int64_t batch, head, key_head;      // of several heads that share a key head the first, or the one whose turn it is
  int64_t first_z, first_y, first_x;  // its first position on the map; on the x axis, the first one held
};

struct NeighborhoodJob {
  static constexpr int kMaxLanes = 16;

  HeadClass classes[kMaxLanes];  // the one, or one per lane; lanes from `count` on compute what no-one reads
  int64_t count;
  bool interleaved;
  HeadWindow window;
  int64_t class_depth, class_height;
  Range planes, rows;  // the band
  Columns columns;

  const HeadClass& first() const { return classes[0]; }
  int64_t offset(const View& v, Row row, int64_t x, int64_t which = 0) const {
    const HeadClass& c = classes[which];
    return c.batch * v.batch + (v.of_keys ? c.key_head : c.head) * v.head + (row.z * window.z.dilation + c.first_z) * v.z +
           (row.y * window.y.dilation + c.first_y) * v.y + (x * window.x.dilation + c.first_x) * v.x;
  }
  // Of the lanes of block b of a row of a tensor, and how far apart blocks are.
  template <int L>
  void lane_offsets(const View& v, Row row, int64_t b, int64_t (&offsets)[L]) const {
    const int64_t first = interleaved ? 0 : offset(v, row, b * L);
    for (int64_t lane = 0; lane < L; ++lane) {
      offsets[lane] = interleaved ? offset(v, row, b, lane) : first + lane * window.x.dilation * v.x;
    }
  }
  template <int L>
  int64_t block_step(const View& v) const { return window.x.dilation * v.x * (interleaved ? 1 : L); }
  // How many of them hold a position that someone reads.
  template <int L>
  int64_t lanes(int64_t b) const { return interleaved ? count : std::min<int64_t>(L, columns.count - b * L); }
  // The blocks of some positions.
  template <int L>
  Range blocks(Range positions) const {
    return interleaved ? positions : Range{positions.start / L, (positions.end + L - 1) / L};
  }
  bool owns_plane(int64_t z) const { return planes.start <= z && z < planes.end; }
  bool owns_any(Row first, int64_t count) const {
    return owns_plane(first.z) && first.y < rows.end && first.y + count > rows.start;
  }
  // A block of queries.
  template <int L>
  bool owns(Row row, int64_t b) const {
    const int64_t x = interleaved ? b : b * L;
    return owns_plane(row.z) && rows.start <= row.y && row.y < rows.end && columns.owned.start <= x && x < columns.owned.end;
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
// An order of differentiation. `whole`: a job computes all queries that see its keys.
struct NeighborhoodOrder {
  OrderCost cost;
  ColumnMemory memory;
  bool whole;
};
constexpr NeighborhoodOrder kForward{kForwardCost, {2, 0}, false}, kTangent{kTangentCost, {4, 0}, false};
constexpr NeighborhoodOrder kBackward{kBackwardCost, {4, 2}, true}, kDoubleBackward{kDoubleBackwardCost, {6, 3}, true};

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

// How classes of one window fall into bands and parts.
struct BandSizes {
  bool whole;
  int64_t rows, planes;         // at most so many, in the longest classes
  double column_bytes;          // what a job holds per position
  int64_t least_columns = 128;  // of a part
};
template <class T>
BandSizes band_sizes(const Problem& p, HeadRange heads, const NeighborhoodOrder& order) {
  const double bytes = order.memory.bytes(p, p.windows[heads.first], sizeof(T));
  return order.whole ? BandSizes{true, 64, 64, bytes} : BandSizes{false, 32, 1, bytes};
}

class ClassBands {
 public:
  ClassBands(const Problem& p, const HeadWindow& window, const BandSizes& sizes) : p_(p), window_(window), whole_(sizes.whole) {
    const auto bands = [](int64_t length, int64_t dilation, int64_t at_most) {
      return std::max<int64_t>(1, (class_length(length, dilation, 0) + at_most - 1) / at_most);
    };
    bands_z_ = bands(p.depth, window_.z.dilation, sizes.planes);
    bands_y_ = bands(p.height, window_.y.dilation, sizes.rows);
    // Parts are of one length, but for the last.
    const int64_t shortest = class_length(p.width, window_.x.dilation, window_.x.dilation - 1);
    const int64_t together = positions_together(sizes.column_bytes, sizes.least_columns);
    part_ = std::max(together / kAlignment * kAlignment, aligned(2 * window_.x.kernel));
    parts_ = std::max<int64_t>(1, shortest / part_);
  }
  // Jobs of a class.
  int64_t count() const { return bands_z_ * bands_y_ * parts_; }
  // One of them, of classes that are set.
  void finish(NeighborhoodJob& job, int64_t index) const {
    const int64_t band_y = index % bands_y_, band_z = index / bands_y_ % bands_z_, part = index / bands_y_ / bands_z_;
    job.window = window_;
    job.class_depth = class_length(p_.depth, window_.z.dilation, job.first().first_z);
    job.class_height = class_length(p_.height, window_.y.dilation, job.first().first_y);
    job.planes = {band_z * job.class_depth / bands_z_, (band_z + 1) * job.class_depth / bands_z_};
    job.rows = {band_y * job.class_height / bands_y_, (band_y + 1) * job.class_height / bands_y_};
    const ClassAxis axis{class_length(p_.width, window_.x.dilation, job.first().first_x), window_.x};
    const int64_t first = choose_columns(axis, part, job.columns);
    for (HeadClass& c : job.classes) c.first_x += first * window_.x.dilation;
  }

 private:
  static constexpr int64_t kAlignment = NeighborhoodJob::kMaxLanes;
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

// The jobs of one head, or of any other with the same window, each of one class.
class HeadJobs {
 public:
  HeadJobs(const Problem& p, int64_t head, const BandSizes& sizes) : p_(p), window_(p.windows[head]), bands_(p, window_, sizes) {}
  int64_t count() const {
    return p_.batch * window_.z.dilation * window_.y.dilation * window_.x.dilation * bands_.count();
  }
  NeighborhoodJob job(int64_t head, int64_t index) const {
    NeighborhoodJob job{};
    job.count = 1;
    HeadClass& c = job.classes[0];
    c.head = head;
    c.key_head = head / p_.shared();
    const int64_t within = index % bands_.count();
    index /= bands_.count();
    c.first_x = index % window_.x.dilation;
    index /= window_.x.dilation;
    c.first_y = index % window_.y.dilation;
    index /= window_.y.dilation;
    c.first_z = index % window_.z.dilation;
    c.batch = index / window_.z.dilation;
    bands_.finish(job, within);
    return job;
  }

 private:
  const Problem& p_;
  HeadWindow window_;
  ClassBands bands_;
};

// The jobs of heads with one window, each of as many classes of one shape as there are lanes. Heads vary fastest, then
// residues: adjacent lanes read adjacent memory.
class InterleavedJobs {
 public:
  InterleavedJobs(const Problem& p, HeadRange heads, int64_t lanes, const BandSizes& sizes)
      : p_(p), heads_(heads), window_(p.windows[heads.first]), lanes_(lanes), bands_(p, window_, sizes) {
    for (const Range z : residues(p.depth, window_.z.dilation)) {
      for (const Range y : residues(p.height, window_.y.dilation)) {
        for (const Range x : residues(p.width, window_.x.dilation)) {
          groups_ += groups({z, y, x, 0});
          shapes_.push_back({z, y, x, groups_});
        }
      }
    }
  }
  int64_t count() const { return groups_ * bands_.count(); }
  // The share of the lanes that have a class.
  double filled() const {
    int64_t classes = 0;
    for (const Shape& shape : shapes_) classes += this->classes(shape);
    return static_cast<double>(classes) / static_cast<double>(groups_ * lanes_);
  }
  NeighborhoodJob job(int64_t index) const {
    NeighborhoodJob job{};
    job.interleaved = true;
    const int64_t group = index / bands_.count();
    const Shape* shape = shapes_.data();
    while (shape->end <= group) ++shape;
    const int64_t first = (group - shape->end + groups(*shape)) * lanes_;
    job.count = std::min(lanes_, classes(*shape) - first);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      // Lanes without a class repeat the first one, of the head whose turn it is: tables depend on the first head alone.
      job.classes[lane] = head_class(*shape, lane < job.count ? first + lane : first);
      job.classes[lane].head = job.classes[lane].key_head = heads_.first + (first + lane) % heads_.count();
    }
    bands_.finish(job, index % bands_.count());
    return job;
  }

 private:
  // Residues of classes of one length on each axis, and one past the last group of such classes.
  struct Shape {
    Range z, y, x;
    int64_t end;
  };

  static std::vector<Range> residues(int64_t length, int64_t dilation) {
    const int64_t longer = length % dilation;
    if (longer == 0) return {{0, dilation}};
    return {{0, longer}, {longer, dilation}};
  }
  int64_t classes(const Shape& s) const {
    return p_.batch * (s.z.end - s.z.start) * (s.y.end - s.y.start) * (s.x.end - s.x.start) * heads_.count();
  }
  int64_t groups(const Shape& s) const { return (classes(s) + lanes_ - 1) / lanes_; }
  HeadClass head_class(const Shape& s, int64_t index) const {
    const auto next = [&](Range range) {
      const int64_t result = range.start + index % (range.end - range.start);
      index /= range.end - range.start;
      return result;
    };
    HeadClass c{};
    c.head = c.key_head = next({heads_.first, heads_.last});
    c.first_x = next(s.x), c.first_y = next(s.y), c.first_z = next(s.z);
    c.batch = index;
    return c;
  }

  const Problem& p_;
  const HeadRange heads_;
  HeadWindow window_;
  int64_t lanes_, groups_ = 0;
  ClassBands bands_;
  std::vector<Shape> shapes_;
};

// The jobs of interleaved classes, if there are enough of them to fill vectors and to keep threads busy. Where jobs compute
// whole rows of queries, the gradients of tables depend on the layout, so the choice must not depend on the threads.
//
// What such a job holds per position is as many times more as there are lanes: its parts are shorter, and where queries of
// adjacent bands and parts are computed twice, rows and bands are not cut for it.
template <class T>
std::optional<InterleavedJobs> interleaved_jobs(const Problem& p, HeadRange heads, const NeighborhoodOrder& order, int64_t threads = 1) {
  const AxisWindow& x = p.windows[heads.first].x;
  if (p.shared() > 1 || x.causal) return {};
  BandSizes sizes = band_sizes<T>(p, heads, order);
  sizes.column_bytes *= kLanes<T>;
  sizes.least_columns = 32;
  if (sizes.whole) {
    const int64_t length = class_length(p.width, x.dilation, 0);
    if (length > 512 || static_cast<double>(length) * sizes.column_bytes > 2 * kCache) return {};
    sizes.least_columns = length;
  }
  for (;; sizes.rows /= 2) {
    const InterleavedJobs jobs(p, heads, kLanes<T>, sizes);
    if (jobs.filled() < 0.75) return {};
    if (jobs.count() >= (sizes.whole ? 8 : threads)) return jobs;
    if (sizes.whole) return {};
    // Interleaved, half as many threads are as fast.
    if (sizes.rows <= 8) return 2 * jobs.count() >= threads ? std::optional(jobs) : std::nullopt;
  }
}

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
