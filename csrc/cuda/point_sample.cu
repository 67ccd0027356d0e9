// Host side of the CUDA point_sample and point_labels.
#include "launch.h"

#include <ATen/ops/empty.h>

#include "../point_sample_common.h"
#include "point_sample.cuh"
#include "point_sample.h"

namespace rendseg {
namespace {

SampleOptions options_of(const SampleCall& call) { return {call.nearest, call.border, call.align_corners}; }

template <typename T>
SampleMap<T> view_of(const at::Tensor& map) {
  return {data<T>(map),
          map.size(1),
          static_cast<int32_t>(map.size(2)),
          static_cast<int32_t>(map.size(3)),
          map.stride(0),
          map.stride(1),
          map.stride(2),
          map.stride(3)};
}

template <typename L, typename A>
void pick_labels(CudaLaunch& launch, const at::Tensor& labels, const at::Tensor& coords, int64_t ignore_index,
                 const at::Tensor& out) {
  launch({blocks_for(out.numel()), 256}, point_labels_kernel<L, A>, data<L>(labels), labels.size(1), labels.size(2),
         labels.stride(0), labels.stride(1), labels.stride(2), data<A>(coords), coords.size(1), out.numel(),
         ignore_index, mutable_data<int64_t>(out));
}

}  // namespace

at::Tensor point_sample_cuda(at::TensorList input, const at::Tensor& coords, c10::string_view mode,
                             c10::string_view padding_mode, bool align_corners) {
  const SampleCall call = check_point_sample(input, coords, mode, padding_mode, align_corners);
  CudaLaunch launch(input[0]);
  at::Tensor out =
      at::empty(sample_sizes(input, coords), input[0].options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const at::Tensor xy = coords_for(coords, input[0].scalar_type());
  dispatch_floating(input[0].scalar_type(), "input", [&]<typename T>() {
    SampleArgs<T> args{};
    args.coords = data<Acc<T>>(xy);
    args.images = call.images;
    args.points = call.points;
    args.out = mutable_data<T>(out);
    args.out_channels = total_channels(input);
    args.options = options_of(call);
    int64_t channel = 0;
    for (size_t i = 0; i < input.size(); ++i) {
      args.map[args.maps] = view_of<T>(input[i]);
      args.first_channel[args.maps++] = channel;
      channel += input[i].size(1);
      if (args.maps < kSampleMaps && i + 1 < input.size()) continue;
      run_point_sample(launch, args);
      args.maps = 0;
    }
  });
  return out;
}

// labels[N,H,W] of an integer type, coords[N,P,2]
at::Tensor point_labels_cuda(const at::Tensor& labels, const at::Tensor& coords, int64_t ignore_index) {
  check_point_labels(labels, coords);
  CudaLaunch launch(labels);
  at::Tensor out = at::empty({coords.size(0), coords.size(1)}, labels.options().dtype(at::kLong));
  if (out.numel() == 0) return out;
  const at::Tensor xy = coords.contiguous();
  const auto with_coords = [&]<typename A>() {
    switch (labels.scalar_type()) {
      case at::kByte:
        return pick_labels<uint8_t, A>(launch, labels, xy, ignore_index, out);
      case at::kChar:
        return pick_labels<int8_t, A>(launch, labels, xy, ignore_index, out);
      case at::kShort:
        return pick_labels<int16_t, A>(launch, labels, xy, ignore_index, out);
      case at::kInt:
        return pick_labels<int32_t, A>(launch, labels, xy, ignore_index, out);
      default:
        return pick_labels<int64_t, A>(launch, labels, xy, ignore_index, out);
    }
  };
  if (xy.scalar_type() == at::kDouble) {
    with_coords.template operator()<double>();
  } else {
    with_coords.template operator()<float>();
  }
  return out;
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) {
  m.impl("point_sample", TORCH_FN(rendseg::point_sample_cuda));
  m.impl("point_labels", TORCH_FN(rendseg::point_labels_cuda));
}
