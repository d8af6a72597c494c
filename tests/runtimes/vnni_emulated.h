// The instructions of AVX-512 with VNNI that products.cpp uses, for CPUs that lack them: included before everything, in
// the place of the compiler's own header.

#pragma once

#define _IMMINTRIN_H_INCLUDED
#define __IMMINTRIN_H
#define __AVX512VNNI__ 1

#include <cstdint>
#include <cstring>

struct __m512i {
  int32_t lane[16];
};

inline __m512i _mm512_setzero_si512() { return __m512i{}; }

inline __m512i _mm512_set1_epi32(int32_t x) {
  __m512i v;
  for (int32_t& lane : v.lane) lane = x;
  return v;
}

inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// sum + four products of an unsigned and a signed byte, in int32.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i codes, __m512i weights) {
  for (int i = 0; i < 16; ++i)
    for (int shift = 0; shift < 32; shift += 8)
      sum.lane[i] += (int32_t)(uint8_t)(codes.lane[i] >> shift) * (int8_t)(weights.lane[i] >> shift);
  return sum;
}
