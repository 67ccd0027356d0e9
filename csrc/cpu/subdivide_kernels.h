// The kernels of subdivide: bilinear upsampling, margin and first histogram of the selection in one pass. Compiled once
// per instruction set, see compile_kernels.h.
//
// logits[N,C,h,w] become fine[N,C,H,W] (H = scale h, W = scale w) and keys[N,H,W], 4 bytes a cell: the margin (top-1
// minus top-2 over the channels) as an integer to sort by. A task is one image, a band of about 32 output rows and a
// tile of output columns, chosen so that two interpolated source rows fit the second-level cache (8 bytes C tile). It
// goes down its rows:
//
//   interpolate_row  one source row along x, once, into [blocks][C][lanes] of float or double: blocks of one vector of
//                    output columns. From a factor of two on, the sources of a vector of outputs fit one vector, and
//                    two permutes replace the gathers. Also notes whether the row holds NaN or infinity.
//   compose_row      that source row where the source is not stored, but a map after a step of refinement: from the row
//                    pair of the map before it, by the same code, and the values of the step's points.
//   upsample_blocks  along y, from the two source rows: reads two contiguous streams per channel and keeps the running
//                    top two (and argmax) in registers; one or two output rows that share their source rows, U blocks.
//                    Writes logits (past the cache where the map is large), or labels, or neither; always the keys.
//   upsample_band    the loop over rows; then counts the keys, in two tables, into the histogram of the image.
//
// The arithmetic is that of F.interpolate, `lower_weight * a + upper_weight * b` along x and then along y without fused
// multiply-add; with and without stored logits it is the same code, so both modes agree bit for bit. Rows with NaN or
// infinity go through a careful mode: a cell with a NaN has the key 0, and the first NaN is the label.
#ifndef RENDSEG_ISA

#include "../math/radix_key.h"
#include "../math/upsample.h"

