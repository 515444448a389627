// ThreadTeam under every interleaving: THREADS [LINE ORDER], which weakens the order at a line of
// thread_team.cpp, or leaves out its notify_all.
#include "interleavings.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define std model
#define bool model::Plain<bool>  // stop_
#include "int8/thread_team.cpp"
#undef bool
#undef std

using model::explorer;
using vitkd::int8::ThreadTeam;

namespace {

void program(int threads) {
  const int calls = threads == 2 ? 2 : 1;
  ThreadTeam team(threads);
  model::Plain<int> given, sum;
  std::array<model::Plain<int>, model::kThreads> parts;
  for (int call = 1; call <= calls; ++call) {
    explorer.at(10 * call + 1);
    given = call;
    team.run([&](int thread) {
      explorer.at(10 * call + 2);
      parts[thread] = given * (thread + 1);
      team.barrier();
      explorer.at(10 * call + 3);
      int all = 0;
      for (int i = 0; i < threads; ++i) all += parts[i];
      if (all != call * threads * (threads + 1) / 2)
        explorer.fail("a part that is not written yet");
      if (threads == 2) team.barrier();
      if (thread == threads - 1) sum = all;
    });
    if (sum != call * threads * (threads + 1) / 2) explorer.fail("no sum yet");
  }
}

}  // namespace

int main(int count, char** given) {
  const int threads = std::atoi(given[1]);
  if (count > 2) {
    const std::string order = given[3];
    model::weakened = {static_cast<unsigned>(std::atoi(given[2])),
                       order == "acquire"   ? std::memory_order_acquire
                       : order == "release" ? std::memory_order_release
                                            : std::memory_order_relaxed};
  }
  std::printf("%ld executions, no error\n", explorer.run([=] { program(threads); }));
}
