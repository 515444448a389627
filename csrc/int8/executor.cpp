#include "int8/executor.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>

#include "int8/kernels/fine.h"

namespace vitkd::int8 {
namespace {

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

struct Range {
  int64_t begin, end;
};

// a thread's part of [0, n), in multiples of `unit`
Range part_of(int64_t n, int64_t unit, int thread, int threads) {
  const int64_t units = (n + unit - 1) / unit;
  return {std::min(n, units * thread / threads * unit),
          std::min(n, units * (thread + 1) / threads * unit)};
}

// depthwise: interleaved bytes; dense: a gathered pixel of the deepest product
size_t scratch_bytes(const Plan& plan) {
  size_t most = kDepthwiseScratch;
  for (const Layer& layer : plan.layers) {
    most = std::max<size_t>(most, size_t{4} * layer.packed.segments * layer.packed.stride);
  }
  return most + kSlack;
}

constexpr int kValuePixels = 48;  // whole tiles, whose values stay in L1

size_t value_bytes(const Plan& plan) {
  size_t most = 0;
  for (const Layer& layer : plan.layers) {
    if (layer.through_values) most = std::max<size_t>(most, layer.packed.spec.out);
  }
  return 4 * kValuePixels * round_up(most, 16);
}

size_t gemm_scratch_bytes(const Plan& plan) {
  size_t most = 0;
  for (const Layer& layer : plan.layers) most = std::max(most, layer.packed.scratch);
  return most;
}

float* floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

// One of `threads` threads that compute images together, with barriers where the plan says so.
class Executor {
 public:
  Executor(const Plan& plan, const Workspace& shared, const Workspace& own, ThreadTeam* team,
           int thread, int threads, const Observed& observed)
      : plan_(plan),
        arena_(shared.arena.data()),
        rings_(own.rings.data()),
        scratch_(own.scratch.data()),
        gemm_scratch_(own.gemm_scratch.data()),
        products_(floats(own.products)),
        inputs_(reinterpret_cast<int32_t*>(own.inputs.data())),
        values_(floats(own.values)),
        sums_(reinterpret_cast<int32_t*>(shared.sums.data())),
        means_(floats(shared.means)),
        middle_(floats(shared.middle)),
        factors_(floats(shared.factors)),
        team_(team),
        thread_(thread),
        threads_(threads),
        observed_(observed) {}

  // the body for one image at a time, the head for several
  void run(const uint8_t* images, int64_t count, float* logits) {
    const int64_t size = plan_.options.image_size;
    const int64_t classes = plan_.layers.back().out.channels;
    for (int64_t done = 0; done < count; done += group_, logits += group_ * classes) {
      group_ = static_cast<int>(std::min<int64_t>(kImages, count - done));
      logits_ = logits;
      for (image_index_ = 0; image_index_ < group_; ++image_index_, images += size * size * 3) {
        image_ = images;
        fetched_ = nullptr;
        // a plan without a head runs the classifier here
        for (size_t s = 0; s <= plan_.head && s < plan_.steps.size(); ++s) run(plan_.steps[s]);
      }
      for (size_t s = plan_.head + 1; s < plan_.steps.size(); ++s) run(plan_.steps[s]);
    }
  }

 private:
  void barrier() {
    if (threads_ > 1) team_->barrier();
  }

  void run(const Step& step) {
    step.first == step.last ? node(step.last) : chain(step);
    if (step.barrier_after) barrier();
    if (observed_.activations != nullptr) keep(step.last);
  }

  template <class F>
  void timed(int i, F&& f) {
    if (observed_.times == nullptr) return f();
    const double start = now();
    f();
    (*observed_.times)[i].seconds += now() - start;
  }

  template <class Call>
  void note_kernel(int i, const char* (*name)(const Packed&, const Call&), const Call& call,
                   int64_t pixels) {
    if (observed_.times == nullptr || pixels <= (*observed_.times)[i].pixels) return;
    (*observed_.times)[i].kernel = name(plan_.layers[i].packed, call);
    (*observed_.times)[i].pixels = pixels;
  }

  Activation activation(int i) const {
    if (i < 0) {
      const int size = plan_.options.image_size;
      return {const_cast<uint8_t*>(image_), size, size, size, 3};
    }
    const Layer& layer = plan_.layers[i];
    const int height = layer.out.height * layer.images;
    return {(layer.ring > 0 ? rings_ : arena_) + layer.offset, height, layer.out.width,
            layer.ring > 0 ? layer.ring : height, layer.pixel};
  }

