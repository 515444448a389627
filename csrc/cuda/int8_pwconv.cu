// Pointwise int8 convolution on the GPU, on tensor cores (mma.sync m16n8k32, u8 by s8):
//   y[p, o] = requantise(bias[o] + sum over k of x[p, k] * w[o, k])
// A block keeps the weights of up to 64 outputs in shared memory and streams tiles of 128 pixels
// past them in slices of 64 input channels, three in flight by cp.async while one is multiplied;
// weights that do not fit are streamed too. Rows in shared memory are 16 bytes longer than their
// content, so ldmatrix has no bank conflicts; outputs are dealt to tensor-core columns such that a
// thread has neighbouring ones, and bytes leave in 16-byte stores. Counted: pixels * (C_in + C_out)
// bytes, where an H200 copies 16.4 per multiprocessor and clock; 13 instructions per output up to
// 64 inputs (7.4 to requantise): 10 outputs a clock; some 2500 multiply-adds a clock. Memory is the
// bound where C_in > C_out (960 to 160: arithmetic is near), instructions where C_out is several
// times C_in (24 to 144: 70% of memory).
#include "binding/int8_call.h"
#include "cuda/common.cuh"
#include "cuda/int8_product.cuh"

namespace vitkd::int8 {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpPixels = 32;
constexpr int kPixels = kWarps * kWarpPixels;  // of a tile
constexpr int kSlice = 64;                     // input channels
constexpr int kPitch = kSlice + 16;            // bytes from row to row of a slice
constexpr int kStages = 4;
constexpr int kMaxOutputs = 64;  // of a block

struct Call {
  const uint8_t* x;         // [pixels, in]
  const int8_t* weight;     // [out, in]
  const int32_t* bias;      // [out]
  const float* multiplier;  // [out]
  uint8_t* y;               // [pixels, out]
  int64_t pixels, tiles;
  int in, out;
  int x_align, weight_align, y_align;  // bytes of the widest copies of a row: 1, 4, 8 or 16
  Requantize requantize;
};

// Shared memory: bias, multiplier, bytes of y, weights (all or none), stages of x (and weights).
template <int kOutputs, bool kResident>
struct Plan {
  static constexpr int kY = 8 * kOutputs;  // offsets in bytes
  static constexpr int kWeights = kY + kPixels * kOutputs;
  static constexpr int kStage = (kPixels + (kResident ? 0 : kOutputs)) * kPitch;
  static __host__ __device__ int pitch(int in) {
    return kResident ? (in + 31) / 32 * 32 + 16 : kPitch;
  }
  static __host__ __device__ int stages(int in) {
    return kWeights + (kResident ? kOutputs * pitch(in) : 0);
  }
  static int bytes(int in) { return stages(in) + kStages * kStage; }
  static_assert(kOutputs % 16 == 0 && kY % 16 == 0 && kWeights % 16 == 0 && kStage % 16 == 0);
};

// Columns [first, first + width) of kRows rows of `in` bytes to shared memory, 0 where there is
// nothing; row r goes to row place(r). width is 32 or kSlice.
template <int kBytes, int kRows, class Place>
__device__ __forceinline__ void copy_rows_by(const uint8_t* from, int64_t rows, int in, int first,
                                             int width, uint8_t* to, int pitch, Place&& place) {
  constexpr int kChunks = kSlice / kBytes;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * kBytes;
    if (column >= width) continue;
    uint8_t* const at = to + place(row) * pitch + column;
    const bool there = row < rows && first + column < in;
    const uint8_t* const source = from + static_cast<int64_t>(row) * in + first + column;
    if constexpr (kBytes == 1) {
      *at = there ? *source : 0;
    } else if (there) {
      copy_async<kBytes>(at, source);
    } else {
#pragma unroll
      for (int b = 0; b < kBytes; b += 4) *reinterpret_cast<uint32_t*>(at + b) = 0;
    }
  }
}

template <int kRows, class Place>
__device__ __forceinline__ void copy_rows(int align, const uint8_t* from, int64_t rows, int in,
                                          int first, int width, uint8_t* to, int pitch,
                                          Place&& place) {
  switch (align) {
    case 16:
      return copy_rows_by<16, kRows>(from, rows, in, first, width, to, pitch, place);
    case 8:
      return copy_rows_by<8, kRows>(from, rows, in, first, width, to, pitch, place);
    case 4:
      return copy_rows_by<4, kRows>(from, rows, in, first, width, to, pitch, place);
    default:
      return copy_rows_by<1, kRows>(from, rows, in, first, width, to, pitch, place);
  }
}

// A warp's bytes [kWarpPixels, kOutputs] from shared memory to y.
template <class T, int kOutputs>
__device__ __forceinline__ void store_rows(const uint8_t* from, uint8_t* to, int64_t rows,
                                           int outputs, int out) {
  constexpr int kWidth = sizeof(T), kChunks = kOutputs / kWidth;
  for (int i = threadIdx.x % 32; i < kWarpPixels * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * kWidth;
    if (row >= rows || column >= outputs) continue;
    *reinterpret_cast<T*>(to + static_cast<int64_t>(row) * out + column) =
        *reinterpret_cast<const T*>(from + row * kOutputs + column);
  }
}

