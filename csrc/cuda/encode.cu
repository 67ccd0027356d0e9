// Host side of the CUDA encoding ops: scaled_l2, aggregate, encode and their gradients.
#include "launch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "../encode_common.h"
#include "../strided_tensors.h"
#include "encode.cuh"
#include "encode_mma_run.cuh"

namespace rendseg {

namespace encoding {
// Compiled in encode_mma.cu and encode_tf32.cu.
extern template void run_mma<half_t>(CudaLaunch&, const MmaArgs&, const MmaFit&);
extern template void run_mma<bfloat16_t>(CudaLaunch&, const MmaArgs&, const MmaFit&);
extern template void run_mma<float>(CudaLaunch&, const MmaArgs&, const MmaFit&);
}  // namespace encoding

namespace {

using at::Tensor;
using encoding::Args;
using encoding::Op;
using encoding::View;
using Grads = std::tuple<Tensor, Tensor, Tensor>;

View view(const Tensor& t, int64_t image, int64_t position, int64_t channel) {
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t.scalar_type()), image, position, channel};
}

// x[B,D,H,W] or [B,D,M]
View view_of_map(const Tensor& x) {
  const int64_t position = x.dim() == 3 ? x.stride(2) : x.size(3) > 1 ? x.stride(3) : x.stride(2);
  return view(x, x.stride(0), position, x.stride(1));
}

// t[B,M,D], [B,M,K] or [B,K,D]
View view_of_rows(const Tensor& t) { return view(t, t.stride(0), t.stride(1), t.stride(2)); }

// c[K,D]
View view_of_codewords(const Tensor& c) { return view(c, 0, c.stride(0), c.stride(1)); }

// s[K]
View view_of_scale(const Tensor& s) { return view(s, 0, s.stride(0), 0); }

Grads zero_grads(const Tensor& a, const Tensor& b, const Tensor& c) {
  return {at::zeros_like(a), at::zeros_like(b, at::MemoryFormat::Contiguous),
          at::zeros_like(c, at::MemoryFormat::Contiguous)};
}

template <typename T>
Args<T> sized(int64_t batch, int64_t positions, int64_t channels, int64_t codes) {
  Args<T> args;
  args.batch = batch;
  args.positions = positions;
  args.channels = channels;
  args.codes = codes;
  return args;
}

// Allocates the scratch memory and launches.
template <Op op, typename T>
void run_op(const Tensor& x, Args<T>& args) {
  CudaLaunch launch(x);
  encoding::plan<op>(args);
  const Tensor memory = allocate(encoding::lay_out<op>(args), x);
  encoding::run<op>(launch, args);
}

// --- encode on tensor cores

encoding::MmaArgs mma_args(const Tensor& x, const Tensor& codewords, const Tensor& scale, const Tensor& out) {
  encoding::MmaArgs args;
  args.batch = x.size(0);
  args.positions = positions_of(x);
  args.channels = x.size(1);
  args.codes = codewords.size(0);
  args.x = view_of_map(x);
  args.codewords = view_of_codewords(codewords);
  args.scale = view_of_scale(scale);
  args.out = out.dim() == 3 ? view_of_rows(out) : view_of_codewords(out);
  return args;
}

// Whether they serve, and if so, it is done.
bool on_tensor_cores(const Tensor& x, encoding::MmaArgs args) {
  if (!encoding::fits_mma(args)) return false;
  args.wide = x.scalar_type() == at::kFloat;
  encoding::plan_mma(args);
  CudaLaunch launch(x);
  const auto run_for = [&]<typename X>() {
    const encoding::MmaFit fit = encoding::what_fits<X>(args, launch.shared_limit());
    if (fit.bytes == 0) return false;
    const Tensor memory = allocate(encoding::lay_out_mma(args), x);
    encoding::run_mma<X>(launch, args, fit);
    return true;
  };
  switch (x.scalar_type()) {
    case at::kHalf:
      return run_for.template operator()<half_t>();
    case at::kBFloat16:
      return run_for.template operator()<bfloat16_t>();
    default:
      return run_for.template operator()<float>();
  }
}

bool encode_on_tensor_cores(const Tensor& x, const Tensor& codewords, const Tensor& scale, const Tensor& out) {
  if (any_double({&x, &codewords, &scale})) return false;
  return on_tensor_cores(x, mma_args(x, codewords, scale, out));
}

