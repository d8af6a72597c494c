// Vectors as gcc and clang have them on every CPU, of the width that this one has.

#pragma once

#include <cstdint>
#include <cstring>

namespace hqc {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // of wider vectors than it has, gcc shuffles one lane after the other
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats all(float x) { return Floats{} + x; }

// e^x within 2 units in the last place: 2^n by the exponent's bits, e^r by a polynomial, |r| <= ln(2)/2.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  const Floats magic = all(12582912.0f);
  Floats n = (x * 1.44269504088896341f + magic) - magic;
  Floats r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Floats p = all(1.98412698412698413e-4f);
  p = p * r + 1.38888888888888889e-3f;
  p = p * r + 8.33333333333333333e-3f;
  p = p * r + 4.16666666666666667e-2f;
  p = p * r + 1.66666666666666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Floats)power;
}

inline int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

}  // namespace hqc
