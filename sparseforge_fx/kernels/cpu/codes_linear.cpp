// y = act(x W^T + b), W int8 or int4 codes times scales (see packed.py), 2:4 or dense.
//
// x is rounded to 8 bits, so that products are of integers, exact, and summed in groups before they meet their scales
// in float32. Of 256 inputs of a row those share a scale that are summed in the same lane of a register: 16 with AVX-512,
// 32 with AVX2, 128 without either. Scales of such small groups cost nothing: a lane is multiplied by its own. With AMX
// several rows have fifteen bits before int8 (amx_bytes.h), and before int4 stay bfloat16 (amx_codes.h).

#include "codes_linear.h"

#include <ATen/ops/zeros.h>

#include "multiply_in_tiles.h"

#include <type_traits>

namespace sparseforge {
namespace {

// A run of inputs of a row of x. `offset` takes back what is added to codes to make them unsigned: instructions multiply
// unsigned by signed bytes, sums of four in a lane. With int4 codes there is one for each step, with int8 one for all.
template <int BITS>
struct alignas(64) XRun {
  int8_t q[kRun][kStep];
  int32_t offset[BITS == 8 ? 1 : kRun][16];
  float scale[16];  // of each lane
};

// Weight rows from `first` on, one after the other.
struct Rows {
  const uint8_t* values;
  const uint8_t* mask;
  const uint8_t* scales;
  int64_t first;
};

struct CodesJob {
  Rows all, last;                              // `last`: a copy of the last ones, behind which may be read
  int64_t row_bytes, mask_bytes, scale_bytes;  // of a weight row
  int64_t runs, whole_runs, steps;             // of kXGroup inputs, and those that are complete; of kStep inputs
  int64_t group;                               // inputs that share a scale; 0: all of a row
  const Levels* levels;                        // of int4
};

constexpr int64_t kAmxColumns = 6;  // tile registers pay from so many rows of x (measured)

namespace portable_codes {
#define TARGET
constexpr bool kWide = false;  // thirty-two registers
constexpr int kSums = 2;       // lanes of integers, each of so many neighbouring inputs
constexpr int kNear = 32;
struct Codes {
  int8_t lane[64];
};
struct Scales {  // of kRun steps, four in each
  float lane[16];
};
struct Scale {
  float quarter[4];
};
struct Acc {
  float lane[2];
};
struct Integers {
  int32_t lane[2];
};
template <int BITS>
using Part = std::conditional_t<BITS == 8, Integers, Acc>;

template <bool SPARSE, int BITS>
INLINE Codes codes_of(const uint8_t* values, const uint8_t* mask, const Levels* levels) {
  int8_t kept[64];
  constexpr int count = SPARSE ? 32 : 64;
  if (BITS == 8) {
    std::memcpy(kept, values, count);
  } else {
    for (int i = 0; i < count; ++i) kept[i] = levels->of[values[i / 2] >> (i % 2 * 4) & 15];
  }
  Codes out;
  if (!SPARSE) {
    std::memcpy(out.lane, kept, 64);
    return out;
  }
  for (int byte = 0; byte < 8; ++byte) {
    const uint8_t* from = places.value_of_place[mask[byte]];
    for (int i = 0; i < 8; ++i) out.lane[8 * byte + i] = from[i] < 4 ? kept[4 * byte + from[i]] : 0;
  }
  return out;
}
template <int>
INLINE Scales scales_of(const uint8_t* scales, int64_t group) {
  Scales out;
  for (int i = 0; i < 16; ++i) out.lane[i] = group_scale(scales, i * 16, group);
  return out;
}
template <int>
INLINE Scale scale_of(const Scales& scales, int k) {
  Scale out;
  std::memcpy(out.quarter, scales.lane + 4 * k, sizeof(out.quarter));
  return out;
}
template <int BITS>
INLINE void set_offsets(XRun<BITS>&) {}
template <int BITS>
INLINE Part<BITS> start(const XRun<BITS>&) {
  return Part<BITS>{};
}
using XStep = const int8_t*;
INLINE XStep load_x(const int8_t* q) { return q; }
INLINE int32_t product(const Codes& w, XStep x, int from, int count) {
  int32_t out = 0;
  for (int i = from; i < from + count; ++i) out += int32_t{w.lane[i]} * x[i];
  return out;
}
INLINE Integers add8(Integers part, const Codes& w, XStep x) {
  return {part.lane[0] + product(w, x, 0, kNear), part.lane[1] + product(w, x, kNear, kNear)};
}
template <int BITS>
INLINE Acc add4(Acc part, const Codes& w, const Scale& scale, XStep x, const XRun<BITS>&, int) {
  for (int i = 0; i < 4; ++i) part.lane[i / 2] += scale.quarter[i] * static_cast<float>(product(w, x, 16 * i, 16));
  return part;
}
template <class P>
INLINE Acc scaled(Acc acc, const P& part, const float* x_scale) {
  return {acc.lane[0] + x_scale[0] * static_cast<float>(part.lane[0]),
          acc.lane[1] + x_scale[1] * static_cast<float>(part.lane[1])};
}
INLINE void sum_four(const Acc* a, float* out) {
  for (int k = 0; k < 4; ++k) out[k] = a[k].lane[0] + a[k].lane[1];
}
#include "codes_tile.h"
#include "finish.h"
#include "quantize.h"
#undef TARGET
}  // namespace portable_codes

#ifdef SPARSEFORGE_X86
// For each byte of bitmask the shuffle that puts its four values at their places, zeros elsewhere.
struct Shuffles {
  uint64_t of[256];

