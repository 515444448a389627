#include "int8/reader.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "int8/float_state.h"
#include "int8/json.h"

namespace vitkd::int8 {
namespace {

static_assert(std::endian::native == std::endian::little, "as files are");

constexpr char kKey[] = "vitkd_fast.int8";
constexpr int64_t kVersion = 1;
constexpr uint64_t kMaxHeader = 1 << 23;
constexpr int kMaxText = 1024;  // characters
constexpr char kFloatModel[] = "it is a float model; make an int8 file of it with `vitkd quantize`";

[[noreturn]] void fail(const std::string& name, const std::string& expected,
                       const std::string& given) {
  throw GraphError(name + ": expected " + expected + ", got " + given);
}

template <size_t N>
std::string one_of(const std::array<const char*, N>& names) {
  std::string all;
  for (const char* name : names) all += (all.empty() ? "" : ", ") + std::string(name);
  return all;
}

template <size_t N>
size_t index_of(const std::array<const char*, N>& names, const Json& value) {
  const auto given = value.is_string() ? value.string() : std::nullopt;
  const auto is_given = [&](const char* name) { return given == name; };
  return std::find_if(names.begin(), names.end(), is_given) - names.begin();
}

bool is(const Json& key, std::string_view name) {
  const std::string_view quoted = key.raw();
  if (quoted.find('\\') != quoted.npos) return key.string() == name;
  return quoted.substr(1, quoted.size() - 2) == name;
}

// of the polynomial 0xEDB88320, four bytes at a time
uint32_t crc32(std::span<const uint8_t> bytes) {
  static constexpr auto kTables = [] {
    std::array<std::array<uint32_t, 256>, 4> tables{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
      tables[0][i] = crc;
    }
    for (int t = 1; t < 4; ++t) {
      for (int i = 0; i < 256; ++i) {
        tables[t][i] = tables[t - 1][i] >> 8 ^ tables[0][tables[t - 1][i] & 255];
      }
    }
    return tables;
  }();
  uint32_t crc = ~0u;
  size_t i = 0;
  for (; i + 4 <= bytes.size(); i += 4) {
    uint32_t four;
    std::memcpy(&four, bytes.data() + i, 4);
    crc ^= four;
    crc = kTables[3][crc & 255] ^ kTables[2][crc >> 8 & 255] ^ kTables[1][crc >> 16 & 255] ^
          kTables[0][crc >> 24];
  }
  for (; i < bytes.size(); ++i) crc = crc >> 8 ^ kTables[0][(crc ^ bytes[i]) & 255];
  return ~crc;
}

// The members of an object. Each is asked for by its key; `finish` refuses those that were not.
class Object {
 public:
  // `what` names the object in messages, and `where` stands before its members' names
  Object(const Json& json, std::string what, std::string where = "")
      : json_(json), what_(std::move(what)), where_(std::move(where)) {
    if (!json.is_object()) int8::fail(what_, "a JSON object", json.show());
  }

  bool has(const char* key) const {
    bool found = false;
    json_.each_member([&](const Json& k, const Json&) { found |= is(k, key); });
    return found;
  }

  Json get(const char* key) {
    Json found;
    json_.each_member([&](const Json& k, const Json& value) {
      if (!is(k, key)) return;
      if (!found.raw().empty()) throw GraphError("its JSON holds a key twice: " + k.show());
      found = value;
    });
    if (found.raw().empty()) throw GraphError(what_ + ": " + key + " is missing");
    known_.push_back(key);
    return found;
  }

  void finish() const {
    json_.each_member([&](const Json& k, const Json&) {
      const auto same = [&](const char* key) { return is(k, key); };
      if (std::none_of(known_.begin(), known_.end(), same)) {
        throw GraphError(what_ + ": " + k.show() + " is unknown");
      }
    });
  }

  [[noreturn]] void fail(const char* key, const std::string& expected, const Json& given) const {
    int8::fail(where_ + key, expected, given.show());
  }

  int integer(const char* key) { return integer(key, get(key)); }
  double number(const char* key) { return number(key, get(key)); }
  float single(const char* key) { return single(key, get(key)); }

  bool boolean(const char* key) {
    const Json value = get(key);
    if (!value.is_bool()) fail(key, "true or false", value);
    return value.raw() == "true";
  }

  std::string string(const char* key) { return string(key, get(key)); }

