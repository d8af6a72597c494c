#include "team.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hqc {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

constexpr int64_t BITS = 24, MOST = (int64_t(1) << BITS) - 1;
constexpr int PATIENCE = 20000;  // looks before a thread sleeps: about half a millisecond

// A job is its pieces, and the next one to take: the two in one number, so that a thread that comes late takes nothing
// of a job that it does not know. What the job is stays as it is until all that were taken are done.
struct Pool {
  std::mutex taken;
  std::atomic<uint64_t> job{0};
  std::atomic<int64_t> done{0};
  void (*call)(const void*, int64_t) = nullptr;
  const void* given = nullptr;

  std::mutex asleep;
  std::condition_variable wake;
  std::atomic<int> wanted{0};
  uint64_t begun = 0;  // a thread that wakes when a run is over stays awake for the next
  int there = 0;
  pid_t process = getpid();

  // One piece of the job, if any is left.
  bool work() {
    uint64_t seen = job.load(std::memory_order_acquire);
    if ((seen & MOST) >= ((seen >> BITS) & MOST)) return false;
    seen = job.fetch_add(1, std::memory_order_acq_rel);
    const int64_t piece = seen & MOST, pieces = (seen >> BITS) & MOST;
    if (piece >= pieces) return false;
    call(given, piece);
    done.fetch_add(1, std::memory_order_release);
    return true;
  }

  void follow(int number) {
    uint64_t seen = 0;
    for (int looks = 0;;) {
      if (wanted.load(std::memory_order_acquire) > number && work()) {
        looks = 0;
      } else if (++looks < PATIENCE) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(asleep);
        wake.wait(lock, [&] { return begun != seen; });
        seen = begun;
        looks = 0;
      }
    }
  }

  // So many threads beside the caller's look for work until `wanted` is 0 again.
  void begin(int count) {
    std::lock_guard<std::mutex> lock(asleep);
    for (; there < count; ++there) std::thread([this, number = there] { follow(number); }).detach();
    wanted.store(count);
    ++begun;
    wake.notify_all();
  }
};

// Never destroyed: its threads sleep until the process ends. A forked process has none of them, and takes no others.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace

Team::Team(int threads, bool own) : threads_(threads), own_(false) {
  if (!own || threads == 1) return;
  own_ = pool().process == getpid() && pool().taken.try_lock();
  if (!own_)
    threads_ = 1;
  else
    pool().begin(threads - 1);
}

Team::~Team() {
  if (!own_) return;
  pool().wanted.store(0);
  pool().taken.unlock();
}

void Team::share(int64_t pieces, Call call, const void* given) {
  Pool& p = pool();
  for (int64_t first = 0; first < pieces; first += MOST) {
    const int64_t count = std::min(pieces - first, MOST);
    struct Part {
      Call call;
      const void* given;
      int64_t first;
    } part{call, given, first};
    p.call = [](const void* given, int64_t piece) {
      const Part* part = static_cast<const Part*>(given);
      part->call(part->given, part->first + piece);
    };
    p.given = &part;
    p.done.store(0, std::memory_order_relaxed);
    p.job.store(uint64_t(count) << BITS, std::memory_order_release);
    while (p.work()) {
    }
    for (int looks = 0; p.done.load(std::memory_order_acquire) < count;) {
      if (++looks < PATIENCE)
        pause();
      else
        std::this_thread::yield();
    }
  }
}

float* scratch(int which, int64_t count) {
  thread_local std::vector<float> kept[4];
  std::vector<float>& one = kept[which];
  if ((int64_t)one.size() < count + 16) one.resize(count + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(one.data()) + 63) / 64 * 64);
}

}  // namespace hqc