  Shuffles() {
    for (int byte = 0; byte < 256; ++byte) {
      of[byte] = 0;
      for (int place = 0; place < 8; ++place) {
        const uint8_t from = places.value_of_place[byte][place];
        of[byte] |= uint64_t{from < 4 ? from : 0x80u} << 8 * place;
      }
    }
  }
};

const Shuffles& shuffles() {
  static const Shuffles table;
  return table;
}

// For the sums of four vectors: half-summed two by two, and the rest of it.
#define SPARSEFORGE_SUMS                                                                                          \
  INLINE __m256 pairs(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); } \
  INLINE __m128 halves(__m256 ab, __m256 cd) {                                                                    \
    const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));                           \
    const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));                          \
    const __m256 each = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));                             \
    return _mm_add_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));                              \
  }

namespace avx2_codes {  // int8 codes stay signed: the sign goes to x, so that pairs of products do not overflow 16 bits;
                       // what int4 codes stand for becomes unsigned
#define TARGET __attribute__((target("avx2,fma,f16c")))
constexpr bool kWide = false;
constexpr int kSums = 8, kNear = 4;
struct Codes {
  __m256i part[2];
};
using Scales = Sixteen;
struct Scale {
  __m256 part[2];
};
using Acc = __m256;
template <int BITS>
using Part = std::conditional_t<BITS == 8, __m256i, __m256>;

INLINE __m128i unpack_nibbles(const uint8_t* values) {  // sixteen, in order
  const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(both, low), _mm_and_si128(_mm_srli_epi16(both, 4), low));
}
INLINE __m256i unpack_more_nibbles(const uint8_t* values) {  // thirty-two
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m256i both = _mm256_permute4x64_epi64(_mm256_castsi128_si256(all), 0x50), low = _mm256_set1_epi8(15);
  return _mm256_unpacklo_epi8(_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
}
template <bool SPARSE, int BITS>
INLINE Codes codes_of(const uint8_t* values, const uint8_t* mask, const Levels* levels) {
  const uint64_t* const table = shuffles().of;
  Codes out;
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    if constexpr (!SPARSE && BITS == 8) {
      out.part[p] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * p));
    } else if constexpr (!SPARSE) {
      out.part[p] = unpack_more_nibbles(values + 16 * p);
    } else {
      __m128i kept;
      if constexpr (BITS == 8) {
        kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * p));
      } else {
        kept = unpack_nibbles(values + 8 * p);
      }
      const uint8_t* m = mask + 4 * p;
      const __m256i from = _mm256_setr_epi64x(table[m[0]], table[m[1]], table[m[2]], table[m[3]]);
      const __m256i base = _mm256_setr_epi64x(0, 0x0404040404040404, 0x0808080808080808, 0x0c0c0c0c0c0c0c0c);
      out.part[p] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(kept), _mm256_add_epi8(from, base));
    }
    if constexpr (BITS != 8)
      out.part[p] = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(levels->above)), out.part[p]);
  }
  return out;
}
template <int>
INLINE Scales scales_of(const uint8_t* scales, int64_t group) {
  return sixteen_of(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)), group);
}
SPARSEFORGE_SUMS
template <int>
INLINE Scale scale_of(const Scales& scales, int k) {
  const __m256 eight = k < 2 ? scales.low : scales.high;
  const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(k % 2 * 4));
  return {{_mm256_permutevar8x32_ps(eight, lanes),
           _mm256_permutevar8x32_ps(eight, _mm256_add_epi32(lanes, _mm256_set1_epi32(2)))}};
}
template <int BITS>
INLINE void set_offsets(XRun<BITS>& x) {
  if (BITS == 8) return;
  for (int k = 0; k < kRun; ++k)
    for (int lane = 0; lane < 16; ++lane) {
      const int8_t* const four = x.q[k] + 4 * lane;
      x.offset[k][lane] = -kAbove * (four[0] + four[1] + four[2] + four[3]);
    }
}
template <int BITS>
INLINE Part<BITS> start(const XRun<BITS>&) {
  return Part<BITS>{};
}
struct XStep {
  __m256i part[2];
};
INLINE XStep load_x(const int8_t* q) {
  const auto* from = reinterpret_cast<const __m256i*>(q);
  return {{_mm256_load_si256(from), _mm256_load_si256(from + 1)}};
}
INLINE __m256i product(__m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE __m256i add8(__m256i part, const Codes& w, const XStep& x) {
  return _mm256_add_epi32(part, _mm256_add_epi32(product(w.part[0], x.part[0]), product(w.part[1], x.part[1])));
}
template <int BITS>
INLINE __m256 add4(__m256 part, const Codes& w, const Scale& scale, const XStep& x, const XRun<BITS>& run, int k) {
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    const __m256i offset = _mm256_load_si256(reinterpret_cast<const __m256i*>(run.offset[k]) + p);
    const __m256i pairs = _mm256_maddubs_epi16(w.part[p], x.part[p]);
    const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), offset);
    part = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale.part[p], part);
  }
  return part;
}
INLINE Acc scaled(Acc acc, __m256i part, const float* x_scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), _mm256_load_ps(x_scale), acc);
}
INLINE Acc scaled(Acc acc, __m256 part, const float* x_scale) {
  return _mm256_fmadd_ps(part, _mm256_load_ps(x_scale), acc);
}
INLINE void sum_four(const Acc* a, float* out) { _mm_storeu_ps(out, halves(pairs(a[0], a[1]), pairs(a[2], a[3]))); }
#include "codes_tile.h"
#include "finish.h"
#include "quantize.h"
#undef TARGET
}  // namespace avx2_codes

