// Passes over rows that end in codes: [norm | gate], rotation, scaling, rounding, clipping; one read, one write.
//
// Rows lie channels last, float32; codes are stored as code + 128 in a byte. Sums run in another order than torch's, so
// that a code on a rounding boundary may move by a step. OpenMP is the caller's: torch has loaded it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
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

inline Floats pick(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }

// How a tensor becomes codes. inverse: 1/s of every sample, low and high its bounds.
struct Quantiser {
  const float* inverse;
  const float* low;
  const float* high;
  int32_t block;
  int32_t regular;
};

// x of one row: the first `first` channels at x, the rest at second.
struct Rows {
  const float* x;
  const float* second;
  int64_t first;
  int64_t pitch;
  int64_t second_pitch;
  int64_t channels;
};

// ---- elementary functions ------------------------------------------------------------------------------------------

// e^x within 2 units in the last place: 2^n by the exponent's bits, e^r by a polynomial, |r| <= ln(2)/2.
inline Floats exponential(Floats x) {
  x = pick(x < -87.0f, all(-87.0f), x);
  x = pick(x > 88.0f, all(88.0f), x);
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

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

inline Floats hyperbolic_tangent(Floats x) {
  Floats t = exponential(-2.0f * pick(x < 0.0f, -x, x));
  Floats y = (1.0f - t) / (1.0f + t);
  return pick(x < 0.0f, -y, y);
}

// erf within 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline Floats error_function(Floats x) {
  Floats a = pick(x < 0.0f, -x, x);
  Floats t = 1.0f / (1.0f + 0.3275911f * a);
  Floats p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Floats y = 1.0f - p * t * exponential(-a * a);
  return pick(x < 0.0f, -y, y);
}

inline Floats gelu(Floats x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f)); }

