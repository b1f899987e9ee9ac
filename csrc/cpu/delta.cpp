#include "cpu/delta.h"

#include <cstring>
#include <string>

#include "core/errors.h"
#include "cpu/thread_pool.h"

namespace wsync {
namespace {

struct Entry {
  uint32_t span;
  uint32_t size;
  uint8_t kind;
  uint8_t top;
  uint16_t zero;
};
static_assert(sizeof(Entry) == kDeltaEntryBytes, "the stripe table has no padding");

struct Header {
  uint32_t magic;
  uint32_t num_stripes;
  uint64_t base_seq;
  uint64_t base_digest;
  uint32_t used_bytes;
  uint32_t num_bytes;
};
static_assert(sizeof(Header) == kDeltaHeaderBytes, "the header has no padding");

constexpr size_t kSlack = 32;  // what a stripe's encoder may write beyond its span

[[noreturn]] void malformed(const std::string& what) { throw Error("WireError", "a delta is malformed: " + what); }

std::string text(uint64_t value) { return std::to_string(value); }

Header checked_header(const uint8_t* code, uint64_t num_bytes, uint64_t used_bytes, DeltaBase from) {
  Header header;
  if (num_bytes < sizeof(header)) malformed(text(num_bytes) + " bytes hold no header");
  std::memcpy(&header, code, sizeof(header));
  if (header.magic != kDeltaMagic) malformed("it begins with " + text(header.magic));
  if (header.num_bytes != num_bytes) {
    malformed("it says that it has " + text(header.num_bytes) + " bytes, and has " + text(num_bytes));
  }
  if (header.used_bytes != used_bytes) {
    malformed("it is of a bucket of " + text(header.used_bytes) + " bytes, this one has " + text(used_bytes));
  }
  if (header.base_seq != from.seq) {
    throw Error("WireError",
                "a delta is against publish " + text(header.base_seq) + ", and publish " + text(from.seq) + " is held");
  }
  if (header.base_digest != from.digest) {
    throw Error("WireError", "a delta is against a bucket with digest " + text(header.base_digest) +
                                 ", and the one that is held had " + text(from.digest));
  }
  if (header.num_stripes > (num_bytes - sizeof(header)) / sizeof(Entry)) {
    malformed(text(header.num_stripes) + " stripes have no room in " + text(num_bytes) + " bytes");
  }
  return header;
}

// Where each stripe's bytes and code begin.
struct Place {
  Entry entry;
  uint64_t at;
  uint64_t code_at;
};

std::vector<Place> checked_places(const uint8_t* code, const Header& header) {
  std::vector<Place> places(header.num_stripes);
  uint64_t at = 0, code_at = sizeof(Header) + header.num_stripes * sizeof(Entry);
  for (size_t i = 0; i < places.size(); ++i) {
    Entry e;
    std::memcpy(&e, code + sizeof(Header) + i * sizeof(Entry), sizeof(e));
    const std::string which = "stripe " + text(i);
    if (e.kind > kStripeBytes || e.zero != 0) malformed(which + " is of kind " + text(e.kind));
    if (e.span == 0 || e.span % kStripeAlign != 0 || e.span > kMaxStripeBytes || e.span > header.used_bytes - at) {
      malformed(which + " spans " + text(e.span) + " bytes from byte " + text(at));
    }
    const bool fits = e.kind == kStripeSame ? e.size == 0 : e.kind == kStripeRaw ? e.size == e.span : e.size < e.span;
    if (e.kind <= kStripeRaw && e.top != 0) malformed(which + " has no code, but a top of " + text(e.top));
    if (!fits || e.size > header.num_bytes - code_at) malformed(which + " has a code of " + text(e.size) + " bytes");
    places[i] = {e, at, code_at};
    at += e.span;
    code_at += e.size;
  }
  if (at != header.used_bytes) malformed("its stripes end at byte " + text(at) + " of " + text(header.used_bytes));
  if (code_at != header.num_bytes)
    malformed("its codes end at byte " + text(code_at) + " of " + text(header.num_bytes));
  return places;
}

}  // namespace

const DeltaKernels& delta_kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::kScalar && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) {
    const bool counts = isa == Isa::kAvx512 && __builtin_cpu_supports("avx512vpopcntdq");
    return counts ? avx512_delta_kernels() : avx2_delta_kernels();
  }
