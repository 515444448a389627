// JSON as a view of its text. `parse` checks all of it; every other function relies on that.
// Nothing is allocated but the text of strings that are asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace vitkd::int8 {

class Json {
 public:
  // Throws GraphError: not JSON in UTF-8, NaN or infinity, or nested deeper than 64.
  static Json parse(std::string_view text);

  std::string_view raw() const { return raw_; }
  // short and printable, for messages
  std::string show() const;

  bool is_object() const { return raw_[0] == '{'; }
  bool is_list() const { return raw_[0] == '['; }
  bool is_string() const { return raw_[0] == '"'; }
  bool is_null() const { return raw_[0] == 'n'; }
  bool is_bool() const { return raw_[0] == 't' || raw_[0] == 'f'; }
  bool is_number() const { return raw_[0] == '-' || (raw_[0] >= '0' && raw_[0] <= '9'); }
  bool is_integer() const { return is_number() && raw_.find_first_of(".eE") == raw_.npos; }

  std::optional<int64_t> integer() const;     // none: more than 64 bits
  std::optional<double> number() const;       // none: out of a double's range
  std::optional<std::string> string() const;  // UTF-8; none: half of a surrogate pair

  size_t size() const;  // of a list or an object
  // f(Json) for each value of a list
  template <class F>
  void each(const F& f) const {
    for (const char* at = raw_.data() + 1; at != nullptr;) {
      Json value;
      if ((at = next(at, nullptr, &value)) != nullptr) f(value);
    }
  }
  // f(Json key, Json value) for each member of an object
  template <class F>
  void each_member(const F& f) const {
    for (const char* at = raw_.data() + 1; at != nullptr;) {
      Json key, value;
      if ((at = next(at, &key, &value)) != nullptr) f(key, value);
    }
  }

 private:
  // The value at `at`, and behind its key where one is asked for; returns where the next one may
  // be, or null at the end of the list or object.
  static const char* next(const char* at, Json* key, Json* value);

  std::string_view raw_;
};

}  // namespace vitkd::int8
