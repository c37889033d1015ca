// The `cpu` backend: the operators of operators.h, with the kernels of the best instruction set of this machine.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(NATTEN_EXT_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "../operators.h"
#include "kernels.h"
#include "working_memory.h"

namespace natten_ext {

#define NATTEN_EXT_DECLARE(isa)                                   \
  namespace isa {                                                 \
  void forward(const Arguments&);                                 \
  void backward(const Arguments&);                                \
  void double_backward(const Arguments&);                         \
  constexpr Kernels kernels{forward, backward, double_backward};  \
  }
NATTEN_EXT_DECLARE(baseline)
#if defined(NATTEN_EXT_X86)
NATTEN_EXT_DECLARE(avx2)
NATTEN_EXT_DECLARE(avx512)
#endif

namespace {

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
  result.push_back({"avx512", avx512, avx512::kernels});
  result.push_back({"avx2", avx2, avx2::kernels});
#endif
  result.push_back({"baseline", true, baseline::kernels});
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
  explicit CpuBackend(const Tensor&) {}
  const char* device = "the CPU";
  bool holds(const Tensor& t) const { return t.is_cpu(); }
  void allocated(Tensor& t) const { prefer_huge_pages(t); }
  void forward(const Arguments& a) const { variant().kernels.forward(a); }
  void backward(const Arguments& a) const { variant().kernels.backward(a); }
  void double_backward(const Arguments& a) const { variant().kernels.double_backward(a); }
};

std::string instruction_set() { return variant().name; }

std::string build_information(std::string name) {
  if (name == "version") return NATTEN_EXT_VERSION;
  if (name == "compiler") return __VERSION__;
  if (name == "torch") return NATTEN_EXT_BUILT_WITH_TORCH;
  if (name == "instruction_sets") return NATTEN_EXT_INSTRUCTION_SETS;
  throw std::runtime_error("name must be version, compiler, torch or instruction_sets, got " + name);
}

void release_working_memory() { BlockCache::instance().release(); }

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_tasks(int64_t count, int64_t threads, void (*worker)(void*, int64_t (*)(void*), void*), void* context) {
  struct Queue {
    std::atomic<int64_t> next{0};
    int64_t count;
  } queue{{0}, count};
  const auto next = [](void* opaque) -> int64_t {
    Queue& q = *static_cast<Queue*>(opaque);
    const int64_t index = q.next.fetch_add(1, std::memory_order_relaxed);
    return index < q.count ? index : -1;
  };
  threads = std::min(count, threads);
  if (threads == 1) return worker(context, next, &queue);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(context, next, &queue);
  });
}

}  // namespace natten_ext

STABLE_TORCH_LIBRARY(natten_ext_cpu, m) {
  m.def("interface() -> int");
  m.def("instruction_set() -> str");
  m.def("build_information(str name) -> str");
  m.def("release_working_memory() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(natten_ext_cpu, CompositeExplicitAutograd, m) {
  natten_ext::Operators<natten_ext::CpuBackend>::implement(m);
  m.impl("instruction_set", TORCH_BOX(&natten_ext::instruction_set));
  m.impl("build_information", TORCH_BOX(&natten_ext::build_information));
  m.impl("release_working_memory", TORCH_BOX(&natten_ext::release_working_memory));
}
