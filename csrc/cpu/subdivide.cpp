// subdivide and _subdivide_labels on the CPU: PointRend (Kirillov et al. 2020), section 3.1.
#include "subdivide.h"

#include <ATen/Parallel.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../strided_tensors.h"
#include "../subdivide_common.h"
#include "huge_pages.h"
#include "select.h"

#define RENDSEG_KERNELS "subdivide_kernels.h"
#include "compile_kernels.h"

namespace rendseg {

namespace {

constexpr size_t kHugeBytes = size_t{4} << 20;     // from here on page faults cost
constexpr size_t kStreamBytes = size_t{16} << 20;  // from here on the output does not stay in the cache
constexpr int64_t kRowBytes = 384 << 10;           // two interpolated source rows, to stay in L2
constexpr int64_t kBandRows = 32;
constexpr int64_t kGrain = 32768;  // fewest elements worth a thread

// The taps of the columns of one upsampling.
class Columns {
 public:
  Columns(UpsampleLevel& level, Dtype dtype, int64_t scale, bool align_corners)
      : padded_((level.width + 2 * kColumnPadding - 1) / kColumnPadding * kColumnPadding),
        taps_(2 * padded_),
        weights_(2 * padded_) {
    level.lower = taps_.data();
    level.upper = taps_.data() + padded_;
    dtype == Dtype::kDouble ? fill<double>(level, scale, align_corners) : fill<float>(level, scale, align_corners);
  }

 private:
  template <typename Acc>
  void fill(UpsampleLevel& level, int64_t scale, bool align_corners) {
    Acc* lower_weight = reinterpret_cast<Acc*>(weights_.data());
    Acc* upper_weight = lower_weight + padded_;
    for (int64_t x = 0; x < padded_; ++x) {
      const auto tap = upsample_tap<Acc>(std::min(x, level.width - 1), level.w, scale, align_corners);
      taps_[x] = static_cast<int32_t>(tap.lower);
      taps_[padded_ + x] = static_cast<int32_t>(tap.upper);
      lower_weight[x] = tap.lower_weight;
      upper_weight[x] = tap.upper_weight;
    }
    level.lower_weight = lower_weight;
    level.upper_weight = upper_weight;
  }