// grid: (outputs / kOutputs, tiles)
template <int kOutputs, bool kResident>
__global__ void __launch_bounds__(kThreads, 3) int8_pwconv_kernel(const __grid_constant__ Call c) {
  using P = Plan<kOutputs, kResident>;
  constexpr int kColumns = kOutputs / 8;     // tensor-core tiles of 8 outputs
  constexpr int kNeighbours = kOutputs / 4;  // outputs of a thread
  constexpr int kRows = kWarpPixels / 16;    // tensor-core tiles of 16 pixels
  extern __shared__ __align__(16) uint8_t shared[];
  auto* const bias = reinterpret_cast<int32_t*>(shared);
  auto* const multiplier = reinterpret_cast<float*>(shared) + kOutputs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_output = blockIdx.x * kOutputs;
  const int outputs = min(kOutputs, c.out - first_output);
  const int slices = (c.in + kSlice - 1) / kSlice, padded = (c.in + 31) / 32 * 32;
  const int weight_pitch = P::pitch(c.in);

  // 1. constants; the thread with tensor-core columns 2 t and 2 t + 1 of every tile shall own
  // outputs kNeighbours t .. + kNeighbours - 1, two from each tile
  for (int i = threadIdx.x; i < kOutputs; i += kThreads) {
    bias[i] = i < outputs ? c.bias[first_output + i] : 0;
    multiplier[i] = i < outputs ? c.multiplier[first_output + i] : 0;
  }
  const auto column_of = [](int output) {
    const int t = output / kNeighbours, i = output % kNeighbours;
    return i / 2 * 8 + t * 2 + i % 2;
  };
  const auto* const weight =
      reinterpret_cast<const uint8_t*>(c.weight) + static_cast<int64_t>(first_output) * c.in;
  const auto copy_weights = [&](int first, int width, uint8_t* to) {
    copy_rows<kOutputs>(c.weight_align, weight, outputs, c.in, first, width, to, weight_pitch,
                        column_of);
  };
  if constexpr (kResident) {
    for (int first = 0; first < padded; first += kSlice) {
      copy_weights(first, min(kSlice, padded - first), shared + P::kWeights + first);
    }
  }

  // 2. slices are fetched in the order in which they are multiplied, tile by tile
  int64_t fetched_tile = blockIdx.y;
  int fetched_slice = 0, fetched_stage = 0;
  const auto fetch = [&] {
    if (fetched_tile < c.tiles) {
      uint8_t* const stage = shared + P::stages(c.in) + fetched_stage * P::kStage;
      const int first = fetched_slice * kSlice, width = min(kSlice, padded - first);
      const int64_t pixel = fetched_tile * kPixels;
      copy_rows<kPixels>(c.x_align, c.x + pixel * c.in, c.pixels - pixel, c.in, first, width, stage,
                         kPitch, [](int row) { return row; });
      if constexpr (!kResident) copy_weights(first, width, stage + kPixels * kPitch);
      if (++fetched_slice == slices) fetched_slice = 0, fetched_tile += gridDim.y;
    }
    commit();
    fetched_stage = (fetched_stage + 1) % kStages;
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();

  // 3. the sums of a tile
  int stage_index = 0;
  for (int64_t tile = blockIdx.y; tile < c.tiles; tile += gridDim.y) {
    int32_t acc[kRows][kColumns][4];
    for (int slice = 0; slice < slices; ++slice) {
      wait_for_all_but<kStages - 2>();
      __syncthreads();  // the slice is there for all, and the one before it is free again
      fetch();
      if (slice == 0) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int2 b = reinterpret_cast<const int2*>(bias + lane % 4 * kNeighbours)[i];
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            acc[row][i][0] = acc[row][i][2] = b.x;
            acc[row][i][1] = acc[row][i][3] = b.y;
          }
        }
      }
      const uint8_t* const stage = shared + P::stages(c.in) + stage_index * P::kStage;
      stage_index = (stage_index + 1) % kStages;
      const uint8_t* const w =
          kResident ? shared + P::kWeights + slice * kSlice : stage + kPixels * kPitch;
      const int steps = min(kSlice, padded - slice * kSlice) / 32;
      multiply_slice<kSlice / 32>(acc, stage + warp * kWarpPixels * kPitch, kPitch, w, weight_pitch,
                                  steps);
    }

    // 4. the bytes: a thread has rows lane / 4 and lane / 4 + 8 of each 16
    uint8_t* const bytes = shared + P::kY + warp * kWarpPixels * kOutputs;
    const auto finish = [&]<bool kHardswish>() {
#pragma unroll
      for (int i = 0; i < kNeighbours; i += 4) {
        const int output = lane % 4 * kNeighbours + i;
        const float4 m = *reinterpret_cast<const float4*>(multiplier + output);
#pragma unroll
        for (int row = 0; row < 2 * kRows; ++row) {
          const int32_t (&left)[4] = acc[row / 2][i / 2], (&right)[4] = acc[row / 2][i / 2 + 1];
          const int k = row % 2 * 2;
          const uint32_t word = requantize<kHardswish>(left[k], m.x, c.requantize) |
                                requantize<kHardswish>(left[k + 1], m.y, c.requantize) << 8 |
                                requantize<kHardswish>(right[k], m.z, c.requantize) << 16 |
                                requantize<kHardswish>(right[k + 1], m.w, c.requantize) << 24;
          *reinterpret_cast<uint32_t*>(bytes + (row * 8 + lane / 4) * kOutputs + output) = word;
        }
      }
    };
    c.requantize.hardswish_scale == 0.0f ? finish.template operator()<false>()
                                         : finish.template operator()<true>();
    __syncwarp();
    const int64_t pixel = tile * kPixels + warp * kWarpPixels;
    uint8_t* const y = c.y + pixel * c.out + first_output;
    switch (c.y_align) {
      case 16:
        store_rows<uint4, kOutputs>(bytes, y, c.pixels - pixel, outputs, c.out);
        break;
      case 8:
        store_rows<uint2, kOutputs>(bytes, y, c.pixels - pixel, outputs, c.out);
        break;
      case 4:
        store_rows<uint32_t, kOutputs>(bytes, y, c.pixels - pixel, outputs, c.out);
        break;
      default:
        store_rows<uint8_t, kOutputs>(bytes, y, c.pixels - pixel, outputs, c.out);
    }
    __syncwarp();
  }
  wait_for_all_but<0>();
}

