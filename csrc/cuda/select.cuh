// Selection of the k smallest keys of each map: exact, ascending in index, ties at the threshold to the smallest
// indices, the same bits in every run. Shared by uncertain_points, subdivide and refine.
//
//   keys[images, cells] uint32 below 2^31 -> indices[images, k] int64, coords[images, k, 2] float
//
// A map of up to 16,384 cells is selected by one block, which holds its keys in shared memory (64 KB). A larger one is
// cut into chunks of 8,192 keys, a block of 512 threads to each, 16 keys to a thread:
//
//   key    30        20 19         9 8        0     the bin of a histogram is made of 11 bits of the key
//          | 1st digit | 2nd digit  |  rest  |
//
//   select_histogram_kernel   only if the maker of the keys has not counted their first digits
//   select_threshold_kernel   first pass. The bin of the threshold is found in the histogram of the first digits. Each
//                             block counts its keys below that bin and gathers those in it, the candidates. The last
//                             block of the image to arrive searches these for the threshold and turns the counts into
//                             the place of every chunk in the output
//   select_threshold_kernel   second pass, from 65,536 cells on; where the threshold is known, it returns at once.
//                             Where too many keys shared the bin, the first pass counted them by their second digit
//                             instead, and this one does the same with that histogram
//   select_emit_kernel        reads the keys once more, by then from L2, and writes in order
//
// A bin whose keys are all equal (flat maps) is recognised and needs neither search nor second pass. Only where too
// many keys agree in 22 bits and are not equal does the last block go through the map alone.
//
// Memory of an image, bytes: two histograms of 8,192 and a state of 40, all zero at first; 8 for each chunk and one
// more; 8 for each candidate, of which there are at most cells / 8 and 32,768.
#pragma once

#include "device.cuh"

#include "../math/radix_key.h"
#include "block_select.cuh"
#include "scratch.h"

namespace rendseg {

struct SelectArgs {
  const uint32_t* keys;  // [images, cells], each below 2^31: radix_key.h, small is uncertain
  uint32_t* histograms;  // [images, kHistogramBins] of the keys (kNeverSelected may be missing when at least k others
                         // are there, none of which shares its bin), or null: counted here
  void* zeroed;          // select_zeroed_bytes(images, cells), all zero
  void* workspace;       // select_workspace_bytes(images, cells); the three at multiples of 16 bytes
  int64_t images, cells, k;  // 0 < k <= cells < 2^32
  int64_t height, width;     // cells = height * width
  // Where keys are given for some gaps only (subdivide_labels.cuh; the map is then larger than kSmallMap): the others
  // count as kNeverSelected and are not read. Else null.
  const uint16_t* bounds;  // [images, height / 2 + 1, width / 2 + 1]; given where at most the limit, or kNoBound
  const uint32_t* limits;  // [images]
  int64_t* indices;        // [images, k], ascending
  float* coords;           // [images, k, 2], centres of the cells, or null
};

// Maps up to this size are selected by one block each; their histogram is not looked at.
constexpr int64_t kSmallMap = 16384;
inline bool select_reads_histogram(int64_t cells) { return cells > kSmallMap; }

// Up to this size one block goes through a map quickly enough to make a second pass not worth its launch.
constexpr int64_t kSinglePassMap = 65536;

constexpr int kSelectThreads = 512;
constexpr int kRowsPerWarp = 16;                                        // rows of 32 keys, one to a lane
constexpr int64_t kChunkKeys = int64_t{kSelectThreads} * kRowsPerWarp;  // 8192
constexpr uint32_t kNoKey = 0xffffffffu;                                // beyond the end of a map
constexpr uint16_t kNoBound = 0xffff;                                   // beyond any limit

// Of one image, between the kernels. Starts as zeros.
struct SelectState {
  unsigned arrived;                   // blocks that are through
  uint32_t gathered;                  // candidates so far
  uint32_t largest, largest_flipped;  // of the keys in the bin; flipped: 0x7fffffff minus the key
  uint32_t prefix, wanted;            // for the second pass: bits of the threshold, keys to select of those with them
  uint32_t found, reserved;           // whether the threshold is known
  KeyThreshold threshold;
};

// Keys of a chunk, or of the chunks before it: below the threshold in the upper half, equal to it in the lower.
using SelectCount = unsigned long long;
constexpr SelectCount kOneBelow = SelectCount{1} << 32;

// Where things lie: the first three in the zeroed part, the others in the workspace. A small map needs none of it.
struct SelectPlan {
  int64_t chunks = 0, capacity = 0;  // chunks per image, candidates per image
  Part<SelectState> states;
  Part<uint32_t> second_digits, first_digits;
  Part<SelectCount> counts;
  Part<uint32_t> candidate_keys, candidate_chunks;
  int64_t zeroed_bytes = 0, workspace_bytes = 0;

