// What the kernels of the encoding ops share: tensors of any dtype and stride, packing of the codewords, and the sums
// of partial results. No Torch headers.
//
// B images, M positions, D channels, K codewords. T is the type of the arithmetic: double when an input is, else float.
// Codewords and the gradient of the result are packed as [D][padded], codes contiguous, padded with zeros.
//
// The positions of an image are cut into chunks that depend on the shape alone. Each chunk has its own partial sums,
// and these are added in a fixed order: results depend neither on the GPU nor on the order of its blocks.
#pragma once

#include "device.cuh"
#include "scratch.h"

#include "../strided.h"

namespace rendseg::encoding {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kPad = 4;  // codes move in fours

// f.operator()<X>(): one branch, the same for all threads, around a whole loop.
template <typename F>
__device__ inline void with_dtype(Dtype dtype, F&& f) {
  rendseg::with_dtype<half_t, bfloat16_t>(dtype, f);
}

// A tensor of any strides (in elements), indexed by image, position (or code) and channel (or code).
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t image = 0, position = 0, channel = 0;
};

template <typename X>
__device__ inline X* address(const View& view, int64_t image, int64_t position, int64_t channel) {
  return static_cast<X*>(view.data) + image * view.image + position * view.position + channel * view.channel;
}

// The arguments of every encoding kernel. What an op does not use stays null.
template <typename T>
struct Args {
  int64_t batch = 0, positions = 0, channels = 0, codes = 0;

  View x;           // [B,M,D]
  View codewords;   // [K,D] as position, channel
  View scale;       // [K] as position
  View grad;        // [B,K,D] as image, position, channel: of the result
  View map;         // [B,M,K]: assignment, or gradient of scaled_l2
  View map_out;     // [B,M,K]: scaled_l2, or gradient of the assignment
  View x_grad;      // [B,M,D]
  View out;         // [B,K,D]: the result; or [K,D], the gradient of the codewords
  View scale_grad;  // [K]

  // The plan, see plan()
  int64_t padded = 0;                   // codes, a multiple of kPad
  int64_t chunks = 0, chunk_tiles = 0;  // chunks of one image; tiles of one chunk
  int tile = 0, tile_log2 = 0;          // positions of a tile
  int block = 0;                        // channels in shared memory at a time
  int64_t row_stride = 0;               // of rows [tile][row_stride] of codes
  int64_t blocks = 0, shared_bytes = 0;

  // Scratch memory, see lay_out()
  T* packed_codewords = nullptr;  // [D][padded]
  T* packed_scale = nullptr;      // [padded]
  T* packed_grad = nullptr;       // [B][D][padded]
  T* rows = nullptr;              // [blocks][row arrays][tile][row_stride], where shared memory is too small for them
  T* sum_residual = nullptr;      // [B * chunks][D][padded]: of weight * (x - codeword)
  T* sum_assigned = nullptr;      // [B * chunks][padded]: of the assignment
  T* sum_scale = nullptr;         // [B * chunks][padded]: gradient of the scale
};

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// Four neighbouring codes; 16-byte loads.
template <typename T>
struct Four {
  T at[4];
};

template <typename T>
__device__ inline Four<T> load_four(const T* from) {
  constexpr int width = kVecWidth<T> < 4 ? kVecWidth<T> : 4;
  Four<T> four;
  RENDSEG_UNROLL
  for (int i = 0; i < 4; i += width) {
    const auto part = load_vec<width>(from + i);
    RENDSEG_UNROLL
    for (int j = 0; j < width; ++j) four.at[i + j] = part[j];
  }
  return four;
}

template <typename T>
__device__ inline void store_four(T* to, const Four<T>& four) {
  constexpr int width = kVecWidth<T> < 4 ? kVecWidth<T> : 4;
  RENDSEG_UNROLL
  for (int i = 0; i < 4; i += width) {
    Vec<T, width> part;
    RENDSEG_UNROLL
    for (int j = 0; j < width; ++j) part[j] = four.at[i + j];
    store_vec(to + i, part);
  }
}

template <typename T>
__device__ inline T read(const View& view, int64_t image, int64_t position, int64_t channel) {
  T value{};
  with_dtype(view.dtype,
             [&]<typename X>() { value = static_cast<T>(widen(*address<X>(view, image, position, channel))); });
  return value;
}

template <typename T>
__device__ inline void write(const View& view, int64_t image, int64_t position, int64_t channel, T value) {
  with_dtype(view.dtype, [&]<typename X>() {
    *address<X>(view, image, position, channel) = narrow<X>(static_cast<Acc<X>>(value));
  });
}

// --- packing

