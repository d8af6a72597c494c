// softmax(q·kᵀ·scale)·v in float32, blocks of keys one after the other with the largest score so far (flash attention).

#include <algorithm>
#include <cmath>

#include "steps.h"
#include "team.h"
#include "vectors.h"

namespace hqc {
namespace {

constexpr int64_t KEYS = 64, QUERIES = 32;
constexpr int ROWS = 4;

// c [rows, 2 vectors] = or += a [rows, depth]·b [depth, 2 vectors], each row so many numbers from the next.
template <int COUNT, int VECTORS>
inline void tile(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t depth, float* c,
                 int64_t c_pitch, bool add) {
  Floats sums[COUNT][VECTORS];
  for (int r = 0; r < COUNT; ++r)
    for (int i = 0; i < VECTORS; ++i) sums[r][i] = add ? load(c + r * c_pitch + i * LANES) : all(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[VECTORS];
    for (int i = 0; i < VECTORS; ++i) row[i] = load(b + k * b_pitch + i * LANES);
    for (int r = 0; r < COUNT; ++r) {
      const Floats x = all(a[r * a_pitch + k]);
      for (int i = 0; i < VECTORS; ++i) sums[r][i] += x * row[i];
    }
  }
  for (int r = 0; r < COUNT; ++r)
    for (int i = 0; i < VECTORS; ++i) store(c + r * c_pitch + i * LANES, sums[r][i]);
}

template <int VECTORS>
inline void columns(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t depth, float* c,
                    int64_t c_pitch, bool add, int64_t rows) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    tile<ROWS, VECTORS>(a + r * a_pitch, a_pitch, b, b_pitch, depth, c + r * c_pitch, c_pitch, add);
  for (; r < rows; ++r)
    tile<1, VECTORS>(a + r * a_pitch, a_pitch, b, b_pitch, depth, c + r * c_pitch, c_pitch, add);
}

// The same for any number of rows, and of columns in whole vectors.
void multiply(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch, int64_t depth, float* c,
              int64_t c_pitch, bool add, int64_t rows, int64_t width) {
  int64_t o = 0;
  for (; o + 2 * LANES <= width; o += 2 * LANES)
    columns<2>(a, a_pitch, b + o, b_pitch, depth, c + o, c_pitch, add, rows);
  if (o < width) columns<1>(a, a_pitch, b + o, b_pitch, depth, c + o, c_pitch, add, rows);
}

// Scores of one row over a block of keys become e^(score - largest); what was summed before is scaled to that.
void soften(float* scores, int64_t keys, float* largest, float* total, float* y, int64_t width) {
  Floats most = all(*largest);
  for (int64_t j = 0; j < keys; j += LANES) {
    const Floats s = load(scores + j);
    most = s > most ? s : most;
  }
  float top = most[0];
  for (int i = 1; i < LANES; ++i) top = most[i] > top ? most[i] : top;
  Floats sum = all(0.0f);
  for (int64_t j = 0; j < keys; j += LANES) {
    const Floats e = exponential(load(scores + j) - top);
    store(scores + j, e);
    sum += e;
  }
  float here = 0;
  for (int i = 0; i < LANES; ++i) here += sum[i];
  const float before = *total > 0 ? std::exp(*largest - top) : 0.0f;
  if (before != 1.0f)
    for (int64_t o = 0; o < width; o += LANES) store(y + o, load(y + o) * before);
  *total = *total * before + here;
  *largest = top;
}

void attend(const Attention& p, int64_t n, int64_t head, int64_t first) {
  const int64_t rows = std::min(QUERIES, p.queries - first), depth = p.depth, width = padded(p.width);
  float* q = scratch(0, QUERIES * depth);
  float* k = scratch(1, depth * KEYS);
  float* v = scratch(2, KEYS * width);
  float* y = scratch(3, QUERIES * (width + KEYS) + 2 * QUERIES);
  float *scores = y + QUERIES * width, *largest = scores + QUERIES * KEYS, *total = largest + QUERIES;
  std::fill(y, y + rows * width, 0.0f);
  std::fill(largest, largest + rows, -INFINITY);
  std::fill(total, total + rows, 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < depth; ++d)
      q[r * depth + d] = p.q[n * p.q_pitch[0] + head * p.q_pitch[1] + (first + r) * p.q_pitch[2] + d] * (float)p.scale;
  for (int64_t begin = 0; begin < p.keys; begin += KEYS) {
    const int64_t keys = std::min(KEYS, p.keys - begin), whole = padded(keys);
    const float* from_k = p.k + n * p.k_pitch[0] + head * p.k_pitch[1] + begin * p.k_pitch[2];
    const float* from_v = p.v + n * p.v_pitch[0] + head * p.v_pitch[1] + begin * p.v_pitch[2];
    for (int64_t j = 0; j < whole; ++j)
      for (int64_t d = 0; d < depth; ++d) k[d * KEYS + j] = j < keys ? from_k[j * p.k_pitch[2] + d] : 0.0f;
    for (int64_t j = 0; j < keys; ++j) {
      std::memcpy(v + j * width, from_v + j * p.v_pitch[2], 4 * p.width);
      std::fill(v + j * width + p.width, v + (j + 1) * width, 0.0f);
    }
    multiply(q, depth, k, KEYS, depth, scores, KEYS, false, rows, whole);
    for (int64_t r = 0; r < rows; ++r) {
      std::fill(scores + r * KEYS + keys, scores + r * KEYS + whole, -INFINITY);
      soften(scores + r * KEYS, whole, largest + r, total + r, y + r * width, width);
    }
    multiply(scores, KEYS, v, width, keys, y, width, true, rows, width);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* out = p.y + ((n * p.queries + first + r) * p.heads + head) * p.width;
    for (int64_t o = 0; o < p.width; ++o) out[o] = y[r * width + o] / total[r];
  }
}

}  // namespace

void run(const Attention& p, Team& team) {
  const int64_t blocks = (p.queries + QUERIES - 1) / QUERIES, parts = p.heads * blocks;
  const bool alone = p.samples * p.heads * p.queries * p.keys * (p.depth + p.width) < 50000;
  team.each(p.samples * parts, alone, [&](int64_t index) {
    attend(p, index / parts, index % parts / blocks, index % blocks * QUERIES);
  });
}

}  // namespace hqc