  SelectPlan(int64_t images, int64_t cells) {
    if (cells <= kSmallMap) return;
    chunks = (cells + kChunkKeys - 1) / kChunkKeys;
    capacity = cells / 8 < 32768 ? cells / 8 : 32768;
    Layout<128> zeroed, workspace;
    states = zeroed.add<SelectState>(images);
    second_digits = zeroed.add<uint32_t>(images * kHistogramBins);
    first_digits = zeroed.add<uint32_t>(images * kHistogramBins);
    counts = workspace.add<SelectCount>(images * (chunks + 1));
    candidate_keys = workspace.add<uint32_t>(images * capacity);
    candidate_chunks = workspace.add<uint32_t>(images * capacity);
    zeroed_bytes = zeroed.bytes();
    workspace_bytes = workspace.bytes();
  }
};

inline int64_t select_zeroed_bytes(int64_t images, int64_t cells) { return SelectPlan(images, cells).zeroed_bytes; }
inline int64_t select_workspace_bytes(int64_t images, int64_t cells) {
  return SelectPlan(images, cells).workspace_bytes;
}

// What the kernels see.
struct SelectMaps {
  const uint32_t* keys;          // [images, cells]
  const uint32_t* first_digits;  // [images, kHistogramBins]: bits 30..20 of the keys
  uint32_t* second_digits;       // [images, kHistogramBins]: bits 19..9 of the keys in the bin of the threshold
  SelectState* states;           // [images]
  SelectCount* counts;           // [images, chunks + 1]
  uint32_t* candidate_keys;      // [images, capacity]
  uint32_t* candidate_chunks;    // [images, capacity]
  uint32_t cells, k, chunks, capacity;
  const uint16_t* bounds;  // see SelectArgs
  const uint32_t* limits;
  uint32_t width;
};

// The keys of an image.
struct KeyMap {
  const uint32_t* keys;
  const uint16_t* bounds;  // null: all are given
  uint32_t limit, width, cells;

  __device__ KeyMap(const SelectMaps& maps, uint32_t image)
      : keys(maps.keys + int64_t{image} * maps.cells), bounds(nullptr), limit(0), width(maps.width), cells(maps.cells) {
    if (maps.bounds == nullptr) return;
    const uint32_t height = cells / width;
    bounds = maps.bounds + int64_t{image} * (height / 2 + 1) * (width / 2 + 1);
    limit = maps.limits[image];
  }
  // Output 2 g - 1 or 2 g of a row or column lies in gap g.
  __device__ bool given(uint32_t row, uint32_t column) const {
    const uint16_t bound = bounds[(row + 1) / 2 * (width / 2 + 1) + (column + 1) / 2];
    return bound == kNoBound || bound <= limit;
  }
  __device__ uint32_t operator()(uint32_t i) const {
    return bounds == nullptr || given(i / width, i % width) ? keys[i] : kNeverSelected;
  }
};

struct SelectOutput {
  int64_t* indices;  // [images, k]
  float* coords;     // [images, k, 2] or null
  int64_t k;
  uint32_t height, width;

