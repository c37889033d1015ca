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

// Calls the worker once on each of so many of torch's threads (on the calling one alone if that is 1); next(queue) gives it
// indices below count, each once, then -1.
void parallel_tasks(int64_t count, int64_t threads, void (*worker)(void* context, int64_t (*next)(void*), void* queue),
                    void* context);

// How many threads that is at most.
int64_t thread_count();

}  // namespace natten_ext
