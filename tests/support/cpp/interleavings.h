// Runs threads in every order, and lets their atomic<int> read every value, that C++ allows.
//
// After `#define std model`, code that is included takes its atomics and threads from here. An
// execution is a sequence of choices: which thread goes on, which of the stores that coherence
// permits a load reads, and where in the modification order a store lies. All are tried, depth
// first; an execution ends early in a state that another one has reached. Plain<T> is memory
// without atomics: two accesses that are not ordered by what was released and acquired are an
// error, and so is an execution in which no thread can go on. Not modelled: fences, seq_cst, and
// cycles of program order and reads-from (load buffering).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

namespace model {

using namespace std;  // but for what is defined here

constexpr int kThreads = 4, kLocations = 3;

// One order of the program to weaken, or one call of notify_all to leave out, by its line.
struct Weakened {
  unsigned line = 0;
  memory_order order = memory_order_relaxed;
};
inline Weakened weakened;

using Clock = array<int, kThreads>;  // what happened before: each thread's part up to a store of it
struct View {                        // the last store of each location that a thread knows of
  array<int, kLocations> store{};
};
struct Store {
  int id, value;          // the id: the thread, and which of its stores
  bool replaced = false;  // by a read-modify-write: nothing comes between the two
  Clock clock{};          // what it releases
  View view{};
};

struct Thread {
  ucontext_t context;
  function<void()> body;
  function<bool()> ready;
  Clock clock{};
  View view{};
  uint64_t history = 0;             // of what it has read and chosen since `at`
  pair<unsigned, int> read{0, -1};  // line and location of a load, if it has done nothing since
  enum { undecided, spins, gives_up } patience = undecided;
  int sleeps_on = -1;
  bool started = false, finished = false;

  void forget_reading() { read = {0, -1}, patience = undecided; }
};

class Explorer {
 public:
  // returns the number of executions, or ends the process where one goes wrong
  long run(const function<void()>& program) {
    long executions = 0;
    do {
      execute(program);
      ++executions;
      while (!path_.empty() && path_.back().first + 1 == path_.back().second) path_.pop_back();
      if (!path_.empty()) ++path_.back().first;
    } while (!path_.empty());
    return executions;
  }

  [[noreturn]] void fail(const string& what) {
    for (const Event& e : trace_) {
      printf("  thread %d, line %u: %s %d\n", e.thread, e.line, e.what, e.value);
    }
    printf("error: %s\n", what.c_str());
    exit(1);
  }

  // of `n` ways to go on
  int choose(int n) {
    if (n == 1) return 0;
    if (at_ == path_.size()) path_.emplace_back(0, n);
    return path_[at_++].first;
  }

  Thread& self() { return threads_[current_]; }
  int index() const { return current_; }
  Thread& thread(int i) { return threads_[i]; }
  vector<Store>& stores(int location) { return stores_[location]; }

  int add_thread(function<void()> body) {
    if (count_ == kThreads) fail("too many threads");
    Thread& made = threads_[count_];
    made = {};
    made.body = move(body);
    made.ready = [] { return true; };
    if (count_ > 0) {
      made.clock = self().clock, made.view = self().view;
      ++self().clock[current_];
    }
    made.clock[count_] = 1;
    return count_++;
  }

  void add_plain(const Clock& writes, const Clock& reads) {
    plain_.push_back(&writes);
    plain_.push_back(&reads);
  }

  int add_location(int value) {
    if (locations_ == kLocations) fail("too many atomics");
    stores_[locations_] = {Store{.id = 0, .value = value}};
    return locations_++;
  }

  // lets others go on, and returns when this one does
  void step(function<bool()> ready) {
    Thread& t = self();
    t.ready = move(ready);
    swapcontext(&t.context, &scheduler_);
    t.history = mix(t.history, 1);
  }

  // what this thread does from here on depends on nothing but `place`
  void at(uint64_t place) {
    self().history = place;
    self().forget_reading();
  }

  void note(const char* what, int location, const Store& store, unsigned line) {
    Thread& t = self();
    t.history = mix(mix(mix(t.history, location), store.value), line);
    trace_.push_back({current_, line, what, store.value});
  }

  int position(int location, int id) const {
    const auto& all = stores_[location];
    return static_cast<int>(find_if(all.begin(), all.end(), [&](auto& s) { return s.id == id; }) -
                            all.begin());
  }

  // `to` (a thread, or a store) then comes after what comes before `from`
  template <class To, class From>
  void join(To& to, const From& from) const {
    for (int i = 0; i < kThreads; ++i) to.clock[i] = max(to.clock[i], from.clock[i]);
    for (int l = 0; l < locations_; ++l) {
      int& known = to.view.store[l];
      if (position(l, from.view.store[l]) > position(l, known)) known = from.view.store[l];
    }
  }