// Codewords, scale and gradient in the type of the arithmetic, with zeros behind the last code.
template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(Args<T> args) {
  const int64_t width = args.channels * args.padded;
  const int64_t tables = (args.packed_grad != nullptr ? args.batch : 0) + 1;
  const int64_t total = tables * width + args.padded;
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const int64_t k = i % args.padded, d = i / args.padded % args.channels, table = i / width;
    if (table == tables) {
      if (args.packed_scale != nullptr) args.packed_scale[k] = k < args.codes ? read<T>(args.scale, 0, k, 0) : T(0);
    } else if (table == 0) {
      args.packed_codewords[i] = k < args.codes ? read<T>(args.codewords, 0, k, d) : T(0);
    } else {
      args.packed_grad[i - width] = k < args.codes ? read<T>(args.grad, table - 1, k, d) : T(0);
    }
  }
}

// --- sums of partial results

// Of a block of kWarps warps: the sum over `members` of term(member), for the element of this lane, in a fixed order.
// The result is that of warp 0; all threads must take part.
template <typename T, typename F>
__device__ inline T sum_members(int64_t members, F&& term) {
  RENDSEG_SHARED(T[kWarps][kWarp], parts);
  T sum = 0;
  for (int64_t m = warp_id(); m < members; m += kWarps) sum += term(m);
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  T total = 0;
  RENDSEG_UNROLL
  for (int w = 0; w < kWarps; ++w) total += parts[w][lane_id()];
  __syncthreads();
  return total;
}

// out[b,k,d] = sum over the chunks of image b of sum_residual. One block for 32 elements of an image.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_encodings_kernel(Args<T> args, int64_t groups) {
  const int64_t width = args.channels * args.padded;
  for (int64_t item = blockIdx.x; item < args.batch * groups; item += gridDim.x) {
    const int64_t b = item / groups, e = item % groups * kWarp + lane_id();
    const T* partial = args.sum_residual + b * args.chunks * width + e;
    const T sum = sum_members<T>(args.chunks, [&](int64_t m) { return e < width ? partial[m * width] : T(0); });
    const int64_t k = e % args.padded, d = e / args.padded;
    if (warp_id() == 0 && e < width && k < args.codes) write(args.out, b, k, d, sum);
  }
}

// Gradient of the codewords: minus the sum over images and positions of a * grad + 2 s dL * (x - c), where either part
// may be absent; behind it that of the scale. One block for 32 elements.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_gradients_kernel(Args<T> args, int64_t groups) {
  const int64_t width = args.channels * args.padded, members = args.batch * args.chunks;
  for (int64_t item = blockIdx.x; item < groups; item += gridDim.x) {
    const int64_t e = item * kWarp + lane_id(), k = e % args.padded, d = e / args.padded;
    const bool is_codeword = e < width, is_scale = !is_codeword && d == args.channels && args.sum_scale != nullptr;
    const T twice = is_codeword && args.sum_residual != nullptr ? T(2) * args.packed_scale[k] : T(0);
    const T sum = sum_members<T>(members, [&](int64_t m) {
      T term = 0;
      if (is_scale) term = args.sum_scale[m * args.padded + k];
      if (is_codeword && args.sum_residual != nullptr) term = twice * args.sum_residual[m * width + e];
      if (is_codeword && args.sum_assigned != nullptr) {
        term = fused(args.sum_assigned[m * args.padded + k], args.packed_grad[m / args.chunks * width + e], term);
      }
      return term;
    });
    if (warp_id() != 0 || k >= args.codes) continue;
    if (is_codeword) write(args.out, 0, k, d, -sum);
    if (is_scale) write(args.scale_grad, 0, k, 0, sum);
  }
}

template <typename T, typename Launch>
void run_pack(Launch& launch, const Args<T>& args) {
  const int64_t tables = (args.packed_grad != nullptr ? args.batch : 0) + 1;
  const int64_t total = tables * args.channels * args.padded + args.padded;
  launch({blocks_for(total, kThreads), kThreads}, pack_kernel<T>, args);
}

template <typename T, typename Launch>
void run_sum_encodings(Launch& launch, const Args<T>& args) {
  const int64_t groups = (args.channels * args.padded + kWarp - 1) / kWarp;
  launch({blocks_for(args.batch * groups, 1), kThreads}, sum_encodings_kernel<T>, args, groups);
}

template <typename T, typename Launch>
void run_sum_gradients(Launch& launch, const Args<T>& args) {
  const int64_t groups = ((args.channels + 1) * args.padded + kWarp - 1) / kWarp;
  launch({blocks_for(groups, 1), kThreads}, sum_gradients_kernel<T>, args, groups);
}

}  // namespace rendseg::encoding
