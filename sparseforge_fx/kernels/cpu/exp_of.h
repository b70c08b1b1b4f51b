// e^x in float32. Included into each namespace that has a TARGET; a plain function that the compiler vectorises.

INLINE float exp_of(float x) {  // to 2 ulp of float32 between -87 and 88, clamped outside
  x = std::min(std::max(x, -87.f), 88.f);
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to the nearest integer
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
