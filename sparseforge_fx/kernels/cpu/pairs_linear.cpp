// y = act(x W^T + b), W 2:4 with int8 or int4 codes, in the layout of pairs.py.
//
// Where codes_linear.cpp puts the codes to the places of x, this puts x to the codes: a shuffle picks, of sixteen inputs,
// those at which the eight survivors of one row stand and those of the row after it. So an instruction multiplies
// survivors alone, of two rows at once, and nothing is expanded. Sums of four survivors are in a lane: in each 128 bits
// two lanes of the first row and two of the second.

#include "pairs_linear.h"

#include <ATen/ops/zeros.h>

#include "multiply_in_tiles.h"

#include <type_traits>

namespace sparseforge {
namespace {

template <int BITS>
constexpr int64_t kPairValues = 8 * bits_of(BITS);  // bytes of a step of two rows
constexpr int64_t kPairPlaces = 16;
constexpr int64_t kPairs = kTileRows / 2;  // of a tile
constexpr int64_t kAmxColumns = 10;        // tile registers pay from so many rows of x (measured)

struct PairsJob {
  const uint8_t *values, *places, *scales;
  int64_t steps;        // of kStep inputs
  int64_t scale_bytes;  // of a weight row
  int64_t group;        // of int4, inputs that share a scale; of int8 all, and it is left to others
  const Levels* levels;
};

#ifdef SPARSEFORGE_X86
// Inputs of a run of a row of x, and the scale of each lane; the same for both of the following.
#define SPARSEFORGE_RUN                                                                                              \
  constexpr int kSums = 8, kNear = 8;                                                                                \
  template <int BITS>                                                                                                \
  struct alignas(64) Run {                                                                                           \
    int8_t q[kRun][kStep];                                                                                           \
    float scale[16];                                                                                                 \
  };                                                                                                                 \
  template <int BITS>                                                                                                \
  INLINE void set_offsets(Run<BITS>& x) {                                                                            \
    for (int64_t i = 0; i < kXGroup; ++i) x.q[0][i] = static_cast<int8_t>(x.q[0][i] ^ kAdded<BITS>);                 \
    float near[kSums];                                                                                               \
    std::memcpy(near, x.scale, sizeof(near));                                                                        \
    for (int lane = 0; lane < 16; ++lane) x.scale[lane] = near[lane / 4 * 2 + lane % 2] / kCode<BITS>;               \
  }

namespace avx2_pairs {
#define TARGET __attribute__((target("avx2,fma,f16c")))
template <int BITS>
constexpr int8_t kAdded = BITS == 8 ? 0 : -128;  // 128 to make x unsigned; else the codes' signs go to x
template <int BITS>
constexpr float kCode = 1;  // what codes come times
constexpr int kColumns = 2;
template <int COLUMNS>
constexpr int kPairsOf = COLUMNS == 1 ? 2 : 1;
using Sums = __m256;
SPARSEFORGE_RUN

INLINE void sum_lanes(Sums sums, float* to) {
  alignas(32) float lane[8];
  _mm256_store_ps(lane, sums);
  for (int row = 0; row < 2; ++row) to[row] = (lane[2 * row] + lane[2 * row + 1]) + (lane[2 * row + 4] + lane[2 * row + 5]);
}

// The scales of a run of two rows, COUNT steps of which are there: for each half of a step one of the first row, one of
// the second, for its first sixteen inputs; then the same for the others.
template <int COUNT>
INLINE void load_scales(const PairsJob& job, const uint8_t* at, float (*scales)[4]) {
  Sixteen found[2];
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row, at += job.scale_bytes) {
    PREFETCH_FAR(at + kTileRows * job.scale_bytes);
    alignas(16) uint8_t bytes[16] = {};
    std::memcpy(bytes, at, scales_at(COUNT, job.group));  // no byte behind the last
    found[row] = sixteen_of(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)), job.group);
  }
  const auto store = [&](__m256 a, __m256 b, float* to) TARGET __attribute__((always_inline)) {
    const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    _mm256_store_ps(to, _mm256_permute2f128_ps(even, odd, 0x20));
    _mm256_store_ps(to + 8, _mm256_permute2f128_ps(even, odd, 0x31));
  };
  store(found[0].low, found[1].low, scales[0]);
  store(found[0].high, found[1].high, scales[4]);
}