  std::string string(const char* key, const Json& value) const {
    if (const auto text = value.is_string() ? value.string() : std::nullopt) {
      const auto begins = [](char c) { return (c & 0xC0) != 0x80; };
      if (std::count_if(text->begin(), text->end(), begins) <= kMaxText) {
        return *text;
      }
    }
    fail(key, "text of up to " + std::to_string(kMaxText) + " characters", value);
  }

  template <size_t N>
  std::array<int, N> integers(const char* key) {
    return array_of<int, N>(key, [&](const Json& value) { return integer(key, value); });
  }
  template <size_t N>
  std::array<float, N> singles(const char* key) {
    return array_of<float, N>(key, [&](const Json& value) { return single(key, value); });
  }
  template <size_t N>
  std::array<double, N> numbers(const char* key) {
    return array_of<double, N>(key, [&](const Json& value) { return number(key, value); });
  }

  int integer(const char* key, const Json& value) const {
    if (!value.is_integer()) fail(key, "an integer", value);
    const auto wide = value.integer();
    if (!wide || static_cast<int>(*wide) != *wide) fail(key, "an integer of 32 bits", value);
    return static_cast<int>(*wide);
  }

 private:
  double number(const char* key, const Json& value) const {
    const auto number = value.is_number() && !value.is_integer() ? value.number() : std::nullopt;
    if (!number) fail(key, "a float", value);
    return *number;
  }

  float single(const char* key, const Json& value) const {
    const double wide = number(key, value);
    const auto narrow = static_cast<float>(wide);
    if (narrow != wide) fail(key, "a float32", value);
    return narrow;
  }

  template <class T, size_t N, class F>
  std::array<T, N> array_of(const char* key, const F& element) {
    const Json list = get(key);
    if (!list.is_list() || list.size() != N) fail(key, "a list of " + std::to_string(N), list);
    std::array<T, N> values;
    T* to = values.data();
    list.each([&](const Json& value) { *to++ = element(value); });
    return values;
  }

  const Json json_;
  const std::string what_, where_;
  std::vector<const char*> known_;
};

// The arrays of a header, which tile the section.
class Arrays {
 public:
  Arrays(const Json& header, std::span<const uint8_t> section) : section_(section) {
    header.each_member([&](const Json& key, const Json& value) {
      if (!is(key, "__metadata__")) entries_.push_back(entry(key, value));
    });
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    size_t end = 0;
    bool tiles = true;
    for (const Entry& e : entries_) {
      tiles &= e.begin == end;
      end = e.end;
    }
    if (!tiles || end != section.size()) {
      throw GraphError("its arrays leave gaps, overlap, or do not end with the file");
    }
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.name < b.name; });
    const auto same = [](const Entry& a, const Entry& b) { return a.name == b.name; };
    const auto twice = std::adjacent_find(entries_.begin(), entries_.end(), same);
    if (twice != entries_.end()) throw GraphError("its JSON holds a key twice: " + twice->shown);
  }

  template <class T>
  Array<T> take(size_t node, const char* field) {
    const std::string name = std::to_string(node) + "." + field;
    const auto before = [](const Entry& e, const std::string& wanted) { return e.name < wanted; };
    const auto found = std::lower_bound(entries_.begin(), entries_.end(), name, before);
    if (found == entries_.end() || found->name != name) {
      throw GraphError("node " + std::to_string(node) + ": array " + name + " is missing");
    }
    if (found->type != type_of(T{})) {
      fail("array " + name + ": dtype", kTypes[type_of(T{})], kTypes[found->type]);
    }
    found->taken = true;
    return {reinterpret_cast<const T*>(section_.data() + found->begin), found->shape};
  }

  void finish() const {
    for (const Entry& e : entries_) {
      if (!e.taken) throw GraphError("array " + e.shown + " belongs to no node");
    }
  }

 private:
  static constexpr std::array kTypes{"F32", "I32", "I8"};
  static size_t type_of(float) { return 0; }
  static size_t type_of(int32_t) { return 1; }
  static size_t type_of(int8_t) { return 2; }

  struct Entry {
    std::string name, shown;
    size_t type, begin, end;
    std::vector<int64_t> shape;
    bool taken = false;
  };

