// Working memory of the kernels.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace natten_ext {

// Freed blocks, kept for the next calls. The allocator would give them back to the system, which then hands them out
// page by page, at a fault each: up to half of the time of a small problem.
//
// Threads have shelves of their own: one lock for all took longer than the work of a small problem.
//
// A process may fork while another of its threads is in here. That thread does not exist in the child, so the forking
// thread holds the locks over the fork.
class BlockCache {
 public:
  static BlockCache& instance() { return *instance_; }
  // A cache-line aligned block of at least `bytes`, which becomes the block's true size.
  void* take(size_t& bytes) {
    if (void* kept = mine().take(bytes)) return kept;
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  // Keeps a block, unless too many are kept already.
  void give(void* data, size_t bytes) noexcept {
    if (!mine().give(data, bytes)) std::free(data);
  }
  // Frees all that is kept.
  void release() noexcept {
    for (Shelf& shelf : shelves_) shelf.release();
  }

 private:
  class alignas(128) Shelf {
   public:
    Shelf() { blocks_.reserve(kBlocks); }  // so that giving back never allocates
    // Null if no block fits.
    void* take(size_t& bytes) {
      const std::lock_guard<std::mutex> lock(mutex);
      size_t best = blocks_.size();
      for (size_t i = 0; i < blocks_.size(); ++i) {
        const size_t size = blocks_[i].bytes;
        if (size >= bytes && size <= 2 * bytes && (best == blocks_.size() || size < blocks_[best].bytes)) best = i;
      }
      if (best == blocks_.size()) return nullptr;
      const Block block = blocks_[best];
      blocks_[best] = blocks_.back();
      blocks_.pop_back();
      kept_ -= block.bytes;
      bytes = block.bytes;
      return block.data;
    }
    bool give(void* data, size_t bytes) noexcept {
      const std::lock_guard<std::mutex> lock(mutex);
      if (kept_ + bytes > kBytes || blocks_.size() == kBlocks) return false;
      blocks_.push_back({data, bytes});
      kept_ += bytes;
      return true;
    }
    void release() noexcept {
      const std::lock_guard<std::mutex> lock(mutex);
      for (const Block& block : blocks_) std::free(block.data);
      blocks_.clear();
      kept_ = 0;
    }

    std::mutex mutex;

   private:
    static constexpr size_t kBytes = size_t(16) << 20, kBlocks = 64;

    struct Block {
      void* data;
      size_t bytes;
    };
    std::vector<Block> blocks_;
    size_t kept_ = 0;
  };

  BlockCache() : shelves_(std::max(1u, std::thread::hardware_concurrency())) {
    pthread_atfork([] { instance_->lock_all(); }, [] { instance_->unlock_all(); }, [] { instance_->unlock_all(); });
  }
  // A thread's own, which later threads share where there are more of them than cores.
  Shelf& mine() {
    static std::atomic<size_t> threads{0};
    thread_local const size_t number = threads.fetch_add(1, std::memory_order_relaxed);
    return shelves_[number % shelves_.size()];
  }
  void lock_all() {
    for (Shelf& shelf : shelves_) shelf.mutex.lock();
  }
  void unlock_all() {
    for (Shelf& shelf : shelves_) shelf.mutex.unlock();
  }

  // Made when the library is loaded, not by the first call, which a fork may interrupt. Never destroyed: threads may
  // still run when the process ends.
  static BlockCache* const instance_;

  std::vector<Shelf> shelves_;
};

inline BlockCache* const BlockCache::instance_ = new BlockCache;

// An array of one thread, uninitialised and cache-line aligned.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : bytes_((static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64) {
    if (bytes_ > 0) data_ = static_cast<T*>(BlockCache::instance().take(bytes_));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) BlockCache::instance().give(data_, bytes_);
  }
  T* data() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace natten_ext