  int64_t padded_;
  std::vector<int32_t> taps_;
  std::vector<double> weights_;  // floats use the first half of it
};

// Runs every task and leaves keys and histograms behind.
void subdivide_kernel(SubdivideArgs& a, std::vector<UpsampleLevel>& levels) {
  const int64_t size = a.dtype == Dtype::kDouble ? 8 : 4;
  std::vector<Columns> columns;
  columns.reserve(levels.size());
  for (UpsampleLevel& level : levels) columns.emplace_back(level, a.dtype, a.scale, a.align_corners);
  a.levels = levels.data();
  a.depth = static_cast<int64_t>(levels.size());
  const int64_t padded = (a.width + kColumnPadding - 1) / kColumnPadding * kColumnPadding;
  // Fixed chunks; the thread count only deals them out. A band starts where a pair of rows between two source rows
  // does.
  const int64_t row_bytes = a.depth == 1 ? kRowBytes : kRowBytes / 2;
  a.tile_width = std::max(kColumnPadding, row_bytes / (2 * a.c * size) / kColumnPadding * kColumnPadding);
  a.tile_width = std::min(a.tile_width, padded);
  a.tiles = (a.width + a.tile_width - 1) / a.tile_width;
  a.band_rows = kBandRows;
  a.band_shift = a.align_corners ? 0 : a.scale / 2;
  a.bands = std::max<int64_t>(1, (a.height - a.band_shift + a.band_rows - 1) / a.band_rows);
  const int64_t tasks = a.n * a.bands * a.tiles, per_image = a.bands * a.tiles;
  const auto task_kernel = RENDSEG_PICK(subdivide_task);
  const auto fence = RENDSEG_PICK(subdivide_fence);
  const int64_t cells = std::min(a.height, a.band_rows) * std::min(a.width, a.tile_width) * a.c;
  at::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / cells), [&](int64_t begin, int64_t end) {
    const int64_t bytes = subdivide_scratch_bytes(a);
    const std::unique_ptr<char[]> memory(new char[bytes + 64]);
    char* scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
    std::vector<uint32_t> tables(2 * kHistogramBins);
    for (int64_t task = begin; task < end; ++task) {
      task_kernel(a, task, scratch, tables.data());
      if (task + 1 == end || (task + 1) % per_image == 0) {  // counts are integers: the order does not matter
        uint32_t* histogram = a.histograms + task / per_image * kHistogramBins;
        for (int bin = 0; bin < kHistogramBins; ++bin) {
          const uint32_t count = tables[bin] + tables[kHistogramBins + bin];
          if (count != 0) std::atomic_ref<uint32_t>(histogram[bin]).fetch_add(count, std::memory_order_relaxed);
        }
        std::fill(tables.begin(), tables.end(), 0u);
      }
    }
    if (a.stream) fence();
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_refined_cpu(const RefinedMap& map, int64_t num_points,
                                                                     int64_t scale, bool align_corners,
                                                                     const std::optional<at::Tensor>& class_index,
                                                                     SubdivideWanted wanted) {
  const at::Tensor& logits = map.base;
  const int64_t n = logits.size(0), c = logits.size(1);
  std::vector<UpsampleLevel> levels(map.steps.size() + 1);
  int64_t height = logits.size(2), width = logits.size(3);
  for (size_t i = 0; i < levels.size(); ++i) {
    UpsampleLevel& level = levels[i];
    level.h = height, level.w = width;
    level.height = height *= scale, level.width = width *= scale;
    if (i == map.steps.size()) break;
    level.indices = map.steps[i].indices.const_data_ptr<int64_t>();
    level.values = map.steps[i].values.const_data_ptr();
    level.count = map.steps[i].indices.size(1);
  }
  const int64_t cells = height * width;
  const int64_t k = std::min(num_points, cells);
  const at::MemoryFormat format = logits.suggest_memory_format();
  const at::TensorOptions options = logits.options();
  at::Tensor indices = at::empty({n, k}, options.dtype(at::kLong));
  at::Tensor coords = at::empty({n, k, 2}, options.dtype(at::kFloat));
  at::Tensor result;
  if (wanted == SubdivideWanted::kLogits) {
    result = at::empty({n, c, height, width}, options.memory_format(format));
  } else if (wanted == SubdivideWanted::kLabels) {
    const at::TensorOptions label_options = options.dtype(label_dtype(logits));
    // One channel has one label, so the kernel need not write it.
    result = c == 1 ? at::zeros({n, height, width}, label_options) : at::empty({n, height, width}, label_options);
  } else {
    result = at::empty({0}, options);
  }
  if (n == 0) return {result, indices, coords};

  const at::Tensor source = logits.contiguous(format);
  at::Tensor keys = at::empty({n, cells}, options.dtype(at::kInt));
  at::Tensor histograms = at::zeros({n, kHistogramBins}, options.dtype(at::kInt));
  at::Tensor channel;
  if (class_index.has_value()) {
    channel = class_index->clone(at::MemoryFormat::Contiguous);
    check_class_index(channel, logits);
  }
  if (result.nbytes() >= kHugeBytes) prefer_huge_pages(result.mutable_data_ptr(), result.nbytes());
  if (keys.nbytes() >= kHugeBytes) prefer_huge_pages(keys.mutable_data_ptr(), keys.nbytes());

  SubdivideArgs a{};
  a.dtype = dtype_of(logits.scalar_type());
  a.source = source.const_data_ptr();
  a.channels_last = format == at::MemoryFormat::ChannelsLast && c > 1;
  a.fine = wanted == SubdivideWanted::kLogits ? result.mutable_data_ptr() : nullptr;
  a.stream = a.fine != nullptr && !a.channels_last && result.nbytes() >= kStreamBytes &&
             width * result.element_size() % 64 == 0 && reinterpret_cast<uintptr_t>(a.fine) % 64 == 0;
  a.keys = reinterpret_cast<uint32_t*>(keys.mutable_data_ptr<int32_t>());
  a.labels = wanted == SubdivideWanted::kLabels && c > 1 ? result.mutable_data_ptr() : nullptr;
  a.wide_labels = c > 256;
  a.single = c == 1 || channel.defined();
  a.channel = channel.defined() ? channel.const_data_ptr<int64_t>() : nullptr;
  a.histograms = reinterpret_cast<uint32_t*>(histograms.mutable_data_ptr<int32_t>());
  a.n = n, a.c = c, a.height = height, a.width = width;
  a.scale = scale;
  a.align_corners = align_corners;
  subdivide_kernel(a, levels);

  int64_t* index_data = indices.mutable_data_ptr<int64_t>();
  float* coord_data = coords.mutable_data_ptr<float>();
  const auto select = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      select_smallest(a.keys + i * cells, cells, k, index_data + i * k, a.histograms + i * kHistogramBins);
      cell_centres(index_data + i * k, k, height, width, coord_data + 2 * i * k);
    }
  };
  if (n >= at::get_num_threads()) {
    at::parallel_for(0, n, std::max<int64_t>(1, kGrain / cells), select);
  } else {
    select(0, n);
  }
  return {result, indices, coords};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_cpu(const at::Tensor& logits, int64_t num_points,
                                                             int64_t scale_factor, bool align_corners,
                                                             const std::optional<at::Tensor>& class_index,
                                                             bool return_logits) {
  check_subdivide(logits, num_points, class_index, scale_factor);
  return subdivide_refined_cpu({logits, {}}, num_points, scale_factor, align_corners, class_index,
                               return_logits ? SubdivideWanted::kLogits : SubdivideWanted::kNothing);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_labels_cpu(const at::Tensor& logits, int64_t num_points,
                                                                    int64_t scale_factor, bool align_corners) {
  check_subdivide(logits, num_points, std::nullopt, scale_factor);
  check_label_classes(logits);
  return subdivide_refined_cpu({logits, {}}, num_points, scale_factor, align_corners, std::nullopt,
                               SubdivideWanted::kLabels);
}

TORCH_LIBRARY_IMPL(rendseg, CPU, m) {
  m.impl("subdivide", TORCH_FN(subdivide_cpu));
  m.impl("_subdivide_labels", TORCH_FN(subdivide_labels_cpu));
}

}  // namespace rendseg
