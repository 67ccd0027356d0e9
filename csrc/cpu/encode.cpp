// Encoding layer (Zhang et al., Context Encoding for Semantic Segmentation, 2018, section 3): scaled_l2, aggregate and
// encode with their gradients, host side. The kernels are in encode_kernels.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../encode_common.h"
#include "../strided_tensors.h"
#include "huge_pages.h"

#define RENDSEG_KERNELS "encode_kernels.h"
#include "compile_kernels.h"

namespace rendseg {
namespace {

using at::Tensor;

// ---- Tensors as the kernels want them

template <typename T>
constexpr at::ScalarType kArithmetic = std::is_same_v<T, double> ? at::kDouble : at::kFloat;

// x[B,D,H,W] or [B,D,M]
PointsView view_of_map(const Tensor& x) {
  if (x.dim() == 3) return points_view(x);
  return {const_cast<void*>(x.const_data_ptr()),
          dtype_of(x.scalar_type()),
          x.size(0),
          x.size(1),
          positions_of(x),
          x.stride(0),
          x.stride(1),
          x.size(3) > 1 ? x.stride(3) : x.stride(2)};
}

// t[B,M,D] or [B,M,K]
PointsView view_of_rows(const Tensor& t) { return points_view(t.transpose(1, 2)); }

// t[B,K,D] as [B][D][padded], in the type of the arithmetic.
template <typename T>
std::vector<T> pack(const Tensor& t, int64_t padded) {
  const Tensor dense = t.to(kArithmetic<T>).contiguous();
  const T* from = dense.template const_data_ptr<T>();
  const int64_t codes = t.size(1), channels = t.size(2);
  std::vector<T> packed(t.size(0) * channels * padded);
  for (int64_t b = 0; b < t.size(0); ++b) {
    for (int64_t k = 0; k < codes; ++k) {
      for (int64_t d = 0; d < channels; ++d) packed[(b * channels + d) * padded + k] = *from++;
    }
  }
  return packed;
}

// The codewords and the scale in the type of the arithmetic, packed for the kernels.
template <typename T>
struct Codebook {
  Codebook(const Tensor& codewords_, const Tensor* scale_)
      : codes(codewords_.size(0)),
        channels(codewords_.size(1)),
        padded((codes + kEncodePad - 1) / kEncodePad * kEncodePad),
        codewords(pack<T>(codewords_.unsqueeze(0), padded)),
        scale(padded) {
    if (scale_ != nullptr) {
      const Tensor dense = scale_->to(kArithmetic<T>).contiguous();
      std::copy_n(dense.template const_data_ptr<T>(), codes, scale.begin());
    }
  }
  int64_t codes, channels, padded;
  std::vector<T> codewords, scale;  // [D][padded], [padded]
};

// What the centred form of encode needs.
template <typename T>
class Centred {
 public:
  Centred(const Codebook<T>& book, EncodeTask<T>& task)
      : centre_(book.channels), codewords_(book.codewords), squares_(book.padded) {
    for (int64_t d = 0; d < book.channels; ++d) {
      T* row = codewords_.data() + d * book.padded;
      for (int64_t k = 0; k < book.codes; ++k) centre_[d] += row[k] / static_cast<T>(book.codes);
      for (int64_t k = 0; k < book.codes; ++k) row[k] -= centre_[d], squares_[k] += row[k] * row[k];
    }
    task.centre = centre_.data();
    task.centred = codewords_.data();
    task.centred_squares = squares_.data();
  }
  // grad[B][D][padded]
  void add_grad(const Codebook<T>& book, const std::vector<T>& grad, EncodeTask<T>& task) {
    products_.resize(task.batch * book.padded);
    rows_.resize(task.batch * 2 * book.padded * book.channels);
    for (int64_t b = 0; b < task.batch; ++b) {
      const T* from = grad.data() + b * book.channels * book.padded;
      T* rows = rows_.data() + b * 2 * book.padded * book.channels;
      for (int64_t d = 0; d < book.channels; ++d) {
        for (int64_t k = 0; k < book.padded; ++k) {
          const T g = from[d * book.padded + k], c = codewords_[d * book.padded + k];
          products_[b * book.padded + k] += g * c;
          rows[k * book.channels + d] = g;
          rows[(book.padded + k) * book.channels + d] = -c;
        }
      }
    }
    task.centred_grad = products_.data();
    task.code_rows = rows_.data();
    // An infinite gradient times a residual is not the difference of two products.
    if (!std::all_of(products_.begin(), products_.end(), [](T v) { return std::isfinite(v); })) task.centre = nullptr;
  }

