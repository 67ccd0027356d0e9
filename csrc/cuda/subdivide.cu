// Host side of the CUDA subdivide and _subdivide_labels: PointRend (Kirillov et al. 2020), section 3.1.
#include "launch.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../subdivide_common.h"
#include "select.cuh"
#include "subdivide.cuh"
#include "subdivide.h"
#include "subdivide_labels.cuh"

namespace rendseg {
namespace {

using subdivision::GradientArgs;
using subdivision::LabelArgs;
using subdivision::UpsampleArgs;

constexpr int64_t kStreamBytes = int64_t{32} << 20;  // from here on the output does not stay in L2

// What must be zero at first.
struct Zeroed {
  Part<uint32_t> histograms;
  Part<unsigned> counters;
  Part<unsigned char> select;
  int64_t bytes;

  Zeroed(int64_t images, int64_t cells, bool labels) {
    const bool counted = labels || select_reads_histogram(cells);
    Layout<256> layout;
    histograms = layout.add<uint32_t>(counted ? images * kHistogramBins : 0);
    counters = layout.add<unsigned>(labels ? images : 0);
    select = layout.add<unsigned char>(select_zeroed_bytes(images, cells));
    bytes = layout.bytes();
  }
};

bool is_channels_last(const at::Tensor& map, at::MemoryFormat format) {
  return format == at::MemoryFormat::ChannelsLast && map.size(1) > 1;
}

// Upsampled map (logits or labels) and the selection from it. `cleared` points to what must be zero, or is null.
std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide(const at::Tensor& logits, int64_t num_points, int64_t scale,
                                                         bool align_corners,
                                                         const std::optional<at::Tensor>& class_index,
                                                         SubdivideWanted wanted, unsigned char* cleared = nullptr) {
  const int64_t n = logits.size(0), c = logits.size(1), h = logits.size(2), w = logits.size(3);
  const int64_t height = h * scale, width = w * scale, cells = height * width;
  const int64_t k = std::min(num_points, cells);
  const at::MemoryFormat format = logits.suggest_memory_format();
  const at::TensorOptions options = logits.options();
  CudaLaunch launch(logits);
  at::Tensor indices = at::empty({n, k}, options.dtype(at::kLong));
  at::Tensor coords = at::empty({n, k, 2}, options.dtype(at::kFloat));
  at::Tensor result =
      wanted == SubdivideWanted::kLogits   ? at::empty({n, c, height, width}, options.memory_format(format))
      : wanted == SubdivideWanted::kLabels ? at::empty({n, height, width}, options.dtype(label_dtype(logits)))
                                           : at::empty({0}, options);
  if (n == 0) return {result, indices, coords};
  TORCH_CHECK_VALUE(c < int64_t{1} << 26, "logits must have fewer than 2^26 channels, got ", c);

  const at::Tensor source = logits.contiguous(format);
  const at::Tensor keys = at::empty({n, cells}, options.dtype(at::kInt));
  at::Tensor channel;
  if (class_index.has_value()) channel = class_index->contiguous();
  const bool labels = wanted == SubdivideWanted::kLabels && c > 1;
  const bool counted = labels || select_reads_histogram(cells);

  const Zeroed zeroed(n, cells, labels);
  Scratch scratch;
  unsigned char *zeros = nullptr, *workspace = nullptr;
  scratch.add(zeros, cleared == nullptr ? zeroed.bytes : 0);
  scratch.add(workspace, select_workspace_bytes(n, cells));
  const at::Tensor buffer = allocate(scratch, logits);
  if (cleared == nullptr) {
    cleared = zeros;
    launch.fill_zero(cleared, zeroed.bytes);
  }

  SelectArgs select{};
  at::Tensor known;  // of the source cells, for labels
  dispatch_floating(logits.scalar_type(), "logits", [&]<typename T>() {
    LabelArgs<T> a{};
    a.source = data<T>(source);
    a.fine = wanted == SubdivideWanted::kLogits ? mutable_data<T>(result) : nullptr;
    a.channels_last = is_channels_last(logits, format);
    a.align_corners = align_corners;
    a.streaming = static_cast<int64_t>(result.nbytes()) >= kStreamBytes;
    a.single = c == 1 || channel.defined();
    a.channel = channel.defined() ? data<int64_t>(channel) : nullptr;
    a.images = n, a.channels = c, a.h = h, a.w = w, a.scale = scale, a.height = height, a.width = width;
    a.keys = mutable_data<uint32_t>(keys);
    a.histograms = counted ? zeroed.histograms.in(cleared) : nullptr;
    if (!labels) {
      if (wanted == SubdivideWanted::kLabels) {  // one channel has one label
        launch.fill_zero(mutable_data<unsigned char>(result), static_cast<int64_t>(result.nbytes()));
      }
      subdivision::run_subdivide<CudaLaunch, T>(launch, a);
      return;
    }
    a.labels = mutable_data<unsigned char>(result);
    a.wide_labels = result.scalar_type() == at::kShort;
    a.k = k;
    Scratch parts;
    parts.add(a.largest, n * h * w);
    parts.add(a.owner, n * h * w);
    parts.add(a.bound, n * units_along(a, h) * units_along(a, w));
    parts.add(a.limit, n);
    known = allocate(parts, logits);
    a.fills_keys = !(by_gaps(a) && select_reads_histogram(cells));
    if (!a.fills_keys) select.bounds = a.bound, select.limits = a.limit;
    a.counters = zeroed.counters.in(cleared);
    subdivision::run_subdivide_labels(launch, a);
  });

  select.keys = data<uint32_t>(keys);
  if (select_reads_histogram(cells)) {
    select.histograms = zeroed.histograms.in(cleared);
    select.zeroed = zeroed.select.in(cleared);
    select.workspace = workspace;
  }
  select.images = n, select.cells = cells, select.k = k, select.height = height, select.width = width;
  select.indices = mutable_data<int64_t>(indices);
  select.coords = mutable_data<float>(coords);
  run_select(launch, select);
  return {result, indices, coords};
}

}  // namespace

int64_t subdivide_zeroed_bytes(int64_t images, int64_t channels, int64_t cells, bool labels) {
  return Zeroed(images, cells, labels && channels > 1).bytes;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_step(const at::Tensor& logits, int64_t num_points,
                                                              int64_t scale_factor, bool align_corners,
                                                              const std::optional<at::Tensor>& class_index, bool labels,
                                                              unsigned char* zeroed) {
  check_subdivide(logits, num_points, class_index, scale_factor);
  if (labels) check_label_classes(logits);
  return subdivide(logits, num_points, scale_factor, align_corners, class_index,
                   labels ? SubdivideWanted::kLabels : SubdivideWanted::kLogits, zeroed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_cuda(const at::Tensor& logits, int64_t num_points,
                                                              int64_t scale_factor, bool align_corners,
                                                              const std::optional<at::Tensor>& class_index,
                                                              bool return_logits) {
  check_subdivide(logits, num_points, class_index, scale_factor);
  return subdivide(logits, num_points, scale_factor, align_corners, class_index,
                   return_logits ? SubdivideWanted::kLogits : SubdivideWanted::kNothing);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_labels_cuda(const at::Tensor& logits, int64_t num_points,
                                                                     int64_t scale_factor, bool align_corners) {
  check_subdivide(logits, num_points, std::nullopt, scale_factor);
  check_label_classes(logits);
  return subdivide(logits, num_points, scale_factor, align_corners, std::nullopt, SubdivideWanted::kLabels);
}

at::Tensor subdivide_backward_cuda(const at::Tensor& grad, int64_t height, int64_t width, bool align_corners) {
  check_logits(grad, "grad");
  const int64_t n = grad.size(0), c = grad.size(1);
  TORCH_CHECK_VALUE(
      height > 0 && width > 0 && grad.size(2) % height == 0 && grad.size(2) / height * width == grad.size(3),
      "grad must have shape [N, C, s * height, s * width] for a whole s, got ", grad.sizes(), " with height ", height,
      " and width ", width);
  const at::MemoryFormat format = grad.suggest_memory_format();
  CudaLaunch launch(grad);
  at::Tensor out = at::empty({n, c, height, width}, grad.options().memory_format(format));
  if (n == 0) return out;
  const at::Tensor upstream = grad.contiguous(format);
  dispatch_floating(grad.scalar_type(), "grad", [&]<typename T>() {
    GradientArgs<T> a{};
    a.grad = data<T>(upstream);
    a.out = mutable_data<T>(out);
    a.channels_last = is_channels_last(grad, format);
    a.align_corners = align_corners;
    a.images = n, a.channels = c, a.h = height, a.w = width;
    a.scale = grad.size(2) / height, a.height = grad.size(2), a.width = grad.size(3);
    Scratch scratch;
    scratch.add(a.rows, by_gaps(a) ? 0 : a.height);
    scratch.add(a.columns, by_gaps(a) ? 0 : a.width);
    const at::Tensor tables = allocate(scratch, grad);
    run_subdivide_backward(launch, a);
  });
  return out;
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) {
  m.impl("subdivide", TORCH_FN(rendseg::subdivide_cuda));
  m.impl("_subdivide_labels", TORCH_FN(rendseg::subdivide_labels_cuda));
  m.impl("_subdivide_backward", TORCH_FN(rendseg::subdivide_backward_cuda));
}