namespace vnni_codes {  // codes, and what they stand for, become unsigned
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c")))
constexpr bool kWide = true;
constexpr int kSums = 16, kNear = 4;
using Codes = __m512i;
using Scales = __m512;
using Scale = __m512;
using Acc = __m512;
template <int BITS>
using Part = std::conditional_t<BITS == 8, __m512i, __m512>;
constexpr int64_t kNibbles = 0x1c1814100c080400;  // bits at which the eight codes of four bytes begin

// Thirty-two bytes to their places among sixty-four; zeros elsewhere.
INLINE __m512i place(__m256i kept, const uint8_t* mask) {
  return _mm512_maskz_expand_epi8(read<uint64_t>(mask), _mm512_castsi256_si512(kept));
}
template <bool SPARSE, int BITS>
INLINE Codes codes_of(const uint8_t* values, const uint8_t* mask, const Levels* levels) {
  if constexpr (BITS == 8) {
    __m512i codes;
    if constexpr (SPARSE) {
      codes = place(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), mask);
    } else {
      codes = _mm512_loadu_si512(values);
    }
    return _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
  }
  __m512i nibbles;  // in the low halves of bytes; a shuffle looks at the lower six bits
  if constexpr (SPARSE) {
    const __m256i wide = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    nibbles = place(_mm256_multishift_epi64_epi8(_mm256_set1_epi64x(kNibbles), wide), mask);
  } else {
    const __m512i wide = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    nibbles = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kNibbles), wide);
  }
  if constexpr (BITS == kLevels) return _mm512_permutexvar_epi8(nibbles, _mm512_load_si512(levels->above));
  constexpr int kAndXor = 0x6a;  // (a & b) ^ c; shuffles are what there are too few units for
  return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), _mm512_set1_epi8(kAbove), kAndXor);
}
// Of levels four in a step; else two, in the lower half.
template <int BITS>
INLINE Scales scales_of(const uint8_t* scales, int64_t group) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  if constexpr (BITS == kLevels) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  const __m256 found = _mm256_cvtph_ps(bytes), two = _mm256_permutevar8x32_ps(found, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  return _mm512_castps256_ps512(group == 32 ? found : two);
}
SPARSEFORGE_SUMS
template <int BITS>
INLINE Scale scale_of(Scales scales, int k) {
  const __m512i lanes = BITS == kLevels ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                        : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32((BITS == kLevels ? 4 : 2) * k)), scales);
}
template <int BITS>
INLINE void set_offsets(XRun<BITS>& x) {
  constexpr int added = BITS == 8 ? 128 : kAbove;
  __m512i all = _mm512_setzero_si512();
  for (int k = 0; k < kRun; ++k) {
    if constexpr (BITS != 8) all = _mm512_setzero_si512();
    all = _mm512_dpbusd_epi32(all, _mm512_set1_epi8(static_cast<char>(added)), _mm512_load_si512(x.q[k]));
    _mm512_store_si512(x.offset[BITS == 8 ? 0 : k], _mm512_sub_epi32(_mm512_setzero_si512(), all));
  }
}
INLINE __m512i start(const XRun<8>& x) { return _mm512_load_si512(x.offset[0]); }
template <int BITS>
INLINE __m512 start(const XRun<BITS>&) {
  return _mm512_setzero_ps();
}
using XStep = __m512i;
INLINE XStep load_x(const int8_t* q) {
  XStep x = _mm512_load_si512(q);
  asm("" : "+v"(x));  // in a register: the compiler would load it once more for every weight row
  return x;
}
INLINE __m512i add8(__m512i part, Codes w, XStep x) { return _mm512_dpbusd_epi32(part, w, x); }
template <int BITS>
INLINE __m512 add4(__m512 part, Codes w, Scale scale, XStep x, const XRun<BITS>& run, int k) {
  const __m512i sums = _mm512_dpbusd_epi32(_mm512_load_si512(run.offset[k]), w, x);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, part);
}
INLINE Acc scaled(Acc acc, __m512i part, const float* x_scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), _mm512_load_ps(x_scale), acc);
}
INLINE Acc scaled(Acc acc, __m512 part, const float* x_scale) {
  return _mm512_fmadd_ps(part, _mm512_load_ps(x_scale), acc);
}
INLINE __m256 fold(__m512 a) {
  const __m512d b = _mm512_castps_pd(a);
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(b, 1)));
}
INLINE void sum_four(const Acc* a, float* out) {
  _mm_storeu_ps(out, halves(pairs(fold(a[0]), fold(a[1])), pairs(fold(a[2]), fold(a[3]))));
}
#include "codes_tile.h"
#include "finish.h"
#include "quantize.h"
#undef TARGET
}  // namespace vnni_codes

