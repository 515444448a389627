// Channels are padded to whole vectors here, which the engine does once per activation.

#include "int8/kernels/plain.h"

#include <algorithm>
#include <cstring>

#include "int8/kernels/kernels.h"

namespace vitkd::int8 {
namespace {

Epilogue epilogue_of(const Requantize& requantize) {
  const bool hardswish = requantize.hardswish_scale != 0.0f;
  return {requantize, hardswish ? EpilogueKind::hardswish : EpilogueKind::bytes, 0, 0};
}

// [pixels, channels] with `to` bytes per pixel instead of `from`
void copy_pixels(const uint8_t* x, int64_t from, uint8_t* y, int64_t to, int64_t pixels,
                 int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p) std::memcpy(y + p * to, x + p * from, channels);
}

}  // namespace

void depthwise(const DepthwiseShape& s, const Requantize& requantize, const uint8_t* x,
               const int8_t* weight, const int32_t* bias, const float* multiplier, uint8_t* y) {
  const Kernels& with = kernels(selected_isa());
  ConvSpec spec;
  spec.depthwise = true;
  spec.out = spec.in = static_cast<int>(s.channels);
  spec.kernel_h = s.kernel_h, spec.kernel_w = s.kernel_w;
  spec.stride_h = s.stride_h, spec.stride_w = s.stride_w;
  spec.weight = weight, spec.bias = bias, spec.multiplier = multiplier;
  spec.epilogue = epilogue_of(requantize);
  Packed packed;
  with.pack_depthwise(spec, &packed);

  const int64_t pixel = pixel_bytes(s.channels), in = s.height * s.width;
  const int64_t out = s.out_height() * s.out_width();
  const bool padded = pixel != s.channels;
  const Buffer x_padded(in * pixel), y_padded(padded ? out * pixel : 0);
  const Buffer padding_row(s.width * pixel), scratch(kDepthwiseScratch);
  std::memset(padding_row.data(), s.padding_byte, s.width * pixel);
  DepthwiseCall call;
  call.padding_row = padding_row.data();
  call.top = s.top, call.left = s.left;
  call.row_end = static_cast<int>(s.out_height());
  call.panel_end = static_cast<int>(packed.panels.size());
  call.scratch = scratch.data();
  for (int64_t n = 0; n < s.batch; ++n) {
    // also where nothing is padded: kernels read past the end of an activation
    copy_pixels(x + n * in * s.channels, s.channels, x_padded.data(), pixel, in, s.channels);
    uint8_t* to = y + n * out * s.channels;
    call.x = {x_padded.data(), static_cast<int>(s.height), static_cast<int>(s.width),
              static_cast<int>(s.height), pixel};
    call.y = {padded ? y_padded.data() : to, static_cast<int>(s.out_height()),
              static_cast<int>(s.out_width()), static_cast<int>(s.out_height()), pixel};
    with.depthwise(packed, call);
    if (padded) copy_pixels(y_padded.data(), pixel, to, s.channels, out, s.channels);
  }
}

void pointwise(int64_t pixels, int64_t in, int64_t out, const Requantize& requantize,
               const uint8_t* x, const int8_t* weight, const int32_t* bias, const float* multiplier,
               uint8_t* y) {
  const Kernels& with = kernels(selected_isa());
  ConvSpec spec;
  spec.out = static_cast<int>(out), spec.in = static_cast<int>(in);
  spec.weight = weight, spec.bias = bias, spec.multiplier = multiplier;
  spec.epilogue = epilogue_of(requantize);
  const int64_t x_pixel = pixel_bytes(in), y_pixel = pixel_bytes(out);
  Packed packed;
  with.pack_gemm(spec, x_pixel, &packed);

  const bool pad_x = x_pixel != in, pad_y = y_pixel != out;
  constexpr int64_t kAtOnce = 1024;
  const Buffer x_padded(pad_x ? kAtOnce * x_pixel : 0), y_padded(pad_y ? kAtOnce * y_pixel : 0);
  const Buffer scratch(packed.scratch);
  GemmCall call;
  call.scratch = scratch.data();
  call.x_pixel = x_pixel, call.y_pixel = y_pixel;
  call.panel_end = static_cast<int>(packed.panels.size());
  for (int64_t p = 0; p < pixels; p += kAtOnce) {
    const int64_t n = std::min(kAtOnce, pixels - p);
    if (pad_x) copy_pixels(x + p * in, in, x_padded.data(), x_pixel, n, in);
    const uint8_t* from = pad_x ? x_padded.data() : x + p * in;
    call.x = &from;
    call.y = pad_y ? y_padded.data() : y + p * out;
    call.pixels = n;
    with.gemm(packed, call);
    if (pad_y) copy_pixels(y_padded.data(), y_pixel, y + p * out, out, n, out);
  }
}

}  // namespace vitkd::int8
