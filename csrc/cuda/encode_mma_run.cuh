// encode on tensor cores: which kernel fits into the shared memory of a GPU, and the launches.
#pragma once

#include "encode_mma_backward.cuh"
#include "encode_mma_forward.cuh"
#include "encode_tf32.cuh"

#include <initializer_list>

namespace rendseg::encoding {

// A kernel: positions of a tile, tiles under way, rounds of an exchange, and the shared memory that a block needs.
// Where none fits, all is zero. The order of all sums is the same in each.
struct MmaFit {
  int tile = 0, stages = 0, rounds = 0;
  int64_t bytes = 0;
};

// The first that fits. The earlier ones hide more of the time that memory takes.
inline MmaFit first_fit(std::initializer_list<MmaFit> fits, int64_t shared_limit) {
  for (const MmaFit& fit : fits) {
    if (fit.bytes <= shared_limit) return fit;
  }
  return {};
}

template <typename X, bool kChannelsLast>
MmaFit forward_fit(int steps, int64_t shared_limit) {
  if constexpr (std::is_same_v<X, float>) {
    return first_fit({{32, 2, 1, WideForwardMap<kChannelsLast, 2>(steps).bytes},
                      {32, 1, 1, WideForwardMap<kChannelsLast, 1>(steps).bytes}},
                     shared_limit);
  } else {
    return first_fit({{64, 2, 1, ForwardMap<X, 64, kChannelsLast, 2>(steps).bytes},
                      {32, 2, 1, ForwardMap<X, 32, kChannelsLast, 2>(steps).bytes},
                      {32, 1, 1, ForwardMap<X, 32, kChannelsLast, 1>(steps).bytes}},
                     shared_limit);
  }
}

template <typename X, bool kChannelsLast>
MmaFit backward_fit(int steps, int64_t shared_limit) {
  if constexpr (std::is_same_v<X, float>) {
    return first_fit({{32, 2, 1, WideBackwardMap<kChannelsLast, 2>(steps).bytes},
                      {32, 1, 1, WideBackwardMap<kChannelsLast, 1>(steps).bytes}},
                     shared_limit);
  } else {
    return first_fit({{32, 2, 1, BackwardMap<X, kChannelsLast, 2, 1>(steps).bytes},
                      {32, 2, 2, BackwardMap<X, kChannelsLast, 2, 2>(steps).bytes},
                      {32, 1, 2, BackwardMap<X, kChannelsLast, 1, 2>(steps).bytes}},
                     shared_limit);
  }
}

// What of a GPU whose blocks may have `shared_limit` bytes. Needs plan_mma().
template <typename X>
MmaFit what_fits(const MmaArgs& args, int64_t shared_limit) {
  if (is_backward(args)) {
    return is_channels_last(args) ? backward_fit<X, true>(args.steps, shared_limit)
                                  : backward_fit<X, false>(args.steps, shared_limit);
  }
  return is_channels_last(args) ? forward_fit<X, true>(args.steps, shared_limit)
                                : forward_fit<X, false>(args.steps, shared_limit);
}

using MmaKernel = void (*)(MmaArgs);

template <typename X, bool kChannelsLast>
MmaKernel forward_kernel(const MmaFit& fit) {
  if constexpr (std::is_same_v<X, float>) {
    return fit.stages == 2 ? encode_tf32_kernel<kChannelsLast, 2> : encode_tf32_kernel<kChannelsLast, 1>;
  } else {
    return fit.tile == 64    ? encode_mma_kernel<X, 64, kChannelsLast, 2>
           : fit.stages == 2 ? encode_mma_kernel<X, 32, kChannelsLast, 2>
                             : encode_mma_kernel<X, 32, kChannelsLast, 1>;
  }
}

template <typename X, bool kChannelsLast>
MmaKernel backward_kernel(const MmaFit& fit) {
  if constexpr (std::is_same_v<X, float>) {
    return fit.stages == 2 ? encode_tf32_backward_kernel<kChannelsLast, 2>
                           : encode_tf32_backward_kernel<kChannelsLast, 1>;
  } else {
    return fit.rounds == 1   ? encode_mma_backward_kernel<X, kChannelsLast, 2, 1>
           : fit.stages == 2 ? encode_mma_backward_kernel<X, kChannelsLast, 2, 2>
                             : encode_mma_backward_kernel<X, kChannelsLast, 1, 2>;
  }
}

// Everything after plan_mma() and lay_out_mma(), with the kernel that what_fits() found.
template <typename X, typename Launch>
void run_mma(Launch& launch, const MmaArgs& args, const MmaFit& fit) {
  const LaunchShape shape{args.batch * args.chunks, kThreads, fit.bytes};
  const bool last = is_channels_last(args);
  if (is_backward(args)) {
    run_pack(launch, general_args(args));
    launch({kMmaCodes, kThreads}, prepare_mma_kernel<X>, args);
    launch({args.batch * kMmaCodes, kThreads}, prepare_gradient_kernel<X>, args);
    launch(shape, last ? backward_kernel<X, true>(fit) : backward_kernel<X, false>(fit), args);
    run_sum_gradients(launch, general_args(args));
  } else {
    launch({kMmaCodes, kThreads}, prepare_mma_kernel<X>, args);
    launch(shape, last ? forward_kernel<X, true>(fit) : forward_kernel<X, false>(fit), args);
    run_sum_encodings(launch, general_args(args));
  }
}

}  // namespace rendseg::encoding
