// Passes over rows that end in codes: [norm | gate], rotation, scaling, rounding, clipping; one read, one write.
//
// Rows lie channels last, float32; codes are stored as code + 128 in a byte. Sums run in another order than torch's, so
// that a code on a rounding boundary may move by a step.

#include <cmath>
#include <cstring>
#include <vector>

#include "steps.h"
#include "team.h"
#include "vectors.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>  // gcc takes vectors of bytes apart lane by lane
#endif

namespace hqc {
namespace {

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

// Lane i ^ BIT in the place of lane i.
template <int BIT>
inline Floats partner(Floats v) {
#ifdef __AVX512F__
  if constexpr (BIT == 1) return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  if constexpr (BIT == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  if constexpr (BIT == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  if constexpr (BIT == 1) return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  if constexpr (BIT == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
}

template <int BIT>
inline Floats butterfly(Floats v) {
  Floats sign;
  for (int i = 0; i < LANES; ++i) sign[i] = i & BIT ? -1.0f : 1.0f;
  return partner<BIT>(v) + sign * v;
}

// Sylvester's matrix within the lanes of one vector, for a block of up to LANES.
inline Floats rotated_lanes(Floats v, int block) {
  if (block > 1) v = butterfly<1>(v);
  if (block > 2) v = butterfly<2>(v);
  if (block > 4) v = butterfly<4>(v);
  if constexpr (LANES > 8)
    if (block > 8) v = butterfly<8>(v);
  return v;
}

// Sylvester's matrix of order LANES * VECTORS on one block in registers; of a smaller order within each vector.
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

#if defined(__AVX2__) && !defined(__AVX512F__)
inline Bytes lowest_bytes(Words words) {
  const __m256i bytes = (__m256i)words & _mm256_set1_epi32(255);
  const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  const int64_t packed = _mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs));
  Bytes found;
  std::memcpy(&found, &packed, sizeof found);
  return found;
}
#else
inline Bytes lowest_bytes(Words words) { return __builtin_convertvector(words, Bytes); }
#endif

// A quantiser with what all samples share.
struct Coder {
  const Quantiser& quantiser;
  float factor;

  explicit Coder(const Quantiser& q) : quantiser(q), factor(1.0f / std::sqrt((float)q.block)) {}
};

// Rounding and clipping of one sample's values.
struct Levels {
  float factor, inverse, low, high;

  Levels(const Coder& coder, int64_t sample)
      : factor(coder.factor),
        inverse(coder.quantiser.inverse[sample * coder.quantiser.pitch]),
        low(coder.quantiser.low[sample * coder.quantiser.bound_pitch]),
        high(coder.quantiser.high[sample * coder.quantiser.bound_pitch]) {}

  // Adding 1.5·2^23 rounds to even and leaves the integer in the lowest bits; 128 more makes it unsigned.
  static constexpr float MAGIC = 12582912.0f + 128.0f;

  void put(Floats v, uint8_t* codes) const {
    v = v * factor * inverse;
    v = v < low ? all(low) : v;
    v = v > high ? all(high) : v;
    const Bytes bytes = lowest_bytes((Words)(v + MAGIC));
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

// value(c): the vector of channels from c on. whole: it reads nothing beyond the channels.
template <class Value>
void encode(const Value& value, bool whole, int64_t channels, const Coder& coder, int64_t sample, uint8_t* codes,
            float* floats, float* scratch) {
  const Quantiser& q = coder.quantiser;
  const Levels levels(coder, sample);
  if (!whole || q.regular || q.block > 8 * LANES) {
    encode_stored(value, channels, q, levels, codes, floats, scratch);
    return;
  }
  switch (q.block / LANES) {
    case 8: encode_blocks<8>(value, channels, q.block, levels, codes, floats); break;
    case 4: encode_blocks<4>(value, channels, q.block, levels, codes, floats); break;
    case 2: encode_blocks<2>(value, channels, q.block, levels, codes, floats); break;
    default: encode_blocks<1>(value, channels, q.block, levels, codes, floats);
  }
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// One row of both parts side by side, a vector of channels at a time; in scratch where a vector would cross a part's end.
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

// Mean and squared deviations of VECTORS vectors of channels over a stretch of rows.
template <int VECTORS>
inline void column_statistics(const float* x, int64_t pitch, int64_t count, float* mean, float* squares) {
  Floats m[VECTORS], s[VECTORS];
  for (int i = 0; i < VECTORS; ++i) m[i] = s[i] = all(0.0f);
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < VECTORS; ++i) m[i] += load(x + r * pitch + i * LANES);
  for (int i = 0; i < VECTORS; ++i) m[i] /= all((float)count);
  for (int64_t r = 0; r < count; ++r)
    for (int i = 0; i < VECTORS; ++i) {
      const Floats d = load(x + r * pitch + i * LANES) - m[i];
      s[i] += d * d;
    }
  for (int i = 0; i < VECTORS; ++i) {
    store(mean + i * LANES, m[i]);
    store(squares + i * LANES, s[i]);
  }
}

void stretch_statistics(const float* x, int64_t pitch, int64_t channels, int64_t count, float* mean, float* squares) {
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES)
    column_statistics<4>(x + c, pitch, count, mean + c, squares + c);
  for (; c + LANES <= channels; c += LANES) column_statistics<1>(x + c, pitch, count, mean + c, squares + c);
  for (; c < channels; ++c) {
    float m = 0, s = 0;
    for (int64_t r = 0; r < count; ++r) m += x[r * pitch + c];
    m /= (float)count;
    for (int64_t r = 0; r < count; ++r) s += (x[r * pitch + c] - m) * (x[r * pitch + c] - m);
    mean[c] = m;
    squares[c] = s;
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

// Rows of one piece; of a pass over few numbers one thread is done before another has begun.
constexpr int64_t PIECE = 16, FEW = 8192;

// work(row) of every row.
template <class Work>
void each_row(Team& team, int64_t rows, int64_t channels, const Work& work) {
  team.each((rows + PIECE - 1) / PIECE, rows * channels < FEW, [&](int64_t piece) {
    const int64_t end = (piece + 1) * PIECE < rows ? (piece + 1) * PIECE : rows;
    for (int64_t row = piece * PIECE; row < end; ++row) work(row);
  });
}

}  // namespace

void run(const Quantise& step, Team& team) {
  const Rows& rows = step.rows;
  const int64_t channels = rows.channels;
  const Coder coder(step.quantiser);
  each_row(team, rows.samples * rows.pixels, channels, [&](int64_t row) {
    encode(Row(rows, row, scratch(0, padded(channels))), Row::whole(rows), channels, coder, row / rows.pixels,
           step.codes + row * channels, nullptr, scratch(1, padded(channels)));
  });
}

void run(const GroupNorm& step, Team& team) {
  const Rows& rows = step.rows;
  const int64_t samples = rows.samples, pixels = rows.pixels, groups = step.groups;
  const int64_t channels = rows.channels, width = channels / groups, rest = channels - rows.first;
  const int64_t stretches = (pixels + STRETCH - 1) / STRETCH;
  const bool whole = Row::whole(rows), alone = samples * pixels * channels < FEW;
  const Coder coder(step.quantiser), beside(step.beside_quantiser);
  std::vector<Moments> parts(samples * stretches * groups);
  std::vector<float> factors(samples * 2 * padded(channels));
  team.each(samples * stretches, alone, [&](int64_t index) {
    float *mean = scratch(0, padded(channels)), *squares = scratch(1, padded(channels));
    const int64_t begin = index / stretches * pixels + index % stretches * STRETCH;
    const int64_t left = pixels - index % stretches * STRETCH, count = left < STRETCH ? left : STRETCH;
    stretch_statistics(rows.x + begin * rows.pitch, rows.pitch, rows.first, count, mean, squares);
    if (rows.second)
      stretch_statistics(rows.second + begin * rows.second_pitch, rows.second_pitch, rest, count, mean + rows.first,
                         squares + rows.first);
    for (int64_t g = 0; g < groups; ++g)
      parts[index * groups + g] = moments(mean + g * width, squares + g * width, width, count);
  });
  team.each(samples, true, [&](int64_t n) {
    float* scale = factors.data() + n * 2 * padded(channels);
    group_norm_factors(rows, n, (int)groups, (float)step.eps, {step.weight, step.bias}, parts.data(), stretches, scale,
                       scale + padded(channels));
  });
  each_row(team, samples * pixels, channels, [&](int64_t row) {
    float* y = scratch(1, padded(channels));
    const int64_t n = row / pixels;
    const float* scale = factors.data() + n * 2 * padded(channels);
    const float* shift = scale + padded(channels);
    const Row value(rows, row, scratch(0, padded(channels)));
    if (step.beside) encode(value, whole, channels, beside, n, step.beside + row * channels, nullptr, y);
    auto run = [&](auto normed) {
      if (step.codes)
        encode(normed, whole, channels, coder, n, step.codes + row * channels,
               step.floats ? step.floats + row * channels : nullptr, y);
      else {
        for (int64_t c = 0; c < channels; c += LANES) store(y + c, normed(c));
        std::memcpy(step.floats + row * channels, y, 4 * channels);
      }
    };
    if (step.silu)
      run([&](int64_t c) { return silu(value(c) * load(scale + c) + load(shift + c)); });
    else
      run([&](int64_t c) { return value(c) * load(scale + c) + load(shift + c); });
  });
}

void run(const LayerNorm& step, Team& team) {
  const Rows& rows = step.rows;
  const int64_t channels = rows.channels;
  const bool whole = Row::whole(rows);
  // Whole vectors of the weights are read; without any they are 1 and 0. Beyond the channels scale and shift are 0.
  std::vector<float> scale(padded(channels)), shift(padded(channels));
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = step.weight ? step.weight[c] : 1.0f;
    shift[c] = step.bias ? step.bias[c] : 0.0f;
  }
  const float eps = (float)step.eps;
  const Coder coder(step.quantiser);
  each_row(team, rows.samples * rows.pixels, channels, [&](int64_t row) {
    const Row value(rows, row, scratch(0, padded(channels)));
    const float mean = mean_of(value, channels);
    const float rstd = 1.0f / std::sqrt(mean_square(value, channels, mean) + eps);
    encode([&](int64_t c) { return (value(c) - mean) * rstd * load(&scale[c]) + load(&shift[c]); }, whole, channels,
           coder, row / rows.pixels, step.codes + row * channels, step.floats ? step.floats + row * channels : nullptr,
           scratch(1, padded(channels)));
  });
}

void run(const Gate& step, Team& team) {
  const Rows& rows = step.rows;
  const int64_t channels = step.gated ? rows.channels / 2 : rows.channels;
  const bool whole = channels % LANES == 0;
  const Coder coder(step.quantiser);
  each_row(team, rows.samples * rows.pixels, channels, [&](int64_t row) {
    const float* left = rows.x + row * rows.pitch;
    const float* right = left + channels;
    if (!whole) {
      float *a = scratch(0, padded(channels)), *g = scratch(2, padded(channels));
      std::memcpy(a, left, 4 * channels);
      if (step.gated) std::memcpy(g, right, 4 * channels);
      left = a;
      right = g;
    }
    auto run = [&](auto value) {
      encode(value, whole, channels, coder, row / rows.pixels, step.codes + row * channels, nullptr,
             scratch(1, padded(channels)));
    };
    if (!step.gated)
      run([&](int64_t c) { return activated(load(left + c), (int)step.kind); });
    else if (step.kind == GELU)
      run([&](int64_t c) { return load(left + c) * gelu(load(right + c)); });
    else
      run([&](int64_t c) { return load(left + c) * activated(load(right + c), (int)step.kind); });
  });
}

}  // namespace hqc