inline Floats gelu_tanh(Floats x) {
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

enum Activation { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

inline Floats activated(Floats x, int kind) {
  switch (kind) {
    case SILU: return silu(x);
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    default: return x;
  }
}

// ---- rotation and codes --------------------------------------------------------------------------------------------

template <int BIT>
inline Floats partner(Floats v) {
  if constexpr (BIT == 1) return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  if constexpr (BIT == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  if constexpr (BIT == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}

template <int BIT>
inline Floats butterfly(Floats v) {
  Floats sign;
  for (int i = 0; i < LANES; ++i) sign[i] = i & BIT ? -1.0f : 1.0f;
  return partner<BIT>(v) + sign * v;
}

// Sylvester's matrix within the lanes of one vector, for a block of up to 16.
inline Floats rotated_lanes(Floats v, int block) {
  if (block > 1) v = butterfly<1>(v);
  if (block > 2) v = butterfly<2>(v);
  if (block > 4) v = butterfly<4>(v);
  if (block > 8) v = butterfly<8>(v);
  return v;
}

// Sylvester's matrix of order 16 * VECTORS on one block, in registers.
template <int VECTORS>
inline void rotate_block(float* y) {
  Floats v[VECTORS];
  for (int i = 0; i < VECTORS; ++i) v[i] = rotated_lanes(load(y + LANES * i), LANES);
  for (int step = 1; step < VECTORS; step *= 2)
    for (int i = 0; i < VECTORS; i += 2 * step)
      for (int j = i; j < i + step; ++j) {
        Floats a = v[j], b = v[j + step];
        v[j] = a + b;
        v[j + step] = a - b;
      }
  for (int i = 0; i < VECTORS; ++i) store(y + LANES * i, v[i]);
}

// Sylvester's matrix of any order, stage by stage in memory.
inline void rotate_any(float* y, int block) {
  for (int step = 1; step < block; step *= 2)
    for (int i = 0; i < block; i += 2 * step)
      for (int j = i; j < i + step; ++j) {
        float a = y[j], b = y[j + step];
        y[j] = a + b;
        y[j + step] = a - b;
      }
}

// The regular matrix: H_4 of every two bits, y_i = sum - 2 x_(3-i), above Sylvester's H_2 where their number is odd.
inline void rotate_regular(float* y, int block) {
  int step = __builtin_ctz(block) % 2 ? 2 : 1;
  if (step == 2)
    for (int i = 0; i < block; i += 2) {
      float a = y[i], b = y[i + 1];
      y[i] = a + b;
      y[i + 1] = a - b;
    }
  for (; step < block; step *= 4)
    for (int i = 0; i < block; i += 4 * step)
      for (int j = i; j < i + step; ++j) {
        float a = y[j], b = y[j + step], c = y[j + 2 * step], d = y[j + 3 * step];
        float sum = (a + b) + (c + d);
        y[j] = sum - 2.0f * d;
        y[j + step] = sum - 2.0f * c;
        y[j + 2 * step] = sum - 2.0f * b;
        y[j + 3 * step] = sum - 2.0f * a;
      }
}

// Whole vectors of y may be read beyond its channels: they are scratch.
void rotate(float* y, int64_t channels, int block, bool regular) {
  if (block == 1) return;
  if (regular) {
    for (int64_t c = 0; c < channels; c += block) rotate_regular(y + c, block);
  } else if (block < LANES) {
    for (int64_t c = 0; c < channels; c += LANES) store(y + c, rotated_lanes(load(y + c), block));
  } else {
    for (int64_t c = 0; c < channels; c += block) switch (block) {
        case 16: rotate_block<1>(y + c); break;
        case 32: rotate_block<2>(y + c); break;
        case 64: rotate_block<4>(y + c); break;
        case 128: rotate_block<8>(y + c); break;
        default: rotate_any(y + c, block);
      }
  }
}

// The codes of one row in scratch, which is rotated in place.
void encode(float* y, int64_t channels, const Quantiser& q, int64_t sample, uint8_t* codes) {
  rotate(y, channels, q.block, q.regular);
  const float inverse = q.inverse[sample], low = q.low[sample], high = q.high[sample];
  const float factor = 1.0f / std::sqrt((float)q.block);
  // Adding 1.5·2^23 rounds to even and leaves the integer in the lowest bits; 128 more makes it unsigned.
  const float magic = 12582912.0f + 128.0f;
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) {
    Floats v = load(y + c) * factor * inverse;
    v = pick(v < low, all(low), v);
    v = pick(v > high, all(high), v);
    Bytes bytes = __builtin_convertvector((Words)(v + magic), Bytes);
    std::memcpy(codes + c, &bytes, sizeof bytes);
  }
  for (; c < channels; ++c) {
    float v = y[c] * factor * inverse;
    v = (v < low ? low : v > high ? high : v) + magic;
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    codes[c] = (uint8_t)bits;
  }
}

// ---- rows ----------------------------------------------------------------------------------------------------------

inline int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

// One row, both parts side by side.
inline void gather(const Rows& rows, int64_t row, float* y) {
  std::memcpy(y, rows.x + row * rows.pitch, 4 * rows.first);
  if (rows.second) std::memcpy(y + rows.first, rows.second + row * rows.second_pitch, 4 * (rows.channels - rows.first));
}

// Mean and squared deviations of every channel over `count` rows from `begin`, a stretch that stays in the first cache.
void stretch_statistics(const float* x, int64_t pitch, int64_t channels, int64_t count, float* mean, float* squares) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
  for (int64_t r = 0; r < count; ++r) {
    const float* row = x + r * pitch;
    for (int64_t c = 0; c < channels; ++c) mean[c] += row[c];
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= (float)count;
  for (int64_t r = 0; r < count; ++r) {
    const float* row = x + r * pitch;
    for (int64_t c = 0; c < channels; ++c) {
      float d = row[c] - mean[c];
      squares[c] += d * d;
    }
  }
}

// Chan's formula: the statistics of two sets from those of each.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double n, double m, double s) {
    double total = count + n, d = m - mean;
    squares += s + d * d * count * n / total;
    mean += d * n / total;
    count = total;
  }
};

// Of channels that have equally many rows.
Moments moments(const float* mean, const float* squares, int64_t channels, int64_t rows) {
  Moments all;
  for (int64_t c = 0; c < channels; ++c) all.mean += mean[c];
  all.mean /= (double)channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double d = mean[c] - all.mean;
    all.squares += squares[c] + d * d * (double)rows;
  }
  all.count = (double)(channels * rows);
  return all;
}

constexpr int64_t STRETCH = 16;

struct Affine {
  const float* weight;
  const float* bias;
};

// What a group norm does to every channel of one sample: y = scale·x + shift.
void group_norm_factors(const Rows& rows, int64_t sample, int64_t pixels, int groups, float eps, Affine affine,
                        const Moments* parts, int64_t stretches, float* scale, float* shift) {
  const int64_t width = rows.channels / groups;
  for (int g = 0; g < groups; ++g) {
    Moments group;
    for (int64_t s = 0; s < stretches; ++s) {
      const Moments& part = parts[(sample * stretches + s) * groups + g];
      group.add(part.count, part.mean, part.squares);
    }
    const float rstd = (float)(1.0 / std::sqrt(group.squares / group.count + (double)eps));
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      scale[c] = affine.weight ? rstd * affine.weight[c] : rstd;
      shift[c] = (affine.bias ? affine.bias[c] : 0.0f) - (float)group.mean * scale[c];
    }
  }
}

}  // namespace

extern "C" {

// codes[row] of rows [samples·pixels], those of one sample next to each other.
void hqc_quantise(const Rows* rows, int64_t samples, int64_t pixels, const Quantiser* quantiser, uint8_t* codes,
                  int threads) {
  const int64_t channels = rows->channels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> y(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      gather(*rows, row, y.data());
      encode(y.data(), channels, *quantiser, row / pixels, codes + row * channels);
    }
  }
}