  void keep(int i) {
    const Layer& layer = plan_.layers[i];
    if (layer.node.op == Op::classifier) return;
    std::vector<uint8_t>& kept = (*observed_.activations)[i];
    const int64_t channels = layer.out.channels;
    kept.resize(layer.out.pixels() * channels);
    for (int64_t p = 0; p < layer.out.pixels(); ++p) {
      std::memcpy(kept.data() + p * channels, activation(i).data + p * layer.pixel, channels);
    }
  }

  void node(int i) {
    const Layer& layer = plan_.layers[i];
    switch (layer.node.op) {
      case Op::conv:
      case Op::depthwise:
      case Op::classifier: {
        const int panels = static_cast<int>(layer.packed.panels.size());
        const Range all{0, panels};
        const Range rows{0, layer.images > 1 ? group_ : layer.out.height};
        if (layer.by_panels) {
          const Range mine = part_of(panels, 1, thread_, threads_);
          timed(i, [&] { convolve(i, rows, mine); });
        } else if (layer.out.height > 1) {
          const Range mine = part_of(layer.out.height, 1, thread_, threads_);
          timed(i, [&] { convolve(i, mine, all); });
        } else if (thread_ == 0) {
          timed(i, [&] { convolve(i, rows, all); });
        }
        break;
      }
      case Op::add:
        timed(i, [&] { add(i); });
        break;
      case Op::squeeze_excite:
        timed(i, [&] { squeeze_excite(i); });
        break;
      case Op::pool:
        timed(i, [&] { pool(i); });
        break;
    }
  }

  void convolve(int i, Range rows, Range panels) {
    if (rows.begin >= rows.end || panels.begin >= panels.end) return;
    const Layer& layer = plan_.layers[i];
    if (layer.node.op == Op::depthwise) {
      depthwise(i, rows, panels);
    } else if (layer.packed.spec.taps() == 1 && layer.node.stride == std::array{1, 1} &&
               layer.node.inputs[0] >= 0) {
      pointwise(i, rows, panels);
    } else {
      dense(i, rows, panels);
    }
  }

  GemmCall gemm_call(int i, Range panels) {
    GemmCall call;
    call.panel = static_cast<int>(panels.begin);
    call.panel_end = static_cast<int>(panels.end);
    const Layer& layer = plan_.layers[i];
    call.y_pixel = layer.node.op == Op::classifier ? 4 * layer.out.channels : layer.pixel;
    call.fetched = &fetched_;
    call.scratch = gemm_scratch_;
    return call;
  }

  void at_row(int i, const Activation& y, int row, GemmCall* call) const {
    const Layer& layer = plan_.layers[i];
    if (layer.node.op == Op::classifier) {
      // without a head there is one row, of the current image
      const int64_t at = layer.images > 1 ? row : image_index_;
      call->y = reinterpret_cast<uint8_t*>(logits_ + at * layer.out.channels);
      return;
    }
    call->y = y.row(row);
    if (layer.node.residual) {
      const Activation residual = activation(layer.node.inputs[1]);
      call->residual = residual.row(row);
      call->residual_pixel = residual.pixel;
    }
  }

  void multiply(const Layer& layer, const GemmCall& call) {
    if (!layer.through_values) return plan_.with.gemm(layer.packed, call);
    const ConvSpec& spec = layer.packed.spec;
    FineCall finish;
    finish.values = products_;
    finish.values_pixel = round_up(spec.out, 16);
    finish.residual_pixel = call.residual_pixel, finish.residual_is_fine = layer.residual_is_fine;
    finish.y_pixel = call.y_pixel, finish.fine = layer.node.fine;
    finish.channels = spec.out;
    std::array<const uint8_t*, kMaxKernel> x;
    GemmCall part = call;
    part.x = x.data();
    part.y = reinterpret_cast<uint8_t*>(products_), part.y_pixel = 4 * finish.values_pixel;
    part.residual = nullptr, part.residual_pixel = 0;
    for (int64_t done = 0; done < call.pixels; done += part.pixels) {
      part.pixels = finish.pixels = std::min<int64_t>(kValuePixels, call.pixels - done);
      for (int k = 0; k < layer.packed.segments; ++k) x[k] = call.x[k] + done * call.x_pixel;
      plan_.with.gemm(layer.packed, part);
      finish.y = call.y + done * call.y_pixel;
      if (call.residual != nullptr) finish.residual = call.residual + done * call.residual_pixel;
      finish_fine(plan_.with.isa, finish, spec.epilogue);
    }
  }

