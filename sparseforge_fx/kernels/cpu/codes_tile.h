// Dot products of sixteen weight rows of codes with up to kMaxColumns rows of x. Included into each namespace of
// codes_linear.cpp. A few weight rows are in work at a time, as in tile.h, and summed in one order: the same bits always.

constexpr int kFewRows = 4;  // weight rows in work with one or two rows of x: as many streams from memory
// With more: so many weight rows and rows of x, whose sums, in integers and in floats, are in registers together.
constexpr int kManyRows = kWide ? 4 : 2;
template <int BITS>
constexpr int kManyColumns = kWide && BITS == 8 ? 3 : 2;

template <int ROWS>
struct Streams {
  const uint8_t* values[ROWS];
  const uint8_t* mask[ROWS];
  const uint8_t* scales[ROWS];
};

// The place among the sixteen of row r of sub-block i.
template <int ROWS>
INLINE int place_of(int i, int r) {
  return i + int{kTileRows} / ROWS * r;
}

template <int ROWS>
INLINE Streams<ROWS> streams_of(const CodesJob& job, int64_t first, int64_t last, int i) {
  Streams<ROWS> rows;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = std::min(first + place_of<ROWS>(i, r), last);  // beyond the last: repeat it, it is not stored
    const Rows& from = row < job.last.first ? job.all : job.last;
    rows.values[r] = from.values + (row - from.first) * job.row_bytes;
    rows.mask[r] = from.mask + (row - from.first) * job.mask_bytes;
    rows.scales[r] = from.scales + (row - from.first) * job.scale_bytes;
  }
  return rows;
}

template <bool SPARSE, int BITS>
constexpr int64_t kBytes = kStep * bits_of(BITS) / 8 / (SPARSE ? 2 : 1);  // of values in a step

// Codes of a step of one row. An incomplete one goes on in the next row: x is zero there, whatever the codes. AHEAD:
// fetch what the next tile has at this place, too: rows may be too short for the hardware to see where it goes on.
template <bool SPARSE, int BITS, bool AHEAD, int ROWS>
INLINE Codes load_codes(const CodesJob& job, const Streams<ROWS>& rows, int r, int64_t step) {
  const uint8_t* values = rows.values[r] + step * kBytes<SPARSE, BITS>;
  const uint8_t* mask = rows.mask[r] + step * (kStep / 8);
  if constexpr (AHEAD) {
    PREFETCH_FAR(values + kTileRows * job.row_bytes);
    if (SPARSE && step % kRun == 0) PREFETCH_FAR(mask + kTileRows * job.mask_bytes);
  }
  return codes_of<SPARSE, BITS>(values, mask, job.levels);
}

// Scales of the kRun steps from `step` on of one row; beyond its end those of the next, or zeros.
template <int BITS, int ROWS>
INLINE Scales load_scales(const CodesJob& job, const Streams<ROWS>& rows, int r, int64_t step) {
  const uint8_t* scales = rows.scales[r] + scales_at(step, job.group);
  PREFETCH_FAR(scales + kTileRows * job.scale_bytes);
  return scales_of<BITS>(scales, job.group);
}

// Where the codes of a run come from: memory, on the way to their only use; memory, kept for who comes after; from who
// was there before. Whole bytes of a dense weight are as quickly read again as kept.
template <bool SPARSE, int BITS, int ROWS>
struct FromMemory {
  const CodesJob& job;
  const Streams<ROWS>& rows;
  int64_t first;

  INLINE Codes operator()(int k, int r) const { return load_codes<SPARSE, BITS, true>(job, rows, r, first + k); }
};

template <bool SPARSE, int BITS>
struct Keeping {
  const CodesJob& job;
  const Streams<kManyRows>& rows;
  int64_t first;
  Codes (*kept)[kManyRows];

  INLINE Codes operator()(int k, int r) const {
    const Codes codes = load_codes<SPARSE, BITS, true>(job, rows, r, first + k);
    if constexpr (SPARSE || BITS != 8) kept[k][r] = codes;
    return codes;
  }
};

template <bool SPARSE, int BITS>
struct Kept {
  const CodesJob& job;
  const Streams<kManyRows>& rows;
  int64_t first;
  Codes (*kept)[kManyRows];

