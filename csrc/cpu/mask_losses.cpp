// mask_losses and mask_costs on the CPU, forward and backward.
//
// A thread takes whole masks of logits, so that nothing is shared and results are the same for any number of threads.
// Sums are made of blocks of points, and added in double. Targets are gathered point by point in their own dtype.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "../mask_losses_common.h"
#include "../strided_tensors.h"
#include "zero_gradient.h"

#define RENDSEG_KERNELS "mask_losses_kernels.h"
#include "compile_kernels.h"
#include "spot_buffers.h"

namespace rendseg {
namespace {

int64_t whole_blocks(int64_t points) { return (points + kMaskBlock - 1) / kMaskBlock * kMaskBlock; }

template <typename A, typename E>
inline A element(E value) {
  if constexpr (kIsHalf<E>) {
    return static_cast<A>(static_cast<float>(value));
  } else {
    return static_cast<A>(value);
  }
}

// Target t at the points xy[count][2], at most kMaskBlock of them, into out[count].
template <typename A>
void target_values(const MaskView& target, int64_t t, const A* xy, int64_t count, MaskOptions options,
                   const Spots<A>& spots, A* out) {
  RENDSEG_PICK(find_spots<A>)(xy, count, target.canvas_height, target.canvas_width,
                              {options.nearest, options.border, false}, spots);
  with_mask_dtype<c10::Half, c10::BFloat16>(target.dtype, [&]<typename E>() {
    const E* mask = target.mask<E>(t);
    const int64_t stride_y = target.stride_y, stride_x = target.stride_x;
    const int64_t height = target.height, width = target.width;
    if (options.nearest) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t x = spots.x[i], y = spots.y[i];
        out[i] = x < width && y < height ? element<A>(mask[y * stride_y + x * stride_x]) : A(0);
      }
      return;
    }
    constexpr int64_t kAhead = 16;
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) {  // an address past the target is harmless here; it is formed as an integer
        const auto ahead = reinterpret_cast<uintptr_t>(mask) +
                           (spots.y[i + kAhead] * stride_y + spots.x[i + kAhead] * stride_x) * sizeof(E);
        __builtin_prefetch(reinterpret_cast<const void*>(ahead));
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + stride_y * sizeof(E)));
      }
      const int64_t x = spots.x[i], y = spots.y[i];
      if ((x >= 0) & (y >= 0) & (x + 1 < width) & (y + 1 < height)) {
        const E* p = mask + y * stride_y + x * stride_x;
        out[i] = element<A>(p[0]) * spots.weight[0][i] + element<A>(p[stride_x]) * spots.weight[1][i] +
                 element<A>(p[stride_y]) * spots.weight[2][i] + element<A>(p[stride_y + stride_x]) * spots.weight[3][i];
        continue;
      }
      A sum = 0;
      for (int k = 0; k < 4; ++k) {
        const int64_t at_x = x + (k & 1), at_y = y + (k >> 1);
        const bool inside = (at_x >= 0) & (at_y >= 0) & (at_x < width) & (at_y < height);
        sum += (inside ? element<A>(mask[at_y * stride_y + at_x * stride_x]) : A(0)) * spots.weight[k][i];
      }
      out[i] = sum;
    }
  });
}

// Reads one mask of logits after the other.
template <typename T>
class LogitReader {
  using A = Wide<T>;

 public:
  explicit LogitReader(const at::Tensor& logits) : map_(map_view(logits)) {}
  void open(int64_t image, int64_t query) { cells_ = map_.at<const T>(image, query); }
  // Up to whole vectors, of which the rest is zero.
  void values(const Spots<A>& spots, int64_t count, A* out) const {
    RENDSEG_PICK(spot_values<T>)(cells_, spot_plane(map_), spots, count, out);
    std::fill(out + count, out + kMaskBlock, A(0));
  }

 private:
  MapView map_;
  const T* cells_ = nullptr;
};

// ---- costs