namespace rendseg {

// One upsampling: h x w to height x width.
struct UpsampleLevel {
  int64_t h, w, height, width;
  // Taps of every output column, in the arithmetic type; the tables are padded with their last entry by 64 and to a
  // multiple of 64.
  const int32_t* lower;
  const int32_t* upper;
  const void* lower_weight;
  const void* upper_weight;
  // Cells that have values of their own afterwards: indices[N][count] ascending, values[N][count][C].
  const int64_t* indices;
  const void* values;
  int64_t count;
};

struct SubdivideArgs {
  Dtype dtype;
  const void* source;           // logits[N,C,h,w] of levels[0], contiguous or channels_last
  const UpsampleLevel* levels;  // the last gives what is written; those before it are made where they are read
  int64_t depth;
  bool channels_last;  // of source and fine
  void* fine;          // [N,C,H,W], or null when the upsampled logits are not wanted
  bool stream;         // rows of `fine` are aligned to vectors and too many to stay in the cache
  uint32_t* keys;      // [N,H,W]
  void* labels;        // [N,H,W] uint8 or int16, or null
  bool wide_labels;
  bool single;             // the margin is |logit of one channel|: C == 1, or class_index
  const int64_t* channel;  // [N] that channel, or null for channel 0
  uint32_t* histograms;    // [N][kHistogramBins]
  int64_t n, c, height, width;
  int64_t scale;
  bool align_corners;
  // Work: bands of output rows and tiles of output columns.
  int64_t band_rows, band_shift, bands, tile_width, tiles;
};

constexpr int64_t kColumnPadding = 64;
constexpr int64_t kMostLevels = 32;  // each at least twice as wide as the one below, and counted in 32 bits

// Bytes of scratch one worker needs, for the widest vectors.
inline int64_t subdivide_scratch_bytes(const SubdivideArgs& a) {
  const int64_t size = a.dtype == Dtype::kDouble ? 8 : 4;
  const int64_t columns = a.tile_width + 64;           // of a level below, rounded to vectors
  const int64_t rows = 2 * a.c * columns * size;       // two source rows, already interpolated along x
  const int64_t planes = a.c * (columns + 64) * size;  // one source row, widened, transposed or composed
  const int64_t block = a.c * 64 * 8;                  // one block of outputs before it is transposed
  return a.depth * (rows + planes) + block + 4 * 64;
}

// The first of `count` ascending indices that is not below `cell`.
inline int64_t first_from(const int64_t* indices, int64_t count, int64_t cell) {
  int64_t begin = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (indices[begin + half] < cell) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

}  // namespace rendseg

#else

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

template <typename T>
struct SubdivideTile {
  using A = Wide<T>;
  const SubdivideArgs* args;
  const UpsampleLevel* level;
  SubdivideTile* below;  // makes the source columns; null where the source is stored
  int64_t image;
  int64_t first_column, columns, blocks;  // of the output
  int64_t source_begin, source_end;       // columns of the source that the tile needs
  A* rows[2];                             // [blocks][C][lanes] each
  bool unknown[2];                        // the row holds NaN or infinity
  int64_t held[2];                        // which source row, -1 for none
  A* planes;
  A* block;
};

template <typename T>
void interpolate_row(SubdivideTile<T>& t, int64_t y);

// Both source rows of an output row.
template <typename T>
RENDSEG_INLINE void take_rows(SubdivideTile<T>& t, const UpsampleTap<Wide<T>>& tap) {
  for (int64_t source : {tap.lower, tap.upper}) {
    if (t.held[source & 1] != source) interpolate_row(t, source);
  }
}

// Row `y` of the level below, into planes[C][stride]: the bits that a stored map would hold.
template <typename T>
void compose_row(SubdivideTile<T>& t, int64_t y, int64_t stride) {
  using A = Wide<T>;
  constexpr int L = kLanes<A>;
  SubdivideTile<T>& below = *t.below;
  const SubdivideArgs& a = *t.args;
  const UpsampleLevel& level = *below.level;
  const UpsampleTap<A> tap = upsample_tap<A>(y, level.h, a.scale, a.align_corners);
  take_rows(below, tap);
  const A* row0 = below.rows[tap.lower & 1];
  const A* row1 = below.rows[tap.upper & 1];
  for (int64_t c0 = 0; c0 < a.c; c0 += 4) {
    const int64_t c1 = c0 + 4 < a.c ? c0 + 4 : a.c;
    for (int64_t b = 0; b < below.blocks; ++b) {
      for (int64_t c = c0; c < c1; ++c) {
        const Vec<A> s0 = load(row0 + (b * a.c + c) * L), s1 = load(row1 + (b * a.c + c) * L);
        store(t.planes + c * stride + b * L, round_to<T>(s0 * tap.lower_weight + s1 * tap.upper_weight));
      }
    }
  }
  const int64_t* indices = level.indices + t.image * level.count;
  const T* values = static_cast<const T*>(level.values) + t.image * level.count * a.c;
  const int64_t begin = y * level.width + below.first_column, end = begin + below.columns;
  for (int64_t p = first_from(indices, level.count, begin); p < level.count && indices[p] < end; ++p) {
    A* cell = t.planes + (indices[p] - begin);
    for (int64_t c = 0; c < a.c; ++c) cell[c * stride] = widen(values[p * a.c + c]);
  }
}

// Source row `y` interpolated along x into rows[y % 2].
template <typename T>
void interpolate_row(SubdivideTile<T>& t, int64_t y) {
  using A = Wide<T>;
  using V = Vec<A>;
  using I = Ints<A>;
  constexpr int L = kLanes<A>;
  const SubdivideArgs& a = *t.args;
  const UpsampleLevel& level = *t.level;
  const int64_t channels = a.c;
  const int64_t begin = t.source_begin, count = t.source_end - t.source_begin;
  const T* source = static_cast<const T*>(a.source) + t.image * channels * level.h * level.w;
  const A* plane;
  int64_t stride;
  if constexpr (sizeof(T) == sizeof(A)) {
    plane = source + y * level.w + begin;
    stride = level.h * level.w;
  }
  if (t.below != nullptr || sizeof(T) != sizeof(A) || a.channels_last) {
    stride = (count + L - 1) / L * L + L;  // channels a multiple of 4 KB apart would evict each other
    plane = t.planes;
    if (t.below != nullptr) {
      compose_row(t, y, stride);
    } else if (a.channels_last) {
      const T* row = source + (y * level.w + begin) * channels;
      for (int64_t c0 = 0; c0 < channels; c0 += 8) {
        const int64_t c1 = c0 + 8 < channels ? c0 + 8 : channels;
        for (int64_t x = 0; x < count; ++x) {
          for (int64_t c = c0; c < c1; ++c) t.planes[c * stride + x] = widen(row[x * channels + c]);
        }
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const T* row = source + (c * level.h + y) * level.w + begin;
        widen_row(row, count, t.planes + c * stride);
      }
    }
  }
  const int slot = static_cast<int>(y & 1);
  A* out = t.rows[slot];
  const A* lower_weight = static_cast<const A*>(level.lower_weight) + t.first_column;
  const A* upper_weight = static_cast<const A*>(level.upper_weight) + t.first_column;
  const int32_t* lower = level.lower + t.first_column;
  const int32_t* upper = level.upper + t.first_column;
  V sticky = V{};  // becomes NaN as soon as one value is NaN or infinite
  // From a factor of two on, the sources of one vector of outputs fit one vector.
  const bool permuting = RENDSEG_ISA > 0 && L >= 4 && a.scale >= 2 && count >= L;
  for (int64_t c0 = 0; c0 < channels; c0 += 4) {
    const int64_t c1 = c0 + 4 < channels ? c0 + 4 : channels;
    for (int64_t b = 0; b < t.blocks; ++b) {
      const V wl = load(lower_weight + b * L), wu = load(upper_weight + b * L);
      if (permuting) {
        int64_t base = lower[b * L] - begin;
        if (base > count - L) base = count - L;
        I il, iu;
        for (int j = 0; j < L; ++j) il[j] = lower[b * L + j], iu[j] = upper[b * L + j];
        const Lane<A> offset = static_cast<Lane<A>>(base + begin);
        il -= offset, iu -= offset;
        for (int64_t c = c0; c < c1; ++c) {
          const V s = load(plane + c * stride + base);
          sticky += s * A(0);
          store(out + (b * channels + c) * L, permute<A>(s, il) * wl + permute<A>(s, iu) * wu);
        }
      } else {
        for (int64_t c = c0; c < c1; ++c) {
          const A* s = plane + c * stride - begin;
          V vl, vu;
          for (int j = 0; j < L; ++j) vl[j] = s[lower[b * L + j]], vu[j] = s[upper[b * L + j]];
          sticky += vl * A(0) + vu * A(0);
          store(out + (b * channels + c) * L, vl * wl + vu * wu);
        }
      }
    }
  }
  bool unknown = false;
  for (int j = 0; j < L; ++j) unknown |= sticky[j] != sticky[j];
  t.unknown[slot] = unknown;
  t.held[slot] = y;
}

typedef uint8_t LabelBytes __attribute__((vector_size(kVectorBytes / 4)));  // as many as floats in a vector

RENDSEG_INLINE Bits<float> margin_keys(Vec<float> margin) {
  const Bits<float> key = ((Bits<float>)margin & 0x7fffffffu) + 1u;
  return margin == margin ? key : Bits<float>{};
}

enum SubdivideMode : int { kStore = 1, kLabel = 2, kSingle = 4, kCareful = 8 };

// Keys, and labels where they are wanted, of the `valid` cells from `at` on.
template <typename A, int kMode, bool kPartial>
RENDSEG_INLINE void write_keys(const SubdivideArgs& a, int64_t at, int64_t valid, Vec<A> margin, Ints<A> label) {
  if constexpr (sizeof(A) == 8) {
    for (int64_t j = 0; j < valid; ++j) {
      a.keys[at + j] = margin_key(static_cast<float>(margin[j]));
      if constexpr ((kMode & kLabel) != 0) {
        if (a.wide_labels) {
          static_cast<int16_t*>(a.labels)[at + j] = static_cast<int16_t>(label[j]);
        } else {
          static_cast<uint8_t*>(a.labels)[at + j] = static_cast<uint8_t>(label[j]);
        }
      }
    }
  } else {
    const Bits<float> key = margin_keys(margin);
    __builtin_memcpy(a.keys + at, &key, kPartial ? valid * 4 : sizeof(key));
    if constexpr ((kMode & kLabel) != 0) {
      if (a.wide_labels) {
        const HalfBits packed = __builtin_convertvector((Bits<float>)label, HalfBits);
        __builtin_memcpy(static_cast<int16_t*>(a.labels) + at, &packed, kPartial ? valid * 2 : sizeof(packed));
      } else {
        const LabelBytes packed = __builtin_convertvector((Bits<float>)label, LabelBytes);
        __builtin_memcpy(static_cast<uint8_t*>(a.labels) + at, &packed, kPartial ? valid : sizeof(packed));
      }
    }
  }
}

// `U` blocks of columns from block `b`, in `R` output rows from row `y` that lie between the same two source rows.
template <typename T, int kMode, int R, int U, bool kPartial>
RENDSEG_INLINE void upsample_blocks(SubdivideTile<T>& t, int64_t b, int64_t y, const Wide<T>* row0, const Wide<T>* row1,
                                    const UpsampleTap<Wide<T>>* taps) {
  using A = Wide<T>;
  using V = Vec<A>;
  using I = Ints<A>;
  constexpr int L = kLanes<A>;
  const SubdivideArgs& a = *t.args;
  const int64_t channels = a.c, plane = a.height * a.width;
  const int64_t column = t.first_column + b * L;
  const int64_t valid = kPartial ? t.columns - b * L : L;
  const int64_t chosen = (kMode & kSingle) != 0 && a.channel != nullptr ? a.channel[t.image] : 0;
  T* fine = (kMode & kStore) != 0 ? static_cast<T*>(a.fine) + t.image * channels * plane : nullptr;
  V first[R][U], second[R][U];
  I label[R][U], unknown[R][U];
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) {
      first[r][u] = second[r][u] = splat<A>(-__builtin_inf());
      label[r][u] = unknown[r][u] = I{};
    }
  }
  // Without stored logits only one channel matters to the margin of one channel.
  const int64_t c_begin = (kMode & kSingle) != 0 && (kMode & kStore) == 0 ? chosen : 0;
  const int64_t c_end = (kMode & kSingle) != 0 && (kMode & kStore) == 0 ? chosen + 1 : channels;
  for (int64_t c = c_begin; c < c_end; ++c) {
    const I channel = I{} + static_cast<Lane<A>>(c);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const V s0 = load(row0 + ((b + u) * channels + c) * L);
      const V s1 = load(row1 + ((b + u) * channels + c) * L);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const V v = round_to<T>(s0 * taps[r].lower_weight + s1 * taps[r].upper_weight);
        if constexpr ((kMode & kStore) != 0) {
          if (a.channels_last) {
            store(t.block + ((r * U + u) * channels + c) * L, v);
          } else {
            T* out = fine + c * plane + (y + r) * a.width + column + u * L;
            if constexpr (kPartial) {
              store_part(out, v, valid);
            } else if (a.stream) {
              stream<T>(out, v);
            } else {
              store(out, v);
            }
          }
        }
        if constexpr ((kMode & kSingle) != 0) {
          if (c == chosen) first[r][u] = v;
        } else {
          if constexpr ((kMode & kCareful) != 0) {
            // The first NaN wins the argmax, as in torch.argmax.
            const I nan = v != v;
            if constexpr ((kMode & kLabel) != 0) {
              const I take = (nan & ~unknown[r][u]) | ((v > first[r][u]) & ~unknown[r][u]);
              label[r][u] = take ? channel : label[r][u];
            }
            unknown[r][u] |= nan;
          } else if constexpr ((kMode & kLabel) != 0) {
            label[r][u] = select_greater<A>(v, first[r][u], channel, label[r][u]);
          }
          second[r][u] = larger<A>(second[r][u], smaller<A>(first[r][u], v));
          first[r][u] = larger<A>(v, first[r][u]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      V margin = first[r][u];
      if constexpr ((kMode & kSingle) == 0) margin -= second[r][u];
      if constexpr ((kMode & kCareful) != 0) margin = unknown[r][u] ? splat<A>(__builtin_nan("")) : margin;
      const int64_t at = (t.image * a.height + y + r) * a.width + column + u * L;
      write_keys<A, kMode, kPartial>(a, at, valid, margin, label[r][u]);
      if constexpr ((kMode & kStore) != 0) {
        if (a.channels_last) {
          const A* from = t.block + (r * U + u) * channels * L;
          T* out = fine + ((y + r) * a.width + column + u * L) * channels;
          for (int64_t j = 0; j < valid; ++j) {
            for (int64_t c = 0; c < channels; ++c) out[j * channels + c] = static_cast<T>(from[c * L + j]);
          }
        }
      }
    }
  }
}

