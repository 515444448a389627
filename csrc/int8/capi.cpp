// The C API: each function is one call of a session, behind a wall that no exception passes.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "int8/include/vitkd_int8.h"
#include "int8/reader.h"
#include "int8/session.h"

using namespace vitkd;
using namespace vitkd::int8;

struct vitkd_int8_session {
  vitkd_int8_session(Model m, const Options& options, const std::function<void()>& arrays_read)
      : engine(m.graph, options, arrays_read),
        preprocessing{options.image_size, m.crop_pct, m.interpolation},
        classes(std::move(m.classes)) {}

  Session engine;
  const Preprocessing preprocessing;
  const std::vector<std::string> classes;
};

namespace {

constexpr off_t kMaxFile = off_t{1} << 30;

thread_local char last_error[1024];

vitkd_int8_status failed(vitkd_int8_status status, const char* message) {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

struct IoError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class F>
vitkd_int8_status guarded(const F& f) noexcept {
  try {
    f();
    return VITKD_INT8_OK;
  } catch (const GraphError& error) {
    return failed(VITKD_INT8_FORMAT, error.what());
  } catch (const std::invalid_argument& error) {
    return failed(VITKD_INT8_ARGUMENT, error.what());
  } catch (const IoError& error) {
    return failed(VITKD_INT8_IO, error.what());
  } catch (const std::bad_alloc&) {
    return failed(VITKD_INT8_RESOURCE, "out of memory");
  } catch (const std::system_error& error) {
    return failed(VITKD_INT8_RESOURCE, error.what());
  } catch (const std::runtime_error& error) {  // of VITKD_FAST_ISA
    return failed(VITKD_INT8_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return failed(VITKD_INT8_INTERNAL, error.what());
  } catch (...) {
    return failed(VITKD_INT8_INTERNAL, "an unknown exception");
  }
}

void not_null(const char* name, const void* pointer) {
  if (pointer == nullptr) {
    throw std::invalid_argument(std::string(name) + ": expected a pointer, got NULL");
  }
}

// Whole files of bounded size: a mapping would fail with SIGBUS where the file is cut short.
Buffer contents(const char* path) {
  const auto fail = [&](const std::string& why) { throw IoError(path + (": " + why)); };
  struct File {
    const int descriptor;
    ~File() { close(descriptor); }
  };
  const File file{open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};  // a pipe's would wait
  struct stat status{};
  if (file.descriptor < 0 || fstat(file.descriptor, &status) != 0) fail(std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail("expected a regular file");
  if (status.st_size > kMaxFile) {
    throw GraphError(path + (": expected up to " + std::to_string(kMaxFile)) + " bytes, got " +
                     std::to_string(status.st_size));
  }
  Buffer bytes(status.st_size);
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t count = ::read(file.descriptor, bytes.data() + at, bytes.size() - at);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(std::strerror(errno));
    if (count == 0) fail("it became shorter while it was read");
    at += count;
  }
  return bytes;
}

// `own` is freed as soon as it has been read.
vitkd_int8_session* open_session(std::span<const uint8_t> bytes, Buffer* own, const char* path,
                                 const vitkd_int8_options* given) {
  Model model;
  try {
    model = int8::read(bytes);
  } catch (const GraphError& error) {
    throw GraphError((path == nullptr ? "" : path + std::string(": ")) + error.what());
  }
  constexpr vitkd_int8_options kDefaults{0, 0, nullptr};
  const vitkd_int8_options& wanted = given == nullptr ? kDefaults : *given;
  Options options;
  options.image_size = wanted.image_size == 0 ? model.graph.image_size : wanted.image_size;
  options.threads = wanted.threads == 0 ? 1 : wanted.threads;
  options.isa = isa_of(wanted.isa == nullptr ? "" : wanted.isa);
  try {
    return new vitkd_int8_session(std::move(model), options, [&] { *own = Buffer(); });
  } catch (const GraphError& error) {  // the file is right
    throw std::invalid_argument("image_size " + std::to_string(options.image_size) + ": " +
                                error.what());
  }
}

}  // namespace

extern "C" {

vitkd_int8_status vitkd_int8_open(const char* path, const vitkd_int8_options* options,
                                  vitkd_int8_session** session) {
  if (session != nullptr) *session = nullptr;
  return guarded([&] {
    not_null("session", session);
    not_null("path", path);
    Buffer bytes = contents(path);
    *session = open_session({bytes.data(), bytes.size()}, &bytes, path, options);
  });
}

vitkd_int8_status vitkd_int8_open_memory(const void* data, size_t size,
                                         const vitkd_int8_options* options,
                                         vitkd_int8_session** session) {
  if (session != nullptr) *session = nullptr;
  return guarded([&] {
    not_null("session", session);
    not_null("data", data);
    const auto* bytes = static_cast<const uint8_t*>(data);
    Buffer aligned;
    if (reinterpret_cast<uintptr_t>(data) % 8 != 0) {
      aligned = Buffer(size);
      std::memcpy(aligned.data(), data, size);
      bytes = aligned.data();
    }
    *session = open_session({bytes, size}, &aligned, nullptr, options);
  });
}

void vitkd_int8_close(vitkd_int8_session* session) { delete session; }

vitkd_int8_status vitkd_int8_prepare(const vitkd_int8_session* session, const uint8_t* pixels,
                                     size_t height, size_t width, ptrdiff_t stride,
                                     uint8_t* image) {
  return guarded([&] {
    not_null("session", session);
    not_null("pixels", pixels);
    not_null("image", image);
    prepare(pixels, static_cast<int64_t>(height), static_cast<int64_t>(width), stride,
            session->preprocessing, session->engine.plan().with.isa, image);
  });
}

vitkd_int8_status vitkd_int8_run(vitkd_int8_session* session, const uint8_t* images, size_t count,
                                 float* logits) {
  return guarded([&] {
    not_null("session", session);
    if (count == 0) return;
    not_null("images", images);
    not_null("logits", logits);
    session->engine.run(images, static_cast<int64_t>(count), logits);
  });
}

const char* vitkd_int8_last_error(void) { return last_error; }

int vitkd_int8_image_size(const vitkd_int8_session* session) {
  return session->engine.plan().options.image_size;
}

int vitkd_int8_classes(const vitkd_int8_session* session) { return session->engine.classes(); }

int vitkd_int8_threads(const vitkd_int8_session* session) {
  return session->engine.plan().options.threads;
}

const char* vitkd_int8_input_layout(const vitkd_int8_session*) { return "u8 NHWC RGB"; }

const char* vitkd_int8_isa(const vitkd_int8_session* session) {
  return name(session->engine.plan().with.isa);
}

const char* vitkd_int8_class_name(const vitkd_int8_session* session, int index) {
  const auto& names = session->classes;
  const bool there = index >= 0 && static_cast<size_t>(index) < names.size();
  return there ? names[index].c_str() : nullptr;
}

size_t vitkd_int8_weight_bytes(const vitkd_int8_session* session) {
  return session->engine.plan().weights;
}

size_t vitkd_int8_run_bytes(const vitkd_int8_session* session) {
  return session->engine.run_bytes();
}

const char* vitkd_int8_isa_at(int index) {
  const char* found = nullptr;
  guarded([&] {
    const std::vector<Isa> isas = available_isas();
    if (index >= 0 && static_cast<size_t>(index) < isas.size()) found = name(isas[index]);
  });
  return found;
}

const char* vitkd_int8_version(void) { return VITKD_INT8_VERSION; }

}  // extern "C"
