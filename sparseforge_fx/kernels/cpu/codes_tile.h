// Dot products of sixteen weight rows of codes with up to kMaxColumns rows of x. Included into each namespace of
// codes_linear.cpp. Four weight rows are in work at a time, as in tile.h, and summed in one order: the same bits always.

struct Streams {
  const uint8_t* values[4];
  const uint8_t* mask[4];
  const uint8_t* scales[4];
};

INLINE Streams streams_of(const CodesJob& job, int64_t first, int64_t last, int i) {
  Streams rows;
  for (int r = 0; r < 4; ++r) {
    const int64_t row = std::min(first + i + 4 * r, last);  // beyond the last row: repeat it, the result is not stored
    rows.values[r] = job.values + row * job.row_bytes;
    rows.mask[r] = job.mask + row * job.mask_bytes;
    rows.scales[r] = job.scales + row * job.scale_bytes;
  }
  return rows;
}

template <bool SPARSE, int BITS>
constexpr int64_t kBytes = kStep * BITS / 8 / (SPARSE ? 2 : 1);  // of values in a step

// Codes of a step of one row. The last step may be incomplete: it is copied to where a whole one may be read; x is zero
// there, whatever the codes.
template <bool SPARSE, int BITS>
INLINE Codes load_codes(const CodesJob& job, const Streams& rows, int r, int64_t step) {
  const uint8_t* values = rows.values[r] + step * kBytes<SPARSE, BITS>;
  const uint8_t* mask = rows.mask[r] + step * (kStep / 8);
  if (step == job.whole_steps) {
    alignas(64) uint8_t some_values[kBytes<SPARSE, BITS>] = {}, some_mask[kStep / 8] = {};
    std::memcpy(some_values, values, rows.values[r] + job.row_bytes - values);
    if (SPARSE) std::memcpy(some_mask, mask, rows.mask[r] + job.mask_bytes - mask);
    return codes_of<SPARSE, BITS>(some_values, some_mask);
  }
  // what the next tile has at this place: rows may be too short for the hardware to see where it goes on
  PREFETCH_FAR(values + kTileRows * job.row_bytes);
  if (SPARSE && step % kRun == 0) PREFETCH_FAR(mask + kTileRows * job.mask_bytes);
  return codes_of<SPARSE, BITS>(values, mask);
}

// Scales of the kRun steps from `step` on of one row; beyond its end anything finite.
INLINE Scales load_scales(const CodesJob& job, const Streams& rows, int r, int64_t step) {
  const int64_t at = job.group == 32 ? step * 4 : step / 2 * 2, left = job.scale_bytes - at;
  const int64_t size = job.group == 32 ? 4 * kRun : kRun;
  PREFETCH_FAR(rows.scales[r] + at + kTileRows * job.scale_bytes);
  if (left >= size) return scales_of(rows.scales[r] + at, job.group);
  alignas(16) uint8_t some[4 * kRun] = {};
  std::memcpy(some, rows.scales[r] + at, left);
  return scales_of(some, job.group);
}

// Where the codes of a run of steps come from: memory, on the way to their only use, or what was expanded for several.
template <bool SPARSE, int BITS>
struct FromMemory {
  const CodesJob& job;
  const Streams& rows;
  int64_t first;

  INLINE Codes operator()(int k, int r) const { return load_codes<SPARSE, BITS>(job, rows, r, first + k); }
};

struct Run {
  Codes codes[kRun][4];
  Scales scales[4];

  INLINE Codes operator()(int k, int r) const { return codes[k][r]; }
};

template <int COLUMNS, int BITS, class From>
INLINE void multiply_step(int k, const From& codes, const Scales* scales, const XRun* x, int64_t runs,
                          Part<BITS> (*part)[4]) {
  Codes w[4];
  Scale scale[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    w[r] = codes(k, r);
    if constexpr (BITS == 4) scale[r] = scale_of(scales[r], k);
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if constexpr (BITS == 4) {
        part[m][r] = add4(part[m][r], w[r], scale[r], x[m * runs], k);
      } else {
        part[m][r] = add8(part[m][r], w[r], x[m * runs], k);
      }
    }
  }
}

// A run, `count` steps of which are there, of four rows by COLUMNS rows of x. `runs`: from one of these to the next.
template <int COLUMNS, int BITS, class From>
INLINE void multiply(int64_t count, const From& codes, const Scales* scales, const XRun* x, int64_t runs,
                     Acc (*sums)[4]) {
  Part<BITS> part[COLUMNS][4];
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) part[m][r] = start<BITS>(x[m * runs]);
  if (count == kRun) {
#pragma GCC unroll 4
    for (int k = 0; k < kRun; ++k) multiply_step<COLUMNS, BITS>(k, codes, scales, x, runs, part);
  } else {
    for (int k = 0; k < count; ++k) multiply_step<COLUMNS, BITS>(k, codes, scales, x, runs, part);
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sums[m][r] = scaled(sums[m][r], part[m][r], x[m * runs].scale);
}

