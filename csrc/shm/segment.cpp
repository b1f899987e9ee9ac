#include "shm/segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cmath>
#include <ctime>
#include <string>

#include "shm/mapping.h"

namespace wsync::shm {
namespace {

// Shared between processes, hence without FUTEX_PRIVATE_FLAG.
long futex(std::atomic<std::uint32_t>* word, int op, std::uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(word), op, value, timeout, nullptr, 0);
}

bool remove_if_stale(int directory, const std::string& name, double older_than_s) {
  const int fd = openat(directory, name.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return false;
  struct stat info{};
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  const bool stale = fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == geteuid() &&
                     std::difftime(std::time(nullptr), info.st_ctime) >= older_than_s &&
                     fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK &&
                     unlinkat(directory, name.c_str(), 0) == 0;
  ::close(fd);
  return stale;
}

}  // namespace

Segment::Segment(std::shared_ptr<Mapping> mapping, bool owner) : mapping_(std::move(mapping)), owner_(owner) {}

Segment::Segment(Segment&& other) noexcept
    : mapping_(std::move(other.mapping_)),
      closed_(other.closed_.load(std::memory_order_relaxed)),
      owner_(other.owner_),
      num_published_(other.num_published_) {}

Segment::~Segment() { close(); }

Segment Segment::create(const std::string& name, const Geometry& geometry) {
  return Segment(Mapping::create(name, geometry), true);
}

Segment Segment::open(const std::string& name, const Geometry& expected) {
  return Segment(Mapping::open(name, expected), false);
}

Mapping& Segment::mapping() const {
  if (closed_.load(std::memory_order_acquire)) throw Error("StateError", "the segment is closed");
  return *mapping_;
}

Header& Segment::header() const { return mapping().header(); }

Slot& Segment::slot(std::uint64_t cursor) const {
  return *reinterpret_cast<Slot*>(mapping().at(sizeof(Header) + cursor * sizeof(Slot)));
}

std::uintptr_t Segment::address(std::uint64_t bucket_pos) const {
  const Header& h = header();
  if (bucket_pos >= h.num_buckets) {
    throw Error("ConfigError", "bucket position " + std::to_string(bucket_pos) + " of a segment with " +
                                   std::to_string(h.num_buckets) + " buckets");
  }
  return reinterpret_cast<std::uintptr_t>(mapping().at(mapping().layout().data_offset + bucket_pos * h.bucket_bytes));
}

std::uint64_t Segment::size_bytes() const { return mapping().layout().total_bytes; }

void Segment::begin(std::uint64_t version) {
  mapping().unlink();
  num_published_ = 0;
  header().current.store(version, std::memory_order_seq_cst);
  // The writer's half of a sequence lock: no byte of the new version may become visible before `current`.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Segment::publish(std::uint32_t bucket_pos, std::uint64_t digest, std::uint64_t num_bytes) {
  Header& h = header();
  if (bucket_pos >= h.num_buckets || num_published_ >= h.num_buckets) {
    throw Error("ConfigError", "publication " + std::to_string(num_published_) + " of bucket position " +
                                   std::to_string(bucket_pos) + " in a segment with " + std::to_string(h.num_buckets) +
                                   " buckets");
  }
  if (num_bytes > h.bucket_bytes) {
    throw Error("ConfigError", "a message of " + std::to_string(num_bytes) + " bytes in a bucket of " +
                                   std::to_string(h.bucket_bytes));
  }
  Slot& s = slot(num_published_++);
  s.bucket_pos.store(bucket_pos, std::memory_order_relaxed);
  s.digest.store(digest, std::memory_order_relaxed);
  s.num_bytes.store(num_bytes, std::memory_order_relaxed);
  s.version.store(h.current.load(std::memory_order_relaxed), std::memory_order_release);
}

std::optional<Published> Segment::take(std::uint64_t cursor, std::uint64_t version) const {
  if (cursor >= header().num_buckets) return std::nullopt;
  const Slot& s = slot(cursor);
  if (s.version.load(std::memory_order_acquire) != version) return std::nullopt;
  const Published found{s.bucket_pos.load(std::memory_order_relaxed), s.digest.load(std::memory_order_relaxed),
                        s.num_bytes.load(std::memory_order_relaxed)};
  // The slot may be rewritten for a later version meanwhile; `current` changed before that.
  std::atomic_thread_fence(std::memory_order_acquire);
  if (header().current.load(std::memory_order_relaxed) != version) return std::nullopt;
  return found;
}

std::uint64_t Segment::current() const {
  // The reader's half of the sequence lock: reads of the buckets stay before this load.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return header().current.load(std::memory_order_seq_cst);
}

float* Segment::exchange() const { return reinterpret_cast<float*>(mapping().at(mapping().layout().exchange_offset)); }

std::uint64_t Segment::exchange_elements() const { return header().exchange_elements; }

void Segment::set_exchange_version(std::uint64_t version) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  header().exchange_version.store(version, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

std::uint64_t Segment::exchange_version() const {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return header().exchange_version.load(std::memory_order_seq_cst);
}

std::uint32_t Segment::bell() const { return header().bell.load(std::memory_order_acquire); }

void Segment::ring() {
  Header& h = header();
  h.bell.fetch_add(1, std::memory_order_acq_rel);
  futex(&h.bell, FUTEX_WAKE, INT_MAX, nullptr);
}

bool Segment::wait(std::uint32_t seen, double seconds) const {
  Header& h = header();  // stays mapped when another thread closes this end meanwhile
  if (h.bell.load(std::memory_order_acquire) != seen) return true;
  const double whole = std::floor(std::fmax(seconds, 0.0));
  timespec timeout{};
  timeout.tv_sec = static_cast<std::time_t>(whole);
  timeout.tv_nsec = static_cast<long>((std::fmax(seconds, 0.0) - whole) * 1e9);
  futex(&h.bell, FUTEX_WAIT, seen, &timeout);
  return h.bell.load(std::memory_order_acquire) != seen;
}

bool Segment::owner_closed() const { return header().closed.load(std::memory_order_acquire) != 0; }

bool Segment::alive() const { return !owner_closed() && mapping().owner_process_lives(); }

std::int64_t Segment::owner_pid() const { return header().owner_pid; }

void Segment::close() {
  if (mapping_ == nullptr || closed_.exchange(true, std::memory_order_acq_rel)) return;  // moved from, or closed
  Header& h = mapping_->header();
  // A forked child shares the memory, but not the right to end it.
  if (owner_ && h.owner_pid == getpid()) {
    h.closed.store(1, std::memory_order_release);
    mapping_->unlink();
  }
  h.bell.fetch_add(1, std::memory_order_acq_rel);
  futex(&h.bell, FUTEX_WAKE, INT_MAX, nullptr);  // threads of this process that wait on it look again
}

int sweep_stale(double older_than_s) {
  DIR* directory = opendir("/dev/shm");
  if (directory == nullptr) return 0;
  int num_removed = 0;
  while (const dirent* entry = readdir(directory)) {
    const std::string name = entry->d_name;
    if (name.compare(0, sizeof(kNamePrefix) - 1, kNamePrefix) != 0) continue;
    // Closing a second descriptor of an own segment would drop its lock.
    if (Mapping::is_owned_here(name)) continue;
    if (remove_if_stale(dirfd(directory), name, older_than_s)) ++num_removed;
  }
  closedir(directory);
  return num_removed;
}

}  // namespace wsync::shm