  Entry entry(const Json& key, const Json& value) const {
    const std::string what = "array " + key.show();
    const int64_t most = static_cast<int64_t>(section_.size());
    Object given(value, what, what + ": ");
    const Json type = given.get("dtype"), shape = given.get("shape");
    const Json offsets = given.get("data_offsets");
    given.finish();
    Entry e{key.string().value_or(""), key.show(), index_of(kTypes, type), 0, 0, {}};
    if (e.type == kTypes.size()) given.fail("dtype", one_of(kTypes), type);
    const int64_t size = e.type == 2 ? 1 : 4;
    const auto integer = [&](const char* name, const Json& n) {
      const auto value = n.is_integer() ? n.integer() : std::nullopt;
      if (!value || *value < 0 || *value > most) {
        given.fail(name, "an integer from 0 to " + std::to_string(most), n);
      }
      return *value;
    };
    if (!shape.is_list() || shape.size() < 1 || shape.size() > 4) {
      given.fail("shape", "1 to 4 numbers", shape);
    }
    int64_t bytes = size;
    shape.each([&](const Json& n) {
      e.shape.push_back(integer("shape", n));
      // past `most` it stays there
      bytes = e.shape.back() == 0             ? 0
              : bytes > most / e.shape.back() ? most + 1
                                              : bytes * e.shape.back();
    });
    if (!offsets.is_list() || offsets.size() != 2) {
      given.fail("data_offsets", "two numbers", offsets);
    }
    size_t* to = &e.begin;
    offsets.each([&](const Json& n) { *to = integer("data_offsets", n), to = &e.end; });
    if (e.end - e.begin != static_cast<size_t>(bytes) || e.begin % size != 0) {
      given.fail("data_offsets", shape.show() + " of " + kTypes[e.type] + ", aligned", offsets);
    }
    return e;
  }

  const std::span<const uint8_t> section_;
  std::vector<Entry> entries_;
};

Node read_node(const Json& json, size_t index, Arrays& arrays) {
  Node n;
  const std::string number = "node " + std::to_string(index);
  n.name = Object(json, number, number + ": ").string("name");
  const std::string where = describe(index, n.name);
  Object given(json, where.substr(0, where.size() - 2), where);
  given.get("name");
  const Json op = given.get("op");
  n.op = static_cast<Op>(index_of(kOps, op));
  if (n.op == static_cast<Op>(kOps.size())) given.fail("op", one_of(kOps), op);
  const Json inputs = given.get("inputs");
  if (!inputs.is_list() || inputs.size() > 2) given.fail("inputs", "a list of 1 or 2", inputs);
  inputs.each([&](const Json& i) { n.inputs.push_back(given.integer("inputs", i)); });
  if (n.op == Op::conv || n.op == Op::depthwise || n.op == Op::classifier) {
    n.weight = arrays.take<int8_t>(index, "weight");
    n.bias = arrays.take<int32_t>(index, "bias");
    n.multiplier = arrays.take<float>(index, "multiplier");
  }
  if (n.op != Op::classifier) {
    n.zero_point = given.integer("zero_point");
    n.lo = given.integer("lo");
    n.hi = given.integer("hi");
  }
  // a float32, or null
  const auto optional = [&](const char* key, bool* there, float* value) {
    *there = !given.get(key).is_null();
    if (*there) *value = given.single(key);
  };
  switch (n.op) {
    case Op::conv:
      optional("residual_multiplier", &n.residual, &n.residual_multiplier);
      if (given.has("fine")) n.fine = given.boolean("fine");
      [[fallthrough]];
    case Op::depthwise: {
      n.stride = given.integers<2>("stride");
      const Json padding = given.get("padding");
      n.same = padding.is_string() && padding.string() == "same";
      if (!n.same && !padding.is_list()) given.fail("padding", "\"same\" or a list of 4", padding);
      if (!n.same) n.padding = given.integers<4>("padding");
      optional("hardswish_scale", &n.hardswish, &n.hardswish_scale);
      break;
    }
    case Op::add:
      n.multipliers = given.singles<2>("multipliers");
      break;
    case Op::squeeze_excite:
      n.q1 = arrays.take<int8_t>(index, "q1"), n.q2 = arrays.take<int8_t>(index, "q2");
      n.s1 = arrays.take<float>(index, "s1"), n.b1 = arrays.take<float>(index, "b1");
      n.s2 = arrays.take<float>(index, "s2"), n.b2 = arrays.take<float>(index, "b2");
      n.hidden_hardswish = given.boolean("hidden_hardswish");
      n.scale = given.number("scale");
      n.ratio = given.single("ratio");
      break;
    case Op::pool:
      n.ratio = given.number("ratio");
      break;
    case Op::classifier:
      break;
  }
  given.finish();
  return n;
}

