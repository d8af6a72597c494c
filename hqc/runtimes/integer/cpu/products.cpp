// Integer products by code of our own, for CPUs with AVX-512 and VNNI or with AVX2: what oneDNN's operator does before it
// begins takes longer than a small product, and without VNNI its sums saturate.
// u8 codes with zero point 128, s8 weights, int32 sums, float32 out, channels last.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "steps.h"
#include "team.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#define HQC_PRODUCTS 1
#endif

namespace hqc {

#ifdef HQC_PRODUCTS
namespace {

constexpr int LANES = 16;

#ifdef __AVX512VNNI__

constexpr int WIDE = 2 * LANES, PIXELS = 6;

// acc[r][o] += sum of rows[r][k]·w[o][k] over `count` times four values from the `from`th on, of `quads`; int32.
template <int COUNT>
inline void tile(const uint8_t* const* rows, const int8_t* weight, int64_t from, int64_t count, int64_t quads, int64_t,
                 int32_t (*acc)[WIDE]) {
  const int64_t plane = quads * 4 * LANES;
  __m512i sums[COUNT][2];
  std::memcpy(sums, acc, sizeof sums);
  weight += from * 4 * LANES;
  for (int64_t k = from; k < from + count; ++k, weight += 4 * LANES) {
    const __m512i a = _mm512_loadu_si512(weight), b = _mm512_loadu_si512(weight + plane);
    for (int r = 0; r < COUNT; ++r) {
      int32_t four;
      std::memcpy(&four, rows[r] + 4 * k, 4);
      const __m512i codes = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], codes, a);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], codes, b);
    }
  }
  std::memcpy(acc, sums, sizeof sums);
}

#else

constexpr int WIDE = LANES, PIXELS = 4;  // with more pixels sums are written to memory and read again

// One row: four codes in every lane, times the weights of 16 outputs, added to two sums; in int16, or widened to int32.
#define HQC_TIMES(row)                           \
  "vpbroadcastd (%[" row "],%[k],4), %%ymm2\n"  \
  "vpmaddubsw %%ymm0, %%ymm2, %%ymm3\n"         \
  "vpmaddubsw %%ymm1, %%ymm2, %%ymm2\n"
#define HQC_WORDS(row, first, second)            \
  HQC_TIMES(row)                                 \
  "vpaddw %%ymm3, %[" first "], %[" first "]\n" \
  "vpaddw %%ymm2, %[" second "], %[" second "]\n"
#define HQC_WIDENED(row, first, second)          \
  HQC_TIMES(row)                                 \
  "vpmaddwd %[one], %%ymm3, %%ymm3\n"           \
  "vpmaddwd %[one], %%ymm2, %%ymm2\n"           \
  "vpaddd %%ymm3, %[" first "], %[" first "]\n" \
  "vpaddd %%ymm2, %[" second "], %[" second "]\n"
#define HQC_QUADS(ROW)                                                                                             \
  asm volatile("1:\n"                                                                                             \
               "vmovdqu (%[w]), %%ymm0\n"                                                                         \
               "vmovdqu 32(%[w]), %%ymm1\n" ROW("a", "s0", "s1") ROW("b", "s2", "s3") ROW("c", "s4", "s5")        \
                   ROW("d", "s6", "s7") "addq $64, %[w]\n"                                                        \
               "incq %[k]\n"                                                                                      \
               "jnz 1b\n"                                                                                         \
               : [w] "+r"(weight), [k] "+r"(k), [s0] "+x"(sums[0][0]), [s1] "+x"(sums[0][1]),                      \
                 [s2] "+x"(sums[1][0]), [s3] "+x"(sums[1][1]), [s4] "+x"(sums[2][0]), [s5] "+x"(sums[2][1]),       \
                 [s6] "+x"(sums[3][0]), [s7] "+x"(sums[3][1])                                                      \
               : [a] "r"(ends[0]), [b] "r"(ends[1]), [c] "r"(ends[2]), [d] "r"(ends[3]), [one] "x"(one)           \
               : "ymm0", "ymm1", "ymm2", "ymm3", "cc", "memory")

// sums += the products of four rows and 16 outputs, `count` times four values of each from the `from`th on. In the
// assembler's words: gcc 12 loads weights again for every row, or keeps sums in memory.
template <bool WIDENED>
inline void add_quads(const uint8_t* const* rows, const int8_t* weight, int64_t from, int64_t count,
                      __m256i (*sums)[2]) {
  const uint8_t* ends[PIXELS];
  for (int r = 0; r < PIXELS; ++r) ends[r] = rows[r] + 4 * (from + count);
  const __m256i one = _mm256_set1_epi16(1);
  int64_t k = -count;
  if constexpr (WIDENED) {
    HQC_QUADS(HQC_WIDENED);
  } else {
    HQC_QUADS(HQC_WORDS);
  }
}