  // runs of rows that are contiguous in both activations
  void pointwise(int i, Range rows, Range panels) {
    const Layer& layer = plan_.layers[i];
    const Activation x = activation(layer.node.inputs[0]);
    const Activation y = layer.node.op == Op::classifier
                             ? Activation{nullptr, kImages, 1, kImages, 0}
                             : activation(i);
    GemmCall call = gemm_call(i, panels);
    call.x_pixel = x.pixel;
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t run = std::min({rows.end - row, x.ring - row % x.ring, y.ring - row % y.ring});
      const uint8_t* from = x.row(static_cast<int>(row));
      call.x = &from;
      call.pixels = run * layer.out.width;
      at_row(i, y, static_cast<int>(row), &call);
      multiply(layer, call);
      note_kernel(i, plan_.with.gemm_name, call, call.pixels);
      row += run;
    }
  }

  // An implicit GEMM with one segment per row of the kernel. Output pixels whose taps all lie
  // inside the input's rows are read in place; rows outside are the padding row. For the few pixels
  // at the sides the taps are copied to the scratch first.
  void dense(int i, Range rows, Range panels) {
    const Layer& layer = plan_.layers[i];
    const ConvSpec& spec = layer.packed.spec;
    const Activation x = activation(layer.node.inputs[0]), y = activation(i);
    const int64_t segment = int64_t{4} * layer.packed.stride;
    const int64_t step = spec.stride_w * x.pixel;
    // the image is the caller's memory: not a byte past its end is read
    const int64_t beyond = segment - spec.kernel_w * x.pixel;
    const int kernel_w = spec.kernel_w + static_cast<int>((std::max<int64_t>(beyond, 0) + 2) / 3);
    const int inside = layer.node.inputs[0] < 0 ? kernel_w : spec.kernel_w;
    const int first = std::min((layer.left + spec.stride_w - 1) / spec.stride_w, y.width);
    const int room = x.width + layer.left - inside;
    const int end = std::max(first, room < 0 ? 0 : std::min(room / spec.stride_w + 1, y.width));
    std::array<const uint8_t*, kMaxKernel> from, in_place;
    GemmCall call = gemm_call(i, panels);
    const auto multiply = [&](int row, int column, int64_t pixels) {
      at_row(i, y, row, &call);
      call.y += column * y.pixel;
      if (call.residual != nullptr) call.residual += column * call.residual_pixel;
      call.pixels = pixels;
      this->multiply(layer, call);
      note_kernel(i, plan_.with.gemm_name, call, pixels);
    };
    for (int row = static_cast<int>(rows.begin); row < rows.end; ++row) {
      for (int k = 0; k < spec.kernel_h; ++k) {
        const int r = row * spec.stride_h - layer.top + k;
        from[k] = r >= 0 && r < x.height ? x.row(r) : layer.padding.data();
        in_place[k] = from[k] + (first * spec.stride_w - layer.left) * x.pixel;
      }
      call.x = in_place.data();
      call.x_pixel = step;
      if (end > first) multiply(row, first, end - first);
      for (int column = first > 0 ? 0 : end; column < y.width;) {
        std::array<const uint8_t*, kMaxKernel> gathered;
        for (int k = 0; k < spec.kernel_h; ++k) {
          uint8_t* to = scratch_ + k * segment;
          gathered[k] = to;
          for (int c = 0; c < spec.kernel_w; ++c, to += x.pixel) {
            const int at = column * spec.stride_w - layer.left + c;
            const bool within = at >= 0 && at < x.width;
            std::memcpy(to, within ? from[k] + at * x.pixel : layer.padding.data(), x.pixel);
          }
        }
        call.x = gathered.data();
        multiply(row, column, 1);
        column = column + 1 == first ? end : column + 1;
      }
    }
  }