#endif

#include "amx_bytes.h"
#include "amx_codes.h"

#define SPARSEFORGE_KERNEL(space)                                                                                  \
  {sparse ? space::tile<true, BITS> : space::tile<false, BITS>, space::finish<S>, space::quantize<S, XRun<BITS>>, 1, \
   (in + kXGroup - 1) / kXGroup * static_cast<int64_t>(sizeof(XRun<BITS>)), kMaxColumns, 2}

template <class S, int BITS>
TileKernel<S, CodesJob> kernel_of(Isa isa, bool sparse, int64_t columns, int64_t in) {
#ifdef SPARSEFORGE_X86
  if (isa >= Isa::amx && columns >= kAmxColumns) {
    if constexpr (BITS == 8) return amx_bytes::kernel<S>(sparse, vnni_codes::finish<S>, in);
    if constexpr (BITS == 4 && std::is_same_v<S, bf16>)
      return amx_kernel<CodesJob>(
          sparse ? amx::tile<amx_codes::Block<true>, CodesJob> : amx::tile<amx_codes::Block<false>, CodesJob>,
          vnni_codes::finish<S>, in);
  }
  if (isa >= Isa::avx512 && has_vnni()) return SPARSEFORGE_KERNEL(vnni_codes);
  if (isa >= Isa::avx2 && __builtin_cpu_supports("f16c")) return SPARSEFORGE_KERNEL(avx2_codes);
#endif
  return SPARSEFORGE_KERNEL(portable_codes);
}

