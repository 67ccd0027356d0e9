// Host side of the CUDA mask_losses and mask_costs.
#include "mask_losses.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../mask_losses_common.h"
#include "../strided_tensors.h"
#include "launch.h"

namespace rendseg {
namespace {

// What every launch of a call shares; the targets come with each launch.
template <typename T>
MaskArgs<T> mask_args(const at::Tensor& logits, const at::Tensor& coords /*[.,P,2], contiguous*/,
                      const MaskCall& call) {
  MaskArgs<T> args{};
  const MapView map = map_view(logits);
  args.logits = {data<T>(logits),
                 map.channels,
                 static_cast<int32_t>(map.height),
                 static_cast<int32_t>(map.width),
                 map.stride_n,
                 map.stride_c,
                 map.stride_y,
                 map.stride_x};
  args.coords = data<Acc<T>>(coords);
  args.points = coords.size(1);
  args.options = call.options;
  args.all_images = logits.size(0);
  return args;
}

// run() for each kMaskImages images, whose targets are in args.
template <typename T, typename F>
void for_images(MaskArgs<T>& args, const MaskCall& call, F&& run) {
  for (args.first_image = 0; args.first_image < args.all_images; args.first_image += kMaskImages) {
    args.images = std::min<int64_t>(kMaskImages, args.all_images - args.first_image);
    std::copy_n(call.targets.begin() + args.first_image, args.images, args.target);
    run();
  }
}

PairIndex pair_index(const MaskPairs& pairs, int64_t queries) {
  return {data<int64_t>(pairs.image), data<int64_t>(pairs.query), data<int64_t>(pairs.target), pairs.image.stride(0),
          pairs.query.stride(0),      pairs.target.stride(0),     pairs.image.size(0),         queries};
}

int64_t slices_of(int64_t points) { return (points + kMaskSlice - 1) / kMaskSlice; }

// What the losses of each pair are made of: [N, slices].
template <typename T>
at::Tensor sum_pairs(CudaLaunch& launch, MaskArgs<T>& args, const MaskCall& call, const PairIndex& index,
                     const at::Tensor& logits) {
  using A = Acc<T>;
  const int64_t slices = slices_of(args.points);
  at::Tensor parts = allocate_bytes(index.pairs * slices * static_cast<int64_t>(sizeof(MaskSums<A>)), logits);
  for_images(args, call, [&] {
    launch({index.pairs * slices, kMaskThreads}, mask_sums_kernel<T>, args, index, slices,
           mutable_data<MaskSums<A>>(parts));
  });
  return parts;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mask_losses_cuda(const at::Tensor& logits, at::TensorList targets,
                                                    const at::Tensor& coords, const at::Tensor& image_index,
                                                    const at::Tensor& query_index, const at::Tensor& target_index,
                                                    c10::string_view label_mode, c10::string_view padding_mode,
                                                    at::OptionalIntArrayRef canvas) {
  const MaskPairs pairs{image_index, query_index, target_index};
  const MaskCall call = check_mask_losses(logits, targets, coords, pairs, label_mode, padding_mode, canvas);
  CudaLaunch launch(logits);
  const auto options = logits.options().dtype(loss_dtype(logits)).memory_format(at::MemoryFormat::Contiguous);
  at::Tensor cross_entropy = at::empty({image_index.size(0)}, options), dice = at::empty_like(cross_entropy);
  if (image_index.size(0) == 0) return {cross_entropy, dice};
  const at::Tensor xy = coords_for(coords, logits.scalar_type());
  dispatch_floating(logits.scalar_type(), "logits", [&]<typename T>() {
    using A = Acc<T>;
    MaskArgs<T> args = mask_args<T>(logits, xy, call);
    const PairIndex index = pair_index(pairs, logits.size(1));
    const at::Tensor parts = sum_pairs(launch, args, call, index, logits);
    launch({blocks_for(index.pairs), 256}, mask_finish_kernel<A>, data<MaskSums<A>>(parts), slices_of(args.points),
           index.pairs, args.points, mutable_data<A>(cross_entropy), mutable_data<A>(dice));
  });
  return {cross_entropy, dice};
}

at::Tensor mask_losses_backward_cuda(const at::Tensor& cross_entropy_grad, const at::Tensor& dice_grad,
                                     const at::Tensor& logits, at::TensorList targets, const at::Tensor& coords,
                                     const at::Tensor& image_index, const at::Tensor& query_index,
                                     const at::Tensor& target_index, c10::string_view label_mode,
                                     c10::string_view padding_mode, at::OptionalIntArrayRef canvas) {
  const MaskPairs pairs{image_index, query_index, target_index};
  const MaskCall call = check_mask_losses(logits, targets, coords, pairs, label_mode, padding_mode, canvas);
  check_loss_grad(cross_entropy_grad, "cross_entropy_grad", logits, image_index);
  check_loss_grad(dice_grad, "dice_grad", logits, image_index);
  TORCH_CHECK_VALUE(coords.size(1) <= INT32_MAX, "coords must have fewer than 2^31 points, got ", coords.size(1));
  CudaLaunch launch(logits);
  at::Tensor result = at::empty(logits.sizes(), logits.options().memory_format(gradient_format(logits)));
  if (result.numel() == 0) return result;
  const at::Tensor xy = coords_for(coords, logits.scalar_type());
  dispatch_floating(logits.scalar_type(), "logits", [&]<typename T>() {
    using A = Acc<T>;
    MaskArgs<T> args = mask_args<T>(logits, xy, call);
    const PairIndex index = pair_index(pairs, logits.size(1));
    const int64_t slices = slices_of(args.points);
    const at::Tensor parts = sum_pairs(launch, args, call, index, logits);
    const at::Tensor slopes =
        allocate_bytes(index.pairs * args.points * static_cast<int64_t>(sizeof(A)), logits);  // [N,P]
    const LossGrads<A> grads{data<A>(cross_entropy_grad), data<A>(dice_grad), cross_entropy_grad.stride(0),
                             dice_grad.stride(0)};
    for_images(args, call, [&] {
      launch({index.pairs * slices, kMaskThreads}, mask_slope_kernel<T>, args, index, grads, slices,
             data<MaskSums<A>>(parts), mutable_data<A>(slopes));
    });
    GradArgs<A> taps{};
    taps.maps = 1;
    taps.coords = args.coords;
    taps.images = index.pairs;
    taps.points = args.points;
    taps.grad_n = args.points;
    taps.grad_p = 1;
    taps.options = {false, args.options.border, false};
    taps.map[0].map.channels = 1;
    taps.map[0].map.height = args.logits.height;
    taps.map[0].map.width = args.logits.width;
    taps.map[0].grad = data<A>(slopes);
    GradMap<T> out{};
    out.map = args.logits;
    out.result = mutable_data<T>(result);
    out.adjacent = gradient_format(logits) == at::MemoryFormat::ChannelsLast;
    launch({logits.size(0) * logits.size(1) * tiles_of(args.logits), kMaskThreads}, mask_gather_kernel<T>, taps, index,
           out);
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> mask_costs_cuda(const at::Tensor& logits, at::TensorList targets,
                                                   const at::Tensor& coords, c10::string_view label_mode,
                                                   c10::string_view padding_mode, at::OptionalIntArrayRef canvas) {
  const MaskCall call = check_mask_costs(logits, targets, coords, label_mode, padding_mode, canvas);
  CudaLaunch launch(logits);
  const int64_t images = logits.size(0), queries = logits.size(1), most = call.most_targets;
  const auto options = logits.options().dtype(loss_dtype(logits)).memory_format(at::MemoryFormat::Contiguous);
  at::Tensor cross_entropy = at::empty({images, queries, most}, options), dice = at::empty_like(cross_entropy);
  if (cross_entropy.numel() == 0) return {cross_entropy, dice};
  const at::Tensor xy = coords_for(coords, logits.scalar_type());
  dispatch_floating(logits.scalar_type(), "logits", [&]<typename T>() {
    using A = Acc<T>;
    MaskArgs<T> args = mask_args<T>(logits, xy, call);
    const int64_t slices = (args.points + kCostSlice - 1) / kCostSlice;
    CostParts<A> parts{};
    Scratch scratch;
    scratch.add(parts.entropy, slices * images * queries * most);
    scratch.add(parts.overlap, slices * images * queries * most);
    scratch.add(parts.sigmoid, slices * images * queries);
    scratch.add(parts.target, slices * images * most);
    const at::Tensor memory = allocate(scratch, logits);
    const auto tiles = [](int64_t count) { return (count + kCostTile - 1) / kCostTile; };
    for_images(args, call, [&] {
      launch({slices * tiles(most) * tiles(queries) * args.images, kMaskThreads}, mask_costs_kernel<T>, args, most,
             parts);
      launch({blocks_for(args.images * queries * most), 256}, mask_costs_finish_kernel<T>, args, most, parts,
             mutable_data<A>(cross_entropy), mutable_data<A>(dice));
    });
  });
  return {cross_entropy, dice};
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) {
  m.impl("mask_losses", TORCH_FN(rendseg::mask_losses_cuda));
  m.impl("_mask_losses_backward", TORCH_FN(rendseg::mask_losses_backward_cuda));
  m.impl("mask_costs", TORCH_FN(rendseg::mask_costs_cuda));
}
