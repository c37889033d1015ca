// A block of CUDA threads on the host: one fiber per thread, scheduled until all wait at a barrier or have ended.
// Everything a GPU leaves undefined is an error here that names the place: see docs/cuda.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace natten_ext::emulator {

using Site = std::source_location;

// Global memory that a launch may touch.
struct MemoryRange {
  const void* begin;
  size_t bytes;
  bool written;
};

struct Launch {
  int grid_x, grid_y, threads;
  uint32_t shared_bytes;
  std::vector<MemoryRange> memory;
};

// Runs `kernel` once per thread of the grid. Throws std::runtime_error with what went wrong, and where.
void run(const Launch& launch, const std::function<void()>& kernel);

// Settings for tests. `order`: 0 runs the warps of a block ascending, 1 descending. `dropped_site`: a barrier or wait
// ("file:line") that is left out. `sites`: the barriers and waits passed since the last call, one per line.
void configure(int order, const std::string& dropped_site);
std::string sites();

// ---- what device.h calls, on a fiber

struct Place {
  int thread, block_x, block_y, grid_x, threads;
};
const Place& place();

void read_shared(uint32_t address, void* value, uint32_t bytes, const Site& site);
void write_shared(uint32_t address, const void* value, uint32_t bytes, const Site& site);
void read_global(const void* address, void* value, uint32_t bytes, const Site& site);
void write_global(void* address, const void* value, uint32_t bytes, const Site& site);
void copy_async(uint32_t destination, const void* source, uint32_t bytes, bool valid, const Site& site);
void copy_async_commit();
void copy_async_wait(int pending, const Site& site);
void sync_block(const Site& site);
void sync_warp(const Site& site);
bool any_in_block(bool condition, const Site& site);

// Waits for all lanes of the warp to arrive with operands for the same operation; then it is done once for all.
using WarpOperation = void (*)(void* const* operands);
void collective(WarpOperation operation, void* operands, const Site& site);

}  // namespace natten_ext::emulator
