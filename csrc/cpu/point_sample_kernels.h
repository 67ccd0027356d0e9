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

// One axis of up to kLocate points; plain loops over 32-bit (or double) arrays, so that they vectorise.
constexpr int64_t kLocate = 64;

template <typename A>
struct AxisBlock {
  A near[kLocate], far[kLocate];
  int32_t cell[kLocate], has_near[kLocate], has_far[kLocate];
};

template <typename A, bool kBorder, bool kAlign>
void locate_axis(const A* coord, int32_t size, AxisBlock<A>& axis) {
  for (int64_t i = 0; i < kLocate; ++i) {
    const AxisTaps<A> taps = axis_taps(coord[i], size, kBorder, kAlign);
    axis.near[i] = taps.near;
    axis.far[i] = taps.far;
    axis.cell[i] = taps.cell;
    axis.has_near[i] = taps.has_near;
    axis.has_far[i] = taps.has_far;
  }
}

template <typename A>
void locate(const A* coords, int64_t first, const SampleGrid& grid, const Taps<A>& taps) {
  const int64_t count = taps.count;
  const int64_t stride_y = grid.stride_y, stride_x = grid.stride_x;
  for (int64_t i = 0; i < count; ++i) taps.point[i] = first + i;
  if (grid.nearest) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t x = nearest_cell(coords[2 * i], grid.width, grid.border, grid.align_corners);
      const int32_t y = nearest_cell(coords[2 * i + 1], grid.height, grid.border, grid.align_corners);
      taps.weight[0][i] = A(1);
      taps.weight[1][i] = taps.weight[2][i] = taps.weight[3][i] = A(0);
      taps.offset[i] = y * stride_y + x * stride_x;
      taps.inside[i] = static_cast<uint8_t>((x >= 0) & (y >= 0));
    }
    return;
  }
  void (*axis)(const A*, int32_t, AxisBlock<A>&) =
      grid.border ? (grid.align_corners ? locate_axis<A, true, true> : locate_axis<A, true, false>)
                  : (grid.align_corners ? locate_axis<A, false, true> : locate_axis<A, false, false>);
  A cx[kLocate] = {}, cy[kLocate] = {};
  AxisBlock<A> x, y;
  for (int64_t start = 0; start < count; start += kLocate) {
    const int64_t n = count - start < kLocate ? count - start : kLocate;
    const A* __restrict xy = coords + 2 * start;
    for (int64_t i = 0; i < n; ++i) {
      cx[i] = xy[2 * i];
      cy[i] = xy[2 * i + 1];
    }
    axis(cx, grid.width, x);
    axis(cy, grid.height, y);
    A* __restrict nw = taps.weight[0] + start;
    A* __restrict ne = taps.weight[1] + start;
    A* __restrict sw = taps.weight[2] + start;
    A* __restrict se = taps.weight[3] + start;
    for (int64_t i = 0; i < n; ++i) {
      nw[i] = x.near[i] * y.near[i];
      ne[i] = x.far[i] * y.near[i];
      sw[i] = x.near[i] * y.far[i];
      se[i] = x.far[i] * y.far[i];
    }
    int64_t* __restrict offset = taps.offset + start;
    for (int64_t i = 0; i < n; ++i) offset[i] = y.cell[i] * stride_y + x.cell[i] * stride_x;
    int32_t mask[kLocate];
    for (int64_t i = 0; i < kLocate; ++i) {
      mask[i] = (x.has_near[i] & y.has_near[i]) | (x.has_far[i] & y.has_near[i]) << 1 |
                (x.has_near[i] & y.has_far[i]) << 2 | (x.has_far[i] & y.has_far[i]) << 3;
    }
    uint8_t* __restrict inside = taps.inside + start;
    for (int64_t i = 0; i < n; ++i) inside[i] = static_cast<uint8_t>(mask[i]);
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

// kBlock planes at a time: the taps are read once for all of them, and their loads overlap. `ahead` points further on,
// the cache lines of the lower row are asked for: the upper row was mostly read as a lower one before.
template <typename T, int kBlock>
void planes_block(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<acc_t<T>>& taps, T* out,
                  int64_t out_stride) {
  using A = acc_t<T>;
  constexpr int64_t kAhead = 24;
  const int64_t stride_x = grid.stride_x, stride_y = grid.stride_y;
  const A* __restrict north_west = taps.weight[0];
  const A* __restrict north_east = taps.weight[1];
  const A* __restrict south_west = taps.weight[2];
  const A* __restrict south_east = taps.weight[3];
  for (int64_t i = 0; i < taps.count; ++i) {
    if (kBlock > 1) {
      const int64_t next = i + kAhead < taps.count ? i + kAhead : taps.count - 1;
#pragma GCC unroll 8
      for (int k = 0; k < kBlock; ++k) {
        // An address past the map is harmless here; it is formed as an integer.
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(map) +
                                                         (k * stride_c + taps.offset[next] + stride_y) * sizeof(T)));
      }
    }
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

#if defined(__x86_64__) && RENDSEG_ISA == 2
// A float plane of adjacent columns at points in the order of the output: eight points a turn, each row of taps fetched
// as one pair per point. Returns how many points were done.
inline int64_t plane_pairs(const float* map, const SampleGrid& grid, const Taps<float>& taps, float* out) {
  const __m512i west = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i east = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  const float* south = map + grid.stride_y;
  int64_t i = 0;
  for (; i + 16 <= taps.count; i += 16) {
    const __m128i inside = _mm_loadu_si128(reinterpret_cast<const __m128i*>(taps.inside + i));
    const __mmask16 whole = _mm_cmpeq_epi8_mask(inside, _mm_set1_epi8(15));
    const __m512i low = _mm512_loadu_si512(taps.offset + i), high = _mm512_loadu_si512(taps.offset + i + 8);
    const __mmask8 whole_low = static_cast<__mmask8>(whole), whole_high = static_cast<__mmask8>(whole >> 8);
    const __m512d zero = _mm512_setzero_pd();
    const __m512 n0 = _mm512_castpd_ps(_mm512_mask_i64gather_pd(zero, whole_low, low, map, 4));
    const __m512 n1 = _mm512_castpd_ps(_mm512_mask_i64gather_pd(zero, whole_high, high, map, 4));
    const __m512 s0 = _mm512_castpd_ps(_mm512_mask_i64gather_pd(zero, whole_low, low, south, 4));
    const __m512 s1 = _mm512_castpd_ps(_mm512_mask_i64gather_pd(zero, whole_high, high, south, 4));
    __m512 sum = _mm512_mul_ps(_mm512_permutex2var_ps(n0, west, n1), _mm512_loadu_ps(taps.weight[0] + i));
    sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_permutex2var_ps(n0, east, n1), _mm512_loadu_ps(taps.weight[1] + i)));
    sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_permutex2var_ps(s0, west, s1), _mm512_loadu_ps(taps.weight[2] + i)));
    sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_permutex2var_ps(s0, east, s1), _mm512_loadu_ps(taps.weight[3] + i)));
    _mm512_storeu_ps(out + i, sum);
    for (uint32_t edge = static_cast<uint16_t>(~whole); edge != 0; edge &= edge - 1) {
      const int64_t at = i + __builtin_ctz(edge);
      out[at] = edge_value(map, grid, taps, at);
    }
  }
  return i;
}
#endif

