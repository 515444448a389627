// The threads of one call: the caller and those that wait for it. They run the same function side
// by side and meet at barriers. A thread that waits spins first, and then sleeps.
//
// What a thread has written before a barrier, or the caller before `run`, all read after it, on
// machines that reorder memory, too: tests/int8/test_thread_team.py tries every interleaving that
// C++ allows, and finds an error as soon as an order is weaker.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace vitkd::int8 {

class ThreadTeam {
 public:
  explicit ThreadTeam(int threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // f(0) here, f(1), f(2), ... in the workers; returns when all have
  template <class F>
  void run(const F& f) {
    start([](const void* f, int thread) { (*static_cast<const F*>(f))(thread); }, &f);
  }
  // returns when all threads of `run` have come here
  void barrier();

 private:
  using Job = void (*)(const void*, int);

  void start(Job job, const void* argument);
  void work(int index);
  void stop();

  std::vector<std::thread> workers_;
  Job job_ = nullptr;
  const void* argument_ = nullptr;
  alignas(64) std::atomic<int> round_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  bool stop_ = false;
};

}  // namespace vitkd::int8
