// point_sample and point_labels on the CPU, forward and backward.
//
// Forward: a large NCHW map is read plane by plane at points in ascending order, so that each plane streams through the
// cache once, a small one or a mask at vectors of points; a channels_last map is read one vector per tap. Backward: the
// taps of an image are sorted by cell once, and every touched cell is then the sum of its taps in point order, held in
// registers and written once; nothing is shared between threads, so the result is the same for any number of them.
// Memory for the dense gradient comes zeroed from the system.
#include "point_sample.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#include "../point_sample_common.h"
#include "../strided_tensors.h"
#include "zero_gradient.h"

#define RENDSEG_KERNELS "point_sample_kernels.h"
#include "compile_kernels.h"
#include "spot_buffers.h"

namespace rendseg {
namespace {

constexpr int64_t kManyChannels = 8;                // from here on the taps of an image are worth sorting
constexpr int64_t kPointBlock = 512;                // points located at a time where they are not sorted
constexpr int64_t kCachedBytes = int64_t{8} << 20;  // an image below this stays in cache: order does not matter
constexpr int64_t kTaskWork = 1 << 15;              // taps worth a thread

// Scratch for the taps of up to `capacity` points.
template <typename A>
class TapBuffer {
 public:
  explicit TapBuffer(int64_t capacity)
      : offset_(new int64_t[capacity]),
        point_(new int64_t[capacity]),
        weight_(new A[4 * capacity]),
        inside_(new uint8_t[capacity]),
        capacity_(capacity) {}

  Taps<A> view(int64_t count) const {
    A* w = weight_.get();
    return {count,         offset_.get(), {w, w + capacity_, w + 2 * capacity_, w + 3 * capacity_},
            inside_.get(), point_.get(),  true};
  }

 private:
  std::unique_ptr<int64_t[]> offset_, point_;
  std::unique_ptr<A[]> weight_;
  std::unique_ptr<uint8_t[]> inside_;
  int64_t capacity_;
};

struct Keyed {
  int64_t key, index;
};

// Stable sort by key, least significant digit first: 2048 bins a pass. Keys are not negative.
void sort_by_key(std::vector<Keyed>& items, std::vector<Keyed>& spare) {
  int64_t largest = 0;
  bool sorted = true;
  for (size_t i = 0; i < items.size(); ++i) {
    largest = std::max(largest, items[i].key);
    sorted &= i == 0 || items[i - 1].key <= items[i].key;
  }
  if (sorted) return;
  spare.resize(items.size());
  for (int shift = 0; shift < 63 && (largest >> shift) > 0; shift += 11) {
    int64_t start[2048] = {};
    for (const Keyed& item : items) ++start[(item.key >> shift) & 2047];
    int64_t total = 0;
    for (int64_t& bin : start) total += std::exchange(bin, total);
    for (const Keyed& item : items) spare[start[(item.key >> shift) & 2047]++] = item;
    items.swap(spare);
  }
}

SampleGrid grid_of(const at::Tensor& map, const SampleCall& call) {
  return {map_view(map), call.nearest, call.border, call.align_corners};
}

// Locates the points of one image, in ascending order of memory; keeps what it needs between images.
template <typename T>
class SortedTaps {
  using A = Wide<T>;

 public:
  explicit SortedTaps(int64_t points) : plain_(points), sorted_(points) {}

  Taps<A> locate(const A* coords, int64_t points, const SampleGrid& grid) {
    const Taps<A> taps = plain_.view(points);
    RENDSEG_PICK(locate<A>)(coords, 0, grid, taps);
    order_.resize(points);
    int64_t lowest = 0;
    for (int64_t i = 0; i < points; ++i) lowest = std::min(lowest, taps.offset[i]);
    bool ascending = true;
    for (int64_t i = 0; i < points; ++i) {
      order_[i] = {taps.offset[i] - lowest, i};
      ascending &= i == 0 || order_[i - 1].key <= order_[i].key;
    }
    if (ascending) return taps;
    sort_by_key(order_, spare_);
    Taps<A> out = sorted_.view(points);
    out.in_order = false;
    for (int64_t i = 0; i < points; ++i) {
      const int64_t from = order_[i].index;
      out.offset[i] = taps.offset[from];
      out.inside[i] = taps.inside[from];
      out.point[i] = from;
      for (int t = 0; t < 4; ++t) out.weight[t][i] = taps.weight[t][from];
    }
    return out;
  }