template <typename T>
void planes(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t channels,
            T* out, int64_t out_stride) {
  int64_t c = 0;
#if defined(__x86_64__) && RENDSEG_ISA == 2
  if constexpr (std::is_same_v<T, float>) {
    if (taps.in_order && grid.stride_x == 1 && !grid.nearest && taps.count > 0) {
      for (; c < channels; ++c) {
        const int64_t done = plane_pairs(map + c * stride_c, grid, taps, out + c * out_stride + taps.point[0]);
        const Taps<float> rest{
            taps.count - done,
            taps.offset + done,
            {taps.weight[0] + done, taps.weight[1] + done, taps.weight[2] + done, taps.weight[3] + done},
            taps.inside + done,
            taps.point + done,
            true};
        planes_block<T, 1>(map + c * stride_c, stride_c, grid, rest, out + c * out_stride, out_stride);
      }
      return;
    }
  }
#endif
  for (; c + 4 <= channels; c += 4) {
    planes_block<T, 4>(map + c * stride_c, stride_c, grid, taps, out + c * out_stride, out_stride);
  }
  for (; c < channels; ++c)
    planes_block<T, 1>(map + c * stride_c, stride_c, grid, taps, out + c * out_stride, out_stride);
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
          row[k] =
              load(p) * nw + load(p + stride_x) * ne + load(p + stride_y) * sw + load(p + stride_y + stride_x) * se;
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

// Asks for the taps of a point that is to come: they lie anywhere.
template <typename T>
inline void prefetch_vectors(const T* map, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t i, int64_t n) {
  if (i >= taps.count || taps.inside[i] != 15) return;
  const T* p = map + taps.offset[i];
  for (int64_t k = 0; k < n; k += static_cast<int64_t>(64 / sizeof(T))) {
    __builtin_prefetch(p + k);
    __builtin_prefetch(p + grid.stride_x + k);
    __builtin_prefetch(p + grid.stride_y + k);
    __builtin_prefetch(p + grid.stride_y + grid.stride_x + k);
  }
}

// Sixteen points are sampled into a tile, which is then written channel by channel.
template <typename T>
void vectors(const T* map, const SampleGrid& grid, const Taps<acc_t<T>>& taps, int64_t channels, T* out,
             int64_t out_stride) {
  using A = acc_t<T>;
  constexpr int64_t kPoints = 16, kAhead = 4;
  A tile[kPoints][kVectorChunk + 1];  // the odd pitch spreads a column over cache sets
  for (int64_t first = 0; first < taps.count; first += kPoints) {
    const int64_t points = taps.count - first < kPoints ? taps.count - first : kPoints;
    for (int64_t c = 0; c < channels; c += kVectorChunk) {
      const int64_t n = channels - c < kVectorChunk ? channels - c : kVectorChunk;
      for (int64_t i = 0; i < points; ++i) {
        prefetch_vectors(map + c, grid, taps, first + i + kAhead, n);
        vector_point(map + c, grid, taps, first + i, n, tile[i]);
      }
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

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg
