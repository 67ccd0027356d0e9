// Host side of the CUDA uncertainty and uncertain_points.
#include "launch.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../uncertain_points_common.h"
#include "uncertain_points.cuh"

namespace rendseg {
namespace {

// logits[N,C,H,W] as readable_maps() gives them.
template <typename T>
MarginArgs<T> margin_args(const at::Tensor& logits, const std::optional<at::Tensor>& class_index) {
  MarginArgs<T> args{};
  args.logits = data<T>(logits);
  args.images = logits.size(0);
  args.channels = logits.size(1);
  args.cells = logits.size(2) * logits.size(3);
  args.image_stride = logits.stride(0);
  args.channel_stride = logits.stride(1);
  args.cell_stride = cell_stride(logits);
  if (class_index.has_value()) {
    args.class_index = data<int64_t>(*class_index);
    args.class_index_stride = class_index->stride(0);
  }
  return args;
}

}  // namespace

// logits[N,C,H,W], class_index[N] -> [N,H,W] float32
at::Tensor uncertainty_cuda(const at::Tensor& logits, const std::optional<at::Tensor>& class_index) {
  check_logits(logits);
  check_class_index(class_index, logits);
  CudaLaunch launch(logits);
  at::Tensor out = at::empty({logits.size(0), logits.size(2), logits.size(3)}, logits.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  const at::Tensor maps = readable_maps(logits);
  dispatch_floating(maps.scalar_type(), "logits", [&]<typename T>() {
    MarginArgs<T> args = margin_args<T>(maps, class_index);
    args.uncertainty = mutable_data<float>(out);
    run_margins(launch, args);
  });
  return out;
}

// logits[N,C,H,W], class_index[N] -> indices[N,k] int64, coords[N,k,2] float32
std::tuple<at::Tensor, at::Tensor> uncertain_points_cuda(const at::Tensor& logits, int64_t num_points,
                                                         const std::optional<at::Tensor>& class_index) {
  check_logits(logits);
  check_num_points(num_points);
  check_class_index(class_index, logits);
  CudaLaunch launch(logits);
  const int64_t images = logits.size(0), height = logits.size(2), width = logits.size(3), cells = height * width;
  const int64_t k = std::min(num_points, cells);
  at::Tensor indices = at::empty({images, k}, logits.options().dtype(at::kLong));
  at::Tensor coords = at::empty({images, k, 2}, logits.options().dtype(at::kFloat));
  if (images == 0) return {indices, coords};
  TORCH_CHECK_VALUE(cells < (int64_t{1} << 32), "selection holds at most 2^32 - 1 cells in an image, got ", cells);
  const at::Tensor maps = readable_maps(logits);
  const at::Tensor keys = at::empty({images, cells}, logits.options().dtype(at::kInt));
  // What must be zero comes first, so that one call clears it.
  Layout<256> layout;
  const auto histograms = layout.add<uint32_t>(select_reads_histogram(cells) ? images * kHistogramBins : 0);
  const auto zeroed = layout.add<unsigned char>(select_zeroed_bytes(images, cells));
  const auto workspace = layout.add<unsigned char>(select_workspace_bytes(images, cells));
  const at::Tensor memory = allocate_bytes(layout.bytes(), logits);
  void* const base = memory.mutable_data_ptr();
  launch.fill_zero(base, workspace.offset);

  SelectArgs select{};
  select.keys = data<uint32_t>(keys);
  select.histograms = histograms.count > 0 ? histograms.in(base) : nullptr;
  select.zeroed = zeroed.in(base);
  select.workspace = workspace.in(base);
  select.images = images;
  select.cells = cells;
  select.k = k;
  select.height = height;
  select.width = width;
  select.indices = mutable_data<int64_t>(indices);
  select.coords = mutable_data<float>(coords);
  dispatch_floating(maps.scalar_type(), "logits", [&]<typename T>() {
    MarginArgs<T> args = margin_args<T>(maps, class_index);
    args.keys = mutable_data<uint32_t>(keys);
    args.histograms = select.histograms;
    run_margins(launch, args);
  });
  run_select(launch, select);
  return {indices, coords};
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) {
  m.impl("uncertainty", TORCH_FN(rendseg::uncertainty_cuda));
  m.impl("uncertain_points", TORCH_FN(rendseg::uncertain_points_cuda));
}