 private:
  std::vector<T> centre_, codewords_, squares_, products_, rows_;
};

// ---- The run over chunks

constexpr int64_t kChunks = 32;                       // of all images together; bounds the threads that share one image
constexpr int64_t kPartialBytes = int64_t{16} << 20;  // of all partial sums, where one per image allows it

template <typename T>
EncodeTask<T> plan(int64_t batch, int64_t positions, const Codebook<T>& book) {
  EncodeTask<T> task;
  task.batch = batch;
  task.positions = positions;
  task.channels = book.channels;
  task.codes = book.codes;
  task.padded = book.padded;
  task.codewords = book.codewords.data();
  task.scale = book.scale.data();
  const int64_t tiles = (positions + kEncodeTile - 1) / kEncodeTile;
  const int64_t partial = std::max<int64_t>(1, book.channels * book.padded * static_cast<int64_t>(sizeof(T)));
  const int64_t wanted = std::clamp<int64_t>(kPartialBytes / partial, 1, kChunks);
  const int64_t per_image = std::max<int64_t>(1, wanted / batch);
  task.chunk_tiles = (tiles + per_image - 1) / per_image;
  task.chunks = (tiles + task.chunk_tiles - 1) / task.chunk_tiles;
  return task;
}

template <typename T>
void run(const EncodeTask<T>& task, void (*kernel)(const EncodeTask<T>&, int64_t, int64_t)) {
  at::parallel_for(0, task.batch * task.chunks, 1, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

// Partial sums of every chunk, [batch * chunks][width], and their totals in a fixed order.
template <typename T>
class Partials {
 public:
  Partials(const EncodeTask<T>& task, int64_t width)
      : batch_(task.batch),
        chunks_(task.chunks),
        width_(width),
        values_(at::empty({batch_ * chunks_, width}, at::TensorOptions().dtype(kArithmetic<T>))) {}
  T* data() { return values_.template mutable_data_ptr<T>(); }

  // [batch][width], or [width] over all images; left in the first rows of the partial sums themselves
  const T* per_image() { return reduce(batch_, chunks_); }
  const T* whole() { return reduce(1, batch_ * chunks_); }

 private:
  const T* reduce(int64_t groups, int64_t members) {
    T* values = data();
    if (members == 1) return values;
    at::parallel_for(0, width_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t g = 0; g < groups; ++g) {
        T* total = values + g * width_;
        const T* from = values + g * members * width_;
        if (g > 0) std::copy(from + begin, from + end, total + begin);
        for (int64_t i = 1; i < members; ++i) {
          const T* part = from + i * width_;
          for (int64_t j = begin; j < end; ++j) total[j] += part[j];
        }
      }
    });
    return values;
  }
  int64_t batch_, chunks_, width_;
  Tensor values_;
};

// The inverse of pack: sums[B][D][padded] as [B,K,D].
template <typename T>
Tensor unpack(int64_t batch, const Codebook<T>& book, const T* sums) {
  Tensor out = at::empty({batch, book.codes, book.channels}, at::TensorOptions().dtype(kArithmetic<T>));
  T* to = out.template mutable_data_ptr<T>();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < book.codes; ++k) {
      for (int64_t d = 0; d < book.channels; ++d) *to++ = sums[(b * book.channels + d) * book.padded + k];
    }
  }
  return out;
}

// [K,D]: the gradient of the codewords. Either part may be absent: `grad` with sum_assigned [B][padded], the part
// through the residuals; sum_residual [D][padded], the part through the distances.
template <typename T>
Tensor codeword_grad(int64_t batch, const Codebook<T>& book, const T* grad, const T* sum_assigned,
                     const T* sum_residual) {
  Tensor out = at::empty({book.codes, book.channels}, at::TensorOptions().dtype(kArithmetic<T>));
  T* to = out.template mutable_data_ptr<T>();
  for (int64_t k = 0; k < book.codes; ++k) {
    for (int64_t d = 0; d < book.channels; ++d) {
      const int64_t at = d * book.padded + k;
      T value = 0;
      for (int64_t b = 0; b < batch && grad != nullptr; ++b) {
        value -= sum_assigned[b * book.padded + k] * grad[b * book.channels * book.padded + at];
      }
      if (sum_residual != nullptr) value -= 2 * book.scale[k] * sum_residual[at];
      *to++ = value;
    }
  }
  return out;
}