  static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
  }

 private:
  void execute(const function<void()>& program) {
    at_ = count_ = locations_ = 0;
    trace_.clear();
    plain_.clear();
    add_thread(program);
    for (;;) {
      array<int, kThreads> able;
      int n = 0, finished = 0;
      for (int i = 0; i < count_; ++i) {
        finished += threads_[i].finished;
        if (!threads_[i].finished && threads_[i].ready()) able[n++] = i;
      }
      if (finished == count_) return;
      if (at_ == path_.size() && !seen_.insert(state()).second) return;
      if (n == 0) fail("no thread can go on");
      current_ = able[choose(n)];
      Thread& t = self();
      if (!t.started) {
        t.started = true;
        t.history = 1;
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = stacks_[current_].data();
        t.context.uc_stack.ss_size = stacks_[current_].size();
        t.context.uc_link = &scheduler_;
        makecontext(&t.context, &begin, 0);
      }
      swapcontext(&scheduler_, &t.context);
    }
  }

  static void begin();

  uint64_t state() const {
    // stores that no thread can read any more do not count
    array<int, kLocations> first{};
    const auto known = [&](int l, const View& view) { return position(l, view.store[l]); };
    for (int l = 0; l < locations_; ++l) {
      first[l] = known(l, threads_[0].view);
      for (int i = 1; i < count_; ++i) first[l] = min(first[l], known(l, threads_[i].view));
    }
    uint64_t hash = count_;
    const auto add = [&](const Clock& clock, const View& view) {
      for (int i = 0; i < count_; ++i) hash = mix(hash, clock[i]);
      for (int l = 0; l < locations_; ++l) {
        hash = mix(hash, stores_[l][max(first[l], known(l, view))].id);
      }
    };
    for (int i = 0; i < count_; ++i) {
      const Thread& t = threads_[i];
      hash = mix(mix(hash, t.history), t.sleeps_on * 2 + t.finished);
      add(t.clock, t.view);
    }
    for (int l = 0; l < locations_; ++l) {
      for (size_t i = first[l]; i < stores_[l].size(); ++i) {
        const Store& store = stores_[l][i];
        hash = mix(mix(hash, store.id), store.value * 2 + store.replaced);
        add(store.clock, store.view);
      }
    }
    for (const Clock* accesses : plain_) {
      for (int i = 0; i < count_; ++i) hash = mix(hash, (*accesses)[i]);
    }
    return hash;
  }

  vector<pair<int, int>> path_;  // the choice, and of how many
  size_t at_ = 0;
  unordered_set<uint64_t> seen_;
  array<Thread, kThreads> threads_;
  // what an execution that ends early leaves on them is lost
  array<array<char, 1 << 16>, kThreads> stacks_;
  array<vector<Store>, kLocations> stores_;
  int count_ = 0, locations_ = 0, current_ = 0;
  ucontext_t scheduler_;
  vector<const Clock*> plain_;
  struct Event {
    int thread;
    unsigned line;
    const char* what;
    int value;
  };
  vector<Event> trace_;
};
inline Explorer explorer;

inline void Explorer::begin() {
  Thread& t = explorer.self();
  t.body();
  t.finished = true;
}

template <class T>
class atomic;

template <>
class atomic<int> {
 public:
  using where = source_location;

  atomic(int value) : location_(explorer.add_location(value)) {}

  int load(memory_order order, where at = where::current()) const {
    Thread& t = explorer.self();
    const vector<Store>& stores = explorer.stores(location_);
    const auto place = [&] { return explorer.position(location_, t.view.store[location_]); };
    const bool again = t.read == pair{at.line(), location_};
    if (again && t.patience == Thread::undecided) {
      // spins until there is something new, or reads the same until it does something else
      t.patience = explorer.choose(2) == 0 ? Thread::spins : Thread::gives_up;
      t.history = Explorer::mix(t.history, t.patience);
    }
    if (t.patience == Thread::gives_up && t.read.second == location_) return stores[place()].value;
    explorer.step([&, again] { return place() + again < static_cast<int>(stores.size()); });
    const int first = place() + again;
    const int n = static_cast<int>(stores.size()) - first;
    const Store store = stores[first + explorer.choose(n)];
    observe(store, weaken(order, at));
    explorer.note("loads", location_, store, at.line());
    t.read = {at.line(), location_}, t.patience = Thread::undecided;
    return store.value;
  }

  void store(int value, memory_order order, where at = where::current()) {
    begin_change();
    insert(choose_place(), {.id = new_id(), .value = value}, weaken(order, at), "stores", at);
  }