// Where a run is incomplete, whole ones are read nevertheless: of the last rows that would be beyond the memory.
at::Tensor copy_last(CodesJob& job, int64_t out) {
  if (job.whole_runs == job.runs) return {};
  const auto within = [](int64_t reach, int64_t bytes) { return bytes ? (reach + bytes - 1) / bytes : 0; };
  const int64_t count = std::min(
      out, std::max({within(kStep, job.row_bytes), within(kStep / 8, job.mask_bytes), within(16, job.scale_bytes)}));
  const at::Tensor memory = at::zeros({count * (job.row_bytes + job.mask_bytes + job.scale_bytes) + 3 * kStep}, at::kByte);
  auto* to = static_cast<uint8_t*>(memory.data_ptr());
  const auto copied = [&](const uint8_t* from, int64_t bytes) {
    const uint8_t* const start = to;
    std::memcpy(to, from + (out - count) * bytes, count * bytes);
    to += count * bytes + kStep;
    return start;
  };
  job.last = {copied(job.all.values, job.row_bytes), copied(job.all.mask, job.mask_bytes),
              copied(job.all.scales, job.scale_bytes), out - count};
  return memory;
}

template <class S>
void run(const S* x, int64_t columns, int64_t in, CodesJob job, bool sparse, int bits, int64_t out_features,
         const S* bias, Activation activation, Isa isa, S* y) {
  const auto kernel = bits == 8            ? kernel_of<S, 8>(isa, sparse, columns, in)
                      : job.group == kFine ? kernel_of<S, kLevels>(isa, sparse, columns, in)
                                           : kernel_of<S, 4>(isa, sparse, columns, in);
  const at::Tensor last = copy_last(job, out_features);
  const bool by_rows = job.group == kFine || (bits == 8 && !kernel.amx);  // amx_bytes.h has done it
  multiply_in_tiles(kernel, job, x, columns, in, out_features, bias, activation, y,
                    ScaleOfOutputs{by_rows ? job.all.scales + job.scale_bytes - kRowBytes : nullptr, job.scale_bytes});
}

}  // namespace

bool is_codes(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales, int64_t in) {
  if (in <= 0 || values.dim() != 2 || mask.dim() != 2 || scales.dim() != 2) return false;
  const int64_t out = values.size(0), padded = (in + 7) / 8 * 8;
  const bool sparse = mask.size(1) != 0, four = values.scalar_type() == at::kByte;
  if (!four && values.scalar_type() != at::kChar) return false;
  const bool scaled = four ? has_groups(scales, in) : scales.scalar_type() == at::kFloat && scales.size(1) == 1;
  return scaled && scales.size(0) == out && mask.scalar_type() == at::kByte && (!sparse || mask.size(0) == out) &&
         values.size(1) * (sparse ? 2 : 1) * (four ? 2 : 1) == padded && (!sparse || mask.size(1) * 8 == padded);
}

namespace {

CodesJob job_of(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales, int64_t in) {
  const int64_t padded = (in + 7) / 8 * 8;
  CodesJob job{};
  job.all.values = static_cast<const uint8_t*>(values.const_data_ptr());
  job.all.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  job.all.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  job.last.first = values.size(0);
  job.row_bytes = values.size(1);
  job.mask_bytes = mask.size(1);
  job.scale_bytes = scales.size(1) * scales.element_size();
  job.runs = (padded + kXGroup - 1) / kXGroup;
  job.steps = (padded + kStep - 1) / kStep;
  job.whole_runs = padded / kXGroup;
  job.group = values.scalar_type() == at::kByte ? group_of(scales, in) : 0;
  job.levels = &levels_of(job.group, mask.size(1) != 0);
  return job;
}

}  // namespace

