// The entry points of each instruction set's variant.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace natten_ext {

struct Kernels {
  void (*forward)(const Arguments&);
  void (*backward)(const Arguments&);
  void (*double_backward)(const Arguments&);
};

// Calls the worker once on each of torch's threads; next(queue) gives it indices below count, each once, then -1.
void parallel_tasks(int64_t count, void (*worker)(void* context, int64_t (*next)(void*), void* queue), void* context);

// How many threads that is at most.
int64_t thread_count();

}  // namespace natten_ext
