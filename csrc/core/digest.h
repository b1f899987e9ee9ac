// The digest of wire bytes: 64 bits, a sum over 8-byte words, so that pieces add up in any order and on any thread.
//
// For the little-endian word w at logical word index i (logical wire offset / 8), all arithmetic modulo 2^64:
//   key(i) = (i + 1) * 0x9E3779B97F4A7C15        x = w ^ key(i)        f = lo32(x) * hi32(x) + x
// and the digest is the sum of f. Bytes that do not fill a last word are padded with zeros.
//
// A flipped bit is always seen. With x = hi * 2^32 + lo, flipping bit b of lo changes f by +-2^b * (hi + 1), and
// flipping bit b of hi changes f by +-2^b * (lo + 2^32). The first is 0 modulo 2^64 only if 2^(64-b) divides hi + 1,
// but hi + 1 <= 2^32 < 2^(64-b) for b < 32; the second only if 2^(64-b) divides lo + 2^32, which lies between 2^32
// and 2^33 and so is divisible by at most 2^32 < 2^(64-b). Swapped words meet other keys. It is a check against
// faults, not against an adversary.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace wsync {

constexpr uint64_t kDigestKey = 0x9E3779B97F4A7C15ull;

WSYNC_HD uint64_t digest_key(uint64_t word_index) { return (word_index + 1) * kDigestKey; }

// f of one word under its key.
WSYNC_HD uint64_t digest_word(uint64_t word, uint64_t key) {
  const uint64_t x = word ^ key;
  return (x & 0xffffffffu) * (x >> 32) + x;
}

}  // namespace wsync