template <typename T>
Tensor first_codes(const T* values, int64_t codes) {
  Tensor out = at::empty({codes}, at::TensorOptions().dtype(kArithmetic<T>));
  std::copy_n(values, codes, out.template mutable_data_ptr<T>());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> zero_grads(const Tensor& a, const Tensor& b, const Tensor& c) {
  return {at::zeros_like(a), at::zeros_like(b, at::MemoryFormat::Contiguous),
          at::zeros_like(c, at::MemoryFormat::Contiguous)};
}

// ---- scaled_l2

template <typename T>
Tensor scaled_l2_impl(const Tensor& x, const Tensor& codewords, const Tensor& scale, Tensor out) {
  const Codebook<T> book(codewords, &scale);
  EncodeTask<T> task = plan(x.size(0), x.size(1), book);
  task.x = view_of_rows(x);
  task.map_out = view_of_rows(out);
  run(task, RENDSEG_PICK(scaled_l2<T>));
  return out;
}

Tensor scaled_l2_cpu(const Tensor& x,          // [B,M,D]
                     const Tensor& codewords,  // [K,D]
                     const Tensor& scale) {    // [K]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, &scale);
  Tensor out = at::empty({x.size(0), x.size(1), codewords.size(0)}, x.options().dtype(promoted(x, codewords, scale)));
  if (out.numel() == 0) return out;
  return any_double({&x, &codewords, &scale}) ? scaled_l2_impl<double>(x, codewords, scale, out)
                                              : scaled_l2_impl<float>(x, codewords, scale, out);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> scaled_l2_backward_impl(const Tensor& grad, const Tensor& x, const Tensor& codewords,
                                                           const Tensor& scale) {
  const Codebook<T> book(codewords, &scale);
  EncodeTask<T> task = plan(x.size(0), x.size(1), book);
  Tensor x_grad = at::empty_like(x);
  Partials<T> residual(task, book.channels * book.padded), scale_sum(task, book.padded);
  task.x = view_of_rows(x);
  task.map = view_of_rows(grad);
  task.x_grad = view_of_rows(x_grad);
  task.sum_residual = residual.data();
  task.sum_scale = scale_sum.data();
  run(task, RENDSEG_PICK(scaled_l2_backward<T>));
  const Tensor codes = codeword_grad<T>(task.batch, book, nullptr, nullptr, residual.whole());
  return {x_grad, codes.to(codewords.scalar_type()),
          first_codes(scale_sum.whole(), book.codes).to(scale.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> scaled_l2_backward_cpu(const Tensor& grad,       // [B,M,K]
                                                          const Tensor& x,          // [B,M,D]
                                                          const Tensor& codewords,  // [K,D]
                                                          const Tensor& scale) {    // [K]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, &scale);
  check_three(grad, "grad", "[B, M, K]", x.size(0), x.size(1), codewords.size(0), x);
  if (x.numel() == 0) return zero_grads(x, codewords, scale);
  return any_double({&grad, &x, &codewords, &scale}) ? scaled_l2_backward_impl<double>(grad, x, codewords, scale)
                                                     : scaled_l2_backward_impl<float>(grad, x, codewords, scale);
}

// ---- aggregate

template <typename T>
Tensor aggregate_impl(const Tensor& assignment, const Tensor& x, const Tensor& codewords) {
  const Codebook<T> book(codewords, nullptr);
  EncodeTask<T> task = plan(x.size(0), x.size(1), book);
  Partials<T> residual(task, book.channels * book.padded);
  task.x = view_of_rows(x);
  task.map = view_of_rows(assignment);
  task.sum_residual = residual.data();
  run(task, RENDSEG_PICK(aggregate<T>));
  return unpack(task.batch, book, residual.per_image());
}

Tensor aggregate_cpu(const Tensor& assignment,   // [B,M,K]
                     const Tensor& x,            // [B,M,D]
                     const Tensor& codewords) {  // [K,D]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, nullptr);
  check_three(assignment, "assignment", "[B, M, K]", x.size(0), x.size(1), codewords.size(0), x);
  const at::ScalarType dtype = promoted(assignment, x, codewords);
  if (x.numel() == 0) return at::zeros({x.size(0), codewords.size(0), x.size(2)}, x.options().dtype(dtype));
  return (any_double({&assignment, &x, &codewords}) ? aggregate_impl<double>(assignment, x, codewords)
                                                    : aggregate_impl<float>(assignment, x, codewords))
      .to(dtype);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> aggregate_backward_impl(const Tensor& grad, const Tensor& assignment,
                                                           const Tensor& x, const Tensor& codewords) {
  const Codebook<T> book(codewords, nullptr);
  const std::vector<T> packed_grad = pack<T>(grad, book.padded);
  EncodeTask<T> task = plan(x.size(0), x.size(1), book);
  Tensor assignment_grad = at::empty_like(assignment), x_grad = at::empty_like(x);
  Partials<T> assigned(task, book.padded);
  task.x = view_of_rows(x);
  task.map = view_of_rows(assignment);
  task.map_out = view_of_rows(assignment_grad);
  task.x_grad = view_of_rows(x_grad);
  task.grad = packed_grad.data();
  task.sum_assigned = assigned.data();
  run(task, RENDSEG_PICK(aggregate_backward<T>));
  const Tensor codes = codeword_grad<T>(task.batch, book, task.grad, assigned.per_image(), nullptr);
  return {assignment_grad, x_grad, codes.to(codewords.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> aggregate_backward_cpu(const Tensor& grad,         // [B,K,D]
                                                          const Tensor& assignment,   // [B,M,K]
                                                          const Tensor& x,            // [B,M,D]
                                                          const Tensor& codewords) {  // [K,D]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, nullptr);
  check_three(assignment, "assignment", "[B, M, K]", x.size(0), x.size(1), codewords.size(0), x);
  check_three(grad, "grad", "[B, K, D]", x.size(0), codewords.size(0), x.size(2), x);
  if (x.numel() == 0) return zero_grads(assignment, x, codewords);
  return any_double({&grad, &assignment, &x, &codewords})
             ? aggregate_backward_impl<double>(grad, assignment, x, codewords)
             : aggregate_backward_impl<float>(grad, assignment, x, codewords);
}

// ---- encode

template <typename T>
Tensor encode_impl(const Tensor& x, const Tensor& codewords, const Tensor& scale) {
  const Codebook<T> book(codewords, &scale);
  EncodeTask<T> task = plan(x.size(0), positions_of(x), book);
  const Centred<T> centred(book, task);
  Partials<T> residual(task, book.channels * book.padded);
  task.x = view_of_map(x);
  task.sum_residual = residual.data();
  run(task, RENDSEG_PICK(encode<T>));
  return unpack(task.batch, book, residual.per_image());
}

Tensor encode_cpu(const Tensor& x,          // [B,D,H,W] or [B,D,M]
                  const Tensor& codewords,  // [K,D]
                  const Tensor& scale) {    // [K]
  check_map(x);
  check_codebook(x, x.size(1), codewords, &scale);
  const at::ScalarType dtype = promoted(x, codewords, scale);
  if (x.numel() == 0) return at::zeros({x.size(0), codewords.size(0), x.size(1)}, x.options().dtype(dtype));
  const Tensor input = is_walkable(x) ? x : x.contiguous();
  return (any_double({&x, &codewords, &scale}) ? encode_impl<double>(input, codewords, scale)
                                               : encode_impl<float>(input, codewords, scale))
      .to(dtype);
}

// x_grad[x]: written
template <typename T>
std::tuple<Tensor, Tensor> encode_backward_impl(const Tensor& grad, const Tensor& x, const Tensor& codewords,
                                                const Tensor& scale, const Tensor& x_grad) {
  const Codebook<T> book(codewords, &scale);
  const std::vector<T> packed_grad = pack<T>(grad, book.padded);
  EncodeTask<T> task = plan(x.size(0), positions_of(x), book);
  Centred<T> centred(book, task);
  centred.add_grad(book, packed_grad, task);
  Partials<T> residual(task, book.channels * book.padded), assigned(task, book.padded), scale_sum(task, book.padded);
  task.x = view_of_map(x);
  task.x_grad = view_of_map(x_grad);
  task.grad = packed_grad.data();
  task.sum_residual = residual.data();
  task.sum_assigned = assigned.data();
  task.sum_scale = scale_sum.data();
  run(task, RENDSEG_PICK(encode_backward<T>));
  const Tensor codes = codeword_grad<T>(task.batch, book, task.grad, assigned.per_image(), residual.whole());
  return {codes.to(codewords.scalar_type()), first_codes(scale_sum.whole(), book.codes).to(scale.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> encode_backward_cpu(const Tensor& grad,       // [B,K,D]
                                                       const Tensor& x,          // [B,D,H,W] or [B,D,M]
                                                       const Tensor& codewords,  // [K,D]
                                                       const Tensor& scale) {    // [K]
  check_map(x);
  check_codebook(x, x.size(1), codewords, &scale);
  check_three(grad, "grad", "[B, K, D]", x.size(0), codewords.size(0), x.size(1), x);
  if (x.numel() == 0) return zero_grads(x, codewords, scale);
  Tensor x_grad = at::empty_like(x);
  const Tensor input = is_walkable(x) ? x : x.contiguous();
  const Tensor target = is_walkable(x_grad) ? x_grad : at::empty_like(x_grad, at::MemoryFormat::Contiguous);
  prefer_huge_pages(target.mutable_data_ptr(), target.nbytes());
  auto [codes, scales] = any_double({&grad, &x, &codewords, &scale})
                             ? encode_backward_impl<double>(grad, input, codewords, scale, target)
                             : encode_backward_impl<float>(grad, input, codewords, scale, target);
  if (!target.is_same(x_grad)) x_grad.copy_(target);
  return {x_grad, codes, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(rendseg, CPU, m) {
  m.impl("scaled_l2", scaled_l2_cpu);
  m.impl("_scaled_l2_backward", scaled_l2_backward_cpu);
  m.impl("aggregate", aggregate_cpu);
  m.impl("_aggregate_backward", aggregate_backward_cpu);
  m.impl("encode", encode_cpu);
  m.impl("_encode_backward", encode_backward_cpu);
}

}  // namespace rendseg
