// Packs matrices whose scales are known or belong to a few neighbouring lanes: fp8_channel with the scales of a table,
// fp8_tensor, mxfp8, nvfp4.
#pragma once

#include "cuda/codec.cuh"
#include "cuda/tile.cuh"

namespace wsync {
namespace cuda {

// A warp takes 64 vectors at a time: each lane has halves of 4.
constexpr int kRowLoads = 4;
constexpr uint32_t kRowWindow = kRowLoads * kWarp / 2;

// Vectors of a window in the order of the codes' stores. The even lane of a pair stores what loads 0 and 1 (nvfp4) or
// load 0 and then load 2 (e4m3) have read, the odd lane the rest.
template <int kOp>
__device__ __forceinline__ uint32_t window_vector(int load) {
  const uint32_t pair = lane_idx() / 2;
  if (kOp == kOpNvfp4) return static_cast<uint32_t>(load / 2) * kWarp + 2 * pair + static_cast<uint32_t>(load % 2);
  return static_cast<uint32_t>(load) * (kWarp / 2) + pair;
}

struct RowPlace {
  int64_t row;
  int64_t col;
  bool active;
};

__device__ __forceinline__ RowPlace row_place(const PackRecord& record, uint32_t vector, uint32_t end) {
  const uint32_t row = divide(vector, record.vectors_per_row);
  const uint32_t col = (vector - row * record.vectors_per_row.divisor) * kVectorElems;
  return {static_cast<int64_t>(row), static_cast<int64_t>(col), vector < end};
}

// 8 codes of half a vector, and the scale of its group where one is written.
template <int kSrc, int kOp>
struct RowCoder;

template <int kSrc>
struct RowCoder<kSrc, kOpFp8Tensor> {
  float multiplier;

  __device__ __forceinline__ explicit RowCoder(const PackDesc& d)
      : multiplier(multiplier_tensor(load_global<float>(reinterpret_cast<const void*>(d.amax)))) {}

  __device__ __forceinline__ void operator()(const PackDesc&, const RowPlace&, const typename Source<kSrc>::Half& half,
                                             uint32_t, uint32_t (&codes)[2]) const {
    codes_of<kSrc>(half, [&](float x) { return mul_rn(x, multiplier); }, codes);
  }
};

template <int kSrc>
struct RowCoder<kSrc, kOpFp8ChannelScaled> {
  __device__ __forceinline__ explicit RowCoder(const PackDesc&) {}

  __device__ __forceinline__ void operator()(const PackDesc& d, const RowPlace& place,
                                             const typename Source<kSrc>::Half& half, uint32_t max2,
                                             uint32_t (&codes)[2]) const {
    const float scale =
        place.active ? load_global<float>(reinterpret_cast<const float*>(d.scales) + place.row * d.scale_stride) : 1.0f;
    const Quotient quotient(scale);
    // Of both lanes: halves of 32-bit sources are exchanged after the maximum is taken.
    if (quotient.good_for(Source<kSrc>::amax(max_over_lanes(max2, 2)))) {
      codes_of<kSrc>(half, [&](float x) { return quotient.of(x); }, codes);
    } else {
      codes_of<kSrc>(half, [&](float x) { return div_rn(x, scale); }, codes);
    }
  }
};

template <int kSrc>
struct RowCoder<kSrc, kOpMxfp8> {
  __device__ __forceinline__ explicit RowCoder(const PackDesc&) {}

  // A group is two vectors: 4 lanes.
  __device__ __forceinline__ void operator()(const PackDesc& d, const RowPlace& place,
                                             const typename Source<kSrc>::Half& half, uint32_t max2,
                                             uint32_t (&codes)[2]) const {
    const uint8_t exponent = scale_mxfp8(Source<kSrc>::amax(max_over_lanes(max2, 4)));
    if (place.active && threadIdx.x % 4 == 0) {
      store_global(reinterpret_cast<uint8_t*>(d.scales) + place.row * d.scale_stride + place.col / kMxGroup, exponent);
    }
    const float reciprocal = reciprocal_e8m0(exponent);
    codes_of<kSrc>(half, [&](float x) { return mul_rn(x, reciprocal); }, codes);
  }
};

template <int kSrc>
struct RowCoder<kSrc, kOpNvfp4> {
  float scale2;

  __device__ __forceinline__ explicit RowCoder(const PackDesc& d)
      : scale2(scale2_nvfp4(load_global<float>(reinterpret_cast<const void*>(d.amax)))) {}

  // scale_nvfp4 with the device's conversion.
  __device__ __forceinline__ uint8_t group_scale(float amax) const {
    const float scale = div_rn(amax, mul_rn(6.0f, scale2));
    const float limited = min_f32(scale < 0x1p-9f ? 0x1p-9f : scale, kE4m3Max);
    return static_cast<uint8_t>(cvt_e4m3x2(scale == 0.0f ? 1.0f : limited, 0.0f));
  }

