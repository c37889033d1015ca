// Working memory of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace natten_ext {

// Freed blocks of one thread, kept for its next calls. The allocator would give them back to the system, which then
// hands them out page by page, at a fault each: up to half of the time of a small problem.
class BlockCache {
 public:
  static constexpr size_t kKeepAtMost = size_t(16) << 20;

  static BlockCache& of_this_thread() {
    thread_local BlockCache cache;
    return cache;
  }
  // A cache-line aligned block of at least `bytes`, which becomes the block's true size.
  void* take(size_t& bytes) {
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
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  // Keeps a block, and frees the oldest where there are too many.
  void give(void* data, size_t bytes) noexcept {
    if (bytes > kKeepAtMost || blocks_.size() == blocks_.capacity()) {
      std::free(data);
      return;
    }
    blocks_.push_back({data, bytes});
    kept_ += bytes;
    size_t oldest = 0;
    for (; kept_ > kKeepAtMost; ++oldest) {
      std::free(blocks_[oldest].data);
      kept_ -= blocks_[oldest].bytes;
    }
    blocks_.erase(blocks_.begin(), blocks_.begin() + static_cast<std::ptrdiff_t>(oldest));
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  BlockCache() { blocks_.reserve(128); }  // so that giving back never allocates
  BlockCache(const BlockCache&) = delete;
  ~BlockCache() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

// An array of one thread, uninitialised and cache-line aligned.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : bytes_((static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64) {
    if (bytes_ > 0) data_ = static_cast<T*>(BlockCache::of_this_thread().take(bytes_));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) BlockCache::of_this_thread().give(data_, bytes_);
  }
  T* data() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace natten_ext
