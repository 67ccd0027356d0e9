// uncertainty, uncertain_points and sample_uncertain_points on the CPU: PointRend (Kirillov et al. 2020), section 3.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "../uncertain_points_common.h"
#include "select.h"

#define RENDSEG_KERNELS "uncertain_points_kernels.h"
#include "compile_kernels.h"

namespace rendseg {
namespace {

constexpr int64_t kCellGrain = 16384;  // fewest cells worth a thread
constexpr int64_t kPointGrain = 4096;  // fewest candidate points worth a thread

// The maps of a batch; keeps the copy that unreadable strides need.
class LogitMaps {
 public:
  LogitMaps(const at::Tensor& logits, const std::optional<at::Tensor>& class_index,
            const std::optional<at::Tensor>& image_index = std::nullopt)
      : logits_(readable_maps(logits)), class_index_(class_index), image_index_(image_index) {
    map_.data = const_cast<void*>(logits_.const_data_ptr());
    map_.dtype = dtype_of(logits_.scalar_type());
    map_.images = logits_.size(0);
    map_.channels = logits_.size(1);
    map_.height = logits_.size(2);
    map_.width = logits_.size(3);
    map_.points = map_.height * map_.width;
    map_.stride_n = logits_.stride(0);
    map_.stride_c = logits_.stride(1);
    map_.stride_p = cell_stride(logits_);
  }

  MarginMap operator[](int64_t n) const {
    MarginMap map = map_;
    int64_t image = n;
    if (image_index_.has_value()) {
      image = image_index_->const_data_ptr<int64_t>()[n * image_index_->stride(0)];
      check_image(image, n, map.images);
    }
    int64_t offset = image * map.stride_n;
    if (class_index_.has_value()) {
      const int64_t chosen = class_index_->const_data_ptr<int64_t>()[n * class_index_->stride(0)];
      check_class(chosen, n, map.channels);
      offset += chosen * map.stride_c;
      map.channels = 1;
    }
    map.data = static_cast<char*>(map.data) + offset * element_size(map.dtype);
    return map;
  }

  int64_t images() const { return logits_.size(0); }
  int64_t cells() const { return map_.points; }

 private:
  at::Tensor logits_;
  std::optional<at::Tensor> class_index_, image_index_;
  MarginMap map_;
};

// Calls f(n, begin, end) for parts of the `size` cells of each of `images`, spread over the threads as one range.
template <typename F>
void for_each_part(int64_t images, int64_t size, int64_t grain, const F& f) {
  at::parallel_for(0, images * size, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / size;
      const int64_t stop = std::min(end, (n + 1) * size);
      f(n, begin - n * size, stop - n * size);
      begin = stop;
    }
  });
}

// First-pass histogram that several threads add to; integer counts, so their order does not matter.
class SharedHistogram {
 public:
  void add(const uint32_t* local) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int bin = 0; bin < kHistogramBins; ++bin) bins_[bin] += local[bin];
  }
  const uint32_t* bins() const { return bins_; }

 private:
  std::mutex mutex_;
  uint32_t bins_[kHistogramBins] = {};
};

// logits[N,C,H,W], class_index[N] -> [N,H,W] float32
at::Tensor uncertainty_cpu(const at::Tensor& logits, const std::optional<at::Tensor>& class_index) {
  check_logits(logits);
  check_class_index(class_index, logits);
  at::Tensor out = at::empty({logits.size(0), logits.size(2), logits.size(3)}, logits.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  const LogitMaps maps(logits, class_index);
  float* data = out.mutable_data_ptr<float>();
  const auto kernel = RENDSEG_PICK(uncertainty_kernel);
  for_each_part(maps.images(), maps.cells(), kCellGrain, [&](int64_t n, int64_t begin, int64_t end) {
    kernel(maps[n], begin, end, data + n * maps.cells() + begin);
  });
  return out;
}

// logits[N,C,H,W], class_index[N] -> indices[N,k] int64, coords[N,k,2] float32
std::tuple<at::Tensor, at::Tensor> uncertain_points_cpu(const at::Tensor& logits, int64_t num_points,
                                                        const std::optional<at::Tensor>& class_index) {
  check_logits(logits);
  check_num_points(num_points);
  check_class_index(class_index, logits);
  const int64_t images = logits.size(0);
  const int64_t height = logits.size(2);
  const int64_t width = logits.size(3);
  const int64_t cells = height * width;
  const int64_t k = std::min(num_points, cells);
  at::Tensor indices = at::empty({images, k}, logits.options().dtype(at::kLong));
  at::Tensor coords = at::empty({images, k, 2}, logits.options().dtype(at::kFloat));
  if (images == 0) return {indices, coords};
  int64_t* index_data = indices.mutable_data_ptr<int64_t>();
  float* coord_data = coords.mutable_data_ptr<float>();
  const LogitMaps maps(logits, class_index);
  const auto kernel = RENDSEG_PICK(margin_keys_kernel);
  const auto finish = [&](int64_t n, const uint32_t* keys, const uint32_t* histogram) {
    select_smallest(keys, cells, k, index_data + n * k, histogram);
    cell_centres(index_data + n * k, k, height, width, coord_data + n * k * 2);
  };
  if (images >= 4 * at::get_num_threads()) {  // an image at a time per thread, with one map of keys each
    at::parallel_for(0, images, std::max<int64_t>(1, kCellGrain / cells), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<uint32_t[]> keys(new uint32_t[static_cast<size_t>(cells)]);
      for (int64_t n = begin; n < end; ++n) {
        uint32_t histogram[kHistogramBins] = {};
        kernel(maps[n], 0, cells, keys.get(), histogram);
        finish(n, keys.get(), histogram);
      }
    });
  } else {  // all threads on one image after the other
    const std::unique_ptr<uint32_t[]> keys(new uint32_t[static_cast<size_t>(cells)]);
    for (int64_t n = 0; n < images; ++n) {
      SharedHistogram histogram;
      at::parallel_for(0, cells, kCellGrain, [&](int64_t begin, int64_t end) {
        uint32_t local[kHistogramBins] = {};
        kernel(maps[n], begin, end, keys.get() + begin, local);
        histogram.add(local);
      });
      finish(n, keys.get(), histogram.bins());
    }
  }
  return {indices, coords};
}

