// The `cuda` backend as torch sees it: the operators, and the way from their arguments to launches. The emulator's
// library is this file too, on CPU tensors and with a few operators of its own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../operators.h"
#include "calls.h"

namespace natten_ext::cuda {
namespace {

#if defined(NATTEN_EXT_EMULATOR)

// What the largest consumer GPUs give a block, so that tests see the smallest pieces; or what tests ask for.
int emulated_shared_limit = 99 * 1024, emulated_table_blocks = kTableBlocks;

Context context_of(const Tensor&) { return {emulated_shared_limit, emulated_table_blocks, nullptr, {}, {}}; }

int shared_limit_of(int64_t) { return emulated_shared_limit; }

bool on_device(const Tensor& t) { return t.is_cpu(); }
void poison(Tensor& t) { std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size()); }
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
};

#else

int shared_limit_of(int64_t device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device)),
        "shared memory of the GPU");
  return limit;
}

Context context_of(const Tensor& like) {
  const int device = like.get_device_index();
  const int limit = shared_limit_of(device);
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("natten_ext: torch gave no current CUDA stream");
  }
  return {limit, kTableBlocks, stream, {}};
}

bool on_device(const Tensor& t) { return t.is_cuda(); }
void poison(Tensor&) {}
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceScope(const Tensor& t) : guard(t.get_device_index()) {}
};

// Compute capabilities that the kernels are compiled for, as "80:90".
#define NATTEN_EXT_TEXT(x) #x
#define NATTEN_EXT_TEXT_OF(x) NATTEN_EXT_TEXT(x)
std::string capabilities() { return NATTEN_EXT_TEXT_OF(NATTEN_EXT_CAPABILITIES); }

#endif

// Bytes of shared memory that blocks of all orders need at least for heads of a dtype, and those that a GPU gives.
std::tuple<int64_t, int64_t> shared_memory(std::string dtype, int64_t head_dim, int64_t device) {
  const DType type = dtype == "float16" ? DType::float16 : dtype == "bfloat16" ? DType::bfloat16
                     : dtype == "float32" ? DType::float32 : DType::float64;
  return {least_shared_memory(type, static_cast<int>(head_dim)), shared_limit_of(device)};
}

struct CudaBackend {
  const DeviceScope scope;
  const Tensor like;
  const bool tf32;
  const char* device =
#if defined(NATTEN_EXT_EMULATOR)
      "the CPU, where CUDA is emulated";
#else
      "a CUDA device";
#endif

  CudaBackend(const Tensor& query, bool tf32) : scope(query), like(query), tf32(tf32) {}

  bool holds(const Tensor& t) const { return on_device(t) && t.get_device_index() == like.get_device_index(); }
  void allocated(Tensor& t) const { poison(t); }

  void forward(const Arguments& a) const { call(launch_forward, a); }
  void backward(const Arguments& a) const { call(launch_backward, a); }
  void double_backward(const Arguments& a) const { call(launch_double_backward, a); }

 private:
  void call(void (*launch)(const Arguments&, bool, Context&), const Arguments& a) const {
    std::vector<Tensor> workspace;  // torch gives its memory to nothing else before the launches are done
    Context context = context_of(like);
    context.new_memory = [&](size_t bytes) {
      workspace.push_back(new_result(like, {static_cast<int64_t>(bytes)}, torch::headeronly::ScalarType::Byte));
      return workspace.back().mutable_data_ptr();
    };
    launch(a, tf32, context);
  }
};

#if defined(NATTEN_EXT_EMULATOR)
void configure(int64_t order, std::string dropped_site, int64_t shared_limit, int64_t table_blocks) {
  emulator::configure(static_cast<int>(order), dropped_site);
  emulated_shared_limit = static_cast<int>(shared_limit);
  emulated_table_blocks = static_cast<int>(table_blocks);
}
std::string sites() { return emulator::sites(); }
#endif

}  // namespace
}  // namespace natten_ext::cuda

STABLE_TORCH_LIBRARY(natten_ext_cuda, m) {
  m.def("interface() -> int");
  m.def("shared_memory(str dtype, int head_dim, int device) -> (int, int)");
#if defined(NATTEN_EXT_EMULATOR)
  m.def("configure(int order, str dropped_site, int shared_limit, int table_blocks) -> ()");
  m.def("sites() -> str");
#else
  m.def("capabilities() -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(natten_ext_cuda, CompositeExplicitAutograd, m) {
  m.impl("shared_memory", TORCH_BOX(&natten_ext::cuda::shared_memory));
  natten_ext::Operators<natten_ext::cuda::CudaBackend, bool>::implement(m, "_kernels");
#if defined(NATTEN_EXT_EMULATOR)
  m.impl("configure", TORCH_BOX(&natten_ext::cuda::configure));
  m.impl("sites", TORCH_BOX(&natten_ext::cuda::sites));
#else
  m.impl("capabilities", TORCH_BOX(&natten_ext::cuda::capabilities));
#endif
}
