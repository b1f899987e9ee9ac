// Runs the cases of a file on the emulated kernels and writes what came out: runner CASES OUTCOMES SEED.
//
// The formats are plain: integers of 64 bits, and bytes behind their count. See tests/emulator/cases.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/case.h"
#include "emulator/memory.h"

namespace {

using wsync::emulator::Call;
using wsync::emulator::Case;
using wsync::emulator::Outcome;

class Reader {
 public:
  explicit Reader(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {}
  bool done() const { return at_ == bytes_.size(); }

  uint64_t number() {
    uint64_t value;
    take(&value, 8);
    return value;
  }

  std::vector<uint8_t> block() {
    std::vector<uint8_t> out(number());
    take(out.data(), out.size());
    return out;
  }

 private:
  void take(void* to, size_t n) {
    if (bytes_.size() - at_ < n) {
      std::fputs("runner: the file of cases ends too early\n", stderr);
      std::exit(2);
    }
    if (n != 0) std::memcpy(to, bytes_.data() + at_, n);
    at_ += n;
  }

  std::vector<uint8_t> bytes_;
  size_t at_ = 0;
};

Case read_case(Reader* reader) {
  Case out;
  out.call = static_cast<Call>(reader->number());
  out.base = reader->number();
  out.num_descs = reader->number();
  out.descs = reader->block();
  out.buffers.resize(reader->number());
  for (auto& buffer : out.buffers) {
    const std::vector<uint8_t> name = reader->block();
    buffer.name.assign(name.begin(), name.end());
    buffer.address = reader->number();
    buffer.writable = reader->number() != 0;
    buffer.content = reader->block();
  }
  return out;
}

void write_block(std::FILE* file, const void* data, uint64_t n) {
  std::fwrite(&n, 8, 1, file);
  if (n != 0) std::fwrite(data, 1, n, file);
}

void write_outcome(std::FILE* file, const Outcome& outcome) {
  write_block(file, outcome.failure.data(), outcome.failure.size());
  std::fwrite(&outcome.digest, 8, 1, file);
  std::fwrite(&outcome.bad, 8, 1, file);
  const uint64_t count = outcome.contents.size();
  std::fwrite(&count, 8, 1, file);
  for (const auto& content : outcome.contents) write_block(file, content.data(), content.size());
  std::fflush(file);
}

std::FILE* open_file(const char* path, const char* mode) {
  std::FILE* file = std::fopen(path, mode);
  if (file == nullptr) {
    std::perror(path);
    std::exit(2);
  }
  return file;
}

std::vector<uint8_t> read_file(const char* path) {
  std::FILE* file = open_file(path, "rb");
  std::vector<uint8_t> bytes;
  uint8_t chunk[1 << 16];
  while (const size_t n = std::fread(chunk, 1, sizeof(chunk), file)) bytes.insert(bytes.end(), chunk, chunk + n);
  std::fclose(file);
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fputs("usage: runner CASES OUTCOMES SEED\n", stderr);
    return 2;
  }
  wsync::emulator::catch_memory_faults();
  const uint64_t seed = std::strtoull(argv[3], nullptr, 10);
  Reader reader(read_file(argv[1]));
  std::FILE* out = open_file(argv[2], "wb");
  while (!reader.done()) write_outcome(out, wsync::emulator::run_schedules(read_case(&reader), seed));
  return std::fclose(out) == 0 ? 0 : 2;
}