// Writes the `num_points` coordinates of one image: the most uncertain of drawn[candidates][2], then the uniform
// points that follow them.
class SampledSelection {
 public:
  SampledSelection(DrawCounts counts, SampleOptions options)
      : counts_(counts), options_(options), kernel_(RENDSEG_PICK(sampled_margin_keys_kernel)) {}

  // Threaded, unless called inside a parallel region. `keys` and `indices` are scratch of candidates and of kept.
  void operator()(const MarginMap& map, const float* drawn, uint32_t* keys, int64_t* indices, float* out) const {
    if (counts_.kept > 0) {
      SharedHistogram histogram;
      at::parallel_for(0, counts_.candidates, kPointGrain, [&](int64_t begin, int64_t end) {
        uint32_t local[kHistogramBins] = {};
        kernel_(map, drawn + 2 * begin, end - begin, options_, keys + begin, local);
        histogram.add(local);
      });
      select_smallest(keys, counts_.candidates, counts_.kept, indices, histogram.bins());
      for (int64_t i = 0; i < counts_.kept; ++i) {
        std::memcpy(out + 2 * i, drawn + 2 * indices[i], 2 * sizeof(float));
      }
    }
    std::memcpy(out + 2 * counts_.kept, drawn + 2 * counts_.candidates,
                static_cast<size_t>(2 * counts_.uniform) * sizeof(float));
  }

 private:
  DrawCounts counts_;
  SampleOptions options_;
  decltype(&baseline::sampled_margin_keys_kernel) kernel_;
};

// The key of one call's draws, which `torch.randint(2**63 - 1, (1,), generator=generator)` would give.
uint64_t draw_key(const std::optional<at::Generator>& generator) {
  auto* cpu = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(cpu->mutex_);
  return cpu->random64() % static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
}

// logits[B,C,H,W], class_index[N], image_index[N], random_coords[N,Q,2] -> coords[N,num_points,2] float32
at::Tensor sample_uncertain_points_cpu(const at::Tensor& logits, int64_t num_points, double oversample_ratio,
                                       double importance_ratio, const std::optional<at::Tensor>& class_index,
                                       const std::optional<at::Tensor>& image_index, c10::string_view padding_mode,
                                       bool align_corners, std::optional<at::Generator> generator,
                                       const std::optional<at::Tensor>& random_coords) {
  const DrawCounts counts = check_sample(logits, num_points, oversample_ratio, importance_ratio, class_index,
                                         image_index, padding_mode, generator, random_coords);
  const int64_t images = image_index.has_value() ? image_index->size(0) : logits.size(0);
  const int64_t total = counts.candidates + counts.uniform;
  at::Tensor given;
  if (random_coords.has_value()) given = random_coords->detach().contiguous();
  const auto options = logits.options().dtype(at::kFloat);
  at::Tensor coords = at::empty({images, num_points, 2}, options);
  if (images == 0) return coords;
  const LogitMaps maps(logits, class_index, image_index);
  const SampledSelection select(counts, {padding_mode == "border", align_corners});
  float* out = coords.mutable_data_ptr<float>();

  const int64_t pairs = (total + 1) / 2;
  const uint64_t key = given.defined() ? 0 : draw_key(generator);
  const auto draw = RENDSEG_PICK(uniform_pairs);
  // Any image can be drawn by itself, so whole images go to the threads where there are enough of them.
  const auto select_images = [&](int64_t begin, int64_t end) {
    std::vector<float> drawn(given.defined() ? 0 : 4 * pairs);
    std::vector<uint32_t> keys(counts.candidates);
    std::vector<int64_t> indices(counts.kept);
    for (int64_t n = begin; n < end; ++n) {
      const float* points = given.defined() ? given.const_data_ptr<float>() + n * total * 2 : drawn.data();
      if (!given.defined()) {
        at::parallel_for(0, pairs, kPointGrain, [&](int64_t first, int64_t last) {
          draw(key, n * pairs + first, last - first, drawn.data() + 4 * first);
        });
      }
      select(maps[n], points, keys.data(), indices.data(), out + n * num_points * 2);
    }
  };
  if (images < at::get_num_threads()) {
    select_images(0, images);
  } else {
    at::parallel_for(0, images, std::max<int64_t>(1, kPointGrain / total), select_images);
  }
  return coords;
}

}  // namespace
}  // namespace rendseg

TORCH_LIBRARY_IMPL(rendseg, CPU, m) {
  m.impl("uncertainty", &rendseg::uncertainty_cpu);
  m.impl("uncertain_points", &rendseg::uncertain_points_cpu);
  m.impl("sample_uncertain_points", &rendseg::sample_uncertain_points_cpu);
}
