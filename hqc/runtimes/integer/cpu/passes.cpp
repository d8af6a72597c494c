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

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

inline Floats hyperbolic_tangent(Floats x) {
  Floats t = exponential(-2.0f * (x < 0.0f ? -x : x));
  Floats y = (1.0f - t) / (1.0f + t);
  return x < 0.0f ? -y : y;
}

// erf within 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline Floats error_function(Floats x) {
  Floats a = (x < 0.0f ? -x : x);
  Floats t = 1.0f / (1.0f + 0.3275911f * a);
  Floats p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Floats y = 1.0f - p * t * exponential(-a * a);
  return x < 0.0f ? -y : y;
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

// Sylvester's matrix of order 16 * VECTORS on one block in registers; of a smaller order within each vector.
template <int VECTORS>
inline void rotate_registers(Floats* v, int block) {
  for (int i = 0; i < VECTORS; ++i) v[i] = rotated_lanes(v[i], VECTORS == 1 ? block : LANES);
  for (int step = 1; step < VECTORS; step *= 2)
    for (int i = 0; i < VECTORS; i += 2 * step)
      for (int j = i; j < i + step; ++j) {
        Floats a = v[j], b = v[j + step];
        v[j] = a + b;
        v[j + step] = a - b;
      }
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

// Rounding and clipping of one sample's values.
struct Levels {
  float factor, inverse, low, high;

  Levels(const Quantiser& q, int64_t sample)
      : factor(1.0f / std::sqrt((float)q.block)), inverse(q.inverse[sample]), low(q.low[sample]), high(q.high[sample]) {}

  // Adding 1.5·2^23 rounds to even and leaves the integer in the lowest bits; 128 more makes it unsigned.
  static constexpr float MAGIC = 12582912.0f + 128.0f;

  void put(Floats v, uint8_t* codes) const {
    v = v * factor * inverse;
    v = v < low ? all(low) : v;
    v = v > high ? all(high) : v;
    Bytes bytes = __builtin_convertvector((Words)(v + MAGIC), Bytes);
    std::memcpy(codes, &bytes, sizeof bytes);
  }

  uint8_t one(float v) const {
    v = v * factor * inverse;
    v = (v < low ? low : v > high ? high : v) + MAGIC;
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return (uint8_t)bits;
  }
};

// Codes of values that are computed a vector at a time and rotated where they are; the values too if `floats` is given.
template <int VECTORS, class Value>
inline void encode_blocks(const Value& value, int64_t channels, int block, const Levels& levels, uint8_t* codes,
                          float* floats) {
  for (int64_t c = 0; c < channels; c += LANES * VECTORS) {
    Floats v[VECTORS];
    for (int i = 0; i < VECTORS; ++i) v[i] = value(c + LANES * i);
    if (floats)
      for (int i = 0; i < VECTORS; ++i) store(floats + c + LANES * i, v[i]);
    rotate_registers<VECTORS>(v, block);
    for (int i = 0; i < VECTORS; ++i) levels.put(v[i], codes + c + LANES * i);
  }
}

// The same through memory, for channels that are no whole vectors and for other rotations. Whole vectors of scratch are
// written and read beyond the channels.
template <class Value>
void encode_stored(const Value& value, int64_t channels, const Quantiser& q, const Levels& levels, uint8_t* codes,
                   float* floats, float* y) {
  for (int64_t c = 0; c < channels; c += LANES) store(y + c, value(c));
  if (floats) std::memcpy(floats, y, 4 * channels);
  if (!codes) return;
  if (q.regular)
    for (int64_t c = 0; c < channels; c += q.block) rotate_regular(y + c, q.block);
  else if (q.block > 1)
    for (int64_t c = 0; c < channels; c += q.block) rotate_any(y + c, q.block);
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) levels.put(load(y + c), codes + c);
  for (; c < channels; ++c) codes[c] = levels.one(y[c]);
}