  __device__ void write(int64_t image, uint32_t position, uint32_t index) const {
    const int64_t at = image * k + position;
    indices[at] = index;
    if (coords == nullptr) return;
    const uint32_t row = index / width, col = index - row * width;
    Vec<float, 2> centre;
    centre[0] = (static_cast<float>(col) + 0.5f) / static_cast<float>(width);
    centre[1] = (static_cast<float>(row) + 0.5f) / static_cast<float>(height);
    store_vec(coords + 2 * at, centre);
  }
};

// This thread's keys of a chunk. A warp holds consecutive rows of 32.
struct ChunkKeys {
  uint32_t key[kRowsPerWarp];
};

__device__ inline ChunkKeys load_chunk(const KeyMap& map, uint32_t chunk) {
  const int64_t begin = chunk * kChunkKeys;
  const int length = static_cast<int>(min(int64_t{map.cells} - begin, kChunkKeys));
  const int first = warp_id() * kRowsPerWarp * kWarp + lane_id();
  const uint32_t* from = map.keys + begin;
  unsigned given = 0xffffffffu;  // bit i: that of row i
  if (map.bounds != nullptr) {
    given = 0;
    const uint32_t at = static_cast<uint32_t>(begin) + first;
    uint32_t row = at / map.width, column = at - row * map.width;
    RENDSEG_UNROLL
    for (int i = 0; i < kRowsPerWarp; ++i) {
      if (first + i * kWarp < length && map.given(row, column)) given |= 1u << i;
      column += kWarp;
      while (column >= map.width) column -= map.width, ++row;
    }
  }
  ChunkKeys keys;
  RENDSEG_UNROLL
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int at = first + i * kWarp;
    keys.key[i] = at >= length ? kNoKey : (given >> i & 1u) != 0 ? from[at] : kNeverSelected;
  }
  return keys;
}

// Adds the non-zero bins of a histogram in shared memory to one in global memory.
__device__ inline void flush_histogram(const uint32_t* from, uint32_t* to) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kHistogramBins; bin += static_cast<int>(blockDim.x)) {
    const uint32_t count = from[bin];
    if (count > 0) atomicAdd(to + bin, count);
  }
}

__device__ inline void clear_histogram(uint32_t* histogram) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kHistogramBins; bin += static_cast<int>(blockDim.x)) {
    histogram[bin] = 0;
  }
}

// For producers that did not count.
static __global__ void __launch_bounds__(kSelectThreads)
    select_histogram_kernel(SelectMaps maps, uint32_t* histograms) {
  RENDSEG_SHARED(uint32_t[kHistogramBins], histogram);
  const uint32_t image = blockIdx.x / maps.chunks, chunk = blockIdx.x % maps.chunks;
  const ChunkKeys mine = load_chunk(KeyMap(maps, image), chunk);
  clear_histogram(histogram);
  __syncthreads();
  RENDSEG_UNROLL
  for (int row = 0; row < kRowsPerWarp; ++row) {
    add_to_histogram(histogram, histogram_bin(mine.key[row]) % kHistogramBins, mine.key[row] != kNoKey);
  }
  __syncthreads();
  flush_histogram(histogram, histograms + int64_t{image} * kHistogramBins);
}

// Adds the candidates to the counts of their chunks, now that the threshold is known.
__device__ inline void count_candidates(const uint32_t* keys, const uint32_t* chunks, uint32_t count,
                                        const KeyThreshold& threshold, SelectCount* counts) {
  constexpr uint32_t kBatch = 4;
  for (uint32_t first = threadIdx.x; first < count; first += kBatch * kSelectThreads) {
    uint32_t key[kBatch], chunk[kBatch];
    RENDSEG_UNROLL
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t i = first + j * kSelectThreads;
      key[j] = i < count ? __ldcg(keys + i) : kNoKey;
      chunk[j] = i < count ? __ldcg(chunks + i) : 0;
    }
    RENDSEG_UNROLL
    for (uint32_t j = 0; j < kBatch; ++j) {
      if (key[j] < threshold.key) {
        atomicAdd(counts + chunk[j], kOneBelow);
      } else if (key[j] == threshold.key) {
        atomicAdd(counts + chunk[j], SelectCount{1});
      }
    }
  }
}

