// One call of a kernel as data: what Python writes (`steps.py`, the same fields in the same order) and `run.cpp` runs.
//
// Rows lie channels last, float32; codes are stored as code + 128 in a byte.

#pragma once

#include <cstdint>

namespace hqc {

// How a tensor becomes codes. inverse: 1/s of every sample, low and high its bounds, each so many numbers apart.
struct Quantiser {
  const float* inverse;
  const float* low;
  const float* high;
  int64_t pitch, bound_pitch;
  int64_t block, regular;
};

// x of one row: the first `first` channels at x, the rest at second; those of one sample next to each other.
struct Rows {
  const float* x;
  const float* second;
  int64_t first, pitch, second_pitch, channels;
  int64_t samples, pixels;
};

struct Quantise {
  Rows rows;
  Quantiser quantiser;
  uint8_t* codes;
};

// Group norm and SiLU: codes, floats and codes of x itself, each where it is not null.
struct GroupNorm {
  Rows rows;
  Quantiser quantiser, beside_quantiser;
  const float* weight;
  const float* bias;
  uint8_t* codes;
  float* floats;
  uint8_t* beside;
  int64_t groups, silu;
  double eps;
};

// Layer norm: codes, and floats where they are not null.
struct LayerNorm {
  Rows rows;
  Quantiser quantiser;
  const float* weight;
  const float* bias;
  uint8_t* codes;
  float* floats;
  double eps;
};

// Codes of f(x), or of a·f(g) for rows (a, g) of twice the channels.
struct Gate {
  Rows rows;
  Quantiser quantiser;
  uint8_t* codes;
  int64_t kind, gated;
};

// y = codes·W·scale[o]·factor[n] + bias[o] + shift[n, o] + residual, then SiLU; `add`: to what y holds.
//
// weight: [outputs / 16][taps · channels / 4][16][4], outputs filled up to a multiple of 32, and the last four of taps ·
// channels with 0. Codes are read less `zero`; offset: (128 - zero) times the sum of an output's weights. group: how
// many sums of two products int16 holds.
struct Product {
  const uint8_t* codes;
  const int8_t* weight;
  const int32_t* offset;
  const float* scale;
  const float* factor;
  const float* bias;
  const float* shift;
  const float* residual;
  float* y;
  int64_t factor_pitch, shift_pitch, samples, height, width, channels, outputs;
  int64_t kernel[2], stride[2], padding[2], dilation[2], size[2];
  int64_t upsample, zero, group, add, silu;
};

// y [samples, queries, heads, width] = softmax(q·kᵀ·scale)·v of every head; pitches from sample to sample, head to head
// and token to token.
struct Attention {
  const float* q;
  const float* k;
  const float* v;
  float* y;
  int64_t samples, heads, queries, keys, depth, width;
  int64_t q_pitch[3], k_pitch[3], v_pitch[3];
  double scale;
};

// rows[n] = the first i of the least |timestep[n] - grid[i]|.
struct Nearest {
  const float* timestep;
  const float* grid;
  int64_t* rows;
  int64_t samples, count;
};

// y[r, n, :] = bank[r, rows[n], :], rows `pitch` apart in y.
struct LookUp {
  const float* bank;
  const int64_t* rows;
  float* y;
  int64_t tables, length, width, samples, pitch;
};

enum Kind : int64_t { QUANTISE, GROUP_NORM, LAYER_NORM, GATE, PRODUCT, ATTENTION, NEAREST, LOOK_UP };

struct Step {
  int64_t kind;
  union {
    Quantise quantise;
    GroupNorm group_norm;
    LayerNorm layer_norm;
    Gate gate;
    Product product;
    Attention attention;
    Nearest nearest;
    LookUp look_up;
  };
};

class Team;

void run(const Quantise& step, Team& team);
void run(const GroupNorm& step, Team& team);
void run(const LayerNorm& step, Team& team);
void run(const Gate& step, Team& team);
void run(const Product& step, Team& team);
void run(const Attention& step, Team& team);

}  // namespace hqc