#endif
  static_cast<void>(isa);
  return scalar_delta_kernels();
}

DeltaResult delta_encode(const uint8_t* fresh, uint8_t* base, uint8_t* out, const DeltaCut* cuts, size_t num_cuts,
                         DeltaBase from, int num_threads, Isa isa) {
  struct Stripe {
    size_t at;
    size_t room_at;
    Entry entry;
    uint64_t num_changed;
  };
  std::vector<Stripe> stripes(num_cuts);
  DeltaResult result{};
  size_t used_bytes = 0, room = 0;
  for (size_t i = 0; i < num_cuts; ++i) {
    stripes[i] = {used_bytes, room, {cuts[i].span, 0, static_cast<uint8_t>(cuts[i].kind), 0, 0}, 0};
    used_bytes += cuts[i].span;
    room += cuts[i].span + kSlack;
    result.num_elements += cuts[i].span / (cuts[i].kind == kStripeWords ? 2 : 1);
  }
  // Kept from call to call: fresh memory would be faulted in for every bucket.
  thread_local std::vector<uint8_t> codes;
  if (codes.size() < room) codes.resize(room);
  uint8_t* const code = codes.data();
  const DeltaKernels& kernels = delta_kernels_for(isa);
  parallel_for(num_cuts, num_threads, [&](size_t i) {
    thread_local std::vector<DeltaChange> changes;
    Stripe& s = stripes[i];
    Entry& e = s.entry;
    e.size = static_cast<uint32_t>(kernels.encode(static_cast<StripeKind>(e.kind), fresh + s.at, base + s.at, e.span,
                                                  code + s.room_at, &changes, &e.top, &s.num_changed));
    if (e.size == e.span) std::memcpy(base + s.at, fresh + s.at, e.span);
    if (e.size == 0 || e.size == e.span) {
      e.kind = e.size == 0 ? kStripeSame : kStripeRaw;
      e.top = 0;
    }
  });
  size_t num_bytes = sizeof(Header) + num_cuts * sizeof(Entry);
  for (const Stripe& s : stripes) {
    num_bytes += s.entry.size;
    result.num_changed += s.num_changed;
  }
  if (num_bytes >= used_bytes) return result;
  result.num_bytes = num_bytes;
  const Header header{kDeltaMagic, static_cast<uint32_t>(num_cuts),   from.seq,
                      from.digest, static_cast<uint32_t>(used_bytes), static_cast<uint32_t>(num_bytes)};
  std::memcpy(out, &header, sizeof(header));
  out += sizeof(header);
  for (const Stripe& s : stripes) {
    std::memcpy(out, &s.entry, sizeof(Entry));
    out += sizeof(Entry);
  }
  for (const Stripe& s : stripes) {
    std::memcpy(out, s.entry.kind == kStripeRaw ? fresh + s.at : code + s.room_at, s.entry.size);
    out += s.entry.size;
  }
  return result;
}

void delta_apply(uint8_t* bucket, uint64_t used_bytes, const uint8_t* code, uint64_t num_bytes, DeltaBase from,
                 int num_threads, Isa isa) {
  const Header header = checked_header(code, num_bytes, used_bytes, from);
  const std::vector<Place> places = checked_places(code, header);
  std::vector<const char*> wrong(places.size(), nullptr);
  const DeltaKernels& kernels = delta_kernels_for(isa);
  parallel_for(places.size(), num_threads, [&](size_t i) {
    const Place& p = places[i];
    if (p.entry.kind == kStripeSame) return;
    if (p.entry.kind == kStripeRaw) {
      std::memcpy(bucket + p.at, code + p.code_at, p.entry.span);
      return;
    }
    wrong[i] = kernels.apply(static_cast<StripeKind>(p.entry.kind), bucket + p.at, p.entry.span, code + p.code_at,
                             p.entry.size, p.entry.top);
  });
  for (size_t i = 0; i < wrong.size(); ++i) {
    if (wrong[i] != nullptr) malformed("the code of stripe " + text(i) + ": " + wrong[i]);
  }
}

}  // namespace wsync