// value(c): 16 channels from c on. whole: it reads nothing beyond the channels.
template <class Value>
void encode(const Value& value, bool whole, int64_t channels, const Quantiser& q, int64_t sample, uint8_t* codes,
            float* floats, float* scratch) {
  const Levels levels(q, sample);
  if (!whole || q.regular || q.block > 128)
    encode_stored(value, channels, q, levels, codes, floats, scratch);
  else if (q.block == 128)
    encode_blocks<8>(value, channels, q.block, levels, codes, floats);
  else if (q.block == 64)
    encode_blocks<4>(value, channels, q.block, levels, codes, floats);
  else if (q.block == 32)
    encode_blocks<2>(value, channels, q.block, levels, codes, floats);
  else
    encode_blocks<1>(value, channels, q.block, levels, codes, floats);
}

// ---- rows ----------------------------------------------------------------------------------------------------------

inline int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

// One row of both parts side by side, 16 channels at a time; in scratch where a vector would cross a part's end.
class Row {
 public:
  Row(const Rows& rows, int64_t row, float* scratch)
      : x_(rows.x + row * rows.pitch), second_(x_), first_(rows.channels) {
    const float* second = rows.second + row * rows.second_pitch;
    if (whole(rows)) {
      if (!rows.second) return;
      second_ = second - rows.first;
      first_ = rows.first;
      return;
    }
    std::memcpy(scratch, x_, 4 * rows.first);
    if (rows.second) std::memcpy(scratch + rows.first, second, 4 * (rows.channels - rows.first));
    x_ = scratch;
  }

  static bool whole(const Rows& rows) { return rows.first % LANES == 0 && rows.channels % LANES == 0; }

  Floats operator()(int64_t c) const { return load((c < first_ ? x_ : second_) + c); }

 private:
  const float* x_;
  const float* second_;
  int64_t first_;
};

// Mean and squared deviations of `WIDTH` channels over a stretch of rows.
template <int WIDTH>
inline void column_statistics(const float* x, int64_t pitch, int64_t count, float* mean, float* squares) {
  float m[WIDTH] = {}, s[WIDTH] = {};
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < WIDTH; ++i) m[i] += x[r * pitch + i];
  for (int i = 0; i < WIDTH; ++i) m[i] /= (float)count;
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < WIDTH; ++i) {
      const float d = x[r * pitch + i] - m[i];
      s[i] += d * d;
    }
  std::memcpy(mean, m, sizeof m);
  std::memcpy(squares, s, sizeof s);
}

void stretch_statistics(const float* x, int64_t pitch, int64_t channels, int64_t count, float* mean, float* squares) {
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES)
    column_statistics<4 * LANES>(x + c, pitch, count, mean + c, squares + c);
  for (; c + LANES <= channels; c += LANES) column_statistics<LANES>(x + c, pitch, count, mean + c, squares + c);
  for (; c < channels; ++c) column_statistics<1>(x + c, pitch, count, mean + c, squares + c);
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

inline float sum_of(Floats v) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}

// 1 in the first `count` lanes: what lies beyond a row's channels in scratch is left out.
inline Floats lanes_below(int64_t count) {
  Floats v;
  for (int i = 0; i < LANES; ++i) v[i] = i < count ? 1.0f : 0.0f;
  return v;
}

float mean_of(const Row& value, int64_t channels) {
  Floats sum = all(0.0f);
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) sum += value(c);
  if (c < channels) sum += value(c) * lanes_below(channels - c);
  return sum_of(sum) / (float)channels;
}

float mean_square(const Row& value, int64_t channels, float mean) {
  Floats sum = all(0.0f);
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) {
    const Floats d = value(c) - mean;
    sum += d * d;
  }
  if (c < channels) {
    const Floats d = (value(c) - mean) * lanes_below(channels - c);
    sum += d * d;
  }
  return sum_of(sum) / (float)channels;
}

constexpr int64_t STRETCH = 16;

struct Affine {
  const float* weight;
  const float* bias;
};

// What a group norm does to every channel of one sample: y = scale·x + shift.
void group_norm_factors(const Rows& rows, int64_t sample, int groups, float eps, Affine affine,
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
    std::vector<float> x(padded(channels)), y(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row)
      encode(Row(*rows, row, x.data()), Row::whole(*rows), channels, *quantiser, row / pixels, codes + row * channels,
             nullptr, y.data());
  }
}