template <int kOutputs, bool kResident>
void launch(const Call& c, cudaStream_t stream) {
  auto* const kernel = int8_pwconv_kernel<kOutputs, kResident>;
  const int shared = Plan<kOutputs, kResident>::bytes(c.in);
  allowed_shared_memory(kernel);
  int at_once = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, kThreads, shared));
  // as many blocks as fit the chip, each with the same number of tiles
  const int64_t groups = ceil_div(c.out, kOutputs);
  const int64_t chip = int64_t{at_once} * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = std::clamp<int64_t>(chip / groups, 1, 65535);
  const int64_t rows = ceil_div(c.tiles, ceil_div(c.tiles, most));
  kernel<<<dim3(static_cast<unsigned>(groups), static_cast<unsigned>(rows)), kThreads, shared,
           stream>>>(c);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int kOutputs>
void launch_by_size(const Call& c, cudaStream_t stream) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // two blocks a multiprocessor, where weights that are streamed leave room for as many
  const int half = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - (1 << 10);
  const bool two = Plan<kOutputs, false>::bytes(c.in) <= half;
  c.in <= 4096 && Plan<kOutputs, true>::bytes(c.in) <= (two ? half : most)
      ? launch<kOutputs, true>(c, stream)
      : launch<kOutputs, false>(c, stream);
}

// Bytes of the widest copy that rows of n bytes from p on allow.
int align_of(const void* p, int64_t n) {
  const auto bits = static_cast<int>(16 | n | reinterpret_cast<uintptr_t>(p)), low = bits & -bits;
  return low == 2 ? 1 : low;
}

Tensor int8_pwconv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const Tensor& multiplier, int64_t y_zero_point, int64_t lo, int64_t hi,
                   std::optional<double> hardswish_scale) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* const op = "int8_pwconv";
  const Operands on(op, "..., C_in", x, "C_out, C_in", weight, 0, bias, multiplier);
  Call c{};
  c.requantize = checked_requantize(op, y_zero_point, lo, hi, hardswish_scale);
  c.in = static_cast<int>(on.weight.size(1)), c.out = static_cast<int>(on.weight.size(0));
  std::vector<int64_t> shape(on.x.sizes().begin(), on.x.sizes().end());
  shape.back() = c.out;
  Tensor y = torch::stable::new_empty(on.x, shape);
  if (y.numel() == 0) return y;
  c.x = on.x.const_data_ptr<uint8_t>();
  c.weight = on.weight.const_data_ptr<int8_t>();
  c.bias = on.bias.const_data_ptr<int32_t>();
  c.multiplier = on.multiplier.const_data_ptr<float>();
  c.y = y.mutable_data_ptr<uint8_t>();
  c.pixels = y.numel() / c.out;
  c.tiles = ceil_div(c.pixels, kPixels);
  c.x_align = align_of(c.x, c.in);
  c.weight_align = align_of(c.weight, c.in);
  c.y_align = align_of(c.y, c.out);
  const cudaStream_t stream = current_stream(on.x);
  // blocks of outputs as even as can be
  switch (ceil_div(ceil_div(c.out, ceil_div(c.out, kMaxOutputs)), 16)) {
    case 1:
      launch_by_size<16>(c, stream);
      break;
    case 2:
      launch_by_size<32>(c, stream);
      break;
    case 3:
      launch_by_size<48>(c, stream);
      break;
    default:
      launch_by_size<64>(c, stream);
  }
  return y;
}

}  // namespace
}  // namespace vitkd::int8

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("int8_pwconv", TORCH_BOX(&vitkd::int8::int8_pwconv));
}
