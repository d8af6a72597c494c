// What Python calls: steps one after the other.

#include <cmath>
#include <cstring>

#include "steps.h"
#include "team.h"

namespace hqc {
namespace {

void run(const Nearest& step) {
  for (int64_t n = 0; n < step.samples; ++n) {
    int64_t best = 0;
    for (int64_t i = 1; i < step.count; ++i)
      if (std::fabs(step.timestep[n] - step.grid[i]) < std::fabs(step.timestep[n] - step.grid[best])) best = i;
    step.rows[n] = best;
  }
}

void run(const LookUp& step) {
  const int64_t width = step.width;
  for (int64_t r = 0; r < step.tables; ++r)
    for (int64_t n = 0; n < step.samples; ++n)
      std::memcpy(step.y + (r * step.pitch + n) * width, step.bank + (r * step.length + step.rows[n]) * width,
                  4 * width);
}

void run_one(const Step& step, Team& team) {
  switch (step.kind) {
    case QUANTISE: run(step.quantise, team); break;
    case GROUP_NORM: run(step.group_norm, team); break;
    case LAYER_NORM: run(step.layer_norm, team); break;
    case GATE: run(step.gate, team); break;
    case PRODUCT: run(step.product, team); break;
    case ATTENTION: run(step.attention, team); break;
    case NEAREST: run(step.nearest); break;
    default: run(step.look_up);
  }
}

}  // namespace
}  // namespace hqc

extern "C" {

// own: by threads of our own instead of OpenMP's, see `Team`.
void hqc_run(const hqc::Step* steps, int64_t count, int threads, int own) {
  hqc::Team team(threads, own);
  for (int64_t i = 0; i < count; ++i) hqc::run_one(steps[i], team);
}

// Adds `base` to the pointers at `places`, in bytes from `steps` on: what a call's memory begins at.
void hqc_move(char* steps, const int64_t* places, int64_t count, int64_t base) {
  for (int64_t i = 0; i < count; ++i) *reinterpret_cast<int64_t*>(steps + places[i]) += base;
}

int64_t hqc_step_size() { return sizeof(hqc::Step); }
}
