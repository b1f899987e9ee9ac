// Barriers, shuffles and votes. A site is the source line of the call, never an address: compilers copy code.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/machine.h"

#define WSYNC_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(WSYNC_EMULATOR_SITE) {
  wsync::emulator::wait_for_block("__syncthreads", false, {file, line});
}

inline int __syncthreads_count(int predicate, WSYNC_EMULATOR_SITE) {
  return wsync::emulator::wait_for_block("__syncthreads_count", predicate != 0, {file, line});
}

inline int __syncthreads_or(int predicate, WSYNC_EMULATOR_SITE) {
  return wsync::emulator::wait_for_block("__syncthreads_or", predicate != 0, {file, line}) != 0;
}

inline int __syncthreads_and(int predicate, WSYNC_EMULATOR_SITE) {
  return wsync::emulator::wait_for_block("__syncthreads_and", predicate == 0, {file, line}) == 0;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, WSYNC_EMULATOR_SITE) {
  wsync::emulator::wait_for_lanes("__syncwarp", mask, 0, true, {file, line});
}

namespace wsync::emulator {

// What lane `source` brought. A lane outside of the mask has nothing to give: its value is undefined on the device.
uint64_t value_of_lane(const char* operation, const uint64_t* values, uint32_t mask, unsigned source, Site site);

// Bits of the lanes of `mask` that brought something else than 0.
uint32_t votes(const char* operation, uint32_t mask, bool predicate, Site site);

template <typename T>
T shuffle(const char* operation, uint32_t mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* values = wait_for_lanes(operation, mask, bits, false, site);
  bits = value_of_lane(operation, values, mask, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of the caller's segment of `width` lanes, which must be a power of two up to 32.
unsigned segment_begin(const char* operation, int width);

}  // namespace wsync::emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, WSYNC_EMULATOR_SITE) {
  const unsigned begin = wsync::emulator::segment_begin("__shfl_sync", width);
  const unsigned source = begin + (static_cast<unsigned>(lane) & static_cast<unsigned>(width - 1));
  return wsync::emulator::shuffle("__shfl_sync", mask, value, source, {file, line});
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, WSYNC_EMULATOR_SITE) {
  const unsigned self = wsync::emulator::lane_id();
  const unsigned begin = wsync::emulator::segment_begin("__shfl_up_sync", width);
  const unsigned source = self < begin + delta ? self : self - delta;
  return wsync::emulator::shuffle("__shfl_up_sync", mask, value, source, {file, line});
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, WSYNC_EMULATOR_SITE) {
  const unsigned self = wsync::emulator::lane_id();
  const unsigned begin = wsync::emulator::segment_begin("__shfl_down_sync", width);
  const unsigned source = self + delta >= begin + static_cast<unsigned>(width) ? self : self + delta;
  return wsync::emulator::shuffle("__shfl_down_sync", mask, value, source, {file, line});
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, WSYNC_EMULATOR_SITE) {
  const unsigned self = wsync::emulator::lane_id();
  const unsigned begin = wsync::emulator::segment_begin("__shfl_xor_sync", width);
  const unsigned other = self ^ static_cast<unsigned>(lanes);
  const unsigned source = other >= begin + static_cast<unsigned>(width) ? self : other;
  return wsync::emulator::shuffle("__shfl_xor_sync", mask, value, source, {file, line});
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, WSYNC_EMULATOR_SITE) {
  return wsync::emulator::votes("__ballot_sync", mask, predicate != 0, {file, line});
}

inline int __any_sync(uint32_t mask, int predicate, WSYNC_EMULATOR_SITE) {
  return wsync::emulator::votes("__any_sync", mask, predicate != 0, {file, line}) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, WSYNC_EMULATOR_SITE) {
  return wsync::emulator::votes("__all_sync", mask, predicate != 0, {file, line}) == mask;
}

#undef WSYNC_EMULATOR_SITE

// The emulator runs one thread at a time: fences have nothing to do, and the race checker takes them for nothing.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