  int fetch_add(int value, memory_order order, where at = where::current()) {
    begin_change();
    order = weaken(order, at);
    const int place = choose_place();
    Store& old = explorer.stores(location_)[place];
    old.replaced = true;
    observe(old, order);
    // it continues the release sequence of what it replaces
    Store made = old;
    made.id = new_id(), made.value += value, made.replaced = false;
    insert(place, made, order, "makes it", at);
    return made.value - value;
  }

  void wait(int old, memory_order order, where at = where::current()) const {
    while (load(order, at) == old) {
      Thread& t = explorer.self();
      explorer.step([] { return true; });
      // the system compares with what is in memory, and sleeps, as one step
      const Store& last = explorer.stores(location_).back();
      explorer.note("sleeps if it is", location_, last, at.line());
      if (last.value == old) {
        t.sleeps_on = location_;
        explorer.step([&t] { return t.sleeps_on < 0; });
      }
      t.patience = Thread::spins;  // which ends as soon as what is there is known here
      t.read = {at.line(), location_};
    }
  }

  void notify_all(where at = where::current()) {
    if (at.line() == weakened.line) return;
    explorer.note("notifies", location_, explorer.stores(location_).back(), at.line());
    for (int i = 0; i < kThreads; ++i) {
      if (explorer.thread(i).sleeps_on == location_) explorer.thread(i).sleeps_on = -1;
    }
  }

 private:
  static memory_order weaken(memory_order order, where at) {
    return at.line() == weakened.line ? weakened.order : order;
  }
  static bool acquires(memory_order o) {
    return o == memory_order_acquire || o == memory_order_acq_rel;
  }
  static bool releases(memory_order o) {
    return o == memory_order_release || o == memory_order_acq_rel;
  }

  int known() const { return explorer.self().view.store[location_]; }
  static int new_id() { return explorer.index() * 1000 + explorer.self().clock[explorer.index()]; }

  static void begin_change() {
    explorer.self().forget_reading();
    explorer.step([] { return true; });
  }

  // in the modification order, behind what this thread knows of
  int choose_place() const {
    const vector<Store>& stores = explorer.stores(location_);
    vector<int> places;
    for (int i = explorer.position(location_, known()); i < static_cast<int>(stores.size()); ++i) {
      if (!stores[i].replaced) places.push_back(i);
    }
    return places[explorer.choose(static_cast<int>(places.size()))];
  }

  void observe(const Store& store, memory_order order) const {
    explorer.self().view.store[location_] = store.id;
    if (acquires(order)) explorer.join(explorer.self(), store);
  }

  void insert(int place, const Store& made, memory_order order, const char* what, where at) {
    vector<Store>& stores = explorer.stores(location_);
    Store& store = *stores.insert(stores.begin() + place + 1, made);
    Thread& t = explorer.self();
    t.view.store[location_] = store.id;
    if (releases(order)) explorer.join(store, t);
    ++t.clock[explorer.index()];
    explorer.note(what, location_, store, at.line());
  }

  int location_;
};

class thread {
 public:
  template <class F>
  explicit thread(F f) : index_(explorer.add_thread(move(f))) {}

  void join() {
    explorer.self().forget_reading();
    const Thread& other = explorer.thread(index_);
    explorer.step([&other] { return other.finished; });
    explorer.join(explorer.self(), other);
  }

 private:
  int index_;
};

namespace this_thread {
inline void yield() {}
}  // namespace this_thread

namespace chrono {
using namespace std::chrono;
struct steady_clock {  // so late that nobody spins for long
  using duration = std::chrono::seconds;
  using time_point = std::chrono::time_point<steady_clock, duration>;
  static time_point now() {
    static int seconds = 0;
    return time_point(duration(++seconds % 1000000));
  }
};
}  // namespace chrono

// Memory that is not atomic.
template <class T>
class Plain {
 public:
  explicit(false) Plain(T value = {}) : value_(value) { explorer.add_plain(writes_, reads_); }
  Plain(const Plain&) = delete;

  void operator=(T value) {
    check(writes_, "write and write");
    check(reads_, "read and write");
    writes_[explorer.index()] = now();
    value_ = value;
  }
  operator T() {
    check(writes_, "write and read");
    reads_[explorer.index()] = now();
    return value_;
  }

 private:
  static int now() { return explorer.self().clock[explorer.index()]; }

  static void check(const Clock& others, const char* what) {
    for (int i = 0; i < kThreads; ++i) {
      if (others[i] > explorer.self().clock[i]) {
        explorer.fail(string("a data race, ") + what + ": threads " + to_string(i) + " and " +
                      to_string(explorer.index()));
      }
    }
  }

  T value_;
  Clock writes_{}, reads_{};  // each thread's last
};

}  // namespace model
