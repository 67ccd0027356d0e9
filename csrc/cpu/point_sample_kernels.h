// Vector kernels of point_sample, compiled once per instruction set; see isa.h. No include guard on purpose.
namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

// Storage to accumulator type and back.
inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const c10::BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void store(float value, float* p) { *p = value; }
inline void store(double value, double* p) { *p = value; }
inline void store(float value, c10::BFloat16* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // nearest, halves to even
  p->x = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
#if defined(__x86_64__) && RENDSEG_ISA >= 1
inline float load(const c10::Half* p) { return _cvtsh_ss(p->x); }
inline void store(float value, c10::Half* p) { p->x = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float load(const c10::Half* p) { return static_cast<float>(*p); }
inline void store(float value, c10::Half* p) { *p = c10::Half(value); }
#endif

// `count` adjacent elements in the accumulator type: the map itself, or widened into `buffer`.
inline const float* widen(const float* source, float*, int64_t) { return source; }
inline const double* widen(const double* source, double*, int64_t) { return source; }
inline const float* widen(const c10::BFloat16* source, float* buffer, int64_t count) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = load(source + i);
  return buffer;
}
inline const float* widen(const c10::Half* source, float* buffer, int64_t count) {
  int64_t i = 0;
#if defined(__x86_64__) && RENDSEG_ISA >= 1
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
#endif
  for (; i < count; ++i) buffer[i] = load(source + i);
  return buffer;
}

template <typename T>
void narrow(const acc_t<T>* source, T* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(source[i], target + i);
}
template <>
[[maybe_unused]] void narrow<c10::Half>(const float* source, c10::Half* target, int64_t count) {
  int64_t i = 0;
#if defined(__x86_64__) && RENDSEG_ISA >= 1
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) store(source[i], target + i);
}

template <typename A>
void locate(const A* coords, int64_t first, const SampleGrid& grid, const Taps<A>& taps) {
  const int64_t count = taps.count;
  const int32_t height = grid.height, width = grid.width;
  const int64_t stride_y = grid.stride_y, stride_x = grid.stride_x;
  const bool border = grid.border, align_corners = grid.align_corners;
  A* __restrict nw = taps.weight[0];
  A* __restrict ne = taps.weight[1];
  A* __restrict sw = taps.weight[2];
  A* __restrict se = taps.weight[3];
  int64_t* __restrict offset = taps.offset;
  int64_t* __restrict point = taps.point;
  uint8_t* __restrict inside = taps.inside;
  for (int64_t i = 0; i < count; ++i) point[i] = first + i;
  if (grid.nearest) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t x = nearest_cell(coords[2 * i], width, border, align_corners);
      const int32_t y = nearest_cell(coords[2 * i + 1], height, border, align_corners);
      nw[i] = A(1);
      ne[i] = sw[i] = se[i] = A(0);
      offset[i] = y * stride_y + x * stride_x;
      inside[i] = static_cast<uint8_t>((x >= 0) & (y >= 0));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const AxisTaps<A> x = axis_taps(coords[2 * i], width, border, align_corners);
    const AxisTaps<A> y = axis_taps(coords[2 * i + 1], height, border, align_corners);
    nw[i] = x.near * y.near;
    ne[i] = x.far * y.near;
    sw[i] = x.near * y.far;
    se[i] = x.far * y.far;
    offset[i] = y.cell * stride_y + x.cell * stride_x;
    inside[i] = static_cast<uint8_t>((x.has_near & y.has_near) | (x.has_far & y.has_near) << 1 |
                                     (x.has_near & y.has_far) << 2 | (x.has_far & y.has_far) << 3);
  }
}

inline int64_t tap_offset(int64_t offset, int t, const SampleGrid& grid) {
  return offset + (t & 1) * grid.stride_x + (t >> 1) * grid.stride_y;
}

// One channel at a point with taps off the map.
template <typename T>
acc_t<T> edge_value(const T* map, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t i) {
  using A = acc_t<T>;
  A sum = 0;
  for (int t = 0; t < 4; ++t) {
    const A value = (taps.inside[i] >> t) & 1 ? load(map + tap_offset(taps.offset[i], t, grid)) : A(0);
    sum += value * taps.weight[t][i];
  }
  return sum;
}

// kBlock planes at a time: the taps are read once for all of them, and their loads overlap.
template <typename T, int kBlock>
void planes_block(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<acc_t<T>>& taps, T* out,
                  int64_t out_stride) {
  using A = acc_t<T>;
  const int64_t stride_x = grid.stride_x, stride_y = grid.stride_y;
  const A* __restrict north_west = taps.weight[0];
  const A* __restrict north_east = taps.weight[1];
  const A* __restrict south_west = taps.weight[2];
  const A* __restrict south_east = taps.weight[3];
  for (int64_t i = 0; i < taps.count; ++i) {
    T* target = out + taps.point[i];
    if (taps.inside[i] == 15) {
      const A nw = north_west[i], ne = north_east[i], sw = south_west[i], se = south_east[i];
      const T* source = map + taps.offset[i];
#pragma GCC unroll 8
      for (int k = 0; k < kBlock; ++k) {
        const T* p = source + k * stride_c;
        store(load(p) * nw + load(p + stride_x) * ne + load(p + stride_y) * sw + load(p + stride_y + stride_x) * se,
              target + k * out_stride);
      }
    } else {
      for (int k = 0; k < kBlock; ++k) store(edge_value(map + k * stride_c, grid, taps, i), target + k * out_stride);
    }
  }
}