 private:
  TapBuffer<A> plain_, sorted_;
  std::vector<Keyed> order_, spare_;
};

// map[N,C,H,W] at coords[N,P,2] into out[N,:,P], which points at the first channel of the map.
template <typename T>
void sample_kernel(const at::Tensor& map, const Wide<T>* coords, const SampleCall& call, T* out, int64_t out_stride_n) {
  using A = Wide<T>;
  const int64_t channels = map.size(1), points = call.points;
  const SampleGrid grid = grid_of(map, call);
  const SpotPlane plane = spot_plane(grid);
  const T* data = map.const_data_ptr<T>();
  const int64_t stride_n = map.stride(0), stride_c = map.stride(1);
  const auto planes = RENDSEG_PICK(planes<T>);
  const bool streams = channels * map.size(2) * map.size(3) * int64_t{sizeof(T)} >= kCachedBytes;
  if (channels >= kManyChannels && stride_c != 1 && streams) {
    constexpr int64_t kGroup = 16;
    const int64_t groups = (channels + kGroup - 1) / kGroup;
    const int64_t grain = std::max<int64_t>(1, kTaskWork / (points * kGroup * 4));
    at::parallel_for(0, call.images * groups, grain, [&](int64_t begin, int64_t end) {
      SortedTaps<T> sorted(points);
      Taps<A> taps{};
      int64_t located = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / groups, c = task % groups * kGroup;
        if (n != located) taps = sorted.locate(coords + n * points * 2, points, grid);
        located = n;
        planes(data + n * stride_n + c * stride_c, grid, taps, std::min(kGroup, channels - c),
               out + n * out_stride_n + c * points, points);
      }
    });
    return;
  }
  const int64_t image_bytes = channels * map.size(2) * map.size(3) * int64_t{sizeof(T)};
  const bool touch = worth_reading(image_bytes, points * channels) && map[0].is_non_overlapping_and_dense();
  const bool by_vectors = stride_c == 1 && channels >= kManyChannels;
  const bool by_spots = !by_vectors && !call.nearest && map.stride(3) == 1;
  const auto locate = RENDSEG_PICK(locate<A>);
  const auto vectors = RENDSEG_PICK(vectors<T>);
  const auto find_spots = RENDSEG_PICK(find_spots<A>);
  const auto spot_planes = RENDSEG_PICK(spot_planes<T>);
  const int64_t blocks = (points + kPointBlock - 1) / kPointBlock;
  const int64_t grain = std::max<int64_t>(1, kTaskWork / (std::min(points, kPointBlock) * channels * 4));
  at::parallel_for(0, call.images * blocks, grain, [&](int64_t begin, int64_t end) {
    const TapBuffer<A> buffer(by_spots ? 0 : kPointBlock);
    const SpotBuffer<A> spot_buffer(by_spots ? kPointBlock : 0);
    int64_t touched = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * kPointBlock,
                    count = std::min(kPointBlock, points - first);
      const A* at = coords + (n * points + first) * 2;
      if (touch && n != touched) read_lines(data + n * stride_n, image_bytes);
      touched = n;
      if (by_spots) {
        const Spots<A> spots = spot_buffer.view();
        find_spots(at, count, plane.height, plane.width, {false, call.border, call.align_corners}, spots);
        spot_planes(data + n * stride_n, stride_c, plane, spots, count, channels, out + n * out_stride_n + first,
                    points);
        continue;
      }
      const Taps<A> taps = buffer.view(count);
      locate(at, first, grid, taps);
      if (by_vectors) {
        vectors(data + n * stride_n, grid, taps, channels, out + n * out_stride_n, points);
      } else {
        planes(data + n * stride_n, grid, taps, channels, out + n * out_stride_n, points);
      }
    }
  });
}

