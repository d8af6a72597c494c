// Integer products of few multiplications, for CPUs with AVX-512 and VNNI: what oneDNN's operator does before it begins
// takes longer than such a product. u8 codes with zero point 128, s8 weights, int32 sums, float32 out, channels last.

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

// weight: [outputs / 16][taps · channels / 4][16][4], outputs filled up to a multiple of 32; offset: 128 times the sum of
// an output's weights; bias: null, [outputs], or of each sample its own, `bias_pitch` apart.
struct Product {
  const int8_t* weight;
  const int32_t* offset;
  const float* scale;
  const float* bias;
  const float* factor;
  int64_t bias_pitch, samples, height, width, channels, outputs;
  int64_t kernel[2], stride[2], padding[2], dilation[2], size[2];
};

#ifdef __AVX512VNNI__
constexpr int LANES = 16, WIDE = 2 * LANES, PIXELS = 6;

// Where the taps of one output pixel lie; beside the image there is code 0.
void tap_pointers(const Product& p, const uint8_t* codes, const uint8_t* nothing, int64_t pixel, const uint8_t** taps) {
  const int64_t n = pixel / (p.size[0] * p.size[1]), place = pixel % (p.size[0] * p.size[1]);
  const int64_t top = place / p.size[1] * p.stride[0] - p.padding[0];
  const int64_t left = place % p.size[1] * p.stride[1] - p.padding[1];
  for (int64_t i = 0; i < p.kernel[0]; ++i)
    for (int64_t j = 0; j < p.kernel[1]; ++j) {
      const int64_t y = top + i * p.dilation[0], x = left + j * p.dilation[1];
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      *taps++ = inside ? codes + ((n * p.height + y) * p.width + x) * p.channels : nothing;
    }
}

template <int COUNT>
void product_block(const Product& p, const uint8_t* const* taps, int64_t first, float* y, bool add) {
  const int64_t count = p.kernel[0] * p.kernel[1], quads = p.channels / 4, plane = count * quads * 4 * LANES;
  const int64_t pixels = p.size[0] * p.size[1];
  for (int64_t o = 0; o < p.outputs; o += WIDE) {
    __m512i sums[COUNT][2];
    for (int r = 0; r < COUNT; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    const int8_t* weight = p.weight + o / LANES * plane;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t k = 0; k < quads; ++k, weight += 4 * LANES) {
        const __m512i a = _mm512_loadu_si512(weight), b = _mm512_loadu_si512(weight + plane);
        for (int r = 0; r < COUNT; ++r) {
          int32_t four;
          std::memcpy(&four, taps[r * count + t] + 4 * k, 4);
          const __m512i codes = _mm512_set1_epi32(four);
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], codes, a);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], codes, b);
        }
      }
    const int64_t left = p.outputs - o < WIDE ? p.outputs - o : WIDE;
    for (int r = 0; r < COUNT; ++r) {
      int32_t acc[WIDE];
      std::memcpy(acc, sums[r], sizeof acc);
      const int64_t n = (first + r) / pixels;
      const float* bias = p.bias ? p.bias + n * p.bias_pitch + o : nullptr;
      float* out = y + (first + r) * p.outputs + o;
      for (int64_t c = 0; c < left; ++c) {
        const float v = (float)(acc[c] - p.offset[o + c]) * p.scale[o + c] * p.factor[n] + (bias ? bias[c] : 0.0f);
        out[c] = add ? out[c] + v : v;
      }
    }
  }
}
#endif

}  // namespace

extern "C" {

int hqc_has_products() {
#ifdef __AVX512VNNI__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX512VNNI__
// y [samples, size, outputs], or y + the product.
void hqc_product(const Product* product, const uint8_t* codes, float* y, int add, int threads) {
  const Product& p = *product;
  const int64_t pixels = p.samples * p.size[0] * p.size[1], count = p.kernel[0] * p.kernel[1];
  const std::vector<uint8_t> nothing(p.channels, 128);
#pragma omp parallel num_threads(threads)
  {
    std::vector<const uint8_t*> taps(PIXELS * count);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < pixels; first += PIXELS) {
      const int64_t here = pixels - first < PIXELS ? pixels - first : PIXELS;
      for (int64_t r = 0; r < here; ++r) tap_pointers(p, codes, nothing.data(), first + r, &taps[r * count]);
      switch (here) {
        case 6: product_block<6>(p, taps.data(), first, y, add); break;
        case 5: product_block<5>(p, taps.data(), first, y, add); break;
        case 4: product_block<4>(p, taps.data(), first, y, add); break;
        case 3: product_block<3>(p, taps.data(), first, y, add); break;
        case 2: product_block<2>(p, taps.data(), first, y, add); break;
        default: product_block<1>(p, taps.data(), first, y, add);
      }
    }
  }
}
#endif
}