template <typename T, int kMode, int R>
void upsample_rows(SubdivideTile<T>& t, int64_t y, const UpsampleTap<Wide<T>>* taps) {
  using A = Wide<T>;
  constexpr int L = kLanes<A>;
  const A* row0 = t.rows[taps[0].lower & 1];
  const A* row1 = t.rows[taps[0].upper & 1];
  // Stores come in runs of four vectors per channel, which the memory likes; without them two suffice to hide latency.
  constexpr int U = (kMode & kCareful) != 0                     ? 1
                    : (kMode & kStore) != 0 && RENDSEG_ISA == 2 ? 4
                    : RENDSEG_ISA > 0                           ? 2
                                                                : 1;
  const int64_t whole = t.columns / L;
  int64_t b = 0;
  for (; b + U <= whole; b += U) upsample_blocks<T, kMode, R, U, false>(t, b, y, row0, row1, taps);
  if constexpr (U > 1) {
    for (; b < whole; ++b) upsample_blocks<T, kMode, R, 1, false>(t, b, y, row0, row1, taps);
  }
  if (b < t.blocks) upsample_blocks<T, kMode, R, 1, true>(t, b, y, row0, row1, taps);
}

template <typename T, int kMode>
void upsample_band(SubdivideTile<T>& t, int64_t y_begin, int64_t y_end, uint32_t* histogram) {
  using A = Wide<T>;
  const SubdivideArgs& a = *t.args;
  for (int64_t y = y_begin; y < y_end;) {
    UpsampleTap<A> taps[2];
    taps[0] = upsample_tap<A>(y, t.level->h, a.scale, a.align_corners);
    int64_t rows = 1;
    if (y + 1 < y_end) {
      taps[1] = upsample_tap<A>(y + 1, t.level->h, a.scale, a.align_corners);
      if (taps[1].lower == taps[0].lower && taps[1].upper == taps[0].upper) rows = 2;
    }
    take_rows(t, taps[0]);
    const bool careful = (kMode & kSingle) == 0 && (t.unknown[taps[0].lower & 1] || t.unknown[taps[0].upper & 1]);
    if (careful) {
      for (int64_t r = 0; r < rows; ++r) upsample_rows<T, kMode | kCareful, 1>(t, y + r, taps + r);
    } else if (rows == 2) {
      upsample_rows<T, kMode, 2>(t, y, taps);
    } else {
      upsample_rows<T, kMode, 1>(t, y, taps);
    }
    for (int64_t r = 0; r < rows; ++r) {  // two tables: equal neighbours do not wait for each other
      const uint32_t* keys = a.keys + (t.image * a.height + y + r) * a.width + t.first_column;
      int64_t x = 0;
      for (; x + 1 < t.columns; x += 2) {
        ++histogram[histogram_bin(keys[x])];
        ++histogram[kHistogramBins + histogram_bin(keys[x + 1])];
      }
      if (x < t.columns) ++histogram[histogram_bin(keys[x])];
    }
    y += rows;
  }
}

