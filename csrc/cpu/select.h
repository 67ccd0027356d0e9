// Selection of the k smallest keys of a map: exact, ascending in index, ties at the threshold to the smallest indices,
// the same for any number of threads. Shared by uncertain_points, sample_uncertain_points, subdivide and refine.
#pragma once

#include <cstdint>

#include "../math/radix_key.h"

namespace rendseg {

// Adds the first-pass histogram of `keys` to `histogram[kHistogramBins]`. Keys equal to kNeverSelected are counted too.
void add_histogram(const uint32_t* keys, int64_t size, uint32_t* histogram);

// Writes the indices of the `k` smallest of `size` keys, ascending. Needs 0 <= k <= size < 2^32 and keys < 2^31.
// Threaded, unless called inside a parallel region.
void select_smallest(const uint32_t* keys, int64_t size, int64_t k, int64_t* indices);

// The same with a ready first pass: `histogram[histogram_bin(key)]` counts every key, except that keys equal to
// kNeverSelected may be missing when at least `k` others are there.
void select_smallest(const uint32_t* keys, int64_t size, int64_t k, int64_t* indices, const uint32_t* histogram);

// Centres (x, y) of the cells `indices[count]` of an H x W grid into `xy[count][2]`.
void cell_centres(const int64_t* indices, int64_t count, int64_t height, int64_t width, float* xy);

}  // namespace rendseg