  void depthwise(int i, Range rows, Range panels) {
    const Layer& layer = plan_.layers[i];
    DepthwiseCall call;
    call.x = activation(layer.node.inputs[0]);
    call.y = activation(i);
    call.padding_row = layer.padding.data();
    call.top = layer.top, call.left = layer.left;
    call.row = static_cast<int>(rows.begin), call.row_end = static_cast<int>(rows.end);
    call.panel = static_cast<int>(panels.begin), call.panel_end = static_cast<int>(panels.end);
    call.scratch = scratch_;
    plan_.with.depthwise(layer.packed, call);
    note_kernel(i, plan_.with.depthwise_name, call, (rows.end - rows.begin) * call.y.width);
  }

  // strips of the last output; each pulls the rows that it needs through the nodes before it
  void chain(const Step& step) {
    const Range mine = part_of(plan_.layers[step.last].out.height, 1, thread_, threads_);
    if (mine.begin >= mine.end) return;
    std::array<int, kLongestChain> made;  // by node: the next row to compute
    int row = static_cast<int>(mine.begin);
    for (int i = step.last; i >= step.first; --i) {
      made[i - step.first] = row;
      const Layer& layer = plan_.layers[i];
      row = std::max(0, row * layer.node.stride[0] - layer.top);
    }
    for (int64_t end = mine.begin; end < mine.end;) {
      end = std::min<int64_t>(end + step.strip_rows, mine.end);
      pull(step, step.last, static_cast<int>(end), made.data());
    }
  }

  void pull(const Step& step, int i, int end, int* made) {
    int& from = made[i - step.first];
    if (from >= end) return;
    const Layer& layer = plan_.layers[i];
    if (i > step.first) {
      const int last = (end - 1) * layer.node.stride[0] - layer.top + layer.packed.spec.kernel_h;
      pull(step, i - 1, std::min(last, layer.in.height), made);
    }
    const Range rows{from, end}, panels{0, static_cast<int64_t>(layer.packed.panels.size())};
    timed(i, [&] { convolve(i, rows, panels); });
    from = end;
  }

  void add(int i) {
    const Layer& layer = plan_.layers[i];
    const Node& n = layer.node;
    const Activation a = activation(n.inputs[0]), b = activation(n.inputs[1]), y = activation(i);
    const Range mine = part_of(layer.out.pixels() * y.pixel, 16, thread_, threads_);
    plan_.with.add(a.data + mine.begin, plan_.zero_point(n.inputs[0]), n.multipliers[0],
                   b.data + mine.begin, plan_.zero_point(n.inputs[1]), n.multipliers[1],
                   {n.zero_point, n.lo, n.hi, 0}, mine.end - mine.begin, y.data + mine.begin);
  }

  // sums of q - zero_point over the pixels, of this thread's channels
  Range centred_sums(int i) {
    const Layer& layer = plan_.layers[i];
    const Activation x = activation(layer.node.inputs[0]);
    const Range mine = part_of(x.pixel, 16, thread_, threads_);
    const auto pixels = static_cast<int32_t>(layer.in.pixels());
    const int32_t zero = pixels * plan_.zero_point(layer.node.inputs[0]);
    std::fill(sums_ + mine.begin, sums_ + mine.end, 0);
    plan_.with.channel_sums(x.data + mine.begin, pixels, x.pixel, mine.end - mine.begin,
                            sums_ + mine.begin);
    for (int64_t c = mine.begin; c < mine.end; ++c) sums_[c] -= zero;
    return mine;
  }

  void pool(int i) {
    const Layer& layer = plan_.layers[i];
    const Requantize requantize{layer.node.zero_point, layer.node.lo, layer.node.hi, 0};
    uint8_t* const y = activation(i).row(layer.images > 1 ? image_index_ : 0);
    const Range mine = centred_sums(i);
    for (int64_t c = mine.begin; c < mine.end; ++c) {
      y[c] = vitkd::int8::requantize(sums_[c], layer.mean_multiplier, requantize);
    }
  }

  // a part of h = b + (q s)^T x; what is multiplied by 0, half of what ReLU leaves, changes nothing
  Range linear(const uint8_t* q, const uint8_t* s, const uint8_t* b, const float* x, int in,
               int64_t out, float* h) {
    const int64_t stride = pixel_bytes(out);
    const Range mine = part_of(stride, 16, thread_, threads_);
    if (mine.begin < mine.end) {
      int count = 0;
      for (int c = 0; c < in; ++c) {
        inputs_[count] = c, values_[count] = x[c];
        count += x[c] != 0;
      }
      std::memcpy(h + mine.begin, b + 4 * mine.begin, 4 * (mine.end - mine.begin));
      plan_.with.linear(reinterpret_cast<const int8_t*>(q) + mine.begin, stride,
                        reinterpret_cast<const float*>(s) + mine.begin, inputs_, values_, count,
                        static_cast<int>(mine.end - mine.begin), h + mine.begin);
    }
    return mine;
  }

