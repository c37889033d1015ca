// natten_ext._C: the geometry of the kernels, for tests to compare. Depends on the Python version, unlike the kernels'
// libraries, so only checkouts have it.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "geometry.h"

namespace py = pybind11;

namespace {

void require(bool condition, const char* rule) {
  if (!condition) throw std::invalid_argument(rule);
}

int64_t window_start(int64_t index, int64_t length, int64_t kernel, int64_t dilation) {
  require(index >= 0 && index < length, "index must be from 0 to length - 1");
  require(kernel >= 1 && dilation >= 1 && kernel <= length / dilation, "kernel * dilation must be from 1 to length");
  return natten_ext::window_start(index, length, kernel, dilation);
}

int64_t class_length(int64_t length, int64_t dilation, int64_t residue) {
  require(dilation >= 1 && dilation <= length, "dilation must be from 1 to length");
  require(residue >= 0 && residue < dilation, "residue must be from 0 to dilation - 1");
  return natten_ext::class_length(length, dilation, residue);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ geometry functions of natten_ext.";
  m.def("window_start", &window_start, py::arg("index"), py::arg("length"), py::arg("kernel"), py::arg("dilation"),
        "First key of a query's window on one axis; the twin of natten_ext.geometry.window_start. Raises ValueError.");
  m.def("class_length", &class_length, py::arg("length"), py::arg("dilation"), py::arg("residue"),
        "Positions of an axis in one residue class modulo the dilation. Raises ValueError.");
}
