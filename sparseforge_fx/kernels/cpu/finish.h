// Bias, activation and rounding of one tile of sums. Included into each namespace of primitives.h; plain loops over
// sixteen lanes that the compiler vectorises for the namespace's target.

#include "exp_of.h"

INLINE float silu_of(float x) { return x / (1.f + exp_of(-x)); }

INLINE float gelu_tanh_of(float x) {  // 0.5 (1 + tanh u) = sigmoid(2 u)
  return x / (1.f + exp_of(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

INLINE float gelu_of(float x) {  // erf by Abramowitz and Stegun 7.1.26, 1.5e-7 absolute
  const float a = std::fabs(x) * 0.70710678f;
  const float t = 1.f / (1.f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float half_tail = 0.5f * p * t * exp_of(-a * a);  // 0.5 erfc(a)
  return x > 0 ? x - x * half_tail : x * half_tail;
}

template <class S>
TARGET void finish(Activation activation, const float* sums, const float* gated, const S* bias, const S* gated_bias,
                   int64_t count, S* out) {
  alignas(64) float y[16];
  for (int i = 0; i < 16; ++i) y[i] = sums[i];
  if (bias)
    for (int i = 0; i < count; ++i) y[i] += widen(bias[i]);
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      for (int i = 0; i < 16; ++i) y[i] = y[i] < 0 ? 0.f : y[i];  // NaN stays NaN
      break;
    case Activation::gelu:
      for (int i = 0; i < 16; ++i) y[i] = gelu_of(y[i]);
      break;
    case Activation::gelu_tanh:
      for (int i = 0; i < 16; ++i) y[i] = gelu_tanh_of(y[i]);
      break;
    case Activation::silu:
      for (int i = 0; i < 16; ++i) y[i] = silu_of(y[i]);
      break;
    case Activation::silu_mul:
      for (int i = 0; i < 16; ++i) y[i] = silu_of(y[i]);
      for (int i = 0; i < count; ++i) y[i] *= gated_bias ? gated[i] + widen(gated_bias[i]) : gated[i];
      break;
  }
  alignas(64) S rounded[16];
  for (int i = 0; i < 16; ++i) round_to(rounded[i], y[i]);
  if (count == 16) {
    std::memcpy(out, rounded, sizeof(rounded));  // of known size it is one instruction, and no call
  } else {
    std::memcpy(out, rounded, count * sizeof(S));
  }
}