  void squeeze_excite(int i) {
    const Layer& layer = plan_.layers[i];
    const Node& n = layer.node;
    const int channels = layer.in.channels, middle = layer.middle;
    const Activation x = activation(n.inputs[0]), y = activation(i);
    const uint8_t* const data = layer.packed.data;
    const Range summed = centred_sums(i);
    for (int64_t c = summed.begin; c < summed.end; ++c) {
      means_[c] = mul(static_cast<float>(sums_[c]), layer.mean_multiplier);
    }
    barrier();
    Range mine = linear(data + layer.q1, data + layer.s1, data + layer.b1, means_, channels, middle,
                        middle_);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      const float h = middle_[j];
      middle_[j] = n.hidden_hardswish ? hardswish(h, 1.0f / 6.0f) : std::max(h, 0.0f);
    }
    barrier();
    mine = linear(data + layer.q2, data + layer.s2, data + layer.b2, middle_, middle, channels,
                  factors_);
    for (int64_t c = mine.begin; c < mine.end; ++c) {
      const float gate = mul(clamp(vitkd::int8::add(factors_[c], 3.0f), 0.0f, 6.0f), 1.0f / 6.0f);
      factors_[c] = mul(gate, static_cast<float>(n.ratio));
    }
    barrier();
    const Range pixels = part_of(layer.out.pixels(), 1, thread_, threads_);
    plan_.with.scale(x.data + pixels.begin * x.pixel, plan_.zero_point(n.inputs[0]), factors_,
                     {n.zero_point, n.lo, n.hi, 0}, pixels.end - pixels.begin, x.pixel,
                     y.data + pixels.begin * y.pixel);
  }

  const Plan& plan_;
  uint8_t *const arena_, *const rings_, *const scratch_, *const gemm_scratch_;
  float* const products_;
  int32_t* const inputs_;
  float* const values_;
  int32_t* const sums_;
  float *const means_, *const middle_, *const factors_;
  ThreadTeam* const team_;
  const int thread_, threads_;
  const Observed observed_;
  const uint8_t* image_ = nullptr;
  float* logits_ = nullptr;
  const uint8_t* fetched_ = nullptr;
  int image_index_ = 0, group_ = 0;  // of images whose heads are computed together
};

}  // namespace

Workspace::Workspace(const Plan& plan)
    : arena(plan.arena),
      rings(plan.rings),
      scratch(scratch_bytes(plan)),
      gemm_scratch(gemm_scratch_bytes(plan)),
      products(value_bytes(plan)),
      inputs(plan.channels * 4),
      values(plan.channels * 4),
      sums(plan.channels * 4),
      means(plan.channels * 4),
      middle(plan.channels * 4),
      factors(plan.channels * 4) {}

size_t workspace_bytes(const Plan& plan) {
  return plan.arena + plan.rings + scratch_bytes(plan) + gemm_scratch_bytes(plan) +
         value_bytes(plan) + 6 * 4 * plan.channels +
         11 * kSlack;  // inputs, values, sums, means, middle, factors
}

void Workspace::poison() const {
  for (const Buffer* b : {&arena, &rings, &scratch, &gemm_scratch, &products, &inputs, &values,
                          &sums, &means, &middle, &factors}) {
    std::memset(b->data(), 0xA5, b->size() + kSlack);
  }
}

void execute(const Plan& plan, const Workspace& own, const uint8_t* images, int64_t count,
             float* logits, const Observed& observed) {
  Executor(plan, own, own, nullptr, 0, 1, observed).run(images, count, logits);
}

void execute_together(const Plan& plan, const Workspace& first, const Workspace& own,
                      ThreadTeam& team, int thread, const uint8_t* images, int64_t count,
                      float* logits) {
  Executor(plan, first, own, &team, thread, team.threads(), {}).run(images, count, logits);
}

}  // namespace vitkd::int8