// Where in sixteen bytes the survivors of 32 inputs of two rows stand.
INLINE __m256i places_of(__m256i fields, int half) {
  const __m256i group = _mm256_setr_epi32(0x04040000, 0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000, 0x0c0c0808,
                                          0x04040000, 0x0c0c0808);
  const __m256i to_low = half ? _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6) : _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
  return _mm256_or_si256(_mm256_and_si256(_mm256_srlv_epi32(fields, to_low), _mm256_set1_epi8(3)), group);
}

// A run, COUNT steps of which are there, of ROWS pairs of weight rows by COLUMNS rows of x. Of a step first half the
// inputs, then the others.
template <int BITS, int COLUMNS, int ROWS, int COUNT>
INLINE void multiply(const PairsJob& job, const int64_t* pairs, const Run<BITS>* x, int64_t runs, int64_t run,
                     Sums (*sums)[ROWS]) {
  const int64_t from = run * kRun;
  const __m256i low = _mm256_set1_epi8(15), offset = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  alignas(32) float scales[ROWS][2 * kRun][4];
  std::conditional_t<BITS == 8, __m256i, __m256> part[2][COLUMNS][ROWS] = {};
  if constexpr (BITS != 8)
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
      load_scales<COUNT>(job, job.scales + 2 * pairs[r] * job.scale_bytes + scales_at(from, job.group), scales[r]);
#pragma GCC unroll 4
  for (int k = 0; k < COUNT; ++k) {
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = pairs[r] * job.steps + from + k;
      const uint8_t *values = job.values + at * kPairValues<BITS>, *places = job.places + at * kPairPlaces;
      if (BITS == 8 || k % 2 == 0) PREFETCH_FAR(values + kPairs * job.steps * kPairValues<BITS>);
      if (k == 0) PREFETCH_FAR(places + kPairs * job.steps * kPairPlaces);
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      const __m256i fields = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i place = places_of(fields, half);
        const auto picked = [&](int m) TARGET __attribute__((always_inline)) {
          const auto* const q = reinterpret_cast<const __m256i*>(x[m * runs + run].q[k]) + half;
          return _mm256_shuffle_epi8(_mm256_load_si256(q), place);
        };
        if constexpr (BITS == 8) {
          const __m256i codes = half ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + 1) : first;
          const __m256i sizes = _mm256_abs_epi8(codes);
#pragma GCC unroll 2
          for (int m = 0; m < COLUMNS; ++m) {
            const __m256i products = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(picked(m), codes));
            part[half][m][r] = _mm256_add_epi32(part[half][m][r], _mm256_madd_epi16(products, ones));
          }
        } else {
          const __m256i nibble = _mm256_and_si256(half ? _mm256_srli_epi16(first, 4) : first, low);
          const __m256i codes =
              _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(job.levels->of)), nibble);
          const __m256i start = _mm256_maddubs_epi16(offset, codes);
          const __m256 scale =
              _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_load_ps(scales[r][2 * k + half])), twice);
#pragma GCC unroll 2
          for (int m = 0; m < COLUMNS; ++m) {
            const __m256i products = _mm256_sub_epi16(_mm256_maddubs_epi16(picked(m), codes), start);
            const __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(products, ones));
            part[half][m][r] = _mm256_fmadd_ps(sum, scale, part[half][m][r]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256 scale = _mm256_load_ps(x[m * runs + run].scale + 8 * half);
        if constexpr (BITS == 8) {
          sums[m][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[half][m][r]), scale, sums[m][r]);
        } else {
          sums[m][r] = _mm256_fmadd_ps(part[half][m][r], scale, sums[m][r]);
        }
      }
}
#include "pairs_tile.h"
#include "finish.h"
#include "quantize.h"
#undef TARGET
}  // namespace avx2_pairs

