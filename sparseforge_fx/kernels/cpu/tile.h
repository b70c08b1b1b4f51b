// Dot products of sixteen weight rows with up to kMostColumns rows of x. Included into each namespace of primitives.h.
//
// Each output is summed by one thread in one order that depends on the number of rows of x alone: the same bits always.

// Sub-block i takes rows i, 4 + i, 8 + i, 12 + i: four streams that go on through the whole tile, so that hardware and
// software prefetches, which run past the end of a row on purpose, fetch what is needed next.
struct Rows {
  const uint8_t* mask[4];
  int64_t row[4];
};

INLINE Rows rows_of(const Job& job, int64_t first, int64_t last, int i) {
  Rows rows;
  for (int r = 0; r < 4; ++r) {
    rows.row[r] = std::min(first + i + 4 * r, last);  // beyond the last row: repeat it, the result is not stored
    rows.mask[r] = job.mask + rows.row[r] * (job.padded / 8);
  }
  return rows;
}

// The last, incomplete step of a row, copied to where a whole step may be read.
template <class V, int LANES = kLanes>
struct Tail {
  V values[LANES / 2];
  uint8_t mask[LANES / 8];

  Tail(const V* row_values, const uint8_t* row_mask, int64_t whole, int64_t padded) {
    std::memset(this, 0, sizeof(*this));
    std::memcpy(values, row_values + whole / 2, (padded - whole) / 2 * sizeof(V));
    std::memcpy(mask, row_mask + whole / 8, (padded - whole) / 8);
  }
};

// One row of x: keep the places of x that a weight row needs. Half the multiplications, and no scratch.
template <class V>
TARGET void tile_one(const Job& job, const Elem* x, int64_t first, int64_t last, float* out) {
  const int64_t whole = job.padded / kKept * kKept;
  for (int i = 0; i < 4; ++i) {
    const Rows rows = rows_of(job, first, last, i);
    const V* values[4];
    Half acc[4] = {};
    for (int r = 0; r < 4; ++r) values[r] = static_cast<const V*>(job.values) + rows.row[r] * (job.padded / 2);
    for (int64_t k = 0; k < whole; k += kKept) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        for (size_t line = 0; line < kKept / 2 * sizeof(V); line += 64)
          PREFETCH_FAR(values[r] + k / 2 + (kAhead + line) / sizeof(V));
        PREFETCH_FAR(rows.mask[r] + k / 8 + kMaskAhead);
        acc[r] = dot_kept(acc[r], values[r] + k / 2, rows.mask[r] + k / 8, x + k);
      }
    }
    for (int r = 0; r < 4; ++r) {
      if (whole < job.padded) {
        const Tail<V, kKept> tail(values[r], rows.mask[r], whole, job.padded);
        acc[r] = dot_kept(acc[r], tail.values, tail.mask, x + whole);
      }
      out[i + 4 * r] = sum(acc[r]);
    }
  }
}

// What is read after place `to` of a row, to be fetched in time: the products between two expansions are too long for
// the hardware to look across.
template <class V>
struct Soon {
  const V* values;
  const uint8_t* mask;

  Soon(const Job& job, int64_t row, int64_t to, int64_t next_row) {
    const int64_t from = to == job.x_stride ? 0 : to;
    if (from == 0) row = next_row;
    values = static_cast<const V*>(job.values) + row * (job.padded / 2) + from / 2;
    mask = job.mask + row * (job.padded / 8) + from / 8;
  }
};

// Places `from` to `to` of a row into scratch.
template <class V>
TARGET void expand_row(const Job& job, int64_t row, int64_t from, int64_t to, Soon<V> soon, Elem* out) {
  const V* values = static_cast<const V*>(job.values) + row * (job.padded / 2);
  const uint8_t* mask = job.mask + row * (job.padded / 8);
  const int64_t whole = std::min(to, job.padded / kLanes * kLanes);
  PREFETCH(soon.mask);
  for (int64_t k = from; k < whole; k += kLanes) {
    PREFETCH(soon.values + (k - from) / 2);
    store(out + k - from, expand(values + k / 2, mask + k / 8));
  }
  if (whole < to) {
    const Tail<V> tail(values, mask, whole, job.padded);
    store(out + whole - from, expand(tail.values, tail.mask));
  }
}

template <int COLUMNS>
TARGET void multiply(const Elem* w, const Elem* x, int64_t x_stride, int64_t length, Acc (*sums)[4]) {
  Acc acc[COLUMNS][4];
#pragma GCC unroll 16
  for (int m = 0; m < COLUMNS; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) acc[m][r] = sums[m][r];
  }
  for (int64_t k = 0; k < length; k += kLanes) {
    Vec row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) row[r] = load(w + r * kChunk + k);
#pragma GCC unroll 16
    for (int m = 0; m < COLUMNS; ++m) {
      const Vec column = load(x + m * x_stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) acc[m][r] = multiply_add(acc[m][r], row[r], column);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < COLUMNS; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sums[m][r] = acc[m][r];
  }
}

// Several rows of x: expand four weight rows, a chunk at a time that stays in the first-level cache, for all of them.
template <class V>
TARGET void tile_many(const Job& job, const Elem* x, int64_t columns, int64_t first, int64_t last, float* out) {
  alignas(64) Elem w[4 * kChunk];
  alignas(64) Acc sums[kMostColumns][4];
  const int64_t length = job.x_stride;
  for (int i = 0; i < 4; ++i) {
    const Rows rows = rows_of(job, first, last, i);
    std::memset(sums, 0, sizeof(sums[0]) * columns);
    for (int64_t k = 0; k < length; k += kChunk) {
      const int64_t to = std::min(k + kChunk, length);
      for (int r = 0; r < 4; ++r) {
        const Soon<V> soon(job, rows.row[r], to, rows.row[r] + (i < 3 ? 1 : 13));
        expand_row(job, rows.row[r], k, to, soon, w + r * kChunk);
      }
      int64_t m = 0;
      for (; m + kColumns <= columns; m += kColumns)
        multiply<kColumns>(w, x + m * length + k, length, to - k, sums + m);
      for (; m < columns; ++m) multiply<1>(w, x + m * length + k, length, to - k, sums + m);
    }
    for (int64_t m = 0; m < columns; ++m)
      for (int r = 0; r < 4; ++r) out[m * 16 + i + 4 * r] = sum(sums[m][r]);
  }
}

template <class V>
void tile(const Job& job, const void* x, int64_t columns, int64_t first, int64_t last, float* out) {
  // a single row may be the last of many, which were prepared for the shorter steps of tile_many
  if (columns == 1 && job.x_stride % kKept == 0) {
    tile_one<V>(job, static_cast<const Elem*>(x), first, last, out);
  } else {
    tile_many<V>(job, static_cast<const Elem*>(x), columns, first, last, out);
  }
}
