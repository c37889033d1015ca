// natten_ext._C: what is not a tensor operator. Depends on the Python version, unlike the kernels' libraries.
#include <pybind11/pybind11.h>

#include <string>

#include "geometry.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the C++ geometry functions of natten_ext.";
  m.def("window_start", &natten_ext::window_start, py::arg("index"), py::arg("length"), py::arg("kernel"),
        py::arg("dilation"), "First key of a query's window on one axis; the twin of natten_ext.geometry.window_start.");
  m.def("class_length", &natten_ext::class_length, py::arg("length"), py::arg("dilation"), py::arg("residue"),
        "Positions of an axis in one residue class modulo the dilation.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = NATTEN_EXT_VERSION;
        info["compiler"] = __VERSION__;
        info["torch"] = NATTEN_EXT_BUILT_WITH_TORCH;
        info["instruction_sets"] = NATTEN_EXT_INSTRUCTION_SETS;
        return info;
      },
      "Version, compiler, the torch whose headers were used, and the instruction sets compiled for.");
}