// The same as above; `group` sums of two products are added in int16, which holds them, before they are widened.
template <int COUNT>
void tile(const uint8_t* const* given, const int8_t* weight, int64_t from, int64_t count, int64_t, int64_t group,
          int32_t (*acc)[WIDE]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* rows[PIXELS];
  for (int r = 0; r < PIXELS; ++r) rows[r] = given[r < COUNT ? r : 0];
  __m256i wide[PIXELS][2], sums[PIXELS][2];
  for (int r = COUNT; r < PIXELS; ++r) wide[r][0] = wide[r][1] = _mm256_setzero_si256();
  std::memcpy(wide, acc, COUNT * sizeof *wide);
  if (group < 4) {
    add_quads<true>(rows, weight + from * 4 * LANES, from, count, wide);
    std::memcpy(acc, wide, COUNT * sizeof *wide);
    return;
  }
  for (int64_t k = from, end = from + count; k < end; k += group) {
    for (int r = 0; r < PIXELS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    add_quads<false>(rows, weight + k * 4 * LANES, k, std::min(group, end - k), sums);
    for (int r = 0; r < COUNT; ++r)
      for (int i = 0; i < 2; ++i) wide[r][i] = _mm256_add_epi32(wide[r][i], _mm256_madd_epi16(sums[r][i], ones));
  }
  std::memcpy(acc, wide, COUNT * sizeof *wide);
}
#endif

// Sums of at most PIXELS rows.
inline void add_sums(const uint8_t* const* rows, int64_t here, const int8_t* weight, int64_t from, int64_t count,
                     int64_t quads, int64_t group, int32_t (*acc)[WIDE]) {
  switch (here) {
#ifdef __AVX512VNNI__
    case 6: tile<6>(rows, weight, from, count, quads, group, acc); break;
    case 5: tile<5>(rows, weight, from, count, quads, group, acc); break;
#endif
    case 4: tile<4>(rows, weight, from, count, quads, group, acc); break;
    case 3: tile<3>(rows, weight, from, count, quads, group, acc); break;
    case 2: tile<2>(rows, weight, from, count, quads, group, acc); break;
    default: tile<1>(rows, weight, from, count, quads, group, acc);
  }
}

// `count` outputs of one pixel from their sums.
inline void finish(const Product& p, int64_t pixel, int64_t sample, int64_t o, int64_t count, const int32_t* acc) {
  const float factor = p.factor[sample * p.factor_pitch];
  const float* bias = p.bias ? p.bias + o : nullptr;
  const float* shift = p.shift ? p.shift + sample * p.shift_pitch + o : nullptr;
  const float* residual = p.residual ? p.residual + pixel * p.outputs + o : nullptr;
  float* y = p.y + pixel * p.outputs + o;
  float v[WIDE];
  for (int64_t c = 0; c < count; ++c) v[c] = (float)(acc[c] - p.offset[o + c]) * p.scale[o + c] * factor;
  if (shift && bias)
    for (int64_t c = 0; c < count; ++c) v[c] += shift[c] + bias[c];
  else if (shift || bias)
    for (int64_t c = 0; c < count; ++c) v[c] += (shift ? shift : bias)[c];
  if (p.add)
    for (int64_t c = 0; c < count; ++c) v[c] += y[c];
  if (residual)
    for (int64_t c = 0; c < count; ++c) v[c] += residual[c];
  if (p.silu)
    for (int64_t c = 0; c < count; ++c) v[c] = v[c] / (1.0f + std::exp(-v[c]));
  std::memcpy(y, v, 4 * count);
}

// The codes of `count` channels of `taps` neighbours, less `zero`.
inline void take(const uint8_t* codes, int64_t count, uint8_t zero, uint8_t* row) {
  if (!zero) {
    std::memcpy(row, codes, count);
    return;
  }
  for (int64_t c = 0; c < count; ++c) row[c] = codes[c] - zero;
}

// What the taps of one output pixel read, side by side; beside the image there is code 0.
void gather(const Product& p, int64_t pixel, uint8_t* row) {
  const int64_t n = pixel / (p.size[0] * p.size[1]), place = pixel % (p.size[0] * p.size[1]);
  const int64_t top = place / p.size[1] * p.stride[0] - p.padding[0];
  const int64_t left = place % p.size[1] * p.stride[1] - p.padding[1];
  const int64_t height = p.height * p.upsample, width = p.width * p.upsample;
  const uint8_t zero = (uint8_t)p.zero, nothing = (uint8_t)(128 - p.zero);
  const bool together = p.dilation[1] == 1 && p.upsample == 1 && left >= 0 && left + p.kernel[1] <= width;
  for (int64_t i = 0; i < p.kernel[0]; ++i) {
    const int64_t y = top + i * p.dilation[0], line = p.kernel[1] * p.channels;
    const uint8_t* codes = p.codes + (n * p.height + y / p.upsample) * p.width * p.channels;
    if (y < 0 || y >= height) {
      std::memset(row, nothing, line);
      row += line;
    } else if (together) {
      take(codes + left * p.channels, line, zero, row);
      row += line;
    } else {
      for (int64_t j = 0; j < p.kernel[1]; ++j, row += p.channels) {
        const int64_t x = left + j * p.dilation[1];
        if (x < 0 || x >= width)
          std::memset(row, nothing, p.channels);
        else
          take(codes + x / p.upsample * p.channels, p.channels, zero, row);
      }
    }
  }
}

// Bytes of gathered rows, and rows, of one piece at most; values of all its rows that are multiplied in one go, so that
// the weights of a block of outputs stay in the first cache; multiplications of one thread.
constexpr int64_t NEAR = 2 << 20, MOST = 16 * PIXELS, CHUNK = 256, FEW = 150000;

// How the work is divided: pieces of rows, and of outputs where there are few rows.
struct Division {
  int64_t rows, pieces, blocks, stripes;

  Division(int64_t pixels, int64_t line, int64_t outputs, int threads) {
    const int64_t near = std::max<int64_t>(NEAR / line / PIXELS, 1) * PIXELS;
    const int64_t share = threads == 1 ? pixels : pixels / (2 * threads) + 1;
    rows = std::min(std::min(near, MOST), (share + PIXELS - 1) / PIXELS * PIXELS);
    pieces = (pixels + rows - 1) / rows;
    blocks = (outputs + WIDE - 1) / WIDE;
    stripes = pieces >= threads ? 1 : std::min<int64_t>(blocks, (threads + pieces - 1) / pieces);
  }
};

}  // namespace

