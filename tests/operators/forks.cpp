// Forks while two threads take and give working memory. Prints how many children of how many did not end.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "../../csrc/cpu/working_memory.h"

int main() {
  constexpr int kForks = 400;
  std::atomic<bool> stop{false};
  const auto work = [&] {
    while (!stop.load(std::memory_order_relaxed)) natten_ext::Buffer<float> buffer(64);
  };
  std::thread first(work), second(work);
  int hung = 0;
  for (int i = 0; i < kForks; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // ends a child that hangs, with a signal
      { natten_ext::Buffer<float> buffer(64); }
      natten_ext::BlockCache::instance().release();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    hung += !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    if (hung > 2) break;  // enough to know
  }
  stop = true;
  first.join();
  second.join();
  std::printf("%d of %d\n", hung, kForks);
}
