#include "int8/session.h"

#include <pthread.h>

#include "int8/executor.h"
#include "int8/thread_team.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vitkd::int8 {
namespace {

constexpr int64_t kWorthSharing = 8 << 20;  // multiply-adds of an image

#if defined(__x86_64__)
constexpr uint64_t kFloatState = 0x1F80;
uint64_t float_state() { return _mm_getcsr(); }
void set_float_state(uint64_t state) { _mm_setcsr(static_cast<unsigned>(state)); }
#elif defined(__aarch64__)
constexpr uint64_t kFloatState = 0;
uint64_t float_state() {
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr) : : "memory");
  return fpcr;
}
void set_float_state(uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr) : "memory"); }
#else
constexpr uint64_t kFloatState = 0;
uint64_t float_state() { return 0; }
void set_float_state(uint64_t) {}
#endif

// rounding to nearest, no flush to zero and no traps, whatever the calling thread is set to
class FloatState {
 public:
  FloatState() : saved_(float_state()) { set_float_state(kFloatState); }
  ~FloatState() { set_float_state(saved_); }

 private:
  uint64_t saved_;
};

// the mutex of all sessions' idle callers, and how often this process was forked
struct Forks {
  std::mutex mutex;
  int generation = 0;
};

Forks& forks() {
  static Forks* forks = [] {
    static Forks* made = new Forks;  // never destroyed: a fork may come at any time
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] {
                     ++made->generation;
                     made->mutex.unlock();
                   });
    return made;
  }();
  return *forks;
}

}  // namespace

// What one call needs for itself.
struct Session::Caller {
  explicit Caller(const Plan& plan) : team(plan.options.threads) {
    for (int i = 0; i < plan.options.threads; ++i) workspaces.emplace_back(plan);
  }

  ThreadTeam team;
  std::vector<Workspace> workspaces;  // by thread
};

// Holds a caller for the time of a call: an idle one, or a new one.
class Session::Lease {
 public:
  explicit Lease(Session& session) : session_(session) {
    {
      const std::lock_guard lock(forks().mutex);
      if (session.generation_ != forks().generation) {
        // their threads did not survive the fork: they cannot be destroyed, only leaked
        for (auto& caller : session.idle_) static_cast<void>(caller.release());
        session.idle_.clear();
        session.generation_ = forks().generation;
      }
      if (!session.idle_.empty()) {
        caller_ = std::move(session.idle_.back());
        session.idle_.pop_back();
        return;
      }
      session.idle_.reserve(++session.callers_);  // giving back allocates nothing
    }
    caller_ = std::make_unique<Caller>(session.plan_);
  }
  ~Lease() {
    const std::lock_guard lock(forks().mutex);
    session_.idle_.push_back(std::move(caller_));
  }
  Caller& operator*() { return *caller_; }

 private:
  Session& session_;
  std::unique_ptr<Caller> caller_;
};

Session::Session(const Graph& graph, const Options& options)
    : plan_([&] {
        const FloatState state;  // its constants are rounded here
        return Plan(graph, options);
      }()),
      generation_(forks().generation) {}

Session::~Session() {
  const std::lock_guard lock(forks().mutex);
  if (generation_ == forks().generation) return;
  for (auto& caller : idle_) static_cast<void>(caller.release());
}

void Session::run(const uint8_t* images, int64_t count, float* logits) {
  const int64_t size = plan_.options.image_size, image = size * size * 3;
  const int threads = plan_.options.threads;
  Lease lease(*this);
  Caller& caller = *lease;
  // barriers after every layer take longer than a few layers of a small image
  const bool small = plan_.macs < kWorthSharing && !plan_.options.poison;
  if (threads == 1 || (count < threads && small)) {
    const FloatState state;
    const Workspace& own = caller.workspaces[0];
    if (plan_.options.poison) own.poison();
    return execute(plan_, own, images, count, logits);
  }
  // equal numbers of whole images for each thread; all threads share each of the remaining ones
  const int64_t apart = count / threads * threads;
  caller.team.run([&](int thread) {
    const FloatState state;
    const Workspace& own = caller.workspaces[thread];
    if (plan_.options.poison) own.poison();
    const int64_t first = apart / threads * thread;
    execute(plan_, own, images + first * image, apart / threads, logits + first * classes());
    if (apart == count) return;
    caller.team.barrier();
    execute_together(plan_, caller.workspaces[0], own, caller.team, thread, images + apart * image,
                     count - apart, logits + apart * classes());
  });
}

std::vector<NodeProfile> Session::profile(const uint8_t* images, int64_t count, float* logits) {
  std::vector<NodeTime> times(plan_.layers.size());
  Lease lease(*this);
  const FloatState state;
  execute(plan_, (*lease).workspaces[0], images, count, logits, {&times, nullptr});
  std::vector<NodeProfile> profile;
  for (size_t s = 0; s < plan_.steps.size(); ++s) {
    for (int i = plan_.steps[s].first; i <= plan_.steps[s].last; ++i) {
      const Layer& layer = plan_.layers[i];
      const char* op = kOps[static_cast<int>(layer.node.op)];
      const char* kernel = times[i].kernel != nullptr ? times[i].kernel : op;
      profile.push_back({&layer, kernel, static_cast<int>(s), times[i].seconds});
    }
  }
  return profile;
}

std::vector<std::vector<uint8_t>> Session::activations(const uint8_t* image) {
  std::vector<std::vector<uint8_t>> activations(plan_.layers.size());
  std::vector<float> logits(classes());
  Lease lease(*this);
  const FloatState state;
  execute(plan_, (*lease).workspaces[0], image, 1, logits.data(), {nullptr, &activations});
  return activations;
}

}  // namespace vitkd::int8