// The same from the map itself, a chunk at a time to each warp.
__device__ inline void count_map(const KeyMap& map, uint32_t chunks, const KeyThreshold& threshold,
                                 SelectCount* counts) {
  for (uint32_t chunk = static_cast<uint32_t>(warp_id()); chunk < chunks; chunk += kSelectThreads / kWarp) {
    const int64_t begin = chunk * kChunkKeys, end = min(int64_t{map.cells}, begin + kChunkKeys);
    uint32_t below = 0, equal = 0;
    for (int64_t i = begin + lane_id(); i < end; i += kWarp) {
      const uint32_t key = map(static_cast<uint32_t>(i));
      below += key < threshold.key;
      equal += key == threshold.key;
    }
    below = __reduce_add_sync(kAllLanes, below);
    equal = __reduce_add_sync(kAllLanes, equal);
    if (lane_id() == 0) counts[chunk] = below * kOneBelow + equal;
  }
}

// Counts of the chunks into counts of all chunks before; counts[chunks] receives the total.
__device__ inline void scan_counts(SelectCount* counts, uint32_t chunks) {
  RENDSEG_SHARED(SelectCount[kWarp + 1], scratch);
  SelectCount before = 0;
  for (uint32_t first = 0; first < chunks; first += kSelectThreads) {
    const uint32_t chunk = first + threadIdx.x;
    SelectCount total;
    const SelectCount mine = chunk < chunks ? __ldcg(counts + chunk) : 0;
    const SelectCount of_pass = block_exclusive_scan(mine, total, scratch);
    if (chunk < chunks) counts[chunk] = before + of_pass;
    before += total;
  }
  if (threadIdx.x == 0) counts[chunks] = before;
}

// Keys [low, low + width).
struct KeyRange {
  uint32_t low, width;
  __device__ bool has(uint32_t key) const { return key - low < width; }
};

// This thread's keys in the bin of the threshold, with their chunk, from `place` on.
__device__ inline void put_candidates(const ChunkKeys& mine, const KeyRange& bin, uint32_t chunk, uint32_t place,
                                      uint32_t capacity, uint32_t* keys, uint32_t* chunks) {
  RENDSEG_UNROLL
  for (int row = 0; row < kRowsPerWarp; ++row) {
    if (bin.has(mine.key[row]) && place < capacity) {
      keys[place] = mine.key[row];
      chunks[place] = chunk;
      ++place;
    }
  }
}

// Of keys that are too many to gather: the largest and the smallest, and, unless this is the last pass, the histogram
// of their next digits.
__device__ inline void count_crowded(const ChunkKeys& mine, const KeyRange& bin, bool last, BlockSelectScratch& scratch,
                                     uint32_t* next_digits, SelectState& state) {
  clear_histogram(scratch.histogram);
  if (threadIdx.x == 0) scratch.warp_below[0] = scratch.warp_equal[0] = 0;
  __syncthreads();
  uint32_t largest = 0, largest_flipped = 0;
  RENDSEG_UNROLL
  for (int row = 0; row < kRowsPerWarp; ++row) {
    const uint32_t key = mine.key[row];
    if (!last) {
      add_to_histogram(scratch.histogram, (key >> (kHistogramShift - 11)) % kHistogramBins, bin.has(key));
    }
    if (bin.has(key)) {
      largest = max(largest, key);
      largest_flipped = max(largest_flipped, 0x7fffffffu - key);
    }
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  largest_flipped = __reduce_max_sync(kAllLanes, largest_flipped);
  if (lane_id() == 0) {
    atomicMax(&scratch.warp_below[0], largest);
    atomicMax(&scratch.warp_equal[0], largest_flipped);
  }
  __syncthreads();
  if (!last) flush_histogram(scratch.histogram, next_digits);
  if (threadIdx.x == 0) {
    atomicMax(&state.largest, scratch.warp_below[0]);
    atomicMax(&state.largest_flipped, scratch.warp_equal[0]);
  }
}

// One block per chunk. `pass` is 0 or 1; after the `last` one the threshold and the counts before each chunk are known.
static __global__ void __launch_bounds__(kSelectThreads) select_threshold_kernel(SelectMaps maps, int pass, bool last) {
  RENDSEG_SHARED(BlockSelectScratch, scratch);
  RENDSEG_SHARED(uint32_t, first_place);
  const uint32_t image = blockIdx.x / maps.chunks, chunk = blockIdx.x % maps.chunks;
  SelectState& state = maps.states[image];
  if (pass == 1 && state.found != 0) return;
  const KeyMap map(maps, image);
  const ChunkKeys mine = load_chunk(map, chunk);  // under way during the search

  // The bin of the threshold: keys [low, low + width), the smallest `wanted` of which are selected.
  const uint32_t* digits = (pass == 0 ? maps.first_digits : maps.second_digits) + int64_t{image} * kHistogramBins;
  const uint32_t in_prefix = pass == 0 ? maps.k : state.wanted;
  const HistogramCut cut = find_cut(digits, kHistogramBins, in_prefix, scratch);
  const int free_bits = pass == 0 ? kHistogramShift : kHistogramShift - 11;
  const uint32_t prefix = (pass == 0 ? 0 : state.prefix << 11) | cut.bin;
  const uint32_t low = prefix << free_bits, width = 1u << free_bits;
  const uint32_t wanted = in_prefix - cut.below;
  const bool whole = wanted == cut.inside;
  const bool gather = !whole && cut.inside <= maps.capacity;
  const bool crowded = !whole && !gather;

  // At most 8192 of each in a block: counted together, in 16 bits each.
  uint32_t both = 0, total;
  RENDSEG_UNROLL
  for (int row = 0; row < kRowsPerWarp; ++row) {
    both += static_cast<uint32_t>(mine.key[row] < low) + (static_cast<uint32_t>(mine.key[row] - low < width) << 16);
  }
  const uint32_t before = block_exclusive_scan(both, total, scratch.scan);
  const uint32_t below = total & 0xffffu, inside = total >> 16;
  SelectCount* counts = maps.counts + int64_t{image} * (maps.chunks + 1);
  uint32_t* candidate_keys = maps.candidate_keys + int64_t{image} * maps.capacity;
  uint32_t* candidate_chunks = maps.candidate_chunks + int64_t{image} * maps.capacity;
  if (threadIdx.x == 0) {
    counts[chunk] = (below + (whole ? inside : 0)) * kOneBelow + (crowded ? inside : 0);
    if (gather && inside > 0) first_place = atomicAdd(&state.gathered, inside);
  }
  if (gather && inside > 0) {
    __syncthreads();
    put_candidates(mine, {low, width}, chunk, first_place + (before >> 16), maps.capacity, candidate_keys,
                   candidate_chunks);
  }
  if (crowded && inside > 0) {
    count_crowded(mine, {low, width}, last, scratch, maps.second_digits + int64_t{image} * kHistogramBins, state);
  }
  if (!last_block_to_arrive(&state.arrived, maps.chunks)) return;

  // The rest is for the last block of the image. What other blocks wrote is read past the first-level cache.
  KeyThreshold threshold;
  if (whole) {
    threshold = {low + width, 0};
  } else if (gather) {
    const auto candidate = [&](uint32_t i) { return __ldcg(candidate_keys + i); };
    threshold = block_refine_threshold(candidate, cut.inside, prefix, free_bits, wanted, scratch);
    count_candidates(candidate_keys, candidate_chunks, cut.inside, threshold, counts);
  } else {
    const uint32_t largest = __ldcg(&state.largest), smallest = 0x7fffffffu - __ldcg(&state.largest_flipped);
    if (largest == smallest) {
      threshold = {largest, wanted};  // and `counts` are right as they are
    } else if (!last) {
      __syncthreads();  // all have read the state
      if (threadIdx.x == 0) {
        state.prefix = prefix;
        state.wanted = wanted;
        state.largest = state.largest_flipped = 0;
      }
      return;
    } else {
      threshold = block_refine_threshold(map, maps.cells, prefix, free_bits, wanted, scratch);
      count_map(map, maps.chunks, threshold, counts);
    }
  }
  __threadfence();
  __syncthreads();
  scan_counts(counts, maps.chunks);
  if (threadIdx.x == 0) {
    state.threshold = threshold;
    state.found = 1;
  }
}

// One block per chunk.
static __global__ void __launch_bounds__(kSelectThreads) select_emit_kernel(SelectMaps maps, SelectOutput out) {
  RENDSEG_SHARED(BlockSelectScratch, scratch);
  const uint32_t image = blockIdx.x / maps.chunks, chunk = blockIdx.x % maps.chunks;
  const SelectCount* counts = maps.counts + int64_t{image} * (maps.chunks + 1) + chunk;
  const KeyThreshold threshold = maps.states[image].threshold;
  const KeyRanks before{static_cast<uint32_t>(counts[0] >> 32), static_cast<uint32_t>(counts[0])};
  const KeyRanks after{static_cast<uint32_t>(counts[1] >> 32), static_cast<uint32_t>(counts[1])};
  if (before.below == after.below && min(before.equal, threshold.ties) == min(after.equal, threshold.ties)) return;
  const ChunkKeys mine = load_chunk(KeyMap(maps, image), chunk);
  KeyRanks count{0, 0};
  RENDSEG_UNROLL
  for (int row = 0; row < kRowsPerWarp; ++row) {
    count.below += mine.key[row] < threshold.key;
    count.equal += mine.key[row] == threshold.key;
  }
  count = {__reduce_add_sync(kAllLanes, count.below), __reduce_add_sync(kAllLanes, count.equal)};
  KeyRanks ranks = ranks_before_warp(count, scratch);
  if (count.below + count.equal == 0) return;
  ranks.below += before.below;
  ranks.equal += before.equal;
  const uint32_t first = static_cast<uint32_t>(chunk * kChunkKeys) + (warp_id() * kRowsPerWarp) * kWarp + lane_id();
  RENDSEG_UNROLL
  for (int row = 0; row < kRowsPerWarp; ++row) {
    emit_row(mine.key[row], first + row * kWarp, threshold, ranks,
             [&](uint32_t position, uint32_t index) { out.write(image, position, index); });
  }
}

// One block per image, with its keys in shared memory.
static __global__ void __launch_bounds__(1024)
    select_small_kernel(const uint32_t* keys, uint32_t cells, SelectOutput out) {
  RENDSEG_DYNAMIC_SHARED(memory);
  RENDSEG_SHARED(BlockSelectScratch, scratch);
  uint32_t* const held = reinterpret_cast<uint32_t*>(memory);
  const int64_t image = blockIdx.x;
  const uint32_t* map = keys + image * cells;
  for (uint32_t i = threadIdx.x; i < cells; i += blockDim.x) held[i] = map[i];
  __syncthreads();
  const auto key_at = [&](uint32_t i) { return held[i]; };
  const KeyThreshold threshold = block_radix_threshold(key_at, cells, static_cast<uint32_t>(out.k), scratch);
  block_emit(key_at, cells, threshold, scratch,
             [&](uint32_t position, uint32_t index) { out.write(image, position, index); });
}

template <typename Launch>
void run_select(Launch& launch, const SelectArgs& args) {
  const SelectOutput out{args.indices, args.coords, args.k, static_cast<uint32_t>(args.height),
                         static_cast<uint32_t>(args.width)};
  const uint32_t cells = static_cast<uint32_t>(args.cells);
  if (args.cells <= kSmallMap) {
    launch({args.images, args.cells <= 2048 ? 256 : 1024, args.cells * int64_t{sizeof(uint32_t)}}, select_small_kernel,
           args.keys, cells, out);
    return;
  }
  const SelectPlan plan(args.images, args.cells);
  uint32_t* const first_digits = args.histograms != nullptr ? args.histograms : plan.first_digits.in(args.zeroed);
  const SelectMaps maps{args.keys,
                        first_digits,
                        plan.second_digits.in(args.zeroed),
                        plan.states.in(args.zeroed),
                        plan.counts.in(args.workspace),
                        plan.candidate_keys.in(args.workspace),
                        plan.candidate_chunks.in(args.workspace),
                        cells,
                        static_cast<uint32_t>(args.k),
                        static_cast<uint32_t>(plan.chunks),
                        static_cast<uint32_t>(plan.capacity),
                        args.bounds,
                        args.limits,
                        static_cast<uint32_t>(args.width)};
  const LaunchShape shape{args.images * plan.chunks, kSelectThreads};
  if (args.histograms == nullptr) {
    launch(shape, select_histogram_kernel, maps, first_digits);
  }
  const bool single = args.cells <= kSinglePassMap;
  launch(shape, select_threshold_kernel, maps, 0, single);
  if (!single) launch(shape, select_threshold_kernel, maps, 1, true);
  launch(shape, select_emit_kernel, maps, out);
}

}  // namespace rendseg