namespace vnni_pairs {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c")))
template <int BITS>
constexpr int8_t kAdded = -128;
template <int BITS>
constexpr float kCode = BITS == 4 ? 16 : 1;
constexpr int kColumns = 4;
template <int COLUMNS>
constexpr int kPairsOf = COLUMNS == 1 ? 4 : 2;
using Sums = __m512;
SPARSEFORGE_RUN

INLINE void sum_lanes(Sums sums, float* to) {
  alignas(64) float lane[16];
  _mm512_store_ps(lane, sums);
  for (int row = 0; row < 2; ++row) {
    const float* const l = lane + 2 * row;
    to[row] = ((l[0] + l[1]) + (l[4] + l[5])) + ((l[8] + l[9]) + (l[12] + l[13]));
  }
}

// The scales of a run of two rows, COUNT steps of which are there, in turn one of the first row and one of the second: of
// levels eight in a step, in two registers; else four, in the first.
template <int BITS, int COUNT>
INLINE void load_scales(const PairsJob& job, const uint8_t* at, __m512 (&scales)[2]) {
  const auto there = static_cast<__mmask16>((1 << scales_at(COUNT, job.group)) - 1);  // no byte behind the last
  PREFETCH_FAR(at + kTileRows * job.scale_bytes);
  PREFETCH_FAR(at + (kTileRows + 1) * job.scale_bytes);
  const __m128i a = _mm_maskz_loadu_epi8(there, at), b = _mm_maskz_loadu_epi8(there, at + job.scale_bytes);
  if constexpr (BITS == kLevels) {
    scales[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpacklo_epi8(a, b)));
    scales[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpackhi_epi8(a, b)));
  } else {
    const __m512 found = _mm512_cvtph_ps(_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b)));
    const __m512i each = _mm512_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
    scales[0] = job.group == 32 ? found : _mm512_permutexvar_ps(each, found);
  }
}

// A run, COUNT steps of which are there, of ROWS pairs of weight rows by COLUMNS rows of x.
template <int BITS, int COLUMNS, int ROWS, int COUNT>
INLINE void multiply(const PairsJob& job, const int64_t* pairs, const Run<BITS>* x, int64_t runs, int64_t run,
                     Sums (*sums)[ROWS]) {
  const int64_t from = run * kRun;
  const __m512i two_bits = _mm512_set1_epi8(3), offset = _mm512_set1_epi8(-128);
  const __m512i group = _mm512_set4_epi32(0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000);
  const __m512i to_code = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  const __m512i to_high = _mm512_setr_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i to_low = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i scale_of_lane = BITS == kLevels ? _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
                                                : _mm512_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3);
  const __m512i zero = _mm512_setzero_si512();
  std::conditional_t<BITS == 8, __m512i, __m512> part[COLUMNS][ROWS] = {};
  __m512 scales[ROWS][2];
  __m512i starts[ROWS] = {};
  if constexpr (BITS != 8)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      load_scales<BITS, COUNT>(job, job.scales + 2 * pairs[r] * job.scale_bytes + scales_at(from, job.group), scales[r]);
#pragma GCC unroll 4
  for (int k = 0; k < COUNT; ++k) {
    const __m512i lanes = _mm512_add_epi32(scale_of_lane, _mm512_set1_epi32(BITS == kLevels ? k % 2 * 8 : 4 * k));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = pairs[r] * job.steps + from + k;
      const uint8_t *values = job.values + at * kPairValues<BITS>, *places = job.places + at * kPairPlaces;
      if (BITS == 8 || k % 2 == 0) PREFETCH_FAR(values + kPairs * job.steps * kPairValues<BITS>);
      if (k == 0) PREFETCH_FAR(places + kPairs * job.steps * kPairPlaces);
      const __m512i fields = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
      constexpr int kAndOr = 0xea;  // (a & b) | c
      const __m512i place = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(fields, to_low), two_bits, group, kAndOr);
      const auto picked = [&](int m) TARGET __attribute__((always_inline)) {
        return _mm512_shuffle_epi8(_mm512_load_si512(x[m * runs + run].q[k]), place);
      };
      if constexpr (BITS == 8) {
        const __m512i codes = _mm512_loadu_si512(values);
        starts[r] = _mm512_dpbusd_epi32(starts[r], offset, codes);
#pragma GCC unroll 4
        for (int m = 0; m < COLUMNS; ++m) part[m][r] = _mm512_dpbusd_epi32(part[m][r], picked(m), codes);
      } else {
        const __m512i nibbles = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        // the shuffle looks at the lower six bits of each byte
        const __m512i codes =
            BITS == kLevels
                ? _mm512_permutexvar_epi8(_mm512_srlv_epi32(nibbles, to_code), _mm512_load_si512(job.levels->of))
                : _mm512_and_si512(_mm512_sllv_epi32(nibbles, to_high), _mm512_set1_epi8(-16));  // times sixteen
        const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, codes));
        const __m512 scale = _mm512_permutexvar_ps(lanes, scales[r][BITS == kLevels ? k / 2 : 0]);
