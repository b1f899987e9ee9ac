// The memory of a segment: file, mapping, name and the record lock that tells readers that the owner lives.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "shm/segment.h"

namespace wsync::shm {

inline constexpr std::uint32_t kFormatVersion = 2;
inline constexpr std::uint64_t kPageBytes = 4096;
inline constexpr char kMagic[8] = {'W', 'S', 'Y', 'N', 'C', 'S', 'H', 'M'};
inline constexpr char kNamePrefix[] = "wsync-stage-";

struct Header {
  char magic[8];
  std::uint32_t format_version;
  std::uint32_t rank;
  std::uint32_t num_openers;
  std::int32_t owner_pid;
  std::uint64_t num_buckets;
  std::uint64_t bucket_bytes;
  std::uint64_t exchange_elements;
  std::uint64_t plan_token;
  std::uint64_t total_bytes;
  // Words that different processes write live on lines of their own.
  alignas(64) std::atomic<std::uint32_t> bell;
  alignas(64) std::atomic<std::uint64_t> current;
  std::atomic<std::uint64_t> exchange_version;
  std::atomic<std::uint32_t> closed;
  alignas(64) std::atomic<std::uint32_t> openers;
};

struct alignas(32) Slot {
  std::atomic<std::uint64_t> version;
  std::atomic<std::uint64_t> digest;
  std::atomic<std::uint32_t> bucket_pos;
  std::atomic<std::uint64_t> num_bytes;
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "atomics between processes must be lock free");
static_assert(sizeof(Header) == 256 && sizeof(Slot) == 32, "the layout is part of format version 2");

// Byte offsets that follow from a geometry. Throws Error where they overflow.
struct Layout {
  explicit Layout(const Geometry& geometry);
  std::uint64_t exchange_offset = 0;
  std::uint64_t data_offset = 0;
  std::uint64_t total_bytes = 0;
};

class Mapping {
 public:
  static std::shared_ptr<Mapping> create(const std::string& name, const Geometry& geometry);
  // A segment that this process has mapped already is shared, never opened again: closing a second descriptor
  // would drop the record lock of the first.
  static std::shared_ptr<Mapping> open(const std::string& name, const Geometry& expected);
  static bool is_owned_here(const std::string& name);

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  std::byte* at(std::uint64_t offset) const { return base_ + offset; }
  const Layout& layout() const { return layout_; }
  void unlink();
  bool owner_process_lives() const;

 private:
  Mapping(std::string name, const Geometry& geometry) : name_(std::move(name)), layout_(geometry) {}
  void map(int extra_flags);
  void fault_in();
  void check_header(const Geometry& expected) const;

  std::string name_;
  Layout layout_;
  int fd_ = -1;
  std::byte* base_ = nullptr;
  pid_t pid_ = 0;  // of the process that mapped it; a forked child must not remove the name
  bool owned_here_ = false;
  std::atomic<bool> linked_{false};
};

}  // namespace wsync::shm
