// The kernel table of each instruction set. All give the same bytes.
//
// An activation is u8 [rows, width, pixel], pixel = channels rounded up to 16. Bytes past the
// channels, and up to kSlack past the end, are read but never matter. It may be a ring buffer of
// its last `ring` rows. Weights are packed when a file is loaded: panels of up to four vectors of
// 16 channels, each with its constants.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "math/requantize.h"
#include "simd/isa.h"

namespace vitkd::int8 {

constexpr int kLine = 64;    // bytes of a cache line and of the widest vector
constexpr int kSlack = 256;  // bytes readable past the end of every buffer

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t pixel_bytes(int64_t channels) { return round_up(channels, 16); }

// Memory on a cache line, not initialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes)
      : size_(bytes),
        data_(static_cast<uint8_t*>(::operator new(bytes + kSlack, std::align_val_t{kLine}))) {}
  uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{kLine}); }
  };
  size_t size_ = 0;
  std::unique_ptr<uint8_t, Free> data_;
};

struct Activation {
  uint8_t* data = nullptr;
  int height = 1;
  int width = 1;
  int ring = 1;       // rows in memory
  int64_t pixel = 0;  // bytes from one pixel to the next

  uint8_t* row(int y) const {  // a branch is cheaper than a division
    return data + int64_t{y < ring ? y : y % ring} * width * pixel;
  }
};

// What is done to a sum, as graph.py's Conv states it.
enum class EpilogueKind { bytes, hardswish, residual, logits };

// f<kind>(), with the kind as a constant
template <class F>
void with_kind(EpilogueKind kind, F&& f) {
  switch (kind) {
    case EpilogueKind::bytes:
      return f.template operator()<EpilogueKind::bytes>();
    case EpilogueKind::hardswish:
      return f.template operator()<EpilogueKind::hardswish>();
    case EpilogueKind::residual:
      return f.template operator()<EpilogueKind::residual>();
    case EpilogueKind::logits:
      return f.template operator()<EpilogueKind::logits>();
  }
}

struct Epilogue {
  Requantize requantize;
  EpilogueKind kind = EpilogueKind::bytes;
  int32_t residual_zero_point = 0;
  float residual_multiplier = 0;
};

// A convolution as it is in the file, channels outermost or (depthwise) innermost.
struct ConvSpec {
  int out = 0;
  int in = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  bool depthwise = false;
  const int8_t* weight = nullptr;     // [out, kernel_h, kernel_w, in]; depthwise [kh, kw, out]
  const int32_t* bias = nullptr;      // [out]
  const float* multiplier = nullptr;  // [out]
  Epilogue epilogue;

  int taps() const { return kernel_h * kernel_w; }
  int8_t at(int channel, int tap, int c) const {
    return depthwise ? weight[int64_t{tap} * out + channel]
                     : weight[(int64_t{channel} * taps() + tap) * in + c];
  }
};

// Packed weights; the layout is each instruction set's own.
struct Packed {
  struct Panel {
    int channel = 0;       // the first of its channels
    int width = 0;         // channels in units of 16
    int vectors = 0;       // of 16 lanes
    size_t constants = 0;  // offset in bytes of bias, multiplier, shift, [vectors][16] each
    size_t weights = 0;    // offset in bytes
    bool magic = false;    // see kMagicBits
    bool bits = false;     // see kBitsGrid
    bool words = false;    // before they are rounded, all values fit 16 bits
    int steps = 0;         // pairs: its own, of its own order of the inputs
    int gathers = 0, gathers_end = 0;
  };
  // pairs: bytes of a segment, shuffled: 4, 8, 12 or 16, or 32 together with those of the next
  struct Gather {
    int segment, from, to, bytes;
    size_t mask;  // offset in bytes
  };
  ConvSpec spec;          // its pointers are not kept
  int segments = 1;       // of a product: one per row of the kernel
  int steps = 0;          // of a segment, four bytes deep each; depthwise: taps
  int stride = 0;         // steps from one segment's weights to the next's
  bool slides = false;    // depthwise: packed for columns that slide through registers
  size_t scratch = 0;     // bytes that a product needs
  int64_t row_bytes = 0;  // of a pixel in it
  int64_t chunk = 0;      // pairs: pixels in it
  int segment = 0;        // neon: bytes of one
  std::vector<Panel> panels;
  // a plan moves all weights to one buffer, in the order of their use: kernels prefetch ahead
  const uint8_t* data = nullptr;
  Buffer own;
  std::vector<int32_t> offsets;  // depthwise: where the bytes of a tap lie
  std::vector<Gather> gathers;   // pairs: how a panel's order of the inputs is made
  std::vector<int32_t> groups;   // depthwise: rows and columns of what lies side by side
};

// y [pixels, out] = epilogue(sum over segments of x [pixels, 4 * steps] . weights)
struct GemmCall {
  const uint8_t* const* x = nullptr;  // by segment
  int64_t x_pixel = 0;
  int64_t pixels = 0;
  uint8_t* y = nullptr;  // logits: float
  int64_t y_pixel = 0;
  const uint8_t* residual = nullptr;
  int64_t residual_pixel = 0;
  int panel = 0, panel_end = 0;
  const uint8_t** fetched = nullptr;  // how far weights have been prefetched
  uint8_t* scratch = nullptr;         // Packed::scratch bytes
};

// Rows [row, row_end) and panels of a depthwise convolution.
struct DepthwiseCall {
  Activation x, y;
  const uint8_t* padding_row = nullptr;  // a row of x that holds only the padding byte
  int top = 0, left = 0;                 // padding
  int row = 0, row_end = 0;
  int panel = 0, panel_end = 0;
  uint8_t* scratch = nullptr;  // kDepthwiseScratch bytes

