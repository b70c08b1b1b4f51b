// y = act(x W^T + b), W 2:4 with int4 codes, in the layout of pairs.py.
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

constexpr int64_t kPairValues = 32, kPairPlaces = 16;  // bytes of a step of two rows
constexpr int64_t kPairs = kTileRows / 2;              // of a tile

struct PairsJob {
  const uint8_t *values, *places, *scales;
  int64_t steps;        // of kStep inputs
  int64_t scale_bytes;  // of a weight row
  int64_t group;        // inputs that share a scale
};

#ifdef SPARSEFORGE_X86
namespace vnni_pairs {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c")))
constexpr int kSums = 8, kNear = 8;

// Inputs of a run of a row of x, 128 added, and the scale of each lane.
struct alignas(64) Run {
  int8_t q[kRun][kStep];
  float scale[16];
};

INLINE void set_offsets(Run& x) {
  for (int k = 0; k < kRun; ++k)
    _mm512_store_si512(x.q[k], _mm512_xor_si512(_mm512_load_si512(x.q[k]), _mm512_set1_epi8(-128)));
  float near[kSums];
  std::memcpy(near, x.scale, sizeof(near));
  for (int lane = 0; lane < 16; ++lane) x.scale[lane] = near[lane / 4 * 2 + lane % 2] / 16;  // codes come times 16
}

// The scales of two rows from `at` on, of the COUNT steps that begin there: eight of the first, eight of the second.
template <int COUNT>
INLINE __m512 scales_of(const PairsJob& job, const uint8_t* at) {
  const uint8_t* const second = at + job.scale_bytes;
  PREFETCH_FAR(at + kTileRows * job.scale_bytes);
  PREFETCH_FAR(second + kTileRows * job.scale_bytes);
  const auto load = [](const uint8_t* from, int halves) TARGET __attribute__((always_inline)) {  // no byte behind the last
    return _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << halves) - 1), from);
  };
  if (job.group == 32) {
    return _mm512_cvtph_ps(_mm256_set_m128i(load(second, 2 * COUNT), load(at, 2 * COUNT)));
  }
  const __m128i both = _mm_unpacklo_epi32(load(at, COUNT / 2), load(second, COUNT / 2));
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(each, _mm512_castps256_ps512(_mm256_cvtph_ps(both)));
}

// A run, COUNT steps of which are there, of ROWS pairs of weight rows by COLUMNS rows of x.
template <int COLUMNS, int ROWS, int COUNT>
INLINE void multiply(const PairsJob& job, const int64_t* pairs, const Run* x, int64_t runs, int64_t run,
                     __m512 (*sums)[ROWS]) {
  const int64_t from = run * kRun;
  const __m512i high = _mm512_set1_epi8(-16), two_bits = _mm512_set1_epi8(3), offset = _mm512_set1_epi8(-128);
  const __m512i group = _mm512_set4_epi32(0x0c0c0808, 0x04040000, 0x0c0c0808, 0x04040000);
  const __m512i to_high = _mm512_setr_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i to_low = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i scale_of_lane = _mm512_setr_epi32(0, 0, 8, 8, 0, 0, 8, 8, 1, 1, 9, 9, 1, 1, 9, 9);
  __m512 part[COLUMNS][ROWS], scales[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const uint8_t* const at = job.scales + 2 * pairs[r] * job.scale_bytes;
    scales[r] = scales_of<COUNT>(job, at + from * kStep / job.group * 2);
#pragma GCC unroll 4
    for (int m = 0; m < COLUMNS; ++m) part[m][r] = _mm512_setzero_ps();
  }
#pragma GCC unroll 4
  for (int k = 0; k < COUNT; ++k) {
    const __m512i lanes = _mm512_add_epi32(scale_of_lane, _mm512_set1_epi32(2 * k));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = pairs[r] * job.steps + from + k;
      const uint8_t *values = job.values + at * kPairValues, *places = job.places + at * kPairPlaces;
      if (k % 2 == 0) PREFETCH_FAR(values + kPairs * job.steps * kPairValues);
      if (k == 0) PREFETCH_FAR(places + kPairs * job.steps * kPairPlaces);
      const __m512i nibbles = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
      const __m512i codes = _mm512_and_si512(_mm512_sllv_epi32(nibbles, to_high), high);
      const __m512i fields = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
      constexpr int kAndOr = 0xea;  // (a & b) | c
      const __m512i from_place = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(fields, to_low), two_bits, group, kAndOr);
      const __m512i zero = _mm512_setzero_si512();
      const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, codes));
      const __m512 scale = _mm512_permutexvar_ps(lanes, scales[r]);
