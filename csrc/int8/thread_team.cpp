#include "int8/thread_team.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vitkd::int8 {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

// Waking a sleeping thread takes some 40 us, as long as a thread's part of a layer. Threads that
// slept sooner than that would wait for each other's wake-up at every barrier.
constexpr microseconds kBetweenLayers{1000}, kBetweenCalls{200};
constexpr microseconds kAlone{20};  // then yields the core, perhaps to the thread it waits for

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_while(const std::atomic<int>& value, int old, microseconds spin) {
  // acquires what the thread that changed it has released: a job, or what came before a barrier
  const auto changed = [&] { return value.load(std::memory_order_acquire) != old; };
  if (changed()) return;
  const auto start = steady_clock::now();
  for (auto waited = steady_clock::duration::zero(); waited < spin;
       waited = steady_clock::now() - start) {
    for (int i = 0; i < 32; ++i) {
      pause();
      if (changed()) return;
    }
    if (waited > kAlone) std::this_thread::yield();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadTeam::ThreadTeam(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadTeam::~ThreadTeam() { stop(); }

void ThreadTeam::stop() {
  stop_ = true;  // released like a job
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadTeam::work(int index) {
  for (unsigned round = 0;; ++round) {  // wraps like the atomic, after weeks
    wait_while(round_, static_cast<int>(round), kBetweenCalls);
    if (stop_) return;
    job_(argument_, index);
    barrier();
  }
}

void ThreadTeam::start(Job job, const void* argument) {
  job_ = job;
  argument_ = argument;
  if (!workers_.empty()) {
    // releases job_, argument_ and what the caller has written
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }
  job(argument, 0);
  barrier();
}

void ThreadTeam::barrier() {
  if (workers_.empty()) return;
  // cannot be the next one: it is counted after this thread has arrived, which is after this
  const int phase = phase_.load(std::memory_order_relaxed);
  // each releases what it has written to the last one, which acquires it from all
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads()) {
    // nobody arrives again before the phase has changed, and that is released after this
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_while(phase_, phase, kBetweenLayers);
  }
}

}  // namespace vitkd::int8
