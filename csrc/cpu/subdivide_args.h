// What the host side of subdivide hands to the kernels of each instruction set.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace rendseg {

struct SubdivideArgs {
  c10::ScalarType dtype;
  const void* source;  // logits[N,C,h,w], contiguous or channels_last
  bool channels_last;  // of source and fine
  void* fine;          // [N,C,H,W], or null when the upsampled logits are not wanted
  bool stream;         // rows of `fine` are aligned to vectors and too many to stay in the cache
  uint32_t* keys;      // [N,H,W]
  void* labels;        // [N,H,W] uint8 or int16, or null
  bool wide_labels;
  bool single;             // the margin is |logit of one channel|: C == 1, or class_index
  const int64_t* channel;  // [N] that channel, or null for channel 0
  uint32_t* histograms;    // [N][kHistogramBins]
  int64_t n, c, h, w, height, width;
  // Taps of every output column, in the arithmetic type; the tables are padded with their last entry to a multiple
  // of 64.
  const int32_t* lower;
  const int32_t* upper;
  const void* lower_weight;
  const void* upper_weight;
  int64_t scale;
  bool align_corners;
  // Work: bands of output rows and tiles of output columns.
  int64_t band_rows, band_shift, bands, tile_width, tiles;
};

constexpr int64_t kColumnPadding = 64;

// Bytes of scratch one worker needs, for the widest vectors.
inline int64_t subdivide_scratch_bytes(const SubdivideArgs& a) {
  const int64_t size = a.dtype == c10::ScalarType::Double ? 8 : 4;
  const int64_t rows = 2 * a.c * a.tile_width * size;       // two source rows, already interpolated along x
  const int64_t planes = a.c * (a.tile_width + 64) * size;  // one source row, widened or transposed
  const int64_t block = a.c * 64 * 8;                       // one block of outputs before it is transposed
  return rows + planes + block + 4 * 64;
}

}  // namespace rendseg