#pragma GCC unroll 4
      for (int m = 0; m < COLUMNS; ++m) {
        const __m512i picked = _mm512_shuffle_epi8(_mm512_load_si512(x[m * runs + run].q[k]), from_place);
        part[m][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, picked, codes)), scale, part[m][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      sums[m][r] = _mm512_fmadd_ps(part[m][r], _mm512_load_ps(x[m * runs + run].scale), sums[m][r]);
}

template <int COLUMNS>
TARGET void tile_of(const PairsJob& job, const Run* x, int64_t first, int64_t last, float* out) {
  constexpr int R = COLUMNS == 1 ? 4 : 2;  // pairs in work at a time: their sums are in registers
  const int64_t runs = (job.steps + kRun - 1) / kRun, whole_runs = job.steps / kRun;
  for (int i = 0; i < kPairs / R; ++i) {
    int64_t pairs[R];
    for (int r = 0; r < R; ++r) pairs[r] = std::min(first / 2 + i * R + r, last / 2);  // beyond the last: not stored
    __m512 sums[COLUMNS][R];
    for (int m = 0; m < COLUMNS; ++m)
      for (int r = 0; r < R; ++r) sums[m][r] = _mm512_setzero_ps();
    for (int64_t run = 0; run < whole_runs; ++run) multiply<COLUMNS, R, kRun>(job, pairs, x, runs, run, sums);
    const auto rest = [&](auto count) TARGET { multiply<COLUMNS, R, count()>(job, pairs, x, runs, whole_runs, sums); };
    if (job.steps % kRun == 1) rest(std::integral_constant<int, 1>{});
    if (job.steps % kRun == 2) rest(std::integral_constant<int, 2>{});
    if (job.steps % kRun == 3) rest(std::integral_constant<int, 3>{});
    for (int m = 0; m < COLUMNS; ++m)
      for (int r = 0; r < R; ++r) {
        alignas(64) float lane[16];
        _mm512_store_ps(lane, sums[m][r]);
        float* const to = out + m * kTileRows + 2 * (i * R + r);
        for (int row = 0; row < 2; ++row) {
          const float* const l = lane + 2 * row;
          to[row] = ((l[0] + l[1]) + (l[4] + l[5])) + ((l[8] + l[9]) + (l[12] + l[13]));
        }
      }
  }
}

void tile(const PairsJob& job, const void* rows, int64_t columns, int64_t first, int64_t last, float* out) {
  const auto* x = static_cast<const Run*>(rows);
  const int64_t runs = (job.steps + kRun - 1) / kRun, passes = (columns + 3) / 4;
  for (int64_t p = 0; p < passes; ++p) {  // of much the same size
    const int64_t m = p * columns / passes;
    const auto call = [&](auto of) { of(job, x + m * runs, first, last, out + m * kTileRows); };
    switch ((p + 1) * columns / passes - m) {
      case 1:
        call(tile_of<1>);
        break;
      case 2:
        call(tile_of<2>);
        break;
      case 3:
        call(tile_of<3>);
        break;
      default:
        call(tile_of<4>);
    }
  }
}
#include "finish.h"
#include "quantize.h"
#undef TARGET
}  // namespace vnni_pairs
#endif

PairsJob job_of(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in) {
  return {static_cast<const uint8_t*>(values.const_data_ptr()), static_cast<const uint8_t*>(places.const_data_ptr()),
          static_cast<const uint8_t*>(scales.const_data_ptr()), in / kStep, scales.size(1) * 2, in / scales.size(1)};
}

}  // namespace

