// What encode.cpp hands to the vector kernels of one instruction set.
//
// All of the encoding ops walk over tiles of kEncodeTile positions of one image. A tile is kept as
// [channels][kEncodeTile] (positions contiguous) in the second-level cache, and every product with the codewords is
// made while it is there. `codewords` and `grad` are packed as [channels][padded], with the codes contiguous and padded
// with zeros to a multiple of kEncodePad.
//
// Tiles are grouped in chunks that depend on the shape alone; each chunk has its own partial sums, which encode.cpp
// adds in order, so that results do not depend on the number of threads.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace rendseg {

constexpr int64_t kEncodeTile = 96;
constexpr int64_t kEncodePad = 16;

// A tensor of any strides (in elements) indexed by image, position and channel (or code).
struct EncodeView {
  void* data = nullptr;
  c10::ScalarType dtype = c10::ScalarType::Float;
  int64_t image = 0, position = 0, channel = 0;
};

// T is the type of the arithmetic: float, or double when an input is.
template <typename T>
struct EncodeTask {
  int64_t batch = 0, positions = 0, channels = 0, codes = 0, padded = 0;
  int64_t chunks = 0, chunk_tiles = 0;  // chunks of one image; tiles of one chunk

  EncodeView x;                  // [B,M,D]
  const T* codewords = nullptr;  // [D][padded]
  const T* scale = nullptr;      // [padded]
  const T* grad = nullptr;       // [B][D][padded]: of the result [B,K,D]

  EncodeView map;      // [B,M,K]: assignment, or gradient of scaled_l2
  EncodeView map_out;  // [B,M,K]: scaled_l2, or gradient of the assignment
  EncodeView x_grad;   // [B,M,D]

  // Partial sums of each chunk, [B * chunks] of each
  T* sum_residual = nullptr;  // [D][padded]: of weight * (x - codeword)
  T* sum_assigned = nullptr;  // [padded]: of the assignment
  T* sum_scale = nullptr;     // [padded]: gradient of the scale
};

// Each member works on the chunks [begin, end) of batch * chunks.
#define RENDSEG_DECLARE_ENCODE_KERNELS(isa)                                                \
  namespace isa {                                                                          \
  template <typename T>                                                                    \
  struct EncodeKernels {                                                                   \
    static void encode(const EncodeTask<T>& task, int64_t begin, int64_t end);             \
    static void encode_backward(const EncodeTask<T>& task, int64_t begin, int64_t end);    \
    static void scaled_l2(const EncodeTask<T>& task, int64_t begin, int64_t end);          \
    static void scaled_l2_backward(const EncodeTask<T>& task, int64_t begin, int64_t end); \
    static void aggregate(const EncodeTask<T>& task, int64_t begin, int64_t end);          \
    static void aggregate_backward(const EncodeTask<T>& task, int64_t begin, int64_t end); \
  };                                                                                       \
  }
RENDSEG_DECLARE_ENCODE_KERNELS(baseline)
RENDSEG_DECLARE_ENCODE_KERNELS(avx2)
RENDSEG_DECLARE_ENCODE_KERNELS(avx512)
#undef RENDSEG_DECLARE_ENCODE_KERNELS

}  // namespace rendseg
