// CUDA kernels of sample_uncertain_points (PointRend, section 3.2). No Torch headers: g++ also compiles this file, and
// runs it on the CPU in tests/emulation/.
//
// A candidate is a random point; its key is the margin of the logits sampled there. One block per image draws the
// candidates, keeps their keys in shared memory, finds the key of the last one that is kept, and writes the kept ones
// in the order of drawing. Points are not stored in between: the generator is a function of the index of a draw, so
// they are drawn anew when they are written. Where there are too few images to fill the GPU, or keys beyond what shared
// memory holds, a first launch of many blocks leaves the keys in a workspace, and one block per image does the rest.
#pragma once

#include <cstdint>

#include "device.cuh"

#include "../math/bilinear.h"
#include "../math/margin.h"
#include "../math/philox4x32.h"
#include "../math/radix_key.h"
#include "block_select.cuh"

namespace rendseg {

template <typename T>
struct SampleArgs {
  const T* logits;  // [N,C,H,W], channel c of cell i of image n at n * stride_n + c * stride_c + i * stride_cell
  int64_t images, channels;
  int32_t height, width;
  int64_t stride_n, stride_c, stride_cell;
  const int64_t* class_index;  // [N], or null
  int64_t class_index_stride;
  bool border, align_corners;
  const float* given;  // [N, candidates + uniform, 2] in place of the draws, or null
  PhiloxSource philox;
  int64_t candidates, kept, uniform;  // of each image
  float* out;                         // [N, kept + uniform, 2]
};

struct DrawnPoint {
  float x, y;
};

struct DrawnPair {
  DrawnPoint at[2];
};

// --- draws -----------------------------------------------------------------------------------------------------------

// The draws 2 * pair and 2 * pair + 1 of image n: the four words of one counter, whose upper half numbers the pairs of
// the batch. (Where an odd number of given points ends, the last one stands in for the one after it.)
template <typename T>
__device__ inline DrawnPair draw_pair(const SampleArgs<T>& args, const PhiloxKey& philox, int64_t n, int64_t pair) {
  const int64_t total = args.candidates + args.uniform;
  if (args.given != nullptr) {
    const float* point = args.given + 2 * (n * total + 2 * pair);
    const int after = 2 * pair + 1 < total ? 2 : 0;
    return {{{point[0], point[1]}, {point[after], point[after + 1]}}};
  }
  const int64_t pairs = (total + 1) / 2;
  const PhiloxWords words = philox_4x32(philox.seed, philox.offset / 4, static_cast<uint64_t>(n * pairs + pair));
  return {{{uniform_from_bits(words.x), uniform_from_bits(words.y)},
           {uniform_from_bits(words.z), uniform_from_bits(words.w)}}};
}

template <typename T>
__device__ inline void write_draw(const SampleArgs<T>& args, const PhiloxKey& philox, int64_t n, int64_t draw,
                                  int64_t position) {
  const DrawnPair pair = draw_pair(args, philox, n, draw / 2);
  const DrawnPoint point = draw % 2 == 0 ? pair.at[0] : pair.at[1];
  const Vec<float, 2> xy{point.x, point.y};
  store_vec(args.out + 2 * (n * (args.kept + args.uniform) + position), xy);
}

// --- keys ------------------------------------------------------------------------------------------------------------

// The four cells around a point: near and far in x, the same a row down. Absent ones lie off the map and count as zero.
template <typename A>
struct CandidateTaps {
  int64_t cell;  // of the first
  A weight[4];
  bool present[4];
};

template <typename T>
__device__ inline CandidateTaps<Acc<T>> candidate_taps(const SampleArgs<T>& args, const DrawnPoint& point) {
  using A = Acc<T>;
  const AxisTaps<A> x = axis_taps(static_cast<A>(point.x), args.width, args.border, args.align_corners);
  const AxisTaps<A> y = axis_taps(static_cast<A>(point.y), args.height, args.border, args.align_corners);
  // A point without a neighbour along one axis (NaN among them) is all zero, not NaN.
  const bool lost = !((x.has_near | x.has_far) & (y.has_near | y.has_far));
  CandidateTaps<A> taps;
  taps.cell = static_cast<int64_t>(y.cell) * args.width + x.cell;
  taps.weight[0] = lost ? A(0) : x.near * y.near;
  taps.weight[1] = lost ? A(0) : x.far * y.near;
  taps.weight[2] = lost ? A(0) : x.near * y.far;
  taps.weight[3] = lost ? A(0) : x.far * y.far;
  taps.present[0] = x.has_near & y.has_near;
  taps.present[1] = x.has_far & y.has_near;
  taps.present[2] = x.has_near & y.has_far;
  taps.present[3] = x.has_far & y.has_far;
  return taps;
}

// One channel at a point, rounded to the dtype of the logits as the sampled map would be.
template <typename T>
__device__ inline Acc<T> sample_candidate(const T* __restrict__ channel, const CandidateTaps<Acc<T>>& taps,
                                          int64_t cell_step, int64_t row_step) {
  using A = Acc<T>;
  const T* cell = channel + taps.cell * cell_step;
  const A near_up = taps.present[0] ? widen(cell[0]) : A(0);
  const A far_up = taps.present[1] ? widen(cell[cell_step]) : A(0);
  const A near_down = taps.present[2] ? widen(cell[row_step]) : A(0);
  const A far_down = taps.present[3] ? widen(cell[row_step + cell_step]) : A(0);
  A sum = near_up * taps.weight[0];
  sum += far_up * taps.weight[1];
  sum += near_down * taps.weight[2];
  sum += far_down * taps.weight[3];
  return widen(narrow<T>(sum));
}

// Writes the keys of the candidates of image n, two at a time, `group` lanes (a power of two) to each two: a lane takes
// every group-th channel. `thread` counts on from a multiple of 32 in each warp; `threads` is how many share the image.
template <typename T>
__device__ inline void write_keys(const SampleArgs<T>& args, int64_t n, int64_t thread, int64_t threads, int group,
                                  uint32_t* keys) {
  using A = Acc<T>;
  const PhiloxKey philox = philox_key(args.philox);
  const T* logits = args.logits + n * args.stride_n;
  int64_t channels = args.channels;
  if (args.class_index != nullptr) {
    const int64_t chosen = args.class_index[n * args.class_index_stride];
    RENDSEG_DEVICE_ASSERT(chosen >= 0 && chosen < args.channels, "class_index must lie in [0, C)");
    logits += chosen * args.stride_c;
    channels = 1;
  }
  const int lane = lane_id(), in_group = lane & (group - 1);
  const int64_t row_step = args.width * args.stride_cell;
  // There are less than 2^30 pairs, and not many more threads. The bounds are those of the warp, so that all its lanes
  // meet in the shuffles.
  const auto pairs = static_cast<uint32_t>((args.candidates + 1) / 2), step = static_cast<uint32_t>(threads / group);
  for (auto warp_pair = static_cast<uint32_t>((thread - lane) / group); warp_pair < pairs; warp_pair += step) {
    const uint32_t mine = warp_pair + lane / group;
    const uint32_t pair = min(mine, pairs - 1);
    const DrawnPair points = draw_pair(args, philox, n, pair);
    for (int which = 0; which < 2; ++which) {  // one after the other: the state of both would fill the registers
      const CandidateTaps<A> taps = candidate_taps(args, which == 0 ? points.at[0] : points.at[1]);
      TopTwo<A> top;
      for (int64_t c = in_group; c < channels; c += group) {
        top.add(sample_candidate(logits + c * args.stride_c, taps, args.stride_cell, row_step));
      }
      for (int distance = group / 2; distance > 0; distance /= 2) {
        const A first = __shfl_xor_sync(kAllLanes, top.first, distance);
        const A second = __shfl_xor_sync(kAllLanes, top.second, distance);
        top.add(TopTwo<A>{first, second});
      }
      const uint32_t i = 2 * pair + which;
      if (mine < pairs && in_group == 0 && i < args.candidates) keys[i] = margin_key(top.margin(channels == 1));
    }
  }
}

constexpr int kSampleKeysThreads = 256;

// keys[N, candidates]; `parts` blocks to an image.
template <typename T>
__global__ void __launch_bounds__(kSampleKeysThreads, 3)
    sample_keys_kernel(SampleArgs<T> args, int64_t parts, int group, uint32_t* keys) {
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts;
  write_keys(args, n, part * blockDim.x + threadIdx.x, parts * blockDim.x, group, keys + n * args.candidates);
}

// --- selection -------------------------------------------------------------------------------------------------------

constexpr int kSamplePointsThreads = 768;  // 1024 would leave each 64 registers, too few on some GPUs

enum class SampleKeys {
  kNone,       // nothing is kept
  kMade,       // made here, in shared memory
  kCopied,     // ready in the workspace, and copied to shared memory
  kWorkspace,  // ready in the workspace, and read there
};

// All points of an image, one block each. workspace[N, candidates].
template <typename T>
__global__ void __launch_bounds__(kSamplePointsThreads)
    sample_points_kernel(SampleArgs<T> args, SampleKeys where, int group, uint32_t* workspace) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const int64_t n = blockIdx.x;
  const PhiloxKey philox = philox_key(args.philox);
  if (where != SampleKeys::kNone) {
    uint32_t* const ready = workspace + n * args.candidates;
    uint32_t* const keys = where == SampleKeys::kWorkspace ? ready : reinterpret_cast<uint32_t*>(memory);
    if (where == SampleKeys::kMade) write_keys(args, n, threadIdx.x, blockDim.x, group, keys);
    if (where == SampleKeys::kCopied) {
      for (int64_t i = threadIdx.x; i < args.candidates; i += blockDim.x) keys[i] = ready[i];
    }
    __syncthreads();
    RENDSEG_SHARED(BlockSelectScratch, scratch);
    const auto key_at = [&](uint32_t i) { return keys[i]; };
    const auto candidates = static_cast<uint32_t>(args.candidates);
    const KeyThreshold threshold = block_radix_threshold(key_at, candidates, static_cast<uint32_t>(args.kept), scratch);
    block_emit(key_at, candidates, threshold, scratch,
               [&](uint32_t position, uint32_t i) { write_draw(args, philox, n, i, position); });
  }
  for (int64_t i = threadIdx.x; i < args.uniform; i += blockDim.x) {
    write_draw(args, philox, n, args.candidates + i, args.kept + i);
  }
}