bool is_pairs(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in) {
  if (in <= 0 || in % kStep || values.dim() != 2 || places.dim() != 2 || scales.dim() != 2) return false;
  const int64_t out = values.size(0), groups = scales.size(1);
  return out > 0 && out % 4 == 0 && values.scalar_type() == at::kByte && places.scalar_type() == at::kByte &&
         scales.scalar_type() == at::kHalf && places.size(0) == out && scales.size(0) == out &&
         values.size(1) * 4 == in && places.size(1) * 8 == in && groups > 0 && in % groups == 0 &&
         (in / groups == 32 || in / groups == 128);
}

int64_t pairs_rows(Isa isa) { return isa >= Isa::avx512 && has_vnni() ? 2048 : 0; }

at::Tensor pairs_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& places,
                        const at::Tensor& scales, int64_t in_features, const std::optional<at::Tensor>& bias,
                        Activation activation) {
  TORCH_CHECK(is_pairs(values, places, scales, in_features), "not a weight of pairs");
  TORCH_CHECK(fits(x, values, in_features, bias, activation, /*codes=*/true), "x, bias or activation does not fit the weight");
  const int64_t out = values.size(0);
  const at::Tensor xc = x.contiguous(), vc = values.contiguous(), pc = places.contiguous(), sc = scales.contiguous();
  const at::Tensor bc = bias ? bias->contiguous() : at::Tensor();
  auto sizes = x.sizes().vec();
  sizes.back() = activation == Activation::silu_mul ? out / 2 : out;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const PairsJob job = job_of(vc, pc, sc, in_features);
  const auto call = [&](auto zero) {
    using S = decltype(zero);
#ifdef SPARSEFORGE_X86
    const TileKernel<S, PairsJob> kernel{vnni_pairs::tile, vnni_pairs::finish<S>,
                                         vnni_pairs::quantize<S, vnni_pairs::Run>, sizeof(vnni_pairs::Run)};
    multiply_in_tiles(kernel, job, static_cast<const S*>(xc.const_data_ptr()), x.numel() / in_features, in_features, out,
                      bias ? static_cast<const S*>(bc.const_data_ptr()) : nullptr, activation,
                      static_cast<S*>(y.mutable_data_ptr()), [](float*, int64_t, int64_t, int64_t) {});
#endif
  };
  TORCH_CHECK(pairs_rows(Isa::avx512) > 0, "this CPU has no AVX-512 with VNNI");
  if (x.scalar_type() == at::kBFloat16) {
    call(bf16{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "bfloat16 or float32 only");
    call(0.f);
  }
  return y;
}

at::Tensor pairs_dense(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales,
                       int64_t in_features) {
  TORCH_CHECK(is_pairs(values, places, scales, in_features), "not a weight of pairs");
  const at::Tensor vc = values.contiguous(), pc = places.contiguous(), sc = scales.contiguous();
  const int64_t out = values.size(0);
  at::Tensor dense = at::zeros({out, in_features}, values.options().dtype(at::kFloat));
  const PairsJob job = job_of(vc, pc, sc, in_features);
  float* const y = dense.data_ptr<float>();
  at::parallel_for(0, out / 2, std::max<int64_t>(1, 16384 / in_features), [&](int64_t from, int64_t to) {
    for (int64_t step = from * job.steps; step < to * job.steps; ++step) {
      const uint8_t *v = job.values + step * kPairValues, *p = job.places + step * kPairPlaces;
      const int64_t row = step / job.steps * 2, input = step % job.steps * kStep;
      for (int64_t i = 0; i < 64; ++i) {
        const int64_t n = row + i % 16 / 8, k = input + i / 16 * 16 + i % 8 / 2 * 4 + (p[i % 16] >> i / 16 * 2 & 3);
        const int code = ((v[i % 32] >> i / 32 * 4 & 15) ^ 8) - 8;
        // a damaged weight may have both survivors of a group at one place
        y[n * in_features + k] += static_cast<float>(code) * half_of(job.scales + n * job.scale_bytes + k / job.group * 2);
      }
    }
  });
  return dense;
}

}  // namespace sparseforge