  INLINE Codes operator()(int k, int r) const {
    if constexpr (SPARSE || BITS != 8) return kept[k][r];
    return load_codes<SPARSE, BITS, false>(job, rows, r, first + k);
  }
};

template <int COLUMNS, int ROWS, int BITS, class From>
INLINE void multiply_step(int k, const From& codes, const Scales* scales, const XRun<BITS>* x, int64_t runs,
                          Part<BITS> (*part)[ROWS]) {
  Codes w[ROWS];
  Scale scale[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    w[r] = codes(k, r);
    if constexpr (BITS != 8) scale[r] = scale_of<BITS>(scales[r], k);
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m) {
    const XStep step = load_x(x[m * runs].q[k]);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      if constexpr (BITS != 8) {
        part[m][r] = add4(part[m][r], w[r], scale[r], step, x[m * runs], k);
      } else {
        part[m][r] = add8(part[m][r], w[r], step);
      }
    }
  }
}

// A run, `count` steps of which are there (WHOLE: all), of ROWS rows by COLUMNS rows of x. `runs`: from one of these to
// the next.
template <int COLUMNS, int ROWS, int BITS, bool WHOLE, class From>
INLINE void multiply(int64_t count, const From& codes, const Scales* scales, const XRun<BITS>* x, int64_t runs,
                     Acc (*sums)[ROWS]) {
  Part<BITS> part[COLUMNS][ROWS];
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) part[m][r] = start(x[m * runs]);
  if constexpr (WHOLE) {
#pragma GCC unroll 4
    for (int k = 0; k < kRun; ++k) multiply_step<COLUMNS, ROWS, BITS>(k, codes, scales, x, runs, part);
  } else {
    for (int k = 0; k < count; ++k) multiply_step<COLUMNS, ROWS, BITS>(k, codes, scales, x, runs, part);
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[m][r] = scaled(sums[m][r], part[m][r], x[m * runs].scale);
}

// One or two rows of x: codes go from memory into registers and are used there.
template <int COLUMNS, bool SPARSE, int BITS, bool WHOLE>
INLINE void run_few(const CodesJob& job, const Streams<kFewRows>& rows, const XRun<BITS>* x, int64_t run,
                    Acc (*sums)[kFewRows]) {
  Scales scales[kFewRows];
  if constexpr (BITS != 8)
    for (int r = 0; r < kFewRows; ++r) scales[r] = load_scales<BITS>(job, rows, r, run * kRun);
  const FromMemory<SPARSE, BITS, kFewRows> codes{job, rows, run * kRun};
  multiply<COLUMNS, kFewRows, BITS, WHOLE>(job.steps - run * kRun, codes, scales, x + run, job.runs, sums);
}

template <int COLUMNS, bool SPARSE, int BITS>
TARGET void tile_few(const CodesJob& job, const XRun<BITS>* x, int64_t first, int64_t last, float* out) {
  constexpr int R = kFewRows;
  for (int i = 0; i < kTileRows / R; ++i) {
    const Streams<R> rows = streams_of<R>(job, first, last, i);
    Acc sums[COLUMNS][R] = {};
    for (int64_t run = 0; run < job.whole_runs; ++run) run_few<COLUMNS, SPARSE, BITS, true>(job, rows, x, run, sums);
    if (job.whole_runs < job.runs) run_few<COLUMNS, SPARSE, BITS, false>(job, rows, x, job.whole_runs, sums);
    for (int m = 0; m < COLUMNS; ++m) {
      float four[4];
      sum_four(sums[m], four);
      for (int r = 0; r < R; ++r) out[m * kTileRows + place_of<R>(i, r)] = four[r];
    }
  }
}

// What of a few weight rows is kept in the first-level cache for all rows of x.
struct Block {
  static constexpr int64_t kRuns = 4;
  Codes codes[kRuns][kRun][kManyRows];
  Scales scales[kRuns][kManyRows];
};