template <typename T>
void mask_costs_kernel(const at::Tensor& logits, const MaskCall& call, const at::Tensor& coords,
                       at::Tensor& cross_entropy, at::Tensor& dice) {
  using A = Wide<T>;
  const int64_t points = coords.size(1), queries = logits.size(1), most = call.most_targets;
  const int64_t padded = whole_blocks(points), blocks = padded / kMaskBlock;
  const auto height = static_cast<int32_t>(logits.size(2)), width = static_cast<int32_t>(logits.size(3));
  const SpotBuffer<A> buffer(padded);
  const Spots<A> spots = buffer.view();
  for (int64_t b = 0; b < logits.size(0); ++b) {
    const MaskView& target = call.targets[b];
    if (target.count == 0) continue;
    const A* xy = coords.const_data_ptr<A>() + b * points * 2;
    const auto size_of = [&](int64_t block) { return std::min(kMaskBlock, points - block * kMaskBlock); };
    const std::unique_ptr<A[]> y(new A[target.count * padded]);
    std::vector<double> total(target.count, 0.0);
    at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RENDSEG_PICK(find_spots<A>)(xy + 2 * i * kMaskBlock, size_of(i), height, width,
                                    {false, call.options.border, false}, spots.from(i * kMaskBlock));
      }
    });
    at::parallel_for(0, target.count, 1, [&](int64_t begin, int64_t end) {
      const SpotBuffer<A> own(kMaskBlock);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t i = 0; i < blocks; ++i) {
          A* row = y.get() + t * padded + i * kMaskBlock;
          target_values(target, t, xy + 2 * i * kMaskBlock, size_of(i), call.options, own.view(), row);
          A sum = 0;
          for (int64_t k = 0; k < size_of(i); ++k) sum += row[k];
          total[t] += static_cast<double>(sum);
          std::fill(row + size_of(i), row + kMaskBlock, A(0));
        }
      }
    });
    at::parallel_for(0, queries, 1, [&](int64_t begin, int64_t end) {
      LogitReader<T> reader(logits);
      A x[kMaskBlock], s[kMaskBlock];
      std::vector<double> products(2 * target.count);
      for (int64_t q = begin; q < end; ++q) {
        reader.open(b, q);
        QuerySums sums;
        std::fill(products.begin(), products.end(), 0.0);
        for (int64_t i = 0; i < blocks; ++i) {
          reader.values(spots.from(i * kMaskBlock), size_of(i), x);
          RENDSEG_PICK(logistic_block<A>)(x, size_of(i), s, sums);
          RENDSEG_PICK(mask_products<A>)(x, s, size_of(i), y.get() + i * kMaskBlock, padded, target.count,
                                         products.data(), products.data() + target.count);
        }
        A* entropy_row = cross_entropy.mutable_data_ptr<A>() + (b * queries + q) * most;
        A* dice_row = dice.mutable_data_ptr<A>() + (b * queries + q) * most;
        for (int64_t t = 0; t < target.count; ++t) {
          const MaskSums<double> pair{sums.softplus - products[t], products[target.count + t], sums.sigmoid, total[t]};
          entropy_row[t] = static_cast<A>(pair.cross_entropy(points));
          dice_row[t] = static_cast<A>(pair.dice());
        }
      }
    });
  }
}

std::tuple<at::Tensor, at::Tensor> mask_costs_cpu(const at::Tensor& logits,  // [B,Q,H,W]
                                                  at::TensorList targets,    // each [T,h,w]
                                                  const at::Tensor& coords,  // [B,P,2]
                                                  c10::string_view label_mode, c10::string_view padding_mode,
                                                  at::OptionalIntArrayRef canvas) {
  const MaskCall call = check_mask_costs(logits, targets, coords, label_mode, padding_mode, canvas);
  const auto options = logits.options().dtype(loss_dtype(logits)).memory_format(at::MemoryFormat::Contiguous);
  at::Tensor cross_entropy = at::zeros({logits.size(0), logits.size(1), call.most_targets}, options);
  at::Tensor dice = at::zeros(cross_entropy.sizes(), options);
  if (cross_entropy.numel() == 0 || coords.size(1) == 0) return {cross_entropy, dice};
  const at::Tensor xy = coords_for(coords, logits.scalar_type());
  with_element(dtype_of(logits.scalar_type()),
               [&]<typename T>() { mask_costs_kernel<T>(logits, call, xy, cross_entropy, dice); });
  return {cross_entropy, dice};
}

// ---- losses

struct MaskPair {
  int64_t n, image, query, target;
};

