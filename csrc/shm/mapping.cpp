#include "shm/mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace wsync::shm {
namespace {

// Never destroyed: ends may be closed while the interpreter shuts down.
std::mutex& registry_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::map<std::string, std::weak_ptr<Mapping>>& registry() {
  static auto* mappings = new std::map<std::string, std::weak_ptr<Mapping>>;
  return *mappings;
}

std::string posix_name(const std::string& name) { return "/" + name; }

std::string errno_text(int code) { return std::string(std::strerror(code)) + " (errno " + std::to_string(code) + ")"; }

std::uint64_t checked_mul(std::uint64_t a, std::uint64_t b) {
  std::uint64_t out = 0;
  if (__builtin_mul_overflow(a, b, &out)) throw Error("ConfigError", "the segment's size overflows 64 bits");
  return out;
}

std::uint64_t checked_add(std::uint64_t a, std::uint64_t b) {
  std::uint64_t out = 0;
  if (__builtin_add_overflow(a, b, &out)) throw Error("ConfigError", "the segment's size overflows 64 bits");
  return out;
}

std::uint64_t to_page(std::uint64_t bytes) { return checked_add(bytes, kPageBytes - 1) / kPageBytes * kPageBytes; }

std::uint64_t free_shm_bytes() {
  struct statvfs stats{};
  if (statvfs("/dev/shm", &stats) != 0) return UINT64_MAX;
  return static_cast<std::uint64_t>(stats.f_bavail) * stats.f_frsize;
}

[[noreturn]] void throw_no_room(std::uint64_t wanted, std::uint64_t available) {
  throw HintedError(
      "ConfigError",
      "staging needs " + std::to_string(wanted) + " bytes of shared memory and /dev/shm has " +
          std::to_string(available) + " bytes free",
      "enlarge /dev/shm (mount -o remount,size=..., docker run --shm-size=...) or use the gloo transport");
}

void check_name(const std::string& name) {
  const bool prefixed = name.compare(0, sizeof(kNamePrefix) - 1, kNamePrefix) == 0;
  if (!prefixed || name.size() > 200 || name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
    throw Error("ConfigError", "'" + name + "' is not the name of a wsync segment");
  }
}

struct flock whole_file(short type) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

void check_equal(const char* field, std::uint64_t found, std::uint64_t expected, const std::string& name) {
  if (found == expected) return;
  throw Error("PlanMismatchError", "segment " + name + " has " + field + " " + std::to_string(found) +
                                       " and the plan says " + std::to_string(expected));
}

}  // namespace

Layout::Layout(const Geometry& geometry) {
  exchange_offset = checked_add(sizeof(Header), checked_mul(geometry.num_buckets, sizeof(Slot)));
  data_offset = to_page(checked_add(exchange_offset, checked_mul(geometry.exchange_elements, sizeof(float))));
  total_bytes = to_page(checked_add(data_offset, checked_mul(geometry.num_buckets, geometry.bucket_bytes)));
  if (total_bytes > static_cast<std::uint64_t>(INT64_MAX)) {
    throw Error("ConfigError", "a segment of " + std::to_string(total_bytes) + " bytes is too large for a file");
  }
}

