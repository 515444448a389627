#include "int8/json.h"

#include <locale.h>
#include <stdlib.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "int8/graph.h"

#if defined(__APPLE__)
#include <xlocale.h>
#endif

namespace vitkd::int8 {
namespace {

constexpr int kDeepest = 64;

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

int hex_digit(char c) {
  if (is_digit(c)) return c - '0';
  const char lower = static_cast<char>(c | 0x20);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

// RFC 8259, with a limit of depth.
class Checker {
 public:
  explicit Checker(std::string_view text) : text_(text) {}

  // returns the value, without the space around it
  std::string_view run() {
    space();
    const size_t begin = at_;
    value(0);
    const std::string_view all = text_.substr(begin, at_ - begin);
    space();
    if (at_ != text_.size()) fail("something follows its end");
    return all;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw GraphError("its JSON cannot be read: " + why + " at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char c) { return peek() == c && at_ < text_.size() ? (++at_, true) : false; }
  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  void space() {
    while (is_space(peek())) ++at_;
  }

  void value(int depth) {
    space();
    if (depth > kDeepest) fail("it is nested too deeply");
    if (take('{') || take('[')) {
      const bool object = text_[at_ - 1] == '{';
      const char close = object ? '}' : ']';
      space();
      if (take(close)) return;
      do {
        space();
        if (object) {
          if (!take('"')) fail("expected a key");
          string();
          space();
          if (!take(':')) fail("expected ':'");
        }
        value(depth + 1);
        space();
      } while (take(','));
      if (!take(close)) fail(object ? "expected ',' or '}'" : "expected ',' or ']'");
      return;
    }
    if (take('"')) return string();
    if (take("true") || take("false") || take("null")) return;
    for (const char* word : {"NaN", "Infinity", "-Infinity"}) {
      if (take(std::string_view(word))) throw GraphError(std::string("its JSON holds ") + word);
    }
    number();
  }

  void digits() {
    if (!is_digit(peek())) fail("expected a value");
    while (is_digit(peek())) ++at_;
  }

  void number() {
    take('-');
    if (!take('0')) digits();
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
  }

  void string() {
    while (!take('"')) {
      if (take('\\')) {
        if (take('u')) {
          for (int i = 0; i < 4; ++i, ++at_) {
            if (hex_digit(peek()) < 0) fail("expected four hexadecimal digits");
          }
        } else if (std::string_view("\"\\/bfnrt").find(peek()) == std::string_view::npos) {
          fail("unknown escape");
        } else {
          ++at_;
        }
      } else {
        character();
      }
    }
  }

  // of UTF-8: no control characters, overlong forms, surrogates or anything past U+10FFFF
  void character() {
    const auto first = static_cast<uint8_t>(peek());
    if (first < 0x20) fail("a string does not end, or holds a control character");
    ++at_;
    if (first < 0x80) return;
    const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    uint32_t code = first & (0x3F >> more);
    for (int i = 0; i < more; ++i, ++at_) {
      const auto next = static_cast<uint8_t>(peek());
      if (next >> 6 != 2) fail("it is not UTF-8");
      code = code << 6 | (next & 0x3F);
    }
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    if (first < 0xC2 || first > 0xF4 || code < kLeast[more] || surrogate || code > 0x10FFFF) {
      fail("it is not UTF-8");
    }
  }

  const std::string_view text_;
  size_t at_ = 0;
};

// where the value that begins at `at` ends
const char* end_of(const char* at) {
  int depth = 0;
  do {
    switch (*at++) {
      case '{':
      case '[':
        ++depth;
        break;
      case '}':
      case ']':
        --depth;
        break;
      case '"':
        for (; *at != '"'; ++at) at += *at == '\\';
        ++at;
        break;
      default:
        // of a number or a word; commas, colons and space lie between values
        while (is_digit(*at) || (*at >= 'a' && *at <= 'z') || *at == '.' || *at == '+' ||
               *at == '-' || *at == 'E') {
          ++at;
        }
    }
  } while (depth > 0);
  return at;
}

void append_utf8(uint32_t code, std::string* to) {
  if (code < 0x80) {
    *to += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  *to += static_cast<char>(0xF0 << (3 - more) | code >> 6 * more);
  for (int i = more - 1; i >= 0; --i) *to += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
}

uint32_t hex4(const char* digits) {
  uint32_t code = 0;
  for (int i = 0; i < 4; ++i) code = code << 4 | static_cast<uint32_t>(hex_digit(digits[i]));
  return code;
}

}  // namespace

Json Json::parse(std::string_view text) {
  Json all;
  all.raw_ = Checker(text).run();
  return all;
}

std::string Json::show() const {
  if (is_integer() && !integer()) return "an integer of more than 64 bits";
  // without a string's quotes
  std::string text(is_string() ? raw_.substr(1, std::min<size_t>(raw_.size() - 2, 81))
                               : raw_.substr(0, 81));
  for (char& c : text) c = c >= ' ' && c <= '~' ? c : '?';
  if (text.size() > 80) text.replace(77, text.npos, "...");
  return text;
}

std::optional<int64_t> Json::integer() const {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(raw_.data(), raw_.data() + raw_.size(), value);
  return error == std::errc() ? std::optional(value) : std::nullopt;
}

std::optional<double> Json::number() const {
  // std::from_chars of a double takes 24 KB, and strtod the locale's decimal point
  static const locale_t c = newlocale(LC_ALL_MASK, "C", nullptr);
  const double value = strtod_l(std::string(raw_).c_str(), nullptr, c);
  return std::isfinite(value) ? std::optional(value) : std::nullopt;
}

std::optional<std::string> Json::string() const {
  std::string text;
  text.reserve(raw_.size());
  for (const char* at = raw_.data() + 1; *at != '"'; ++at) {
    if (*at != '\\') {
      text += *at;
      continue;
    }
    switch (*++at) {
      case 'b':
        text += '\b';
        break;
      case 'f':
        text += '\f';
        break;
      case 'n':
        text += '\n';
        break;
      case 'r':
        text += '\r';
        break;
      case 't':
        text += '\t';
        break;
      case 'u': {
        uint32_t code = hex4(at + 1);
        at += 4;
        if (code >= 0xD800 && code < 0xE000) {
          const bool pair = code < 0xDC00 && at[1] == '\\' && at[2] == 'u';
          const uint32_t low = pair ? hex4(at + 3) : 0;
          if (low < 0xDC00 || low > 0xDFFF) return std::nullopt;
          code = 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF));
          at += 6;
        }
        append_utf8(code, &text);
        break;
      }
      default:
        text += *at;
    }
  }
  return text;
}

size_t Json::size() const {
  size_t count = 0;
  if (is_object()) {
    each_member([&](const Json&, const Json&) { ++count; });
  } else {
    each([&](const Json&) { ++count; });
  }
  return count;
}

const char* Json::next(const char* at, Json* key, Json* value) {
  const auto take = [&](Json* json) {
    while (is_space(*at) || *at == ',' || *at == ':') ++at;
    if (*at == '}' || *at == ']') return false;
    const char* end = end_of(at);
    json->raw_ = {at, static_cast<size_t>(end - at)};
    at = end;
    return true;
  };
  if (key != nullptr && !take(key)) return nullptr;
  return take(value) ? at : nullptr;
}

}  // namespace vitkd::int8
