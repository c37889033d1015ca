// natten_ext._C: the geometry of the kernels and the cost model of the CPU's, for tests. Depends on the Python version, unlike the kernels'
// libraries, so only checkouts have it.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "cpu/cost.h"
#include "geometry.h"

namespace py = pybind11;

namespace {

void require(bool condition, const char* rule) {
  if (!condition) throw std::invalid_argument(rule);
}

std::pair<int64_t, int64_t> axis_keys(int64_t index, int64_t length, int64_t kernel, int64_t dilation, int64_t stride,
                                      bool causal) {
  require(index >= 0 && index < length, "index must be from 0 to length - 1");
  require(kernel >= 1 && dilation >= 1 && kernel <= length / dilation, "kernel * dilation must be from 1 to length");
  require(stride >= 1 && stride <= kernel, "stride must be from 1 to kernel");
  const natten_ext::ClassKeys<int64_t> keys = natten_ext::axis_keys(index, length, {kernel, dilation, stride, causal});
  return {keys.start, keys.end};
}

int64_t class_length(int64_t length, int64_t dilation, int64_t residue) {
  require(dilation >= 1 && dilation <= length, "dilation must be from 1 to length");
  require(residue >= 0 && residue < dilation, "residue must be from 0 to dilation - 1");
  return natten_ext::class_length(length, dilation, residue);
}

int64_t jobs_to_split(int64_t jobs, double whole, double of_queries, double of_keys, int64_t query_pieces,
                      int64_t key_pieces, int64_t threads) {
  return natten_ext::jobs_to_split(jobs, {whole, of_queries, of_keys, query_pieces, key_pieces}, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Functions of natten_ext's C++ sources.";
  m.def("axis_keys", &axis_keys, py::arg("index"), py::arg("length"), py::arg("kernel"), py::arg("dilation"),
        py::arg("stride") = 1, py::arg("causal") = false,
        "Keys of a query on one axis, from the first to before the second, a dilation apart; the twin of"
        " natten_ext.geometry.AxisWindow.keys. Raises ValueError.");
  m.def("class_length", &class_length, py::arg("length"), py::arg("dilation"), py::arg("residue"),
        "Positions of an axis in one residue class modulo the dilation. Raises ValueError.");
  m.def("worthwhile_threads", &natten_ext::worthwhile_threads, py::arg("nanoseconds"), py::arg("threads"));
  m.def("jobs_per_task", &natten_ext::jobs_per_task, py::arg("job"), py::arg("jobs"), py::arg("threads"));
  m.def("blocks_per_task", &natten_ext::blocks_per_task, py::arg("jobs"), py::arg("blocks"), py::arg("block"),
        py::arg("again"), py::arg("threads"));
  m.def("jobs_to_split", &jobs_to_split, py::arg("jobs"), py::arg("whole"), py::arg("of_queries"), py::arg("of_keys"),
        py::arg("query_pieces"), py::arg("key_pieces"), py::arg("threads"));
  m.def("positions_together", &natten_ext::positions_together, py::arg("bytes"), py::arg("least"));
}
