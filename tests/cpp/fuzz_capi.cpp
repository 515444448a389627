// Damaged int8 files through the C API: each is refused with a message, or runs, and two
// instruction sets agree. tests/int8/fuzz.py builds it under both sanitizers and feeds it:
//
//   fuzz_capi MUTATIONS < cases    each case: 4 bytes of length, and a file
//
// Of each file as many variants are made, most of them of the header: the checksum holds there.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "int8/include/vitkd_int8.h"

namespace {

constexpr size_t kMostMemory = 64 << 20;
long opened = 0, refused = 0, ran = 0;

std::vector<uint8_t> current;

[[noreturn]] void finding(const char* what) {
  std::fprintf(stderr, "fuzz_capi: %s: %s; the file is ./finding\n", what, vitkd_int8_last_error());
  if (std::FILE* file = std::fopen("finding", "wb")) {
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
  }
  std::abort();
}

std::vector<float> run(vitkd_int8_session* session, const std::vector<uint8_t>& images) {
  std::vector<float> logits(2 * static_cast<size_t>(vitkd_int8_classes(session)), -1.0f);
  if (vitkd_int8_run(session, images.data(), 2, logits.data()) != VITKD_INT8_OK) finding("run");
  return logits;
}

void use(vitkd_int8_session* session, const std::vector<uint8_t>& file, std::mt19937& random) {
  const auto size = static_cast<size_t>(vitkd_int8_image_size(session));
  for (const int i : {-1, 0, vitkd_int8_classes(session) - 1, vitkd_int8_classes(session)}) {
    vitkd_int8_class_name(session, i);
  }
  if (vitkd_int8_run_bytes(session) > kMostMemory) return;
  std::vector<uint8_t> images(2 * size * size * 3);
  for (uint8_t& byte : images) byte = static_cast<uint8_t>(random());
  // one image is made of a picture of another size
  const size_t height = 1 + random() % 40, width = 1 + random() % 40;
  std::vector<uint8_t> picture(height * width * 3);
  for (uint8_t& byte : picture) byte = static_cast<uint8_t>(random());
  const auto row = static_cast<ptrdiff_t>(3 * width);
  vitkd_int8_prepare(session, picture.data(), height, width, row, images.data());

  const vitkd_int8_options options = {static_cast<int>(1 + random() % 2), 0,
                                      vitkd_int8_isa_at(random() % 2)};
  vitkd_int8_session* other = nullptr;
  if (vitkd_int8_open_memory(file.data(), file.size(), &options, &other) != VITKD_INT8_OK) {
    finding("the same file, once more");
  }
  const std::vector<float> a = run(session, images), b = run(other, images);
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0) finding("two sets differ");
  vitkd_int8_close(other);
  ++ran;
}

// the header's bytes changed, or a few of all
std::vector<uint8_t> mutated(std::vector<uint8_t> file, std::mt19937& random) {
  uint64_t length = 0;
  if (file.size() > 16) std::memcpy(&length, file.data(), 8);
  if (length == 0 || length > file.size() - 8) return file;
  const std::vector<uint8_t> section(file.begin() + 8 + static_cast<ptrdiff_t>(length), file.end());
  std::string header(file.begin() + 8, file.begin() + 8 + static_cast<ptrdiff_t>(length));
  static const char* const kTokens[] = {"[",  "]",   "{",     "}",      ",",       ":",   "\\\"",
                                        "-1", "0",   "1e9",   "1e-400", "null",    "256", "\\ud800",
                                        "1",  "255", "65537", "true",   "\\u00e9", "2.5", "4096"};
  for (auto changes = 1 + random() % 3; changes > 0 && !header.empty(); --changes) {
    const size_t at = random() % header.size(), count = random() % 12;
    switch (random() % 6) {
      case 0:
        header[at] = static_cast<char>(random());
        break;
      case 1:
        header.erase(at, count);
        break;
      case 2:
        header.insert(at, kTokens[random() % std::size(kTokens)]);
        break;
      case 3:
        header.replace(at, count, kTokens[random() % std::size(kTokens)]);
        break;
      case 4:
        header.insert(at, header.substr(random() % header.size(), 4 * count));
        break;
      default:  // a digit
        if (const size_t digit = header.find_first_of("0123456789", at); digit != header.npos) {
          header[digit] = static_cast<char>('0' + random() % 10);
        }
    }
  }
  header.resize((header.size() + 7) / 8 * 8, ' ');
  length = header.size();
  file.assign(8, 0);
  std::memcpy(file.data(), &length, 8);
  file.insert(file.end(), header.begin(), header.end());
  file.insert(file.end(), section.begin(), section.end());
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  current.assign(data, data + size);
  std::mt19937 random(static_cast<unsigned>(size));
  // memory of just that size, at any alignment
  const size_t shift = random() % 9;
  std::vector<uint8_t> memory(size + shift);
  if (size > 0) std::memcpy(memory.data() + shift, data, size);
  vitkd_int8_session* session = nullptr;
  const vitkd_int8_status status =
      vitkd_int8_open_memory(memory.data() + shift, size, nullptr, &session);
  if ((status == VITKD_INT8_OK) != (session != nullptr)) finding("status and session disagree");
  if (status == VITKD_INT8_OK) {
    ++opened;
    use(session, {data, data + size}, random);
  } else {
    ++refused;
    const char* message = vitkd_int8_last_error();
    if (status != VITKD_INT8_FORMAT || *message == '\0') finding("refused without a reason");
    if (std::strchr(message, '\n') != nullptr) finding("a message of several lines");
  }
  vitkd_int8_close(session);
  return 0;
}

#ifndef VITKD_LIBFUZZER
int main(int argc, char** argv) {
  const int mutations = argc > 1 ? std::atoi(argv[1]) : 0;
  std::mt19937 random(0);
  uint32_t length = 0;
  while (std::fread(&length, 1, 4, stdin) == 4) {
    std::vector<uint8_t> file(length);
    if (std::fread(file.data(), 1, length, stdin) != length) return 2;
    LLVMFuzzerTestOneInput(file.data(), file.size());
    for (int i = 0; i < mutations; ++i) {
      const std::vector<uint8_t> variant = mutated(file, random);
      LLVMFuzzerTestOneInput(variant.data(), variant.size());
    }
  }
  std::printf("fuzz_capi: %ld opened, %ld run, %ld refused, no finding\n", opened, ran, refused);
}
#endif