// One or two rows of x: codes go from memory into registers and are used there.
template <int COLUMNS, bool SPARSE, int BITS>
TARGET void tile_few(const CodesJob& job, const XRun* x, int64_t first, int64_t last, float* out) {
  for (int i = 0; i < 4; ++i) {
    const Streams rows = streams_of(job, first, last, i);
    Acc sums[COLUMNS][4] = {};
    for (int64_t run = 0; run < job.runs; ++run) {
      Scales scales[4];
      if constexpr (BITS == 4)
        for (int r = 0; r < 4; ++r) scales[r] = load_scales(job, rows, r, run * kRun);
      const FromMemory<SPARSE, BITS> codes{job, rows, run * kRun};
      multiply<COLUMNS, BITS>(std::min(kRun, job.steps - run * kRun), codes, scales, x + run, job.runs, sums);
    }
    for (int m = 0; m < COLUMNS; ++m)
      for (int r = 0; r < 4; ++r) out[m * 16 + i + 4 * r] = sum(sums[m][r]);
  }
}

template <int COLUMNS, int BITS>
TARGET void multiply_run(const Run& w, int64_t count, const XRun* x, int64_t runs, Acc (*sums)[4]) {
  multiply<COLUMNS, BITS>(count, w, w.scales, x, runs, sums);
}

// Any number of them: a run of four weight rows is expanded into the first-level cache, for all.
template <bool SPARSE, int BITS>
TARGET void tile_many(const CodesJob& job, const XRun* x, int64_t columns, int64_t first, int64_t last, float* out) {
  Run w;
  alignas(64) Acc sums[kMaxColumns][4];
  for (int i = 0; i < 4; ++i) {
    const Streams rows = streams_of(job, first, last, i);
    std::memset(sums, 0, sizeof(sums[0]) * columns);
    for (int64_t run = 0; run < job.runs; ++run) {
      const int64_t count = std::min(kRun, job.steps - run * kRun);
      for (int r = 0; r < 4; ++r) {
        for (int64_t k = 0; k < count; ++k) w.codes[k][r] = load_codes<SPARSE, BITS>(job, rows, r, run * kRun + k);
        if constexpr (BITS == 4) w.scales[r] = load_scales(job, rows, r, run * kRun);
      }
      int64_t m = 0;
      for (; m + kCodesColumns <= columns; m += kCodesColumns)
        multiply_run<kCodesColumns, BITS>(w, count, x + m * job.runs + run, job.runs, sums + m);
      for (; m < columns; ++m) multiply_run<1, BITS>(w, count, x + m * job.runs + run, job.runs, sums + m);
    }
    for (int64_t m = 0; m < columns; ++m)
      for (int r = 0; r < 4; ++r) out[m * 16 + i + 4 * r] = sum(sums[m][r]);
  }
}

template <bool SPARSE, int BITS>
void tile(const CodesJob& job, const XRun* x, int64_t columns, int64_t first, int64_t last, float* out) {
  switch (columns) {
    case 1:
      return tile_few<1, SPARSE, BITS>(job, x, first, last, out);
    case 2:
      return tile_few<2, SPARSE, BITS>(job, x, first, last, out);
    default:
      return tile_many<SPARSE, BITS>(job, x, columns, first, last, out);
  }
}

// A row of x in 8 bits; zeros up to a whole run. Where a group holds inf or NaN its scale is NaN: the row spoils its own
// outputs. Plain loops that the compiler vectorises for the namespace's target.
template <class S>
TARGET void quantize(const S* x, int64_t in, int64_t runs, int bits, XRun* out) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: rounds to the nearest integer
  for (int64_t run = 0; run < runs; ++run) {
    const S* from = x + run * kXGroup;
    const int64_t count = std::min(kXGroup, in - run * kXGroup);
    alignas(64) float lane[kXGroup];
    if (count == kXGroup) {
      for (int64_t k = 0; k < kXGroup; ++k) lane[k] = widen(from[k]);
    } else {
      std::memset(lane, 0, sizeof(lane));
      for (int64_t k = 0; k < count; ++k) lane[k] = widen(from[k]);
    }
    uint32_t peak_bits = 0;  // of positive floats the order of bits is that of numbers; inf and NaN above all others
    for (int64_t k = 0; k < kXGroup; ++k) {
      uint32_t bits_of_lane;
      std::memcpy(&bits_of_lane, lane + k, 4);
      peak_bits = std::max(peak_bits, bits_of_lane & 0x7fffffff);
    }
    float peak;
    std::memcpy(&peak, &peak_bits, 4);
    const bool finite = peak_bits < 0x7f800000, counts = finite && peak > 1e-36f;
    const float inverse = counts ? 127.f / peak : 0.f;
    out[run].scale = counts ? peak / 127.f : finite ? 0.f : std::nanf("");
    if (!finite) std::memset(lane, 0, sizeof(lane));
    alignas(64) int32_t q[kXGroup];
    for (int64_t k = 0; k < kXGroup; ++k) {
      q[k] = static_cast<int32_t>((lane[k] * inverse + kRound) - kRound);
      out[run].q[k / kStep][k % kStep] = static_cast<int8_t>(q[k]);
    }
    for (int k = 0; k < kRun; ++k)
      for (int i = 0; i < 16; ++i) {
        const int32_t* four = q + kStep * k + 4 * i;
        out[run].offset[k][i] = -(bits == 8 ? 128 : 8) * (four[0] + four[1] + four[2] + four[3]);
      }
    if (bits == 8)  // all steps of a run are summed before they meet a scale
      for (int k = 1; k < kRun; ++k)
        for (int i = 0; i < 16; ++i) out[run].offset[0][i] += out[run].offset[k][i];
  }
}