// A tile of `columns` output columns of level `depth` from `first_column` on, its scratch, and the tiles that it reads.
template <typename T>
void lay_tile(const SubdivideArgs& a, int64_t depth, int64_t image, int64_t first_column, int64_t columns,
              SubdivideTile<T>* tiles, Wide<T>* scratch) {
  using A = Wide<T>;
  constexpr int L = kLanes<A>;
  SubdivideTile<T>& t = tiles[depth];
  const UpsampleLevel& level = a.levels[depth];
  t.args = &a;
  t.level = &level;
  t.below = depth == 0 ? nullptr : &tiles[depth - 1];
  t.image = image;
  t.first_column = first_column;
  t.columns = columns;
  t.blocks = (columns + L - 1) / L;
  t.source_begin = level.lower[first_column];
  t.source_end = level.upper[first_column + columns - 1] + 1;
  // Widened to whole vectors where the map allows it.
  const int64_t least = t.below == nullptr ? L : (t.source_end - t.source_begin + L - 1) / L * L;
  if (t.source_end - t.source_begin < least) {
    t.source_begin = level.w < least ? 0 : (t.source_begin < level.w - least ? t.source_begin : level.w - least);
    t.source_end =
        level.w < least ? level.w : (t.source_end > t.source_begin + least ? t.source_end : t.source_begin + least);
  }
  const int64_t row_size = a.c * (a.tile_width + 64);
  t.rows[0] = scratch;
  t.rows[1] = t.rows[0] + row_size;
  t.planes = t.rows[1] + row_size;
  t.held[0] = t.held[1] = -1;
  t.unknown[0] = t.unknown[1] = false;
  if (t.below != nullptr) {
    lay_tile(a, depth - 1, image, t.source_begin, t.source_end - t.source_begin, tiles, t.planes + row_size + a.c * 64);
  }
}

