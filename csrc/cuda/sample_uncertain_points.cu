// Host side of the CUDA sample_uncertain_points.
#include <ATen/ops/empty.h>

#include <optional>

#include "../uncertain_points_common.h"
#include "launch.h"
#include "philox.h"
#include "sample_uncertain_points.cuh"

namespace rendseg {

// logits[B,C,H,W], class_index[N], image_index[N], random_coords[N,Q,2] -> coords[N,num_points,2] float32
at::Tensor sample_uncertain_points_cuda(const at::Tensor& logits, int64_t num_points, double oversample_ratio,
                                        double importance_ratio, const std::optional<at::Tensor>& class_index,
                                        const std::optional<at::Tensor>& image_index, c10::string_view padding_mode,
                                        bool align_corners, std::optional<at::Generator> generator,
                                        const std::optional<at::Tensor>& random_coords) {
  const DrawCounts counts = check_sample(logits, num_points, oversample_ratio, importance_ratio, class_index,
                                         image_index, padding_mode, generator, random_coords);
  CudaLaunch launch(logits);
  const int64_t images = image_index.has_value() ? image_index->size(0) : logits.size(0);
  at::Tensor coords = at::empty({images, num_points, 2}, logits.options().dtype(at::kFloat));
  if (images == 0) return coords;
  const at::Tensor maps = readable_maps(logits);
  const at::Tensor given = random_coords.has_value() ? random_coords->detach().contiguous() : at::Tensor();
  dispatch_floating(logits.scalar_type(), "logits", [&]<typename T>() {
    DrawArgs<T> args{};
    args.logits = data<T>(maps);
    args.images = images;
    args.channels = maps.size(1);
    args.height = static_cast<int32_t>(maps.size(2));  // check_sample bounds H*W
    args.width = static_cast<int32_t>(maps.size(3));
    args.stride_n = maps.stride(0);
    args.stride_c = maps.stride(1);
    args.stride_cell = cell_stride(maps);
    if (class_index.has_value()) {
      args.class_index = data<int64_t>(*class_index);
      args.class_index_stride = class_index->stride(0);
    }
    if (image_index.has_value()) {
      args.image_index = data<int64_t>(*image_index);
      args.image_index_stride = image_index->stride(0);
      args.maps = logits.size(0);
    }
    args.border = padding_mode == "border";
    args.align_corners = align_corners;
    if (given.defined()) {
      args.given = data<float>(given);
    } else {
      args.philox = philox(generator, logits, 4);  // one counter of four words to each pair of draws
    }
    args.candidates = counts.candidates;
    args.kept = counts.kept;
    args.uniform = counts.uniform;
    args.out = mutable_data<float>(coords);
    const SamplePlan plan = plan_samples(launch, args);
    Scratch scratch;
    uint32_t* keys = nullptr;
    unsigned* arrived = nullptr;
    scratch.add(keys, plan.workspace_keys);
    scratch.add(arrived, plan.counters);
    const at::Tensor workspace = allocate(scratch, logits);
    run_sample_uncertain_points(launch, args, plan, keys, arrived);
  });
  return coords;
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) { m.impl("sample_uncertain_points", TORCH_FN(rendseg::sample_uncertain_points_cuda)); }
