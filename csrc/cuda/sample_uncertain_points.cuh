// CUDA kernels of sample_uncertain_points (PointRend, section 3.2). No Torch headers: g++ also compiles this file, and
// runs it on the CPU in tests/emulation/.
//
// A candidate is a random point; its key is the margin of the logits sampled there. One block per image draws the
// candidates, keeps their keys in shared memory, finds the key of the last one that is kept, and writes the kept ones
// in the order of drawing. Points are not stored in between: the generator is a function of the index of a draw, so
// they are drawn again when written. Images that would leave most of the GPU idle in a last round of blocks are
// shared out: several blocks leave the keys of one in a workspace, and the last of them to finish does the rest. Where
// there are too few images to fill the GPU, or keys beyond what shared memory holds, a first launch of many blocks
// leaves the keys in a workspace, and one block per image does the rest.
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
struct DrawArgs {
  const T* logits;  // [N,C,H,W], channel c of cell i of image n at n * stride_n + c * stride_c + i * stride_cell
  int64_t images, channels;
  int32_t height, width;
  int64_t stride_n, stride_c, stride_cell;
  const int64_t* class_index;  // [N], or null
  int64_t class_index_stride;
  const int64_t* image_index;  // [N], or null: mask n is in this one of `maps` images
  int64_t image_index_stride, maps;
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

// --- draws

// The draws 2 * pair and 2 * pair + 1 of image n: the four words of one counter, whose upper half numbers the pairs of
// the batch. (Where an odd number of given points ends, the last one stands in for the one after it.)
template <typename T>
__device__ inline DrawnPair draw_pair(const DrawArgs<T>& args, const PhiloxKey& philox, int64_t n, int64_t pair) {
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
__device__ inline void write_point(const DrawArgs<T>& args, int64_t n, int64_t position, const DrawnPoint& point) {
  const Vec<float, 2> xy{point.x, point.y};
  store_vec(args.out + 2 * (n * (args.kept + args.uniform) + position), xy);
}

// A kept candidate.
template <typename T>
__device__ inline void write_candidate(const DrawArgs<T>& args, const PhiloxKey& philox, int64_t n, uint32_t draw,
                                       uint32_t position) {
  const DrawnPair pair = draw_pair(args, philox, n, draw / 2);
  write_point(args, n, position, draw % 2 == 0 ? pair.at[0] : pair.at[1]);
}

// The draws after the candidates, all of which are kept, a pair to a thread of the `threads` that share the image.
template <typename T>
__device__ inline void write_uniform(const DrawArgs<T>& args, const PhiloxKey& philox, int64_t n, int64_t thread,
                                     int64_t threads) {
  const int64_t total = args.candidates + args.uniform;
  for (int64_t pair = args.candidates / 2 + thread; 2 * pair < total; pair += threads) {
    const DrawnPair points = draw_pair(args, philox, n, pair);
    const int64_t draw = 2 * pair, position = draw - args.candidates + args.kept;
    if (draw >= args.candidates) write_point(args, n, position, points.at[0]);
    if (draw + 1 < total) write_point(args, n, position + 1, points.at[1]);
  }
}

// --- keys

// The four cells around a point: near and far in x, the same a row down. Absent ones lie off the map and count as zero.
template <typename A>
struct CandidateTaps {
  int64_t cell;  // of the first
  A weight[4];
  bool present[4];
};

template <typename T>
__device__ inline CandidateTaps<Acc<T>> candidate_taps(const DrawArgs<T>& args, const DrawnPoint& point) {
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
__device__ inline void write_keys(const DrawArgs<T>& args, int64_t n, int64_t thread, int64_t threads, int group,
                                  uint32_t* keys) {
  using A = Acc<T>;
  const PhiloxKey philox = philox_key(args.philox);
  int64_t image = n;
  if (args.image_index != nullptr) {
    image = args.image_index[n * args.image_index_stride];
    RENDSEG_DEVICE_ASSERT(image >= 0 && image < args.maps, "image_index must lie in [0, B)");
  }
  const T* logits = args.logits + image * args.stride_n;
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
    sample_keys_kernel(DrawArgs<T> args, int64_t parts, int group, uint32_t* keys) {
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts;
  write_keys(args, n, part * blockDim.x + threadIdx.x, parts * blockDim.x, group, keys + n * args.candidates);
}

// --- selection

constexpr int kSamplePointsThreads = 768;  // 1024 would leave each 64 registers, too few on some GPUs

enum class SampleKeys {
  kNone,       // nothing is kept
  kMade,       // made here: in shared memory, or by the blocks that share an image, of which the last one copies them
  kCopied,     // ready in the workspace, and copied to shared memory
  kWorkspace,  // ready in the workspace, and read there
};

// The blocks of the launch: one to each of the first `whole` images, which have no place in the workspace, then `parts`
// to each of the others.
struct SampleBlocks {
  int64_t whole, parts;
  int64_t count(int64_t images) const { return whole + (images - whole) * parts; }
};

// All points of all images. workspace[N - whole, candidates]; arrived[N - whole], zero, where kMade has parts.
template <typename T>
__global__ void __launch_bounds__(kSamplePointsThreads)
    sample_points_kernel(DrawArgs<T> args, SampleBlocks blocks, SampleKeys where, int group, uint32_t* workspace,
                         unsigned* arrived) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const int64_t block = blockIdx.x, after = block - blocks.whole;
  const bool shared_out = after >= 0;
  const int64_t place = shared_out ? after / blocks.parts : 0;
  const int64_t n = shared_out ? blocks.whole + place : block;
  const int64_t thread = (shared_out ? after % blocks.parts * blockDim.x : 0) + threadIdx.x;
  const int64_t threads = (shared_out ? blocks.parts : 1) * blockDim.x;
  const PhiloxKey philox = philox_key(args.philox);
  write_uniform(args, philox, n, thread, threads);
  if (where != SampleKeys::kNone) {
    uint32_t* const ready = workspace + place * args.candidates;
    uint32_t* const keys = where == SampleKeys::kWorkspace ? ready : reinterpret_cast<uint32_t*>(memory);
    if (where == SampleKeys::kMade) {
      write_keys(args, n, thread, threads, group, shared_out ? ready : keys);
      if (shared_out && !last_block_to_arrive(arrived + place, static_cast<unsigned>(blocks.parts))) return;
    }
    if (shared_out && where != SampleKeys::kWorkspace) {
      for (int64_t i = threadIdx.x; i < args.candidates; i += blockDim.x) keys[i] = __ldcg(ready + i);
    }
    __syncthreads();
    RENDSEG_SHARED(BlockSelectScratch, scratch);
    const auto key_at = [&](uint32_t i) { return keys[i]; };
    const auto candidates = static_cast<uint32_t>(args.candidates);
    const KeyThreshold threshold = block_radix_threshold(key_at, candidates, static_cast<uint32_t>(args.kept), scratch);
    block_emit_listed(keys, candidates, threshold, scratch,
                      [&](uint32_t position, uint32_t i) { write_candidate(args, philox, n, i, position); });
  }
}

// --- host

// How the work is shared out.
struct SamplePlan {
  SampleKeys where;
  SampleBlocks blocks;
  int64_t parts;           // blocks to an image in the launch that only makes keys; 0: there is none
  int64_t workspace_keys;  // size of the workspace
  int64_t counters;        // of blocks that arrived
  int group;               // lanes to a pair of candidates
  int threads;             // of a block per image
  int64_t shared_bytes;
};

constexpr int64_t kSampleStaticShared = 16 * 1024;  // more than the static shared memory of sample_points_kernel
constexpr int kMostLanesToAPair = 8;                // 32 bytes of adjacent float channels

// Images whose keys are each made by several blocks: those of a last round that fills at most half of the `slots`, the
// blocks that the GPU runs at once. A thread of them has `least` pairs or more.
inline SampleBlocks share_last_round(int64_t images, int64_t slots, int64_t lanes, int threads) {
  constexpr int64_t least = 4;
  const int64_t rest = images % slots;
  const int64_t idle = rest > 0 ? slots / rest : 1, work = lanes / (least * threads);
  const int64_t parts = idle < work ? idle : work;
  if (parts <= 1) return {images, 1};
  return {images - rest, parts};
}

inline int sample_threads(int64_t wanted, int most) {
  const int64_t whole_warps = (wanted + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(whole_warps < 128 ? 128 : whole_warps > most ? most : whole_warps);
}

template <typename Launch, typename T>
SamplePlan plan_samples(const Launch& launch, const DrawArgs<T>& args) {
  if (args.kept == 0)
    return {SampleKeys::kNone, {args.images, 1}, 0, 0, 0, 1, sample_threads((args.uniform + 1) / 2, 256), 0};
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
    const int blocks_each = 2 * (bytes + kSampleStaticShared) <= room && args.images > processors ? 2 : 1;
    const int most_threads = kSamplePointsThreads / blocks_each;
    const int group = lanes_to_a_pair(pairs, most_threads);
    const int threads = sample_threads(pairs * group, most_threads);
    SampleBlocks blocks{args.images, 1};
    if (!small) blocks = share_last_round(args.images, blocks_each * processors, pairs * group, threads);
    const int64_t shared_out = args.images - blocks.whole;
    return {SampleKeys::kMade, blocks, 0, shared_out * args.candidates, shared_out, group, threads, bytes};
  }
  const int group = lanes_to_a_pair(args.images * pairs, processors * 1024);
  const int64_t needed = (pairs * group + kSampleKeysThreads - 1) / kSampleKeysThreads;
  const int64_t enough = (16 * processors + args.images - 1) / args.images;
  const int threads = sample_threads(args.candidates / 4, kSamplePointsThreads);
  const bool copied = bytes <= room;
  return {copied ? SampleKeys::kCopied : SampleKeys::kWorkspace,
          {0, 1},
          needed < enough ? needed : enough,
          args.images * args.candidates,
          0,
          group,
          threads,
          copied ? bytes : 0};
}

// workspace[plan.workspace_keys], arrived[plan.counters]
template <typename Launch, typename T>
void run_sample_uncertain_points(Launch& launch, const DrawArgs<T>& args, const SamplePlan& plan, uint32_t* workspace,
                                 unsigned* arrived) {
  launch.fill_zero(arrived, plan.counters * int64_t{sizeof(unsigned)});
  if (plan.parts > 0) {
    launch({args.images * plan.parts, kSampleKeysThreads}, sample_keys_kernel<T>, args, plan.parts, plan.group,
           workspace);
  }
  launch({plan.blocks.count(args.images), plan.threads, plan.shared_bytes}, sample_points_kernel<T>, args, plan.blocks,
         plan.where, plan.group, workspace, arrived);
}

}  // namespace rendseg
