// How neighborhood attention falls into jobs, and these into rows.
//
// A job is a band of planes and of rows of queries of one residue class of one (batch, head).
#pragma once

#include "../problem.h"
#include "neighborhood_geometry.h"

namespace natten_ext::NATTEN_EXT_ISA {

// A row of a class: its plane, and which of the plane's rows.
struct Row {
  int64_t z, y;
};

struct NeighborhoodJob {
  int64_t batch, head;
  HeadWindow window;
  int64_t residue_z, residue_y, residue_x;
  int64_t class_depth, class_height, class_width;
  Range planes, rows;  // the band

  int64_t offset(const View& v, Row row, int64_t x) const {
    return batch * v.batch + head * v.head + (row.z * window.z.dilation + residue_z) * v.z +
           (row.y * window.y.dilation + residue_y) * v.y + (x * window.x.dilation + residue_x) * v.x;
  }
  bool owns_plane(int64_t z) const { return planes.start <= z && z < planes.end; }
  bool owns_any(Row first, int64_t count) const {
    return owns_plane(first.z) && first.y < rows.end && first.y + count > rows.start;
  }
  bool owns(Row row) const { return owns_plane(row.z) && rows.start <= row.y && row.y < rows.end; }
  int64_t lse_offset(const Problem& p, Row row) const {
    const int64_t z = row.z * window.z.dilation + residue_z, y = row.y * window.y.dilation + residue_y;
    return (((batch * p.heads + head) * p.depth + z) * p.height + y) * p.width + residue_x;
  }
};

// The jobs of one head, or of any other with the same window.
class HeadJobs {
 public:
  // Bands of at most so many rows and planes, in the longest classes.
  HeadJobs(const Problem& p, int64_t head, int64_t band_rows, int64_t band_planes) : p_(p), window_(p.windows[head]) {
    const auto bands = [](int64_t length, int64_t dilation, int64_t at_most) {
      return std::max<int64_t>(1, (class_length(length, dilation, 0) + at_most - 1) / at_most);
    };
    bands_z_ = bands(p.depth, window_.z.dilation, band_planes);
    bands_y_ = bands(p.height, window_.y.dilation, band_rows);
  }
  int64_t count() const {
    return p_.batch * window_.z.dilation * window_.y.dilation * window_.x.dilation * bands_z_ * bands_y_;
  }
  NeighborhoodJob job(int64_t head, int64_t index) const {
    NeighborhoodJob job{};
    job.head = head;
    job.window = window_;
    const auto next = [&](int64_t count) {
      const int64_t result = index % count;
      index /= count;
      return result;
    };
    const int64_t band_y = next(bands_y_), band_z = next(bands_z_);
    job.residue_x = next(window_.x.dilation);
    job.residue_y = next(window_.y.dilation);
    job.residue_z = next(window_.z.dilation);
    job.batch = index;
    job.class_depth = class_length(p_.depth, window_.z.dilation, job.residue_z);
    job.class_height = class_length(p_.height, window_.y.dilation, job.residue_y);
    job.class_width = class_length(p_.width, window_.x.dilation, job.residue_x);
    job.planes = {band_z * job.class_depth / bands_z_, (band_z + 1) * job.class_depth / bands_z_};
    job.rows = {band_y * job.class_height / bands_y_, (band_y + 1) * job.class_height / bands_y_};
    return job;
  }

 private:
  const Problem& p_;
  HeadWindow window_;
  int64_t bands_z_, bands_y_;
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
