// Large outputs whose memory is kept for the next one.
//
// A fresh block is mapped page by page when it is first written, and given back when its tensor
// dies: for 134 MB that takes longer than a loss and its gradient. So one block that became free is
// kept, the largest, of at most LARGEST bytes; a loop that makes one such output after another
// writes to the same memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace smb {

constexpr size_t PAGE = size_t{2} << 20;       // a huge page; smaller outputs are left to torch
constexpr size_t LARGEST = size_t{256} << 20;  // larger ones too

struct Block {
  void* start = nullptr;
  size_t size = 0;
};

class Kept {
 public:
  Block take(size_t size) {
    const Block found = swap({});
    if (found.size >= size && found.size <= 2 * size) {
      return found;
    }
    if (found.size > size) {
      give(found);  // a small output must not hold a large block
    } else {
      std::free(found.start);
    }
    const Block fresh{std::aligned_alloc(PAGE, size), size};
    TORCH_CHECK(fresh.start != nullptr, "no memory for ", size, " bytes");
#ifdef __linux__
    madvise(fresh.start, size, MADV_HUGEPAGE);
#endif
    return fresh;
  }

  void give(Block block) {
    const Block other = swap({});
    if (other.size > block.size) {
      std::free(block.start);
      block = other;
    } else {
      std::free(other.start);
    }
    std::free(swap(block).start);
  }

 private:
  Block swap(Block next) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(block_, next);
  }

  std::mutex mutex_;
  Block block_;
};

// one for each library, never destroyed: a tensor may outlive it
inline Kept& kept() {
  static Kept* const one = new Kept;
  return *one;
}

inline at::Tensor empty_kept(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const size_t bytes = static_cast<size_t>(rows) * columns * options.dtype().itemsize();
  if (bytes < PAGE || bytes > LARGEST) {
    return at::empty({rows, columns}, options);
  }
  const Block block = kept().take((bytes + PAGE - 1) / PAGE * PAGE);
  return at::from_blob(
      block.start, {rows, columns}, [block](void*) { kept().give(block); }, options);
}

}  // namespace smb
