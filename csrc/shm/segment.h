// A staging segment in POSIX shared memory: one writer (its owner), any number of readers on the same host.
//
//   header | slots, one per bucket | exchange area (f32) | padding to a page | buckets
//
// The owner packs into the buckets, then publishes each: slots are filled in order of publication, so a reader follows
// them with a cursor and sees arrivals in O(1). A version is valid for readers while `current` equals it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "core/errors.h"

namespace wsync::shm {

// An error with a line on what to do next.
class HintedError : public Error {
 public:
  HintedError(const char* leaf, const std::string& message, std::string hint)
      : Error(leaf, message), hint_(std::move(hint)) {}
  const std::string& hint() const noexcept { return hint_; }

 private:
  std::string hint_;
};

// What owner and readers must agree on; readers take it from the offer and compare it with the header.
struct Geometry {
  std::uint32_t rank = 0;
  std::uint32_t num_openers = 0;  // ends that will open it; the last one removes the name
  std::uint64_t num_buckets = 0;
  std::uint64_t bucket_bytes = 0;
  std::uint64_t exchange_elements = 0;
  std::uint64_t plan_token = 0;  // a hash of the plan's digest
};

struct Published {
  std::uint32_t bucket_pos;
  std::uint64_t digest;
  std::uint64_t num_bytes;
};

struct Header;
struct Slot;
class Mapping;

// One end of a segment. One thread at a time, except `ring` and `close`, which any thread may call at any time.
//
// The memory is unmapped by the destructor, never by `close`: another thread may be inside `wait`, or in the middle of
// a bucket whose address it was given. Whoever passes addresses on keeps the segment until they are no longer used.
class Segment {
 public:
  // Creates (mode 0600, must not exist), zeroes and faults in. Throws Error where /dev/shm has too little room.
  static Segment create(const std::string& name, const Geometry& geometry);
  // Opens and checks against what the offer said. Buckets are mapped read-only.
  static Segment open(const std::string& name, const Geometry& expected);

  Segment(Segment&&) noexcept;
  ~Segment();

  std::uintptr_t address(std::uint64_t bucket_pos) const;
  std::uint64_t size_bytes() const;

  // Owner: the buckets are being overwritten from now on. Also removes the name if it is still there.
  void begin(std::uint64_t version);
  // Owner: the bucket's first `num_bytes` bytes are the message.
  void publish(std::uint32_t bucket_pos, std::uint64_t digest, std::uint64_t num_bytes);
  // The publication number `cursor` of `version`, if it happened and still holds.
  std::optional<Published> take(std::uint64_t cursor, std::uint64_t version) const;
  std::uint64_t current() const;

  float* exchange() const;
  std::uint64_t exchange_elements() const;
  void set_exchange_version(std::uint64_t version);
  std::uint64_t exchange_version() const;

  // The doorbell: a futex word between processes.
  std::uint32_t bell() const;
  void ring();
  // Waits until the bell differs from `seen` or the time is over; true when it differs. `close` ends it.
  bool wait(std::uint32_t seen, double seconds) const;

  // False once the owner closed it or its process is gone (the kernel drops the owner's record lock).
  bool alive() const;
  bool owner_closed() const;
  std::int64_t owner_pid() const;

  // Owner: marks it closed for the readers and removes the name. Everybody: refuses all further calls. The memory goes
  // with the object. May be called twice.
  void close();

 private:
  Segment(std::shared_ptr<Mapping> mapping, bool owner);
  Mapping& mapping() const;
  Header& header() const;
  Slot& slot(std::uint64_t cursor) const;

  std::shared_ptr<Mapping> mapping_;  // never changes while other threads may look
  std::atomic<bool> closed_{false};
  bool owner_ = false;
  std::uint64_t num_published_ = 0;
};

// Removes segments in /dev/shm whose owner died before every end had opened them. Returns how many. Younger files stay:
// they may belong to an owner that has not locked them yet.
int sweep_stale(double older_than_s);

}  // namespace wsync::shm
