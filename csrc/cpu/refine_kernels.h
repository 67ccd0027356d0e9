// One layer of the point head on a block of points. No include guard: compiled once per instruction set.
//
// Activations are rows [points][stride]; weights come packed into panels of two vectors of outputs, [panel][in][2
// lanes], so that the inner loop reads them in order and keeps kMlpRows x 2 vectors of sums in registers. A sum runs
// over the inputs in ascending order whatever the block, so the result of a point depends on nothing else.
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

RENDSEG_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if RENDSEG_ISA == 2
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif RENDSEG_ISA == 1
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
RENDSEG_INLINE Simd<double>::V multiply_add(Simd<double>::V a, Simd<double>::V b, Simd<double>::V c) {
#if RENDSEG_ISA == 2
  return (Simd<double>::V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif RENDSEG_ISA == 1
  return (Simd<double>::V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <typename A>
RENDSEG_INLINE typename Simd<A>::V round_to(typename Simd<A>::V v, c10::ScalarType dtype) {
  if constexpr (sizeof(A) == 4) {
    if (dtype == c10::ScalarType::Half) return Stored<c10::Half>::round(v);
    if (dtype == c10::ScalarType::BFloat16) return Stored<c10::BFloat16>::round(v);
  }
  return v;
}

template <typename A>
void mlp_layer_of(const MlpLayer& layer, const A* x, int64_t x_stride, int64_t points, A* y, int64_t y_stride) {
  using V = typename Simd<A>::V;
  constexpr int L = Simd<A>::kLanes, R = kMlpRows;
  const int64_t in = layer.in, s = x_stride, s3 = 3 * x_stride;
  const V zero = V{};
  for (int64_t panel = 0; panel * 2 * L < layer.out; ++panel) {
    const A* bias = static_cast<const A*>(layer.bias) + panel * 2 * L;
    const int64_t columns = layer.out - panel * 2 * L < 2 * L ? layer.out - panel * 2 * L : 2 * L;
    const V b0 = load_as<V>(bias), b1 = load_as<V>(bias + L);
    for (int64_t p = 0; p < points; p += R) {
      V acc[R][2];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) acc[r][0] = b0, acc[r][1] = b1;
      const A* w = static_cast<const A*>(layer.panels) + panel * in * 2 * L;
      const A* row[(R + 3) / 4];  // every fourth row; the three below are reached by s, 2s and 3s
      for (int g = 0; g < (R + 3) / 4; ++g) row[g] = x + (p + 4 * g) * x_stride;
      for (int64_t i = 0; i < in; ++i, w += 2 * L) {
        const V w0 = load_as<V>(w), w1 = load_as<V>(w + L);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const A* at = row[r / 4];
          const V v = splat<A>(r % 4 == 0 ? at[0] : r % 4 == 1 ? at[s] : r % 4 == 2 ? at[2 * s] : at[s3]);
          acc[r][0] = multiply_add(v, w0, acc[r][0]);
          acc[r][1] = multiply_add(v, w1, acc[r][1]);
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
          store_as(out, v0);
          store_as(out + L, v1);
        } else {
          A kept[2 * L];
          store_as(kept, v0);
          store_as(kept + L, v1);
          __builtin_memcpy(out, kept, columns * sizeof(A));
        }
      }
    }
  }
}

}  // namespace

void mlp_layer(const MlpLayer& layer, bool wide, const void* x, int64_t x_stride, int64_t points, void* y,
               int64_t y_stride) {
  if (wide) {
    mlp_layer_of<double>(layer, static_cast<const double*>(x), x_stride, points, static_cast<double*>(y), y_stride);
  } else {
    mlp_layer_of<float>(layer, static_cast<const float*>(x), x_stride, points, static_cast<float*>(y), y_stride);
  }
}

// Rounds values to a half dtype in place; nothing to do for the others.
void round_values(float* values, int64_t count, c10::ScalarType dtype) {
  constexpr int L = kFloatLanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store_as(values + i, round_to<float>(load_as<VecF>(values + i), dtype));
  if (i < count) {
    VecF v{};
    __builtin_memcpy(&v, values + i, (count - i) * sizeof(float));
    v = round_to<float>(v, dtype);
    __builtin_memcpy(values + i, &v, (count - i) * sizeof(float));
  }
}

int64_t mlp_panel_bytes() { return 2 * kVectorBytes; }

}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg
