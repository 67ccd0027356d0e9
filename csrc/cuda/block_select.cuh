// Selection of the k smallest keys by one block: a radix search for the threshold, then output in index order.
#pragma once

#include "device.cuh"

#include "../math/radix_key.h"

namespace rendseg {

// Selected are the keys below `key`, and of those equal to it the first `ties` in index order.
struct KeyThreshold {
  uint32_t key, ties;
};

// Where the k-th smallest falls: its bin, how many keys lie in the bins before, and how many in it.
struct HistogramCut {
  uint32_t bin, below, inside;
};

// In shared memory, 8.6 KB. Free for the next use when a function below returns.
struct alignas(16) BlockSelectScratch {
  uint32_t histogram[kHistogramBins];
  uint32_t scan[kWarp + 1];
  uint32_t warp_below[kWarp], warp_equal[kWarp];
  HistogramCut cut;
};

// Adds the bins of the lanes that count to a histogram in shared memory. All lanes of the warp take part; one that
// agrees, as on flat maps, adds once instead of waiting 32 times for the same bin.
__device__ inline void add_to_histogram(uint32_t* histogram, uint32_t bin, bool counts) {
  const unsigned lanes = __ballot_sync(kAllLanes, counts);
  if (lanes == 0) return;
  const int leader = __ffs(static_cast<int>(lanes)) - 1;
  const uint32_t first = __shfl_sync(kAllLanes, bin, leader);
  if (__all_sync(kAllLanes, !counts || bin == first)) {
    if (lane_id() == leader) atomicAdd(histogram + first, static_cast<uint32_t>(__popc(lanes)));
  } else if (counts) {
    atomicAdd(histogram + bin, 1u);
  }
}

// Finds the k-th smallest, 0 < k <= the sum of histogram[bins], which may lie in global or in shared memory, at a
// multiple of 16 bytes; `bins` is a multiple of 4. All threads take part and get the answer.
__device__ inline HistogramCut find_cut(const uint32_t* histogram, int bins, uint32_t k, BlockSelectScratch& scratch) {
  const int threads = static_cast<int>(blockDim.x);
  const int each = ((bins + threads - 1) / threads + 3) / 4 * 4;
  const int begin = min(bins, each * static_cast<int>(threadIdx.x)), end = min(bins, begin + each);
  uint32_t mine = 0, total;
  for (int bin = begin; bin < end; bin += 4) {
    const Vec<uint32_t, 4> four = load_vec<4>(histogram + bin);
    mine += four[0] + four[1] + four[2] + four[3];
  }
  uint32_t below = block_exclusive_scan(mine, total, scratch.scan);
  if (below < k && k - below <= mine) {  // one thread
    int bin = begin;
    uint32_t inside = histogram[bin];
    while (k - below > inside) {
      below += inside;
      inside = histogram[++bin];
    }
    scratch.cut = {static_cast<uint32_t>(bin), below, inside};
  }
  __syncthreads();
  return scratch.cut;
}

// Finds the threshold of the k smallest, 0 < k <= count, of those keys whose bits from `free_bits` up equal `prefix`;
// `count` counts all of key_at(0 .. count - 1). All threads take part and get the answer.
template <typename KeyAt>
__device__ KeyThreshold block_refine_threshold(const KeyAt& key_at, uint32_t count, uint32_t prefix, int free_bits,
                                               uint32_t k, BlockSelectScratch& scratch) {
  constexpr uint32_t kBatch = 8;
  const uint32_t step = blockDim.x;
  while (free_bits > 0) {
    const int digit_bits = min(free_bits, 11);
    const int shift = free_bits - digit_bits, bins = 1 << digit_bits;
    for (uint32_t bin = threadIdx.x; bin < static_cast<uint32_t>(bins); bin += step) scratch.histogram[bin] = 0;
    __syncthreads();
    for (uint64_t first = 0; first < count; first += kBatch * step) {
      uint32_t key[kBatch];
      RENDSEG_UNROLL
      for (uint32_t j = 0; j < kBatch; ++j) {  // all under way before the first is needed
        const uint64_t i = first + j * step + threadIdx.x;
        key[j] = i < count ? key_at(static_cast<uint32_t>(i)) : 0xffffffffu;
      }
      RENDSEG_UNROLL
      for (uint32_t j = 0; j < kBatch; ++j) {
        if (first + j * step >= count) break;
        add_to_histogram(scratch.histogram, (key[j] >> shift) & static_cast<uint32_t>(bins - 1),
                         key[j] >> free_bits == prefix);
      }
    }
    __syncthreads();
    const HistogramCut cut = find_cut(scratch.histogram, bins, k, scratch);
    k -= cut.below;
    prefix = (prefix << digit_bits) | cut.bin;
    free_bits = shift;
    if (k == cut.inside) return {(prefix + 1) << free_bits, 0};  // the whole bin
  }
  return {prefix, k};
}

// Finds the threshold of the k smallest of key_at(0 .. count - 1), 0 < k <= count; keys are below 2^31.
template <typename KeyAt>
__device__ KeyThreshold block_radix_threshold(const KeyAt& key_at, uint32_t count, uint32_t k,
                                              BlockSelectScratch& scratch) {
  return block_refine_threshold(key_at, count, 0, 31, k, scratch);
}

// How many keys below the threshold and equal to it come before.
struct KeyRanks {
  uint32_t below, equal;
};

// Calls write(position, index) for the selected of 32 consecutive keys, one to a lane; the key of a lane without one is
// 0xffffffff. `before` counts the keys before these, and moves on. All lanes take part.
template <typename Write>
__device__ inline void emit_row(uint32_t key, uint32_t index, const KeyThreshold& threshold, KeyRanks& before,
                                const Write& write) {
  const unsigned below = __ballot_sync(kAllLanes, key < threshold.key);
  const unsigned equal = __ballot_sync(kAllLanes, key == threshold.key);
  if ((below | equal) == 0) return;
  const unsigned lower_lanes = (1u << lane_id()) - 1u;
  const uint32_t below_rank = before.below + __popc(below & lower_lanes);
  const uint32_t equal_rank = before.equal + __popc(equal & lower_lanes);
  if (key < threshold.key || (key == threshold.key && equal_rank < threshold.ties)) {
    write(below_rank + min(equal_rank, threshold.ties), index);
  }
  before.below += __popc(below);
  before.equal += __popc(equal);
}

// Turns the counts of each warp into those of the warps before it. All threads take part.
__device__ inline KeyRanks ranks_before_warp(const KeyRanks& mine, BlockSelectScratch& scratch) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = lane_id(), warp = warp_id();
  __syncthreads();
  if (lane == 0) {
    scratch.warp_below[warp] = mine.below;
    scratch.warp_equal[warp] = mine.equal;
  }
  __syncthreads();
  const bool before = lane < warp && lane < warps;
  return {__reduce_add_sync(kAllLanes, before ? scratch.warp_below[lane] : 0u),
          __reduce_add_sync(kAllLanes, before ? scratch.warp_equal[lane] : 0u)};
}