void read_preparation(Object& document, Model* model) {
  model->mean = document.numbers<3>("mean");
  model->std = document.numbers<3>("std");
  model->crop_pct = document.number("crop_pct");
  const auto all = [](const auto& values, auto fits) {
    return std::all_of(values.begin(), values.end(), fits);
  };
  if (!all(model->mean, [](double x) { return x >= 0 && x <= 1; })) {
    document.fail("mean", "three numbers in [0, 1]", document.get("mean"));
  }
  if (!all(model->std, [](double x) { return x > 0 && x <= 1; })) {
    document.fail("std", "three numbers in (0, 1]", document.get("std"));
  }
  if (!(model->crop_pct >= 0.1 && model->crop_pct <= 2)) {
    document.fail("crop_pct", "0.1 to 2", document.get("crop_pct"));
  }
  const Json interpolation = document.get("interpolation");
  const size_t found = index_of(kInterpolations, interpolation);
  if (found == kInterpolations.size()) {
    document.fail("interpolation", one_of(kInterpolations), interpolation);
  }
  model->interpolation = static_cast<Interpolation>(found);
  const Json classes = document.get("classes");
  if (!classes.is_list()) document.fail("classes", "a list", classes);
  classes.each(
      [&](const Json& name) { model->classes.push_back(document.string("classes", name)); });
  if (document.has("multilabel")) model->multilabel = document.boolean("multilabel");
  if (!document.has("temperature")) return;
  model->temperature = document.number("temperature");
  if (!(model->temperature >= 0.01 && model->temperature <= 100)) {
    document.fail("temperature", "0.01 to 100", document.get("temperature"));
  }
}

}  // namespace

Model read(std::span<const uint8_t> file) {
  const FloatState state;  // numbers of the JSON are rounded here
  uint64_t length = 0;
  if (file.size() >= 8) std::memcpy(&length, file.data(), 8);
  if (length == 0 || length > kMaxHeader || length > file.size() - 8 || length % 8 != 0) {
    throw GraphError("this is no safetensors file of an int8 graph: its header's length is wrong");
  }
  const auto section = file.subspan(8 + length);
  const Json header = Json::parse({reinterpret_cast<const char*>(file.data()) + 8, length});
  Object outer(header, "the header");
  if (!outer.has("__metadata__")) throw GraphError(kFloatModel);
  const Json metadata = outer.get("__metadata__");
  Object inner(metadata, "__metadata__");
  if (!inner.has(kKey)) throw GraphError(kFloatModel);
  const Json wrapped = inner.get(kKey);
  inner.finish();
  const auto text = wrapped.is_string() ? wrapped.string() : std::nullopt;
  if (!text) fail(kKey, "a string", wrapped.show());

  Object document(Json::parse(*text), kKey);
  const Json version = document.get("format");
  if (!version.is_integer() || version.integer() != kVersion) {
    document.fail("format", "1, which this version reads", version);
  }
  const Json crc = document.get("crc32");
  if (!crc.is_integer() || crc.integer() != crc32(section)) {
    throw GraphError("it is damaged: the CRC32 of its arrays differs");
  }
  Arrays arrays(header, section);
  Model model;
  model.graph.image_size = document.integer("image_size");
  model.graph.padding_bytes = document.integers<3>("padding_bytes");
  read_preparation(document, &model);
  const Json nodes = document.get("nodes");
  if (!nodes.is_list()) document.fail("nodes", "a list", nodes);
  if (const size_t count = nodes.size(); count > kMaxNodes) {
    fail("nodes", "1 to " + std::to_string(kMaxNodes), std::to_string(count));
  }
  document.finish();
  nodes.each([&](const Json& node) {
    model.graph.nodes.push_back(read_node(node, model.graph.nodes.size(), arrays));
  });
  arrays.finish();
  const int logits = check(model.graph, model.graph.image_size).back().channels;
  if (!model.classes.empty() && model.classes.size() != static_cast<size_t>(logits)) {
    fail("classes", "one for each of " + std::to_string(logits) + " logits",
         std::to_string(model.classes.size()));
  }
  return model;
}

}  // namespace vitkd::int8