void run(const Product& p, Team& team) {
  const int64_t area = p.size[0] * p.size[1], pixels = p.samples * area;
  const int64_t values = p.kernel[0] * p.kernel[1] * p.channels, quads = (values + 3) / 4, line = quads * 4;
  const bool pointwise = p.kernel[0] * p.kernel[1] * p.stride[0] * p.stride[1] * p.upsample == 1 &&
                         p.padding[0] + p.padding[1] == 0;
  const bool direct = pointwise && !p.zero && values == line;
  const bool alone = pixels * values * p.outputs < FEW;
  const Division division(pixels, line, p.outputs, alone ? 1 : team.threads());
  team.each(division.pieces * division.stripes, alone, [&](int64_t task) {
    const int64_t piece = task / division.stripes, stripe = task % division.stripes;
    const int64_t first = piece * division.rows, count = std::min(division.rows, pixels - first);
    const uint8_t* rows[MOST];
    if (direct) {
      for (int64_t r = 0; r < count; ++r) rows[r] = p.codes + (first + r) * line;
    } else {
      uint8_t* gathered = reinterpret_cast<uint8_t*>(scratch(3, count * line / 4));
      for (int64_t r = 0; r < count; ++r) {
        rows[r] = gathered + r * line;
        gather(p, first + r, gathered + r * line);
      }
    }
    const int64_t end = division.blocks * (stripe + 1) / division.stripes;
    for (int64_t block = division.blocks * stripe / division.stripes; block < end; ++block) {
      const int64_t o = block * WIDE, outputs = std::min<int64_t>(WIDE, p.outputs - o);
      int32_t acc[MOST][WIDE];
      std::memset(acc, 0, count * sizeof *acc);
      for (int64_t from = 0; from < quads; from += CHUNK)
        for (int64_t r = 0; r < count; r += PIXELS)
          add_sums(&rows[r], std::min<int64_t>(PIXELS, count - r), p.weight + o * line, from,
                   std::min(CHUNK, quads - from), quads, p.group, acc + r);
      for (int64_t r = 0; r < count; ++r) finish(p, first + r, (first + r) / area, o, outputs, acc[r]);
    }
  });
}

#else
void run(const Product&, Team&) {}
#endif

}  // namespace hqc

extern "C" {

// 2: sums in int32; 1: two neighbours in int16; 0: there are no products for this CPU.
int hqc_has_products() {
#if defined(__AVX512VNNI__)
  return 2;
#elif defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}
}