// Group norm and SiLU: codes, floats and codes of x itself, each where it is not null.
void hqc_group_norm(const Rows* rows, int64_t samples, int64_t pixels, int groups, float eps, const float* weight,
                    const float* bias, int with_silu, const Quantiser* quantiser, uint8_t* codes, float* floats,
                    const Quantiser* beside_quantiser, uint8_t* beside, int threads) {
  const int64_t channels = rows->channels, width = channels / groups, rest = channels - rows->first;
  const int64_t stretches = (pixels + STRETCH - 1) / STRETCH;
  const bool whole = Row::whole(*rows);
  std::vector<Moments> parts(samples * stretches * groups);
  std::vector<float> factors(samples * 2 * padded(channels));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> mean(padded(channels)), squares(padded(channels)), x(padded(channels)), y(padded(channels));
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
      group_norm_factors(*rows, n, groups, eps, {weight, bias}, parts.data(), stretches, scale,
                         scale + padded(channels));
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      const int64_t n = row / pixels;
      const float* scale = factors.data() + n * 2 * padded(channels);
      const float* shift = scale + padded(channels);
      const Row value(*rows, row, x.data());
      if (beside)
        encode(value, whole, channels, *beside_quantiser, n, beside + row * channels, nullptr, y.data());
      auto run = [&](auto normed) {
        if (codes)
          encode(normed, whole, channels, *quantiser, n, codes + row * channels,
                 floats ? floats + row * channels : nullptr, y.data());
        else {
          for (int64_t c = 0; c < channels; c += LANES) store(y.data() + c, normed(c));
          std::memcpy(floats + row * channels, y.data(), 4 * channels);
        }
      };
      if (with_silu)
        run([&](int64_t c) { return silu(value(c) * load(scale + c) + load(shift + c)); });
      else
        run([&](int64_t c) { return value(c) * load(scale + c) + load(shift + c); });
    }
  }
}

// Layer norm: codes, and floats where they are not null.
void hqc_layer_norm(const Rows* rows, int64_t samples, int64_t pixels, float eps, const float* weight,
                    const float* bias, const Quantiser* quantiser, uint8_t* codes, float* floats, int threads) {
  const int64_t channels = rows->channels;
  const bool whole = Row::whole(*rows);
  // Whole vectors of the weights are read; without any they are 1 and 0. Beyond the channels scale and shift are 0.
  std::vector<float> scale(padded(channels)), shift(padded(channels));
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = weight ? weight[c] : 1.0f;
    shift[c] = bias ? bias[c] : 0.0f;
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> x(padded(channels)), y(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      const Row value(*rows, row, x.data());
      const float mean = mean_of(value, channels);
      const float rstd = 1.0f / std::sqrt(mean_square(value, channels, mean) + eps);
      encode([&](int64_t c) { return (value(c) - mean) * rstd * load(&scale[c]) + load(&shift[c]); }, whole, channels,
             *quantiser, row / pixels, codes + row * channels, floats ? floats + row * channels : nullptr, y.data());
    }
  }
}

// Codes of f(x), or of a·f(g) for rows (a, g) of twice the channels.
void hqc_gate(const Rows* rows, int64_t samples, int64_t pixels, int kind, int gated, const Quantiser* quantiser,
              uint8_t* codes, int threads) {
  const int64_t channels = gated ? rows->channels / 2 : rows->channels;
  const bool whole = channels % LANES == 0;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> a(padded(channels)), g(padded(channels)), y(padded(channels));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < samples * pixels; ++row) {
      const float* left = rows->x + row * rows->pitch;
      const float* right = left + channels;
      if (!whole) {
        std::memcpy(a.data(), left, 4 * channels);
        if (gated) std::memcpy(g.data(), right, 4 * channels);
        left = a.data();
        right = g.data();
      }
      auto run = [&](auto value) {
        encode(value, whole, channels, *quantiser, row / pixels, codes + row * channels, nullptr, y.data());
      };
      if (!gated)
        run([&](int64_t c) { return activated(load(left + c), kind); });
      else if (kind == GELU)
        run([&](int64_t c) { return load(left + c) * gelu(load(right + c)); });
      else
        run([&](int64_t c) { return load(left + c) * activated(load(right + c), kind); });
    }
  }
}
}
