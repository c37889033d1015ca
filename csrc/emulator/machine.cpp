#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>

#include "fiber.h"

namespace natten_ext::emulator {
namespace {

constexpr int kLanes = 32;
constexpr uint32_t kCell = 2;  // bytes per cell of the record of accesses: the smallest element
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format

enum class State { ready, at_barrier, at_collective, ended };

struct Copy {
  uint32_t destination, bytes;
  const void* source;
  bool valid;
};

struct Thread {
  Fiber fiber;
  State state;
  Place place;
  std::vector<std::vector<Copy>> groups;  // asynchronous copies, oldest group first; the last is still open
  Site waits_at;
};

struct WarpState {
  WarpOperation operation;
  void* operands[kLanes];
  int arrived;
  uint32_t syncs;  // sync_warp calls passed: they order memory inside the warp
};

// Last accesses of one cell of shared memory. Readers: a thread, several of one warp, or of several warps.
struct Cell {
  uint32_t write_epoch, write_syncs, read_epoch, read_syncs;
  int writer, reader_warp, reader;  // -1: none; reader -2 and reader_warp -2: several
  bool copy_under_way;
};

struct Machine {
  std::mutex mutex;
  Launch launch;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<WarpState> warps;
  Fiber scheduler;
  Thread* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  uint32_t epoch = 0;  // barriers passed by the block
  uint32_t vote_epoch[2];  // of the last votes in even and odd epochs, and whether any thread was for it
  bool vote[2];
  std::string failure;
  int order = 0;
  std::string dropped_site;
  std::set<std::pair<const char*, uint32_t>> sites;
} m;

std::string name_of(const std::string& file, uint32_t line) {
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(line);
}
std::string name_of(const Site& site) { return name_of(site.file_name(), site.line()); }

void pause() { m.current->fiber.switch_to(m.scheduler); }

// Ends the launch from a fiber.
void fail(const std::string& what, const Site& site) {
  const Place& p = m.current->place;
  m.failure = "emulator: " + what + " at " + name_of(site) + " (thread " + std::to_string(p.thread) + " of block " +
              std::to_string(p.block_x) + ", " + std::to_string(p.block_y) + ")";
  while (true) pause();
}

void thread_main() {
  (*m.kernel)();
  for (const auto& group : m.current->groups) {
    if (!group.empty()) fail("a thread ended with asynchronous copies under way", Site::current());
  }
  m.current->state = State::ended;
  while (true) pause();
}

WarpState& warp_of(int thread) { return m.warps[thread / kLanes]; }

// Notes a barrier or wait, and tells whether a test leaves it out.
bool dropped(const Site& site) {
  m.sites.insert({site.file_name(), site.line()});
  return !m.dropped_site.empty() && name_of(site) == m.dropped_site;
}

void check_shared(uint32_t address, uint32_t bytes, const Site& site) {
  if (address % bytes != 0) fail("misaligned access of shared memory (" + std::to_string(bytes) + " bytes at " + std::to_string(address) + ")", site);
  if (address + bytes > m.shared.size() || address + bytes < address) {
    fail("shared memory access out of bounds (" + std::to_string(address) + " of " + std::to_string(m.shared.size()) + " bytes)", site);
  }
}

void check_global(const void* address, uint32_t bytes, bool write, const Site& site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("misaligned access of global memory", site);
  const auto* p = static_cast<const unsigned char*>(address);
  for (const MemoryRange& range : m.launch.memory) {
    const auto* begin = static_cast<const unsigned char*>(range.begin);
    if (p >= begin && p + bytes <= begin + range.bytes && (range.written || !write)) return;
  }
  fail(std::string("global memory ") + (write ? "write" : "read") + " out of bounds", site);
}

// Whether sync_warp stands between an access of `other` with `syncs` and now.
bool ordered(int other, uint32_t syncs) {
  const int me = m.current->place.thread;
  return other / kLanes == me / kLanes && syncs < warp_of(me).syncs;
}

std::string who(int thread) { return thread < 0 ? "several threads" : "thread " + std::to_string(thread); }

void note_read(uint32_t address, uint32_t bytes, const Site& site) {
  const int me = m.current->place.thread;
  const uint32_t syncs = warp_of(me).syncs;
  for (uint32_t i = address / kCell; i < (address + bytes + kCell - 1) / kCell; ++i) {
    Cell& c = m.cells[i];
    if (c.copy_under_way) fail("shared memory read while an asynchronous copy to it is under way", site);
    if (c.writer >= 0 && c.writer != me && c.write_epoch == m.epoch && !ordered(c.writer, c.write_syncs)) {
      fail("race: shared memory read at byte " + std::to_string(address) + " with no barrier after a write of " + who(c.writer), site);
    }
    // Reads of the same warp before its last sync_warp need no memory of their own.
    if (c.read_epoch != m.epoch || c.reader == -1 || (c.reader_warp == me / kLanes && c.read_syncs < syncs)) {
      c.reader = me, c.reader_warp = me / kLanes;
    } else if (c.reader != me) {
      c.reader = -2;
      if (c.reader_warp != me / kLanes) c.reader_warp = -2;
    }
    c.read_epoch = m.epoch, c.read_syncs = syncs;
  }
}

void note_write(uint32_t address, uint32_t bytes, const Site& site) {
  const int me = m.current->place.thread;
  const uint32_t syncs = warp_of(me).syncs;
  for (uint32_t i = address / kCell; i < (address + bytes + kCell - 1) / kCell; ++i) {
    Cell& c = m.cells[i];
    if (c.copy_under_way) fail("shared memory written while an asynchronous copy to it is under way", site);
    if (c.writer >= 0 && c.writer != me && c.write_epoch == m.epoch && !ordered(c.writer, c.write_syncs)) {
      fail("race: shared memory written at byte " + std::to_string(address) + " with no barrier after a write of " + who(c.writer), site);
    }
    const bool read_by_others = c.reader != -1 && c.read_epoch == m.epoch && c.reader != me;
    if (read_by_others && !(c.reader_warp == me / kLanes && c.read_syncs < syncs)) {
      fail("race: shared memory written at byte " + std::to_string(address) + " with no barrier after a read of " + who(c.reader), site);
    }
    c.writer = me, c.write_epoch = m.epoch, c.write_syncs = syncs;
  }
}

void prepare_block(int block_x, int block_y) {
  std::fill(m.shared.begin(), m.shared.end(), kPoison);
  std::fill(m.cells.begin(), m.cells.end(), Cell{0, 0, 0, 0, -1, -1, -1, false});
  for (WarpState& warp : m.warps) warp = WarpState{};
  for (int i = 0; i < m.launch.threads; ++i) {
    Thread& t = *m.threads[i];
    t.state = State::ready;
    t.place = {i, block_x, block_y, m.launch.grid_x, m.launch.threads};
    t.groups.assign(1, {});
    t.fiber.start(thread_main);
  }
  m.epoch = 0;
  m.vote[0] = m.vote[1] = false;
  m.vote_epoch[0] = m.vote_epoch[1] = 0;
}

int count(State state) {
  return static_cast<int>(std::count_if(m.threads.begin(), m.threads.begin() + m.launch.threads,
                                        [&](const auto& t) { return t->state == state; }));
}

void run_warp(int warp) {
  bool ran = true;
  while (ran && m.failure.empty()) {
    ran = false;
    for (int lane = 0; lane < kLanes && m.failure.empty(); ++lane) {
      const int i = warp * kLanes + lane;
      if (m.threads[i]->state != State::ready) continue;
      m.current = m.threads[i].get();
      m.scheduler.switch_to(m.current->fiber);
      ran = true;
    }
  }
}

void run_block(int block_x, int block_y) {
  prepare_block(block_x, block_y);
  const int warps = m.launch.threads / kLanes;
  while (true) {
    for (int w = 0; w < warps && m.failure.empty(); ++w) run_warp(m.order ? warps - 1 - w : w);
    if (!m.failure.empty()) return;
    const int waiting = count(State::at_barrier), ended = count(State::ended), stuck = count(State::at_collective);
    if (ended == m.launch.threads) return;
    if (stuck > 0 || ended > 0) {
      m.failure = "emulator: deadlock in block " + std::to_string(block_x) + ", " + std::to_string(block_y) + ": " +
                  std::to_string(waiting) + " threads wait at a barrier, " + std::to_string(stuck) +
                  " for the rest of their warp, " + std::to_string(ended) + " have ended";
      for (const auto& t : m.threads) {
        if (t->state != State::at_barrier && t->state != State::at_collective) continue;
        m.failure += "; the first waits at " + name_of(t->waits_at);
        break;
      }
      return;
    }
    ++m.epoch;
    for (const auto& t : m.threads) t->state = State::ready;
  }
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
  const std::lock_guard lock(m.mutex);
  if (launch.threads % kLanes != 0) throw std::runtime_error("emulator: the block is no multiple of a warp");
  m.launch = launch;
  m.kernel = &kernel;
  m.failure.clear();
  m.shared.resize(launch.shared_bytes);
  m.cells.resize((launch.shared_bytes + kCell - 1) / kCell);
  m.warps.resize(launch.threads / kLanes);
  m.threads.resize(std::min<size_t>(m.threads.size(), launch.threads));
  while (static_cast<int>(m.threads.size()) < launch.threads) m.threads.push_back(std::make_unique<Thread>());
  for (int y = 0; y < launch.grid_y; ++y) {
    for (int x = 0; x < launch.grid_x; ++x) {
      run_block(x, y);
      if (!m.failure.empty()) throw std::runtime_error(m.failure);
    }
  }
}

void configure(int order, const std::string& dropped_site) {
  const std::lock_guard lock(m.mutex);
  m.order = order;
  m.dropped_site = dropped_site;
}

std::string sites() {
  const std::lock_guard lock(m.mutex);
  std::string lines;
  for (const auto& [file, line] : m.sites) lines += name_of(file, line) + "\n";
  m.sites.clear();
  return lines;
}

const Place& place() { return m.current->place; }

void read_shared(uint32_t address, void* value, uint32_t bytes, const Site& site) {
  check_shared(address, bytes, site);
  note_read(address, bytes, site);
  std::memcpy(value, m.shared.data() + address, bytes);
}

void write_shared(uint32_t address, const void* value, uint32_t bytes, const Site& site) {
  check_shared(address, bytes, site);
  note_write(address, bytes, site);
  std::memcpy(m.shared.data() + address, value, bytes);
}

void read_global(const void* address, void* value, uint32_t bytes, const Site& site) {
  check_global(address, bytes, false, site);
  std::memcpy(value, address, bytes);
}

void write_global(void* address, const void* value, uint32_t bytes, const Site& site) {
  check_global(address, bytes, true, site);
  std::memcpy(address, value, bytes);
}

void copy_async(uint32_t destination, const void* source, uint32_t bytes, bool valid, const Site& site) {
  check_shared(destination, bytes, site);
  if (valid) check_global(source, bytes, false, site);
  note_write(destination, bytes, site);
  for (uint32_t i = destination / kCell; i < (destination + bytes) / kCell; ++i) m.cells[i].copy_under_way = true;
  m.current->groups.back().push_back({destination, bytes, source, valid});
}

void copy_async_commit() { m.current->groups.emplace_back(); }

void copy_async_wait(int pending, const Site& site) {
  if (dropped(site)) return;
  auto& groups = m.current->groups;
  const uint32_t syncs = warp_of(m.current->place.thread).syncs;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(m.shared.data() + copy.destination, copy.source, copy.bytes);
      else std::memset(m.shared.data() + copy.destination, 0, copy.bytes);
      for (uint32_t i = copy.destination / kCell; i < (copy.destination + copy.bytes) / kCell; ++i) {
        m.cells[i].copy_under_way = false;
        m.cells[i].write_epoch = m.epoch, m.cells[i].write_syncs = syncs;
      }
    }
    groups.erase(groups.begin());
  }
}

