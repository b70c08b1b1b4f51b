// Sixteen weight rows, in pairs, by any number of rows of x. Included into each namespace of pairs_linear.cpp, which has
//
//   Run, set_offsets     a run of a row of x (quantize.h)
//   Sums, sum_lanes      what is summed of a pair of weight rows in registers; and the two sums of it
//   kColumns, kPairsOf   rows of x, and beside so many of these pairs of weight rows, in work at a time
//   multiply             a run of all these

template <int BITS, int COLUMNS>
TARGET void tile_of(const PairsJob& job, const Run<BITS>* x, int64_t first, int64_t last, float* out) {
  constexpr int R = kPairsOf<COLUMNS>;
  const int64_t runs = (job.steps + kRun - 1) / kRun, whole_runs = job.steps / kRun;
  for (int i = 0; i < kPairs / R; ++i) {
    int64_t pairs[R];
    for (int r = 0; r < R; ++r) pairs[r] = std::min(first / 2 + i * R + r, last / 2);  // beyond the last: not stored
    Sums sums[COLUMNS][R] = {};
    for (int64_t run = 0; run < whole_runs; ++run) multiply<BITS, COLUMNS, R, kRun>(job, pairs, x, runs, run, sums);
    const auto rest = [&](auto count) TARGET { multiply<BITS, COLUMNS, R, count()>(job, pairs, x, runs, whole_runs, sums); };
    if (job.steps % kRun == 1) rest(std::integral_constant<int, 1>{});
    if (job.steps % kRun == 2) rest(std::integral_constant<int, 2>{});
    if (job.steps % kRun == 3) rest(std::integral_constant<int, 3>{});
    for (int m = 0; m < COLUMNS; ++m)
      for (int r = 0; r < R; ++r) sum_lanes(sums[m][r], out + m * kTileRows + 2 * (i * R + r));
  }
}

template <int BITS>
void tile(const PairsJob& job, const void* rows, int64_t columns, int64_t first, int64_t last, float* out) {
  const auto* x = static_cast<const Run<BITS>*>(rows);
  const int64_t runs = (job.steps + kRun - 1) / kRun, passes = (columns + kColumns - 1) / kColumns;
  for (int64_t p = 0; p < passes; ++p) {  // of much the same size
    const int64_t m = p * columns / passes;
    const auto call = [&](auto of) { of(job, x + m * runs, first, last, out + m * kTileRows); };
    const int64_t count = (p + 1) * columns / passes - m;
    if (count == 1) call(tile_of<BITS, 1>);
    if (count == 2) call(tile_of<BITS, 2>);
    if constexpr (kColumns > 2) {
      if (count == 3) call(tile_of<BITS, 3>);
      if (count == 4) call(tile_of<BITS, 4>);
    }
  }
}
