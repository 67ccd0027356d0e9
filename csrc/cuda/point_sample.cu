// Host side of the CUDA point_sample and point_labels.
#include "launch.h"

#include <ATen/ops/empty.h>

#include <span>
#include <vector>

#include "../point_sample_common.h"
#include "point_sample.cuh"
#include "point_sample.h"
#include "point_sample_backward.cuh"

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

int64_t bytes_of(const at::Tensor& t) { return t.numel() * t.element_size(); }

// Memory for the kernels of one gradient: the upstream gradient with its channels adjacent, and points filed under
// tiles.
template <typename T>
at::Tensor make_scratch(CudaLaunch& launch, GradArgs<T>& args, const at::Tensor& like) {
  const auto maps = std::span(args.map, args.maps);
  const auto wants_filing = [&](const GradMap<T>& map) { return map.result != nullptr && args.points > kWindow; };
  Scratch scratch;
  for (GradMap<T>& map : maps) {
    if (wants_filing(map)) scratch.add(map.counts, args.images * tiles_of(map.map));
  }
  const int64_t counts = scratch.bytes();
  for (GradMap<T>& map : maps) {
    map.pitch = (map.map.channels + kGroup<T> - 1) / kGroup<T> * kGroup<T>;
    if (wants_filing(map)) scratch.add(map.filed, args.images * tiles_of(map.map) * kWindow);
    if (map.map.channels >= kGroup<T> && (map.result != nullptr || map.map.stride_c == 1)) {
      scratch.add(map.rows, args.images * args.points * map.pitch);
    }
  }
  at::Tensor memory = allocate(scratch, like);
  launch.fill_zero(memory.mutable_data_ptr(), counts);
  return memory;
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
    args.out_channels = total_channels(input, "input");
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

// One gradient per map, then that of coords; an empty [0] tensor where it was not asked for.
std::vector<at::Tensor> point_sample_backward_cuda(const at::Tensor& grad,  // as the output
                                                   at::TensorList input, const at::Tensor& coords,
                                                   c10::string_view mode, c10::string_view padding_mode,
                                                   bool align_corners, bool input_grad, bool coords_grad) {
  const SampleCall call = check_point_sample(input, coords, mode, padding_mode, align_corners);
  check_sample_grad(grad, input, coords);
  TORCH_CHECK_VALUE(call.points <= INT32_MAX, "coords must have fewer than 2^31 points, got ", call.points);
  CudaLaunch launch(input[0]);
  std::vector<at::Tensor> result;
  for (const at::Tensor& map : input) {
    result.push_back(input_grad ? at::empty(map.sizes(), map.options().memory_format(gradient_format(map)))
                                : at::empty({0}, map.options()));
  }
  result.push_back(coords_grad ? at::empty(coords.sizes(), coords.options().memory_format(at::MemoryFormat::Contiguous))
                               : at::empty({0}, coords.options()));
  if (grad.numel() == 0) {
    for (const at::Tensor& t : result) launch.fill_zero(t.mutable_data_ptr(), bytes_of(t));
    return result;
  }
  const at::ScalarType wide = input[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor xy = coords_for(coords, wide);
  const at::Tensor flat = grad.reshape({call.images, grad.size(1), call.points});
  at::Tensor slope;
  if (coords_grad && call.nearest) {
    launch.fill_zero(result.back().mutable_data_ptr(), bytes_of(result.back()));
  } else if (coords_grad) {
    slope = coords.scalar_type() == wide ? result.back() : at::empty(coords.sizes(), coords.options().dtype(wide));
  }
  if (!input_grad && !slope.defined()) return result;
  dispatch_floating(grad.scalar_type(), "grad", [&]<typename T>() {
    std::vector<at::Tensor> scratch;
    GradArgs<T> args{};
    args.coords = data<Acc<T>>(xy);
    args.images = call.images;
    args.points = call.points;
    args.grad_n = flat.stride(0);
    args.grad_c = flat.stride(1);
    args.grad_p = flat.stride(2);
    args.slope = slope.defined() ? mutable_data<Acc<T>>(slope) : nullptr;
    args.options = options_of(call);
    const T* upstream = data<T>(flat);
    for (size_t i = 0; i < input.size(); ++i) {
      GradMap<T>& map = args.map[args.maps++];
      map = {};
      map.map = view_of<T>(input[i]);
      map.grad = upstream;
      map.result = input_grad ? mutable_data<T>(result[i]) : nullptr;
      map.adjacent = gradient_format(input[i]) == at::MemoryFormat::ChannelsLast;
      upstream += input[i].size(1) * args.grad_c;
      if (args.maps < kSampleMaps && i + 1 < input.size()) continue;
      scratch.push_back(make_scratch(launch, args, grad));
      run_point_sample_backward(launch, args);
      args.maps = 0;
      args.add_slope = true;
    }
  });
  if (slope.defined() && !slope.is_same(result.back())) result.back().copy_(slope);
  return result;
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
  m.impl("_point_sample_backward", TORCH_FN(rendseg::point_sample_backward_cuda));
  m.impl("point_labels", TORCH_FN(rendseg::point_labels_cuda));
}