template <typename T>
void planes(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t channels,
            T* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    planes_block<T, 4>(map + c * stride_c, stride_c, grid, taps, out + c * out_stride, out_stride);
  }
  for (; c < channels; ++c) planes_block<T, 1>(map + c * stride_c, stride_c, grid, taps, out + c * out_stride, out_stride);
}

template <typename T>
void plane_rows(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t channels,
                acc_t<T>* rows, int64_t row_stride) {
  using A = acc_t<T>;
  const int64_t stride_x = grid.stride_x, stride_y = grid.stride_y;
  for (int64_t first = 0; first < channels; first += 16) {  // 16 planes are 32 streams when points ascend
    const int64_t n = channels - first < 16 ? channels - first : 16;
    for (int64_t i = 0; i < taps.count; ++i) {
      A* __restrict row = rows + i * row_stride + first;
      if (taps.inside[i] == 15) {
        const A nw = taps.weight[0][i], ne = taps.weight[1][i], sw = taps.weight[2][i], se = taps.weight[3][i];
        const T* p = map + first * stride_c + taps.offset[i];
        for (int64_t k = 0; k < n; ++k, p += stride_c) {
          row[k] = load(p) * nw + load(p + stride_x) * ne + load(p + stride_y) * sw + load(p + stride_y + stride_x) * se;
        }
      } else {
        for (int64_t k = 0; k < n; ++k) row[k] = edge_value(map + (first + k) * stride_c, grid, taps, i);
      }
    }
  }
}

// One point, `n` <= kVectorChunk adjacent channels.
template <typename T>
void vector_point(const T* map, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t i, int64_t n,
                  acc_t<T>* __restrict row) {
  using A = acc_t<T>;
  A buffer[4][kVectorChunk];
  const int64_t at = taps.offset[i];
  if (taps.inside[i] == 15) {
    const A nw = taps.weight[0][i], ne = taps.weight[1][i], sw = taps.weight[2][i], se = taps.weight[3][i];
    const A* __restrict a = widen(map + at, buffer[0], n);
    const A* __restrict b = widen(map + at + grid.stride_x, buffer[1], n);
    const A* __restrict c = widen(map + at + grid.stride_y, buffer[2], n);
    const A* __restrict d = widen(map + at + grid.stride_y + grid.stride_x, buffer[3], n);
    for (int64_t k = 0; k < n; ++k) row[k] = a[k] * nw + b[k] * ne + c[k] * sw + d[k] * se;
    return;
  }
  for (int64_t k = 0; k < n; ++k) row[k] = 0;
  for (int t = 0; t < 4; ++t) {
    const A weight = taps.weight[t][i];
    if ((taps.inside[i] >> t) & 1) {
      const A* __restrict value = widen(map + tap_offset(at, t, grid), buffer[0], n);
      for (int64_t k = 0; k < n; ++k) row[k] += value[k] * weight;
    } else {
      const A nothing = A(0) * weight;
      for (int64_t k = 0; k < n; ++k) row[k] += nothing;
    }
  }
}

template <typename T>
void vector_rows(const T* map, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t channels, acc_t<T>* rows,
                 int64_t row_stride) {
  for (int64_t i = 0; i < taps.count; ++i) {
    for (int64_t c = 0; c < channels; c += kVectorChunk) {
      const int64_t n = channels - c < kVectorChunk ? channels - c : kVectorChunk;
      vector_point(map + c, grid, taps, i, n, rows + i * row_stride + c);
    }
  }
}

// Sixteen points are sampled into a tile, which is then written channel by channel.
template <typename T>
void vectors(const T* map, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t channels, T* out,
             int64_t out_stride) {
  using A = acc_t<T>;
  constexpr int64_t kPoints = 16;
  A tile[kPoints][kVectorChunk + 1];  // the odd pitch spreads a column over cache sets
  for (int64_t first = 0; first < taps.count; first += kPoints) {
    const int64_t points = taps.count - first < kPoints ? taps.count - first : kPoints;
    for (int64_t c = 0; c < channels; c += kVectorChunk) {
      const int64_t n = channels - c < kVectorChunk ? channels - c : kVectorChunk;
      for (int64_t i = 0; i < points; ++i) vector_point(map + c, grid, taps, first + i, n, tile[i]);
      T* __restrict target = out + c * out_stride + taps.point[first];
      if (points == kPoints) {
        for (int64_t k = 0; k < n; ++k, target += out_stride) {
          A column[kPoints];
          for (int64_t i = 0; i < kPoints; ++i) column[i] = tile[i][k];
          narrow<T>(column, target, kPoints);
        }
      } else {
        for (int64_t k = 0; k < n; ++k, target += out_stride) {
          for (int64_t i = 0; i < points; ++i) store(tile[i][k], target + i);
        }
      }
    }
  }
}