#pragma GCC unroll 4
        for (int m = 0; m < COLUMNS; ++m) {
          const __m512 sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, picked(m), codes));
          part[m][r] = _mm512_fmadd_ps(sum, scale, part[m][r]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512 scale = _mm512_load_ps(x[m * runs + run].scale);
      if constexpr (BITS == 8) {
        sums[m][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(part[m][r], starts[r])), scale, sums[m][r]);
      } else {
        sums[m][r] = _mm512_fmadd_ps(part[m][r], scale, sums[m][r]);
      }
    }
}
#include "pairs_tile.h"
#include "finish.h"
#include "quantize.h"
#undef TARGET
}  // namespace vnni_pairs
#endif

#include "amx_pairs.h"

#ifdef SPARSEFORGE_X86
#define SPARSEFORGE_KERNEL(space)                                                    \
  {space::tile<BITS>, space::finish<S>, space::quantize<S, space::Run<BITS>>, 1, \
   (in + kXGroup - 1) / kXGroup * static_cast<int64_t>(sizeof(space::Run<BITS>)), kMaxColumns, 2}

template <class S, int BITS>
TileKernel<S, PairsJob> kernel_of(Isa isa, int64_t columns, int64_t in) {
  if constexpr (std::is_same_v<S, bf16> && BITS == 4)
    if (isa >= Isa::amx && columns >= kAmxColumns)
      return amx_kernel<PairsJob>(amx::tile<amx_pairs::Block, PairsJob>, vnni_pairs::finish<S>, in);
  if (isa >= Isa::avx512 && has_vnni()) return SPARSEFORGE_KERNEL(vnni_pairs);
  return SPARSEFORGE_KERNEL(avx2_pairs);
}
#endif

PairsJob job_of(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in) {
  return {static_cast<const uint8_t*>(values.const_data_ptr()), static_cast<const uint8_t*>(places.const_data_ptr()),
          static_cast<const uint8_t*>(scales.const_data_ptr()), in / kStep, scales.size(1) * scales.element_size(),
          values.scalar_type() == at::kByte ? group_of(scales, in) : in,
          &levels_of(values.scalar_type() == at::kByte ? group_of(scales, in) : in, true)};
}

}  // namespace

bool is_pairs(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in) {
  if (in <= 0 || in % kStep || values.dim() != 2 || places.dim() != 2 || scales.dim() != 2) return false;
  const int64_t out = values.size(0);
  const bool eight = values.scalar_type() == at::kChar;
  const bool scaled = eight ? scales.scalar_type() == at::kFloat && scales.size(1) == 1
                            : values.scalar_type() == at::kByte && has_groups(scales, in);
  return scaled && out > 0 && out % 4 == 0 && places.scalar_type() == at::kByte && places.size(0) * 2 == out &&
         scales.size(0) == out && values.size(1) * (eight ? 2 : 4) == in && places.size(1) * 4 == in;
}

int64_t pairs_rows(Isa isa) {
#ifdef SPARSEFORGE_X86
  if (isa >= Isa::avx512 && has_vnni()) return 2048;
  if (isa >= Isa::avx2 && __builtin_cpu_supports("f16c")) return 512;
#endif
  return 0;
}