at::Tensor codes_half(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales, int64_t in) {
  TORCH_CHECK(is_codes(values, mask, scales, in), "not a packed weight of codes");
#ifdef SPARSEFORGE_X86
  const at::Tensor vc = values.contiguous(), mc = mask.contiguous(), sc = scales.contiguous();
  const CodesJob job = job_of(vc, mc, sc, in);
  const bool sparse = mask.size(1) != 0;
  const int64_t out = values.size(0);
  if (job.group == kFine) return codes_dense(values, mask, scales, in).to(at::kBFloat16);
  if (values.scalar_type() == at::kByte)
    return sparse ? expanded<amx_codes::Block<true>>(job, out, in) : expanded<amx_codes::Block<false>>(job, out, in);
  return sparse ? expanded<amx_bytes::HalfBlock<true>>(job, out, in) : expanded<amx_bytes::HalfBlock<false>>(job, out, in);
#endif
  return codes_dense(values, mask, scales, in).to(at::kBFloat16);
}

int64_t max_codes_rows(at::ScalarType dtype, int64_t in, Isa isa) {
#ifdef SPARSEFORGE_X86
  // what each tile takes beside its products weighs less, the more inputs it has
  if (isa >= Isa::amx && dtype == at::kBFloat16) return in / 4;
  if (has_vnni()) return 2048;  // with AVX-512 alone never slower so far
#endif
  return 512;
}

at::Tensor codes_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask,
                        const at::Tensor& scales, int64_t in_features, const std::optional<at::Tensor>& bias,
                        Activation act, Isa isa) {
  TORCH_CHECK(is_codes(values, mask, scales, in_features), "not a packed weight of codes");
  TORCH_CHECK(fits(x, values, in_features, bias, act, /*codes=*/true), "x, bias or activation does not fit the weight");
  const int64_t out_features = values.size(0);
  const at::Tensor xc = x.contiguous(), vc = values.contiguous(), mc = mask.contiguous(), sc = scales.contiguous();
  const CodesJob job = job_of(vc, mc, sc, in_features);
  const bool sparse = mask.size(1) != 0;
  const int bits = values.scalar_type() == at::kByte ? 4 : 8;
  return with_output(xc, out_features, bias, act, [&](const auto* from, const auto* added, auto* y) {
    run(from, xc.numel() / in_features, in_features, job, sparse, bits, out_features, added, act, isa, y);
  });
}

at::Tensor codes_dense(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales,
                       int64_t in_features) {
  TORCH_CHECK(is_codes(values, mask, scales, in_features), "not a packed weight of codes");
  const at::Tensor vc = values.contiguous(), mc = mask.contiguous(), sc = scales.contiguous();
  const int64_t out = values.size(0);
  const bool sparse = mask.size(1) != 0, four = values.scalar_type() == at::kByte;
  at::Tensor dense = at::empty({out, in_features}, values.options().dtype(at::kFloat));
  const CodesJob job = job_of(vc, mc, sc, in_features);
  float* const y = dense.data_ptr<float>();
  at::parallel_for(0, out, std::max<int64_t>(1, 32768 / in_features), [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      const uint8_t* v = job.all.values + n * job.row_bytes;
      const auto code = [&](int64_t i) {
        return four ? job.levels->of[v[i / 2] >> (i % 2 * 4) & 15] : static_cast<int8_t>(v[i]);
      };
      const uint8_t* s = job.all.scales + n * job.scale_bytes;
      const float row = four && job.group != kFine ? 1.f : read<float>(s + job.scale_bytes - kRowBytes);
      float scale = row;
      for (int64_t k = 0; k < in_features; ++k) {
        if (four && k % job.group == 0) scale = row * group_scale(s, k, job.group);
        const uint8_t from_place = sparse ? places.value_of_place[job.all.mask[n * job.mask_bytes + k / 8]][k % 8] : 0;
        const int64_t at = sparse ? k / 8 * 4 + from_place : k;
        y[n * in_features + k] = from_place < 4 ? scale * static_cast<float>(code(at)) : 0.f;
      }
    }
  });
  return dense;
}

}  // namespace sparseforge
