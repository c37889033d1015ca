// Small kernels with one mistake each, to see that the emulator finds it: `faults NAME` prints what it says.
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/arch.h"

using namespace natten_ext::cuda;

namespace {

alignas(16) float source[64];
alignas(16) float result[64];

void none() {
  copy_async<16>(16 * thread_index(), source + 4 * (thread_index() % 16), true);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  store_global(result + thread_index(), load_shared<float>(4 * (63 - thread_index())));
}
void no_wait() {
  copy_async<16>(16 * thread_index(), source, true);
  copy_async_commit();
  sync_block();
  store_global(result + thread_index(), load_shared<float>(16 * thread_index()));
}
void wait_for_too_few() {
  copy_async<16>(16 * thread_index(), source, true);
  copy_async_commit();
  copy_async_wait<1>();
  store_global(result + thread_index(), load_shared<float>(16 * thread_index()));
}
void never_waited() {
  copy_async<16>(16 * thread_index(), source, true);
  copy_async_commit();
}
void no_barrier() {
  store_shared(4 * thread_index(), 1.0f);
  store_global(result + thread_index(), load_shared<float>(4 * (63 - thread_index())));
}
void no_barrier_before_a_write() {
  store_shared(4 * thread_index(), 1.0f);
  sync_block();
  load_shared<float>(4 * (63 - thread_index()));
  store_shared(4 * thread_index(), 2.0f);
}
void two_writers() { store_shared(4 * (thread_index() % 32), 1.0f); }
void no_warp_barrier() {
  store_shared(4 * thread_index(), 1.0f);
  load_shared<float>(4 * (thread_index() ^ 1));
}
void warp_barrier_between_warps() {
  store_shared(4 * thread_index(), 1.0f);
  sync_warp();
  load_shared<float>(4 * (63 - thread_index()));
}
void divergent_barrier() {
  if (thread_index() < 32) sync_block();
}
void divergent_shuffle() {
  if (thread_index() % 2) shuffle(1.0f, 0);
}
void mixed_collectives() {
  if (thread_index() % 2) shuffle(1.0f, 0);
  else any_in_warp(true);
}
void shared_out_of_bounds() { store_shared(1024 + 4 * thread_index(), 1.0f); }
void shared_misaligned() { load_shared<float>(4 * thread_index() + 2); }
void global_out_of_bounds() { load_global(source + 64 + thread_index()); }
void global_misaligned() {
  load_global(reinterpret_cast<const float*>(reinterpret_cast<const char*>(source) + 2));
}
void global_read_only() { store_global(source + thread_index(), 1.0f); }
void poison() {
  const float value = load_shared<float>(4 * thread_index());
  if (!std::isnan(value)) throw std::logic_error("shared memory was not poisoned");
  store_global(result + thread_index(), value);
}

const std::map<std::string, void (*)()> kernels = {
#define NAMED(name) {#name, name}
    NAMED(none), NAMED(no_wait), NAMED(wait_for_too_few), NAMED(never_waited), NAMED(no_barrier),
    NAMED(no_barrier_before_a_write), NAMED(two_writers), NAMED(no_warp_barrier), NAMED(warp_barrier_between_warps),
    NAMED(divergent_barrier), NAMED(divergent_shuffle), NAMED(mixed_collectives), NAMED(shared_out_of_bounds),
    NAMED(shared_misaligned), NAMED(global_out_of_bounds), NAMED(global_misaligned), NAMED(global_read_only),
    NAMED(poison),
};

}  // namespace

int main(int, char** arguments) {
  try {
    natten_ext::emulator::run({2, 1, 64, 1024, {{source, sizeof(source), false}, {result, sizeof(result), true}}},
                              kernels.at(arguments[1]));
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