// The taps of one image gathered by cell, taps of a cell in the order of points.
template <typename T>
class CellRuns {
  using A = Wide<T>;

 public:
  explicit CellRuns(int64_t points) : buffer_(points) {}

  Runs<A> gather(const A* coords, int64_t points, const SampleGrid& grid) {
    const Taps<A> taps = buffer_.view(points);
    RENDSEG_PICK(locate<A>)(coords, 0, grid, taps);
    items_.clear();
    const int corners = grid.nearest ? 1 : 4;
    for (int64_t i = 0; i < points; ++i) {
      for (int t = 0; t < corners; ++t) {
        if (!((taps.inside[i] >> t) & 1)) continue;
        items_.push_back({taps.offset[i] + (t & 1) * grid.stride_x + (t >> 1) * grid.stride_y, i * 4 + t});
      }
    }
    sort_by_key(items_, spare_);
    offset_.clear();
    begin_.clear();
    point_.resize(items_.size());
    weight_.resize(items_.size());
    for (size_t e = 0; e < items_.size(); ++e) {
      if (e == 0 || items_[e].key != items_[e - 1].key) {
        offset_.push_back(items_[e].key);
        begin_.push_back(static_cast<int64_t>(e));
      }
      point_[e] = items_[e].index >> 2;
      weight_[e] = taps.weight[items_[e].index & 3][point_[e]];
    }
    begin_.push_back(static_cast<int64_t>(items_.size()));
    return {static_cast<int64_t>(offset_.size()), offset_.data(), begin_.data(), point_.data(), weight_.data()};
  }

 private:
  TapBuffer<A> buffer_;
  std::vector<Keyed> items_, spare_;
  std::vector<int64_t> offset_, begin_, point_;
  std::vector<A> weight_;
};

// grad[N,C,P] of any strides into the zeroed result[N,C,H,W].
template <typename T>
void sample_backward_kernel(const at::Tensor& grad, const Wide<T>* coords, const SampleCall& call, at::Tensor& result) {
  using A = Wide<T>;
  const int64_t channels = result.size(1), points = call.points;
  const SampleGrid grid = grid_of(result, call);
  const T* g = grad.const_data_ptr<T>();
  T* data = result.mutable_data_ptr<T>();
  const int64_t stride_n = result.stride(0), stride_c = result.stride(1);
  const int64_t grad_n = grad.stride(0), grad_c = grad.stride(1), grad_p = grad.stride(2);
  const bool adjacent = stride_c == 1 && channels > 1;
  if (channels < kManyChannels && !adjacent) {
    // Few channels: sorting costs more than it saves.
    const SpotPlane plane = spot_plane(grid);
    const auto find_spots = RENDSEG_PICK(find_spots<A>);
    const auto add_plane = RENDSEG_PICK(add_plane<T>);
    const SpotOptions options{call.nearest, call.border, call.align_corners};
    at::parallel_for(
        0, call.images * channels, std::max<int64_t>(1, kTaskWork / (points * 4)), [&](int64_t begin, int64_t end) {
          const SpotBuffer<A> buffer(kPointBlock);
          PlaneSums<T> sums(plane);
          for (int64_t task = begin; task < end; ++task) {
            const int64_t n = task / channels, c = task % channels;
            sums(data + n * stride_n + c * stride_c, [&](A* cells, const SpotPlane& at) {
              for (int64_t first = 0; first < points; first += kPointBlock) {
                const int64_t count = std::min(kPointBlock, points - first);
                const Spots<A> spots = buffer.view();
                find_spots(coords + (n * points + first) * 2, count, at.height, at.width, options, spots);
                add_plane(cells, at, spots, count, call.nearest, g + n * grad_n + c * grad_c + first * grad_p, grad_p);
              }
            });
          }
        });
    return;
  }
  const int64_t width = adjacent ? kVectorChunk : kPlaneChunk;
  const int64_t groups = (channels + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, kTaskWork / (points * width * 4));
  const auto transpose_grad = RENDSEG_PICK(transpose_grad<T>);
  const auto write_vectors = RENDSEG_PICK(write_vectors<T>);
  const auto write_planes = RENDSEG_PICK(write_planes<T>);
  at::parallel_for(0, call.images * groups, grain, [&](int64_t begin, int64_t end) {
    CellRuns<T> cells(points);
    Runs<A> runs{};
    const std::unique_ptr<A[]> chunk(new A[points * width]);
    int64_t gathered = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups, c = task % groups * width, count = std::min(width, channels - c);
      if (n != gathered) runs = cells.gather(coords + n * points * 2, points, grid);
      gathered = n;
      transpose_grad(g + n * grad_n + c * grad_c, grad_c, grad_p, points, count, width, chunk.get());
      T* target = data + n * stride_n + c * stride_c;
      if (adjacent) {
        write_vectors(runs, chunk.get(), count, target);
      } else {
        write_planes(runs, chunk.get(), count, target, stride_c);
      }
    }
  });
}