  const uint8_t* input_row(int y) const { return y >= 0 && y < x.height ? x.row(y) : padding_row; }
};
constexpr int kDepthwiseScratch = 64 << 10;

struct Kernels {
  Isa isa;
  // the kernel that computes most channels of a call: its tile, [rows x] pixels x channels, and set
  const char* (*gemm_name)(const Packed&, const GemmCall&);
  const char* (*depthwise_name)(const Packed&, const DepthwiseCall&);
  // a segment's bytes are those of `kernel_w` pixels, `pixel` bytes apart
  void (*pack_gemm)(const ConvSpec&, int64_t pixel, Packed*);
  void (*gemm)(const Packed&, const GemmCall&);
  void (*pack_depthwise)(const ConvSpec&, Packed*);
  void (*depthwise)(const Packed&, const DepthwiseCall&);
  // y = requantise(float(a - z_a) * m_a + float(b - z_b) * m_b), n bytes
  void (*add)(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
              const Requantize&, int64_t n, uint8_t* y);
  // sums[c] += x[p][c] over pixels, c < channels, a multiple of 16; fewer than 2^22 pixels in all
  void (*channel_sums)(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                       int32_t* sums);
  // y = requantise(float(x - z) * factor[c])
  void (*scale)(const uint8_t* x, int z, const float* factor, const Requantize&, int64_t pixels,
                int64_t pixel, uint8_t* y);
  // h[j] = h[j] + (float(q[inputs[i] * stride + j]) * s[j]) * x[i], i < count ascending; out is a
  // multiple of 16
  void (*linear)(const int8_t* q, int64_t stride, const float* s, const int32_t* inputs,
                 const float* x, int count, int out, float* h);
};

const Kernels& kernels(Isa isa);
extern const Kernels kScalar, kSse41, kAvx2, kAvx512Vnni, kNeon;
void pack_depthwise_vnni(const ConvSpec& spec, Packed* packed);
void depthwise_vnni(const Packed& packed, const DepthwiseCall& call);
const char* depthwise_name_vnni(const Packed& packed, const DepthwiseCall& call);
void depthwise_sliding_vnni(const Packed& packed, const DepthwiseCall& call,
                            const Packed::Panel& panel);
const Kernels& amx_kernels();      // kAvx512Vnni, with products on tiles
const Kernels& avx512_kernels();   // kAvx2, with wider products
const Kernels& avxvnni_kernels();  // kAvx2, with products and depthwise convolutions by vpdpbusd
// kNeon, with products and depthwise convolutions by dot products, and by matrix products
const Kernels& neondot_kernels();
const Kernels& neoni8mm_kernels();

// The most multiply-adds a second that vpdpbusd, and vfmadd231ps, reach on registers; 0 without
// AVX-512 VNNI.
#if defined(__x86_64__)
double vnni_peak(double seconds);
double fma_peak(double seconds);
#else
inline double vnni_peak(double) { return 0; }
inline double fma_peak(double) { return 0; }
#endif

// float(acc) * m in one instruction. An acc that starts from 0x4B400000, the bits of 1.5 * 2^23, is
// as a float 1.5 * 2^23 + acc, exactly, while |acc| < 2^22; then fma(it, m, -1.5 * 2^23 * m) rounds
// acc * m once, as the multiplication does, if that last product is a float. `quantize` clears two
// bits of every m, so that it is.
constexpr int32_t kMagicBits = 0x4B400000;
constexpr float kMagicFloat = 12582912.0f;

// Bytes without a conversion. Where m is a multiple of 2^-16, acc * m is a float as long as |acc *
// m| < 256, and beyond that it is a byte's end, rounded or not; and 1.5 * 2^23 * m is an integer.
// Then fma(1.5 * 2^23 + acc, -m, 1.5 * 2^23 * m - 1.5 * 2^23 - z) is -(1.5 * 2^23 + z + rne(acc *
// m)), if z is even (ties), and its bits are two words: 0xCB40 or 0xCB3F, negative, and z + rne(acc
// * m). packuswb makes a byte of the one and 0 of the other: the words that the next packuswb
// takes. `quantize` puts m on this grid.
constexpr double kBitsGrid = 1.0 / 65536;

constexpr int kFar = 640 << 10;  // bytes of L2 that hold weights before their turn

// Lays out panels of up to 16 * `widest` channels, in `vectors` vectors or as many as the channels
// need (0), each with its constants and zeroed room for `weight_bytes` per vector; `lanes` says
// which channel of a panel of that width a lane holds.
using LaneOrder = int (*)(int width, int vector, int lane);
struct Layout {
  int widest;
  int vectors;
  size_t weight_bytes;
  bool magic;
  LaneOrder lanes;
  int step_multiple = 1;  // of a gemm: segments begin at such steps
};
void lay_out(const ConvSpec& spec, const Layout& layout, Packed* packed);
// the same, with weights [segments][steps][vectors * 16][4] in the room; words:
// [segments][2 * steps][vectors * 16][2]
template <class T>
void lay_out_gemm(const ConvSpec& spec, int64_t pixel, Layout layout, Packed* packed);
// the same for a depthwise convolution: groups of `group_size` (row, column) whose inputs lie side
// by side, and taps, each a group at a column with weights for one or two output rows,
// [taps][rows][vectors * 16][group_size]
template <class T>
void lay_out_depthwise(const ConvSpec& spec, Layout layout, int group_size, Packed* packed);

}  // namespace vitkd::int8