// --- host ------------------------------------------------------------------------------------------------------------

// How the work is shared out.
struct SamplePlan {
  SampleKeys where;
  int64_t parts;           // blocks to an image in the launch that only makes keys; 0: there is none
  int64_t workspace_keys;  // size of the workspace
  int group;               // lanes to a pair of candidates
  int threads;             // of a block per image
  int64_t shared_bytes;
};

constexpr int64_t kSampleStaticShared = 16 * 1024;  // more than the static shared memory of sample_points_kernel
constexpr int kMostLanesToAPair = 8;                // 32 bytes of adjacent float channels

inline int sample_threads(int64_t wanted, int most) {
  const int64_t whole_warps = (wanted + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(whole_warps < 128 ? 128 : whole_warps > most ? most : whole_warps);
}

template <typename Launch, typename T>
SamplePlan plan_samples(const Launch& launch, const SampleArgs<T>& args) {
  if (args.kept == 0) return {SampleKeys::kNone, 0, 0, 1, sample_threads(args.uniform, 256), 0};
  const int64_t channels = args.class_index == nullptr ? args.channels : 1;
  const int64_t pairs = (args.candidates + 1) / 2, processors = launch.processors();
  const int64_t bytes = args.candidates * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t room = launch.shared_limit() - kSampleStaticShared;
  // Adjacent channels are read by adjacent lanes. Planes are better read by one lane, unless that leaves lanes idle.
  int most = 1;
  while (most < kMostLanesToAPair && most < channels) most *= 2;
  const auto lanes_to_a_pair = [&](int64_t pairs_at_once, int64_t lanes) {
    int group = 1;
    while (group < most && ((channels > 1 && args.stride_c == 1) || pairs_at_once * group < lanes)) group *= 2;
    return group;
  };

  // One launch, where it fills half the GPU or is soon done.
  const bool small = args.candidates * channels <= 16384;
  if (bytes <= room && (2 * args.images >= processors || small)) {
    // Two blocks to a multiprocessor where their keys fit: one makes keys while the other selects.
    const int most_threads = 2 * (bytes + kSampleStaticShared) <= room && args.images > processors
                                 ? kSamplePointsThreads / 2
                                 : kSamplePointsThreads;
    const int group = lanes_to_a_pair(pairs, most_threads);
    return {SampleKeys::kMade, 0, 0, group, sample_threads(pairs * group, most_threads), bytes};
  }
  const int group = lanes_to_a_pair(args.images * pairs, processors * 1024);
  const int64_t needed = (pairs * group + kSampleKeysThreads - 1) / kSampleKeysThreads;
  const int64_t enough = (16 * processors + args.images - 1) / args.images;
  const int threads = sample_threads(args.candidates / 4, kSamplePointsThreads);
  const bool copied = bytes <= room;
  return {copied ? SampleKeys::kCopied : SampleKeys::kWorkspace,
          needed < enough ? needed : enough,
          args.images * args.candidates,
          group,
          threads,
          copied ? bytes : 0};
}

// workspace[plan.workspace_keys]
template <typename Launch, typename T>
void run_sample_uncertain_points(Launch& launch, const SampleArgs<T>& args, const SamplePlan& plan,
                                 uint32_t* workspace) {
  if (plan.parts > 0) {
    launch({args.images * plan.parts, kSampleKeysThreads}, sample_keys_kernel<T>, args, plan.parts, plan.group,
           workspace);
  }
  launch({args.images, plan.threads, plan.shared_bytes}, sample_points_kernel<T>, args, plan.where, plan.group,
         workspace);
}

}  // namespace rendseg
