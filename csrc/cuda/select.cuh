// Selection of the k smallest keys of each map: exact, ascending in index, ties at the threshold to the smallest
// indices, the same bits in every run. Shared by uncertain_points, subdivide and refine.
#pragma once

#include "device.cuh"

#include "../math/radix_key.h"
#include "block_select.cuh"

namespace rendseg {

struct SelectArgs {
  const uint32_t* keys;  // [images, cells], each below 2^31: radix_key.h, small is uncertain
  uint32_t* histograms;  // [images, kHistogramBins] of the keys (kNeverSelected may be missing when at least k others
                         // are there, none of which shares its bin), or null: counted here
  void* workspace;       // select_workspace_bytes(images, cells, k), the first select_zeroed_bytes() of them zero
  int64_t images, cells, k;  // 0 < k <= cells < 2^32
  int64_t height, width;     // cells = height * width
  int64_t* indices;          // [images, k], ascending
  float* coords;             // [images, k, 2], centres of the cells, or null
};

// Maps up to this size are selected by one block each, straight from the keys: a histogram of them is not looked at.
constexpr int64_t kSmallMap = 16384;
inline bool select_reads_histogram(int64_t cells) { return cells > kSmallMap; }

inline int64_t select_workspace_bytes(int64_t images, int64_t cells, int64_t k);
inline int64_t select_zeroed_bytes(int64_t images, int64_t cells, int64_t k);

template <typename Launch>
void run_select(Launch& launch, const SelectArgs& args);

}  // namespace rendseg