bool encode_backward_on_tensor_cores(const Tensor& grad, const Tensor& x, const Tensor& codewords, const Tensor& scale,
                                     const Tensor& x_grad, const Tensor& codeword_grad, const Tensor& scale_grad) {
  if (any_double({&grad, &x, &codewords, &scale})) return false;
  encoding::MmaArgs args = mma_args(x, codewords, scale, codeword_grad);
  args.grad = view_of_rows(grad);
  args.x_grad = view_of_map(x_grad);
  args.scale_grad = view_of_scale(scale_grad);
  return on_tensor_cores(x, args);
}

// f.operator()<T>() with the type of the arithmetic.
template <typename F>
void with_arithmetic(std::initializer_list<const Tensor*> tensors, F&& f) {
  if (any_double(tensors)) {
    f.template operator()<double>();
  } else {
    f.template operator()<float>();
  }
}

// --- scaled_l2

Tensor scaled_l2_cuda(const Tensor& x,          // [B,M,D]
                      const Tensor& codewords,  // [K,D]
                      const Tensor& scale) {    // [K]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, &scale);
  Tensor out = at::empty({x.size(0), x.size(1), codewords.size(0)}, x.options().dtype(promoted(x, codewords, scale)));
  if (out.numel() == 0) return out;
  if (x.numel() == 0) return out.zero_();
  with_arithmetic({&x, &codewords, &scale}, [&]<typename T>() {
    auto args = sized<T>(x.size(0), x.size(1), x.size(2), codewords.size(0));
    args.x = view_of_rows(x);
    args.codewords = view_of_codewords(codewords);
    args.scale = view_of_scale(scale);
    args.map_out = view_of_rows(out);
    run_op<Op::kScaledL2>(x, args);
  });
  return out;
}

Grads scaled_l2_backward_cuda(const Tensor& grad,       // [B,M,K]
                              const Tensor& x,          // [B,M,D]
                              const Tensor& codewords,  // [K,D]
                              const Tensor& scale) {    // [K]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, &scale);
  check_three(grad, "grad", "[B, M, K]", x.size(0), x.size(1), codewords.size(0), x);
  if (x.numel() == 0) return zero_grads(x, codewords, scale);
  Tensor x_grad = at::empty_like(x);
  Tensor codeword_grad = at::empty_like(codewords, at::MemoryFormat::Contiguous);
  Tensor scale_grad = at::empty_like(scale, at::MemoryFormat::Contiguous);
  with_arithmetic({&grad, &x, &codewords, &scale}, [&]<typename T>() {
    auto args = sized<T>(x.size(0), x.size(1), x.size(2), codewords.size(0));
    args.x = view_of_rows(x);
    args.codewords = view_of_codewords(codewords);
    args.scale = view_of_scale(scale);
    args.map = view_of_rows(grad);
    args.x_grad = view_of_rows(x_grad);
    args.out = view_of_codewords(codeword_grad);
    args.scale_grad = view_of_scale(scale_grad);
    run_op<Op::kScaledL2Backward>(x, args);
  });
  return {x_grad, codeword_grad, scale_grad};
}

// --- aggregate

Tensor aggregate_cuda(const Tensor& assignment,   // [B,M,K]
                      const Tensor& x,            // [B,M,D]
                      const Tensor& codewords) {  // [K,D]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, nullptr);
  check_three(assignment, "assignment", "[B, M, K]", x.size(0), x.size(1), codewords.size(0), x);
  const auto options = x.options().dtype(promoted(assignment, x, codewords));
  if (x.numel() == 0) return at::zeros({x.size(0), codewords.size(0), x.size(2)}, options);
  Tensor out = at::empty({x.size(0), codewords.size(0), x.size(2)}, options);
  with_arithmetic({&assignment, &x, &codewords}, [&]<typename T>() {
    auto args = sized<T>(x.size(0), x.size(1), x.size(2), codewords.size(0));
    args.x = view_of_rows(x);
    args.codewords = view_of_codewords(codewords);
    args.map = view_of_rows(assignment);
    args.out = view_of_rows(out);
    run_op<Op::kAggregate>(x, args);
  });
  return out;
}

