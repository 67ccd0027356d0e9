// One layer of the point head on a block of points. Compiled once per instruction set, see compile_kernels.h.
//
// Activations are rows [points][stride]; weights come packed into panels of two vectors of outputs, [panel][in][2
// lanes], so that the inner loop reads them in order and keeps kMlpRows x 2 vectors of sums in registers. A sum runs
// over the inputs in ascending order for every size of block, so the result of a point depends on nothing else.
#ifndef RENDSEG_ISA

namespace rendseg {

// y = x W^T + b, then a ReLU; `panels` as above, padded with zeros, `bias` padded likewise. For ATen's GEMM the weights
// are W as it is.
struct MlpLayer {
  const void* panels;
  const void* bias;
  int64_t in, out;
  bool relu;
  Dtype rounding;  // the dtype of the head: halves are rounded after each layer
};

// Most points of one block: multiples of the rows of every instruction set. ATen's GEMM packs the weights in each call.
constexpr int64_t kMlpPoints = 96, kAtenPoints = 252;

}  // namespace rendseg

#else

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

#if RENDSEG_ISA == 2
constexpr int kMlpRows = 12;
#elif RENDSEG_ISA == 1
constexpr int kMlpRows = 6;
#else
constexpr int kMlpRows = 4;
#endif

template <typename A>
RENDSEG_INLINE Vec<A> round_to(Vec<A> v, Dtype dtype) {
  if constexpr (sizeof(A) == 4) {
    if (dtype == Dtype::kHalf) return round_to<c10::Half>(v);
    if (dtype == Dtype::kBFloat16) return round_to<c10::BFloat16>(v);
  }
  return v;
}

// With `add`, what y holds takes the place of the bias.
template <typename A>
void mlp_layer_of(const MlpLayer& layer, const A* x, int64_t x_stride, int64_t points, A* y, int64_t y_stride,
                  bool add) {
  using V = Vec<A>;
  constexpr int L = kLanes<A>, R = kMlpRows;
  const int64_t in = layer.in, s = x_stride, s3 = 3 * x_stride;
  const V zero = V{};
  for (int64_t panel = 0; panel * 2 * L < layer.out; ++panel) {
    const A* bias = static_cast<const A*>(layer.bias) + panel * 2 * L;
    const int64_t columns = layer.out - panel * 2 * L < 2 * L ? layer.out - panel * 2 * L : 2 * L;
    const V b0 = load(bias), b1 = load(bias + L);
    for (int64_t p = 0; p < points; p += R) {
      V acc[R][2];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) acc[r][0] = b0, acc[r][1] = b1;
      if (add) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const A* from = y + (p + r) * y_stride + panel * 2 * L;
          acc[r][0] = columns >= L ? load(from) : load_part(from, columns);
          acc[r][1] = columns == 2 * L ? load(from + L) : columns > L ? load_part(from + L, columns - L) : zero;
        }
      }
      const A* w = static_cast<const A*>(layer.panels) + panel * in * 2 * L;
      const A* row[(R + 3) / 4];  // every fourth row; the three below are
                                  // reached by s, 2s and 3s
      for (int g = 0; g < (R + 3) / 4; ++g) row[g] = x + (p + 4 * g) * x_stride;
      for (int64_t i = 0; i < in; ++i, w += 2 * L) {
        const V w0 = load(w), w1 = load(w + L);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const A* at = row[r / 4];
          const V v = splat<A>(r % 4 == 0 ? at[0] : r % 4 == 1 ? at[s] : r % 4 == 2 ? at[2 * s] : at[s3]);
          acc[r][0] = fused(v, w0, acc[r][0]);
          acc[r][1] = fused(v, w1, acc[r][1]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < (R + 3) / 4; ++g) ++row[g];
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        A* out = y + (p + r) * y_stride + panel * 2 * L;
        V v0 = round_to<A>(acc[r][0], layer.rounding), v1 = round_to<A>(acc[r][1], layer.rounding);
        if (layer.relu) {  // keeps NaN, as torch.relu
          v0 = v0 < zero ? zero : v0;
          v1 = v1 < zero ? zero : v1;
        }
        if (columns == 2 * L) {
          store(out, v0);
          store(out + L, v1);
        } else {
          A kept[2 * L];
          store(kept, v0);
          store(kept + L, v1);
          __builtin_memcpy(out, kept, columns * sizeof(A));
        }
      }
    }
  }
}

// What follows the sums of one row.
template <typename A>
void finish_row(const MlpLayer& layer, A* y) {
  constexpr int L = kLanes<A>;
  const Vec<A> zero{};
  for (int64_t i = 0; i < layer.out; i += L) {
    const int64_t count = layer.out - i < L ? layer.out - i : L;
    Vec<A> v = round_to<A>(count == L ? load(y + i) : load_part(y + i, count), layer.rounding);
    if (layer.relu) v = v < zero ? zero : v;
    count == L ? store(y + i, v) : store_part(y + i, v, count);
  }
}

// rows[p * row_stride + c] = planes[c * plane_stride + p]: squares of vectors, turned over in registers. R is T or the
// type of its arithmetic.
template <typename T, typename R>
void planes_to_rows(const T* planes, int64_t plane_stride, int64_t channels, int64_t points, R* rows,
                    int64_t row_stride) {
  using A = Wide<T>;
  constexpr int L = kLanes<A>;
  // Points of one cache line of a plane, which is read whole before another can evict it.
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t whole_channels = channels / L * L, whole_points = points / L * L;
  for (int64_t first = 0; first < whole_points; first += kLine) {
    const int64_t last = first + kLine < whole_points ? first + kLine : whole_points;
    for (int64_t c = 0; c < whole_channels; c += L) {
      for (int i = 0; i < L; ++i) __builtin_prefetch(planes + (c + i) * plane_stride + last, 0, 2);
      for (int64_t p = first; p < last; p += L) {
        Vec<A> square[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = load(planes + (c + i) * plane_stride + p);
        transpose<A>(square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(rows + (p + i) * row_stride + c, square[i]);
      }
    }
  }
  for (int64_t p = 0; p < points; ++p) {
    for (int64_t c = p < whole_points ? whole_channels : 0; c < channels; ++c) {
      rows[p * row_stride + c] = static_cast<R>(planes[c * plane_stride + p]);
    }
  }
}

template <typename A>
void add_row(A* to, const A* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Rounds values to a half dtype in place; nothing to do for the others.
void round_values(float* values, int64_t count, Dtype dtype) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(values + i, round_to<float>(load(values + i), dtype));
  if (i < count) store_part(values + i, round_to<float>(load_part(values + i, count - i), dtype), count - i);
}

int64_t mlp_panel_bytes() { return 2 * kVectorBytes; }

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
