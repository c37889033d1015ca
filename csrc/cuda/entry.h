// What calls.h calls: one function per kernel, on the host.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../problem.h"
#include "params.h"

namespace natten_ext::cuda {

// Few enough blocks that their partial sums of tables stay small. The number does not depend on the GPU, so neither do
// the sums.
constexpr int kTableBlocks = 2048;

// Where a launch goes, and what it may touch.
struct Context {
  int shared_limit;  // bytes of shared memory that a block may have
  int table_blocks;  // blocks of a launch with a table gradient, at most
  void* stream;
  std::function<void*(size_t bytes)> new_memory;  // of the device, which lives until the launches are done
#if defined(NATTEN_EXT_EMULATOR)
  std::vector<emulator::MemoryRange> memory;
#endif

  void* allocate(size_t bytes) {
    void* data = new_memory(bytes);
#if defined(NATTEN_EXT_EMULATOR)
    std::memset(data, 0xff, bytes);
    memory.push_back({data, bytes, true});
#endif
    return data;
  }
};

#if !defined(NATTEN_EXT_EMULATOR)
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of a launch is reported once
  throw std::runtime_error(std::string("natten_ext: ") + what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}
#endif

// One order each, or one side of it: query-centred kernels write what belongs to queries and the table's gradient,
// key-centred ones what belongs to keys. `General`: see ParamsOf.
template <class M, bool General> void forward(const Params&, const std::vector<WindowOf<General>>&, Context&);
template <class M, bool General> void backward_query(const Params&, const std::vector<WindowOf<General>>&, Context&);
template <class M, bool General> void backward_key(const Params&, const std::vector<WindowOf<General>>&, Context&);
template <class M, bool General> void double_backward_query(const Params&, const std::vector<WindowOf<General>>&, Context&);
template <class M, bool General> void double_backward_key(const Params&, const std::vector<WindowOf<General>>&, Context&);

// The same for windows of 7 x 7 keys in half precision. They return the heads that are left to the other's own kernel.
template <class M> std::vector<HeadRange> narrow_forward(const Params&, const std::vector<Window>&, Context&);
template <class M> std::vector<HeadRange> narrow_backward_query(const Params&, const std::vector<Window>&, Context&);
template <class M> std::vector<HeadRange> narrow_backward_key(const Params&, const std::vector<Window>&, Context&);
template <class M> std::vector<HeadRange> narrow_double_backward_query(const Params&, const std::vector<Window>&, Context&);
template <class M> std::vector<HeadRange> narrow_double_backward_key(const Params&, const std::vector<Window>&, Context&);
// The same for grids of 16 x 16 windows: whether they took all of it. Derivatives are both sides.
template <class M> bool grid_forward(const Params&, const std::vector<Window>&, Context&);
template <class M> bool grid_backward(const Params&, const std::vector<Window>&, Context&);
template <class M> bool grid_backward_takes(const Params&, const std::vector<Window>&, const Context&);
template <class M> bool grid_wide_backward(const Params&, const std::vector<Window>&, Context&);
template <class M> bool grid_wide_backward_takes(const Params&, const std::vector<Window>&, const Context&);
template <class M> bool grid_double_backward(const Params&, const std::vector<Window>&, Context&);
template <class M> bool grid_double_backward_takes(const Params&, const std::vector<Window>&, const Context&);
template <class M> bool grid_double_backward_key(const Params&, const std::vector<Window>&, Context&);
template <class M> bool grid_double_backward_key_takes(const Params&, const std::vector<Window>&, const Context&);
// The same for short sequences. The double backward is both sides, too.
template <class M> bool short_forward(const Params&, Context&);
template <class M> bool short_backward(const Params&, Context&);
template <class M> bool short_backward_takes(const Params&, const Context&);
template <class M> bool short_double_backward(const Params&, Context&);
template <class M> bool short_double_backward_takes(const Params&, const Context&);
template <class M> constexpr bool kHasNarrow = M::kTensor && sizeof(typename M::Element) == 2;

// Bytes of shared memory that a block of an order needs at least.
template <class M, bool General> uint32_t forward_shared(int head_dim);
template <class M, bool General> uint32_t backward_shared(int head_dim);
template <class M, bool General> uint32_t double_backward_shared(int head_dim);

}  // namespace natten_ext::cuda
