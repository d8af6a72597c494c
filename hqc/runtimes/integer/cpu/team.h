// Who shares the work of a step: this thread alone, OpenMP's threads, or threads of our own.
//
// OpenMP waits at every step for all its threads, and where one of them has no core the others wait for long. Threads of
// our own take pieces while there are any; nobody waits for one that took none. But both kinds go on looking for work
// for a while, so that steps between calls of torch, which are OpenMP's, leave it to those.

#pragma once

#include <cstdint>
#include <vector>

namespace hqc {

class Team {
 public:
  // threads: this one among them. own: of ours if nobody else has them now, else this thread alone.
  Team(int threads, bool own);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // work(piece) of every piece, each once. alone: by this thread.
  template <class Work>
  void each(int64_t pieces, bool alone, const Work& work) {
    if (alone || threads_ == 1 || pieces == 1) {
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
    } else if (own_) {
      share(pieces, [](const void* given, int64_t piece) { (*static_cast<const Work*>(given))(piece); }, &work);
    } else {
#pragma omp parallel for num_threads(threads_) schedule(static)
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
    }
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static void share(int64_t pieces, Call call, const void* given);

  int threads_;
  bool own_;
};

// Numbers of this thread to write to, 64 bytes from the next: `count` of them, whatever they were before.
float* scratch(int which, int64_t count);

}  // namespace hqc
