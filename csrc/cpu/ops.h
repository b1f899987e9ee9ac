// The CPU operations: descriptors in, bytes and digests out. Arguments are checked by csrc/api; addresses must be valid
// for the whole call. All are safe to call from several threads on disjoint memory, and give the same bits for every
// number of threads and every instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "core/descriptors.h"
#include "cpu/isa.h"

namespace wsync {

// The first bad element: the lowest descriptor, then the lowest packed index within its box.
class FirstBad {
 public:
  void report(size_t desc, int64_t element);
  bool found() const { return found_.load(std::memory_order_acquire); }
  size_t desc() const { return desc_; }
  int64_t element() const { return element_; }

 private:
  std::mutex mutex_;
  std::atomic<bool> found_{false};
  size_t desc_ = 0;
  int64_t element_ = 0;
};

// Packs every box into the bucket at dst_base and returns the digest of the words that the pieces occupy. What is in
// the bucket after a bad element was found is unspecified.
uint64_t pack(const PackDesc* descs, size_t num_descs, uint8_t* dst_base, int num_threads, Isa isa, FirstBad* bad);

// Raises each amax cell to the largest |value| of the box in its scale block. Cells may be shared by descriptors.
void amax(const AmaxDesc* descs, size_t num_descs, int num_threads, Isa isa, FirstBad* bad);

// Writes the scale of every block that the boxes touch, by the rule of recipe_op.
void scales_from_amax(const AmaxDesc* descs, size_t num_descs);

// Scatters every box out of the bucket and returns the digest of the words written.
uint64_t unpack(const UnpackDesc* descs, size_t num_descs, const uint8_t* src_base, int num_threads, Isa isa);

// The digest of what lies at the destinations now.
uint64_t installed_digest(const UnpackDesc* descs, size_t num_descs, int num_threads, Isa isa);

// Dequantises or requantises every matrix; only a requantisation looks for weights that are not finite. The destination
// may be the source only in whole (codes on codes, scales on scales).
void transform(const TransformDesc* descs, size_t num_descs, int num_threads, Isa isa, FirstBad* bad);

// Contiguous bytes; a last partial word is padded with zeros.
uint64_t digest(const void* src, size_t nbytes, uint64_t first_word, int num_threads, Isa isa);

// The digest of num_words words that are zero.
uint64_t zero_digest(uint64_t first_word, uint64_t num_words);

void parallel_memcpy(void* dst, const void* src, size_t nbytes, int num_threads);

}  // namespace wsync