// d loss / d coords, added to result[N,P,2]: with d_t = sum over channels of grad * (value of tap t), the slope in x is
// (d_ne - d_nw) * south weight + (d_se - d_sw) * north weight, and likewise in y.
template <typename T>
void coords_backward_kernel(const at::Tensor& grad, const at::Tensor& map, const Wide<T>* coords,
                            const SampleCall& call, Wide<T>* result) {
  using A = Wide<T>;
  const int64_t channels = map.size(1), points = call.points;
  const SampleGrid grid = grid_of(map, call);
  const T* g = grad.const_data_ptr<T>();
  const T* data = map.const_data_ptr<T>();
  const int64_t stride_n = map.stride(0), stride_c = map.stride(1);
  const int64_t grad_n = grad.stride(0), grad_c = grad.stride(1), grad_p = grad.stride(2);
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (points + kBlock - 1) / kBlock;
  at::parallel_for(
      0, call.images * blocks, std::max<int64_t>(1, kTaskWork / (kBlock * channels * 4)),
      [&](int64_t begin, int64_t end) {
        const TapBuffer<A> buffer(kBlock);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t n = task / blocks, first = task % blocks * kBlock;
          const Taps<A> taps = buffer.view(std::min(kBlock, points - first));
          const A* at = coords + (n * points + first) * 2;
          RENDSEG_PICK(locate<A>)(at, first, grid, taps);
          A dot[kBlock][4] = {};
          const auto add = [&](int64_t i, int64_t c) {
            const A upstream = static_cast<A>(g[n * grad_n + c * grad_c + (first + i) * grad_p]);
            const T* cell = data + n * stride_n + c * stride_c;
            for (int t = 0; t < 4; ++t) {
              if (!((taps.inside[i] >> t) & 1)) continue;
              dot[i][t] +=
                  upstream * static_cast<A>(cell[taps.offset[i] + (t & 1) * grid.stride_x + (t >> 1) * grid.stride_y]);
            }
          };
          if (stride_c == 1) {
            for (int64_t i = 0; i < taps.count; ++i) {
              for (int64_t c = 0; c < channels; ++c) add(i, c);
            }
          } else {
            for (int64_t c = 0; c < channels; ++c) {
              for (int64_t i = 0; i < taps.count; ++i) add(i, c);
            }
          }
          for (int64_t i = 0; i < taps.count; ++i) {
            const A cx = at[2 * i], cy = at[2 * i + 1];
            const AxisTaps<A> x = axis_taps(cx, grid.width, call.border, call.align_corners);
            const AxisTaps<A> y = axis_taps(cy, grid.height, call.border, call.align_corners);
            const A* d = dot[i];
            A* out = result + (n * points + first + i) * 2;
            out[0] += ((d[1] - d[0]) * y.near + (d[3] - d[2]) * y.far) *
                      position_slope(cx, grid.width, call.border, call.align_corners);
            out[1] += ((d[2] - d[0]) * x.near + (d[3] - d[1]) * x.far) *
                      position_slope(cy, grid.height, call.border, call.align_corners);
          }
        }
      });
}

}  // namespace

