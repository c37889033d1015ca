// Working memory of the kernels.
#pragma once

#include <pthread.h>

#include <algorithm>
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
// A process may fork while another of its threads is in here. That thread does not exist in the child, so the forking
// thread holds the lock over the fork.
class BlockCache {
 public:
  static BlockCache& instance() { return *instance_; }
  // A cache-line aligned block of at least `bytes`, which becomes the block's true size.
  void* take(size_t& bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      size_t best = blocks_.size();
      for (size_t i = 0; i < blocks_.size(); ++i) {
        const size_t size = blocks_[i].bytes;
        if (size >= bytes && size <= 2 * bytes && (best == blocks_.size() || size < blocks_[best].bytes)) best = i;
      }
      if (best < blocks_.size()) {
        const Block block = blocks_[best];
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
        kept_ -= block.bytes;
        bytes = block.bytes;
        return block.data;
      }
    }
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  // Keeps a block, unless too many are kept already.
  void give(void* data, size_t bytes) noexcept {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (kept_ + bytes <= keep_at_most_ && blocks_.size() < blocks_.capacity()) {
        blocks_.push_back({data, bytes});
        kept_ += bytes;
        return;
      }
    }
    std::free(data);
  }
  // Frees all that is kept.
  void release() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    kept_ = 0;
  }

 private:
  static constexpr size_t kPerThread = size_t(16) << 20, kBlocksPerThread = 32;

  struct Block {
    void* data;
    size_t bytes;
  };

  BlockCache() {
    const size_t threads = std::max(1u, std::thread::hardware_concurrency());
    keep_at_most_ = threads * kPerThread;
    blocks_.reserve(threads * kBlocksPerThread);  // so that giving back never allocates
    pthread_atfork([] { instance_->mutex_.lock(); }, [] { instance_->mutex_.unlock(); }, [] { instance_->mutex_.unlock(); });
  }

  // Made when the library is loaded, not by the first call, which a fork may interrupt. Never destroyed: threads may
  // still run when the process ends.
  static BlockCache* const instance_;

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t kept_ = 0, keep_at_most_ = 0;
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
