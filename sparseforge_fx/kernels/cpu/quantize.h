// x in 8 bits. Included into each namespace that has kSums sums in a register, each of kNear neighbouring inputs.

// A row of x in 8 bits; zeros up to a whole run. Where a group holds inf or NaN its scale is NaN: the row spoils its own
// outputs. Plain loops that the compiler vectorises for the namespace's target.
template <class S, class Run>
TARGET void quantize(const S* x, int64_t, int64_t in, void* rows) {
  constexpr float kRound = 12582912.f;       // 1.5 * 2^23: rounds to the nearest integer
  constexpr int64_t kWidth = kNear * kSums;  // inputs that fill the lanes once
  const int64_t runs = (in + kXGroup - 1) / kXGroup;
  auto* out = static_cast<Run*>(rows);
  for (int64_t run = 0; run < runs; ++run, ++out) {
    const S* from = x + run * kXGroup;
    const int64_t count = std::min(kXGroup, in - run * kXGroup);
    alignas(64) float lane[kXGroup];
    if (count == kXGroup) {
      for (int64_t k = 0; k < kXGroup; ++k) lane[k] = widen(from[k]);
    } else {
      std::memset(lane, 0, sizeof(lane));
      for (int64_t k = 0; k < count; ++k) lane[k] = widen(from[k]);
    }
    alignas(64) int32_t bits[kXGroup], peaks[kWidth] = {};
    std::memcpy(bits, lane, sizeof(bits));
    for (int64_t t = 0; t < kXGroup; t += kWidth)  // of positive floats the order of bits is that of numbers
      for (int64_t k = 0; k < kWidth; ++k) peaks[k] = std::max(peaks[k], bits[t + k] & 0x7fffffff);
    alignas(64) float inverse[kWidth];
    bool all = true;
    for (int64_t j = 0; j < kSums; ++j) {
      const int32_t most = *std::max_element(peaks + kNear * j, peaks + kNear * (j + 1));
      float peak;
      std::memcpy(&peak, &most, 4);
      const bool finite = most < 0x7f800000, counts = finite && peak > 1e-36f;  // inf and NaN are above all others
      out->scale[j] = counts ? peak / 127.f : finite ? 0.f : std::nanf("");
      for (int64_t i = 0; i < kNear; ++i) inverse[kNear * j + i] = counts ? 127.f / peak : 0.f;
      all = all && finite;
    }
    if (!all)
      for (int64_t k = 0; k < kXGroup; ++k) lane[k] = (bits[k] & 0x7fffffff) < 0x7f800000 ? lane[k] : 0.f;
    int8_t* const q = out->q[0];
    for (int64_t t = 0; t < kXGroup; t += kWidth)
      for (int64_t k = 0; k < kWidth; ++k)
        q[t + k] = static_cast<int8_t>(static_cast<int32_t>((lane[t + k] * inverse[k] + kRound) - kRound));
    set_offsets(*out);
  }
}