std::shared_ptr<Mapping> Mapping::create(const std::string& name, const Geometry& geometry) {
  check_name(name);
  std::shared_ptr<Mapping> self(new Mapping(name, geometry));
  const std::uint64_t bytes = self->layout_.total_bytes;
  if (const std::uint64_t available = free_shm_bytes(); bytes > available) throw_no_room(bytes, available);

  self->fd_ = shm_open(posix_name(name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (self->fd_ < 0) throw Error("ConnectError", "shm_open of " + name + " failed: " + errno_text(errno));
  self->pid_ = getpid();
  self->owned_here_ = true;
  self->linked_ = true;
  struct flock lock = whole_file(F_WRLCK);
  if (fcntl(self->fd_, F_SETLK, &lock) != 0) {
    throw Error("ConnectError", "locking segment " + name + " failed: " + errno_text(errno));
  }
  if (ftruncate(self->fd_, static_cast<off_t>(bytes)) != 0) {
    throw Error("ConnectError", "sizing segment " + name + " failed: " + errno_text(errno));
  }
  self->map(0);
  self->fault_in();

  Header& header = *new (self->base_) Header{};
  header.rank = geometry.rank;
  header.num_openers = geometry.num_openers;
  header.owner_pid = getpid();
  header.num_buckets = geometry.num_buckets;
  header.bucket_bytes = geometry.bucket_bytes;
  header.exchange_elements = geometry.exchange_elements;
  header.plan_token = geometry.plan_token;
  header.total_bytes = bytes;
  header.format_version = kFormatVersion;
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  if (geometry.num_openers == 0) self->unlink();

  const std::lock_guard<std::mutex> guard(registry_mutex());
  registry()[name] = self;
  return self;
}

std::shared_ptr<Mapping> Mapping::open(const std::string& name, const Geometry& expected) {
  check_name(name);
  std::shared_ptr<Mapping> self;  // before the guard: its destructor takes the same mutex
  const std::lock_guard<std::mutex> guard(registry_mutex());
  if (const auto found = registry().find(name); found != registry().end()) self = found->second.lock();
  if (self != nullptr && self->pid_ == getpid()) {
    self->check_header(expected);
  } else {
    self = std::shared_ptr<Mapping>(new Mapping(name, expected));
    self->fd_ = shm_open(posix_name(name).c_str(), O_RDWR | O_CLOEXEC, 0);
    if (self->fd_ < 0) {
      throw HintedError(
          "ConnectError",
          "segment " + name + " of rank " + std::to_string(expected.rank) + " cannot be opened: " + errno_text(errno),
          "both processes must run as one user and share /dev/shm (containers: --ipc=host or a common --ipc)");
    }
    struct stat info{};
    if (fstat(self->fd_, &info) != 0 || info.st_uid != geteuid()) {
      throw Error("ConnectError", "segment " + name + " belongs to another user");
    }
    if (static_cast<std::uint64_t>(info.st_size) != self->layout_.total_bytes) {
      throw Error("PlanMismatchError", "segment " + name + " has " + std::to_string(info.st_size) +
                                           " bytes and the plan says " + std::to_string(self->layout_.total_bytes));
    }
    self->pid_ = getpid();
    self->linked_ = true;
    self->map(MAP_POPULATE);
    self->check_header(expected);
    const std::uint64_t data_bytes = self->layout_.total_bytes - self->layout_.data_offset;
    if (data_bytes > 0) mprotect(self->base_ + self->layout_.data_offset, data_bytes, PROT_READ);
    registry()[name] = self;
  }
  Header& header = self->header();
  if (header.openers.fetch_add(1, std::memory_order_acq_rel) + 1 == header.num_openers) self->unlink();
  return self;
}

bool Mapping::is_owned_here(const std::string& name) {
  std::shared_ptr<Mapping> mapping;  // before the guard: its destructor takes the same mutex
  const std::lock_guard<std::mutex> guard(registry_mutex());
  if (const auto found = registry().find(name); found != registry().end()) mapping = found->second.lock();
  return mapping != nullptr && mapping->owned_here_;
}

Mapping::~Mapping() {
  const bool same_process = pid_ == getpid();
  if (same_process && owned_here_) unlink();
  if (base_ != nullptr) munmap(base_, layout_.total_bytes);
  if (fd_ >= 0) ::close(fd_);
  if (!same_process) return;
  const std::lock_guard<std::mutex> guard(registry_mutex());
  const auto found = registry().find(name_);
  if (found != registry().end() && found->second.expired()) registry().erase(found);
}

void Mapping::map(int extra_flags) {
  void* base = mmap(nullptr, layout_.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | extra_flags, fd_, 0);
  if (base == MAP_FAILED) {
    throw Error("ConnectError", "mapping " + std::to_string(layout_.total_bytes) + " bytes of " + name_ +
                                    " failed: " + errno_text(errno));
  }
  base_ = static_cast<std::byte*>(base);
}

void Mapping::fault_in() {
  // Huge pages are a wish: most hosts have them off for shared memory.
  madvise(base_, layout_.total_bytes, MADV_HUGEPAGE);
  // Allocates, zeroes and maps in one pass, and reports a full /dev/shm instead of raising SIGBUS.
  if (madvise(base_, layout_.total_bytes, MADV_POPULATE_WRITE) == 0) return;
  if (errno != EINVAL) throw_no_room(layout_.total_bytes, free_shm_bytes());
  if (posix_fallocate(fd_, 0, static_cast<off_t>(layout_.total_bytes)) != 0) {
    throw_no_room(layout_.total_bytes, free_shm_bytes());
  }
  for (std::uint64_t at = 0; at < layout_.total_bytes; at += kPageBytes) {
    *reinterpret_cast<volatile std::byte*>(base_ + at) = std::byte{0};
  }
}

void Mapping::check_header(const Geometry& expected) const {
  const Header& found = header();
  if (std::memcmp(found.magic, kMagic, sizeof(kMagic)) != 0) {
    throw Error("FormatVersionError", "segment " + name_ + " does not begin with the wsync magic");
  }
  if (found.format_version != kFormatVersion) {
    throw Error("FormatVersionError", "segment " + name_ + " has format version " +
                                          std::to_string(found.format_version) + " and this process reads " +
                                          std::to_string(kFormatVersion));
  }
  check_equal("rank", found.rank, expected.rank, name_);
  check_equal("num_buckets", found.num_buckets, expected.num_buckets, name_);
  check_equal("bucket_bytes", found.bucket_bytes, expected.bucket_bytes, name_);
  check_equal("exchange_elements", found.exchange_elements, expected.exchange_elements, name_);
  check_equal("plan token", found.plan_token, expected.plan_token, name_);
  check_equal("total_bytes", found.total_bytes, layout_.total_bytes, name_);
}

void Mapping::unlink() {
  // The name is random and used once, so that removing it twice harms nobody.
  if (linked_.exchange(false)) shm_unlink(posix_name(name_).c_str());
}

bool Mapping::owner_process_lives() const {
  if (owned_here_) return true;
  struct flock lock = whole_file(F_WRLCK);
  if (fcntl(fd_, F_GETLK, &lock) != 0) return true;
  return lock.l_type != F_UNLCK;
}

}  // namespace wsync::shm
