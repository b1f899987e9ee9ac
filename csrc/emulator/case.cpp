#include "emulator/case.h"

#include <cstring>
#include <memory>

#include "core/errors.h"
#include "cuda/program.h"
#include "emulator/guarded.h"
#include "emulator/machine.h"

extern "C" int wsync_cuda_run(const WsyncCudaLaunch* launches, int num_launches, const void* program, void* base,
                              void* result, void* stream);
extern "C" int wsync_cuda_reset(void* result, void* stream);

namespace wsync::emulator {
namespace {

using Buffers = std::vector<std::unique_ptr<GuardedBuffer>>;

// The new place of an address: that of the buffer that holds it. Null stays null; what no buffer holds stays too.
struct Moves {
  const Case& given;
  const Buffers& buffers;

  uint64_t operator()(uint64_t address) const {
    for (size_t i = 0; i < buffers.size(); ++i) {
      const CaseBuffer& from = given.buffers[i];
      if (address < from.address || address - from.address >= from.content.size()) continue;
      return reinterpret_cast<uint64_t>(buffers[i]->data()) + (address - from.address);
    }
    return address;
  }
};

void move(PackDesc* d, const Moves& moves) {
  for (uint64_t* field : {&d->src, &d->scales, &d->amax}) *field = moves(*field);
}
void move(AmaxDesc* d, const Moves& moves) {
  for (uint64_t* field : {&d->src, &d->amax, &d->scales}) *field = moves(*field);
}
void move(UnpackDesc* d, const Moves& moves) { d->dst = moves(d->dst); }
void move(TransformDesc* d, const Moves& moves) {
  for (uint64_t* field : {&d->codes, &d->scales, &d->tensor_scale, &d->dst, &d->dst_scales}) *field = moves(*field);
}

template <typename Desc>
cuda::Program compile(const Case& given, const Moves& moves, cuda::Program (*program)(const Desc*, size_t)) {
  std::vector<Desc> descs(given.num_descs);
  std::memcpy(descs.data(), given.descs.data(), descs.size() * sizeof(Desc));
  for (Desc& d : descs) move(&d, moves);
  return program(descs.data(), descs.size());
}

cuda::Program compile(const Case& given, const Moves& moves) {
  switch (given.call) {
    case Call::kPack:
      return compile(given, moves, cuda::pack_program);
    case Call::kAmax:
      return compile(given, moves, cuda::amax_program);
    case Call::kScales:
      return compile(given, moves, cuda::scales_program);
    case Call::kUnpack:
      return compile(given, moves, cuda::unpack_program);
    case Call::kInstalled:
      return compile(given, moves, cuda::installed_program);
    case Call::kTransform:
      return compile(given, moves, cuda::transform_program);
    default: {
      uint64_t values[3];
      std::memcpy(values, given.descs.data(), sizeof(values));
      return cuda::digest_program(moves(values[0]), values[1], values[2]);
    }
  }
}

void run_program(const cuda::Program& program, uint64_t base, Outcome* outcome) {
  const GuardedBuffer bytes("program", program.bytes.data(), program.bytes.size(), 0, false);
  const uint8_t zeros[16] = {};
  const GuardedBuffer result("result", zeros, sizeof(zeros), 0, true);
  int error = wsync_cuda_reset(result.data(), nullptr);
  if (error == 0) {
    error = wsync_cuda_run(program.launches.data(), static_cast<int>(program.launches.size()), bytes.data(),
                           reinterpret_cast<void*>(base), result.data(), nullptr);
  }
  if (error != 0 && failure().empty()) fail("error", "the launcher returned %d", error);
  result.check_edges("result");
  std::memcpy(&outcome->digest, result.data(), 8);
  std::memcpy(&outcome->bad, result.data() + 8, 8);
}

std::string difference(const Case& given, const Outcome& a, const Outcome& b) {
  if (a.digest != b.digest) return "the digest";
  if (a.bad != b.bad) return "the first bad element";
  for (size_t i = 0; i < a.contents.size(); ++i) {
    for (size_t at = 0; at < a.contents[i].size(); ++at) {
      if (a.contents[i][at] != b.contents[i][at]) {
        return "byte " + std::to_string(at) + " of '" + given.buffers[i].name + "'";
      }
    }
  }
  return "";
}

}  // namespace

Outcome run_case(const Case& given) {
  Outcome outcome;
  clear_failure();
  Buffers buffers;
  for (const CaseBuffer& b : given.buffers) {
    buffers.push_back(
        std::make_unique<GuardedBuffer>(b.name.c_str(), b.content.data(), b.content.size(), b.address, b.writable));
  }
  const Moves moves{given, buffers};
  try {
    run_program(compile(given, moves), moves(given.base), &outcome);
  } catch (const Error& error) {
    fail(error.leaf(), "%s", error.what());
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    buffers[i]->check_edges(given.buffers[i].name.c_str());
    outcome.contents.emplace_back(buffers[i]->data(), buffers[i]->data() + buffers[i]->bytes());
  }
  outcome.failure = failure();
  return outcome;
}

Outcome run_schedules(const Case& given, uint64_t seed) {
  Outcome first;
  for (const Schedule turn : {Schedule::kForward, Schedule::kReversed, Schedule::kShuffled}) {
    set_schedule(turn, seed);
    Outcome outcome = run_case(given);
    if (!outcome.failure.empty()) return outcome;
    if (turn == Schedule::kForward) {
      first = std::move(outcome);
      continue;
    }
    if (const std::string what = difference(given, first, outcome); !what.empty()) {
      first.failure = "schedule: " + what + " differs between orders of blocks and threads";
      return first;
    }
  }
  return first;
}

}  // namespace wsync::emulator
