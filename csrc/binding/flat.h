// An operation that takes a struct of options, as the dispatcher calls it, with one argument each:
//   R f(const Options&, const Tensor&...)  ->  R f(const Tensor&..., fields of Options...)
// Options names its fields' types, in the schema's order: using Fields = std::tuple<...>.
#pragma once

#include <tuple>
#include <utility>

namespace vitkd {

template <auto kOperation, class Signature, class Fields>
struct Flattened;

template <auto kOperation, class R, class Options, class... Tensors, class... Fields>
struct Flattened<kOperation, R (*)(const Options&, Tensors...), std::tuple<Fields...>> {
  static R call(Tensors... tensors, Fields... fields) {
    return kOperation(Options{std::move(fields)...}, tensors...);
  }
};

template <class R, class Options, class... Tensors>
typename Options::Fields fields_of(R (*)(const Options&, Tensors...));

// TORCH_BOX(&Flat<&f>::call)
template <auto kOperation>
using Flat = Flattened<kOperation, decltype(kOperation), decltype(fields_of(kOperation))>;

}  // namespace vitkd