Grads aggregate_backward_cuda(const Tensor& grad,         // [B,K,D]
                              const Tensor& assignment,   // [B,M,K]
                              const Tensor& x,            // [B,M,D]
                              const Tensor& codewords) {  // [K,D]
  check_positions(x);
  check_codebook(x, x.size(2), codewords, nullptr);
  check_three(assignment, "assignment", "[B, M, K]", x.size(0), x.size(1), codewords.size(0), x);
  check_three(grad, "grad", "[B, K, D]", x.size(0), codewords.size(0), x.size(2), x);
  if (x.numel() == 0) return zero_grads(assignment, x, codewords);
  Tensor assignment_grad = at::empty_like(assignment), x_grad = at::empty_like(x);
  Tensor codeword_grad = at::empty_like(codewords, at::MemoryFormat::Contiguous);
  with_arithmetic({&grad, &assignment, &x, &codewords}, [&]<typename T>() {
    auto args = sized<T>(x.size(0), x.size(1), x.size(2), codewords.size(0));
    args.x = view_of_rows(x);
    args.codewords = view_of_codewords(codewords);
    args.grad = view_of_rows(grad);
    args.map = view_of_rows(assignment);
    args.map_out = view_of_rows(assignment_grad);
    args.x_grad = view_of_rows(x_grad);
    args.out = view_of_codewords(codeword_grad);
    run_op<Op::kAggregateBackward>(x, args);
  });
  return {assignment_grad, x_grad, codeword_grad};
}

// --- encode

Tensor encode_cuda(const Tensor& x,          // [B,D,H,W] or [B,D,M]
                   const Tensor& codewords,  // [K,D]
                   const Tensor& scale) {    // [K]
  check_map(x);
  check_codebook(x, x.size(1), codewords, &scale);
  const auto options = x.options().dtype(promoted(x, codewords, scale));
  if (x.numel() == 0) return at::zeros({x.size(0), codewords.size(0), x.size(1)}, options);
  const Tensor input = is_walkable(x) ? x : x.contiguous();
  Tensor out = at::empty({x.size(0), codewords.size(0), x.size(1)}, options);
  if (encode_on_tensor_cores(input, codewords, scale, out)) return out;
  with_arithmetic({&x, &codewords, &scale}, [&]<typename T>() {
    auto args = sized<T>(x.size(0), positions_of(x), x.size(1), codewords.size(0));
    args.x = view_of_map(input);
    args.codewords = view_of_codewords(codewords);
    args.scale = view_of_scale(scale);
    args.out = view_of_rows(out);
    run_op<Op::kEncode>(x, args);
  });
  return out;
}

Grads encode_backward_cuda(const Tensor& grad,       // [B,K,D]
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
  Tensor codeword_grad = at::empty_like(codewords, at::MemoryFormat::Contiguous);
  Tensor scale_grad = at::empty_like(scale, at::MemoryFormat::Contiguous);
  if (!encode_backward_on_tensor_cores(grad, input, codewords, scale, target, codeword_grad, scale_grad)) {
    with_arithmetic({&grad, &x, &codewords, &scale}, [&]<typename T>() {
      auto args = sized<T>(x.size(0), positions_of(x), x.size(1), codewords.size(0));
      args.x = view_of_map(input);
      args.codewords = view_of_codewords(codewords);
      args.scale = view_of_scale(scale);
      args.grad = view_of_rows(grad);
      args.x_grad = view_of_map(target);
      args.out = view_of_codewords(codeword_grad);
      args.scale_grad = view_of_scale(scale_grad);
      run_op<Op::kEncodeBackward>(x, args);
    });
  }
  if (!target.is_same(x_grad)) x_grad.copy_(target);
  return {x_grad, codeword_grad, scale_grad};
}

}  // namespace
}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) {
  m.impl("scaled_l2", TORCH_FN(rendseg::scaled_l2_cuda));
  m.impl("_scaled_l2_backward", TORCH_FN(rendseg::scaled_l2_backward_cuda));
  m.impl("aggregate", TORCH_FN(rendseg::aggregate_cuda));
  m.impl("_aggregate_backward", TORCH_FN(rendseg::aggregate_backward_cuda));
  m.impl("encode", TORCH_FN(rendseg::encode_cuda));
  m.impl("_encode_backward", TORCH_FN(rendseg::encode_backward_cuda));
}