void gather_rows_cpu(const MapView& map, const float* coords, int64_t num_points, bool border, bool align_corners,
                     void* rows, Dtype rows_dtype, int64_t row_stride) {
  TORCH_INTERNAL_ASSERT((map.dtype == Dtype::kDouble) == (rows_dtype == Dtype::kDouble));
  const SampleGrid grid{map, false, border, align_corners};
  with_element(map.dtype, [&]<typename T>() {
    using A = Wide<T>;
    constexpr int64_t kPoints = 64, kChannels = 64;
    int64_t offset[kPoints], point[kPoints];
    A weight[4][kPoints], xy[2 * kPoints], tile[kPoints][kChannels];
    uint8_t inside[kPoints];
    const T* data = static_cast<const T*>(map.data);
    for (int64_t first = 0; first < num_points; first += kPoints) {
      const int64_t count = std::min(kPoints, num_points - first);
      const Taps<A> taps{count, offset, {weight[0], weight[1], weight[2], weight[3]}, inside, point, true};
      for (int64_t i = 0; i < 2 * count; ++i) xy[i] = static_cast<A>(coords[2 * first + i]);
      RENDSEG_PICK(locate<A>)(xy, first, grid, taps);
      const auto rows_of = [&](int64_t c, int64_t n, A* target, int64_t stride) {
        if (map.stride_c == 1) {
          RENDSEG_PICK(vector_rows<T>)(data + c, grid, taps, n, target, stride);
        } else {
          RENDSEG_PICK(plane_rows<T>)(data + c * map.stride_c, grid, taps, n, target, stride);
        }
      };
      if (element_size(rows_dtype) == sizeof(A)) {
        rows_of(0, map.channels, static_cast<A*>(rows) + first * row_stride, row_stride);
        continue;
      }
      if constexpr (std::is_same_v<A, float>) {
        for (int64_t c = 0; c < map.channels; c += kChannels) {
          const int64_t n = std::min(kChannels, map.channels - c);
          rows_of(c, n, tile[0], kChannels);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (first + i) * row_stride + c;
            if (rows_dtype == Dtype::kHalf) {
              RENDSEG_PICK(narrow_row<c10::Half>)(tile[i], n, static_cast<c10::Half*>(rows) + at);
            } else {
              RENDSEG_PICK(narrow_row<c10::BFloat16>)(tile[i], n, static_cast<c10::BFloat16*>(rows) + at);
            }
          }
        }
      }
    }
  });
}