// Copies of the indices, checked.
std::vector<MaskPair> read_pairs(const MaskPairs& indices, const at::Tensor& logits, const MaskCall& call) {
  const auto value = [](const at::Tensor& index, int64_t n) {
    return index.const_data_ptr<int64_t>()[n * index.stride(0)];
  };
  std::vector<MaskPair> pairs(indices.image.size(0));
  for (int64_t n = 0; n < indices.image.size(0); ++n) {
    const MaskPair pair{n, value(indices.image, n), value(indices.query, n), value(indices.target, n)};
    check_image(pair.image, n, logits.size(0));
    TORCH_CHECK_INDEX(0 <= pair.query && pair.query < logits.size(1), "query_index must lie in [0, Q) = [0, ",
                      logits.size(1), "), got ", pair.query, " at position ", n);
    const int64_t count = call.targets[pair.image].count;
    TORCH_CHECK_INDEX(0 <= pair.target && pair.target < count, "target_index must lie in [0, T) = [0, ", count,
                      ") of image ", pair.image, ", got ", pair.target, " at position ", n);
    pairs[n] = pair;
  }
  return pairs;
}

// One pair after the other: x, s = sigmoid(x) and y of each block of its points, and the sums.
template <typename T>
class PairWalk {
  using A = Wide<T>;

 public:
  PairWalk(const at::Tensor& logits, const MaskCall& call, const A* coords, int64_t points)
      : call_(call),
        coords_(coords),
        points_(points),
        height_(static_cast<int32_t>(logits.size(2))),
        width_(static_cast<int32_t>(logits.size(3))),
        reader(logits),
        at_logits_(kMaskBlock),
        at_target_(kMaskBlock) {}

  // Calls use(first, count, s, y, spots) for each block where `use` is given.
  MaskSums<A> operator()(const MaskPair& pair, A* s_of_block, A* y_of_block, bool keep) {
    QuerySums sums;
    std::vector<double> products(2, 0.0);
    double total = 0;
    A x[kMaskBlock];
    for (int64_t first = 0; first < points_; first += kMaskBlock) {
      const int64_t count = std::min(kMaskBlock, points_ - first);
      A* s = s_of_block + (keep ? first : 0);
      A* y = y_of_block + (keep ? first : 0);
      reader.values(spots(pair, first, count), count, x);
      target_values(call_.targets[pair.image], pair.target, at(pair, first), count, call_.options, at_target_.view(),
                    y);
      std::fill(y + count, y + kMaskBlock, A(0));
      RENDSEG_PICK(logistic_block<A>)(x, count, s, sums);
      RENDSEG_PICK(mask_products<A>)(x, s, count, y, kMaskBlock, 1, products.data(), products.data() + 1);
      A sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += y[i];
      total += static_cast<double>(sum);
    }
    return {static_cast<A>(sums.softplus - products[0]), static_cast<A>(products[1]), static_cast<A>(sums.sigmoid),
            static_cast<A>(total)};
  }
  // Where the points of a block lie on the logits.
  Spots<A> spots(const MaskPair& pair, int64_t first, int64_t count) const {
    const Spots<A> view = at_logits_.view();
    RENDSEG_PICK(find_spots<A>)(at(pair, first), count, height_, width_, {false, call_.options.border, false}, view);
    return view;
  }

 private:
  const A* at(const MaskPair& pair, int64_t first) const { return coords_ + (pair.n * points_ + first) * 2; }

  const MaskCall& call_;
  const A* coords_;
  int64_t points_;
  int32_t height_, width_;

 public:
  LogitReader<T> reader;

 private:
  SpotBuffer<A> at_logits_, at_target_;
};

std::tuple<at::Tensor, at::Tensor> mask_losses_cpu(const at::Tensor& logits,        // [B,Q,H,W]
                                                   at::TensorList targets,          // each [T,h,w]
                                                   const at::Tensor& coords,        // [N,P,2]
                                                   const at::Tensor& image_index,   // [N]
                                                   const at::Tensor& query_index,   // [N]
                                                   const at::Tensor& target_index,  // [N]
                                                   c10::string_view label_mode, c10::string_view padding_mode,
                                                   at::OptionalIntArrayRef canvas) {
  const MaskPairs indices{image_index, query_index, target_index};
  const MaskCall call = check_mask_losses(logits, targets, coords, indices, label_mode, padding_mode, canvas);
  const std::vector<MaskPair> pairs = read_pairs(indices, logits, call);
  const auto options = logits.options().dtype(loss_dtype(logits)).memory_format(at::MemoryFormat::Contiguous);
  at::Tensor cross_entropy = at::empty({coords.size(0)}, options), dice = at::empty({coords.size(0)}, options);
  const at::Tensor xy = coords_for(coords, logits.scalar_type());
  const int64_t points = coords.size(1);
  with_element(dtype_of(logits.scalar_type()), [&]<typename T>() {
    using A = Wide<T>;
    A* entropies = cross_entropy.mutable_data_ptr<A>();
    A* dices = dice.mutable_data_ptr<A>();
    at::parallel_for(0, coords.size(0), 1, [&](int64_t begin, int64_t end) {
      PairWalk<T> walk(logits, call, xy.const_data_ptr<A>(), points);
      A s[kMaskBlock], y[kMaskBlock];
      for (int64_t n = begin; n < end; ++n) {
        walk.reader.open(pairs[n].image, pairs[n].query);
        const MaskSums<A> sums = walk(pairs[n], s, y, false);
        entropies[n] = sums.cross_entropy(points);
        dices[n] = sums.dice();
      }
    });
  });
  return {cross_entropy, dice};
}