void wait_for_block(const Site& site) {
  m.current->state = State::at_barrier;
  m.current->waits_at = site;
  pause();
}

void sync_block(const Site& site) {
  if (!dropped(site)) wait_for_block(site);
}

bool any_in_block(bool condition, const Site& site) {
  const int mine = m.epoch % 2;  // who passes the barrier first may vote again before others have read
  if (m.vote_epoch[mine] != m.epoch) m.vote[mine] = false;
  m.vote_epoch[mine] = m.epoch;
  m.vote[mine] |= condition;
  wait_for_block(site);
  return m.vote[mine];
}

void sync_warp(const Site& site) {
  if (dropped(site)) return;
  collective([](void* const*) { ++warp_of(m.current->place.thread).syncs; }, nullptr, site);
}

void collective(WarpOperation operation, void* operands, const Site& site) {
  Thread& me = *m.current;
  WarpState& warp = warp_of(me.place.thread);
  if (warp.arrived > 0 && warp.operation != operation) {
    fail("lanes of a warp are at different operations", site);
  }
  warp.operation = operation;
  warp.operands[me.place.thread % kLanes] = operands;
  if (++warp.arrived < kLanes) {
    me.state = State::at_collective;
    me.waits_at = site;
    pause();
    return;
  }
  operation(warp.operands);
  warp.arrived = 0;
  const int first = me.place.thread / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) m.threads[first + lane]->state = State::ready;
}

}  // namespace natten_ext::emulator