// The runs [from, to) of kManyRows weight rows by COLUMNS rows of x, whose sums stay in registers meanwhile.
template <template <bool, int> class From, int COLUMNS, bool SPARSE, int BITS>
TARGET void multiply_block(const CodesJob& job, const Streams<kManyRows>& rows, Block& block, const XRun<BITS>* x,
                           int64_t from, int64_t to, Acc (*sums)[kManyRows]) {
  constexpr int R = kManyRows;
  Acc acc[COLUMNS][R] = {};
  if (from > 0)
#pragma GCC unroll 4
    for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[m][r] = sums[m][r];
  int64_t run = from;
  for (; run < std::min(to, job.whole_runs); ++run) {
    const From<SPARSE, BITS> codes{job, rows, run * kRun, block.codes[run - from]};
    multiply<COLUMNS, R, BITS, true>(kRun, codes, block.scales[run - from], x + run, job.runs, acc);
  }
  if (run < to) {
    const From<SPARSE, BITS> codes{job, rows, run * kRun, block.codes[run - from]};
    multiply<COLUMNS, R, BITS, false>(job.steps - run * kRun, codes, block.scales[run - from], x + run, job.runs, acc);
  }
#pragma GCC unroll 4
  for (int m = 0; m < COLUMNS; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[m][r] = acc[m][r];
}

template <template <bool, int> class From, bool SPARSE, int BITS>
INLINE void multiply_group(int64_t columns, const CodesJob& job, const Streams<kManyRows>& rows, Block& block,
                           const XRun<BITS>* x, int64_t from, int64_t to, Acc (*sums)[kManyRows]) {
  if (columns == 1) return multiply_block<From, 1, SPARSE, BITS>(job, rows, block, x, from, to, sums);
  if (columns == 2) return multiply_block<From, 2, SPARSE, BITS>(job, rows, block, x, from, to, sums);
  if constexpr (kManyColumns<BITS> == 3) multiply_block<From, 3, SPARSE, BITS>(job, rows, block, x, from, to, sums);
}

// Any number of them, in groups of much the same size, the first of which expands the codes for all.
template <bool SPARSE, int BITS>
TARGET void tile_many(const CodesJob& job, const XRun<BITS>* x, int64_t columns, int64_t first, int64_t last, float* out) {
  constexpr int R = kManyRows;
  Block block;
  alignas(64) Acc sums[kMaxColumns + 1][R];
  const int64_t groups = (columns + kManyColumns<BITS> - 1) / kManyColumns<BITS>;
  int64_t starts[kMaxColumns + 1];
  for (int64_t g = 0; g <= groups; ++g) starts[g] = g * columns / groups;
  std::memset(sums + columns, 0, sizeof(sums[0]));  // summed with others, never stored
  for (int i = 0; i < kTileRows / R; ++i) {
    const Streams<R> rows = streams_of<R>(job, first, last, i);
    for (int64_t from = 0; from < job.runs; from += Block::kRuns) {
      const int64_t to = std::min(from + Block::kRuns, job.runs);
      if constexpr (BITS != 8)
        for (int64_t run = from; run < to; ++run)
          for (int r = 0; r < R; ++r) block.scales[run - from][r] = load_scales<BITS>(job, rows, r, run * kRun);
      multiply_group<Keeping, SPARSE, BITS>(starts[1], job, rows, block, x, from, to, sums);
      for (int64_t g = 1; g < groups; ++g) {
        const int64_t m = starts[g];
        multiply_group<Kept, SPARSE, BITS>(starts[g + 1] - m, job, rows, block, x + m * job.runs, from, to, sums + m);
      }
    }
    static_assert(4 % R == 0);
    for (int64_t m = 0; m < columns; m += 4 / R) {
      float four[4];
      sum_four(sums[m], four);
      for (int k = 0; k < 4 && m + k / R < columns; ++k) out[(m + k / R) * kTileRows + place_of<R>(i, k % R)] = four[k];
    }
  }
}

template <bool SPARSE, int BITS>
void tile(const CodesJob& job, const void* rows, int64_t columns, int64_t first, int64_t last, float* out) {
  const auto* x = static_cast<const XRun<BITS>*>(rows);
  switch (columns) {
    case 1:
      return tile_few<1, SPARSE, BITS>(job, x, first, last, out);
    case 2:
      return tile_few<2, SPARSE, BITS>(job, x, first, last, out);
    default:
      return tile_many<SPARSE, BITS>(job, x, columns, first, last, out);
  }
}