at::Tensor mask_losses_backward_cpu(const at::Tensor& cross_entropy_grad,  // [N]
                                    const at::Tensor& dice_grad,           // [N]
                                    const at::Tensor& logits, at::TensorList targets, const at::Tensor& coords,
                                    const at::Tensor& image_index, const at::Tensor& query_index,
                                    const at::Tensor& target_index, c10::string_view label_mode,
                                    c10::string_view padding_mode, at::OptionalIntArrayRef canvas) {
  const MaskPairs indices{image_index, query_index, target_index};
  const MaskCall call = check_mask_losses(logits, targets, coords, indices, label_mode, padding_mode, canvas);
  check_loss_grad(cross_entropy_grad, "cross_entropy_grad", logits, image_index);
  check_loss_grad(dice_grad, "dice_grad", logits, image_index);
  std::vector<MaskPair> pairs = read_pairs(indices, logits, call);
  const bool few = coords.size(0) < logits.size(0) * logits.size(1);
  at::Tensor result = zero_gradient(logits, few);
  const int64_t points = coords.size(1);
  if (pairs.empty() || points == 0) return result;
  // The pairs of one mask of logits follow each other, in the order of n.
  const auto mask_of = [&](const MaskPair& pair) { return pair.image * logits.size(1) + pair.query; };
  std::stable_sort(pairs.begin(), pairs.end(),
                   [&](const MaskPair& a, const MaskPair& b) { return mask_of(a) < mask_of(b); });
  std::vector<int64_t> first;
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (i == 0 || mask_of(pairs[i]) != mask_of(pairs[i - 1])) first.push_back(static_cast<int64_t>(i));
  }
  first.push_back(static_cast<int64_t>(pairs.size()));
  const at::Tensor xy = coords_for(coords, logits.scalar_type());
  with_element(dtype_of(logits.scalar_type()), [&]<typename T>() {
    using A = Wide<T>;
    const A* entropy_grads = cross_entropy_grad.const_data_ptr<A>();
    const A* dice_grads = dice_grad.const_data_ptr<A>();
    const MapView out = mutable_map_view(result);
    at::parallel_for(0, static_cast<int64_t>(first.size()) - 1, 1, [&](int64_t begin, int64_t end) {
      PairWalk<T> walk(logits, call, xy.const_data_ptr<A>(), points);
      PlaneSums<T> sums_of(spot_plane(out));
      const std::unique_ptr<A[]> s(new A[whole_blocks(points)]), y(new A[whole_blocks(points)]);
      for (int64_t mask = begin; mask < end; ++mask) {
        const MaskPair& of_mask = pairs[first[mask]];
        walk.reader.open(of_mask.image, of_mask.query);
        sums_of(out.at<T>(of_mask.image, of_mask.query), [&](A* cells, const SpotPlane& plane) {
          for (int64_t i = first[mask]; i < first[mask + 1]; ++i) {
            const MaskPair& pair = pairs[i];
            const MaskSums<A> sums = walk(pair, s.get(), y.get(), true);
            const MaskSlope<A> slope = mask_slope(sums, points, entropy_grads[pair.n * cross_entropy_grad.stride(0)],
                                                  dice_grads[pair.n * dice_grad.stride(0)]);
            for (int64_t at = 0; at < points; at += kMaskBlock) {
              const int64_t count = std::min(kMaskBlock, points - at);
              RENDSEG_PICK(add_slopes<A>)(cells, plane, walk.spots(pair, at, count), count, s.get() + at, y.get() + at,
                                          slope);
            }
          }
        });
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace rendseg

TORCH_LIBRARY_IMPL(rendseg, CPU, m) {
  m.impl("mask_losses", &rendseg::mask_losses_cpu);
  m.impl("_mask_losses_backward", &rendseg::mask_losses_backward_cpu);
  m.impl("mask_costs", &rendseg::mask_costs_cpu);
}
