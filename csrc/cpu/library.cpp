// The `cpu` backend as torch sees it: operators on the stable ABI, which check operands, allocate results, and
// call the kernels of the best instruction set of this machine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(NATTEN_EXT_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../operators.h"
#include "kernels.h"
#include "working_memory.h"

namespace natten_ext {

#define NATTEN_EXT_DECLARE(isa)             \
  namespace isa {                           \
  void forward(const Arguments&);           \
  void backward(const Arguments&);          \
  void double_backward(const Arguments&);   \
  }
NATTEN_EXT_DECLARE(baseline)
#if defined(NATTEN_EXT_X86)
NATTEN_EXT_DECLARE(avx2)
NATTEN_EXT_DECLARE(avx512)
#endif

namespace {

using torch::stable::Tensor;

#if defined(NATTEN_EXT_X86)
// Conversions of float16, which not every compiler's __builtin_cpu_supports knows by name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct Variant {
  const char* name;
  bool supported;
  Kernels kernels;
};

// Best first. NATTEN_EXT_CPU_ISA takes a lesser one.
std::vector<Variant> variants() {
  std::vector<Variant> result;
#if defined(NATTEN_EXT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  result.push_back({"avx512", avx512, {avx512::forward, avx512::backward, avx512::double_backward}});
  result.push_back({"avx2", avx2, {avx2::forward, avx2::backward, avx2::double_backward}});
#endif
  result.push_back({"baseline", true, {baseline::forward, baseline::backward, baseline::double_backward}});
  return result;
}

Variant best_variant() {
  const char* wanted = std::getenv("NATTEN_EXT_CPU_ISA");
  std::string known;
  for (const Variant& v : variants()) {
    if (wanted == nullptr || *wanted == '\0' ? v.supported : wanted == std::string(v.name)) {
      if (!v.supported) throw std::runtime_error(std::string("NATTEN_EXT_CPU_ISA: this machine has no ") + v.name);
      return v;
    }
    known += std::string(known.empty() ? "" : ", ") + v.name;
  }
  throw std::runtime_error(std::string("NATTEN_EXT_CPU_ISA must be one of ") + known + ", got " + wanted);
}

// Not a local static of type Variant: its guard would stay taken in a process forked while another thread makes it.
const Variant& variant() {
  static std::atomic<const Variant*> chosen{nullptr};
  const Variant* best = chosen.load(std::memory_order_acquire);
  if (best == nullptr) {
    best = new Variant(best_variant());
    chosen.store(best, std::memory_order_release);  // of several threads one prevails, all with equal values
  }
  return *best;
}

// Asks the system for huge pages: results are written at once, and a small page costs a fault each.
void prefer_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kAtLeast = uintptr_t(1) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  if (end - begin < kAtLeast) return;
  const uintptr_t first = begin / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: it may well be refused
#endif
}

struct CpuBackend {
  const char* device = "the CPU";
  bool holds(const Tensor& t) const { return t.is_cpu(); }
  bool takes(DType) const { return true; }
  void allocated(Tensor& t) const { prefer_huge_pages(t); }
  void forward(const Arguments& a) const { variant().kernels.forward(a); }
  void backward(const Arguments& a) const { variant().kernels.backward(a); }
  void double_backward(const Arguments& a) const { variant().kernels.double_backward(a); }
};

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                   std::vector<int64_t> neighborhood, bool l2, double scale) {
  return operators::forward(CpuBackend{}, query, key, value, bias, neighborhood, l2, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                                                    std::optional<Tensor> bias, Tensor output, Tensor lse,
                                                    std::vector<int64_t> neighborhood, bool l2, double scale,
                                                    int64_t needs) {
  return operators::backward(CpuBackend{}, grad_output, query, key, value, bias, output, lse, neighborhood, l2, scale,
                             needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    std::optional<Tensor> cot_query, std::optional<Tensor> cot_key, std::optional<Tensor> cot_value,
    std::optional<Tensor> cot_bias, Tensor grad_output, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> bias, Tensor output, Tensor lse, std::vector<int64_t> neighborhood, bool l2, double scale,
    int64_t needs) {
  return operators::double_backward(CpuBackend{}, cot_query, cot_key, cot_value, cot_bias, grad_output, query, key,
                                    value, bias, output, lse, neighborhood, l2, scale, needs);
}

std::string instruction_set() { return variant().name; }

void release_working_memory() { BlockCache::instance().release(); }

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_tasks(int64_t count, void (*worker)(void*, int64_t (*)(void*), void*), void* context) {
  struct Queue {
    std::atomic<int64_t> next{0};
    int64_t count;
  } queue{{0}, count};
  const auto next = [](void* opaque) -> int64_t {
    Queue& q = *static_cast<Queue*>(opaque);
    const int64_t index = q.next.fetch_add(1, std::memory_order_relaxed);
    return index < q.count ? index : -1;
  };
  const int64_t threads = std::min(count, thread_count());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(context, next, &queue);
  });
}

}  // namespace natten_ext

STABLE_TORCH_LIBRARY(natten_ext_cpu, m) {
  natten_ext::operators::define(m);
  m.def("instruction_set() -> str");
  m.def("release_working_memory() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(natten_ext_cpu, CompositeExplicitAutograd, m) {
  m.impl("forward", TORCH_BOX(&natten_ext::forward));
  m.impl("backward", TORCH_BOX(&natten_ext::backward));
  m.impl("double_backward", TORCH_BOX(&natten_ext::double_backward));
  m.impl("instruction_set", TORCH_BOX(&natten_ext::instruction_set));
  m.impl("release_working_memory", TORCH_BOX(&natten_ext::release_working_memory));
}