at::Tensor point_sample_cpu(at::TensorList input, const at::Tensor& coords, c10::string_view mode,
                            c10::string_view padding_mode, bool align_corners) {
  const SampleCall call = check_point_sample(input, coords, mode, padding_mode, align_corners);
  at::Tensor out =
      at::empty(sample_sizes(input, coords), input[0].options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const int64_t stride_n = total_channels(input, "input") * call.points;
  const at::Tensor xy = coords_for(coords, input[0].scalar_type());
  with_element(dtype_of(input[0].scalar_type()), [&]<typename T>() {
    T* target = out.mutable_data_ptr<T>();
    for (const at::Tensor& map : input) {
      sample_kernel<T>(map, xy.const_data_ptr<Wide<T>>(), call, target, stride_n);
      target += map.size(1) * call.points;
    }
  });
  return out;
}

// One gradient per map, then that of coords; an empty [0] tensor where it was not asked for.
std::vector<at::Tensor> point_sample_backward_cpu(const at::Tensor& grad,  // as the output
                                                  at::TensorList input, const at::Tensor& coords, c10::string_view mode,
                                                  c10::string_view padding_mode, bool align_corners, bool input_grad,
                                                  bool coords_grad) {
  const SampleCall call = check_point_sample(input, coords, mode, padding_mode, align_corners);
  check_sample_grad(grad, input, coords);
  std::vector<at::Tensor> result;
  for (const at::Tensor& map : input) {
    result.push_back(input_grad ? zero_gradient(map) : at::empty({0}, map.options()));
  }
  result.push_back(coords_grad ? at::zeros_like(coords, at::MemoryFormat::Contiguous)
                               : at::empty({0}, coords.options()));
  if (grad.numel() == 0) return result;
  const at::Tensor xy = coords_for(coords, input[0].scalar_type());
  const at::Tensor flat = grad.reshape({call.images, grad.size(1), call.points});
  const at::Tensor slope =
      coords_grad && !call.nearest ? at::zeros_like(xy, at::MemoryFormat::Contiguous) : at::Tensor();
  with_element(dtype_of(input[0].scalar_type()), [&]<typename T>() {
    const auto* at = xy.const_data_ptr<Wide<T>>();
    int64_t channel = 0;
    for (size_t i = 0; i < input.size(); ++i) {
      const at::Tensor part = flat.narrow(1, channel, input[i].size(1));
      channel += input[i].size(1);
      if (input_grad && result[i].numel() > 0) sample_backward_kernel<T>(part, at, call, result[i]);
      if (slope.defined()) {
        coords_backward_kernel<T>(part, input[i], at, call, slope.template mutable_data_ptr<Wide<T>>());
      }
    }
  });
  if (slope.defined()) result.back().copy_(slope);
  return result;
}

at::Tensor point_labels_cpu(const at::Tensor& labels, const at::Tensor& coords, int64_t ignore_index) {
  check_point_labels(labels, coords);
  const at::ScalarType dtype = labels.scalar_type();
  const int64_t images = coords.size(0), points = coords.size(1), height = labels.size(1), width = labels.size(2);
  at::Tensor out = at::empty({images, points}, labels.options().dtype(at::kLong));
  if (out.numel() == 0) return out;
  const at::Tensor xy = coords.contiguous();
  int64_t* target = out.mutable_data_ptr<int64_t>();
  const auto pick = [&](auto label_tag, auto coord_tag) {
    const auto* map = labels.const_data_ptr<decltype(label_tag)>();
    const auto* at = xy.const_data_ptr<decltype(coord_tag)>();
    const int64_t stride_n = labels.stride(0), stride_y = labels.stride(1), stride_x = labels.stride(2);
    at::parallel_for(0, images * points, kTaskWork / 4, [&](int64_t begin, int64_t end) {
      int64_t n = begin / points, p = begin % points;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t x = holding_cell(at[2 * i], width), y = holding_cell(at[2 * i + 1], height);
        target[i] =
            (x < 0) | (y < 0) ? ignore_index : static_cast<int64_t>(map[n * stride_n + y * stride_y + x * stride_x]);
        if (++p == points) ++n, p = 0;
      }
    });
  };
  const auto with_labels = [&](auto coord_tag) {
    switch (dtype) {
      case at::kByte:
        return pick(uint8_t{}, coord_tag);
      case at::kChar:
        return pick(int8_t{}, coord_tag);
      case at::kShort:
        return pick(int16_t{}, coord_tag);
      case at::kInt:
        return pick(int32_t{}, coord_tag);
      default:
        return pick(int64_t{}, coord_tag);
    }
  };
  xy.scalar_type() == at::kDouble ? with_labels(double{}) : with_labels(float{});
  return out;
}

}  // namespace rendseg

TORCH_LIBRARY_IMPL(rendseg, CPU, m) {
  m.impl("point_sample", &rendseg::point_sample_cpu);
  m.impl("_point_sample_backward", &rendseg::point_sample_backward_cpu);
  m.impl("point_labels", &rendseg::point_labels_cpu);
}
