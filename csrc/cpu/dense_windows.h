// What a mask can't keep apart: small classes of neighborhood attention go the way of the windows where the products of
// the dense kernels would carry NaN and infinity out of them (0 times infinity is NaN).
#pragma once

#include <optional>

#include "dense.h"
#include "neighborhood_jobs.h"

namespace natten_ext::NATTEN_EXT_ISA {

template <class T, class Windows>
class WindowsInstead {
 public:
  WindowsInstead(const Arguments& a, const DensePlan<T>& plan) : a_(a), plan_(plan) {}

  // Partial gradients of the tables of the jobs that follow, which are added to.
  void start(const PartialTables<T>& partial) {
    partial_ = partial;
    started_ = false;
  }
  void finish() {
    if (started_) windows_->finish();
  }
  // Runs a job, of so many heads with one key head, if its operands ask for it, else returns false.
  bool run(const DenseJob& job, int64_t heads = 1) {
    if (!plan_.masked || moderate(job, heads)) return false;
    if (!windows_) windows_.emplace(a_);
    if constexpr (requires { windows_->start(partial_, job.head); }) {
      if (!started_) windows_->start(partial_, job.head);
      started_ = true;
    }
    NeighborhoodJob windows{};
    windows.classes[0] = {job.batch, job.head, job.key_head, job.z0, job.y0, job.x0};
    windows.count = 1;
    windows.window = plan_.head_window();
    windows.class_depth = plan_.window_z, windows.class_height = plan_.window_y;
    windows.planes = {0, plan_.window_z}, windows.rows = {0, plan_.window_y};
    const Range all{0, plan_.window_x};
    windows.columns = {{plan_.window_x, windows.window.x}, plan_.window_x, all, all};
    windows_->run(windows);
    return true;
  }

 private:
  bool moderate(const DenseJob& job, int64_t heads) const {
    for (int64_t head = job.head; head < job.head + heads; ++head) {
      if (!moderate(job.of_head(head))) return false;
    }
    return true;
  }
  bool moderate(const DenseJob& job) const {
    Vector<T> strange{};
    for (const View* v : {&a_.query, &a_.key, &a_.value, &a_.output, &a_.grad_output, &a_.cot_query, &a_.cot_key,
                          &a_.cot_value}) {
      if (!*v || (v == &a_.output && !a_.grad_output)) continue;  // the forward has yet to write its output
      RowCursor row(*v, job, plan_.window_x, 0);
      for (int64_t r = 0; r < plan_.queries; ++r, ++row) {
        look_for_large<T>(strange, *v, row.offset, plan_.channels);
      }
    }
    if (a_.grad_lse) {
      RowCursor row(a_.grad_lse, job, plan_.window_x, 0);
      for (int64_t r = 0; r < plan_.queries; ++r, ++row) look_for_large<T>(strange, a_.grad_lse, row.offset, 1);
    }
    return horizontal_sum<T>(strange) == 0;
  }

  const Arguments& a_;
  const DensePlan<T>& plan_;
  std::optional<Windows> windows_;
  PartialTables<T> partial_;
  bool started_ = false;
};

}  // namespace natten_ext::NATTEN_EXT_ISA
