#include <algorithm>

#include "core/dtype.h"
#include "cpu/pack_parts.h"

namespace wsync {
namespace {

constexpr int64_t kUnitValues = 256 << 10;
// Values of one band: few enough that they are still in the L1 cache when they are read a second time.
constexpr int64_t kBandBytes = 16 << 10;
// Rows of a band whose values are gathered: a cache line of a transposed source holds 32 of bf16.
constexpr int64_t kGatheredRows = 64;

// Everything that the rows of a unit have in common.
struct Job {
  const PackDesc& d;
  Matrix matrix;
  uint8_t* dst;  // of the whole matrix
  const Kernels& k;
  const RowKernels& rows;
  uint32_t max_bits;

  Job(const PackDesc& desc, uint8_t* dst_base, const Kernels& kernels)
      : d(desc),
        matrix(matrix_of(desc)),
        dst(dst_base + desc.dst_offset),
        k(kernels),
        rows(kernels.rows[matrix.is_f32() ? 1 : 0]),
        max_bits(0) {}

  int64_t group() const { return d.op == kOpMxfp8 ? kMxGroup : kNvGroup; }
  int64_t codes_per_byte() const { return d.op == kOpNvfp4 ? 2 : 1; }
  float* scale(int64_t row) const { return reinterpret_cast<float*>(d.scales) + row * d.scale_stride; }
  uint8_t* group_scales(int64_t row, int64_t col) const {
    return reinterpret_cast<uint8_t*>(d.scales) + row * d.scale_stride + col / group();
  }
  float amax() const { return *reinterpret_cast<const float*>(d.amax); }
};

// n values that follow each other in the packed box, from (row, col) on.
uint64_t quantise(Job* job, int64_t row, int64_t col, int64_t n, const uint8_t* src) {
  const PackDesc& d = job->d;
  const int64_t offset = (row * job->matrix.cols + col) / job->codes_per_byte();
  const uint64_t word = d.wire_word + static_cast<uint64_t>(offset) / 8;
  const auto count = static_cast<size_t>(n);
  uint8_t* dst = job->dst + offset;
  switch (d.op) {
    case kOpFp8Tensor:
      return job->rows.multiply(dst, src, count, multiplier_tensor(job->amax()), word, &job->max_bits);
    case kOpMxfp8:
      return job->rows.mxfp8(dst, job->group_scales(row, col), src, count, word, &job->max_bits);
    case kOpNvfp4:
      return job->rows.nvfp4(dst, job->group_scales(row, col), src, count, scale2_nvfp4(job->amax()), word,
                             &job->max_bits);
    default:
      return job->rows.divide(dst, src, count, *job->scale(row), word, &job->max_bits);
  }
}

// Whether rows follow each other in the source as they do in the bucket, scales included, so that one call takes many.
bool rows_run_on(const Job& job) {
  const Matrix& m = job.matrix;
  if (!m.in_place() || m.row_stride != m.cols || m.cols % 8 != 0) return false;
  if (job.d.op == kOpFp8Tensor) return true;
  return (job.d.op == kOpMxfp8 || job.d.op == kOpNvfp4) && job.d.scale_stride * job.group() == m.cols;
}

// Columns of a band that are taken at a time.
int64_t chunk_cols(const Matrix& m) { return m.in_place() ? m.cols : std::min<int64_t>(m.cols, kTileCols); }

int64_t band_rows(const Matrix& m) {
  if (!m.in_place()) return kGatheredRows;
  return std::max<int64_t>(1, kBandBytes / (m.cols * m.elem_bytes()));
}

template <typename Fn>
void for_chunks(Job* job, const Region& band, Fn fn) {
  const int64_t step = chunk_cols(job->matrix);
  for (int64_t col = 0; col < band.cols; col += step) {
    const Region chunk = {band.row, band.rows, col, std::min(step, band.cols - col)};
    const Values values = values_of(job->matrix, chunk, job->k, &job->max_bits);
    for (int64_t r = 0; r < chunk.rows; ++r) fn(chunk.row + r, chunk, values.row(r));
  }
}

// Writes the scales of the band's rows, from their amaxes.
void scale_rows(Job* job, const Region& band) {
  uint32_t largest[kTileRows] = {};
  for_chunks(job, band, [&](int64_t row, const Region& chunk, const uint8_t* src) {
    uint32_t& bits = largest[row - band.row];
    bits = std::max(bits, job->rows.largest(src, static_cast<size_t>(chunk.cols)));
  });
  for (int64_t r = 0; r < band.rows; ++r) {
    job->max_bits = std::max(job->max_bits, largest[r]);
    *job->scale(band.row + r) = scale_channel(f32_of(largest[r]));
  }
}

uint64_t pack_band(Job* job, const Region& band) {
  if (job->d.op == kOpFp8Channel) scale_rows(job, band);
  uint64_t sum = 0;
  for_chunks(job, band, [&](int64_t row, const Region& chunk, const uint8_t* src) {
    sum += quantise(job, row, chunk.col, chunk.cols, src);
  });
  return sum;
}

}  // namespace

void append_rows(const Matrix& matrix, size_t desc, std::vector<RowUnit>* units) {
  if (matrix.rows == 0 || matrix.cols == 0) return;
  const int64_t step = std::max<int64_t>(1, kUnitValues / matrix.cols);
  for (int64_t row = 0; row < matrix.rows; row += step) {
    units->push_back({desc, row, std::min(matrix.rows, row + step)});
  }
}

bool counted_in_rows(const PackDesc& d) { return d.extent[3] % 8 == 0; }

uint64_t pack_rows(const PackDesc& d, const RowUnit& unit, uint8_t* dst_base, const Kernels& k, FirstBad* bad) {
  Job job(d, dst_base, k);
  const Matrix& m = job.matrix;
  uint64_t sum = 0;
  if (rows_run_on(job)) {
    const auto* src = reinterpret_cast<const uint8_t*>(m.address(unit.begin, 0));
    sum = quantise(&job, unit.begin, 0, (unit.end - unit.begin) * m.cols, src);
  } else {
    const int64_t step = std::min<int64_t>(band_rows(m), kTileRows);
    for (int64_t row = unit.begin; row < unit.end; row += step) {
      sum += pack_band(&job, {row, std::min(step, unit.end - row), 0, m.cols});
    }
  }
  if (job.max_bits >= m.nonfinite_bits()) {
    bad->report(unit.desc, first_nonfinite(m, {unit.begin, unit.end - unit.begin, 0, m.cols}));
  }
  return counted_in_rows(d) ? sum : 0;
}

}  // namespace wsync