// Group norm and SiLU: codes, floats and codes of x itself, each where it is not null.
void hqc_group_norm(const Rows* rows, int64_t samples, int64_t pixels, int groups, float eps, const float* weight,
                    const float* bias, int with_silu, const Quantiser* quantiser, uint8_t* codes, float* floats,
                    const Quantiser* beside_quantiser, uint8_t* beside, int threads) {
  const int64_t channels = rows->channels, width = channels / groups, rest = channels - rows->first;
  const int64_t stretches = (pixels + STRETCH - 1) / STRETCH;
  std::vector<Moments> parts(samples * stretches * groups);
  std::vector<float> factors(samples * 2 * padded(channels));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> mean(padded(channels)), squares(padded(channels)), y(padded(channels));
#pragma omp for schedule(static)
    for (int64_t index = 0; index < samples * stretches; ++index) {
      const int64_t begin = index / stretches * pixels + index % stretches * STRETCH;
      const int64_t left = pixels - index % stretches * STRETCH, count = left < STRETCH ? left : STRETCH;
      stretch_statistics(rows->x + begin * rows->pitch, rows->pitch, rows->first, count, mean.data(), squares.data());
      if (rows->second)
        stretch_statistics(rows->second + begin * rows->second_pitch, rows->second_pitch, rest, count,
                           mean.data() + rows->first, squares.data() + rows->first);
      for (int g = 0; g < groups; ++g)
        parts[index * groups + g] = moments(mean.data() + g * width, squares.data() + g * width, width, count);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < samples; ++n) {
      float* scale = factors.data() + n * 2 * padded(channels);
      group_norm_factors(*rows, n, pixels, groups, eps, {weight, bias}, parts.data(), stretches, scale,
                         scale + padded(channels));
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      const int64_t n = row / pixels;
      const float* scale = factors.data() + n * 2 * padded(channels);
      const float* shift = scale + padded(channels);
      gather(*rows, row, y.data());
      if (beside) {
        std::memcpy(mean.data(), y.data(), 4 * channels);
        encode(mean.data(), channels, *beside_quantiser, n, beside + row * channels);
      }
      for (int64_t c = 0; c < channels; c += LANES) {
        Floats v = load(y.data() + c) * load(scale + c) + load(shift + c);
        store(y.data() + c, with_silu ? silu(v) : v);
      }
      if (floats) std::memcpy(floats + row * channels, y.data(), 4 * channels);
      if (codes) encode(y.data(), channels, *quantiser, n, codes + row * channels);
    }
  }
}

// Layer norm: codes, and floats where they are not null.
void hqc_layer_norm(const Rows* rows, int64_t samples, int64_t pixels, float eps, const float* weight,
                    const float* bias, const Quantiser* quantiser, uint8_t* codes, float* floats, int threads) {
  const int64_t channels = rows->channels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> y(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      gather(*rows, row, y.data());
      float sums[LANES] = {}, squares[LANES] = {};
      for (int64_t c = 0; c < channels; ++c) sums[c % LANES] += y[c];
      double sum = 0, square = 0;
      for (int i = 0; i < LANES; ++i) sum += sums[i];
      const float mean = (float)(sum / (double)channels);
      for (int64_t c = 0; c < channels; ++c) {
        y[c] -= mean;
        squares[c % LANES] += y[c] * y[c];
      }
      for (int i = 0; i < LANES; ++i) square += squares[i];
      const float rstd = (float)(1.0 / std::sqrt(square / (double)channels + (double)eps));
      for (int64_t c = 0; c < channels; ++c)
        y[c] = y[c] * rstd * (weight ? weight[c] : 1.0f) + (bias ? bias[c] : 0.0f);
      if (floats) std::memcpy(floats + row * channels, y.data(), 4 * channels);
      encode(y.data(), channels, *quantiser, row / pixels, codes + row * channels);
    }
  }
}

// Codes of f(x), or of a·f(g) for rows (a, g) of twice the channels.
void hqc_gate(const Rows* rows, int64_t samples, int64_t pixels, int kind, int gated, const Quantiser* quantiser,
              uint8_t* codes, int threads) {
  const int64_t channels = gated ? rows->channels / 2 : rows->channels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> y(padded(channels)), g(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      const float* x = rows->x + row * rows->pitch;
      std::memcpy(y.data(), x, 4 * channels);
      if (gated) std::memcpy(g.data(), x + channels, 4 * channels);
      for (int64_t c = 0; c < channels; c += LANES) {
        Floats a = load(y.data() + c);
        store(y.data() + c, gated ? a * activated(load(g.data() + c), kind) : activated(a, kind));
      }
      encode(y.data(), channels, *quantiser, row / pixels, codes + row * channels);
    }
  }
}

}