// Calls write(position, i), positions counting up from 0 with i, for every selected one of key_at(0 .. count - 1). All
// threads take part.
template <typename KeyAt, typename Write>
__device__ void block_emit(const KeyAt& key_at, uint32_t count, const KeyThreshold& threshold,
                           BlockSelectScratch& scratch, const Write& write) {
  const uint32_t warps = blockDim.x / kWarp, rows = (count - 1) / kWarp + 1;
  const uint32_t rows_each = (rows - 1) / warps + 1;
  // 64 bits, since the keys of warps beyond the last may not be counted in 32.
  const uint64_t first_row = static_cast<uint64_t>(warp_id()) * rows_each;
  const uint64_t begin = min(static_cast<uint64_t>(count), first_row * kWarp);
  const uint64_t end = min(static_cast<uint64_t>(count), (first_row + rows_each) * kWarp);
  KeyRanks mine{0, 0};
  for (uint64_t i = begin + lane_id(); i < end; i += kWarp) {
    const uint32_t key = key_at(static_cast<uint32_t>(i));
    mine.below += key < threshold.key;
    mine.equal += key == threshold.key;
  }
  mine = {__reduce_add_sync(kAllLanes, mine.below), __reduce_add_sync(kAllLanes, mine.equal)};
  KeyRanks before = ranks_before_warp(mine, scratch);
  if (mine.below + mine.equal == 0) return;
  for (uint64_t first = begin; first < end; first += kWarp) {
    const uint64_t i = first + lane_id();
    const uint32_t key = i < end ? key_at(static_cast<uint32_t>(i)) : 0xffffffffu;
    emit_row(key, static_cast<uint32_t>(i), threshold, before, write);
  }
}

// The same where a call of write() costs much more than a look at a key, and few are selected: each warp first lists
// what it may write, in place of its keys, and then writes with all lanes. Uses the keys up; `count` is below 2^31.
template <typename Write>
__device__ void block_emit_listed(uint32_t* keys, uint32_t count, const KeyThreshold& threshold,
                                  BlockSelectScratch& scratch, const Write& write) {
  constexpr uint32_t kEqual = 1u << 31, kNone = 0xffffffffu;
  constexpr uint32_t kBatch = 4;
  const uint32_t warps = blockDim.x / kWarp, rows = (count - 1) / kWarp + 1;
  const uint32_t rows_each = (rows - 1) / warps + 1;
  const uint64_t first_row = static_cast<uint64_t>(warp_id()) * rows_each;
  const uint32_t begin = static_cast<uint32_t>(min(static_cast<uint64_t>(count), first_row * kWarp));
  const uint32_t end = static_cast<uint32_t>(min(static_cast<uint64_t>(count), (first_row + rows_each) * kWarp));
  const unsigned lower_lanes = (1u << lane_id()) - 1u;
  uint32_t* const list = keys + begin;  // never longer than the keys that were read
  uint32_t length = 0, equals = 0;
  for (uint32_t first = begin; first < end; first += kBatch * kWarp) {
    uint32_t key[kBatch];
    RENDSEG_UNROLL
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t i = first + j * kWarp + lane_id();
      key[j] = i < end ? keys[i] : kNone;
    }
    __syncwarp();  // the list may grow over these
    RENDSEG_UNROLL
    for (uint32_t j = 0; j < kBatch; ++j) {
      const bool equal = key[j] == threshold.key, wanted = equal || key[j] < threshold.key;
      const unsigned lanes = __ballot_sync(kAllLanes, wanted);
      equals += __popc(__ballot_sync(kAllLanes, equal));
      const uint32_t i = first + j * kWarp + lane_id();
      if (wanted) list[length + __popc(lanes & lower_lanes)] = i | (equal ? kEqual : 0);
      length += __popc(lanes);
    }
  }
  KeyRanks before = ranks_before_warp({length - equals, equals}, scratch);  // its barriers complete the list
  for (uint32_t first = 0; first < length; first += kWarp) {
    const uint32_t at = first + lane_id();
    const uint32_t entry = at < length ? list[at] : kNone;
    // A key on the same side of the threshold.
    const uint32_t key = entry == kNone ? kNone : (entry & kEqual) != 0 ? threshold.key : threshold.key - 1;
    emit_row(key, entry & ~kEqual, threshold, before, write);
  }
}

}  // namespace rendseg
