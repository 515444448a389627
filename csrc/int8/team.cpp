#include "int8/team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vitkd::int8 {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void wait_while(const std::atomic<int>& value, int old) {
  for (int i = 0; i < 1000; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

Team::~Team() { stop(); }

void Team::stop() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::work(int index) {
  for (int round = 0;; ++round) {
    wait_while(round_, round);
    if (stop_) return;
    job_(argument_, index);
    barrier();
  }
}

void Team::start(Job job, const void* argument) {
  job_ = job;
  argument_ = argument;
  if (!workers_.empty()) {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }
  job(argument, 0);
  barrier();
}

void Team::barrier() {
  if (workers_.empty()) return;
  const int phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads()) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_while(phase_, phase);
  }
}

}  // namespace vitkd::int8