  // A group is a vector: 2 lanes.
  __device__ __forceinline__ void operator()(const PackDesc& d, const RowPlace& place,
                                             const typename Source<kSrc>::Half& half, uint32_t max2,
                                             uint32_t (&codes)[1]) const {
    const float amax = Source<kSrc>::amax(max_over_lanes(max2, 2));
    const uint8_t scale = group_scale(amax);
    if (place.active && threadIdx.x % 2 == 0) {
      store_global(reinterpret_cast<uint8_t*>(d.scales) + place.row * d.scale_stride + place.col / kNvGroup, scale);
    }
    float rounded_scale, unused;
    cvt_f32x2_e4m3(scale, &rounded_scale, &unused);
    const float divisor = mul_rn(rounded_scale, scale2);
    const Quotient quotient(divisor);
    codes[0] = 0;
    if (quotient.good_for(amax) && divisor <= 0x1p24f) {
      const uint32_t sign_limit = e2m1_sign_limit(divisor);
#pragma unroll
      for (int i = 0; i < kHalfElems; ++i) {
        const float x = Source<kSrc>::value(half, i);
        codes[0] |= e2m1_of_quotient(x, quotient.of_nonzero(x), sign_limit) << (4 * i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kHalfElems; ++i) {
        codes[0] |= static_cast<uint32_t>(e2m1_of_f32(div_rn(Source<kSrc>::value(half, i), divisor))) << (4 * i);
      }
    }
  }
};

// What the pair of lanes has after exchanging: codes of 16 bytes, and the vector that they begin with.
template <int kOp>
struct RowStores;

template <>
struct RowStores<kOpNvfp4> {
  static constexpr int kCodeWords = 1;
  static constexpr int kStores = 1;
  static constexpr int64_t kVectorBytes = kVectorElems / 2;

  // The first vector is that of this load.
  static __device__ __forceinline__ int load_of(int, bool odd) { return odd ? 2 : 0; }

  static __device__ __forceinline__ void exchange(const uint32_t (&codes)[kRowLoads][1], int, bool odd,
                                                  uint32_t (&whole)[4]) {
    const uint32_t a[2] = {codes[0][0], codes[1][0]};
    const uint32_t b[2] = {codes[2][0], codes[3][0]};
    uint32_t halves[4];
    exchange_halves(a, b, odd, halves);
    whole[0] = halves[0];
    whole[1] = halves[2];
    whole[2] = halves[1];
    whole[3] = halves[3];
  }
};

template <int kOp>
struct RowStores {
  static constexpr int kCodeWords = 2;
  static constexpr int kStores = 2;
  static constexpr int64_t kVectorBytes = kVectorElems;

  static __device__ __forceinline__ int load_of(int store, bool odd) { return 2 * store + (odd ? 1 : 0); }

  static __device__ __forceinline__ void exchange(const uint32_t (&codes)[kRowLoads][2], int store, bool odd,
                                                  uint32_t (&whole)[4]) {
    exchange_halves(codes[2 * store], codes[2 * store + 1], odd, whole);
  }
};

// A unit: vectors [x, x + n) of the record's matrix; x is a multiple of kRowWindow.
template <int kSrc, int kOp>
__global__ void __launch_bounds__(kThreads, 2) pack_rows_kernel(const PackRecord* records, const Unit* units,
                                                                uint32_t num_units, uint8_t* dst_base, Result* result) {
  using Stores = RowStores<kOp>;
  const bool odd = threadIdx.x % 2 != 0;
  uint64_t sum = 0;
  for (uint32_t u = blockIdx.x; u < num_units; u += gridDim.x) {
    const Unit unit = units[u];
    const PackRecord& record = records[unit.record];
    const PackDesc& d = record.d;
    const RowCoder<kSrc, kOp> coder(d);
    const auto* src = reinterpret_cast<const uint8_t*>(d.src);
    uint8_t* dst = dst_base + d.dst_offset;
    const uint32_t end = unit.x + unit.n;
    for (uint32_t base = unit.x + warp_idx() * kRowWindow; base < end; base += kWarps * kRowWindow) {
      typename Source<kSrc>::Half halves[kRowLoads];
      uint32_t max2[kRowLoads] = {0, 0, 0, 0};
      RowPlace places[kRowLoads];
#pragma unroll
      for (int j = 0; j < kRowLoads; ++j) {
        places[j] = row_place(record, base + window_vector<kOp>(j), end);
        const uint8_t* vector = src + (places[j].row * d.src_stride[2] + places[j].col) * Source<kSrc>::kBytes;
        halves[j] = Source<kSrc>::load(vector, odd, places[j].active, &max2[j]);
      }
      uint32_t codes[kRowLoads][Stores::kCodeWords];
      uint32_t worst = 0;
#pragma unroll
      for (int j = 0; j < kRowLoads; ++j) {
        coder(d, places[j], halves[j], max2[j], codes[j]);
        worst = largest(worst, max2[j]);
      }
#pragma unroll
      for (int s = 0; s < Stores::kStores; ++s) {
        Words4 whole;
        Stores::exchange(codes, s, odd, whole.w);
        const uint32_t vector =
            base + (odd ? window_vector<kOp>(Stores::load_of(s, true)) : window_vector<kOp>(Stores::load_of(s, false)));
        if (vector < end) {
          const uint64_t offset = vector * static_cast<uint64_t>(Stores::kVectorBytes);
          store_global_16(dst + offset, whole);
          sum += digest_vector(whole.w, d.wire_word + offset / 8);
        }
      }
      if (worst >= Source<kSrc>::kNonfinite2) {
        for (int j = 0; j < kRowLoads; ++j) {
          const RowPlace place = row_place(record, base + window_vector<kOp>(j), end);
          if (place.active) report_row(record, place.row, place.col, place.col + kVectorElems, result);
        }
      }
    }
  }
  add_digest(sum, result);
}

}  // namespace cuda
}  // namespace wsync
