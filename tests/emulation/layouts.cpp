// Maps of memory in bytes, and which kernels of encode fit a GPU, for test_layouts.py.
#include "../../csrc/cuda/encode_mma_run.cuh"
#include "../../csrc/cuda/select.cuh"

using namespace rendseg;
using namespace rendseg::encoding;

namespace {

// Offset and end of every part, then the size of all.
template <typename... T>
int put(int64_t* out, int64_t bytes, const Part<T>&... parts) {
  int count = 0;
  ((out[count] = parts.offset, out[count + 1] = parts.offset + parts.bytes(), count += 2), ...);
  out[count++] = bytes;
  return count;
}

template <typename X>
MmaFit fit_of(bool backward, bool channels_last, int steps, int64_t limit) {
  if (backward) return channels_last ? backward_fit<X, true>(steps, limit) : backward_fit<X, false>(steps, limit);
  return channels_last ? forward_fit<X, true>(steps, limit) : forward_fit<X, false>(steps, limit);
}

}  // namespace

extern "C" {

// A map of shared memory by name; the number of values written.
int rendseg_shared_map(int which, int steps, int64_t* out) {
  switch (which) {
    case 0: {
      const ForwardMap<half_t, 64, true, 2> m(steps);
      return put(out, m.bytes, m.parts, m.squares, m.weights, m.totals, m.constants, m.tile[0], m.tile[1], m.reference);
    }
    case 1: {
      const BackwardMap<bfloat16_t, false, 2, 1> m(steps);
      return put(out, m.bytes, m.parts, m.squares, m.logit_weights, m.weights, m.totals, m.tops, m.grad_unscale,
                 m.grad_dot, m.factors, m.constants, m.tile[0], m.tile[1], m.grad_rows, m.code_rows, m.reference);
    }
    case 2: {  // without the weights, which lie in `parts`
      const BackwardMap<bfloat16_t, true, 1, 2> m(steps);
      return put(out, m.bytes, m.parts, m.squares, m.totals, m.tops, m.grad_unscale, m.grad_dot, m.factors, m.constants,
                 m.tile[0], m.grad_rows, m.code_rows, m.reference);
    }
    case 3: {
      const BackwardMap<bfloat16_t, true, 1, 2> m(steps);
      return put(out, m.parts.bytes(), m.logit_weights, m.weights);
    }
    case 4: {
      const WideForwardMap<true, 2> m(steps);
      return put(out, m.bytes, m.parts, m.squares, m.nearest, m.constants, m.codes, m.tile[0], m.tile[1]);
    }
    case 5: {
      const WideBackwardMap<false, 1> m(steps);
      return put(out, m.bytes, m.parts, m.squares, m.weight_sum, m.grad_dot, m.totals, m.constants, m.rows, m.tile[0]);
    }
    default: {
      const WideBackwardMap<false, 1> m(steps);
      return put(out, m.parts.bytes(), m.assigned, m.negative, m.logits);
    }
  }
}

// Tile, stages, rounds and bytes of the kernel for features of `element` (0: float16, 1: bfloat16, 2: float32).
void rendseg_mma_fit(int element, int backward, int channels_last, int steps, int64_t limit, int64_t* out) {
  const MmaFit fit = element == 0   ? fit_of<half_t>(backward, channels_last, steps, limit)
                     : element == 1 ? fit_of<bfloat16_t>(backward, channels_last, steps, limit)
                                    : fit_of<float>(backward, channels_last, steps, limit);
  out[0] = fit.tile, out[1] = fit.stages, out[2] = fit.rounds, out[3] = fit.bytes;
}

// The scratch memory of encode_backward: each pointer as an offset, then the size of all.
int rendseg_scratch(int wide, int64_t batch, int64_t positions, int64_t channels, int64_t codes, int64_t* out) {
  MmaArgs args;
  args.batch = batch, args.positions = positions, args.channels = channels, args.codes = codes;
  args.wide = wide != 0;
  float some = 0.0f;
  args.grad.data = &some;
  plan_mma(args);
  const Scratch scratch = lay_out_mma(args);
  alignas(256) static unsigned char start[1];
  scratch.place(start);
  int count = 0;
  for (const void* p : {static_cast<const void*>(args.wide ? args.code_rows : args.fragments),
                        static_cast<const void*>(args.reference), static_cast<const void*>(args.sum_residual),
                        static_cast<const void*>(args.grad_rows), static_cast<const void*>(args.packed_grad),
                        static_cast<const void*>(args.sum_assigned), static_cast<const void*>(args.sum_scale)}) {
    out[count++] = static_cast<const unsigned char*>(p) - start;
  }
  out[count++] = scratch.bytes();
  return count;
}

int rendseg_select_map(int64_t images, int64_t cells, int64_t* out) {
  const SelectPlan plan(images, cells);
  const int count = put(out, plan.zeroed_bytes, plan.states, plan.second_digits, plan.first_digits);
  return count + put(out + count, plan.workspace_bytes, plan.counts, plan.candidate_keys, plan.candidate_chunks);
}
}