at::Tensor pairs_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& places,
                        const at::Tensor& scales, int64_t in_features, const std::optional<at::Tensor>& bias,
                        Activation activation, Isa isa) {
  TORCH_CHECK(is_pairs(values, places, scales, in_features), "not a weight of pairs");
  TORCH_CHECK(fits(x, values, in_features, bias, activation, /*codes=*/true), "x, bias or activation does not fit the weight");
  TORCH_CHECK(pairs_rows(isa) > 0, "this CPU has no AVX2");
  const int64_t out = values.size(0);
  const at::Tensor xc = x.contiguous(), vc = values.contiguous(), pc = places.contiguous(), sc = scales.contiguous();
  const PairsJob job = job_of(vc, pc, sc, in_features);
  const bool eight = values.scalar_type() == at::kChar;
  return with_output(xc, out, bias, activation, [&](const auto* from, const auto* added, auto* y) {
#ifdef SPARSEFORGE_X86
    using S = std::remove_pointer_t<decltype(y)>;
    const int64_t columns = xc.numel() / in_features;
    const auto kernel = eight                ? kernel_of<S, 8>(isa, columns, in_features)
                        : job.group == kFine ? kernel_of<S, kLevels>(isa, columns, in_features)
                                             : kernel_of<S, 4>(isa, columns, in_features);
    const uint8_t* const of_rows = eight || job.group == kFine ? job.scales + job.scale_bytes - kRowBytes : nullptr;
    multiply_in_tiles(kernel, job, from, columns, in_features, out, added, activation, y,
                      ScaleOfOutputs{of_rows, job.scale_bytes});
#endif
  });
}

at::Tensor pairs_half(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in) {
  TORCH_CHECK(is_pairs(values, places, scales, in), "not a weight of pairs");
#ifdef SPARSEFORGE_X86
  if (values.scalar_type() == at::kByte && scales.scalar_type() == at::kHalf) {
    const at::Tensor vc = values.contiguous(), pc = places.contiguous(), sc = scales.contiguous();
    return expanded<amx_pairs::Block>(job_of(vc, pc, sc, in), values.size(0), in);
  }
#endif
  return pairs_dense(values, places, scales, in).to(at::kBFloat16);
}

at::Tensor pairs_dense(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales,
                       int64_t in_features) {
  TORCH_CHECK(is_pairs(values, places, scales, in_features), "not a weight of pairs");
  const at::Tensor vc = values.contiguous(), pc = places.contiguous(), sc = scales.contiguous();
  const int64_t out = values.size(0);
  at::Tensor dense = at::zeros({out, in_features}, values.options().dtype(at::kFloat));
  const PairsJob job = job_of(vc, pc, sc, in_features);
  const bool eight = values.scalar_type() == at::kChar;
  float* const y = dense.data_ptr<float>();
  at::parallel_for(0, out / 2, std::max<int64_t>(1, 16384 / in_features), [&](int64_t from, int64_t to) {
    for (int64_t step = from * job.steps; step < to * job.steps; ++step) {
      const uint8_t *v = job.values + step * (eight ? kPairValues<8> : kPairValues<4>), *p = job.places + step * kPairPlaces;
      const int64_t row = step / job.steps * 2, input = step % job.steps * kStep;
      for (int64_t i = 0; i < 64; ++i) {
        const int64_t n = row + i % 16 / 8, k = input + i / 16 * 16 + i % 8 / 2 * 4 + (p[i % 16] >> i / 16 * 2 & 3);
        const int code = eight ? static_cast<int8_t>(v[i]) : job.levels->of[v[i % 32] >> i / 32 * 4 & 15];
        const uint8_t* const scales = job.scales + n * job.scale_bytes;
        float scale = eight || job.group == kFine ? read<float>(scales + job.scale_bytes - kRowBytes) : 1.f;
        if (!eight) scale *= group_scale(scales, k, job.group);
        // a damaged weight may have both survivors of a group at one place
        y[n * in_features + k] += static_cast<float>(code) * scale;
      }
    }
  });
  return dense;
}

}  // namespace sparseforge