template <typename T>
void run_task(const SubdivideArgs& a, int64_t task, char* scratch, uint32_t* histogram) {
  using A = Wide<T>;
  const int64_t tile = task % a.tiles, band = task / a.tiles % a.bands, first_column = tile * a.tile_width;
  const int64_t columns = a.width - first_column < a.tile_width ? a.width - first_column : a.tile_width;
  SubdivideTile<T> tiles[kMostLevels];
  SubdivideTile<T>& t = tiles[a.depth - 1];
  t.block = reinterpret_cast<A*>(scratch);
  lay_tile(a, a.depth - 1, task / (a.tiles * a.bands), first_column, columns, tiles, t.block + a.c * 8 * kLanes<A>);
  const int64_t y_begin = band == 0 ? 0 : band * a.band_rows + a.band_shift;
  const int64_t y_next = (band + 1) * a.band_rows + a.band_shift;
  const int64_t y_end = y_next < a.height && band + 1 < a.bands ? y_next : a.height;
  if (a.fine != nullptr) {
    if (a.single) {
      upsample_band<T, kStore | kSingle>(t, y_begin, y_end, histogram);
    } else {
      upsample_band<T, kStore>(t, y_begin, y_end, histogram);
    }
  } else if (a.single) {
    upsample_band<T, kSingle>(t, y_begin, y_end, histogram);
  } else if (a.labels != nullptr) {
    upsample_band<T, kLabel>(t, y_begin, y_end, histogram);
  } else {
    upsample_band<T, 0>(t, y_begin, y_end, histogram);
  }
}

// One task: an image, a band of rows and a tile of columns. `histogram` has two tables, which the caller adds.
void subdivide_task(const SubdivideArgs& a, int64_t task, char* scratch, uint32_t* histogram) {
  with_element(a.dtype, [&]<typename T>() { run_task<T>(a, task, scratch, histogram); });
}

// Makes streamed stores visible before the next ordinary one of this thread.
void subdivide_fence() {
#if RENDSEG_ISA > 0
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
