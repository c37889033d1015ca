// A stack to run a function on, and the switch between two of them. On x86-64 the switch saves only what a call
// preserves; elsewhere it is ucontext's, which is slower.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <new>

namespace natten_ext::emulator {

#if defined(__x86_64__)
extern "C" void natten_ext_switch_stacks(void** save, void* load);
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_ != nullptr) munmap(stack_, kStack);
  }

  // Makes the next switch here call `function`, which never returns.
  void start(void (*function)()) {
    if (stack_ == nullptr) {
      stack_ = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack_ == MAP_FAILED) throw std::bad_alloc();
    }
#if defined(__x86_64__)
    // As a call would leave it: six saved registers, the return address, and a stack that is 8 modulo 16 on entry.
    auto** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStack) - 1;
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, function, 0);
#endif
  }

  // Leaves this fiber, which is the running one, for `other`.
  void switch_to(Fiber& other) {
#if defined(__x86_64__)
    natten_ext_switch_stacks(&pointer_, other.pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

 private:
  static constexpr size_t kStack = 256 * 1024;
  void* stack_ = nullptr;
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl natten_ext_switch_stacks
.hidden natten_ext_switch_stacks
.type natten_ext_switch_stacks, @function
natten_ext_switch_stacks:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size natten_ext_switch_stacks, .-natten_ext_switch_stacks
)");
#endif

}  // namespace natten_ext::emulator