template <typename T>
void add_plane(const SampleGrid& grid, const Taps<acc_t<T>>& taps, const T* grad, int64_t grad_stride,
               acc_t<T>* plane) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < taps.count; ++i) {
    const A g = load(grad + taps.point[i] * grad_stride);
    const int64_t at = taps.offset[i];
    if (taps.inside[i] == 15) {
      A* p = plane + at;
      p[0] += taps.weight[0][i] * g;
      p[grid.stride_x] += taps.weight[1][i] * g;
      p[grid.stride_y] += taps.weight[2][i] * g;
      p[grid.stride_y + grid.stride_x] += taps.weight[3][i] * g;
    } else {
      for (int t = 0; t < 4; ++t) {
        if ((taps.inside[i] >> t) & 1) plane[tap_offset(at, t, grid)] += taps.weight[t][i] * g;
      }
    }
  }
}

template <typename T>
void transpose(const T* grad, int64_t stride_c, int64_t stride_p, int64_t num_points, int64_t channels, int64_t width,
               acc_t<T>* chunk) {
  for (int64_t p = 0; p < num_points; ++p) {
    for (int64_t c = 0; c < channels; ++c) chunk[p * width + c] = load(grad + c * stride_c + p * stride_p);
    for (int64_t c = channels; c < width; ++c) chunk[p * width + c] = 0;
  }
}

template <typename A, int64_t kWidth>
inline void sum_run(const Runs<A>& runs, int64_t r, const A* __restrict chunk, A* __restrict sum) {
  for (int64_t k = 0; k < kWidth; ++k) sum[k] = 0;
  for (int64_t e = runs.begin[r]; e < runs.begin[r + 1]; ++e) {
    const A weight = runs.weight[e];
    const A* __restrict row = chunk + runs.point[e] * kWidth;
    for (int64_t k = 0; k < kWidth; ++k) sum[k] += weight * row[k];
  }
}

template <typename T>
void write_planes(const Runs<acc_t<T>>& runs, const acc_t<T>* chunk, int64_t channels, T* map, int64_t stride_c) {
  acc_t<T> sum[kPlaneChunk];
  if (channels == kPlaneChunk) {
    for (int64_t r = 0; r < runs.count; ++r) {
      sum_run<acc_t<T>, kPlaneChunk>(runs, r, chunk, sum);
      T* target = map + runs.offset[r];
      for (int64_t k = 0; k < kPlaneChunk; ++k) store(sum[k], target + k * stride_c);
    }
    return;
  }
  for (int64_t r = 0; r < runs.count; ++r) {
    sum_run<acc_t<T>, kPlaneChunk>(runs, r, chunk, sum);
    for (int64_t k = 0; k < channels; ++k) store(sum[k], map + runs.offset[r] + k * stride_c);
  }
}

template <typename T>
void write_vectors(const Runs<acc_t<T>>& runs, const acc_t<T>* chunk, int64_t channels, T* map) {
  acc_t<T> sum[kVectorChunk];
  for (int64_t r = 0; r < runs.count; ++r) {
    sum_run<acc_t<T>, kVectorChunk>(runs, r, chunk, sum);
    if (channels == kVectorChunk) {
      narrow<T>(sum, map + runs.offset[r], kVectorChunk);
    } else {
      narrow<T>(sum, map + runs.offset[r], channels);
    }
  }
}

template <typename T>
SampleKernels<T> sample_kernels() {
  return {locate<acc_t<T>>, planes<T>,    vectors<T>,      plane_rows<T>,    vector_rows<T>,
          add_plane<T>,     transpose<T>, write_planes<T>, write_vectors<T>, narrow<T>};
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE

#if RENDSEG_ISA == 2
#define RENDSEG_SAMPLE_KERNELS sample_kernels_avx512
#elif RENDSEG_ISA == 1
#define RENDSEG_SAMPLE_KERNELS sample_kernels_avx2
#else
#define RENDSEG_SAMPLE_KERNELS sample_kernels_baseline
#endif
template <>
SampleKernels<float> RENDSEG_SAMPLE_KERNELS<float>() {
  return RENDSEG_ISA_NAMESPACE::sample_kernels<float>();
}
template <>
SampleKernels<double> RENDSEG_SAMPLE_KERNELS<double>() {
  return RENDSEG_ISA_NAMESPACE::sample_kernels<double>();
}
template <>
SampleKernels<c10::Half> RENDSEG_SAMPLE_KERNELS<c10::Half>() {
  return RENDSEG_ISA_NAMESPACE::sample_kernels<c10::Half>();
}
template <>
SampleKernels<c10::BFloat16> RENDSEG_SAMPLE_KERNELS<c10::BFloat16>() {
  return RENDSEG_ISA_NAMESPACE::sample_kernels<c10::BFloat16>();
}
#undef RENDSEG_SAMPLE_KERNELS

}  // namespace rendseg
